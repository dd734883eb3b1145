"""The store of decoded photos: its shards, and what can go wrong."""
import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.utils import photo_store
from src.utils.duplicates import SIGNATURE
from src.utils.errors import DataError
from src.utils.photo_store import (
    DIGEST_BYTES,
    STORE_FOLDER,
    Rows,
    announce_store,
    delete_other_shards,
    files_of_store,
    open_photo,
    open_shard,
)
from tests.conftest import open_dataset


def list_store(root):
    """Return the names of all files in a dataset's store."""
    return sorted(path.name for path in (root / STORE_FOLDER).iterdir())


@pytest.fixture
def opened(monkeypatch):
    """The list of the names of all photos that are opened from now on."""
    names = []

    def open_and_note(path, size):
        names.append(path.name)
        return open_photo(path, size)

    monkeypatch.setattr(photo_store, "open_photo", open_and_note)
    return names


def read_until_killed(root, name, monkeypatch):
    """Read the training split, but be interrupted at the photo of this name."""
    def fail(path, size):
        if path.name == name:
            raise KeyboardInterrupt
        return open_photo(path, size)

    with monkeypatch.context() as context:
        context.setattr(photo_store, "open_photo", fail)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(root)


def test_each_photo_is_decoded_once(dataset_dir, opened):
    first = open_dataset(dataset_dir)
    assert sorted(opened) == first.names
    assert len(list_store(dataset_dir)) == 1
    again = open_dataset(dataset_dir)
    assert len(opened) == 6
    assert torch.equal(again.photos[:], first.photos[:])


def test_without_a_cache_photos_are_decoded_each_time(dataset_dir, opened):
    for number in (6, 12):
        open_dataset(dataset_dir, cache=False)
        assert len(opened) == number
    assert not (dataset_dir / STORE_FOLDER).exists()


def test_each_split_and_each_size_has_a_store_of_its_own(dataset_dir):
    for split, image_size in (("train", 16), ("val", 16), ("train", 8)):
        data = open_dataset(dataset_dir, split, image_size=image_size)
        uncached = open_dataset(dataset_dir, split, image_size=image_size, cache=False)
        assert torch.equal(data.photos[:], uncached.photos[:])
    assert len(list_store(dataset_dir)) == 3


def test_writing_into_rows_does_not_change_the_store(dataset_dir):
    before = open_dataset(dataset_dir).photos[:]
    open_dataset(dataset_dir).photos[:].fill_(7)
    assert torch.equal(open_dataset(dataset_dir).photos[:], before)


def change_content(root, monkeypatch):
    Image.new("RGB", (33, 44), (1, 2, 3)).save(root / "Flicker8k_Dataset" / "1002_abc.jpg")


def change_time(root, monkeypatch):
    os.utime(root / "Flicker8k_Dataset" / "1002_abc.jpg", (1, 1))


def change_name(root, monkeypatch):
    folder = root / "Flicker8k_Dataset"
    (folder / "1002_abc.jpg").rename(folder / "other.jpg")
    for path in root.glob("*.txt"):
        path.write_text(path.read_text().replace("1002_abc.jpg", "other.jpg"))


def change_split(root, monkeypatch):
    path = root / "Flickr_8k.trainImages.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))


def change_version(root, monkeypatch):
    monkeypatch.setattr(photo_store, "STORE_VERSION", -1)


@pytest.mark.parametrize("change", [
    change_content, change_time, change_name, change_split, change_version])
def test_after_a_change_the_photos_are_read_again(dataset_dir, monkeypatch, opened, change):
    before = open_dataset(dataset_dir)
    old_store = list_store(dataset_dir)
    opened.clear()
    change(dataset_dir, monkeypatch)
    after = open_dataset(dataset_dir)
    assert sorted(opened) == sorted(after.names)
    assert len(list_store(dataset_dir)) == 1
    assert list_store(dataset_dir) != old_store
    assert torch.equal(after.photos[:], open_dataset(dataset_dir, cache=False).photos[:])
    assert torch.equal(after.photos[2], before.photos[2]) == (change != change_content)


def test_nothing_of_an_interrupted_shard_is_left(dataset_dir, monkeypatch):
    read_until_killed(dataset_dir, "1004_abc.jpg", monkeypatch)
    assert list_store(dataset_dir) == []


def test_a_shard_that_was_cut_off_is_made_again(dataset_dir):
    whole = open_dataset(dataset_dir).photos[:]
    path = dataset_dir / STORE_FOLDER / list_store(dataset_dir)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(open_dataset(dataset_dir).photos[:], whole)
    size = whole.numel() + len(whole) * (DIGEST_BYTES + np.prod(SIGNATURE))
    assert path.stat().st_size == size


def test_an_interruption_costs_one_shard(dataset_dir, monkeypatch, opened):
    monkeypatch.setattr(photo_store, "SHARD_SIZE", 2)
    whole = open_dataset(dataset_dir, cache=False).photos[:]
    read_until_killed(dataset_dir, "1003_abc.jpg", monkeypatch)
    assert len(list_store(dataset_dir)) == 1
    opened.clear()
    assert torch.equal(open_dataset(dataset_dir).photos[:], whole)
    assert sorted(opened) == [f"{1000 + i}_abc.jpg" for i in (2, 3, 4, 5)]
    assert len(list_store(dataset_dir)) == 3


def test_a_changed_photo_costs_one_shard(dataset_dir, monkeypatch, opened):
    monkeypatch.setattr(photo_store, "SHARD_SIZE", 2)
    whole = open_dataset(dataset_dir).photos[:]
    Image.new("RGB", (30, 40)).save(dataset_dir / "Flicker8k_Dataset" / "1005_abc.jpg")
    opened.clear()
    changed = open_dataset(dataset_dir).photos
    assert sorted(opened) == ["1004_abc.jpg", "1005_abc.jpg"]
    assert len(list_store(dataset_dir)) == 3
    assert torch.equal(changed[:5], whole[:5])
    assert not torch.equal(changed[5], whole[5])


def test_abandoned_files_are_deleted_but_not_those_of_a_running_process(dataset_dir):
    (dataset_dir / STORE_FOLDER).mkdir()
    for name, age in (("train_16_dead.partial77", 9000), ("train_16_busy.partial78", 5),
                      ("val_16_dead.partial77", 9000)):
        path = dataset_dir / STORE_FOLDER / name
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    open_dataset(dataset_dir, "train")  # which looks after the files of its own split only
    partial = [name for name in list_store(dataset_dir) if "partial" in name]
    assert partial == ["train_16_busy.partial78", "val_16_dead.partial77"]


def test_a_shard_that_another_process_deletes_at_the_same_time_is_no_error(tmp_path, monkeypatch):
    """A file may vanish between the listing of the folder and the look at the file."""
    vanishing = tmp_path / "train_old"
    vanishing.touch()
    glob = Path.glob

    def glob_and_lose(folder, pattern):
        listed = list(glob(folder, pattern))
        vanishing.unlink()
        return listed

    monkeypatch.setattr(Path, "glob", glob_and_lose)
    delete_other_shards(tmp_path / "train", [])
    assert not vanishing.exists()


def test_a_shard_that_another_process_has_written_meanwhile_is_used(tmp_path, monkeypatch):
    def write(file):
        (tmp_path / "shard").write_bytes(b"abcd")
        file.write(b"abcd")
        return {}

    def refuse(source, target):  # as Windows does, where the other process has mapped the file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    content, _ = open_shard(tmp_path / "shard", 4, write)
    assert bytes(content) == b"abcd" and os.listdir(tmp_path) == ["shard"]


def test_a_mapped_shard_of_other_photos_stays_where_it_is_on_windows(tmp_path, monkeypatch):
    (tmp_path / "store_old").touch()

    def refuse(path, missing_ok):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    delete_other_shards(tmp_path / "store", [])
    assert os.listdir(tmp_path) == ["store_old"]


def test_a_new_shard_of_the_wrong_size_is_refused(tmp_path):
    """A file system may cut a file short without an error."""
    with pytest.raises(DataError, match="has 3 bytes instead of 5"):
        open_shard(tmp_path / "shard", 5, lambda file: file.write(b"abc") and {})


def test_no_shard_with_a_damaged_photo_is_kept(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "1003_abc.jpg").write_bytes(b"")
    data = open_dataset(dataset_dir, allow_incomplete=True)
    assert list_store(dataset_dir) == []
    assert len(data.photos) == 5
    uncached = open_dataset(dataset_dir, allow_incomplete=True, cache=False)
    assert torch.equal(data.photos[:], uncached.photos[:])


def test_photos_are_read_even_if_the_store_cannot_be_written(dataset_dir, caplog):
    (dataset_dir / STORE_FOLDER).write_text("a file that is in the way of the folder")
    with caplog.at_level(logging.INFO, "flickr8k_sgd"):
        data = open_dataset(dataset_dir)
        assert torch.equal(data.photos[:], open_dataset(dataset_dir, cache=False).photos[:])
        open_dataset(dataset_dir, "val")
    assert caplog.messages == [
        f"{dataset_dir / STORE_FOLDER}: cannot be written (File exists), so decoded photos are not "
        "kept there, and the next run decodes them again"]


def test_a_new_store_is_announced_and_an_old_one_is_not(dataset_dir, caplog):
    caplog.set_level(logging.INFO, "flickr8k_sgd")

    def read(*splits):
        caplog.clear()
        before = files_of_store(dataset_dir)
        for split in splits:
            open_dataset(dataset_dir, split, image_size=100)
        announce_store(dataset_dir, before)
        return caplog.messages

    line, = read("train", "val")
    assert line == (f"{dataset_dir / STORE_FOLDER}: decoded photos, or their features, are kept in "
                    "this folder (0.3 MB) for the next run; it may be deleted")
    assert read("train", "val") == []
    assert len(read("test")) == 1


def test_a_full_disk_is_reported(dataset_dir, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="No space left on device; the shard takes 0 MB"):
        open_dataset(dataset_dir)
    assert list_store(dataset_dir) == []


# Rows.


@pytest.fixture
def parts():
    """Three arrays of rows, and the rows as one tensor."""
    values = torch.arange(60, dtype=torch.uint8).view(10, 3, 2)
    return [part.numpy() for part in values.split([4, 1, 5])], values


def test_rows_of_several_parts_are_read_like_one_tensor(parts):
    rows, whole = Rows(parts[0], lambda rows: rows.permute(0, 2, 1)), parts[1].permute(0, 2, 1)
    assert rows.shape == (10, 2, 3)
    assert rows.dtype == torch.uint8
    assert rows.nbytes == 60
    for selection in (slice(None), slice(3, 6), [9, 0, 4, 4], torch.tensor([5, 3])):
        assert torch.equal(rows[selection], whole[selection])
    assert torch.equal(rows[np.array([], int)], whole[:0])
    assert torch.equal(rows[7], whole[7])
    assert rows.part_of([0, 3, 4, 5, 9]).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("chosen", [torch.tensor([8, 2, 4]), torch.tensor([3]), [6], slice(2, 7)])
def test_rows_can_be_chosen(parts, chosen):
    rows, whole = Rows(parts[0]), parts[1]
    some = rows.choose(chosen)
    assert torch.equal(some[:], whole[chosen])
    assert len(some) == len(whole[chosen])
    assert some.nbytes == 6 * len(some)
    parts_of_chosen = rows.part_of(torch.arange(10)[chosen].numpy())
    assert np.array_equal(some.part_of(np.arange(len(some))), parts_of_chosen)


def test_rows_can_be_added(parts):
    rows, whole = Rows(parts[0]), parts[1]
    both = rows.choose([8, 2, 4]) + rows.choose([9])
    assert len(both) == 4
    assert torch.equal(both[:], whole[[8, 2, 4, 9]])
    assert both.part_of([0, 3]).tolist() == [2, 5]


def test_the_size_of_rows_is_known_even_if_the_first_part_is_empty(parts):
    assert Rows([np.empty((0, 3, 2), np.uint8), *parts[0]]).nbytes == 60
