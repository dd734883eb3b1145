import argparse
import io
import logging
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from src.utils import console
from src.utils.console import (
    Parser,
    Paths,
    ProgressLine,
    counted,
    duration,
    find_paths,
    first_three,
    join_for_windows,
    log_to_console,
    number,
    prepare_output,
    printable,
    say_once,
    shell_command,
    single_path,
    text,
)


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (75.9, "1:15"), (3675, "1:01:15"), (90061, "25:01:01")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_none_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = ProgressLine(stream=stream)
        line.update("a very long text of more than twenty columns")
        line.update("short")
        line.clear()
    written = terminal.getvalue().split("\r")
    assert file.getvalue() == "" and "\n" not in terminal.getvalue()
    # Each text covers the one before, and none wraps into a second line.
    assert {len(part) for part in written if part} == {19}
    assert written[2].strip() == "short" and written[3].strip() == "" and written[-1] == ""


class Clock:
    """Replaces time.time, and is set forward by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(console.time, "time", lambda: self.now)


def test_without_a_terminal_a_line_tells_every_half_minute_how_far_the_work_is(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    line = ProgressLine(stream=file)
    show = line.counter("making the bank")
    for done in range(10, 101, 10):  # 10 photos in 10 seconds
        clock.now += 10
        show(done, 100)
    assert file.getvalue().splitlines() == [
        "making the bank: 30 of 100 photos  1:10 left",
        "making the bank: 60 of 100 photos  0:40 left",
        "making the bank: 90 of 100 photos  0:10 left"]
    line.clear()  # an ordinary line follows, so that the next one is not due for a while
    clock.now += 29
    line.update("too early")
    clock.now += 1
    line.update("in time")
    assert file.getvalue().splitlines()[3:] == ["in time"]


def test_work_of_less_than_half_a_minute_needs_no_line(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    show = ProgressLine(stream=file).counter("short")
    for done in range(1, 30):
        clock.now += 1
        show(done, 29)
    assert file.getvalue() == ""


def test_under_torchrun_only_the_main_process_tells_how_far_the_work_is(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    for stream in (io.StringIO(), Terminal()):
        line = ProgressLine(stream=stream)
        clock.now += 100
        line.update("epoch 1")
        assert stream.getvalue() == ""


def test_the_time_that_is_left_is_not_guessed_from_one_call(monkeypatch):
    """What came before the first call, such as reading a cache, took time of another kind."""
    monkeypatch.setenv("COLUMNS", "60")
    clock, terminal = Clock(monkeypatch), Terminal()
    show = ProgressLine(stream=terminal).counter("reading")
    for done, unit in ((50, "photos"), (60, "photos"), (60, "photos"), (1000, "captions")):
        show(done, 1000, unit)
        clock.now += 2
    texts = [text.strip() for text in terminal.getvalue().split("\r") if text.strip()]
    assert texts == ["reading: 50 of 1,000 photos", "reading: 60 of 1,000 photos  3:08 left",
                     "reading: 60 of 1,000 photos  6:16 left",
                     "reading: 1,000 of 1,000 captions"]


def test_a_pipe_whose_reader_has_gone_ends_the_lines_and_no_more():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe:
        line = ProgressLine(stream=pipe)
        line.last_line -= 100
        line.update("epoch 1")
        assert not line.is_on
    # What the stream still held has vanished, so that closing it raised nothing.


def test_text_that_standard_output_cannot_encode(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "cp1252"))
    prepare_output()
    print("caf\u00e9 \u72d7 donn\udce9es", flush=True)
    assert content.getvalue().decode("cp1252").rstrip() == "caf\u00e9 ? donn?es"


def test_closed_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_output()
    print("to nowhere", file=sys.stderr)
    assert not ProgressLine().live


def test_a_terminal_that_was_closed_ends_the_line_and_no_more():
    class Closed(Terminal):
        def write(self, text):
            raise OSError("Input/output error")

    line = ProgressLine(stream=Closed())
    line.update("epoch 1")
    line.clear()
    assert not line.live


@pytest.mark.parametrize("rank, printed", [("0", "hello\n"), ("1", "")])
def test_only_the_main_process_prints_messages_but_all_print_errors(
        monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    log = logging.getLogger(f"test of rank {rank}")
    log.propagate = False
    log_to_console(log)
    log.info("hello")
    log.error("a failure")
    out, err = capsys.readouterr()
    assert (out, err) == (printed, "a failure\n")


@pytest.mark.parametrize("bounds, accepted, refused", [
    ("[0, 1)", ("0", "0.5"), ("1", "-0.1", "nan")),
    ("(0, inf)", ("0.1", "1e9"), ("0", "inf", "nan"))])
def test_numbers_within_bounds(bounds, accepted, refused):
    parse = number(float, bounds)
    for value in accepted:
        assert parse(value) == float(value)
    for value in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="is not in"):
            parse(value)


@pytest.mark.parametrize("given, message", [
    (["--name", " "], "argument --name: is empty"),
    (["--count", "many"], "invalid int value: 'many'"),
    (["--cou", "3"], "unrecognized arguments")])
def test_wrong_arguments_are_one_line_and_status_2(given, message, capsys):
    parser = Parser(prog="program")
    parser.add_argument("--name", type=text)
    parser.add_argument("--count", type=number(int, "[1, inf)"))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


def test_texts_for_messages():
    assert printable("a\nb\x1b[1m\udce9") == "a?b?[1m?"
    assert first_three("abc") == "a, b, c" and first_three("abcde") == "a, b, c and 2 more"


def test_one_photo_is_no_photos():
    assert [counted(n, "photo") for n in (0, 1, 2000)] == ["0 photos", "1 photo", "2,000 photos"]


def test_a_message_is_said_once(caplog):
    log = logging.getLogger("test of say_once")
    log.setLevel(logging.INFO)
    with say_once(log):
        for message in ("first", "second", "first"):
            log.info(message)
    log.info("first")
    assert caplog.messages == ["first", "second", "first"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, in which the program runs: with the folders a, b and d[1]."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "d[1]"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_paths_that_the_shell_has_not_expanded(home):
    assert find_paths("~") == [str(home)] and find_paths("~/new") == [f"{home}/new"]
    assert find_paths("?") == ["a", "b"] and find_paths("~/[ab]") == [f"{home}/a", f"{home}/b"]
    for name in ("a", "d[1]", "nothing*", "~new", "a~", "photo[2].jpg"):
        assert find_paths(name) == [name]
    (home / "*").mkdir()
    (home / "~").mkdir()
    assert find_paths("*") == ["*"] and find_paths("~") == ["~"]


def test_paths_on_windows_have_slashes(home, monkeypatch):
    # os itself stays as it is, as pathlib and glob would take this system for Windows.
    system = SimpleNamespace(name="nt", path=os.path)
    monkeypatch.setattr("src.utils.console.os", system)
    assert find_paths(r"data\flickr8k") == ["data/flickr8k"]
    assert find_paths("~\\new") == [f"{home}/new"]
    assert find_paths(r"\\?\C:\long") == [r"\\?\C:\long"]


def test_flags_that_take_paths(home, capsys):
    parser = Parser(prog="program")
    parser.add_argument("--one", type=single_path)
    parser.add_argument("--many", nargs="+", action=Paths)
    args = parser.parse_args(["--one=~/a*", "--many", "?", "~/new", "none*"])
    assert args.one == f"{home}/a" and args.many == ["a", "b", f"{home}/new", "none*"]
    for given, message in ((["--one", "?"], "argument --one: ? fits 2 names, such as a"),
                           (["--one", ""], "argument --one: is empty"),
                           (["--many", "a", " "], "argument --many: is empty")):
        with pytest.raises(SystemExit):
            parser.parse_args(given)
        assert message in capsys.readouterr().err


def test_commands_are_quoted_for_the_shell(monkeypatch):
    command = ["python", "train.py", "--output_dir", "my runs/$1 'a'"]
    assert shlex.split(shell_command(command)) == command
    monkeypatch.setattr("src.utils.console.os", SimpleNamespace(name="nt"))
    assert shell_command(command) == """python train.py --output_dir "my runs/$1 'a'\""""


@pytest.mark.parametrize("word, quoted", [
    (r"C:\data\flickr8k", r"C:\data\flickr8k"), ("--epochs=3", "--epochs=3"), ("", '""'),
    ("a b", '"a b"'), ("R&D", '"R&D"'), ("a;b", '"a;b"'), ("(1)", '"(1)"'), ("a,b", '"a,b"'),
    ("it's", '"it\'s"'), ("50^", '"50^"'), ("@x", '"@x"')])
def test_words_of_windows_shells(word, quoted):
    assert join_for_windows([word]) == quoted


@pytest.mark.parametrize("word", [
    "my runs\\", 'say "hi there"', 'a \\"b', "two  words", "\\ \\\\"])
def test_backslashes_and_quotes_are_escaped_as_windows_programs_read_them(word):
    assert join_for_windows([word]) == subprocess.list2cmdline([word])
