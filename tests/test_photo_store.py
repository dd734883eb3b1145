"""Decoding photo files, and the store of decoded photos: its shards, and what can go wrong."""
import errno
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.utils import photo_store
from src.utils.duplicates import SIGNATURE
from src.utils.errors import DataError
from src.utils.photo_store import (
    DIGEST_BYTES,
    STORE_FOLDER,
    Rows,
    delete_other_shards,
    load_photo,
    open_photo,
    open_shard,
)
from tests.conftest import open_dataset, truncated_jpeg


def encoded(mode="RGB", file_format="JPEG", size=(40, 30), colour=0, **options):
    """Return the bytes of a plain image file."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode, file_format, colour, expected", [
    ("RGB", "JPEG", (200, 100, 50), (200, 100, 50)),
    ("L", "JPEG", 90, (90, 90, 90)),
    ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0)),
    ("P", "PNG", 0, (0, 0, 0)),
    ("RGBA", "PNG", (10, 200, 30, 255), (10, 200, 30)),
    ("LA", "PNG", (60, 255), (60, 60, 60)),
    ("1", "PNG", 1, (255, 255, 255)),
])
def test_a_photo_of_any_mode_becomes_rgb(tmp_path, mode, file_format, colour, expected):
    # All files are named .jpg, since it is their content that counts.
    (tmp_path / "a.jpg").write_bytes(encoded(mode, file_format, colour=colour))
    photo = load_photo(tmp_path / "a.jpg", 8)
    assert photo.shape == (3, 8, 8)
    assert photo.dtype == np.uint8
    assert np.abs(photo.mean((1, 2)) - expected).max() < 4


@pytest.mark.parametrize("size", [32, 73, 300])
def test_photos_are_resized_as_by_pillow(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    expected = np.array(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(load_photo(tmp_path / "a.png", size).astype(int) - expected).max() <= 1


def test_a_palette_with_one_transparent_colour(tmp_path):
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 250, 120, 0])
    picture.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert np.abs(load_photo(tmp_path / "a.png", 8).mean((1, 2)) - (250, 120, 0)).max() < 2


GREY = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()  # holds every level of 8 bits


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
def test_grey_photos_of_more_than_8_bits_and_of_floats_are_scaled_to_8_bits(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    photo = load_photo(tmp_path / name, 64)
    assert np.abs(photo - GREY).max() <= 1


def test_portable_anymaps_of_16_bits_are_scaled_to_8_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + (GREY * 257).astype(">u2").tobytes())
    assert np.abs(load_photo(tmp_path / "a.pgm", 64) - GREY).max() <= 1


def test_the_transparent_grey_level_of_a_16_bit_png_becomes_white(tmp_path):
    values = np.full((40, 40), 700, np.uint16)
    values[10:30, 10:30] = 0
    Image.fromarray(values).save(tmp_path / "a.png", transparency=700)
    photo = load_photo(tmp_path / "a.png", 40)
    assert photo[:, 2:8].min() > 250
    assert photo[:, 13:27, 13:27].max() < 5


def test_nan_and_infinity_in_a_photo_of_floats(tmp_path):
    values = GREY.astype(np.float32)
    values[:8], values[8:16] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    photo = load_photo(tmp_path / "a.tif", 64)
    assert photo[:, :7].max() < 5  # NaN becomes black
    assert photo[:, 9:15].min() > 250  # infinity becomes white
    assert photo[:, 18:60].std() > 40

    values[:] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: not one pixel is a finite number"):
        load_photo(tmp_path / "a.tif", 64)


def square_on_transparent(mode):
    """Draw a black square on a transparent background, whose hidden colour is (nearly) black."""
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
def test_transparent_parts_become_white(tmp_path, mode, name):
    options = {"lossless": True} if name == "a.webp" else {}
    if mode in ("P", "RGB"):
        options["transparency"] = square_on_transparent(mode).info["transparency"]
    square_on_transparent(mode).save(tmp_path / name, **options)
    photo = load_photo(tmp_path / name, 40)
    assert photo[:, 2:8].min() > 250
    assert photo[:, 13:27, 13:27].max() < 5


def test_a_photo_is_turned_upright_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (40, 40))
    picture.paste((255, 255, 255), (0, 0, 40, 20))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    photo = load_photo(tmp_path / "a.jpg", 8)
    assert photo[:, :3].max() < 30
    assert photo[:, 5:].min() > 220


def exif_directory(*entries, order="<"):
    """Return EXIF whose first directory has these entries (tag, type, count, 4 bytes). Four bytes
    that follow it, at offset 8 + 2 + 12 * len(entries) + 4, are a negative number."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, count, value in entries:
        head += struct.pack(f"{order}HHI", tag, kind, count) + value
    return b"Exif\0\0" + head + bytes(4) + b"\xff" * 8


def with_exif(exif, size=(40, 30)):
    """Return the bytes of a JPEG with EXIF as it is, even if Pillow would not write it."""
    content = encoded(size=size)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))
ODD_TAGS = {
    "width is a text": (0x100, 2, 4, b"abc\0"),
    "beyond 16 bits": (0x103, 4, 1, struct.pack("<I", 70_000)),
    "negative": (0x102, 9, 1, struct.pack("<i", -5)),
    "value far beyond the end": (0x10f, 2, 40, struct.pack("<I", 60_000)),
    "signed rational": (0x11a, 10, 1, struct.pack("<I", 38)),
    "resolution without a value": (0x11a, 1, 0, bytes(4)),
    "resolution of bytes": (0x11a, 1, 1, bytes(4)),
    "directory far beyond the end": (0x8769, 4, 1, struct.pack("<I", 50_000)),
    "directory at a negative place": (0x8769, 6, 1, b"\xff" * 4),
    "version is a float": (0x9000, 11, 1, b"\xff" * 4),
    "unknown type": (0x10e, 129, 3, bytes(4)),
}


@pytest.mark.parametrize("odd", ODD_TAGS)
def test_a_photo_with_an_odd_exif_tag_is_turned_and_read(tmp_path, odd):
    unit = (0x128, 3, 1, struct.pack("<HH", 2, 0))  # with it, Pillow reads the resolution
    exif = exif_directory(*sorted([TURNED, ODD_TAGS[odd], unit]))
    (tmp_path / "a.jpg").write_bytes(with_exif(exif))
    assert open_photo(tmp_path / "a.jpg", 30).size == (30, 40)
    # In the other formats EXIF is a block of its own.
    for name in ("a.png", "a.webp"):
        block = exif.removeprefix(b"Exif\0\0") if name == "a.png" else exif
        Image.new("RGB", (40, 30)).save(tmp_path / name, exif=block)
        assert open_photo(tmp_path / name, 30).size == (30, 40), name


def test_orientation_after_an_odd_tag_in_the_byte_order_of_motorola(tmp_path):
    odd = (0x10f, 2, 40, struct.pack(">I", 60_000))
    exif = exif_directory(odd, (0x112, 3, 1, struct.pack(">HH", 8, 0)), order=">")
    (tmp_path / "a.jpg").write_bytes(with_exif(exif))
    assert open_photo(tmp_path / "a.jpg", 30).size == (30, 40)


@pytest.mark.parametrize("exif", [
    b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0\x00\x08\x00\x02\x01\x12",
    exif_directory(TURNED)[:20],
    exif_directory((0x112, 2, 2, b"6\0\0\0")), exif_directory((0x112, 3, 1, b"\x09\0\0\0")),
    exif_directory((0x112, 3, 0, bytes(4))), exif_directory((0x112, 7, 4, bytes(4))),
    exif_directory((0x112, 5, 1, struct.pack("<I", 22))),
], ids=str)
def test_a_photo_whose_exif_gives_no_orientation_is_read_as_it_lies(tmp_path, exif):
    (tmp_path / "a.jpg").write_bytes(with_exif(exif))
    assert open_photo(tmp_path / "a.jpg", 30).size == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_every_orientation_is_that_of_pillow(tmp_path, name, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as picture:
        expected = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    assert (np.array(open_photo(tmp_path / name, 30)) == expected).all()


def test_a_jpeg_beyond_the_limit_of_pixels_is_read_at_a_smaller_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # twice as many are an error
    (tmp_path / "a.jpg").write_bytes(with_exif(exif_directory(TURNED), size=(200, 100)))
    (tmp_path / "b.jpg").write_bytes(encoded(size=(200, 80), progressive=True))
    assert open_photo(tmp_path / "a.jpg", 30).size == (50, 100)
    assert open_photo(tmp_path / "b.jpg", 30).size == (100, 40)


@pytest.mark.parametrize("file_format, options", [
    ("PNG", {}), ("TIFF", {}),
    ("JPEG", {"progressive": True}),  # needs the memory of all its pixels at any scale
    ("JPEG", {})])  # is not much larger than the photo that was asked for
def test_a_picture_beyond_the_limit_of_pixels_is_refused(
        tmp_path, monkeypatch, file_format, options):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    size = (400, 100) if options else (200, 100)
    (tmp_path / "a.jpg").write_bytes(encoded("RGB", file_format, size, **options))
    with pytest.raises(DataError, match="a.jpg: the picture has more than 0 megapixels"):
        open_photo(tmp_path / "a.jpg", 30 if options or file_format != "JPEG" else 90)


DAMAGE = {
    "empty": (b"", "the file is empty"),
    "no image": (b"<html>404</html>" * 20, "not an image"),
    "truncated": (truncated_jpeg(), "truncated"),
    "broken PNG": (encoded(file_format="PNG")[:33] + struct.pack(">I", 7) + b"IDATgarbage", ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_error_for_a_damaged_photo_names_the_file(tmp_path, damage):
    content, message = DAMAGE[damage]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"a.jpg: .*{message}"):
        load_photo(tmp_path / "a.jpg", 8)


def test_a_missing_photo_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match="a.jpg: the file is missing"):
        load_photo(tmp_path / "a.jpg", 8)
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(DataError, match="a.jpg"):
        load_photo(tmp_path / "a.jpg", 8)


# The store of decoded photos.


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


def test_photos_are_read_even_if_the_store_cannot_be_written(dataset_dir):
    (dataset_dir / STORE_FOLDER).write_text("a file that is in the way of the folder")
    assert torch.equal(open_dataset(dataset_dir).photos[:],
                       open_dataset(dataset_dir, cache=False).photos[:])


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
