"""Files of captions -> rows (photo's name, caption, split). Caption is None in a row that only
names a photo, split where the file has none. All readers are generators, skip empty lines, take any
line ends and a byte order mark, and raise DataError, with file and line, for what does not parse.
"""
import csv
import json
import os
import re
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from PIL import Image

from src.utils.errors import DataError

COLUMNS = {  # of a table, the first that is there
    "image": ("image", "image_name", "image_path", "image_file", "file_name", "filename",
              "filepath", "file_path", "file", "path", "photo"),
    "caption": ("caption", "captions", "comment", "text", "title", "sentence", "description"),
    "split": ("split", "set", "subset"),
}
SPLIT_NAMES = {"train": "train", "training": "train", "restval": "train", "val": "val",
               "valid": "val", "validation": "val", "dev": "val", "test": "test",
               "testing": "test"}
# Formats that Pillow only recognises, or has another program draw.
NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def photo_suffixes():
    """Of all files that this Pillow reads."""
    Image.init()
    readable = (Image.OPEN.keys() | {"MPO"}) - NO_PHOTOS
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in readable}


class TarMember:
    """A photo inside a .tar file, with as much of Path as reading it takes."""

    def __init__(self, archive, name, offset, size, changed):
        self.archive, self.name, self.offset, self.size = archive, name, offset, size
        self.changed = changed

    parent = property(lambda self: self.archive)

    def __str__(self):
        return f"{self.archive}{os.sep}{self.name}"

    def is_file(self):
        return True

    def resolve(self):
        return self

    def stat(self):
        return SimpleNamespace(st_size=self.size, st_mtime_ns=self.changed)

    def read_bytes(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self, mode="rb"):
        return BytesIO(self.read_bytes())


def read_lines(path):
    """Yields the lines, each with its end."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: a byte order mark or none
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path):
    try:
        return json.loads("".join(read_lines(path)))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def line_rows(path, pattern, expected, header=0):
    """Lines that the pattern takes apart into name and caption, after so many of a header."""
    for number, line in enumerate(read_lines(path), start=1):
        match = pattern.fullmatch(line.rstrip())
        if match:
            yield match[1], match[2], None
        elif line.strip() and number > header:
            raise DataError(f"{path}, line {number}: expected {expected}, found "
                            f"{line.rstrip()[:80]!r}")


def token_rows(path):
    """Of Flickr8k and Flickr30k."""
    return line_rows(path, re.compile(r"([^\t]+)#\d+\t\s*(\S.*)"), "'photo.jpg#0<tab>caption'")


def bar_rows(path):
    """Of Kaggle's Flickr30k, where a line lacks the bar before its caption."""
    return line_rows(path, re.compile(r"\s*([^|]+?)\s*\|\s*\d+\s*[|\s]\s*(\S.*)"),
                     "'photo.jpg| 0| caption'", header=1)


def split_name(path, place, value):
    """-> "train", "val" or "test"."""
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise DataError(f"{path}, {place}: {value!r} is no split; train, val and test are")
    return split


def karpathy_rows(path):
    try:
        for image in read_json(path)["images"]:
            name = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            split = split_name(path, name, image["split"])
            yield name, None, split
            for sentence in image["sentences"]:
                if sentence["raw"].strip():
                    yield name, " ".join(sentence["raw"].split()), split
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not Karpathy's format ({type(error).__name__}: {error})"
                        ) from None


def coco_rows(paths):
    """paths: {split: file}."""
    for split, path in paths.items():
        content, folder = read_json(path), path.stem.removeprefix("captions_")
        try:
            names = {image["id"]: f"{folder}/{image['file_name']}" for image in content["images"]}
            for name in names.values():
                yield name, None, split
            for annotation in content["annotations"]:
                if annotation["caption"].strip():
                    yield (names[annotation["image_id"]], " ".join(annotation["caption"].split()),
                           split)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not COCO's format ({type(error).__name__}: {error})"
                            ) from None


def find_columns(names):
    """A table's column names -> {"image", "caption" and perhaps "split": column}."""
    known = {str(name).strip().lower(): name for name in names}
    found = {}
    for what, synonyms in COLUMNS.items():
        for name in synonyms:
            if name in known:
                found.setdefault(what, known[name])
    return found


def records(path):
    """Yields (line number, {column: value}) of a table."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: not an object")
            yield number, record
        return
    reader = csv.reader(read_lines(path), strict=True,
                        delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        columns = [column.strip() for column in next(filter(any, reader), [])]
        if not {"image", "caption"} <= find_columns(columns).keys():
            raise DataError(f"{path}, line {max(reader.line_num, 1)}: expected the header "
                            f"'image,caption', found {','.join(columns)[:80]!r}")
        for row in reader:
            if any(map(str.strip, row)):
                if len(row) != len(columns):
                    raise DataError(f"{path}, line {reader.line_num}: expected "
                                    f"'{','.join(columns)}', found {','.join(row)[:80]!r}")
                yield reader.line_num, dict(zip(columns, row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def table_rows(path):
    columns = {}
    for number, record in records(path):
        columns = columns or find_columns(record)
        try:
            name = str(record[columns["image"]]).strip()
            captions = record[columns["caption"]]
            captions = captions if isinstance(captions, list) else [captions]
            captions = [" ".join(caption.split()) for caption in captions]
        except (KeyError, AttributeError):
            name, captions = "", []
        if not (name and captions and all(captions)):
            wanted = " and ".join(columns.get(what, what) for what in ("image", "caption"))
            raise DataError(f"{path}, line {number}: expected {wanted}, found "
                            f"{str(list(record.values()))[:80]}")
        split = None
        if "split" in columns:
            split = split_name(path, f"line {number}", record.get(columns["split"]))
        for caption in captions:
            yield str(PurePosixPath(name)), caption, split


def text_rows(content, name, where):
    """The captions in a text beside a photo."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    yield name, None, None
    for line in lines:
        if line.strip():
            yield name, " ".join(line.split()), None


def texts_beside(root):
    """-> {name of a photo: path of the text beside it}, in order."""
    suffixes, found = photo_suffixes(), {}
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        texts = {Path(name).stem: name for name in names if name.lower().endswith(".txt")}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if stem in texts and suffix.lower() in suffixes:
                found[Path(place, name).relative_to(root).as_posix()] = Path(place, texts[stem])
    return found


def read_archives(archives, root, photos):
    """.tar files of photos and texts -> rows; `photos` gets {name: TarMember}."""
    suffixes = photo_suffixes()
    for path in archives:
        changed, name_of, texts = path.stat().st_mtime_ns, {}, {}
        inside = path.relative_to(root).as_posix()
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if member.isfile() and suffix.lower() == ".txt":
                        texts[stem] = archive.extractfile(member).read()
                    elif member.isfile() and suffix.lower() in suffixes:
                        name_of[stem] = f"{inside}/{member.name}"
                        photos[name_of[stem]] = TarMember(
                            path, member.name, member.offset_data, member.size, changed)
                    archive.members = []  # else it keeps them all
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it ends too early")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path}: not a whole .tar file ({error})") from None
        for stem, name in name_of.items():
            if stem in texts:
                yield from text_rows(texts[stem], name, f"{path}, {stem}.txt")
