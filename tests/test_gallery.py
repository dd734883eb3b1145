"""A gallery and its cache of embeddings."""
import functools
import os
import shutil
import sqlite3
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from src import gallery, search
from src.gallery import CACHE, Search, cache_of_run, photos_of_split
from src.utils.errors import DataError
from tests.test_search import change


@pytest.fixture
def read_photos(monkeypatch):
    """The list of the photos that were read from their files, in the order of reading."""
    seen = []
    load_photo = search.load_photo

    def load(path, size):
        seen.append(path)
        return load_photo(path, size)

    monkeypatch.setattr(search, "load_photo", load)
    return seen


def cached_photos(run_dir):
    """The file names of the photos in the cache's file."""
    with sqlite3.connect(run_dir / CACHE) as connection:
        keys = [key for key, in connection.execute("SELECT key FROM photos")]
    connection.close()
    return {os.path.basename(key.decode()) for key in keys}


def test_cached_photos_and_texts_are_not_embedded_again(
        run_dir, shapes, tmp_path, monkeypatch, read_photos):
    photos = photos_of_split(shapes, "test")[0]
    first = cache_of_run(run_dir).photos(photos)
    assert sorted(read_photos) == sorted(photos)
    new = tmp_path / "new.png"
    Image.new("RGB", (30, 20), "red").save(new)
    read_photos.clear()
    # Only the photo that is not in the cache yet is read.
    more = cache_of_run(run_dir).photos([new, *photos])
    assert read_photos == [new] and torch.equal(more[1:], first)
    Image.new("RGB", (30, 20), "blue").save(new)
    os.utime(new, (1, 1))
    changed = cache_of_run(run_dir).photos([new])
    assert read_photos == [new] * 2 and not torch.equal(changed[0], more[0])
    assert len(cached_photos(run_dir)) == len(photos) + 1  # the changed photo replaced its row

    texts = cache_of_run(run_dir).texts(["a red circle", "a blue cross"])
    embedded = []
    monkeypatch.setattr(gallery, "embed_text_batches", lambda *args: embedded.extend(args[2]) or [])
    again = cache_of_run(run_dir).texts(["a blue cross", "a red circle"])
    assert not embedded
    assert torch.equal(again, texts[[1, 0]])


def test_the_cache_holds_the_galleries_of_the_bank(run_dir, shapes, monkeypatch):
    photos, captions = photos_of_split(shapes, "test")
    texts = [caption for photo_captions in captions for caption in photo_captions]
    bank = search.load_bank(run_dir)
    for _ in range(2):
        cache = cache_of_run(run_dir)
        torch.testing.assert_close(bank.photo_gallery(cache.photos(photos)),
                                   cache.photo_gallery(photos))
        torch.testing.assert_close(bank.text_gallery(cache.texts(texts)),
                                   cache.text_gallery(texts))
        # The second time, everything comes from the file.
        monkeypatch.setattr(gallery, "embed_texts", None)
        monkeypatch.setattr(search, "load_photo", None)


def test_several_threads_may_use_the_cache_one_after_another(run_dir, shapes):
    photos = photos_of_split(shapes, "test")[0]
    cache = cache_of_run(run_dir)
    found = []
    for part in (photos[:4], photos):
        thread = threading.Thread(target=lambda part=part: found.append(cache.photos(part)))
        thread.start()
        thread.join()
    assert torch.equal(found[1][:4], found[0]) and len(found[1]) == len(photos)


def test_a_cache_deletes_the_photos_that_are_gone_once(run_dir, shapes, tmp_path):
    photos = [tmp_path / photo.name for photo in photos_of_split(shapes, "test")[0]]
    for photo in photos:
        shutil.copy(shapes / "Flicker8k_Dataset" / photo.name, photo)
    cache, names = cache_of_run(run_dir), {photo.name for photo in photos}
    cache.photos(photos)
    photos[0].unlink()
    cache.photos(photos[1:])  # photos that are added must not take longer, the more there are
    assert cached_photos(run_dir) == names
    cache_of_run(run_dir).photos(photos[1:])
    assert cached_photos(run_dir) == names - {photos[0].name}


def test_other_weights_embed_the_photos_again(run_dir, shapes, read_photos):
    photos = photos_of_split(shapes, "test")[0]
    before = cache_of_run(run_dir).photos(photos)

    def negate(weights):
        return weights | {"fusion.out.weight": -weights["fusion.out.weight"]}

    change("model_state_dict", negate)(run_dir)
    after = cache_of_run(run_dir).photos(photos[:3])
    assert len(read_photos) == len(photos) + 3 and not torch.allclose(after, before[:3])
    assert cached_photos(run_dir) == {photo.name for photo in photos[:3]}


@pytest.mark.parametrize("content", [b"", b"nonsense", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_cache_is_replaced(run_dir, shapes, content, read_photos):
    photos = photos_of_split(shapes, "test")[0]
    before = cache_of_run(run_dir).photos(photos)
    (run_dir / CACHE).write_bytes(content)
    for _ in range(2):
        assert torch.equal(cache_of_run(run_dir).photos(photos), before)
    assert len(read_photos) == 2 * len(photos)
    assert cached_photos(run_dir) == {photo.name for photo in photos}


def test_the_search_works_without_a_cache_that_cannot_be_written(run_dir, shapes, read_photos):
    photos = photos_of_split(shapes, "test")[0]
    before = cache_of_run(run_dir).photos(photos)
    (run_dir / CACHE).unlink()
    (run_dir / CACHE).mkdir()  # no file can be opened in the place of a folder
    cache = cache_of_run(run_dir)
    for _ in range(2):
        assert torch.equal(cache.photos(photos), before)
        assert cache.texts(["a red circle"]).shape == (1, before.shape[1])
    assert len(read_photos) == 2 * len(photos)


def test_an_old_cache_file_is_ignored(run_dir, shapes):
    (run_dir / "embeddings_flickr8k.pt").write_bytes(b"of an earlier version")
    assert len(cache_of_run(run_dir).photos(photos_of_split(shapes, "test")[0])) == 8
    assert (run_dir / "embeddings_flickr8k.pt").read_bytes() == b"of an earlier version"


def bad_photos(folder):
    """Write files that are named like photos but cannot be read as such."""
    noise = Image.effect_noise((90, 90), 60)
    noise.save(folder / "truncated.jpg")
    content = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[:len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>403</html>")
    # A header that claims 40,000 x 40,000 pixels.
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    (folder / "large.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header)))
    return {folder / name for name in ("truncated.jpg", "empty.jpg", "page.jpg", "large.png")}


def test_unreadable_photos_are_skipped_where_that_is_allowed(
        run_dir, shapes, tmp_path, monkeypatch):
    good = photos_of_split(shapes, "test")[0]
    for photo in good:
        shutil.copy(photo, tmp_path / photo.name)
    bad = bad_photos(tmp_path) | {tmp_path / "gone.jpg"}
    expected = cache_of_run(run_dir).photos([tmp_path / photo.name for photo in good])
    (run_dir / CACHE).unlink()
    monkeypatch.setattr(
        gallery, "embed_photo_batches", functools.partial(search.embed_photo_batches, batch_size=3))
    paths = sorted(bad | {tmp_path / photo.name for photo in good})
    for _ in range(2):  # the second time from the cache
        unreadable = {}
        embeddings = cache_of_run(run_dir).photos(paths, unreadable=unreadable)
        assert torch.allclose(embeddings, expected, rtol=1e-4, atol=1e-6)
        assert unreadable.keys() == bad and "truncated" in unreadable[tmp_path / "truncated.jpg"]
        assert all(str(path) in message for path, message in unreadable.items())
    with pytest.raises(DataError, match="not one of 5 photos can be read: .*gone.jpg"):
        cache_of_run(run_dir).photos(sorted(bad), unreadable={})
    with pytest.raises(DataError, match="empty.jpg: the file is empty"):
        cache_of_run(run_dir).photos([tmp_path / "empty.jpg"])


@pytest.mark.parametrize("end", [KeyboardInterrupt, DataError("an unreadable photo")])
def test_embedded_photos_are_kept_whatever_ends_the_program(
        run_dir, shapes, monkeypatch, read_photos, end):
    photos = photos_of_split(shapes, "test")[0]
    load = search.load_photo

    def load_three(path, size):
        if len(read_photos) == 3:
            raise end
        return load(path, size)

    monkeypatch.setattr(
        gallery, "embed_photo_batches", functools.partial(search.embed_photo_batches, batch_size=1))
    monkeypatch.setattr(search, "load_photo", load_three)
    monkeypatch.setattr(search, "decoding_threads", functools.partial(ThreadPoolExecutor, 1))
    with pytest.raises((KeyboardInterrupt, DataError)):
        cache_of_run(run_dir).photos(photos)
    monkeypatch.setattr(search, "load_photo", load)
    cache_of_run(run_dir).photos(photos)
    assert sorted(read_photos) == sorted(photos)  # no photo was read twice


def test_captions_are_kept_batch_by_batch_and_their_progress_is_told(run_dir, monkeypatch):
    batches = functools.partial(search.embed_text_batches, batch_size=2)
    monkeypatch.setattr(gallery, "embed_text_batches", batches)
    texts = ["red", "a red circle", "a blue cross", "two blue squares on red", "red"]
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_of_run(run_dir).texts(texts, interrupt)
    cache = cache_of_run(run_dir)
    embeddings = cache.texts(texts, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (2, 2)]  # of equal texts, one is embedded
    torch.testing.assert_close(embeddings, search.embed_texts(cache.model, cache.tokenizer, texts))


def test_photos_of_a_split(dataset_dir):
    photos, captions = photos_of_split(dataset_dir, "val")
    assert [photo.name for photo in photos] == ["1006_abc.jpg", "1007_abc.jpg", "1008_abc.jpg"]
    assert captions[1][2] == "Caption 2 of photo 7 , a dog ."
    text = (dataset_dir / "Flickr8k.token.txt").read_text()
    (dataset_dir / "Flickr8k.token.txt").write_text(
        "\n".join(line for line in text.splitlines() if "1007" not in line)
    )
    with pytest.raises(DataError, match="1 have no captions, such as 1007_abc.jpg"):
        photos_of_split(dataset_dir, "val")


def test_of_captions_that_photos_share_each_is_there_once():
    captions = [["A dog.", "one"], ["a cat", "a dog"], ["a dog", "a  cat"]]
    found = Search(SimpleNamespace(bank=None), ["a", "b", "c"], captions, False)
    assert found.different_texts() == [0, 1, 2]
    assert found.different_texts(photo=1) == [1, 2, 3]
    assert found.different_texts(photo=2) == [1, 4, 5]
    assert Search(SimpleNamespace(bank=None), ["a"], [[]], False).different_texts() == []
