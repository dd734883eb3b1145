"""Text files as lines or as JSON, with any line ends and in the usual encodings.

An encoding is known from a byte order mark, or else it is UTF-8. What is neither is read as
Windows-1252, if that is likely, and a note says so. This module must not import torch."""
import codecs
import json
import re
from pathlib import Path

from src.utils.errors import DataError

BYTE_ORDER_MARKS = (  # that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK_SIZE = 1 << 20  # bytes or characters read at a time
ZEROS = 0.25  # share of zero bytes from which a text is UTF-16; half of a Western text are zero
# Western languages have far fewer letters outside ASCII. A text of another alphabet has far more if
# it is read as Windows-1252.
MOST_FOREIGN_LETTERS = 0.3


def one_line(text):
    """Replace each line break, and all other white space, by a single space."""
    return " ".join(text.split())


def guess_encoding(content, place, notes=None):
    """Return the encoding of a text that is not UTF-8, and add a note on it.

    content: its bytes. place: the file's name, for the messages. notes: a list, or None. Raises
    DataError if no encoding is likely."""
    if content.count(0) > ZEROS * len(content):
        guess = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
    else:
        guess = "cp1252"
    try:
        text = content.decode(guess)
    except UnicodeDecodeError:
        text = ""
    letters = sum(map(str.isalpha, text))
    foreign = sum(character.isalpha() and not character.isascii() for character in text)
    as_utf8 = content.decode("utf-8", "replace")
    invalid = as_utf8.count("\N{REPLACEMENT CHARACTER}")
    valid = sum(not character.isascii() for character in as_utf8) - invalid
    damaged = guess == "cp1252" and valid >= invalid  # UTF-8 with a few wrong bytes
    if not letters or foreign > MOST_FOREIGN_LETTERS * letters or damaged:
        try:
            content.decode("utf-8")
            fault = "zero bytes"
        except UnicodeDecodeError as error:
            fault = f"{error.reason} at byte {error.start}"
        raise DataError(f"{place}: the file is not UTF-8 text ({fault}); please save it as UTF-8")
    word = re.search(r"\S*[^\s\x00-\x7f]\S*", text) or re.search(r"\S+", text)
    note = (f"{place} is not UTF-8 and is read as {'Windows-1252' if guess == 'cp1252' else guess}"
            f", such as {word[0][:40]!r}; if that is wrong, please save it as UTF-8")
    if notes is not None and note not in notes:
        notes.append(note)
    return guess


def find_encoding(path, notes=None):
    """Return the encoding of a text file. notes: see `guess_encoding`. Raises DataError if no
    encoding is likely, and OSError if the file cannot be read."""
    with open(path, "rb") as file:
        start = file.read(CHUNK_SIZE)
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding
    if start.count(0) <= ZEROS * len(start):
        try:
            with open(path, encoding="utf-8", newline="") as file:
                while file.read(CHUNK_SIZE):
                    pass
            return "utf-8"
        except UnicodeDecodeError:
            pass
    return guess_encoding(Path(path).read_bytes(), path, notes)


def read_lines(path, notes=None):
    """Yield the lines of a text file, each with its line end. notes: see `guess_encoding`. Raises
    DataError if the file's encoding is unknown or the file cannot be read."""
    try:
        encoding = find_encoding(path, notes)
        with open(path, encoding=encoding) as file:
            yield from file
    except UnicodeError as error:
        raise DataError(f"{path}: the file is not valid {encoding} ({error}); please save it as "
                        "UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror})") from None


def read_json(path, notes=None):
    """Return the content of a JSON file. Raises DataError if it is not valid JSON."""
    try:
        return json.loads("".join(read_lines(path, notes)))
    except ValueError as error:
        raise DataError(f"{path}: the file is not valid JSON ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: the file is not valid JSON (too many brackets)") from None
