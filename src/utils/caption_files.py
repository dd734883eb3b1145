"""Readers of single files of captions, one for each format; those of tables are in `tables.py`.

The functions whose names end in `_rows` are generators of rows (name of the photo, caption, split).
The caption is None in a row that only names a photo, and the split is None if the file has none.
Files may have any line ends and a byte order mark; empty lines are skipped. What cannot be parsed
raises DataError, which names the file and, where there are lines, the line.

Which of these files a folder has is decided in `captions.py`. This module must not import torch."""
import re
from pathlib import PurePosixPath

from src.utils.errors import DataError
from src.utils.tables import EXCERPT, split_name
from src.utils.text_files import one_line, read_json, read_lines

TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t\s*(\S.*)")
# In one line of Kaggle's file the bar before the caption is missing.
BAR_LINE = re.compile(r"\s*([^|]+?)\s*\|\s*\d+\s*[|\s]\s*(\S.*)")


def line_rows(path, pattern, expected, notes=None, header_lines=0):
    """Yield the rows of a file that has one caption a line.

    pattern: a regular expression whose groups are the photo's name and the caption. expected: the
    form of a line, for the error message. notes: a list to which a sentence may be appended.
    header_lines: so many lines at the top need not match."""
    for number, line in enumerate(read_lines(path, notes), start=1):
        match = pattern.fullmatch(line.rstrip())
        if match:
            yield match[1], match[2], None
        elif line.strip() and number > header_lines:
            raise DataError(f"{path}, line {number}: expected {expected}, found "
                            f"{line.rstrip()[:EXCERPT]!r}")


def token_rows(path, notes=None):
    """Yield the rows of Flickr8k.token.txt, or of the file of that format of Flickr30k."""
    return line_rows(path, TOKEN_LINE, "'photo.jpg#0<tab>caption'", notes)


def bar_rows(path, notes=None):
    """Yield the rows of results.csv, the captions of Flickr30k on Kaggle, where bars separate the
    columns."""
    return line_rows(path, BAR_LINE, "'photo.jpg| 0| caption'", notes, header_lines=1)


def is_karpathys(content):
    """Whether the content of a JSON file is in Karpathy's format, by its first photo."""
    images = content.get("images") if isinstance(content, dict) else None
    return (bool(images) and isinstance(images, list) and isinstance(images[0], dict)
            and "sentences" in images[0])


def karpathy_rows(path, content):
    """Yield the rows of a JSON file in the format of Karpathy and Fei-Fei (2015). content: what
    `read_json` has read."""
    try:
        for image in content["images"]:
            name = str(PurePosixPath(image.get("filepath") or "", image["filename"]))
            split = split_name(path, name, image["split"])
            yield name, None, split
            for sentence in image["sentences"]:
                if sentence["raw"].strip():
                    yield name, one_line(sentence["raw"]), split
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: the file is not in Karpathy's format "
                        f"({type(error).__name__}: {error})") from None


def coco_rows(paths, notes=None):
    """Yield the rows of COCO's files of captions, given as {split: path}. The photos of
    captions_train2014.json are in the folder train2014."""
    for split, path in paths.items():
        content = read_json(path, notes)
        folder = path.stem.removeprefix("captions_")
        try:
            names = {image["id"]: f"{folder}/{image['file_name']}" for image in content["images"]}
            for name in names.values():
                yield name, None, split
            for annotation in content["annotations"]:
                caption = annotation["caption"]
                if caption.strip():
                    yield names[annotation["image_id"]], one_line(caption), split
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: the file is not in COCO's format "
                            f"({type(error).__name__}: {error})") from None
