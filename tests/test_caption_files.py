"""The readers of single files of captions, and their messages for files that do not parse."""
import pytest
from PIL import Image

from src.utils.errors import DataError
from src.utils.layouts import read_folder


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
