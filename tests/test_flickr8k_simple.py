"""The dataset on disk: both layouts, their quirks, and every kind of damage."""
import errno
import io
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.utils import flickr8k_simple
from src.utils import photo_store as photo_stores
from src.utils.captions import MAX_LENGTH, read_split
from src.utils.duplicates import SIGNATURE
from src.utils.errors import DataError
from src.utils.flickr8k_simple import (
    TEXT_BUCKET,
    Flickr8kImageTextDataset,
    epoch_batches,
    iterate_batches,
    place_photos,
)
from src.utils.photo_store import DIGEST_BYTES, STORE_FOLDER, load_photo
from src.utils.ragged import Ragged
from src.utils.splits import hold_out, open_split, read_pairs
from src.utils.tokenizers import CharTokenizer


def dataset(root, split="train", **changes):
    return open_split(
        root, split, **{"image_size": 16, "tokenizer": CharTokenizer()} | changes
    )


def test_items_photos_and_order(dataset_dir):
    data = dataset(dataset_dir)
    assert len(data) == 30 and len(data.names) == 6 and data.photos.shape == (6, 3, 16, 16)
    assert data.names == read_split(dataset_dir, "train") == sorted(data.names)
    assert data.photos.dtype == torch.uint8
    assert data.captions[7] == "Caption 2 of photo 1 , a dog ."
    text = CharTokenizer().decode(data.texts[7].tolist())
    assert text == "caption two of photo one , a dog ."
    assert data.photo_of_caption.tolist() == [i for i in range(6) for _ in range(5)]
    assert [len(dataset(dataset_dir, split)) for split in ("val", "test")] == [15, 10]


def test_photos_go_with_their_captions(dataset_dir):
    """Photo i is a plain colour that says so; the loader hands out exactly that one."""
    for split, first in (("train", 0), ("val", 6), ("test", 9)):
        for i, photo in enumerate(dataset(dataset_dir, split).photos):
            index = first + i
            colour = torch.tensor([index * 20 % 256, 255 - index * 20 % 256, index * 7 % 256])
            assert (photo.float().mean((1, 2)) - colour).abs().max() < 4


@pytest.mark.parametrize("captions_per_image, used", [(1, 150), (2, 120), (5, 150), (9, 150)])
def test_an_epoch_holds_no_pair_twice_and_captions_of_a_photo_side_by_side(
    captions_per_image, used
):
    photo_of_caption = torch.arange(30).repeat_interleave(5)
    batches = epoch_batches(photo_of_caption, captions_per_image, 20, seed=3)
    assert batches.equal(epoch_batches(photo_of_caption, captions_per_image, 20, seed=3))
    assert not batches.equal(epoch_batches(photo_of_caption, captions_per_image, 20, seed=4))
    pairs = batches.flatten().tolist()
    assert len(pairs) == len(set(pairs)) and used - len(pairs) < 20
    assert len({len(batch) for batch in batches}) == 1 and len(batches[0]) <= 20
    group = min(captions_per_image, 5)
    for batch in batches:
        assert all(
            count % group == 0
            for count in torch.unique_consecutive(photo_of_caption[batch], return_counts=True)[1]
        )


@pytest.mark.parametrize("counts, captions_per_image, batch_size, steps, pairs", [
    ([1] * 60, 5, 20, 3, 20),  # one caption a photo
    ([1] * 60, 1, 20, 3, 20),
    ([2] * 30, 5, 20, 3, 20),
    ([1, 2, 3, 4, 5] * 4, 5, 20, 3, 20),  # uneven
    ([5] * 12, 5, 7, 5, 7),  # half a batch is fewer captions than asked together
    ([5] * 12, 5, 2, 30, 2),
    ([3] * 2, 3, 100, 1, 6),  # all that there are
])
def test_a_step_has_as_many_pairs_as_asked(counts, captions_per_image, batch_size, steps, pairs):
    photo_of_caption = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for seed in range(5):
        batches = epoch_batches(photo_of_caption, captions_per_image, batch_size, seed)
        assert [len(batch) for batch in batches] == [pairs] * steps
        assert len(batches.unique()) == pairs * steps
        photos = [len(photo_of_caption[batch].unique()) for batch in batches]
        assert min(photos) > 1 or batch_size == 2  # whose two may be of one photo by chance


def test_texts_are_padded_to_the_longest():
    texts = Ragged.from_sequences([[9], [5, 6, 7], [8]], "H")
    assert texts.padded([1, 2]).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert texts.padded([2, 1], 4).tolist() == [[8, 0, 0, 0], [5, 6, 7, 0]]


def test_every_caption_has_its_turn_over_the_epochs():
    photo_of_caption = torch.arange(10).repeat_interleave(5)
    seen = {
        pair
        for seed in range(20)
        for batch in epoch_batches(photo_of_caption, 2, 4, seed)
        for pair in batch.tolist()
    }
    assert seen == set(range(50))


def image_bytes(mode="RGB", kind="JPEG", size=(40, 30), colour=None, **options):
    buffer = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else 0).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode, kind, colour, expected", [
    ("RGB", "JPEG", (200, 100, 50), (200, 100, 50)),
    ("L", "JPEG", 90, (90, 90, 90)),
    ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0)),
    ("P", "PNG", 0, (0, 0, 0)),
    ("RGBA", "PNG", (10, 200, 30, 255), (10, 200, 30)),
    ("LA", "PNG", (60, 255), (60, 60, 60)),
    ("1", "PNG", 1, (255, 255, 255)),
])
def test_photos_of_every_mode(tmp_path, mode, kind, colour, expected):
    # the name says .jpg, whatever it is
    (tmp_path / "a.jpg").write_bytes(image_bytes(mode, kind, colour=colour))
    photo = load_photo(tmp_path / "a.jpg", 8)
    assert photo.shape == (3, 8, 8) and photo.dtype == np.uint8
    assert np.abs(photo.mean((1, 2)) - expected).max() < 4


@pytest.mark.parametrize("size", [32, 73, 300])
def test_photos_are_resized_as_pillow_does(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    expected = np.array(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(load_photo(tmp_path / "a.png", size).astype(int) - expected).max() <= 1


def test_palette_with_transparency(tmp_path):
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 250, 120, 0])
    picture.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert np.abs(load_photo(tmp_path / "a.png", 8).mean((1, 2)) - (250, 120, 0)).max() < 2


GREY = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()  # every level of 8 bits


@pytest.mark.parametrize("name, values", [
    ("a.png", (GREY * 257).astype(np.uint16)),
    ("a.tif", (GREY * 257).astype(np.uint16)),
    ("a.tif", (GREY * 257).astype(">u2")),
    ("a.png", (GREY * 16 + 15).astype(np.uint16)),  # 12 bits in 16, as cameras store them
    ("a.tif", GREY.astype(np.int32)),
    ("a.tif", (GREY * 1e6 - 9e7).astype(np.int32)),
    ("a.tif", GREY.astype(np.float32)),
    ("a.tif", (GREY / 255).astype(np.float32)),
    ("a.tif", (GREY * 20 - 700).astype(np.float32)),
])
def test_more_than_8_bits_and_floats_are_scaled_to_8(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    photo = load_photo(tmp_path / name, 64)
    assert np.abs(photo - GREY).max() <= 1


def test_16_bits_a_channel_in_portable_anymaps(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + (GREY * 257).astype(">u2").tobytes())
    assert np.abs(load_photo(tmp_path / "a.pgm", 64) - GREY).max() <= 1


def test_the_transparent_grey_of_16_bits_is_white(tmp_path):
    values = np.full((40, 40), 700, np.uint16)
    values[10:30, 10:30] = 0
    Image.fromarray(values).save(tmp_path / "a.png", transparency=700)
    photo = load_photo(tmp_path / "a.png", 40)
    assert photo[:, 2:8].min() > 250 and photo[:, 13:27, 13:27].max() < 5


def test_floats_that_are_no_numbers(tmp_path):
    values = GREY.astype(np.float32)
    values[:8], values[8:16] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    photo = load_photo(tmp_path / "a.tif", 64)
    assert photo[:, :7].max() < 5 and photo[:, 9:15].min() > 250 and photo[:, 18:60].std() > 40
    values[:] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: not one pixel is a finite number"):
        load_photo(tmp_path / "a.tif", 64)


def drawing(mode):
    """A black square on transparent black."""
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 10, 30, 30))
    if mode == "P":
        picture = Image.new("P", (40, 40), 1)
        picture.putpalette([0, 0, 0, 5, 5, 5])
        picture.paste(0, (10, 10, 30, 30))
        picture.info["transparency"] = 1
    if mode == "RGB":
        picture = Image.new("RGB", (40, 40), (5, 5, 5))
        picture.paste((0, 0, 0), (10, 10, 30, 30))
        picture.info["transparency"] = (5, 5, 5)
    return picture.convert(mode)


@pytest.mark.parametrize("mode, name", [
    ("RGBA", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("RGB", "a.png"), ("P", "a.gif"),
    ("RGBA", "a.webp"), ("RGBA", "a.tif"), ("LA", "a.tif"), ("RGBA", "a.ico")])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode, name):
    options = {"lossless": True} if name == "a.webp" else {}
    if mode in ("P", "RGB"):
        options["transparency"] = drawing(mode).info["transparency"]
    drawing(mode).save(tmp_path / name, **options)
    photo = load_photo(tmp_path / name, 40)
    assert photo[:, 2:8].min() > 250 and photo[:, 13:27, 13:27].max() < 5


def test_exif_rotation(tmp_path):
    picture = Image.new("RGB", (40, 40))
    picture.paste((255, 255, 255), (0, 0, 40, 20))  # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    photo = load_photo(tmp_path / "a.jpg", 8)
    assert photo[:, :3].max() < 30 and photo[:, 5:].min() > 220


def truncated():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    return buffer.getvalue()[:len(buffer.getvalue()) // 2]


DAMAGE = {
    "empty": (b"", "the file is empty"),
    "no image": (b"<html>404</html>" * 20, "not an image"),
    "truncated": (truncated(), "truncated"),
    "broken PNG": (image_bytes(kind="PNG")[:33] + struct.pack(">I", 7) + b"IDATgarbage", "a.jpg"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_photos_fail_with_their_name(tmp_path, damage):
    content, message = DAMAGE[damage]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(
        DataError, match=f"a.jpg: .*{message}" if damage != "broken PNG" else message
    ):
        load_photo(tmp_path / "a.jpg", 8)


def test_missing_photo_and_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match="a.jpg: the file is missing"):
        load_photo(tmp_path / "a.jpg", 8)
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(DataError, match="a.jpg"):
        load_photo(tmp_path / "a.jpg", 8)


def test_an_incomplete_dataset_is_refused_unless_allowed(dataset_dir):
    folder = dataset_dir / "Flicker8k_Dataset"
    (folder / "1001_abc.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 6 photos of train are missing \(1001_abc.jpg\)"):
        dataset(dataset_dir)
    data = dataset(dataset_dir, allow_incomplete=True)
    assert data.skipped == ["1001_abc.jpg"] and len(data.names) == 5 and len(data) == 25
    (folder / "1003_abc.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="missing"):
        dataset(dataset_dir)
    data = dataset(dataset_dir, allow_incomplete=True)
    assert (
        data.skipped == ["1001_abc.jpg", "1003_abc.jpg"]
        and len(data) == 20
        and len(data.photos) == 4
    )
    # Row i is still photo i: the colours that name them are those of photos 0, 2, 4 and 5.
    assert [round(photo[0].float().mean().item() / 20) for photo in data.photos] == [0, 2, 4, 5]
    assert data.captions[5].startswith("Caption 0 of photo 2")


def test_unreadable_photos_are_all_named_with_their_fault(dataset_dir):
    for i in range(5):
        (dataset_dir / "Flicker8k_Dataset" / f"100{i}_abc.jpg").write_bytes(
            b"" if i else truncated()
        )
    with pytest.raises(
        DataError,
        match=r"5 of the 6 .*unreadable \(1000_abc.jpg: .*truncated.*, 1001_abc.jpg: the file is "
        r"empty, 1002_abc.jpg: the file is empty and 2 more\)",
    ):
        dataset(dataset_dir)


def test_a_photo_without_captions_is_refused(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(
        "".join(
            line for line in path.read_text().splitlines(True) if not line.startswith("1002_abc")
        )
    )
    with pytest.raises(
        DataError, match=r"1 of the 6 photos of train are without captions \(1002_abc.jpg\)"
    ):
        dataset(dataset_dir)


def test_a_photo_in_two_splits_is_refused_unless_allowed(dataset_dir):
    folder = dataset_dir / "Flicker8k_Dataset"
    train = dataset_dir / "Flickr_8k.trainImages.txt"
    shutil.copy(folder / "1007_abc.jpg", folder / "1002_abc.jpg")  # of val, under another name
    train.write_text(train.read_text() + "1006_abc.jpg\n")  # of val
    val = read_pairs(dataset_dir, "val", 16)
    with pytest.raises(DataError) as error:
        hold_out(read_pairs(dataset_dir, "train", 16), [val], allow_incomplete=False)
    assert ("2 photos of train are in another split as well (1002_abc.jpg is 1007_abc.jpg of val, "
            "1006_abc.jpg is 1006_abc.jpg of val)") in str(error.value)
    for _ in range(2):  # the second time from the store
        pairs = read_pairs(dataset_dir, "train", 16, allow_incomplete=True)
        data = Flickr8kImageTextDataset(hold_out(pairs, [val], True), CharTokenizer())
        assert data.skipped == ["1002_abc.jpg", "1006_abc.jpg"] and len(data) == 25
        colours = [round(photo[0].float().mean().item() / 20) for photo in data.photos]
        assert colours == [0, 1, 3, 4, 5] and len(data.digests) == len(data.names) == 5
        for caption, text, photo in zip(data.captions, data.texts, data.photo_of_caption):
            assert f"of photo {colours[photo]} ," in caption
            assert CharTokenizer().encode(caption) == text.tolist()
        assert len(pairs.names) == 7 and len(pairs) == 35  # they do not change
    with pytest.raises(DataError, match="no photo of train is usable"):
        hold_out(pairs, [pairs], True)


def test_the_fingerprint_is_of_names_order_captions_and_photos(dataset_dir, tmp_path):
    before = dataset(dataset_dir).fingerprint()
    shutil.copytree(dataset_dir, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    shutil.rmtree(tmp_path / "copy" / STORE_FOLDER)
    assert dataset(tmp_path / "copy").fingerprint() == before == dataset(dataset_dir).fingerprint()
    assert dataset(dataset_dir, image_size=24).fingerprint() == before

    photo, split = "Flicker8k_Dataset/1002_abc.jpg", "Flickr_8k.trainImages.txt"
    content = (dataset_dir / photo).read_bytes()
    lines = (dataset_dir / split).read_text().splitlines(True)
    captions = (dataset_dir / "Flickr8k.token.txt").read_text()
    found = {before}
    for name, changed in ((photo, content[:-9] + b"x" + content[-8:]),
                          (split, "".join(reversed(lines)).encode()),
                          ("Flickr8k.token.txt", captions.replace("dog", "cat", 1).encode())):
        old = (dataset_dir / name).read_bytes()
        (dataset_dir / name).write_bytes(changed)
        found.add(dataset(dataset_dir).fingerprint())
        (dataset_dir / name).write_bytes(old)
    assert len(found) == 4


def test_a_caption_is_read_up_to_its_documented_length(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + f"1000_abc.jpg#5\t{'a dog ' * 5000}\n")
    data = dataset(dataset_dir)
    assert len(data.captions[5]) == MAX_LENGTH and len(data.texts[5]) <= MAX_LENGTH
    assert data.folders[0].cut_captions == 1


def test_nothing_usable_is_refused_even_when_incomplete_is_allowed(dataset_dir):
    for path in (dataset_dir / "Flicker8k_Dataset").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no photo of train"):
        dataset(dataset_dir, allow_incomplete=True)


def test_missing_parts_are_named(tmp_path, dataset_dir):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no captions in a known layout"):
        dataset(tmp_path / "empty")
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "elsewhere")
    with pytest.raises(DataError, match="6 of the 6 photos of train are missing"):
        dataset(dataset_dir)


def test_progress_is_told(dataset_dir):
    told = []
    dataset(dataset_dir, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 6) for i in range(1, 7)]


def test_real_captions_are_not_cut(real_photos):
    val = dataset(real_photos, "val")
    assert len(val.names) == 1000 and len(val) == 5000 and max(map(len, val.texts)) > 77
    for caption, text in zip(val.captions, val.texts):
        assert CharTokenizer().decode(text.tolist()) == CharTokenizer().normalize(caption)


def stores(root):
    return sorted(path.name for path in (root / STORE_FOLDER).iterdir())


def decoded(monkeypatch):
    """The names of the photos that are opened from now on."""
    names, open_photo = [], photo_stores.open_photo
    monkeypatch.setattr(
        photo_stores,
        "open_photo",
        lambda path, size: (names.append(path.name), open_photo(path, size))[1],
    )
    return names


def test_photos_are_decoded_once(dataset_dir, monkeypatch):
    names = decoded(monkeypatch)
    first = dataset(dataset_dir)
    assert sorted(names) == first.names and len(stores(dataset_dir)) == 1
    again = dataset(dataset_dir)
    assert len(names) == 6 and torch.equal(again.photos[:], first.photos[:])
    assert torch.equal(again.photos[:], dataset(dataset_dir, cache=False).photos[:])
    assert len(names) == 12
    dataset(dataset_dir, "val")
    dataset(dataset_dir, image_size=8)
    assert len(stores(dataset_dir)) == 3  # one a split and size


def test_rows_that_were_read_may_be_written_and_the_file_stays(dataset_dir):
    before = dataset(dataset_dir).photos[:]
    dataset(dataset_dir).photos[:].fill_(7)
    assert torch.equal(dataset(dataset_dir).photos[:], before)


@pytest.mark.parametrize("change", ["content", "time", "name", "split file", "version"])
def test_a_change_makes_the_store_anew(dataset_dir, monkeypatch, change):
    before, folder = dataset(dataset_dir), dataset_dir / "Flicker8k_Dataset"
    if change == "content":
        Image.new("RGB", (33, 44), (1, 2, 3)).save(folder / "1002_abc.jpg")
    elif change == "time":
        os.utime(folder / "1002_abc.jpg", (1, 1))
    elif change == "name":
        (folder / "1002_abc.jpg").rename(folder / "other.jpg")
        for path in dataset_dir.glob("*.txt"):
            path.write_text(path.read_text().replace("1002_abc.jpg", "other.jpg"))
    elif change == "split file":
        (dataset_dir / "Flickr_8k.trainImages.txt").write_text(
            "".join(f"{name}\n" for name in before.names[:5])
        )
    else:
        monkeypatch.setattr(photo_stores, "STORE_VERSION", -1)
    old, names = stores(dataset_dir), decoded(monkeypatch)
    after = dataset(dataset_dir)
    assert (
        len(names) == len(after.names)
        and len(stores(dataset_dir)) == 1
        and stores(dataset_dir) != old
    )
    assert torch.equal(after.photos[:], dataset(dataset_dir, cache=False).photos[:])
    assert torch.equal(after.photos[2], before.photos[2]) == (change != "content")


def test_a_half_written_store_is_never_used(dataset_dir, monkeypatch):
    def failing(path, size):
        if path.name == "1004_abc.jpg":
            raise KeyboardInterrupt
        return open_photo(path, size)

    open_photo = photo_stores.open_photo
    with monkeypatch.context() as context:
        context.setattr(photo_stores, "open_photo", failing)
        with pytest.raises(KeyboardInterrupt):
            dataset(dataset_dir)
    assert stores(dataset_dir) == []
    whole = dataset(dataset_dir).photos[:]
    path = dataset_dir / STORE_FOLDER / stores(dataset_dir)[0]
    path.write_bytes(path.read_bytes()[:-1])  # cut off by something else
    assert torch.equal(dataset(dataset_dir).photos[:], whole)
    assert path.stat().st_size == whole.numel() + len(whole) * (
        DIGEST_BYTES + np.prod(SIGNATURE))


def test_what_a_kill_left_behind_goes_but_not_what_another_process_writes(dataset_dir):
    (dataset_dir / STORE_FOLDER).mkdir()
    for name, age in (
        ("train_16_dead.partial77", 9000),
        ("train_16_busy.partial78", 5),
        ("val_16_dead.partial77", 9000),
    ):
        path = dataset_dir / STORE_FOLDER / name
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    dataset(dataset_dir)
    assert [name for name in stores(dataset_dir) if "partial" in name] == [
        "train_16_busy.partial78",
        "val_16_dead.partial77",
    ]


def test_a_kill_costs_one_shard(dataset_dir, monkeypatch):
    monkeypatch.setattr(photo_stores, "SHARD_SIZE", 2)
    whole, open_photo = dataset(dataset_dir, cache=False).photos[:], photo_stores.open_photo

    def failing(path, size):
        if path.name == "1003_abc.jpg":
            raise KeyboardInterrupt
        return open_photo(path, size)

    with monkeypatch.context() as context:
        context.setattr(photo_stores, "open_photo", failing)
        with pytest.raises(KeyboardInterrupt):
            dataset(dataset_dir)
    assert len(stores(dataset_dir)) == 1
    names = decoded(monkeypatch)
    assert torch.equal(dataset(dataset_dir).photos[:], whole)
    assert sorted(names) == [f"{1000 + i}_abc.jpg" for i in (2, 3, 4, 5)]
    assert len(stores(dataset_dir)) == 3
    Image.new("RGB", (30, 40)).save(dataset_dir / "Flicker8k_Dataset" / "1005_abc.jpg")
    names.clear()
    changed = dataset(dataset_dir).photos  # a change costs one shard as well
    assert sorted(names) == ["1004_abc.jpg", "1005_abc.jpg"] and len(stores(dataset_dir)) == 3
    assert torch.equal(changed[:5], whole[:5]) and not torch.equal(changed[5], whole[5])


def test_rows_of_several_parts_are_read_as_those_of_one():
    values = torch.arange(60, dtype=torch.uint8).view(10, 3, 2)
    parts = [part.numpy() for part in values.split([4, 1, 5])]
    rows = photo_stores.Rows(parts, lambda rows: rows.permute(0, 2, 1))
    whole = values.permute(0, 2, 1)
    assert rows.shape == (10, 2, 3) and rows.dtype == torch.uint8 and rows.nbytes == 60
    assert torch.equal(rows[:], whole) and torch.equal(rows[3:6], whole[3:6])
    for some in ([9, 0, 4, 4], torch.tensor([5, 3]), np.array([], int)):
        assert torch.equal(rows[some], whole[torch.as_tensor(some, dtype=torch.long)])
    assert torch.equal(rows[7], whole[7])
    assert rows.part_of([0, 3, 4, 5, 9]).tolist() == [0, 0, 1, 2, 2]
    few = rows.choose(torch.tensor([8, 2, 4]))
    assert torch.equal(few[:], whole[[8, 2, 4]]) and few.part_of(np.arange(3)).tolist() == [2, 0, 1]
    both = few + rows.choose([9])
    assert len(both) == 4 and torch.equal(both[:], whole[[8, 2, 4, 9]])
    assert both.part_of([0, 3]).tolist() == [2, 5]


def test_photos_larger_than_memory_are_shuffled_in_windows_of_shards():
    photo_of_caption = torch.arange(120).repeat_interleave(5)
    shard_of_photo = torch.arange(120) // 10
    order = [epoch_batches(photo_of_caption, 5, 30, seed, shard_of_photo, 3) for seed in (1, 1, 2)]
    assert order[0].equal(order[1]) and not order[0].equal(order[2])
    for pairs in (order[0], order[2]):
        assert sorted(pairs.flatten().tolist()) == list(range(600))
        photos = photo_of_caption[pairs.flatten()][::5]
        windows = [set(shard_of_photo[window].tolist()) for window in photos.split(30)]
        assert all(len(window) == 3 for window in windows) and len(set().union(*windows)) == 12
        shards = shard_of_photo[photos[:30]].tolist()
        assert shards != sorted(shards)  # shuffled within


def test_an_epoch_of_few_photos_is_shuffled_as_a_whole(dataset_dir, monkeypatch):
    monkeypatch.setattr(photo_stores, "SHARD_SIZE", 2)
    data = dataset(dataset_dir)
    assert data.epoch(5, 10, 3).equal(epoch_batches(data.photo_of_caption, 5, 10, 3))
    monkeypatch.setattr(flickr8k_simple, "WINDOW_BYTES", data.photos.nbytes * 0.7)
    shards = [data.photo_of_caption[batch].unique() // 2 for batch in data.epoch(5, 10, 3)]
    assert data.epoch(5, 10, 3).equal(epoch_batches(
        data.photo_of_caption, 5, 10, 3, torch.tensor([0, 0, 1, 1, 2, 2]), 2))
    assert len(set(shards[2].tolist())) == 1  # one window of two shards, one of one


def test_a_damaged_photo_is_not_cached(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "1003_abc.jpg").write_bytes(b"")
    data = dataset(dataset_dir, allow_incomplete=True)
    assert stores(dataset_dir) == [] and len(data.photos) == 5
    assert torch.equal(
        data.photos[:], dataset(dataset_dir, allow_incomplete=True, cache=False).photos[:])


def test_a_folder_that_cannot_be_written_is_read_all_the_same(dataset_dir):
    (dataset_dir / STORE_FOLDER).write_text("in the way")
    assert torch.equal(
        dataset(dataset_dir).photos[:], dataset(dataset_dir, cache=False).photos[:])


def test_a_full_disk_is_said(dataset_dir, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; the shard takes 0 MB"):
        dataset(dataset_dir)
    assert stores(dataset_dir) == []


@pytest.mark.parametrize("captions_per_image", [1, 2, 5])
def test_batches_hold_each_photo_once_with_its_captions(dataset_dir, captions_per_image):
    data, device = dataset(dataset_dir), torch.device("cpu")
    batches = epoch_batches(data.photo_of_caption, captions_per_image, 10, seed=1)
    made = list(iterate_batches(data, place_photos(data.photos, device), batches, device))
    assert len(made) == len(batches)
    for pairs, batch in zip(batches, made):
        assert batch["text"].shape[1] % TEXT_BUCKET == 0
        photo_ids = batch["photo_ids"][batch["photo_of_pair"]]
        assert torch.equal(photo_ids, data.photo_of_caption[pairs])
        assert torch.equal(batch["images"], data.photos[batch["photo_ids"]])
        assert captions_per_image == 1 or len(batch["images"]) <= len(pairs) / captions_per_image
        for row, pair in zip(batch["text"], pairs):
            text = data.texts[int(pair)]
            assert row[:len(text)].tolist() == text.tolist() and not row[len(text):].any()


@pytest.mark.parametrize("number, photos", [(2, 2), (6, 6), (1000, 6)])
def test_the_first_photos_and_their_captions_alone(dataset_dir, number, photos):
    data = dataset(dataset_dir)
    part = data.first(number)
    assert torch.equal(part.photos[:], data.photos[:photos]) and len(data.photos) == 6
    pairs = part.epoch(5, 10, seed=0)
    assert sorted(pairs.flatten().tolist()) == list(range(5 * photos))
    batch = next(iterate_batches(part, part.photos, pairs, torch.device("cpu")))
    assert torch.equal(batch["images"], data.photos[batch["photo_ids"]])
    assert torch.equal(batch["photo_ids"][batch["photo_of_pair"]], data.photo_of_caption[pairs[0]])


def test_batches_stop_when_no_longer_wanted(dataset_dir):
    data = dataset(dataset_dir)
    batches = iterate_batches(data, data.photos, [[0, 1]] * 50, torch.device("cpu"))
    next(batches)
    batches.close()
    assert list(iterate_batches(data, data.photos, [], torch.device("cpu"))) == []


def test_a_shard_that_another_process_deletes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """Between the listing of the folder and the look at a file, the file may be gone."""
    (tmp_path / "train_old").touch()
    glob = Path.glob

    def glob_and_lose(folder, pattern):
        listed = list(glob(folder, pattern))
        (tmp_path / "train_old").unlink()
        return listed

    monkeypatch.setattr(Path, "glob", glob_and_lose)
    photo_stores.delete_other_shards(tmp_path / "train", [])


def test_a_shard_of_the_wrong_size_is_refused(tmp_path):
    """Nothing can be read from a file that the system has cut short without an error."""
    with pytest.raises(DataError, match="has 3 bytes instead of 5"):
        photo_stores.open_shard(tmp_path / "shard", 5, lambda file: file.write(b"abc") and {})
