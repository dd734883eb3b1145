"""The encodings of text files."""
import codecs

import pytest

from src.utils.errors import DataError
from src.utils.text_files import read_json, read_lines

TEXT = "image,caption\r\na.jpg,a caf\u00e9 \u201cby night\u201d\r\n"


def read(path, content):
    """Write a file. Return its text and the notes."""
    path.write_bytes(content)
    notes = []
    return "".join(read_lines(path, notes)), notes


@pytest.mark.parametrize("mark, encoding", [
    (b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_utf8_and_what_has_a_byte_order_mark_is_read_without_a_word(tmp_path, mark, encoding):
    text, notes = read(tmp_path / "a.csv", mark + TEXT.encode(encoding))
    assert text == TEXT.replace("\r\n", "\n") and not notes


@pytest.mark.parametrize("encoding, name", [
    ("cp1252", "Windows-1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")])
def test_an_encoding_that_is_assumed_is_said_with_an_example(tmp_path, encoding, name):
    text, notes = read(tmp_path / "a.csv", TEXT.encode(encoding))
    assert text == TEXT.replace("\r\n", "\n")
    assert len(notes) == 1 and f"a.csv is not UTF-8 and is read as {name}, such as " in notes[0]
    assert "caf\u00e9" in notes[0] and notes[0].endswith("please save it as UTF-8")


@pytest.mark.parametrize("content", [
    "a.jpg,\u0434\u0432\u0435 \u0441\u043e\u0431\u0430\u043a\u0438".encode("cp1251"),
    "a.jpg,\u4e24\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u5954\u8dd1".encode("gbk"),
    "caf\u00e9 caf\u00e9 ".encode() + b"\xff",  # damaged UTF-8
    b"caf\xe9 \x81",  # not a character of Windows-1252
    codecs.BOM_UTF16_LE + b"a\0b",
])
def test_an_unknown_encoding_is_an_error_with_the_cure(tmp_path, content):
    with pytest.raises(DataError, match="a.csv: the file is not .*please save it as UTF-8"):
        read(tmp_path / "a.csv", content)


def test_a_single_zero_byte_leaves_a_text_utf8(tmp_path):
    assert read(tmp_path / "a.csv", b"two \0 dogs") == ("two \0 dogs", [])


def test_a_json_file_may_be_in_utf16(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "caf\u00e9"}', encoding="utf-16")
    assert read_json(tmp_path / "a.json") == {"a": "caf\u00e9"}
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match="a.json: the file is not valid JSON"):
        read_json(tmp_path / "a.json")
