"""Photos with texts of the same name, in folders and in .tar files."""
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps

from src.utils.captions import read_folder
from src.utils.errors import DataError
from src.utils.orientation import ORIENTATIONS
from src.utils.photo_files import open_photo, version_of
from src.utils.samples import (
    archive_rows,
    is_label,
    json_captions,
)


def jpeg(color=(200, 0, 0), **options):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(file, "JPEG", **options)
    return file.getvalue()


def write_archive(path, files):
    """Write a .tar file of {name: bytes or str}."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_files(root, files):
    """Write {name: bytes or str} into a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read_samples(root, kind, files):
    """Write files into a folder or a shard and read them. Return ({photo: captions}, notes)."""
    if kind == "folder":
        write_files(root, files)
        prefix = ""
    else:
        write_archive(root / "00000.tar", files)
        prefix = "00000.tar/"
    folder = read_folder(root)
    for name in folder.names("all"):
        assert folder.path(name).read_bytes() == files[name.removeprefix(prefix)]
    texts = {name.removeprefix(prefix): folder.texts_of(name) for name in folder.names("all")}
    return texts, [note.replace(prefix, "") for note in folder.notes]


def in_all(number, members):
    """Repeat {suffix: content} for several keys, as a split needs some photos. Photos, which are
    bytes, get a number, as equal ones would be one photo."""
    return {f"{i:09d}{suffix}": content + str(i).encode() if content[:0] == b"" else content
            for i in range(number) for suffix, content in members.items()}


# {what it is: (the suffixes of the members of a key, the photo's suffix, its captions)}
VARIANTS = {
    "plain": ({".jpg": b"", ".txt": "a dog\n\n two\tcats \n"}, ".jpg", ["a dog", "two cats"]),
    "the photo's whole name": ({".jpg": b"", ".jpg.txt": "a dog"}, ".jpg", ["a dog"]),
    "caption": ({".jpg": b"", ".caption": "a dog"}, ".jpg", ["a dog"]),
    "cap": ({".jpg": b"", ".cap": "a dog"}, ".jpg", ["a dog"]),
    "caption.txt": ({".jpg": b"", ".caption.txt": "a dog"}, ".jpg", ["a dog"]),
    "captions.txt": ({".jpg": b"", ".captions.txt": "a dog\na cat"}, ".jpg", ["a dog", "a cat"]),
    "several": ({".jpg": b"", ".caption0.txt": "0", ".caption10.txt": "ten dogs",
                 ".caption2.txt": "two dogs"}, ".jpg", ["0", "two dogs", "ten dogs"]),
    "several with _": ({".jpg": b"", ".caption_1.txt": "one dog", ".caption_2.txt": "two dogs"},
                       ".jpg", ["one dog", "two dogs"]),
    "numbers": ({".jpg": b"", ".0.txt": "a dog", ".1.txt": "a cat"}, ".jpg", ["a dog", "a cat"]),
    "capitals": ({".JPG": b"", ".TXT": "a dog"}, ".JPG", ["a dog"]),
    "image.jpg": ({".image.jpg": b"", ".txt": "a dog"}, ".image.jpg", ["a dog"]),
    "another word": ({".input.jpg": b"", ".prompt.txt": "a dog"}, ".input.jpg", ["a dog"]),
    "a language": ({".jpg": b"", ".en.txt": "a dog"}, ".jpg", ["a dog"]),
    "image.png, caption.txt": ({".image.png": b"", ".caption.txt": "a dog"}, ".image.png",
                               ["a dog"]),
    "of two pictures": ({".depth.png": b"d", ".image.jpg": b"", ".caption.txt": "a dog"},
                        ".image.jpg", ["a dog"]),
    "json": ({".jpg": b"", ".json": '{"url": "a b", "caption": " a\\ndog "}'}, ".jpg", ["a dog"]),
    "a list": ({".jpg": b"", ".txt": "['a dog'\n 'a cat']\n"}, ".jpg", ["a dog", "a cat"]),
    "lists in lines": ({".jpg": b"", ".txt": '["a dog", "a cat"]\n[two] dogs\n[{"a": 1}]'}, ".jpg",
                       ["a dog", "a cat", "[two] dogs", '[{"a": 1}]']),
    "a list in json": ({".jpg": b"", ".json": '{"captions": ["a dog", "", "a cat"]}'}, ".jpg",
                       ["a dog", "a cat"]),
    "text in json": ({".image.jpg": b"", ".json": '{"Text": "a dog"}'}, ".image.jpg", ["a dog"]),
    "jpg.json": ({".jpg": b"", ".jpg.json": '{"title": "7.jpg", "description": "a dog"}'}, ".jpg",
                 ["a dog"]),
    "txt before json": ({".jpg": b"", ".json": '{"caption": "a cat"}', ".txt": "a dog"}, ".jpg",
                        ["a dog"]),
    "txt beside bad json": ({".jpg": b"", ".json": "{", ".txt": "a dog"}, ".jpg", ["a dog"]),
}


@pytest.mark.parametrize("kind", ["folder", "shard"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_captions_of_a_photo_are_found(tmp_path, kind, variant):
    members, photo, captions = VARIANTS[variant]
    texts, _ = read_samples(tmp_path, kind, in_all(12, members))
    assert texts == {f"{i:09d}{photo}": captions for i in range(12)}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_what_does_not_match_is_counted(tmp_path, kind):
    photos = [jpeg((20 * i, 0, 0)) for i in range(12)]
    files = {f"{i}.jpg": photo for i, photo in enumerate(photos)}
    files |= {f"{i}.txt": f"photo {i}" for i in range(8)}
    files |= {"8.jpg.TXT": "eight", "3.caption": "three", "classes.txt": "dog", "9.txt": " \n"}
    files["._3.jpg"] = files["._3.txt"] = b"\xff"  # macOS's
    texts, notes = read_samples(tmp_path, kind, files)
    assert texts == {f"{i}.jpg": [f"photo {i}"] for i in range(8)} | {"8.jpg": ["eight"],
                                                                      "9.jpg": []}
    assert sorted(notes) == [
        "photos whose text has another name: 1, such as 8.jpg with 8.jpg.TXT",
        "photos without a text, which are left out: 2, such as 10.jpg",
        "texts that are empty: 1, such as 9.txt",
        "texts that are not read, because no photo has their name, or because it has another text: "
        "2, such as 3.caption"]


def test_where_all_is_plain_nothing_is_noted(tmp_path):
    texts, notes = read_samples(tmp_path, "folder", in_all(9, {".jpg": b"1", ".txt": "a dog",
                                                               ".json": "{}"}))
    assert len(texts) == 9 and notes == []


@pytest.mark.parametrize("text", [{".txt": "a dog"}, {".json": '{"caption": "a dog"}'}])
def test_a_text_in_a_shard_belongs_to_one_photo(tmp_path, text):
    files = in_all(9, {".png": b"mask", ".jpg": b"photo"} | text)
    texts, notes = read_samples(tmp_path, "shard", files)
    assert set(texts) == {f"{i:09d}.jpg" for i in range(9)}
    assert notes == ["pictures that are left out, because another one has the same text: 9, such "
                     "as 000000000.png beside 000000000.jpg"]


def test_pictures_in_a_folder_that_share_a_text_are_counted(tmp_path):
    files = in_all(9, {".png": b"mask", ".jpg": b"photo", ".txt": "a dog"})
    files |= {"other.png": b"p", "other.jpg": b"j", "other.json": '{"shapes": []}'}
    texts, notes = read_samples(tmp_path, "folder", files)
    assert len(texts) == 18
    assert notes == ["pictures that are read with the text of another one: 9, such as "
                     "000000000.png beside 000000000.jpg",
                     "photos without a text, which are left out: 2, such as other.jpg"]


def test_a_photo_that_is_a_broken_link_is_missing(tmp_path):
    write_files(tmp_path, in_all(9, {".jpg": b"", ".txt": "a dog"}))
    (tmp_path / "000000003.jpg").unlink()
    (tmp_path / "000000003.jpg").symlink_to(tmp_path / "gone.jpg")
    assert read_folder(tmp_path).missing == {"000000003.jpg": "000000003.jpg"}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_links_that_lead_out_of_the_folder_are_followed(tmp_path, kind):
    files = in_all(9, {".jpg": b"", ".txt": "a dog"})
    read_samples(tmp_path / "elsewhere", "folder", files)
    if kind == "shard":
        write_archive(tmp_path / "elsewhere" / "0.tar", files)
        for name in files:
            (tmp_path / "elsewhere" / name).unlink()
    root = tmp_path / "data"
    (root / "own").mkdir(parents=True)
    (root / "own" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a link within").symlink_to(root / "own")
    (root / "own" / "to the root").symlink_to(root)
    archive = "" if kind == "folder" else "0.tar/"
    assert sorted(read_folder(root).names("all")) == [
        f"own/link/{archive}{i:09d}.jpg" for i in range(9)]


def test_a_shard_that_is_a_broken_link_is_refused(tmp_path):
    write_archive(tmp_path / "0.tar", in_all(9, {".jpg": b"", ".txt": "a dog"}))
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=r"1.tar: this is not a complete .tar file \(.*No such"):
        read_folder(tmp_path)


def test_archives_that_are_not_read_are_counted(tmp_path):
    write_files(tmp_path, in_all(9, {".jpg": b"", ".txt": "a dog"}))
    write_archive(tmp_path / "00000.tar", in_all(9, {".jpg": b"", ".txt": "a cat"}))
    folder = read_folder(tmp_path)
    assert folder.layout == "texts beside photos"
    assert folder.notes == [f"archives (1, such as {tmp_path / '00000.tar'}) are not read, as "
                            "there are texts beside photos"]


@pytest.mark.parametrize("line, label", [
    ("0 0.51 0.43 0.2 0.1", True), ("684,8,273,116,0,0,0,0", True), ("7", True), ("-1.5e-3", True),
    ("Car 0.00 0 -1.57 599.41 156.40", True), ("10 10 20 10 20 20 10 20 small-vehicle 0", True),
    ("[12, 0.5, (3, 4)]", True), ("(2) dogs", False), ("a dog", False), ("2 dogs", False),
    ("2 dogs and 3 cats on 4 mats 5", False), ("1st", False)])
def test_labels_of_detectors_are_told_from_captions(line, label):
    assert is_label(line) == label


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_labels_of_detectors_are_refused(tmp_path, kind):
    files = in_all(10, {".jpg": b"", ".txt": "0 0.51 0.43 0.2 0.1\n2 0.1 0.9 0.05 0.07\n"})
    files |= {f"{i:09d}.txt": "" for i in range(3, 10)} | {"classes.txt": "dog\ncat"}
    with pytest.raises(DataError, match=r"3 of the 3 texts hold numbers instead of captions, such "
                                        r"as \S*0.txt \('0 0.51 0.43 0.2 0.1'\)"):
        read_samples(tmp_path, kind, files)


def test_a_few_numbers_among_captions_are_noted(tmp_path):
    files = in_all(10, {".jpg": b"", ".txt": "a dog"}) | {"000000004.txt": "42"}
    texts, notes = read_samples(tmp_path, "folder", files)
    assert texts["000000004.jpg"] == ["42"]
    assert notes == ["texts that hold numbers instead of words: 1, such as 000000004.txt ('42')"]


@pytest.mark.parametrize("members, message", [
    ({".jpg": b"", ".cls": "3"}, "hold no photos with texts, but 20 .jpg, 20 .cls. Expected are"),
    ({".left.jpg": b"", ".right.jpg": b"", ".txt": "a dog"},
     "but 20 .left.jpg, 20 .right.jpg, 20 .txt."),
    ({".npy": b""}, "but 20 .npy."),
    ({".jpg": b"", ".json": '{"caption": null}'}, "but 20 .jpg, 20 .json."),
    ({"": b""}, "but 20 without a suffix."),
    ({f".{i}.jpg": b"" for i in range(9)}, "but 180 .jpg."),
])
def test_a_shard_without_pairs_is_refused(tmp_path, members, message):
    write_archive(tmp_path / "00000.tar", in_all(20, members))
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    assert message in str(error.value) and "(1, such as 00000.tar)" in str(error.value)


def test_compressed_archives_are_named(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.tar.gz").touch()
    (tmp_path / "b.tgz").touch()
    with pytest.raises(DataError, match=r"archives \(2, such as \S*b.tgz\) are not read; please "
                                        "unpack"):
        read_folder(tmp_path)
    write_archive(tmp_path / "00000.tar", in_all(9, {".jpg": b"", ".txt": "a dog"}))
    assert len(read_folder(tmp_path).notes) == 1


def test_a_folder_without_pairs_says_what_it_has(tmp_path):
    write_files(tmp_path, {f"images/{i}.jpg": b"" for i in range(9)}
                | {f"labels/{i}.txt": "0 1 1 2 3" for i in range(8)})
    with pytest.raises(DataError, match=r"no captions in a known layout. It has 9 .jpg, 8 .txt. "):
        read_folder(tmp_path)


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(DataError, match=r"00000.tar, 000000000.txt: the file is not UTF-8 text"):
        read_samples(tmp_path, "shard", in_all(9, {".jpg": b"", ".txt": b"\x81\xe9\xe9"}))


def test_a_text_of_windows_is_read_and_noted(tmp_path):
    files = {f"{i}.jpg": bytes([i]) for i in range(9)} | {f"{i}.txt": "a dog" for i in range(9)}
    texts, notes = read_samples(tmp_path, "folder", files | {"3.txt": b"a dog at a caf\xe9"})
    assert texts["3.jpg"] == ["a dog at a caf\u00e9"]
    assert notes[0] == ("texts that are neither UTF-8 nor have a byte order mark, which are read "
                        "as Windows-1252 or UTF-16: 1, such as 3.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_with_a_byte_order_mark(tmp_path, encoding):
    text = "caf\u00e9\r\na dog".encode(encoding)
    files = {f"{i}.jpg": bytes([i]) for i in range(9)} | {f"{i}.txt": text for i in range(9)}
    texts, _ = read_samples(tmp_path, "folder", files)
    assert set(map(tuple, texts.values())) == {("caf\u00e9", "a dog")}


def test_captions_in_json():
    assert json_captions({"caption": "", "text": ["a", " b\n"], "title": "c"}) == ["a", "b"]
    assert json_captions({"captions": [{"caption": "a"}, {"caption": "b"}]}) == ["a", "b"]
    numbered = {"Caption_10": "c", "caption_2": "b", "caption": "a", "captioned": "d"}
    assert json_captions(numbered) == ["a", "b", "c"]
    assert json_captions({"caption": "['a', 'b']"}) == ["a", "b"]
    assert json_captions({"caption": None, "sentences": [{"raw": "a"}, {"raw": "b"}]}) == ["a", "b"]
    for value in ({"caption": 3, "url": "a"}, None, ["", {}]):
        assert json_captions(value) == []


def test_photos_with_texts_are_read_from_an_archive(tmp_path):
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "shard.tar"
    contents = {f"00000{i}.jpg": jpeg((80 * i, 0, 0)) for i in range(3)}
    write_archive(path, contents | {f"00000{i}.txt": f"photo {i}\n\nin two\twords\n"
                                    for i in range(2)})
    photos, notes = {}, []
    rows = list(archive_rows([path], tmp_path, photos, notes))
    names = [f"below/shard.tar/00000{i}.jpg" for i in range(2)]
    assert rows == [(names[0], None, None), (names[0], "photo 0", None),
                    (names[0], "in two words", None), (names[1], None, None),
                    (names[1], "photo 1", None), (names[1], "in two words", None)]
    assert list(photos) == names
    assert notes == ["photos without a text, which are left out: 1, such as "
                     "below/shard.tar/000002.jpg"]
    for name, photo in photos.items():
        assert str(photo) == str(tmp_path / name)
        assert photo.is_file() and photo.parent == path and photo.orientation == 1
        assert photo.read_bytes() == photo.open().read() == contents[photo.name]
        assert photo.stat().st_size == len(contents[photo.name])
        assert photo.stat().st_mtime_ns == path.stat().st_mtime_ns


def test_a_link_in_an_archive_is_the_file_that_it_links_to(tmp_path):
    write_archive(tmp_path / "00000.tar", in_all(9, {".jpg": b"", ".txt": "a dog"}))
    with tarfile.open(tmp_path / "00000.tar", "a") as archive:
        for suffix in (".jpg", ".txt"):
            entry = tarfile.TarInfo(f"copy{suffix}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"000000003{suffix}"
            archive.addfile(entry)
    [note] = read_folder(tmp_path).notes
    assert note.endswith("for example, 00000.tar/copy.jpg is 00000.tar/000000003.jpg")


@pytest.mark.parametrize("place", ["within a photo", "between two entries"])
def test_a_truncated_archive_is_refused(tmp_path, place):
    path = tmp_path / "shard.tar"
    write_archive(path, {f"{i}{suffix}": jpeg() for i in range(3) for suffix in (".jpg", ".txt")})
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset if place == "between two entries" else last.offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match="shard.tar: this is not a complete .tar file"):
        list(archive_rows([path], tmp_path, {}, []))


def turned_photo():
    """A photo of four colours, upright, and {orientation: the bytes of its JPEG file, turned as if
    a camera had written this orientation, but without EXIF}."""
    upright = Image.new("RGB", (64, 32), "red")
    upright.paste("green", (32, 0, 64, 16))
    upright.paste("blue", (0, 16, 32, 32))
    files = {}
    for orientation in range(1, 9):
        # The inverse of a turn by 90 degrees is the one by 270; all others are their own inverses.
        inverse = {6: 8, 8: 6}.get(orientation, orientation)
        exif = Image.Exif()
        exif[0x0112] = inverse
        file = io.BytesIO()
        upright.save(file, "PNG", exif=exif)
        with Image.open(file) as photo:
            file = io.BytesIO()
            ImageOps.exif_transpose(photo).save(file, "JPEG", quality=95, subsampling=0)
        files[orientation] = file.getvalue()
    return np.asarray(upright, np.int16), files


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_photos_are_turned_by_their_json(tmp_path, kind):
    upright, contents = turned_photo()
    files = {}
    for spelling, orientation in ORIENTATIONS.items():
        exif = json.dumps({"Image Make": "x", "Image Orientation": spelling})
        files |= {f"{orientation}.jpg": contents[orientation], f"{orientation}.txt": "a dog",
                  f"{orientation}.json": json.dumps({"caption": "a dog", "exif": exif})}
    _, notes = read_samples(tmp_path, kind, files)
    assert notes == ["photos that are turned as the exif in their .json says: 7, such as 2.jpg"]
    folder = read_folder(tmp_path)
    versions = set()
    for name in folder.names("all"):
        photo = folder.path(name)
        assert np.abs(np.asarray(open_photo(photo, 64), np.int16) - upright).max() < 40, name
        versions.add(version_of(photo)[2:])
    assert versions == {(), *((i,) for i in range(2, 9))}


def test_photos_without_a_suffix_are_known_by_their_content(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"photo{i}", "JPEG")
        (tmp_path / f"photo{i}.txt").write_text(f"caption {i}")
    (tmp_path / "README").write_text("no photo")
    (tmp_path / "README.txt").write_text("no caption")
    folder = read_folder(tmp_path)
    assert sorted(folder.names("all")) == ["photo0", "photo1", "photo2"]
    assert folder.texts_of("photo2") == ["caption 2"] and folder.path("photo2").is_file()


@pytest.mark.parametrize("deleted", ["#recycle", "$RECYCLE.BIN", "@eaDir", ".Trash-1000"])
def test_deleted_photos_and_shards_are_no_data(tmp_path, deleted):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for i in range(3):
            photo = io.BytesIO()
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(photo, "PNG")
            for name, data in ((f"{i}.png", photo.getvalue()), (f"{i}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (tmp_path / deleted).mkdir()
    for name in ("a.tar", f"{deleted}/b.tar"):
        (tmp_path / name).write_bytes(content.getvalue())
    assert {name.rpartition("/")[0] for name in read_folder(tmp_path).names("all")} == {"a.tar"}
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="no captions in a known layout"):
        read_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_beside_a_photo_is_named_and_not_waited_for(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "1.txt").unlink()
    os.mkfifo(tmp_path / "1.txt")
    errors = []

    def read():
        try:
            read_folder(tmp_path)
        except DataError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)  # it would wait for ever
    thread.start()
    thread.join(30)
    assert errors == [f"{tmp_path / '1.txt'}: a pipe, not a file"]
