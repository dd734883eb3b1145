import json

import pytest

from src.report import comparison, epoch_line
from src.runs import TEST, load_run
from src.utils.errors import UsageError
from tests.test_show_flickr8k_results import metrics, write_run


def test_epoch_line():
    val = {
        "avg_r1": 1.25,
        "i2t_r1": 1.5,
        "t2i_r1": 1.0,
        "i2t_r10": 9.0,
        "t2i_r10": 8.0,
        "i2t_medr": 100.5,
        "t2i_medr": 90.0,
    }
    line = epoch_line({"epoch": 3, "train": {"loss": 2.5}, "val": val, "seconds": 61.24})
    assert line == (
        "epoch   3  loss 2.5000  val R@1  1.25 (i2t 1.50, t2i 1.00)  R@10 9.0/8.0  "
        "MedR 100.5/90  61.2 s"
    )


def runs(tmp_path):
    write_run(tmp_path / "worse", avg_r1=(3, 5), epochs=2)
    write_run(tmp_path / "better", avg_r1=(30, 20, 10), epochs=4)
    (tmp_path / "worse" / TEST).write_text(json.dumps(metrics(44)))
    return [load_run(tmp_path / name) for name in ("worse", "better")]


def test_comparison(tmp_path):
    found = runs(tmp_path)
    assert found[0].test == metrics(44) and found[1].test is None
    heads, rule, better, worse = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in comparison(found, "markdown").splitlines()
    )
    assert set(rule) == {"---"} and len(heads) == len(rule) == len(better) == len(worse)
    cells = dict(zip(heads, better))
    assert cells["epochs"] == "1 of 3+" and cells["avg R@1"] == "31.67"
    assert cells["rsum"] == f"{6 * 30.17 + 15:.1f}" and cells["R@1"] == "30.2 / 33.2"
    assert cells["R@10"] == "32.2 / 35.2" and cells["MedR"] == "90 / 120"
    assert cells["model"] == "small, 7.7 M" and "Some GPU" in cells["hardware, date"]
    assert cells["command"] == "`python train_flickr8k_sgd.py --seed 77`"
    assert dict(zip(heads, worse))["epochs"] == "2 of 2"
    lines = comparison(found).splitlines()
    assert lines[2].startswith("better  ") and lines[3].startswith("worse   ")
    assert "31.67" in lines[2] and "command" not in lines[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: run.config.pop("parameters"),
        lambda run: run.config["data"].clear(),
        lambda run: run.history[0]["val"].pop("avg_r1"),
        lambda run: setattr(run, "config", []),
        lambda run: run.history[1]["val"].pop("i2t_medr"),
    ],
)
def test_comparison_of_damaged_runs(tmp_path, damage):
    found = runs(tmp_path)
    damage(found[0])
    with pytest.raises(UsageError, match="worse: a file of the run lacks"):
        comparison(found)
