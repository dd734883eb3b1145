"""Which files of a folder are photos, and decoding them."""
import io
import os
import struct
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from src.utils import photo_files
from src.utils.errors import DataError
from src.utils.photo_files import (
    is_photo,
    list_left_out,
    list_skipped,
    open_photo,
    photos_of_folder,
)
from src.utils.photo_store import load_photo
from tests.conftest import truncated_jpeg, write_photo


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


def test_a_folder_of_many_formats_of_links_and_of_files_that_are_not_photos(tmp_path):
    folder, album = tmp_path / "folder", tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    (folder / ".trash").mkdir()
    album.mkdir()
    kept = ["a.avif", "b.jfif", "c.JPG", "d.mpo", "e.tga", "below/f.qoi"]
    for name in (*kept, "._c.jpg", ".DS_Store", ".trash/g.jpg", "IMG_1.MOV", "IMG_2.mov",
                 "film.mpg", "notes"):
        (folder / name).touch()
    (album / "h.png").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "album").symlink_to(album)
    (album / "loop").symlink_to(folder)
    (folder / "i.jpg").symlink_to(folder / "c.JPG")
    (folder / "broken.jpg").symlink_to(folder / "none.jpg")
    skipped = Counter()
    photos = photos_of_folder(folder, skipped)
    assert photos == sorted(folder / name for name in [*kept, "album/h.png", "i.jpg"])
    expected = "2 .mov, 1 .mpg, 2 broken links or special files, 1 files without a suffix"
    assert list_skipped(skipped) == expected
    for name in kept:
        (folder / name).unlink()
    (folder / "i.jpg").unlink()
    (album / "h.png").unlink()
    with pytest.raises(DataError, match="holds no photos that can be read .skipped: 2 .mov"):
        photos_of_folder(folder)


SYSTEM_FOLDERS = [
    "@eaDir/a.jpg", "2024/@eaDir/a.jpg", "#recycle", "$RECYCLE.BIN/S-1-5-21", ".thumbnails",
    ".Thumbnails/large", ".Trash-1000/files", ".Trashes/501", ".dtrash/files", ".@__thumb",
    "@Recycle", "#snapshot/daily", "lost+found", "__MACOSX/2024", "Lightroom Previews.lrdata/0/00",
    "System Volume Information", ".photostructure/previews", "RECYCLER/S-1-5",
    "Mine.photoslibrary/resources/derivatives", "appdata_oc1/preview/1",
]


@pytest.mark.parametrize("system_folder", SYSTEM_FOLDERS)
def test_thumbnails_and_deleted_photos_are_left_out_and_counted(tmp_path, system_folder):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "a.jpg").touch()
    (tmp_path / system_folder).mkdir(parents=True)
    for name in ("THUMB_M.jpg", "THUMB_XL.JPG", "note.txt"):
        (tmp_path / system_folder / name).touch()
    left_out, skipped = [], Counter()
    assert photos_of_folder(tmp_path, skipped, left_out) == [tmp_path / "2024" / "a.jpg"]
    assert left_out == [tmp_path / system_folder / name for name in ("THUMB_M.jpg", "THUMB_XL.JPG")]
    assert list_left_out(left_out).startswith("2 thumbnails, deleted or hidden photos, such as ")
    assert not skipped
    # The user may name such a folder.
    assert len(photos_of_folder(tmp_path / system_folder)) == 2


def test_hidden_photos_are_left_out_and_counted(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".trashed-1700000000-b.jpg", ".nomedia", "Thumbs.db"):
        (tmp_path / name).touch()
    left_out, skipped = [], Counter()
    assert photos_of_folder(tmp_path, skipped, left_out) == [tmp_path / "a.jpg"]
    assert [path.name for path in left_out] == ["._a.jpg", ".trashed-1700000000-b.jpg"]
    assert skipped == {".db": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="skipped: 1 .db, 2 thumbnails, deleted or hidden photos"):
        photos_of_folder(tmp_path)


@pytest.mark.parametrize("name", ["recycled glass", "eaDir", "thumbnails", "Originals", "resources",
                                  "@home", "trash", "2024.lr"])
def test_folders_of_a_user_are_not_taken_for_a_systems(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jpg").touch()
    assert photos_of_folder(tmp_path) == [tmp_path / name / "a.jpg"]


@pytest.mark.parametrize("name", ["noextension", "2024-05-12 10.30", "Mr. Smith", "a."])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_photo_without_a_suffix_is_known_by_its_content(tmp_path, name, file_format):
    (tmp_path / name).write_bytes(encoded(file_format=file_format))
    (tmp_path / "README").write_text("P1 is the first page. GIF8 is a format.\n")
    (tmp_path / "header").write_text("#define x_width 8\n#define x_height 1\n")
    (tmp_path / "empty").touch()
    skipped = Counter()
    assert photos_of_folder(tmp_path, skipped) == [tmp_path / name]
    assert skipped == {"files without a suffix": 3}


def test_only_files_without_a_suffix_are_looked_into(tmp_path):
    for name in ("a.txt", "a.tmp", "a.jpg_original"):
        (tmp_path / name).write_bytes(encoded())
        assert not is_photo(tmp_path / name)
    (tmp_path / "odd").write_bytes(with_exif(exif_directory(ODD_TAGS["resolution of bytes"])))
    assert is_photo(tmp_path / "odd")


def test_a_photo_without_a_suffix_beyond_the_limit_of_pixels_is_a_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for file_format in ("PNG", "JPEG"):
        (tmp_path / "a").write_bytes(encoded(file_format=file_format))
        assert is_photo(tmp_path / "a")


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["photo.png", "photo.json", "photo"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    answers = []

    def read():
        answers.append(is_photo(tmp_path / "photo"))
        try:
            answers.append(open_photo(tmp_path / "photo.png", 8).size)
        except DataError as error:
            answers.append(str(error))

    thread = threading.Thread(target=read, daemon=True)  # it would wait for ever
    thread.start()
    thread.join(30)
    expected = f"{tmp_path}/photo.png: a pipe, not a file" if name == "photo.png" else (8, 8)
    assert answers == [False, expected]


def test_the_order_of_photos_is_that_of_their_names_on_every_system(tmp_path, monkeypatch):
    for name in ("b.png", "A.png", "a.png", "B.png"):
        write_photo(tmp_path / name, 1)
    # Windows compares paths without the difference between capitals and small letters.
    monkeypatch.setattr(type(tmp_path), "__lt__",
                        lambda one, two: str(one).lower() < str(two).lower())
    names = [path.name for path in photos_of_folder(tmp_path)]
    assert names == ["A.png", "B.png", "a.png", "b.png"]


def test_heic_photos_without_pillow_heif_are_counted_and_it_is_said_what_reads_them(
        tmp_path, monkeypatch):
    monkeypatch.setattr(photo_files, "register_heif", lambda: False)
    monkeypatch.setattr(photo_files, "photo_suffixes", lambda: {".jpg"})
    for name in ("a.HEIC", "b.heic", "c.hif", "d.mov"):
        (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match="holds no photos .* 3 of them can be read after pip inst"):
        photos_of_folder(tmp_path)
    write_photo(tmp_path / "e.jpg", 3)
    skipped = Counter()
    assert photos_of_folder(tmp_path, skipped) == [tmp_path / "e.jpg"]
    assert photo_files.heif_hint(skipped).startswith("; 3 of them can be read after pip install")
    assert photo_files.heif_hint(Counter({".mov": 2})) == ""
    with pytest.raises(DataError, match="a.HEIC: a HEIC photo, which needs pip install -r requ"):
        open_photo(tmp_path / "a.HEIC", 32)


@pytest.mark.extra
def test_heic_photos_are_read_upright_with_pillow_heif(tmp_path):
    pytest.importorskip("pillow_heif")
    assert photo_files.register_heif()
    photo = Image.new("RGB", (80, 40), "blue")
    photo.paste("red", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter, so that the red half is at the top
    photo.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as jpeg:
        jpeg.save(tmp_path / "IMG_1.HEIC", "HEIF", exif=jpeg.info["exif"], quality=95)
    (tmp_path / "a.jpg").unlink()
    assert photos_of_folder(tmp_path) == [tmp_path / "IMG_1.HEIC"]
    upright = open_photo(tmp_path / "IMG_1.HEIC", 32)
    assert upright.size == (40, 80)
    assert upright.getpixel((20, 10))[0] > 200 and upright.getpixel((20, 70))[2] > 200
    (tmp_path / "IMG_1.HEIC").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes()[:200])
    with pytest.raises(DataError, match="IMG_1.HEIC: "):
        open_photo(tmp_path / "IMG_1.HEIC", 32)
