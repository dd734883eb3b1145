"""The command line and the terminal."""
import argparse
import logging
import os
import shutil
import signal
import sys
import time

from src.utils.distributed import rank_and_world

PROGRESS_INTERVAL = 0.1  # seconds between two updates of a line


class Parser(argparse.ArgumentParser):
    """argparse's, flags never abbreviated, an error being one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def text(value):
    """argparse's type for a path or a name: an empty one is an unset variable of the shell."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return value


def number(kind, bounds):
    """argparse's type for a number of that kind within bounds such as "[0, 1)"."""
    low, high = map(float, bounds[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value >= low if bounds[0] == "[" else value > low
        below = value <= high if bounds[-1] == "]" else value < high
        if not (above and below):  # NaN is neither
            raise argparse.ArgumentTypeError(f"{value} is not in {bounds}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls a text that is no number
    return parse


def prepare_output(end_with_reader=False):
    """Let standard output take any text: what its encoding lacks is replaced by "?", and where it
    or standard error is closed, all goes to nowhere. end_with_reader: the program ends in silence
    when nobody reads any more (`| head`)."""
    if end_with_reader and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):  # where it is a stream of characters, all is printed
        sys.stdout.reconfigure(errors="replace")


def printable(text):
    """The text in a line: "?" for line breaks, other control characters, and bytes of a file's name
    that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in text)


class ConsoleHandler(logging.StreamHandler):
    """Where the reader has gone (`| head`), the run goes on in silence."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def log_to_console(log):
    """The main process's lines to standard output, all errors to the other."""
    def is_plain(record):
        return record.levelno < logging.ERROR and rank_and_world()[0] == 0

    prepare_output()
    to_stdout, to_stderr = ConsoleHandler(sys.stdout), ConsoleHandler(sys.stderr)
    to_stdout.addFilter(is_plain)
    to_stderr.setLevel(logging.ERROR)
    log.setLevel(logging.INFO)
    log.addHandler(to_stdout)
    log.addHandler(to_stderr)


def duration(seconds):
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """One line on a terminal, written over itself; nothing elsewhere, or unless `on`."""

    def __init__(self, on=True, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self.live = on and self.stream.isatty()
        self.started = time.time()

    def _write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal was closed
            self.live = False

    def update(self, text):
        if self.live:
            columns = shutil.get_terminal_size().columns - 1
            self._write(f"\r{text[:columns]:<{columns}}")

    def clear(self):
        """Take the line away, so that a plain line can follow."""
        if self.live:
            self.update("")
            self._write("\r")

    def counter(self, what):
        """-> function(done, total) that says, now and then, how far it is."""
        started, shown = {}, 0.0

        def update(done, total, unit="photos"):
            nonlocal shown
            now = time.time()
            seconds = now - started.setdefault(unit, now)
            if now - shown > PROGRESS_INTERVAL:
                shown, left = now, duration(seconds * (total - done) / done)
                self.update(f"{what}: {done:,} of {total:,} {unit}  {left} left")
        return update

    def speed(self, steps, remaining_steps, pairs):
        """Pairs a second, and the time left. steps: of `pairs` each, since the start."""
        seconds = (time.time() - self.started) / steps
        return f"{pairs / seconds:.0f} pairs/s  {duration(remaining_steps * seconds)} left"


def first_three(items):
    """"a, b, c and 9 more" for a message."""
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


