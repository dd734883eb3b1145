"""The tables, from the metrics of runs that are made up. The summary of a whole run is tested in
test_show_flickr8k_results.py, where it is printed."""
import json
import re
import shlex

import pytest

from src.report import (
    comparison,
    ending,
    epoch_line,
    recall_notes,
    recall_tables,
    shortened,
    small_split_notes,
    summary,
)
from src.runs import CONFIG, TEST, load_run
from src.utils.errors import UsageError
from tests.test_show_flickr8k_results import metrics, write_run


def test_the_line_of_an_epoch():
    val = {"avg_r1": 1.25, "i2t_r1": 1.5, "t2i_r1": 1.0, "i2t_r10": 9.0, "t2i_r10": 8.0,
           "i2t_medr": 100.5, "t2i_medr": 90.0}
    row = {"epoch": 3, "train": {"loss": 2.5}, "val": val, "seconds": 61.24}
    rest = "val R@1  1.25 (i2t 1.50, t2i 1.00)  R@10 9.0/8.0  MedR 100.5/90  61.2 s"
    assert epoch_line(row) == f"epoch   3  loss 2.5000  {rest}"
    zero_shot = row | {"epoch": 0, "train": {"loss": None}}
    assert epoch_line(zero_shot) == f"epoch   0  zero-shot  {rest}"


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
    assert small_split_notes(finished.config["data"]) == [note]  # val has 100 photos
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


def test_comparison_has_the_best_run_first(tmp_path):
    finished, unfinished = write_two_runs(tmp_path)
    assert finished.test == metrics(44) and unfinished.test is None
    table = comparison([finished, unfinished], "markdown").splitlines()
    columns, rule, better, worse = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert set(rule) == {"---"} and len(columns) == len(rule) == len(better) == len(worse)
    cells = dict(zip(columns, better))
    assert cells["epochs"] == "1 of 3+" and cells["avg R@1"] == "31.67"
    assert cells["rsum"] == f"{6 * 30.17 + 15:.1f}" and cells["R@1"] == "30.2 / 33.2"
    assert cells["R@10"] == "32.2 / 35.2" and cells["MedR"] == "90 / 120"
    assert cells["model"] == "small, 7.7 M" and "Some GPU" in cells["hardware, date"]
    assert cells["command"] == "`python train_flickr8k_sgd.py --seed 77`"
    assert dict(zip(columns, worse))["epochs"] == "2 of 2"

    lines = comparison([finished, unfinished]).splitlines()
    assert lines[2].startswith("better  ") and lines[3].startswith("worse   ")
    assert "31.67" in lines[2] and "command" not in lines[0]
    assert lines[0].endswith("  MedR") and len(lines[0]) <= 100  # nothing is left out
    assert lines[4].startswith("the same for all: data: Flickr8k, 100 val; trained on: 6,170 pairs")


def test_comparison_fits_100_columns_of_a_terminal(tmp_path):
    """Whatever the runs are called. Two runs differ in everything; markdown keeps all of it."""
    name = "a_run_of_which_the_name_says_all_its_settings_seed_"
    write_run(tmp_path / f"{name}0", avg_r1=(3, 5), epochs=2)
    write_run(tmp_path / f"{name}1", model="large", tokenizer="char",
              image_encoder="facebook/dinov2-small", fisher=False, data_dir="a/very/long/name" * 9,
              text_encoder="sentence-transformers/all-MiniLM-L6-v2")
    config = json.loads((tmp_path / f"{name}1" / CONFIG).read_text())
    config |= {"layout": "table", "extra_data": [
        {"folder": "data/flickr30k", "photos": 5, "captions": 31783, "skipped": {}}],
        "init_from": {"run": "outputs/flickr8k_sgd"}}
    (tmp_path / f"{name}1" / CONFIG).write_text(json.dumps(config))
    runs = [load_run(tmp_path / f"{name}{i}") for i in range(2)]
    for several in (runs, runs[1:]):
        lines = comparison(several).splitlines()
        assert max(map(len, lines)) <= 100 and "R@1" in lines[0]
    lines = comparison(runs).splitlines()
    assert lines[2].split()[0] == shortened(f"{name}1", len(lines[2].split()[0]))
    assert "…" in lines[2] and "2 of 2" in lines[3] and "minutes" not in lines[0]
    markdown = comparison(runs, "markdown")
    assert "31,783 of data/flickr30k" in markdown and "begun with flickr8k_sgd" in markdown


def test_an_ellipsis_stands_in_the_middle():
    assert [shortened("abcdefgh", width) for width in (8, 7, 4, 1)] == [
        "abcdefgh", "abc…fgh", "ab…h", "…"]


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
