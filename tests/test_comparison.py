"""The comparison of runs, from the metrics of runs that are made up."""
import json

import pytest

from src.comparison import comparison, display_width, shortened
from src.runs import CONFIG, load_run
from tests.test_report import metrics, write_run, write_two_runs


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


@pytest.mark.parametrize("name", [
    "日本語" * 20, "ガ" * 9, "a\u0301" * 40, "tab\tnew\nline" * 9])
def test_wide_characters_and_line_breaks_do_not_break_the_table(tmp_path, name):
    write_run(tmp_path / name, avg_r1=(3, 5), epochs=2)
    write_run(tmp_path / "other", avg_r1=(1, 2), epochs=2, fisher=False)
    lines = comparison([load_run(tmp_path / each) for each in (name, "other")]).splitlines()
    assert max(map(display_width, lines)) <= 100
    named, other = lines[2:4]
    assert display_width(named[:named.index("2 of 2")]) == other.index("2 of 2")
