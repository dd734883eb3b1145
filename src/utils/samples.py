"""Photos with texts of the same name: in folders, and in the .tar files of webdataset and
img2dataset.

Which text belongs to which photo is decided in `text_names.py`. If a photo has no text at all, the
captions in its NAME.json count. What is left over is counted.

This module must not import torch."""
import collections
import contextlib
import functools
import itertools
import os
import re
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

from src.utils.errors import DataError
from src.utils.orientation import orientation_in, parse_json
from src.utils.photo_files import is_photo, photo_suffixes, walk_own_folders
from src.utils.tables import CAPTION_NUMBER, COLUMNS, EXCERPT, captions_in, parse_list
from src.utils.text_files import BYTE_ORDER_MARKS, guess_encoding, one_line
from src.utils.text_names import (
    TEXT_NAME,
    first_dot,
    fold,
    match_texts,
    natural,
    photo_keys,
    photo_rank,
)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MOST_SUFFIXES = 8  # of those that a message lists
class TarMember:
    """A photo inside a .tar file, with those methods of Path that are needed to read it.

    archive: path of the .tar file. name: name inside it. offset, size: where in the .tar file its
    bytes are. mtime_ns: time of the last change of the .tar file, in nanoseconds. orientation: see
    `lost_orientation`."""

    def __init__(self, archive, name, offset, size, mtime_ns, orientation=1):
        self.archive, self.name = archive, name
        self.offset, self.size = offset, size
        self.mtime_ns = mtime_ns
        self.orientation = orientation

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


class Findings:
    """Counts of what was read otherwise than a user may expect, each with its first example.

    texts: how many texts there are that are not empty. labels: how many of them hold numbers
    instead of captions. label: the first of these."""

    def __init__(self):
        self.found = {}
        self.texts = self.labels = 0
        self.label = None

    def add(self, what, example):
        count, first = self.found.get(what, (0, example))
        self.found[what] = count + 1, first

    def add_text(self, name, captions):
        if not captions:
            self.add("texts that are empty", name)
            return
        self.texts += 1
        if sum(map(is_label, captions)) * 2 > len(captions):
            self.labels += 1
            self.label = self.label or f"{name} ({captions[0][:EXCERPT]!r})"

    def lines(self, root):
        """Return the sentences for `Folder.notes`. Raises DataError if most of the texts hold
        numbers."""
        if self.labels * 2 > self.texts:
            raise DataError(f"{root}: {self.labels:,} of the {self.texts:,} texts hold numbers "
                            f"instead of captions, such as {self.label}. They seem to be the "
                            "labels of a detector; please write captions")
        if self.labels:
            self.found["texts that hold numbers instead of words"] = self.labels, self.label
        return [f"{what}: {count:,}, such as {example}"
                for what, (count, example) in self.found.items()]


def decode_text(content, place, notes):
    """Return the captions of a text, which has one a line, or a list as in a cell of a table.

    place: the text's name, for messages. notes: see `guess_encoding`. Raises DataError if its
    encoding is unknown."""
    try:
        encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS
                         if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode(guess_encoding(content, place, notes))
    lines = text.splitlines() if parse_list(text) is None else [text]
    captions = []
    for line in lines:
        try:
            captions += captions_in(line)
        except TypeError:  # a list of other things
            captions.append(one_line(line))
    return captions


def is_label(line):
    """Whether a line is one of the labels that detectors learn from, such as "0 0.5 0.5 0.2 0.1" or
    "Car 0 0 587 173 614 200", or holds only numbers."""
    if not re.search(r"\d", line):
        return False
    tokens = [token for token in re.split(r"[\s,;()[\]]+", line) if token]
    numbers = sum(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", token, re.IGNORECASE)
                  is not None for token in tokens)
    return numbers == len(tokens) or (numbers >= 4 and len(tokens) - numbers <= 2)


def json_captions(value, suffixes=()):
    """Return the captions in the content of a NAME.json: a string, a list, or an object that has
    them under one of the names that a table's column of captions may have.

    suffixes: those of photos. The name of a photo, which some programs put into a field "title", is
    no caption."""
    if isinstance(value, str):
        with contextlib.suppress(TypeError):  # for the text of a list of other things
            return [caption for caption in captions_in(value)
                    if os.path.splitext(caption)[1].lower() not in suffixes]
    if isinstance(value, list):
        return [caption for item in value for caption in json_captions(item, suffixes)]
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: natural(fold(key)))
        for name in COLUMNS["caption"]:  # also caption_1, caption_2 and so on
            values = [value[key] for key in keys
                      if CAPTION_NUMBER.sub("", key.strip().lower()) == name]
            captions = json_captions(values, suffixes)
            if captions:
                return captions
    return []


class Samples:
    """The photos that have captions, in one folder or in one .tar file.

    prefix: what precedes the names of the files in notes. place: the same in error messages. names:
    of all files. read: a function from a name to the bytes of a file. one_photo: whether a text
    belongs to only one photo. findings: the `Findings` to add to. is_photo: a function that tells
    whether a file without a suffix, given by its name, is a photo."""

    def __init__(self, prefix, place, names, read, one_photo, findings,
                 is_photo=lambda name: False):
        self.prefix, self.place, self.read, self.findings = prefix, place, read, findings
        self.suffixes = photo_suffixes()
        # macOS adds a file "._NAME" to NAME on foreign drives.
        names = [name for name in names if not name.rpartition("/")[2].startswith("._")]
        self.photos, texts, jsons = [], [], []
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in self.suffixes:
                self.photos.append(name)
            elif suffix == ".txt" or TEXT_NAME.fullmatch(name):
                texts.append(name)
            elif suffix == ".json":
                jsons.append(name)
            elif is_photo(name):
                self.photos.append(name)
        self.texts_of_photo = match_texts(self.photos, texts)
        self.json_of_key = {fold(name[:-5]): name for name in jsons}
        self.json_of_key |= {name[:-5]: name for name in jsons}
        self._choose_photos(one_photo)
        read_texts = set(itertools.chain.from_iterable(self.texts_of_photo.values()))
        for name in texts:
            if name not in read_texts:
                findings.add("texts that are not read, because no photo has their name, or because "
                             "it has another text", prefix + name)

    def _choose_photos(self, one_photo):
        """Leave only one photo to each text, or to each NAME.json where there is no text. Without
        one_photo, those that share a text are only counted."""
        photos_of_text = collections.defaultdict(list)
        for photo in self.photos:
            texts = self.texts_of_photo.get(photo)
            if not texts:  # without one_photo, a shared NAME.json may hold anything
                texts = [one_photo and self._json_of(photo) or photo]
            photos_of_text[texts[0]].append(photo)
        what = "pictures that are read with the text of another one"
        if one_photo:
            what = "pictures that are left out, because another one has the same text"
        others = set()
        for photos in photos_of_text.values():
            chosen = min(photos, key=photo_rank)
            for photo in photos:
                if photo != chosen:
                    others.add(photo)
                    self.findings.add(what, f"{self.prefix}{photo} beside {chosen}")
        if one_photo:
            self.photos = [photo for photo in self.photos if photo not in others]

    @functools.cached_property
    def _keys_of_photo(self):
        return photo_keys(self.photos, str)

    def _json_of(self, photo):
        """Return the name of the NAME.json of a photo, or None."""
        if not self.json_of_key:
            return None
        name = self.json_of_key.get(os.path.splitext(photo)[0])
        if name is None:
            keys = self._keys_of_photo[photo]
            found = (self.json_of_key.get(key) for key in [*keys, *map(fold, keys)])
            name = next(filter(None, found), None)
        return name

    def _read_captions(self, photo, json_bytes):
        """Return the captions of a photo, or None if it has no text."""
        if photo not in self.texts_of_photo:
            return json_captions(parse_json(json_bytes), self.suffixes) or None
        captions = []
        texts = self.texts_of_photo[photo]
        for text in texts:
            notes = []
            captions_of_text = decode_text(self.read(text), self.place + text, notes)
            if notes:
                self.findings.add("texts that are neither UTF-8 nor have a byte order mark, which "
                                  "are read as Windows-1252 or UTF-16", self.prefix + text)
            self.findings.add_text(self.prefix + text, captions_of_text)
            captions += captions_of_text
        if os.path.splitext(texts[0])[0] != os.path.splitext(photo)[0]:
            self.findings.add("photos whose text has another name",
                              f"{self.prefix}{photo} with {texts[0].rpartition('/')[2]}")
        return captions

    def __iter__(self):
        """Yield (name of a photo, its captions, its orientation by its NAME.json). A photo with an
        empty text has no captions; one without a text is left out."""
        for photo in self.photos:
            json_name = self._json_of(photo)
            json_bytes = self.read(json_name) if json_name else b""
            captions = self._read_captions(photo, json_bytes)
            if captions is None:
                self.findings.add("photos without a text, which are left out", self.prefix + photo)
                continue
            # As in `lost_orientation`, only img2dataset's own name counts.
            is_plain = json_name == os.path.splitext(photo)[0] + ".json"
            orientation = orientation_in(json_bytes) if is_plain else 1
            if orientation > 1:
                self.findings.add("photos that are turned as the exif in their .json says",
                                  self.prefix + photo)
            yield photo, captions, orientation


def rows_of(name, captions):
    """Yield the rows of one photo, see `caption_files.py`."""
    yield name, None, None
    for caption in captions:
        yield name, caption, None


def folder_rows(root, photos, notes):
    """Yield the rows of the photos that have a text beside them, in a folder or below it, in
    alphabetical order.

    photos: a dict into which {name of the photo, relative to root: path} is written while the rows
    are read. notes: a list to which sentences are appended at the end. Raises DataError if the
    texts hold numbers instead of captions."""
    findings = Findings()
    for folder, names in walk_own_folders(root):
        prefix = Path(folder, "_").relative_to(root).as_posix()[:-1]

        def read(name, folder=folder):
            path = Path(folder, name)
            if path.is_fifo():  # opening it would wait for a writer
                raise DataError(f"{path}: a pipe, not a file")
            try:
                return path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: the file cannot be read ({error.strerror})") from None

        samples = Samples(prefix, f"{folder}{os.sep}", sorted(names), read, False, findings,
                          lambda name, folder=folder: is_photo(Path(folder, name)))
        for photo, captions, _ in samples:
            photos[prefix + photo] = Path(folder, photo)
            yield from rows_of(prefix + photo, captions)
    notes += findings.lines(root)


def find_archives(root):
    """Return the sorted paths of the .tar files in a folder and below it, and of those that are
    compressed."""
    paths = []
    for folder, names in walk_own_folders(root):
        paths += [Path(folder, name) for name in names if name.endswith((".tar", *COMPRESSED))]
    paths.sort(key=lambda path: path.parts)  # on Windows, too, capitals come first
    return ([path for path in paths if path.suffix == ".tar"],
            [path for path in paths if path.suffix != ".tar"])


def read_members(path):
    """Return {name: (offset, size)} of the files in a .tar file. Raises DataError if it is
    truncated or something else."""
    members = {}
    try:
        with tarfile.open(path, "r:") as archive:  # ":" for an archive that is not compressed
            for member in archive:
                if member.isfile():
                    members[member.name] = member.offset_data, member.size
                elif member.islnk() and member.linkname in members:  # a copy is not stored again
                    members[member.name] = members[member.linkname]
                archive.members = []  # otherwise all members are kept in memory
            # tarfile takes the end of a truncated file for the end of the archive, which really is
            # a block of zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends too early")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: this is not a complete .tar file ({error})") from None
    return members


def archive_rows(archives, root, photos, notes):
    """Yield the rows of .tar files that hold photos and their texts.

    archives: the paths of the files, below root. photos, notes: as in `folder_rows`, with
    TarMember for path. Raises DataError if not one photo has a text, or if the texts hold numbers
    instead of captions."""
    findings = Findings()
    files = collections.Counter()
    for path in archives:
        prefix = f"{path.relative_to(root).as_posix()}/"
        members = read_members(path)
        mtime_ns = path.stat().st_mtime_ns
        count_suffixes(members, files)
        with open(path, "rb") as file:

            def read(name, file=file, members=members):
                offset, size = members[name]
                file.seek(offset)
                return file.read(size)

            for photo, captions, orientation in Samples(prefix, f"{path}, ", members, read, True,
                                                        findings):
                photos[prefix + photo] = TarMember(path, photo, *members[photo], mtime_ns,
                                                   orientation)
                yield from rows_of(prefix + photo, captions)
    if not photos:
        raise DataError(f"{root}: the .tar files ({len(archives):,}, such as {archives[0].name}) "
                        f"hold no photos with texts, but {list_suffixes(files) or 'nothing'}. "
                        "Expected are NAME.jpg with NAME.txt, NAME.caption.txt, or a caption in "
                        "NAME.json")
    notes += findings.lines(root)


def count_suffixes(names, counter):
    """Add to a Counter what the files of these names end in, from the first dot on."""
    counter.update(f".{first_dot(name)[1]}" for name in names)


def list_suffixes(counter):
    """{".jpg": 20, ".image.cls": 20} -> "20 .jpg, 20 .image.cls". Of many, only the last parts are
    listed, and the most frequent of these."""
    if len(counter) > MOST_SUFFIXES:
        shorter = collections.Counter()
        for suffix, number in counter.items():
            shorter[f".{suffix.rpartition('.')[2]}"] += number
        counter = shorter
    listed = ", ".join(f"{number:,} {suffix if suffix > '.' else 'without a suffix'}"
                       for suffix, number in counter.most_common(MOST_SUFFIXES))
    return listed + (" and others" if len(counter) > MOST_SUFFIXES else "")


def list_files(root):
    """Say what the files in a folder and below it end in, as " It has 20 .jpg, 20 .txt."."""
    counter = collections.Counter()
    for folder, names in walk_own_folders(root):
        count_suffixes([name for name in names if not name.startswith(".")], counter)
    return f" It has {list_suffixes(counter)}." if counter else ""
