"""Readers of single files of captions, one for each format; those of tables are in `tables.py`.

The functions whose names end in `_rows` are generators of rows (name of the photo, caption, split).
The caption is None in a row that only names a photo, and the split is None if the file has none.
Files may have any line ends and a byte order mark; empty lines are skipped. What cannot be parsed
raises DataError, which names the file and, where there are lines, the line.

Which of these files a folder has is decided in `captions.py`. This module must not import torch."""
import os
import re
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from src.utils.errors import DataError
from src.utils.photo_files import own_folders, photo_suffixes
from src.utils.tables import EXCERPT, split_name
from src.utils.text_files import one_line, read_json, read_lines

TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t\s*(\S.*)")
# In one line of Kaggle's file the bar before the caption is missing.
BAR_LINE = re.compile(r"\s*([^|]+?)\s*\|\s*\d+\s*[|\s]\s*(\S.*)")


class TarMember:
    """A photo inside a .tar file, with those methods of Path that are needed to read it.

    archive: path of the .tar file. name: name inside it. offset, size: where in the .tar file its
    bytes are. mtime_ns: time of the last change of the .tar file, in nanoseconds."""

    def __init__(self, archive, name, offset, size, mtime_ns):
        self.archive, self.name = archive, name
        self.offset, self.size = offset, size
        self.mtime_ns = mtime_ns

    @property
    def parent(self):
        return self.archive

    def __str__(self):
        return f"{self.archive}{os.sep}{self.name}"

    def is_file(self):
        return True

    def resolve(self):
        return self

    def stat(self):
        return SimpleNamespace(st_size=self.size, st_mtime_ns=self.mtime_ns)

    def read_bytes(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self, mode="rb"):
        return BytesIO(self.read_bytes())


def line_rows(path, pattern, expected, header_lines=0):
    """Yield the rows of a file that has one caption a line.

    pattern: a regular expression whose groups are the photo's name and the caption. expected: the
    form of a line, for the error message. header_lines: so many lines at the top need not match."""
    for number, line in enumerate(read_lines(path), start=1):
        match = pattern.fullmatch(line.rstrip())
        if match:
            yield match[1], match[2], None
        elif line.strip() and number > header_lines:
            raise DataError(f"{path}, line {number}: expected {expected}, found "
                            f"{line.rstrip()[:EXCERPT]!r}")


def token_rows(path):
    """Yield the rows of Flickr8k.token.txt, or of the file of that format of Flickr30k."""
    return line_rows(path, TOKEN_LINE, "'photo.jpg#0<tab>caption'")


def bar_rows(path):
    """Yield the rows of results.csv, the captions of Flickr30k on Kaggle, where bars separate the
    columns."""
    return line_rows(path, BAR_LINE, "'photo.jpg| 0| caption'", header_lines=1)


def karpathy_rows(path):
    """Yield the rows of a JSON file in the format of Karpathy and Fei-Fei (2015)."""
    try:
        for image in read_json(path)["images"]:
            name = str(PurePosixPath(image.get("filepath", ""), image["filename"]))
            split = split_name(path, name, image["split"])
            yield name, None, split
            for sentence in image["sentences"]:
                if sentence["raw"].strip():
                    yield name, one_line(sentence["raw"]), split
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: the file is not in Karpathy's format "
                        f"({type(error).__name__}: {error})") from None


def coco_rows(paths):
    """Yield the rows of COCO's files of captions, given as {split: path}. The photos of
    captions_train2014.json are in the folder train2014."""
    for split, path in paths.items():
        content = read_json(path)
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


def text_rows(content, name, place):
    """Yield the rows of the text beside a photo, which has one caption a line.

    content: the bytes of the text. name: the photo's. place: where the text lies, for the error
    message."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: the file is not UTF-8 text ({error.reason} at byte "
                        f"{error.start})") from None
    yield name, None, None
    for line in lines:
        if line.strip():
            yield name, one_line(line), None


def texts_beside_photos(root):
    """Find the photos in a folder, or below it, that have a .txt file of the same name beside them.

    Returns {name of the photo, relative to root: path of its text}, in alphabetical order."""
    suffixes = photo_suffixes()
    text_of_photo = {}
    for folder, subfolders, names in os.walk(root):
        # os.walk descends into what is left in this list.
        subfolders[:] = own_folders(folder, subfolders)
        texts = {Path(name).stem: name for name in names if name.lower().endswith(".txt")}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if stem in texts and suffix.lower() in suffixes:
                photo = Path(folder, name).relative_to(root).as_posix()
                text_of_photo[photo] = Path(folder, texts[stem])
    return text_of_photo


def archive_rows(archives, root, photos):
    """Yield the rows of .tar files that hold photos and texts of the same names.

    archives: the paths of the files, below root. photos: a dict into which {name of the photo:
    TarMember} is written while the rows are read. A photo without a text has no row."""
    suffixes = photo_suffixes()
    for path in archives:
        mtime_ns = path.stat().st_mtime_ns
        path_in_root = path.relative_to(root).as_posix()
        photo_of_stem, text_of_stem = {}, {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if member.isfile() and suffix.lower() == ".txt":
                        text_of_stem[stem] = archive.extractfile(member).read()
                    elif member.isfile() and suffix.lower() in suffixes:
                        name = f"{path_in_root}/{member.name}"
                        photo_of_stem[stem] = name
                        photos[name] = TarMember(path, member.name, member.offset_data,
                                                 member.size, mtime_ns)
                    archive.members = []  # otherwise all members are kept in memory
                # tarfile takes the end of a truncated file for the end of the archive, which really
                # is a block of zeros.
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it ends too early")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path}: this is not a complete .tar file ({error})") from None
        for stem, name in photo_of_stem.items():
            if stem in text_of_stem:
                yield from text_rows(text_of_stem[stem], name, f"{path}, {stem}.txt")
