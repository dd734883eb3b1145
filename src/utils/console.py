"""The command line and the terminal.

This module must not import torch, so that --help answers at once."""
import argparse
import contextlib
import glob
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time

PROGRESS_INTERVAL = 0.1  # seconds between two updates of a progress line
PLAIN_INTERVAL = 30  # seconds between two lines about progress where there is no terminal


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviated flags, whose errors are one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def text(value):
    """The argparse type of names. It refuses an empty one, which usually comes from a
    shell variable that is not set."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return value


def find_paths(value):
    """The paths that an argument stands for: `~` is the home folder, and `*`, `?` and [...] are a
    pattern, where the shell has left that to the program, as those of Windows do. A name that
    exists as it is, and a pattern that fits nothing, stay as they are. On Windows, the folders of
    a path are separated by slashes, so that a config.json fits other systems as well.

    Returns a sorted list of strings, which is never empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    if os.name == "nt" and not value.startswith("\\\\?\\"):
        value = value.replace("\\", "/")
    if os.path.lexists(value):
        return [value]
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser("~") + value[1:]
    return sorted(glob.glob(value)) or [value]


def single_path(value):
    """The argparse type of a path, see `find_paths`. It refuses an empty one, which usually comes
    from a shell variable that is not set."""
    found = find_paths(value)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"{value} fits {len(found)} names, such as {found[0]}")
    return found[0]


class Paths(argparse.Action):
    """The argparse action of a flag that takes several paths, see `find_paths`."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            found = [path for value in values for path in find_paths(value)]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, found)


def number(number_type, bounds):
    """Make the argparse type of numbers (int or float) within bounds such as "[0, 1)"."""
    low, high = map(float, bounds[1:-1].split(","))

    def parse(text):
        value = number_type(text)
        is_above = value >= low if bounds[0] == "[" else value > low
        is_below = value <= high if bounds[-1] == "]" else value < high
        if not (is_above and is_below):  # both are false for NaN
            raise argparse.ArgumentTypeError(f"{value} is not in {bounds}")
        return value

    parse.__name__ = number_type.__name__  # argparse names the type so in "invalid int value"
    return parse


def prepare_output(end_with_reader=False):
    """Make standard output accept any text.

    Characters that its encoding lacks are printed as "?". If standard output or standard error is
    closed, what is printed there is dropped. end_with_reader: whether the program ends silently
    when the reader of a pipe has gone, as in `... | head`.
    """
    if end_with_reader and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def shell_command(arguments):
    """Join arguments to a command line, as the user may paste it into a shell: on Windows into
    cmd.exe or PowerShell, and else into those that follow POSIX.

    Both of Windows' shells understand double quotes, between which they still read %NAME%, or $NAME
    and the backtick. No way of quoting these suits both."""
    join = join_for_windows if os.name == "nt" else shlex.join
    return join(map(str, arguments))


def join_for_windows(arguments):
    """Join arguments as `shell_command` does on Windows."""
    words = []
    for word in arguments:
        if not re.fullmatch(r"[\w./:=+\\-]+", word):
            # Programs take a backslash before a quote for an escape.
            word = re.sub(r'(\\*)"', r'\1\1\\"', word)
            word = re.sub(r"(\\+)$", r"\1\1", word)
            word = f'"{word}"'
        words.append(word)
    return " ".join(words)


def printable(text):
    """Make a text fit for one line of the terminal: control characters, line breaks and the bytes
    of a file name that are not UTF-8 become "?"."""
    return "".join(c if c.isprintable() else "?" for c in text)


def drop_output(stream):
    """Let everything that is still written to a stream of the system vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


class ConsoleHandler(logging.StreamHandler):
    """Drops messages once the reader of a pipe has gone (`... | head`), so that the run goes on."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        drop_output(self.stream)


def log_to_console(log):
    """Send errors to standard error and other messages to standard output.

    Under torchrun only the main process prints messages, while every process prints its errors.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    prepare_output()
    to_stdout, to_stderr = ConsoleHandler(sys.stdout), ConsoleHandler(sys.stderr)
    to_stdout.addFilter(lambda record: is_main and record.levelno < logging.ERROR)
    to_stderr.setLevel(logging.ERROR)
    log.setLevel(logging.INFO)
    log.addHandler(to_stdout)
    log.addHandler(to_stderr)


@contextlib.contextmanager
def say_once(log):
    """Inside, a message is dropped if it has been logged inside before."""
    said = set()

    def is_new(record):
        message = record.getMessage()
        is_new = message not in said
        said.add(message)
        return is_new

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


def duration(seconds):
    """Format seconds as minutes or hours: 75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """A line on the terminal that is overwritten as the work proceeds.

    Where the stream is not a terminal, an ordinary line tells every PLAIN_INTERVAL seconds how far
    the work is, so that a log shows that it goes on. Under torchrun only the main process writes.
    """

    def __init__(self, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self.is_on = os.environ.get("RANK", "0") == "0"
        self.live = self.is_on and self.stream.isatty()
        self.started = self.last_line = time.time()

    def _write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal was closed, or the reader of the pipe has gone
            self.is_on = self.live = False
            with contextlib.suppress(OSError):
                drop_output(self.stream)

    def update(self, text):
        """Show another text, cut to the width of the terminal."""
        if self.live:
            columns = shutil.get_terminal_size().columns - 1
            self._write(f"\r{text[:columns]:<{columns}}")
        elif self.is_on and time.time() - self.last_line >= PLAIN_INTERVAL:
            self.last_line = time.time()
            self._write(f"{text}\n")

    def clear(self):
        """Erase the line, so that an ordinary line can be printed."""
        self.last_line = time.time()
        if self.live:
            self.update("")
            self._write("\r")

    def counter(self, title):
        """Return a function `update(done, total, unit)` that shows how much of a task is done and,
        from its second call on, estimates the time left. It may be called often."""
        first_calls, last_shown = {}, 0.0  # first_calls: for each unit, (time, done)

        def update(done, total, unit="photos"):
            nonlocal last_shown
            now = time.time()
            began, done_before = first_calls.setdefault(unit, (now, done))
            if now - last_shown > PROGRESS_INTERVAL:
                last_shown = now
                text = f"{title}: {done:,} of {total:,} {unit}"
                if done > done_before:
                    left = (now - began) * (total - done) / (done - done_before)
                    text += f"  {duration(left)} left"
                self.update(text)
        return update

    def speed(self, steps, remaining_steps, pairs):
        """Describe the throughput and the time left, after so many steps of `pairs` pairs since
        this object was made."""
        seconds = (time.time() - self.started) / steps
        return f"{pairs / seconds:.0f} pairs/s  {duration(remaining_steps * seconds)} left"


def counted(number, noun):
    """A number with its noun: "1 photo", "2,000 photos"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_three(items):
    """Join the first three items for a message: "a, b, c and 9 more"."""
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more
