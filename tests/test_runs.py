"""Files of runs are written and read here, also damaged ones and on a full disk."""
import dataclasses
import logging
import os
import sys

import pytest
import torch

from src import device, runs
from src.runs import (
    BEST,
    CONFIG,
    HISTORY,
    LOG,
    TEST,
    load_checkpoint,
    load_json,
    load_run,
    on_this_machine,
    open_output_dir,
    resolve,
    save_checkpoint,
    save_json,
)
from src.settings import make_settings, parse_args
from src.utils.errors import RunError, UsageError

FCNTL = runs.fcntl  # None on Windows


def test_what_was_saved_is_loaded(tmp_path):
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

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", fail)
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
    # Writing beyond this size fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="could not be written"):
            save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"broken", b"\x80",
                                     b"PK\x03\x04 half a zip"])
def test_a_damaged_checkpoint_is_an_error(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match="a.pt: damaged"):
        load_checkpoint(tmp_path / "a.pt", ["epoch"])


def test_a_truncated_checkpoint_is_an_error(tmp_path):
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


def test_missing_files_and_keys_are_errors(tmp_path):
    for load in (lambda path: load_checkpoint(path, []), load_json):
        with pytest.raises(UsageError, match="no such file"):
            load(tmp_path / "absent")
    save_checkpoint({"epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="lacks config, history"):
        load_checkpoint(tmp_path / "a.pt", ["epoch", "history", "config"])


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe\x00"])
def test_damaged_json_is_an_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match="a.json: damaged"):
        load_json(tmp_path / "a.json")


def test_a_run_is_loaded_without_its_weights(tmp_path):
    settings = make_settings(model="tiny", seed=3)
    history = []
    for epoch, avg_r1 in enumerate((1.0, 3.0, 3.0), start=1):
        history.append({"epoch": epoch, "val": {"avg_r1": avg_r1}, "seconds": 30.0})
    save_json({"settings": dataclasses.asdict(settings)}, tmp_path / CONFIG)
    save_json(history, tmp_path / HISTORY)
    (tmp_path / BEST).write_bytes(b"not read")
    run = load_run(tmp_path)
    assert run.settings == settings and run.history == history and run.test is None
    assert run.best == history[1]  # the first of several that are equally good, as in training
    assert run.minutes == 1.5
    save_json({"avg_r1": 2.0}, tmp_path / TEST)
    assert load_run(tmp_path).test == {"avg_r1": 2.0}


class Msvcrt:
    """Stands in for Windows' module, with the locks of this system."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor, mode, number):
        # What is locked cannot be read by others, so that has to lie behind the log.
        assert (mode, number) == (Msvcrt.LK_NBLCK, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == runs.LOCKED_BYTE
        try:
            FCNTL.flock(descriptor, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None


@pytest.mark.parametrize("system", ["this", "Windows"] if runs.fcntl else ["this"])
def test_a_folder_takes_one_run_at_a_time(tmp_path, monkeypatch, system):
    if system == "Windows":
        monkeypatch.setattr(runs, "fcntl", None)
        monkeypatch.setattr(runs, "msvcrt", Msvcrt(), raising=False)
    config = {"settings": {"epochs": 2}}

    def begin(is_new=True, replace=False):
        log = logging.Logger("a run")
        open_output_dir(tmp_path / "run", config, [], is_new, replace, log)
        return log

    first = begin()
    first.info("hello")
    for given in ({}, {"replace": True}, {"is_new": False}):
        with pytest.raises(UsageError, match="another run is writing into .*run; name another"):
            begin(**given)
    assert "hello" in (tmp_path / "run" / LOG).read_text()
    first.handlers[0].close()  # this releases the lock, as the end of the process does
    # The folder now holds a run that was begun after the arguments of the next were checked.
    with pytest.raises(UsageError, match="holds a run already"):
        begin()
    begin(is_new=False).handlers[0].close()
    assert "hello" in (tmp_path / "run" / LOG).read_text()
    begin(replace=True).handlers[0].close()
    assert (tmp_path / "run" / LOG).read_text() == ""


def resume(output_dir, *more):
    """The settings with which a run is resumed."""
    args = parse_args("", ["--resume", "--output_dir", str(output_dir), *more])
    settings, *_ = resolve(args)
    assert on_this_machine(settings, args) == settings
    return settings


def write_config(output_dir, **given):
    settings = make_settings(synthetic=True, **given)
    save_json({"settings": dataclasses.asdict(settings)}, output_dir / CONFIG)


def test_a_resumed_run_has_the_precision_of_the_machine(tmp_path, monkeypatch):
    """A run that began on a GPU, in mixed precision, may be resumed on a CPU."""
    write_config(tmp_path)
    saved = load_json(tmp_path / CONFIG)["settings"]
    assert saved["amp"] is None and saved["device"] is None  # the user gave neither
    settings = resume(tmp_path)
    assert settings.amp is None and settings.device is None
    cpu = torch.device("cpu")
    for is_faster, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(device, "amp_is_faster", lambda _, is_faster=is_faster: is_faster)
        assert device.autocast_dtype(settings.amp, cpu) == dtype


@pytest.mark.parametrize("given", [{}, {"amp": True}])
def test_the_precision_can_be_changed_when_a_run_is_resumed(tmp_path, given):
    write_config(tmp_path, **given)
    assert resume(tmp_path).amp is given.get("amp")
    assert resume(tmp_path, "--no-amp").amp is False
    assert resume(tmp_path, "--amp", "--device", "cpu").device == "cpu"
    with pytest.raises(UsageError, match="the run's own --lr .*; leave the flag out"):
        resume(tmp_path, "--lr", "7")


def test_under_torchrun_each_machine_keeps_its_own_settings():
    """The settings come from the main process; paths and the like may differ between machines."""
    settings = make_settings(data_dir="on/the/first", device="cuda", lr=0.5)
    args = parse_args("", ["--data_dir", "on/the/second", "--no-amp", "--lr", "0.5"])
    here = on_this_machine(settings, args)
    assert (here.data_dir, here.amp, here.device, here.lr) == ("on/the/second", False, "cuda", 0.5)


@pytest.mark.parametrize("output_dir, message", [
    ("file", "--output_dir file: file is a file, not a folder"),
    ("file/a/run", "--output_dir file/a/run: file is a file, not a folder"),
    ("locked/a/run", "--output_dir locked/a/run: locked cannot be written")])
def test_a_folder_that_cannot_be_made_is_refused_at_once(
        tmp_path, monkeypatch, output_dir, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(runs.os, "access", lambda path, mode: str(path) != "locked")
    with pytest.raises(UsageError, match=message):
        resolve(parse_args("", ["--output_dir", output_dir]))
    assert resolve(parse_args("", ["--output_dir", "new/run"]))[1] == runs.Path("new/run")
