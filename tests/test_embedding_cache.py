import shutil
import sqlite3

import numpy as np
import pytest
import torch

from src import embedding_cache
from src.embedding_cache import PHOTOS, TEXTS, CachedEmbeddings, CacheFile
from src.utils.samples import TarMember


def some_rows(*items, gallery=True):
    """Rows that are all different, for items (key, version)."""
    rows = {}
    for i, item in enumerate(items):
        embedding = np.full(4, i + 0.5, np.float32)
        rows[item] = embedding, np.full(5, -i, np.float32) if gallery else None
    return rows


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys()
    for item, (embedding, gallery) in expected.items():
        np.testing.assert_array_equal(found[item][0], embedding)
        if gallery is None:
            assert found[item][1] is None
        else:
            np.testing.assert_array_equal(found[item][1], gallery)


@pytest.mark.parametrize("gallery", [True, False])
def test_rows_are_read_as_they_were_written(tmp_path, gallery):
    # The file systems of Linux allow names that are not UTF-8.
    photos = some_rows(("/a/b.jpg", "1 2"), ("/a/donn\udce9es ж 狗.jpg", "3 4"), gallery=gallery)
    texts = some_rows(("a dog", ""), ("", ""), gallery=gallery)
    file = CacheFile(tmp_path / "cache", "weights")
    file.write(PHOTOS, photos)
    file.write(TEXTS, texts)
    for file in (file, CacheFile(tmp_path / "cache", "weights")):
        assert_same_rows(file.read(PHOTOS, [*photos, ("/a/c.jpg", "1 2")]), photos)
        assert_same_rows(file.read(TEXTS, [*texts, ("a cat", "")]), texts)


def test_another_version_of_a_photo_replaces_its_row(tmp_path):
    file = CacheFile(tmp_path / "cache", "weights")
    old, new = some_rows(("/a.jpg", "1 1")), some_rows(("/a.jpg", "2 2"))
    file.write(PHOTOS, old)
    assert file.read(PHOTOS, new) == {}
    file.write(PHOTOS, new)
    assert file.read(PHOTOS, old) == {}
    assert_same_rows(file.read(PHOTOS, new), new)


def test_rows_of_other_weights_are_never_used(tmp_path):
    first, other = (CacheFile(tmp_path / "cache", weights) for weights in ("first", "other"))
    rows = some_rows(("/a.jpg", "1 1"))
    first.write(PHOTOS, rows)
    first.write(TEXTS, rows)
    assert other.read(PHOTOS, rows) == {}
    assert_same_rows(first.read(PHOTOS, rows), rows)  # reading has deleted nothing
    other.write(TEXTS, rows)
    assert first.read(PHOTOS, rows) == first.read(TEXTS, rows) == {}
    assert other.read(PHOTOS, rows) == {} and other.read(TEXTS, rows)


def test_rows_of_deleted_photos_are_deleted_and_those_of_an_unplugged_drive_are_kept(tmp_path):
    for name in ("folder", "drive"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").touch()
    (tmp_path / "shard.tar").touch()
    member = TarMember(tmp_path / "shard.tar", "00000/a.jpg", 0, 0, 0)
    paths = sorted(map(str, tmp_path.glob("*/*.jpg"))) + [str(member)]
    rows = some_rows(*((path, "1 1") for path in paths))
    file = CacheFile(tmp_path / "cache", "weights")
    file.write(PHOTOS, rows)
    file.delete_missing_photos(set())
    assert_same_rows(file.read(PHOTOS, rows), rows)
    (tmp_path / "folder" / "1.jpg").unlink()
    (tmp_path / "folder" / "2.jpg").unlink()
    shutil.rmtree(tmp_path / "drive")
    file.delete_missing_photos({str(tmp_path / "folder" / "2.jpg")})
    del rows[str(tmp_path / "folder" / "1.jpg"), "1 1"]
    assert_same_rows(file.read(PHOTOS, rows), rows)
    (tmp_path / "shard.tar").unlink()
    file.delete_missing_photos(set())
    assert file.read(PHOTOS, [(str(member), "1 1")])


def test_a_locked_file_is_waited_for_once_and_then_ignored(tmp_path, monkeypatch):
    waits = []
    connect = sqlite3.connect

    def connect_without_patience(path, **options):
        waits.append(path)
        return connect(path, timeout=0, **options)

    rows = some_rows(("/a.jpg", "1 1"))
    CacheFile(tmp_path / "cache", "weights").write(PHOTOS, rows)
    monkeypatch.setattr(embedding_cache.sqlite3, "connect", connect_without_patience)
    other = connect(tmp_path / "cache", isolation_level=None)
    for lock, readable in (("BEGIN IMMEDIATE", True), ("BEGIN EXCLUSIVE", False)):
        other.execute(lock)
        waits.clear()
        table = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), PHOTOS, None)
        items = [("/a.jpg", "1 1"), ("/b.jpg", "1 1")]
        missing = table.missing(items)
        assert missing == items[1 if readable else 0:]
        for _ in range(2):
            table.add(missing, torch.ones(len(missing), 4))
        assert len(waits) == 2  # one for reading and one for writing
        assert table.embeddings(items).shape == (2, 4) and table.missing(items) == []
        other.execute("ROLLBACK")
    other.close()
    assert_same_rows(CacheFile(tmp_path / "cache", "weights").read(PHOTOS, rows), rows)


def test_a_file_that_is_damaged_while_it_is_used_is_replaced(tmp_path):
    file = CacheFile(tmp_path / "cache", "weights")
    rows = some_rows(*((f"/{i}.jpg", "1 1") for i in range(500)))
    file.write(PHOTOS, rows)
    content = (tmp_path / "cache").read_bytes()
    (tmp_path / "cache").write_bytes(content[:5000] + bytes(len(content) - 5000))
    assert file.read(PHOTOS, rows) == {} and not (tmp_path / "cache").exists()
    file.write(PHOTOS, rows)
    assert_same_rows(file.read(PHOTOS, rows), rows)


def test_items_are_computed_once_and_returned_in_the_order_that_was_asked_for(tmp_path):
    table = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), TEXTS, lambda rows: -rows)
    items = [("a", ""), ("b", ""), ("a", "")]
    assert table.missing(items) == items[:2]
    table.add(items[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    again = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), TEXTS, None)
    for table in (table, again):
        assert table.missing(items) == []
        assert table.embeddings(items[1:]).tolist() == [[3.0, 4.0], [1.0, 2.0]]
        assert table.gallery(items[1:]).tolist() == [[-3.0, -4.0], [-1.0, -2.0]]
