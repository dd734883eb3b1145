import json

import pytest

from src import benchmark


def test_benchmark_against_the_baseline(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RETRIEVAL_PHOTOS", (50,))
    output = tmp_path / "made" / "benchmark.json"
    assert benchmark.main(["--model", "tiny", "--data_dir", str(shapes), "--baseline", "--steps", "2", "--batch_size", "10",
                           "--captions_per_image", "1",
                           "--device", "cpu", "--output", str(output)]) == 0
    printed, results = capsys.readouterr().out, json.loads(output.read_text())
    ours, plain = (results["presets"]["tiny"][way] for way in ("ours", "plain"))
    for way in (ours, plain):
        assert way["steps an epoch"] == 20 and way["pairs a second"] == pytest.approx(10 / way["step seconds"])
        assert way["epoch seconds"] == pytest.approx(20 * way["step seconds"] + way["validation seconds"])
        assert all(part["low"] <= part["median"] <= part["high"] for part in way["parts"].values())
        assert way["model FLOP a pair"] > 1e6 and way["share of peak (MFU)"] is None and way["peak memory bytes"] > 1e6
    assert f"{plain['epoch seconds'] / ours['epoch seconds']:.2f} x" in printed
    assert "50 photos" in printed and f"{ours['pairs a second']:.0f} pairs/s" in printed
    assert results["presets"]["tiny"]["photos"]["photos made into a store a second"]["median"] > 0


def test_counts_of_arithmetic_grow_with_what_is_encoded(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RETRIEVAL_PHOTOS", (20,))
    flops = []
    for captions in ("1", "5"):
        assert benchmark.main(["--model", "tiny", "--data_dir", str(shapes), "--steps", "1", "--batch_size", "10", "--device",
                               "cpu", "--captions_per_image", captions, "--output", str(tmp_path / "b.json")]) == 0
        flops.append(json.loads((tmp_path / "b.json").read_text())["presets"]["tiny"]["ours"]["model FLOP a pair"])
    assert flops[1] < 0.8 * flops[0]  # a photo encoded once for five captions


def test_speedrun_stops_at_its_targets(shapes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(benchmark, "SPEEDRUN_TARGETS", (-1.0, 0.0, 101.0))
    monkeypatch.setattr(benchmark, "SPEEDRUN_SETTINGS", {"tiny": {-1.0: {"epochs": 1000, "lr": 0.05},
                                                                  0.0: {"epochs": 1000, "lr": 0.05}, 101.0: {"epochs": 2}}})
    monkeypatch.setitem(benchmark.RECIPES["tiny"], "epochs", 3)
    output = tmp_path / "b.json"
    assert benchmark.main(["--model", "tiny", "--data_dir", str(shapes), "--speedrun", "--batch_size", "10", "--device", "cpu",
                           "--output", str(output)]) == 0
    lowest, low, beyond = json.loads(output.read_text())["speedrun"]
    for found in (lowest, low):
        assert found["reached"] and found["avg_r1"] >= found["target"] and found["epochs"] == 1000 and found["seconds"] > 0
        assert "--epochs 1000 --lr 0.05" in found["command"]
    assert not beyond["reached"] and beyond["epochs"] == 2 and beyond["epoch"] <= 2
    printed, err = capfd.readouterr()
    assert "not reached" in printed and f"{low['seconds']:.1f}" in printed
    assert printed.count("1000 epochs of") == 1  # one training for both


def test_speedrun_of_a_training_that_fails(tmp_path, capfd):
    assert benchmark.main(["--model", "tiny", "--data_dir", str(tmp_path / "none"), "--speedrun"]) == 2
    assert "the training ended with exit status 2" in capfd.readouterr().err


def test_wrong_arguments(tmp_path, capsys):
    assert benchmark.main(["--data_dir", str(tmp_path / "none")]) == 2
    assert "download_flickr8k.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--steps", "0"])
    assert stopped.value.code == 2
