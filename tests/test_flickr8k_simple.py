"""The dataset of one split, the order of an epoch, and its batches."""
import shutil

import numpy as np
import pytest
import torch

from src.utils import flickr8k_simple, photo_store
from src.utils.captions import read_split
from src.utils.flickr8k_simple import TEXT_BUCKET, epoch_batches, iterate_batches, place_photos
from src.utils.photo_store import STORE_FOLDER
from src.utils.tokenizers import CharTokenizer
from tests.conftest import colour_of_photo, give_class_names, open_dataset

CPU = torch.device("cpu")


def test_the_attributes_of_a_dataset(dataset_dir):
    data = open_dataset(dataset_dir)
    assert len(data) == 30
    assert data.names == read_split(dataset_dir, "train") == sorted(data.names)
    assert data.photos.shape == (6, 3, 16, 16)
    assert data.photos.dtype == torch.uint8
    assert data.captions[7] == "Caption 2 of photo 1 , a dog ."
    text = CharTokenizer().decode(data.texts[7].tolist())
    assert text == "caption two of photo one , a dog ."
    assert data.photo_of_caption.tolist() == [i for i in range(6) for _ in range(5)]


@pytest.mark.parametrize("split, first, count", [("train", 0, 6), ("val", 6, 3), ("test", 9, 2)])
def test_photos_stand_in_the_order_of_their_split(dataset_dir, split, first, count):
    photos = open_dataset(dataset_dir, split).photos
    assert len(photos) == count
    for index, photo in enumerate(photos, start=first):
        colour = torch.tensor(colour_of_photo(index))
        assert (photo.float().mean((1, 2)) - colour).abs().max() < 4


def test_equal_datasets_have_the_same_fingerprint(dataset_dir, tmp_path):
    fingerprint = open_dataset(dataset_dir).fingerprint()
    # The copies of the files have new times, and so have a store of their own.
    shutil.copytree(dataset_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "copy" / STORE_FOLDER)
    assert open_dataset(tmp_path / "copy").fingerprint() == fingerprint
    assert open_dataset(dataset_dir, image_size=24).fingerprint() == fingerprint


@pytest.mark.parametrize("name, change", [
    ("Flicker8k_Dataset/1002_abc.jpg", lambda content: content[:-9] + b"x" + content[-8:]),
    ("Flickr_8k.trainImages.txt", lambda content: b"".join(reversed(content.splitlines(True)))),
    ("Flickr8k.token.txt", lambda content: content.replace(b"dog", b"cat", 1))])
def test_the_fingerprint_changes_with_photos_order_and_captions(dataset_dir, name, change):
    before = open_dataset(dataset_dir).fingerprint()
    path = dataset_dir / name
    path.write_bytes(change(path.read_bytes()))
    assert open_dataset(dataset_dir).fingerprint() != before


def test_real_captions_are_not_cut(real_photos):
    val = open_dataset(real_photos, "val")
    assert len(val.names) == 1000
    assert len(val) == 5000
    assert max(map(len, val.texts)) > 77
    for caption, text in zip(val.captions, val.texts):
        assert CharTokenizer().decode(text.tolist()) == CharTokenizer().normalize(caption)


@pytest.mark.parametrize("number, photos", [(2, 2), (6, 6), (1000, 6)])
def test_the_first_photos_and_their_captions(dataset_dir, number, photos):
    data = open_dataset(dataset_dir)
    part = data.first(number)
    assert part.names == data.names[:photos]
    assert len(part) == len(part.captions) == len(part.texts) == 5 * photos
    assert torch.equal(part.photos[:], data.photos[:photos])
    assert (part.fingerprint() == data.fingerprint()) == (photos == 6)
    pairs = part.epoch(5, 10, seed=0)
    assert sorted(pairs.flatten().tolist()) == list(range(5 * photos))
    batch = next(iterate_batches(part, part.photos, pairs, CPU))
    assert torch.equal(batch["images"], data.photos[batch["photo_ids"]])
    assert torch.equal(batch["photo_ids"][batch["photo_of_pair"]], data.photo_of_caption[pairs[0]])


def test_new_datasets_leave_the_old_one_as_it_is(dataset_dir):
    data = open_dataset(dataset_dir)
    before = data.fingerprint()
    photos = torch.zeros(6, 3, 8, 8)
    assert data.replace(photos=photos).photos is photos
    data.first(2)
    assert data.fingerprint() == before
    assert len(data) == len(data.texts) == 30 and data.photos is not photos


# The order of an epoch.


@pytest.mark.parametrize("captions_per_image, used", [(1, 150), (2, 120), (5, 150), (9, 150)])
def test_an_epoch_holds_each_pair_at_most_once(captions_per_image, used):
    """Every photo has five captions. With two captions per group, the fifth is not used."""
    photo_of_caption = torch.arange(30).repeat_interleave(5)
    pairs = epoch_batches(photo_of_caption, captions_per_image, 20, seed=3).flatten().tolist()
    assert len(pairs) == len(set(pairs))
    assert used - len(pairs) < 20


@pytest.mark.parametrize("captions_per_image, group_size", [(1, 1), (2, 2), (5, 5), (9, 5)])
def test_the_captions_of_a_photo_stand_side_by_side(captions_per_image, group_size):
    photo_of_caption = torch.arange(30).repeat_interleave(5)
    for batch in epoch_batches(photo_of_caption, captions_per_image, 20, seed=3):
        runs = torch.unique_consecutive(photo_of_caption[batch], return_counts=True)[1]
        assert all(count % group_size == 0 for count in runs.tolist())


def test_the_order_of_an_epoch_follows_from_the_seed():
    photo_of_caption = torch.arange(30).repeat_interleave(5)
    orders = [epoch_batches(photo_of_caption, 5, 20, seed) for seed in (3, 3, 4)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("counts, captions_per_image, batch_size, steps, pairs", [
    ([1] * 60, 5, 20, 3, 20),  # one caption per photo
    ([1] * 60, 1, 20, 3, 20),
    ([2] * 30, 5, 20, 3, 20),
    ([1, 2, 3, 4, 5] * 4, 5, 20, 3, 20),  # photos with different numbers of captions
    ([5] * 12, 5, 7, 5, 7),  # half a batch is smaller than a group of five captions
    ([5] * 12, 5, 2, 30, 2),
    ([3] * 2, 3, 100, 1, 6),  # there are fewer pairs than a batch should have
])
def test_all_batches_have_the_same_number_of_pairs(
        counts, captions_per_image, batch_size, steps, pairs):
    photo_of_caption = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for seed in range(5):
        batches = epoch_batches(photo_of_caption, captions_per_image, batch_size, seed)
        assert [len(batch) for batch in batches] == [pairs] * steps
        assert len(batches.unique()) == pairs * steps
        photos = [len(photo_of_caption[batch].unique()) for batch in batches]
        # The two pairs of the smallest batch may be of one photo by chance.
        assert min(photos) > 1 or batch_size == 2


def test_every_caption_is_used_in_some_epoch():
    photo_of_caption = torch.arange(10).repeat_interleave(5)
    epochs = [epoch_batches(photo_of_caption, 2, 4, seed) for seed in range(20)]
    assert sorted(torch.cat(epochs).unique().tolist()) == list(range(50))


def test_photos_larger_than_memory_are_shuffled_in_windows_of_shards():
    photo_of_caption = torch.arange(120).repeat_interleave(5)
    shard_of_photo = torch.arange(120) // 10
    orders = [epoch_batches(photo_of_caption, 5, 30, seed, shard_of_photo, 3)
              for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    for pairs in (orders[0], orders[2]):
        assert sorted(pairs.flatten().tolist()) == list(range(600))
        photos = photo_of_caption[pairs.flatten()][::5]
        windows = [set(shard_of_photo[window].tolist()) for window in photos.split(30)]
        assert all(len(window) == 3 for window in windows)
        assert len(set().union(*windows)) == 12
        shards = shard_of_photo[photos[:30]].tolist()
        assert shards != sorted(shards)  # the photos of a window are shuffled, too


def test_only_photos_that_take_much_memory_are_shuffled_in_windows(dataset_dir, monkeypatch):
    monkeypatch.setattr(photo_store, "SHARD_SIZE", 2)
    data = open_dataset(dataset_dir)
    order = data.epoch(5, 10, seed=3)
    assert torch.equal(order, epoch_batches(data.photo_of_caption, 5, 10, 3))

    # With 70 % of the photos' bytes, a window holds two of the three shards.
    monkeypatch.setattr(flickr8k_simple, "WINDOW_BYTES", data.photos.nbytes * 0.7)
    order = data.epoch(5, 10, seed=3)
    shard_of_photo = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(order, epoch_batches(data.photo_of_caption, 5, 10, 3, shard_of_photo, 2))
    last_window = shard_of_photo[data.photo_of_caption[order[2]]]
    assert len(last_window.unique()) == 1


# Batches.


@pytest.mark.parametrize("captions_per_image", [1, 2, 5])
def test_a_batch_holds_each_photo_once_with_its_captions(dataset_dir, captions_per_image):
    data = open_dataset(dataset_dir)
    order = epoch_batches(data.photo_of_caption, captions_per_image, 10, seed=1)
    batches = list(iterate_batches(data, place_photos(data.photos, CPU), order, CPU))
    assert len(batches) == len(order)
    for pairs, batch in zip(order, batches):
        photo_ids = batch["photo_ids"][batch["photo_of_pair"]]
        assert torch.equal(photo_ids, data.photo_of_caption[pairs])
        assert torch.equal(batch["images"], data.photos[batch["photo_ids"]])
        assert captions_per_image == 1 or len(batch["images"]) <= len(pairs) / captions_per_image
        assert batch["text"].shape[1] % TEXT_BUCKET == 0
        for row, pair in zip(batch["text"], pairs):
            text = data.texts[int(pair)]
            assert row[:len(text)].tolist() == text.tolist()
            assert not row[len(text):].any()


def test_iterating_over_batches_can_be_stopped(dataset_dir):
    data = open_dataset(dataset_dir)
    batches = iterate_batches(data, data.photos, [np.array([0, 1])] * 50, CPU)
    next(batches)
    batches.close()


def test_without_pairs_there_are_no_batches(dataset_dir):
    data = open_dataset(dataset_dir)
    assert list(iterate_batches(data, data.photos, [], CPU)) == []


# Captions that photos share.


def test_captions_that_are_not_shared_have_no_ids(dataset_dir):
    data = open_dataset(dataset_dir)
    assert data.text_ids is None and data.texts_of_photo is None
    batch = next(iterate_batches(data, data.photos, [np.arange(4)], CPU))
    assert batch.keys() == {"photo_ids", "photo_of_pair", "text", "images"}
    assert data.counts().keys() == {"photos", "pixels", "captions", "skipped", "captions_per_photo"}


def test_equal_captions_have_equal_ids(dataset_dir):
    """Capitals and spaces do not make captions differ. All splits of a folder have ids if photos
    share captions in any of them."""
    fingerprint = open_dataset(give_class_names(dataset_dir)).fingerprint()
    data = open_dataset(dataset_dir)
    assert data.text_ids.tolist() in ([1, 1, 2] * 2, [2, 2, 1] * 2)
    assert [ids.tolist() for ids in data.texts_of_photo] == [[i] for i in data.text_ids.tolist()]
    counts = data.counts()
    assert counts["captions_per_photo"] == counts["texts_per_photo"] == {"1": 6}
    assert counts["photos_per_caption"] == {"2": 2, "4": 4} and counts["different_captions"] == 2
    assert open_dataset(dataset_dir, "test").text_ids.unique().tolist() == [1]
    data.text_ids = None  # as in a version whose metrics counted equal captions as different
    assert data.fingerprint() != fingerprint


def test_a_batch_tells_all_texts_of_its_photos(dataset_dir):
    """Also those that are not in the batch. The rows have equal lengths in all batches."""
    path = dataset_dir / "Flickr8k.token.txt"
    texts = {0: "a b", 1: "b b", 2: "c a d", 3: "d", 4: "a", 5: "b"}  # "b" is there twice
    lines = path.read_text().splitlines(True)[30:]
    for photo, names in texts.items():
        lines += [f"{1000 + photo}_abc.jpg#{i}\t{name}\n" for i, name in enumerate(names.split())]
    path.write_text("".join(lines))
    data = open_dataset(dataset_dir)
    name_of = dict(zip(data.text_ids.tolist(), data.captions)) | {0: "-"}
    for pairs in ([0, 4], [2, 3, 7], [8, 9]):
        (batch,) = iterate_batches(data, data.photos, torch.tensor([pairs]), CPU)
        assert [name_of[i] for i in batch["text_ids"].tolist()] == [data.captions[i] for i in pairs]
        for photo, row in zip(batch["photo_ids"].tolist(), batch["texts_of_photo"].tolist()):
            names = [name_of[i] for i in row]
            assert len(names) == 3 and {*names} - {"-"} == {*texts[photo].split()}
    part = data.first(3)
    assert part.text_ids.tolist() == data.text_ids[:7].tolist()
    assert [ids.tolist() for ids in part.texts_of_photo
            ] == [ids.tolist() for ids in data.texts_of_photo][:3]
    assert data.counts()["texts_per_photo"] == {"1": 4, "2": 1, "3": 1}
