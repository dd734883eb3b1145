"""The results script on runs made by hand, so that every figure shown can be checked against the files."""
import json

import pytest
import torch

import show_flickr8k_results
from src.utils.report import BEST, CONFIG, HISTORY, TEST
from src.utils.retrieval import chance_metrics
from tests.conftest import run_script


def metrics(seed):
    """Made-up figures, all different, so that one shown in another's place is noticed."""
    values = {f"{protocol}{way}_r{k}": seed + i + 0.17 for i, (protocol, way, k) in enumerate(
        (protocol, way, k) for protocol in ("", "pair_") for way in ("i2t", "t2i") for k in (1, 5, 10))}
    values |= {"i2t_medr": seed * 3.0, "t2i_medr": seed * 4.0}
    for protocol in ("", "pair_"):
        values[f"{protocol}avg_r1"] = (values[f"{protocol}i2t_r1"] + values[f"{protocol}t2i_r1"]) / 2
    return values


def write_run(folder, avg_r1=(11, 31, 21), epochs=3, **changes):
    folder.mkdir()
    history = [{"epoch": i, "train": {"loss": 4.5 - i / 7}, "val": metrics(seed), "lr": 0.01 / i, "seconds": 61.3 + i}
               for i, seed in enumerate(avg_r1, start=1)]
    data = {"photos": 100, "captions": 500, "left_out": 0, "captions_per_photo": {"5": 100}}
    config = {"arguments": {"epochs": epochs, "synthetic": False, "data_dir": "some/where", "model": "small", "seed": 77,
                            "batch_size": 96, "captions_per_image": 3},
              "data": {"train": data | {"photos": 1234, "captions": 6170, "left_out": 4}, "val": data,
                       "test": data | {"photos": 50, "captions": 250, "captions_per_photo": {"5": 50}}},
              "model": {"latent_dim": 192, "memory_size": 24}, "parameters": 7654321, "device": "Some GPU 4711",
              "optimizer": {"name": "SGD", "momentum": 0.87}, "precision": "mixed, bfloat16",
              "versions": {"torch": "2.99", "python": "3.14.1"}} | changes
    (folder / HISTORY).write_text(json.dumps(history))
    (folder / CONFIG).write_text(json.dumps(config))
    best = max(history, key=lambda row: row["val"]["avg_r1"])
    torch.save({"epoch": best["epoch"], "model_state_dict": {"weight": torch.zeros(9)}, "metrics": best["val"],
                "config": config, "tokenizer": {"name": "char"}}, folder / BEST)
    return folder


def show(folder, capsys):
    status = show_flickr8k_results.main(["--output_dir", str(folder)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_figure_is_the_runs_own(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / TEST).write_text(json.dumps(metrics(70)))
    status, out, err = show(folder, capsys)
    assert (status, err) == (0, "")
    for expected in ("best (epoch 2)", "final (epoch 3)", "3 epochs in 3.2 minutes, finished", "1,234 photos, 6,170 captions",
                     "4 photos left out", "7,654,321", "Some GPU 4711", "mixed, bfloat16", "2.99, 3.14.1", "small", "192",
                     "0.87", "96 pairs, 3 a photo", "77", "some/where", "standard protocol", "pair protocol", "chance"):
        assert expected in out, expected
    chance, test_chance = chance_metrics([5] * 100), chance_metrics([5] * 50)
    rows = [line.split() for line in out.splitlines()]
    for arrow, way in (("I->T", "i2t"), ("T->I", "t2i")):
        for k in (1, 5, 10):
            for protocol in ("", "pair_"):
                key = f"{protocol}{way}_r{k}"
                assert [arrow, f"R@{k}", "(%)"] + [f"{m[key]:.2f}" for m in (metrics(31), metrics(21), chance)] in rows
                assert [arrow, f"R@{k}", "(%)"] + [f"{m[key]:.2f}" for m in (metrics(70), test_chance)] in rows
    assert ["1", "4.3571", "12.67", "11.17", "14.17", "0.01", "62.3"] in rows
    assert "4.357 -> 4.071, -6.6 % (epoch 3)" in out and "12.67 % -> 32.67 %, +157.9 % (epoch 2)" in out


def test_a_run_of_one_epoch_still_going(tmp_path, capsys):
    folder = write_run(tmp_path / "run", avg_r1=(5,), epochs=40)
    (folder / BEST).unlink()
    status, out, err = show(folder, capsys)
    assert (status, err) == (0, "")
    assert "1 epoch in 1.0 minutes, of 40 planned: not finished" in out and "Checkpoint" not in out and "Test" not in out


def test_a_long_run_is_shown_in_steps(tmp_path, capsys):
    _, out, _ = show(write_run(tmp_path / "run", avg_r1=range(1, 121), epochs=120), capsys)
    assert len(out.splitlines()) < 90


def test_synthetic_results_are_not_taken_for_flickr8k(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / CONFIG).read_text())
    config["arguments"]["synthetic"] = True
    (folder / CONFIG).write_text(json.dumps(config))
    assert "NOT FLICKR8K" in show(folder, capsys)[1]


def break_file(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / HISTORY).unlink(), "has not finished its first epoch"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no run; train first"),
    (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: there is no such file"),
    (break_file(HISTORY, '[{"epoch": 1'), f"{HISTORY}: damaged"),
    (break_file(HISTORY, "[]"), f"{HISTORY}: holds no epochs"),
    (break_file(HISTORY, '[{"epoch": 1}]'), "lacks what it should hold"),
    (break_file(HISTORY, '[3]'), "lacks what it should hold"),
    (break_file(CONFIG, "{}"), "lacks what it should hold"),
    (break_file(CONFIG, "[]"), "lacks what it should hold"),
    (break_file(BEST, "nonsense"), f"{BEST}: damaged"),
    (break_file(TEST, "nonsense"), f"{TEST}: damaged"),
])
def test_missing_or_damaged_files(tmp_path, capsys, damage, message):
    folder = write_run(tmp_path / "run")
    damage(folder)
    status, out, err = show(folder, capsys)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_no_folder_as_a_user_meets_it(tmp_path):
    status, out, err = run_script("show_flickr8k_results.py", "--output_dir", tmp_path / "none")
    assert status == 2 and "there is no such folder" in err and "python train_flickr8k_sgd.py" in err
