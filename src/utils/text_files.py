"""Text files as lines or as JSON, with any line ends, with or without a byte order mark.

This module must not import torch."""
import json

from src.utils.errors import DataError


def one_line(text):
    """Replace each line break, and all other white space, by a single space."""
    return " ".join(text.split())


def read_lines(path):
    """Yield the lines of a text file, each with its line end. Raises DataError if the file is not
    UTF-8 or cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # "-sig" drops a byte order mark
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error.reason} at byte "
                        f"{error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror})") from None


def read_json(path):
    """Return the content of a JSON file. Raises DataError if it is not valid JSON."""
    try:
        return json.loads("".join(read_lines(path)))
    except ValueError as error:
        raise DataError(f"{path}: the file is not valid JSON ({error})") from None
