import os

import pytest

from src.utils import files


def held(winerror):
    error = PermissionError(13, "Permission denied")
    error.winerror = winerror
    return error


@pytest.fixture
def windows(monkeypatch):
    """Let the first calls of os.replace and os.unlink fail as they do on Windows. Return a function
    that sets how many and how, and the list of the seconds that were waited."""
    waits, left = [], []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    for name in ("replace", "unlink"):
        def call(*args, function=getattr(os, name)):
            if left:
                raise left.pop()
            return function(*args)
        monkeypatch.setattr(os, name, call)
    return lambda times, winerror=32: left.extend([held(winerror) for _ in range(times)]), waits


def test_a_file_that_is_held_for_a_moment(tmp_path, windows):
    hold, waits = windows
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    hold(3)
    files.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new" and len(waits) == 3
    hold(2)
    files.delete(tmp_path / "old")
    assert not list(tmp_path.iterdir()) and len(waits) == 5
    files.delete(tmp_path / "old")  # it is gone already


def test_a_file_that_is_held_for_good(tmp_path, windows):
    hold, waits = windows
    (tmp_path / "new").write_text("new")
    hold(100)
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "new", tmp_path / "old")
    assert waits == list(files.DELAYS)


def test_missing_rights_are_not_waited_for(tmp_path, windows):
    hold, waits = windows
    hold(1, None)
    with pytest.raises(PermissionError):
        files.delete(tmp_path / "file")
    assert waits == []
