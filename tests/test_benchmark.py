import json

import pytest

from src.experiments import benchmark
from src.settings import PRESETS


def given(shapes, output, more):
    flags = f"--model tiny --batch_size 10 --device cpu {more}".split()
    return [*flags, "--data_dir", str(shapes), "--output", str(output)]


def test_benchmark_against_the_baseline(shapes, tmp_path, capsys):
    output = tmp_path / "made" / "benchmark.json"
    flags = given(shapes, output, "--baseline --steps 2 --captions_per_image 1")
    assert benchmark.main(flags) == 0
    printed, results = capsys.readouterr().out, json.loads(output.read_text())
    ours, plain = results["ours"], results["plain"]
    for way in (ours, plain):
        assert way["steps an epoch"] == 20
        assert way["pairs a second"] == pytest.approx(10 / way["step seconds"])
        epoch = 20 * way["step seconds"] + way["validation seconds"]
        assert way["epoch seconds"] == pytest.approx(epoch)
        assert all(part == sorted(part) and len(part) == 3 for part in way["parts"].values())
        assert way["model FLOP a pair"] > 1e6 and way["peak memory bytes"] > 1e6
        assert way["share of peak (MFU)"] is None
    assert f"{plain['epoch seconds'] / ours['epoch seconds']:.2f} x" in printed
    assert f"{ours['pairs a second']:.0f} pairs/s" in printed and "float32" in printed


def test_counts_of_arithmetic_grow_with_what_is_encoded(shapes, tmp_path, capsys):
    flops = []
    for captions in (1, 5):
        flags = given(shapes, tmp_path / "b.json", f"--steps 1 --captions_per_image {captions}")
        assert benchmark.main(flags) == 0
        results = json.loads((tmp_path / "b.json").read_text())
        flops.append(results["ours"]["model FLOP a pair"])
    assert flops[1] < 0.8 * flops[0]  # a photo encoded once for five captions


def test_features_are_measured_but_not_the_plain_way(shapes, own, tmp_path, capsys):
    encoders = f"--image_encoder {own}:photos --text_encoder {own}:texts"
    assert benchmark.main(given(shapes, tmp_path / "b.json", f"--steps 1 {encoders}")) == 0
    assert json.loads((tmp_path / "b.json").read_text())["ours"]["model FLOP a pair"] > 1e4
    assert benchmark.main(given(shapes, tmp_path / "b.json", f"--baseline {encoders}")) == 2
    assert "training from scratch" in capsys.readouterr().err


def test_speedrun_stops_at_its_targets(shapes, tmp_path, monkeypatch, capfd):
    long, short = {"epochs": 1000, "lr": 0.05}, {"epochs": 2}
    monkeypatch.setattr(benchmark, "SPEEDRUN_TARGETS", (-1.0, 0.0, 101.0))
    monkeypatch.setattr(
        benchmark, "SPEEDRUN_SETTINGS", {"tiny": {-1.0: long, 0.0: long, 101.0: short}})
    monkeypatch.setitem(PRESETS["tiny"], "epochs", 3)
    output = tmp_path / "b.json"
    assert benchmark.main(given(shapes, output, "--speedrun")) == 0
    lowest, low, beyond = json.loads(output.read_text())["speedrun"]
    for found in (lowest, low):
        assert found["reached"] and found["avg_r1"] >= found["target"]
        assert found["epochs"] == 1000 and found["seconds"] > 0
        assert "--epochs 1000 --lr 0.05" in found["command"]
    assert not beyond["reached"] and beyond["epochs"] == 2 and beyond["epoch"] <= 2
    printed, err = capfd.readouterr()
    assert "not reached" in printed and f"{low['seconds']:.1f}" in printed
    assert printed.count("1000 epochs of") == 1  # one training for both


def test_speedrun_of_a_training_that_fails(tmp_path, capfd):
    assert benchmark.main(given(tmp_path / "none", tmp_path / "b.json", "--speedrun")) == 2
    assert "the training ended with exit status 2" in capfd.readouterr().err


def test_what_many_pairs_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SCALE_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "SCALE_BASE", 2000)
    flags = "--model tiny --tokenizer char --pairs 20000 --steps 1 --device cpu --output".split()
    assert benchmark.main([*flags, str(tmp_path / "b.json")]) == 0
    scale = json.loads((tmp_path / "b.json").read_text())["scale"]
    assert list(scale) == ["2000", "20000"]
    for row in scale.values():
        assert 0 < row["order seconds"] < row["start-up seconds"] and row["step seconds"] > 0
    # Names, captions, tokens and what the interpreter holds besides, far less than 1 kB a pair.
    assert scale["20000"]["data bytes"] - scale["2000"]["data bytes"] < 2e7
    assert "      20,000" in capsys.readouterr().out


def test_wrong_arguments(tmp_path, capsys):
    assert benchmark.main(["--data_dir", str(tmp_path / "none")]) == 2
    assert "download_flickr8k.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--steps", "0"])
    assert stopped.value.code == 2
