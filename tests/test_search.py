import functools
import json
import os
import shutil
import struct
import zlib
from collections import Counter

import pytest
import torch
from PIL import Image

from src import runs as checkpoint
from src import search as inference
from src.evaluation import evaluate
from src.retrieval import retrieval_metrics
from src.runs import BEST, HISTORY
from src.search import (
    EmbeddingCache,
    embed_photos,
    embed_texts,
    kinds,
    load_model,
    photos_of_folder,
    photos_of_split,
)
from src.settings import PRESETS
from src.utils.errors import DataError, UsageError
from src.utils.flickr8k_simple import Flickr8kImageTextDataset
from tests.conftest import arguments, main


@pytest.fixture
def run_dir(finished, tmp_path):
    """A finished run, to be written into."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_embeddings_score_what_the_evaluation_scores(finished, shapes):
    model, tokenizer, transform = load_model(finished[0])
    photos, captions = photos_of_split(shapes, "val")
    images = embed_photos(model, transform, photos, batch_size=5)
    texts = embed_texts(model, tokenizer, [text for own in captions for text in own], batch_size=7)
    metrics = retrieval_metrics(images, texts, [i for i, own in enumerate(captions) for _ in own])
    data = Flickr8kImageTextDataset(
        shapes, "val", transform(photos[0]).shape[-1], tokenizer, cache=False
    )
    assert metrics == pytest.approx(evaluate(model.cpu(), data))
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))


def test_photos_are_seen_at_the_size_that_they_were_judged_at(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS["tiny"], "start_size", 32)
    assert main(*arguments(shapes, tmp_path, "--no-amp", epochs=1)) == 0
    model, tokenizer, transform = load_model(tmp_path)
    photos, captions = photos_of_split(shapes, "val")
    assert transform(photos[0]).shape == (3, 48, 48)
    metrics = retrieval_metrics(
        embed_photos(model, transform, photos),
        embed_texts(model, tokenizer, [text for own in captions for text in own]),
        [i for i, own in enumerate(captions) for _ in own],
    )
    assert metrics == pytest.approx(json.loads((tmp_path / HISTORY).read_text())[0]["val"])


def test_every_row_is_its_own_texts(finished):
    model, tokenizer, _ = load_model(finished[0])
    texts = [
        "a red circle on the left and a small blue square on the right",
        "a dog",
        "two green crosses",
    ]
    together = embed_texts(model, tokenizer, texts)
    for text, row in zip(texts, together):
        torch.testing.assert_close(
            embed_texts(model, tokenizer, [text])[0], row, rtol=1e-4, atol=1e-5
        )
    assert not model.training and (together @ together.T).fill_diagonal_(0).max() < 0.9999


def test_what_is_cached_is_not_computed_again(run_dir, shapes, tmp_path, monkeypatch):
    photos = photos_of_split(shapes, "test")[0]
    seen = []
    monkeypatch.setattr(inference, "load_photo", lambda path, size, load=inference.load_photo: (
        seen.append(os.path.basename(path)), load(path, size))[1])
    first = EmbeddingCache(run_dir).photos(photos)
    assert sorted(seen) == sorted(photo.name for photo in photos)
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (30, 20), "red").save(own / "new.png")
    seen.clear()
    # one that is new costs only itself
    more = EmbeddingCache(run_dir).photos([own / "new.png", *photos])
    assert seen == ["new.png"] and torch.equal(more[1:], first)
    Image.new("RGB", (30, 20), "blue").save(own / "new.png")
    os.utime(own / "new.png", (1, 1))
    changed = EmbeddingCache(run_dir).photos([own / "new.png"])
    assert seen == ["new.png"] * 2 and not torch.equal(changed[0], more[0])
    cache = EmbeddingCache(run_dir)
    texts = cache.texts(["a red circle", "a blue cross"])
    monkeypatch.setattr(inference, "embed_texts", None)
    assert torch.equal(
        EmbeddingCache(run_dir).texts(["a blue cross", "a red circle"]), texts[[1, 0]]
    )


def change(key, value):
    def damage(run_dir):
        state = torch.load(run_dir / BEST, weights_only=True)
        torch.save(state | {key: value(state[key])}, run_dir / BEST)
    return damage


@pytest.mark.parametrize("damage", ["other weights", "damaged", "not to be written"])
def test_a_cache_that_does_not_serve_is_computed_anew(run_dir, shapes, monkeypatch, damage):
    photos = photos_of_split(shapes, "test")[0]
    before = EmbeddingCache(run_dir).photos(photos)
    if damage == "other weights":
        change(
            "model_state_dict",
            lambda weights: (
                weights | {"fusion.out.weight": -weights["fusion.out.weight"]}
            ),
        )(run_dir)
    elif damage == "damaged":
        (run_dir / inference.CACHE).write_bytes(b"nonsense")
    else:
        (run_dir / inference.CACHE).unlink()
        monkeypatch.setattr(
            checkpoint.os,
            "fsync",
            lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
    after = EmbeddingCache(run_dir).photos(photos)
    assert torch.equal(before, after) != (damage == "other weights")


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda run_dir: (run_dir / BEST).unlink(), "has no best model yet"),
        (lambda run_dir: (run_dir / BEST).write_bytes(b"nonsense"), "damaged"),
        (
            lambda run_dir: torch.save({"state_dict": {}}, run_dir / BEST),
            "not a checkpoint of this version",
        ),
        (change("model_state_dict", lambda weights: {}), "not those of the model"),
        (
            change(
                "model_state_dict", lambda weights: weights | {"memory.slots": torch.zeros(2, 2)}
            ),
            "not those of the model",
        ),
        (change("tokenizer", lambda state: {"name": "words"}), "not those of the model"),
        (change("config", lambda config: {}), "the run is of another version"),
        (change("config", lambda config: {"arguments": {}}), "the run is of another version"),
        (
            change("config", lambda config: config | {"settings": config["settings"] | {"a": 1}}),
            "the run is of another version",
        ),
        (
            change(
                "config",
                lambda config: config | {"settings": config["settings"] | {"latent_dim": 32}},
            ),
            "not those of the model",
        ),
    ],
)
def test_a_run_that_cannot_be_loaded(run_dir, damage, message):
    damage(run_dir)
    with pytest.raises(UsageError, match=message) as error:
        load_model(run_dir)
    assert len(str(error.value).splitlines()) == 1 and str(run_dir) in str(error.value)


def test_photos_of_a_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        photos_of_folder(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no photo")
    with pytest.raises(DataError, match="holds no photos"):
        photos_of_folder(tmp_path)
    (tmp_path / "holidays").mkdir()
    for name in ("b.JPG", "a.png", "holidays/c.webp"):
        (tmp_path / name).touch()
    assert photos_of_folder(tmp_path) == [
        tmp_path / name for name in ("a.png", "b.JPG", "holidays/c.webp")
    ]


def test_all_kinds_that_pillow_reads_links_and_what_is_left_out(tmp_path):
    own, album = tmp_path / "own", tmp_path / "album"
    (own / "below").mkdir(parents=True)
    (own / ".trash").mkdir()
    album.mkdir()
    kept = ["a.avif", "b.jfif", "c.JPG", "d.mpo", "e.tga", "below/f.qoi"]
    for name in (*kept, "._c.jpg", ".DS_Store", ".trash/g.jpg", "IMG_1.HEIC", "IMG_2.heic",
                 "film.mpg", "notes"):
        (own / name).touch()
    (album / "h.png").touch()
    os.mkfifo(own / "pipe.jpg")
    (own / "album").symlink_to(album)
    (album / "loop").symlink_to(own)
    (own / "i.jpg").symlink_to(own / "c.JPG")
    (own / "broken.jpg").symlink_to(own / "none.jpg")
    skipped = Counter()
    photos = photos_of_folder(own, skipped)
    assert photos == sorted(own / name for name in [*kept, "album/h.png", "i.jpg"])
    expected = "2 .heic, 1 .mpg, 2 broken links and the like, 1 without a suffix"
    assert kinds(skipped) == expected
    for name in kept:
        (own / name).unlink()
    (own / "i.jpg").unlink()
    (album / "h.png").unlink()
    with pytest.raises(DataError, match="holds no photos that can be read .left out: 2 .heic"):
        photos_of_folder(own)


def bad_photos(folder):
    """Files that have a photo's name and are none."""
    noise = Image.effect_noise((90, 90), 60)
    noise.save(folder / "truncated.jpg")
    content = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[:len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>403</html>")
    # 40,000 x 40,000 pixels in a few bytes
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    (folder / "large.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header)))
    return {folder / name for name in ("truncated.jpg", "empty.jpg", "page.jpg", "large.png")}


def test_bad_photos_are_left_out_where_that_is_allowed(run_dir, shapes, tmp_path, monkeypatch):
    good = photos_of_split(shapes, "test")[0]
    for photo in good:
        shutil.copy(photo, tmp_path / photo.name)
    bad = bad_photos(tmp_path) | {tmp_path / "gone.jpg"}
    expected = EmbeddingCache(run_dir).photos([tmp_path / photo.name for photo in good])
    (run_dir / inference.CACHE).unlink()
    monkeypatch.setattr(
        inference, "embed_in_batches", functools.partial(inference.embed_in_batches, batch_size=3))
    paths = sorted(bad | {tmp_path / photo.name for photo in good})
    for _ in range(2):  # the second time from the cache
        faults = {}
        assert torch.allclose(EmbeddingCache(run_dir).photos(paths, faults=faults), expected,
                              rtol=1e-4, atol=1e-6)
        assert faults.keys() == bad and "truncated" in faults[tmp_path / "truncated.jpg"]
        assert all(str(path) in fault for path, fault in faults.items())
    with pytest.raises(DataError, match="not one of 5 photos can be read: .*gone.jpg"):
        EmbeddingCache(run_dir).photos(sorted(bad), faults={})
    with pytest.raises(DataError, match="empty.jpg: the file is empty"):
        EmbeddingCache(run_dir).photos([tmp_path / "empty.jpg"])


@pytest.mark.parametrize("end", [KeyboardInterrupt, DataError("a bad one")])
def test_what_was_embedded_is_kept_whatever_ends_it(run_dir, shapes, monkeypatch, end):
    photos = photos_of_split(shapes, "test")[0]
    seen, load = [], inference.load_photo

    def load_three(path, size):
        if len(seen) == 3:
            raise end
        seen.append(path)
        return load(path, size)

    monkeypatch.setattr(
        inference, "embed_in_batches", functools.partial(inference.embed_in_batches, batch_size=1))
    monkeypatch.setattr(inference, "load_photo", load_three)
    with pytest.raises((KeyboardInterrupt, DataError)):
        EmbeddingCache(run_dir).photos(photos)
    monkeypatch.setattr(inference, "load_photo", lambda path, size: (
        seen.append(path), load(path, size))[1])
    EmbeddingCache(run_dir).photos(photos)
    assert sorted(seen) == sorted(photos)  # none was read twice


def test_photos_of_a_split(dataset_dir):
    photos, captions = photos_of_split(dataset_dir, "val")
    assert [photo.name for photo in photos] == ["1006_abc.jpg", "1007_abc.jpg", "1008_abc.jpg"]
    assert captions[1][2] == "Caption 2 of photo 7 , a dog ."
    text = (dataset_dir / "Flickr8k.token.txt").read_text()
    (dataset_dir / "Flickr8k.token.txt").write_text(
        "\n".join(line for line in text.splitlines() if "1007" not in line)
    )
    with pytest.raises(DataError, match="1007_abc.jpg has no captions"):
        photos_of_split(dataset_dir, "val")
