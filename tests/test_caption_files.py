"""The readers of single files of captions, and their messages for files that do not parse."""
import io
import tarfile

import pytest
from PIL import Image

from src.utils.caption_files import archive_rows
from src.utils.captions import read_folder
from src.utils.errors import DataError


@pytest.mark.parametrize("line", [
    "no tab here", "1000_abc.jpg\tno number", "1000_abc.jpg#x\tno number", "#0\tno name",
    "1000_abc.jpg#0\t  "])
def test_a_caption_line_that_does_not_parse(dataset_dir, line):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"Flickr8k.token.txt, line 56: expected"):
        read_folder(dataset_dir)


def test_a_caption_file_that_is_not_utf8(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_bytes(path.read_bytes() + b"1000_abc.jpg#5\tcaf\xe9\n")
    with pytest.raises(DataError, match="Flickr8k.token.txt: the file is not UTF-8 text"):
        read_folder(dataset_dir)


def test_a_text_or_a_table_that_is_not_utf8(tmp_path):
    for name in ("captions.csv", "a.txt"):
        folder = tmp_path / name.removesuffix(".txt")
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "a.jpg")
        (folder / name).write_bytes(b"image,caption\na.jpg,caf\xe9\n")
        with pytest.raises(DataError, match=f"{name}: the file is not UTF-8 text"):
            read_folder(folder)


def write_archive(path):
    """Write a .tar file of two photos with texts and of one without. Return the photos' bytes."""
    contents = {}
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            file = io.BytesIO()
            Image.new("RGB", (60, 40), (80 * i, 0, 0)).save(file, "JPEG")
            contents[f"00000{i}.jpg"] = file.getvalue()
            entries = {f"00000{i}.jpg": file.getvalue()}
            if i < 2:
                entries[f"00000{i}.txt"] = f"photo {i}\n\nin two\twords\n".encode()
            for name, content in entries.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return contents


def test_photos_with_texts_are_read_from_an_archive(tmp_path):
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "shard.tar"
    contents, photos = write_archive(path), {}
    rows = list(archive_rows([path], tmp_path, photos))
    names = [f"below/shard.tar/00000{i}.jpg" for i in range(3)]
    assert rows == [(names[0], None, None), (names[0], "photo 0", None),
                    (names[0], "in two words", None), (names[1], None, None),
                    (names[1], "photo 1", None), (names[1], "in two words", None)]
    assert list(photos) == names
    for name, photo in photos.items():
        assert str(photo) == str(tmp_path / name)
        assert photo.is_file() and photo.parent == path
        assert photo.read_bytes() == photo.open().read() == contents[photo.name]
        assert photo.stat().st_size == len(contents[photo.name])
        assert photo.stat().st_mtime_ns == path.stat().st_mtime_ns


@pytest.mark.parametrize("place", ["within a photo", "between two entries"])
def test_a_truncated_archive_is_refused(tmp_path, place):
    path = tmp_path / "shard.tar"
    write_archive(path)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset if place == "between two entries" else last.offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match="shard.tar: this is not a complete .tar file"):
        list(archive_rows([path], tmp_path, {}))
