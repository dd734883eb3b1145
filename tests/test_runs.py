import dataclasses
import json
import logging
import os
import sys

import pytest
import torch

from src import runs as checkpoint
from src.runs import (
    BEST,
    CONFIG,
    HISTORY,
    LOG,
    TEST,
    load_checkpoint,
    load_json,
    load_run,
    open_output_dir,
    save_checkpoint,
    save_json,
)
from src.settings import make_settings
from src.utils.errors import RunError, UsageError


def test_round_trips(tmp_path):
    save_checkpoint({"weights": torch.arange(3), "epoch": 2}, tmp_path / "a.pt")
    state = load_checkpoint(tmp_path / "a.pt", ["weights", "epoch"])
    assert state["weights"].tolist() == [0, 1, 2] and state["epoch"] == 2
    save_json([{"epoch": 1}], tmp_path / "a.json")
    assert load_json(tmp_path / "a.json") == [{"epoch": 1}]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.pt"]


@pytest.mark.parametrize("save, name", [(save_checkpoint, "a.pt"), (save_json, "a.json")])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, save, name):
    save({"epoch": 1}, tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        save({"epoch": 2}, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_torch_save_onto_a_full_disk_keeps_the_old_file(tmp_path):
    import resource

    path = tmp_path / "a.pt"
    save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # writing past it fails as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="could not be written"):
            save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_checkpoint(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match="a.pt: damaged"):
        load_checkpoint(tmp_path / "a.pt", ["epoch"])


def test_truncated_checkpoint(tmp_path):
    save_checkpoint({"weights": torch.randn(10_000)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[:len(data) // 2])
    with pytest.raises(UsageError, match="a.pt: damaged"):
        load_checkpoint(tmp_path / "a.pt", ["weights"])


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save(Harmful(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="damaged"):
        load_checkpoint(tmp_path / "a.pt", [])
    assert not (tmp_path / "harm").exists()


def test_missing_files_and_keys(tmp_path):
    for load in (lambda path: load_checkpoint(path, []), load_json):
        with pytest.raises(UsageError, match="no such file"):
            load(tmp_path / "absent")
    save_checkpoint({"epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="lacks config, history"):
        load_checkpoint(tmp_path / "a.pt", ["epoch", "history", "config"])


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe\x00"])
def test_damaged_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match="a.json: damaged"):
        load_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert load_json(tmp_path / "a.json") == {"a": 1}


def test_a_run_is_loaded_without_its_weights(tmp_path):
    settings = make_settings(model="tiny", seed=3)
    history = [{"epoch": i, "val": {"avg_r1": score}, "seconds": 30.0} for i, score in
               enumerate((1.0, 3.0, 3.0), start=1)]
    save_json({"settings": dataclasses.asdict(settings)}, tmp_path / CONFIG)
    save_json(history, tmp_path / HISTORY)
    (tmp_path / BEST).write_bytes(b"not read")
    run = load_run(tmp_path)
    assert run.settings == settings and run.history == history and run.test is None
    assert run.best == history[1] and run.minutes == 1.5  # the first of equals, as in training
    save_json({"avg_r1": 2.0}, tmp_path / TEST)
    assert load_run(tmp_path).test == {"avg_r1": 2.0}


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    config = {"settings": {"epochs": 2}}

    def begin(fresh=True, replace=False):
        log = logging.Logger("a run")
        open_output_dir(tmp_path / "run", config, [], fresh, replace, log)
        return log

    first = begin()
    first.info("hello")
    for given in ({}, {"replace": True}, {"fresh": False}):
        with pytest.raises(UsageError, match="another run is writing into .*run; name another"):
            begin(**given)
    assert "hello" in (tmp_path / "run" / LOG).read_text()
    first.handlers[0].close()  # as the end of the process does, a kill included
    with pytest.raises(UsageError, match="holds a run already"):  # it came in between
        begin()
    begin(fresh=False).handlers[0].close()
    assert "hello" in (tmp_path / "run" / LOG).read_text()
    begin(replace=True).handlers[0].close()
    assert (tmp_path / "run" / LOG).read_text() == ""
