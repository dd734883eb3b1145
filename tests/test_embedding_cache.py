import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from src import embedding_cache
from src.embedding_cache import PHOTOS, TEXTS, CachedEmbeddings, CacheFile, photo_item
from src.utils.samples import TarMember


def some_rows(*items, start=0):
    """Vectors that are all different, for items (key, version)."""
    return {item: np.arange(i, i + 4, dtype=np.float32) for i, item in enumerate(items, start)}


def write(file, table, rows):
    file.write(table, list(rows), np.stack(list(rows.values())))


def read(file, table, items):
    """{item: vector} of those items that are stored."""
    rows, vectors = file.read(table, items)
    return {item: vectors[row] for item, row in rows.items()}


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys()
    for item, vector in expected.items():
        np.testing.assert_array_equal(found[item], vector)


def test_rows_are_read_as_they_were_written(tmp_path):
    # The file systems of Linux allow names that are not UTF-8.
    photos = some_rows(("/a/b.jpg", "1 2"), ("/a/donn\udce9es ж 狗.jpg", "3 4"))
    texts = some_rows(("a dog", ""), ("", ""), start=5)
    file = CacheFile(tmp_path / "cache", "weights")
    write(file, PHOTOS, photos)
    write(file, TEXTS, texts)
    for file in (file, CacheFile(tmp_path / "cache", "weights")):
        assert_same_rows(read(file, PHOTOS, [*photos, ("/a/c.jpg", "1 2")]), photos)
        assert_same_rows(read(file, TEXTS, [*texts, ("a cat", "")]), texts)
    more = some_rows(("/a/c.jpg", "1 2"), start=9)
    write(file, PHOTOS, more)
    assert_same_rows(read(file, PHOTOS, [*photos, *more]), photos | more)


def test_another_version_of_a_photo_replaces_its_row(tmp_path):
    file = CacheFile(tmp_path / "cache", "weights")
    old, new = some_rows(("/a.jpg", "1 1")), some_rows(("/a.jpg", "2 2"), start=5)
    write(file, PHOTOS, old)
    assert read(file, PHOTOS, new) == {}
    write(file, PHOTOS, new)
    assert read(file, PHOTOS, old) == {}
    assert_same_rows(read(file, PHOTOS, new), new)


def test_rows_of_other_weights_are_never_used(tmp_path):
    first, other = (CacheFile(tmp_path / "cache", weights) for weights in ("first", "other"))
    rows = some_rows(("/a.jpg", "1 1"))
    write(first, PHOTOS, rows)
    write(first, TEXTS, rows)
    assert read(other, PHOTOS, rows) == {}
    assert_same_rows(read(first, PHOTOS, rows), rows)  # reading has deleted nothing
    write(other, TEXTS, rows)
    assert read(first, PHOTOS, rows) == read(first, TEXTS, rows) == {}
    assert read(other, PHOTOS, rows) == {} and read(other, TEXTS, rows)


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
    write(file, PHOTOS, rows)
    file.delete_missing_photos(set())
    assert_same_rows(read(file, PHOTOS, rows), rows)
    (tmp_path / "folder" / "1.jpg").unlink()
    (tmp_path / "folder" / "2.jpg").unlink()
    shutil.rmtree(tmp_path / "drive")
    file.delete_missing_photos({str(tmp_path / "folder" / "2.jpg")})
    del rows[str(tmp_path / "folder" / "1.jpg"), "1 1"]
    assert_same_rows(read(file, PHOTOS, rows), rows)
    (tmp_path / "shard.tar").unlink()
    file.delete_missing_photos(set())
    assert read(file, PHOTOS, [(str(member), "1 1")])


def test_a_locked_file_is_waited_for_once_and_then_ignored(tmp_path, monkeypatch):
    waits = []
    connect = sqlite3.connect

    def connect_without_patience(path, **options):
        waits.append(path)
        return connect(path, timeout=0, **options)

    rows = some_rows(("/a.jpg", "1 1"))
    write(CacheFile(tmp_path / "cache", "weights"), PHOTOS, rows)
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
    assert_same_rows(read(CacheFile(tmp_path / "cache", "weights"), PHOTOS, rows), rows)


def test_a_file_that_is_damaged_while_it_is_used_is_replaced(tmp_path):
    file = CacheFile(tmp_path / "cache", "weights")
    rows = some_rows(*((f"/{i}.jpg", "1 1") for i in range(500)))
    write(file, PHOTOS, rows)
    content = (tmp_path / "cache").read_bytes()
    (tmp_path / "cache").write_bytes(content[:5000] + bytes(len(content) - 5000))
    assert read(file, PHOTOS, rows) == {} and not (tmp_path / "cache").exists()
    write(file, PHOTOS, rows)
    assert_same_rows(read(file, PHOTOS, rows), rows)


def files_of_vectors(folder):
    return sorted(folder.glob("cache.*"))


def test_a_cache_whose_vectors_are_missing_is_replaced(tmp_path):
    rows = some_rows(*((f"/{i}.jpg", "1 1") for i in range(5)))
    more = some_rows(("/c.jpg", "1 1"), start=9)
    for content in (b"", bytes(4 * 4 * 5 - 1), None):
        for notices in (read, write):
            file = CacheFile(tmp_path / "cache", "weights")
            write(file, PHOTOS, rows)
            photos, _ = files_of_vectors(tmp_path)
            photos.unlink()
            if content is not None:
                photos.write_bytes(content)
            if notices is write:
                write(file, PHOTOS, more)  # in vain
            assert read(file, PHOTOS, rows) == {}
            assert files_of_vectors(tmp_path) == []
            write(file, PHOTOS, more)
            assert_same_rows(read(file, PHOTOS, [*rows, *more]), more)


def test_an_interrupted_write_loses_only_its_own_rows(tmp_path, monkeypatch):
    rows = some_rows(("/a.jpg", "1 1"), ("/b.jpg", "1 1"))
    file = CacheFile(tmp_path / "cache", "weights")
    write(file, PHOTOS, rows)

    class Interrupted(str):
        def encode(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(file, PHOTOS, some_rows((Interrupted("/c.jpg"), "1 1"), start=5))
    photos, _ = files_of_vectors(tmp_path)
    with photos.open("ab") as stream:
        stream.write(bytes(7))  # as if the disk had been full
    more = some_rows(("/c.jpg", "1 1"), ("/d.jpg", "1 1"), start=7)
    write(CacheFile(tmp_path / "cache", "weights"), PHOTOS, more)
    assert_same_rows(read(file, PHOTOS, [*rows, *more]), rows | more)


def test_a_file_of_an_earlier_version_is_replaced(tmp_path):
    with sqlite3.connect(tmp_path / "cache") as connection:
        connection.execute("CREATE TABLE meta (weights TEXT)")
        connection.execute("INSERT INTO meta VALUES ('weights')")
        connection.execute("CREATE TABLE photos (key BLOB PRIMARY KEY, version TEXT, "
                           "embedding BLOB, gallery BLOB)")
    connection.close()
    file, rows = CacheFile(tmp_path / "cache", "weights"), some_rows(("/a.jpg", "1 1"))
    assert read(file, PHOTOS, rows) == {}
    write(file, PHOTOS, rows)
    assert_same_rows(read(file, PHOTOS, rows), rows)


def test_vectors_are_mapped_and_outlive_their_file(tmp_path):
    items = [(f"/{i}.jpg", "1 1") for i in range(6)]
    embeddings = torch.arange(24.0).view(6, 4)
    writer = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), PHOTOS, double)
    for start in (0, 2, 4):
        writer.add(items[start:start + 2], embeddings[start:start + 2])
    reader = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), PHOTOS, double)
    assert reader.missing(items[1:]) == []
    found, gallery = reader.embeddings(items[1:4]), reader.gallery(items[1:4])
    for tensor in (found, gallery):
        assert np.shares_memory(tensor.numpy(), reader.arrays[0])
    before = files_of_vectors(tmp_path)
    other = CachedEmbeddings(CacheFile(tmp_path / "cache", "other"), PHOTOS, double)
    other.add(items, -embeddings)
    assert not set(before) & set(files_of_vectors(tmp_path))  # they were deleted
    assert found.equal(embeddings[1:4]) and gallery.equal(double(embeddings[1:4]))
    assert reader.embeddings(items[:0:-1]).equal(embeddings[1:].flip(0))  # in another order


def double(embeddings):
    """A gallery, which has a column more than the embeddings."""
    return torch.cat([2 * embeddings, embeddings[:, :1]], 1)


def test_items_are_computed_once_and_returned_in_the_order_that_was_asked_for(tmp_path):
    table = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), TEXTS, double)
    items = [("a", ""), ("b", ""), ("a", "")]
    assert table.missing(items) == items[:2]
    table.add(items[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    again = CachedEmbeddings(CacheFile(tmp_path / "cache", "weights"), TEXTS, double)
    for table in (table, again):
        assert table.missing(items) == []
        assert table.embeddings(items[1:]).tolist() == [[3.0, 4.0], [1.0, 2.0]]
        assert table.gallery(items[1:]).tolist() == [[6.0, 8.0, 3.0], [2.0, 4.0, 1.0]]
        table.add([("c", "")], torch.tensor([[5.0, 6.0]]))
        both = [("c", ""), ("a", "")]  # of several arrays
        assert table.embeddings(both).tolist() == [[5.0, 6.0], [1.0, 2.0]]
    plain = CachedEmbeddings(CacheFile(tmp_path / "plain", "weights"), TEXTS, None)
    plain.add(items[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert plain.embeddings(items).tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]


def test_the_key_of_a_photo_is_its_real_path(tmp_path, monkeypatch):
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "a.jpg").touch()
    (folder / "b.jpg").symlink_to("a.jpg")
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (folder / "a.jpg", folder / "b.jpg", link / "a.jpg", link / "b.jpg", Path("a.jpg"),
                 Path("..", "link", "b.jpg")):
        assert photo_item(path)[0] == os.path.realpath(folder / "a.jpg")
    member = TarMember(link / "shard.tar", "00000/a.jpg", 0, 0, 0)
    (link / "shard.tar").touch()
    assert photo_item(member)[0] == os.path.realpath(folder / "shard.tar") + "/00000/a.jpg"
