import io
import json

import pytest
import torch

from src.utils.checkpoint import CheckpointError
from src.utils.report import (TEST, TEST_TIME, ProgressLine, agreement, agreement_table, comparison, comparison_rows, duration, epoch_line,
                              length_table, load_run)
from tests.test_show_flickr8k_results import metrics, write_run


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


def runs(tmp_path):
    write_run(tmp_path / "worse", avg_r1=(3, 5), epochs=2)
    write_run(tmp_path / "better", avg_r1=(30, 20, 10), epochs=4)
    (tmp_path / "worse" / TEST).write_text(json.dumps(metrics(44)))
    for name, gain, cost in (("worse", 0.5, 2.0), ("better", -1.5, 4.0)):
        val = {"off": {"avg_r1": 20.0}, "on": {"avg_r1": 20.0 + gain}, "seconds": {"off": 1.0, "on": cost}}
        (tmp_path / name / TEST_TIME).write_text(json.dumps({"val": val}))
    return [load_run(tmp_path / name) for name in ("worse", "better")]


def test_comparison(tmp_path):
    rows = comparison_rows(runs(tmp_path), lambda arguments: f"train --seed {arguments['seed']}")
    assert [row["run"] for row in rows] == [str(tmp_path / name) for name in ("better", "worse")]
    assert rows[0]["val"] == metrics(30) and rows[1]["test"] == metrics(44) and rows[0]["test"] is None
    assert json.loads(comparison(rows, "json")) == rows
    heads, rule, better, worse = ([cell.strip() for cell in line.strip("|").split("|")]
                                  for line in comparison(rows, "markdown").splitlines())
    assert set(rule) == {"---"} and len(heads) == len(rule) == len(better) == len(worse)
    cells = dict(zip(heads, better))
    assert cells["epochs"] == "1 of 3+" and cells["avg R@1"] == "31.67" and cells["pair R@1"] == "37.67"
    assert cells["R@1"] == "30.2 / 33.2" and cells["R@10"] == "32.2 / 35.2" and cells["MedR"] == "90 / 120"
    assert cells["model"] == "small, 7.7 M" and cells["command"] == "`train --seed 77`" and "Some GPU" in cells["hardware, date"]
    assert dict(zip(heads, worse))["epochs"] == "2 of 2"
    lines = comparison(rows).splitlines()
    assert lines[2].startswith("better  ") and lines[3].startswith("worse   ") and "31.67" in lines[2]
    assert cells["test-time"] == "-1.50" and dict(zip(heads, worse))["test-time"] == "+0.50"
    assert lines[-1].endswith("mean of 2 runs -0.50, evaluation taking 3.0 times as long")
    assert "mean of" not in comparison(rows[:1])


@pytest.mark.parametrize("damage", [lambda run: run["config"].pop("parameters"), lambda run: run["config"]["arguments"].clear(),
                                    lambda run: run["history"][0]["val"].pop("avg_r1"), lambda run: run.update(config=[]),
                                    lambda run: run["history"][1]["val"].pop("i2t_medr")])
def test_comparison_of_damaged_runs(tmp_path, damage):
    found = runs(tmp_path)
    damage(found[0])
    with pytest.raises(CheckpointError, match="worse: a file of the run lacks"):
        comparison_rows(found, lambda arguments: "")


def test_recall_by_length():
    captions = ["a dog", "one two three four five six seven eight nine ten", "a well-known dog's bed , you see there !"]
    lines = [line.split() for line in length_table(captions, torch.tensor([1, 7, 3])).splitlines()]
    assert ["up", "to", "6", "words", "1", "100.00", "100.00", "100.00", "1"] in lines
    assert ["7", "to", "9", "words", "1", "0.00", "100.00", "100.00", "3"] in lines  # well-known and dog's are a word each
    assert ["10", "to", "12", "words", "1", "0.00", "0.00", "100.00", "7"] in lines
    assert ["13", "to", "16", "words", "0", "-", "-", "-", "-"] in lines
    assert ["all", "3", "33.33", "66.67", "100.00", "3"] in lines


def test_recall_by_agreement():
    photo = ["A dog runs", "two dogs in the grass", "the brown dog", "an animal in the grass"]
    assert agreement(photo) == 3 and agreement(["the", "a"]) == 0 and agreement(["dog dog", "cat"]) == 1
    lines = [line.split() for line in agreement_table([photo, ["a cat"]], torch.tensor([1, 20]), torch.tensor([1, 2, 3, 30, 1])).splitlines()]
    assert ["1", "of", "its", "captions", "1", "0.00", "0.00", "0.00", "20", "1", "100.00", "100.00", "100.00", "1"] in lines
    assert ["3", "of", "its", "captions", "1", "100.00", "100.00", "100.00", "1", "4", "25.00", "75.00", "75.00", "2.5"] in lines
