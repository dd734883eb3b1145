import pytest

from src.experiments import benchmark


def measure(shapes, more):
    """Measure the preset tiny on the small dataset and return the results."""
    flags = f"--model tiny --batch_size 10 --device cpu --data_dir {shapes} {more}".split()
    return benchmark.measure(*benchmark.parse_args(flags))


def test_the_plain_way_is_measured_beside_ours(shapes, monkeypatch, capsys):
    results = measure(shapes, "--baseline --steps 2 --captions_per_image 1")
    ours, plain = results["ours"], results["plain"]
    for way in (ours, plain):
        assert way["steps per epoch"] == 20 and way["pairs per step"] == 10
        epoch_seconds = 20 * way["step seconds"] + way["validation seconds"]
        assert way["epoch seconds"] == pytest.approx(epoch_seconds)
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in way["parts"].values())
        assert way["FLOP per step"] > 1e7 and way["peak memory bytes"] > 1e6
        assert way["MFU"] is None  # the peak of a CPU is not known
    assert plain["precision"] == "float32"
    monkeypatch.setattr(benchmark, "measure", lambda *given: results)
    assert benchmark.main(["--baseline"]) == 0
    printed = capsys.readouterr().out
    ratio = plain["epoch seconds"] / ours["epoch seconds"]
    assert f"takes {ratio:.2f} times as long" in printed
    assert f"{10 / ours['step seconds']:.0f} pairs/s" in printed and "float32" in printed


def test_a_photo_is_encoded_once_for_its_captions(shapes):
    one, five = (
        measure(shapes, f"--steps 1 --captions_per_image {captions}")["ours"]["FLOP per step"]
        for captions in (1, 5))
    assert five < 0.8 * one


def test_a_model_on_features_is_measured_but_not_the_plain_way(shapes, encoder_file):
    encoders = f"--image_encoder {encoder_file}:photos --text_encoder {encoder_file}:texts"
    assert measure(shapes, f"--steps 1 {encoders}")["ours"]["FLOP per step"] > 1e5
    with pytest.raises(benchmark.UsageError, match="trains from scratch"):
        measure(shapes, f"--baseline {encoders}")


def test_wrong_arguments(tmp_path, capsys):
    assert benchmark.main(["--data_dir", str(tmp_path / "none")]) == 2
    assert "download_flickr8k.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--steps", "0"])
    assert stopped.value.code == 2
