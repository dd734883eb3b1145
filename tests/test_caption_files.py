"""The readers of single files of captions, and their messages for files that do not parse."""
import pytest
from PIL import Image

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


def test_a_caption_file_in_windows_1252(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_bytes(path.read_bytes() + b"1000_abc.jpg#5\tcaf\xe9\n")
    folder = read_folder(dataset_dir)
    assert folder.texts_of("1000_abc.jpg")[5] == "caf\u00e9"
    assert any("is not UTF-8 and is read as Windows-1252" in line for line in folder.describe())


def test_a_text_that_is_not_utf8(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"image,caption\na.jpg,caf\x81\n")
    with pytest.raises(DataError, match="a.txt: the file is not UTF-8 text"):
        read_folder(tmp_path)
