"""Tables of captions, and the messages for those that do not parse."""
import pytest

from src.utils.errors import DataError
from tests.conftest import read_captions


@pytest.mark.parametrize("content, message", [
    ("name,text\n", "line 1: expected the header"),
    ("", "line 1: expected the header"),
    ("image,caption\na.jpg,one, two\n", "line 2: expected 'image,caption'"),
    ("image,caption\na.jpg\n", "line 2: expected 'image,caption'"),
    ('image,caption\na.jpg,"open\n', "not valid CSV"),
])
def test_captions_of_kaggle_that_do_not_parse(tmp_path, content, message):
    (tmp_path / "captions.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / "captions.txt")


def test_captions_of_kaggle_with_quotes(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\na.jpg,"A dog , ""big"" , runs ."\na.jpg,Plain .\n')
    assert read_captions(path) == {"a.jpg": ['A dog , "big" , runs .', "Plain ."]}


def test_a_line_break_inside_a_quoted_caption_becomes_a_space(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b'image,caption\na.jpg,"two\ndogs"\na.jpg,"a \r\n red\r\n\r\n hat"\n')
    assert read_captions(path) == {"a.jpg": ["two dogs", "a red hat"]}
    path.write_bytes(path.read_bytes() + b"b.jpg\n")
    # The message counts the lines as an editor does.
    with pytest.raises(DataError, match="line 8: expected 'image,caption'"):
        read_captions(path)
