"""The tables, from the metrics of runs that are made up. The summary of a whole run is tested in
test_show_flickr8k_results.py, where it is printed."""
import json
import re
import shlex

import pytest

from src.comparison import comparison
from src.report import (
    ending,
    epoch_line,
    notes_on_the_splits,
    recall_notes,
    recall_tables,
    summary,
)
from src.runs import TEST, load_run
from src.utils.errors import UsageError
from tests.test_show_flickr8k_results import metrics, write_run


def test_the_line_of_an_epoch():
    val = {"avg_r1": 1.25, "i2t_r1": 1.5, "t2i_r1": 1.0, "i2t_r10": 9.0, "t2i_r10": 8.0,
           "i2t_medr": 100.5, "t2i_medr": 90.0}
    row = {"epoch": 3, "train": {"loss": 2.5}, "val": val, "seconds": 61.24}
    rest = "val R@1  1.25 (i2t 1.50, t2i 1.00)  R@10 9.0/8.0  MedR 100.5/90  61.2 s"
    assert epoch_line(row, {}) == f"epoch   3  loss 2.5000  {rest}"
    zero_shot = row | {"epoch": 0, "train": {"loss": None}}
    assert epoch_line(zero_shot, {}) == f"epoch   0  zero-shot  {rest}"
    assert epoch_line(zero_shot, {"init_from": {}}) == f"epoch   0  as it was  {rest}"


def write_two_runs(tmp_path):
    """Write a finished run, and a better one that is still training; return both as Runs."""
    write_run(tmp_path / "worse", avg_r1=(3, 5), epochs=2)
    write_run(tmp_path / "better", avg_r1=(30, 20, 10), epochs=4)
    (tmp_path / "worse" / TEST).write_text(json.dumps(metrics(44)))
    return [load_run(tmp_path / name) for name in ("worse", "better")]


def test_the_measure_of_the_original_run_needs_equally_many_captions(tmp_path):
    run, _ = write_two_runs(tmp_path)
    title, columns, rows = recall_tables(run)[0]
    assert title == "Validation: 100 photos of 91 px, 500 captions"
    assert columns == ["best (epoch 2)", "final (epoch 2)", "chance"]
    cells = {name: values for name, *values in rows}
    avg_r1 = metrics(5)["avg_r1"]
    assert cells["Avg R@1 (%)"][0] == f"{avg_r1:.2f}"
    assert cells["original Avg R@1 (%)"][0] == f"{avg_r1 / 5:.2f}"
    assert cells["I->T median rank"][2] == "-"  # of chance
    assert recall_notes(run)[0].startswith("original:")

    run.config["data"]["val"]["captions_per_photo"] = {"4": 50, "5": 50}
    _, _, rows = recall_tables(run)[0]
    assert "original Avg R@1 (%)" not in [row[0] for row in rows]
    assert not any(note.startswith("original:") for note in recall_notes(run))


def test_a_split_of_few_photos_says_how_coarse_its_figures_are(tmp_path):
    finished, unfinished = write_two_runs(tmp_path)
    note = "test has 50 photos: one photo moves I->T R@1 by 2.0 points; chance is 2.0 % (avg R@1)"
    assert note in recall_notes(finished) and note not in recall_notes(unfinished)
    assert notes_on_the_splits(finished.config) == [note]  # val has 100 photos
    finished.config["data"]["val"] |= {"photos": 10, "captions_per_photo": {"1": 10}}
    assert recall_notes(finished)[-2] == (
        "val has 10 photos: one photo moves I->T R@1 by 10.0 points; chance is 10.0 % (avg R@1)")


def test_tables_of_photos_that_share_captions(tmp_path):
    """Of 100 photos, 60 have one text, 30 have another one, and 10 have both."""
    run, _ = write_two_runs(tmp_path)
    run.config["data"]["val"] |= {
        "captions": 110, "captions_per_photo": {"1": 90, "2": 10}, "different_captions": 2,
        "texts_per_photo": {"1": 90, "2": 10}, "photos_per_caption": {"70": 70, "40": 40}}
    title, columns, rows = recall_tables(run)[0]
    assert title == "Validation: 100 photos of 91 px, 110 captions, 2 different"
    chance = {name: values[columns.index("chance")] for name, *values in rows}
    assert chance["I->T R@1 (%)"] == "55.00" and chance["I->T R@5 (%)"] == "100.00"
    assert chance["T->I R@1 (%)"] == f"{100 * (0.7 * 70 + 0.4 * 40) / 110:.2f}"
    assert "original Avg R@1 (%)" not in chance
    assert recall_notes(run)[0] == (
        "photos share captions: a caption is right for every photo that has it")
    assert " 100 val that share captions;" in comparison([run])


def test_the_end_of_a_training_is_seven_lines(tmp_path):
    """The two commands can be pasted, whatever the folder is called."""
    run, _ = write_two_runs(tmp_path)
    run.dir = tmp_path / "my run"
    run.bank = {"val": {"with_bank": metrics(6)}, "test": {"with_bank": metrics(45)}}
    lines = ending(run).splitlines()
    assert len(lines) == 7 and max(map(len, lines[:4])) <= 80
    cells = [re.split(r" {2,}", line.strip()) for line in lines[:4]]

    def both_ways(figures):
        return f"{figures['i2t_r1']:.2f} / {figures['t2i_r1']:.2f}"

    assert cells[0][1:] == ["val, 100 photos", "test, 50 photos"]
    assert cells[1] == ["best epoch, 2 of 2", both_ways(metrics(5)), both_ways(metrics(44))]
    assert cells[2] == ["with the bank", both_ways(metrics(6)), both_ways(metrics(45))]
    assert cells[3] == ["chance", "1.00 / 1.00", "2.00 / 2.00"]
    assert str(run.dir) in lines[4]
    for line, more in zip(lines[5:], (["--serve"], [])):
        assert shlex.split(line.split(":", 1)[1]) == [
            "python", "show_flickr8k_results.py", *more, "--output_dir", str(run.dir)]


@pytest.mark.parametrize("damage", [
    lambda run: run.config.pop("parameters"),
    lambda run: run.config["data"].clear(),
    lambda run: run.history[0]["val"].pop("avg_r1"),
    lambda run: setattr(run, "config", []),
    lambda run: run.history[1]["val"].pop("i2t_medr"),
])
def test_a_run_whose_files_lack_something_is_an_error(tmp_path, damage):
    run, _ = write_two_runs(tmp_path)
    damage(run)
    with pytest.raises(UsageError, match="worse: a file of the run lacks an entry"):
        comparison([run])


def test_a_bank_of_an_earlier_version_is_an_error(tmp_path):
    run, _ = write_two_runs(tmp_path)
    run.bank = {"val": {"off": metrics(3), "on": metrics(4)}}
    with pytest.raises(UsageError, match="worse: .*with_bank.* please retrain"):
        summary(run)
