import io

import pytest

from src.utils.report import ProgressLine, duration, epoch_line


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (75.9, "1:15"), (3675, "1:01:15"), (90061, "25:01:01")])
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
    assert {len(part) for part in written if part} == {19}  # each wipes out the one before, none wraps
    assert written[2].strip() == "short" and written[3].strip() == "" and written[-1] == ""


def test_epoch_line():
    val = {"avg_r1": 1.25, "i2t_r1": 1.5, "t2i_r1": 1.0, "i2t_r10": 9.0, "t2i_r10": 8.0, "i2t_medr": 100.5, "t2i_medr": 90.0}
    line = epoch_line({"epoch": 3, "train": {"loss": 2.5}, "val": val, "seconds": 61.24})
    assert line == ("epoch   3  loss 2.5000  val R@1  1.25 (i2t 1.50, t2i 1.00)  R@10 9.0/8.0  MedR 100.5/90  61.2 s")
