"""The dataset on disk: both layouts, their quirks, and every kind of damage."""
import errno
import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from src.utils import flickr8k_simple
from src.utils.flickr8k_simple import (
    STORE_FOLDER,
    TEXT_BUCKET,
    Flickr8kImageTextDataset,
    epoch_batches,
    iterate_batches,
    load_photo,
    pad_texts,
    place_photos,
)
from src.utils.layouts import DataError, read_captions, read_split
from src.utils.tokenizers import CharTokenizer


def dataset(root, split="train", **changes):
    return Flickr8kImageTextDataset(
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
    assert batches == epoch_batches(photo_of_caption, captions_per_image, 20, seed=3)
    assert batches != epoch_batches(photo_of_caption, captions_per_image, 20, seed=4)
    pairs = sum(batches, [])
    assert len(pairs) == len(set(pairs)) and used - len(pairs) < 20
    assert len({len(batch) for batch in batches}) == 1 and len(batches[0]) <= 20
    group = min(captions_per_image, 5)
    for batch in batches:
        assert all(
            count % group == 0
            for count in torch.unique_consecutive(photo_of_caption[batch], return_counts=True)[1]
        )


def test_texts_are_padded_to_the_longest():
    texts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    assert pad_texts(texts).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert pad_texts(texts, 4).tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]


def test_every_caption_has_its_turn_over_the_epochs():
    photo_of_caption = torch.arange(10).repeat_interleave(5)
    seen = {
        pair
        for seed in range(20)
        for batch in epoch_batches(photo_of_caption, 2, 4, seed)
        for pair in batch
    }
    assert seen == set(range(50))


def test_text_files_may_lie_in_a_folder_of_their_own(dataset_dir):
    (dataset_dir / "Flickr8k_text").mkdir()
    for path in list(dataset_dir.glob("*.txt")):
        path.rename(dataset_dir / "Flickr8k_text" / path.name)
    assert len(dataset(dataset_dir)) == 30


def test_crlf_and_byte_order_mark(dataset_dir):
    plain = dataset(dataset_dir)
    for path in dataset_dir.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    windows = dataset(dataset_dir)
    assert windows.names == plain.names and windows.captions == plain.captions


def test_captions_of_a_photo_that_does_not_exist_do_no_harm(dataset_dir):
    with open(dataset_dir / "Flickr8k.token.txt", "a") as file:
        file.write("2258277193_586949ec62.jpg.1#0\tA man rides .\n\n")
    assert len(dataset(dataset_dir)) == 30


@pytest.mark.parametrize(
    "line",
    [
        "no tab here",
        "1000_abc.jpg\tno number",
        "1000_abc.jpg#x\tno number",
        "#0\tno name",
        "1000_abc.jpg#0\t  ",
    ],
)
def test_a_caption_line_that_does_not_parse(dataset_dir, line):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"Flickr8k.token.txt, line 56: expected"):
        dataset(dataset_dir)


def test_a_caption_of_unknown_characters_only(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + "1000_abc.jpg#5\t\u72d7\n", encoding="utf-8")
    with pytest.raises(DataError, match="1000_abc.jpg: the text '\u72d7' has no character"):
        dataset(dataset_dir)


def test_text_that_is_not_utf8(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_bytes(path.read_bytes() + b"1000_abc.jpg#5\tcaf\xe9\n")
    with pytest.raises(DataError, match="Flickr8k.token.txt: not UTF-8"):
        dataset(dataset_dir)


def kaggle(root):
    """Turn the official layout into Kaggle's: another folder, CSV captions, no split files."""
    (root / "Flicker8k_Dataset").rename(root / "Images")
    rows = ["image,caption"]
    for name, captions in read_captions(root / "Flickr8k.token.txt").items():
        rows += [f'{name},"{caption}"' for caption in captions]
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    (root / "Flickr8k.token.txt").unlink()


def test_kaggle_layout(dataset_dir):
    official = dataset(dataset_dir)
    kaggle(dataset_dir)
    data = dataset(dataset_dir)
    # which have commas in them
    assert data.names == official.names and data.captions == official.captions
    for path in dataset_dir.glob("Flickr_8k.*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"Flickr_8k.trainImages.txt.*missing.*download_flickr8k.py --text_only"
    ):
        dataset(dataset_dir)


@pytest.mark.parametrize("content, message", [
    ("name,text\n", "line 1: expected the header"),
    ("", "line 1: expected the header"),
    ("image,caption\na.jpg,one, two\n", "line 2: expected 'image,caption'"),
    ("image,caption\na.jpg\n", "line 2: expected 'image,caption'"),
    ('image,caption\na.jpg,"open\n', "not CSV"),
])
def test_kaggle_captions_that_do_not_parse(tmp_path, content, message):
    (tmp_path / "captions.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / "captions.txt")


def test_kaggle_captions_with_quotes(tmp_path):
    (tmp_path / "captions.txt").write_text(
        'image,caption\na.jpg,"A dog , ""big"" , runs ."\na.jpg,Plain .\n'
    )
    assert read_captions(tmp_path / "captions.txt") == {
        "a.jpg": ['A dog , "big" , runs .', "Plain ."]
    }


def test_split_files(dataset_dir):
    path = dataset_dir / "Flickr_8k.devImages.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="lists 1006_abc.jpg twice"):
        read_split(dataset_dir, "val")
    path.write_text("\n")
    with pytest.raises(DataError, match="lists no photos"):
        read_split(dataset_dir, "val")


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
    assert data.left_out == ["1001_abc.jpg"] and len(data.names) == 5 and len(data) == 25
    (folder / "1003_abc.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="missing"):
        dataset(dataset_dir)
    data = dataset(dataset_dir, allow_incomplete=True)
    assert (
        data.left_out == ["1001_abc.jpg", "1003_abc.jpg"]
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


def test_nothing_usable_is_refused_even_when_incomplete_is_allowed(dataset_dir):
    for path in (dataset_dir / "Flicker8k_Dataset").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="not one photo of train"):
        dataset(dataset_dir, allow_incomplete=True)


def test_missing_parts_are_named(tmp_path, dataset_dir):
    with pytest.raises(DataError, match="no captions, neither"):
        dataset(tmp_path)
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "elsewhere")
    with pytest.raises(DataError, match="no folder of photos"):
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
    """The names that `load_photo` is asked for from now on."""
    names = []
    monkeypatch.setattr(
        flickr8k_simple,
        "load_photo",
        lambda path, size: (names.append(path.name), load_photo(path, size))[1],
    )
    return names


def test_photos_are_decoded_once(dataset_dir, monkeypatch):
    names = decoded(monkeypatch)
    first = dataset(dataset_dir)
    assert sorted(names) == first.names and len(stores(dataset_dir)) == 1
    again = dataset(dataset_dir)
    assert len(names) == 6 and torch.equal(again.photos, first.photos)
    assert torch.equal(again.photos, dataset(dataset_dir, cache=False).photos) and len(names) == 12
    dataset(dataset_dir, "val")
    dataset(dataset_dir, image_size=8)
    assert len(stores(dataset_dir)) == 3  # one a split and size


def test_rows_of_an_opened_store_may_be_written_and_the_file_stays(dataset_dir):
    before = dataset(dataset_dir).photos.clone()
    dataset(dataset_dir).photos[0] = 7
    assert torch.equal(dataset(dataset_dir).photos, before)


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
        monkeypatch.setattr(flickr8k_simple, "STORE_VERSION", -1)
    old, names = stores(dataset_dir), decoded(monkeypatch)
    after = dataset(dataset_dir)
    assert (
        len(names) == len(after.names)
        and len(stores(dataset_dir)) == 1
        and stores(dataset_dir) != old
    )
    assert torch.equal(after.photos, dataset(dataset_dir, cache=False).photos)
    assert torch.equal(after.photos[2], before.photos[2]) == (change != "content")


def test_a_half_written_store_is_never_used(dataset_dir, monkeypatch):
    def failing(path, size):
        if path.name == "1004_abc.jpg":
            raise KeyboardInterrupt
        return load_photo(path, size)

    with monkeypatch.context() as context:
        context.setattr(flickr8k_simple, "load_photo", failing)
        with pytest.raises(KeyboardInterrupt):
            dataset(dataset_dir)
    assert stores(dataset_dir) == []
    whole = dataset(dataset_dir).photos.clone()
    path = dataset_dir / STORE_FOLDER / stores(dataset_dir)[0]
    path.write_bytes(path.read_bytes()[:-1])  # cut off by something else
    assert torch.equal(dataset(dataset_dir).photos, whole) and path.stat().st_size == whole.numel()


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


def test_a_damaged_photo_is_not_cached(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "1003_abc.jpg").write_bytes(b"")
    data = dataset(dataset_dir, allow_incomplete=True)
    assert stores(dataset_dir) == [] and len(data.photos) == 5
    assert torch.equal(data.photos, dataset(dataset_dir, allow_incomplete=True, cache=False).photos)


def test_a_folder_that_cannot_be_written_is_read_all_the_same(dataset_dir):
    (dataset_dir / STORE_FOLDER).write_text("in the way")
    assert torch.equal(dataset(dataset_dir).photos, dataset(dataset_dir, cache=False).photos)


def test_a_full_disk_is_said(dataset_dir, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; the photo store takes 0 MB"):
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
            assert (
                torch.equal(row[: len(data.texts[pair])], data.texts[pair])
                and not row[len(data.texts[pair]) :].any()
            )


def test_batches_stop_when_no_longer_wanted(dataset_dir):
    data = dataset(dataset_dir)
    batches = iterate_batches(data, data.photos, [[0, 1]] * 50, torch.device("cpu"))
    next(batches)
    batches.close()
    assert list(iterate_batches(data, data.photos, [], torch.device("cpu"))) == []
