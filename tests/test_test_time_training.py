import shutil

import pytest

from src import search
from src.evaluation import evaluate
from src.experiments.test_time_training import adaptation_table, main
from src.runs import load_run
from src.search import load_model
from src.utils.splits import open_split


def test_what_test_time_training_adds(finished, shapes, capsys, tmp_path, monkeypatch):
    loaded = []
    load_encoders = search.load_encoders

    def count(*arguments):
        loaded.append(arguments)
        return load_encoders(*arguments)

    monkeypatch.setattr(search, "load_encoders", count)
    runs = [shutil.copytree(finished[0], tmp_path / name) for name in ("first", "second")]
    assert main(["--output_dir", *map(str, runs)]) == 0
    assert len(loaded) == 2  # once for each run
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert err == "" and "12 photos of val" in out and "of 2 runs: gain" in out
    first, second = lines[2], lines[3]
    assert first[0] == "first" and second[0] == "second" and first[1:4] == second[1:4]

    model, tokenizer, _ = load_model(runs[0])
    pixels = load_run(runs[0]).settings.stored_pixels("val")
    data = open_split(shapes, "val", pixels, tokenizer)
    off = evaluate(model, data)["avg_r1"]
    model.memory.enable_test_time_updates()
    on = evaluate(model, data)["avg_r1"]
    assert first[1:4] == [f"{off:.2f}", f"{on:.2f}", f"{on - off:+.2f}"]

    assert main(["--output_dir", str(runs[0]), "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "8 photos of test" in out and "mean" not in out


@pytest.mark.parametrize("given, message", [
    (["--output_dir", "none"], "none: there is no such folder"),
    (["--output_dir", "RUN", "--data_dir", "none"], "none: there is no such folder")])
def test_what_is_missing_is_named(finished, capsys, given, message):
    status = main([str(finished[0]) if value == "RUN" else value for value in given])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.startswith("error: ") and message in err


def test_adaptation_table():
    def result(off, on, seconds):
        return {"off": {"avg_r1": off}, "on": {"avg_r1": on},
                "seconds": {"off": 1.5, "on": seconds}}

    results = {"seed0": result(10.0, 10.5, 3.0)}
    lines = [line.split() for line in adaptation_table("title", results).splitlines()]
    assert ["seed0", "10.00", "10.50", "+0.50", "1.50", "3.00"] in lines and len(lines) == 3
    results["seed1"] = result(9.0, 8.7, 4.0)
    lines = adaptation_table("title", results).splitlines()
    assert lines[-1].endswith("of 2 runs: gain +0.10 ± 0.57")
