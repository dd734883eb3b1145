import argparse
import io
import logging
import sys

import pytest

from src.utils.console import (
    Parser,
    ProgressLine,
    duration,
    first_three,
    log_to_console,
    number,
    prepare_output,
    printable,
    say_once,
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


def test_a_message_is_said_once(caplog):
    log = logging.getLogger("test of say_once")
    log.setLevel(logging.INFO)
    with say_once(log):
        for message in ("first", "second", "first"):
            log.info(message)
    log.info("first")
    assert caplog.messages == ["first", "second", "first"]
