"""Photos with texts of the same name: in folders, and in the .tar files of webdataset and
img2dataset.

A photo NAME.jpg, or NAME.image.jpg, is matched with NAME.txt; or else with NAME.caption,
NAME.caption.txt, NAME.caption0.txt and so on, or NAME.jpg.txt; or else with one of these in other
capitals. If it has no text at all, the captions in NAME.json count. A match needs exactly one
text, or several with numbers; what is left over is counted.

This module must not import torch."""
import collections
import itertools
import json
import os
import re
import tarfile
import unicodedata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

from src.utils.errors import DataError
from src.utils.photo_files import own_folders, photo_suffixes
from src.utils.tables import COLUMNS, EXCERPT
from src.utils.text_files import one_line

# The words that may stand for "txt" in NAME.txt; the first one that a photo has counts.
TEXT_WORDS = ("txt", *COLUMNS["caption"], "cap", "prompt")
TEXT_NAME = re.compile(rf"(.+?)\.({'|'.join(TEXT_WORDS)})[_-]?(\d*)(?:\.txt)?", re.IGNORECASE)
# The words that NAME.image.jpg may have there, if other pictures belong to NAME as well.
PHOTO_WORDS = ("image", "img", "photo", "picture", "rgb", "jpg", "jpeg")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".webp", ".png")  # a photo is preferably one of these
FIELD = re.compile(r"[a-z_][\w.-]*", re.IGNORECASE)  # what may follow the first dot in webdataset
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MOST_SUFFIXES = 8  # of those that a message lists
# How the package exifread, and so img2dataset, spells the values of EXIF's orientation.
ORIENTATIONS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}


class TurnedPhoto(type(Path())):
    """The path of a photo whose file has lost its EXIF.

    orientation: the value of EXIF's tag of this name, by which the photo has to be turned."""

    orientation = 1


class TarMember:
    """A photo inside a .tar file, with those methods of Path that are needed to read it.

    archive: path of the .tar file. name: name inside it. offset, size: where in the .tar file its
    bytes are. mtime_ns: time of the last change of the .tar file, in nanoseconds. orientation: as
    in `TurnedPhoto`."""

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


def first_dot(name):
    """Split a name, which may contain folders, at the first dot of its last part, as webdataset
    does: "a.b/c.image.jpg" -> ("a.b/c", "image.jpg")."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return folder + slash + key, field


def fold(name):
    """Return a name without the difference between capitals and small letters, and between the two
    ways in which Unicode writes an accent."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def natural(name):
    """A key for sorting, which puts a2 before a10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def text_keys(name):
    """Yield (key, word, number) for each way to read the name of a text.

    "a.caption0.txt" -> ("a", "caption", "0"). "a.en.txt" is read as ("a.en", "txt", "") and, with
    webdataset, as ("a", "en", "")."""
    match = TEXT_NAME.fullmatch(name)
    if match:
        yield match[1], match[2].lower(), match[3]
    key, field = first_dot(name)
    field = os.path.splitext(field)[0]
    if field and not (match and match[1] == key):
        word = field.rstrip("0123456789")
        yield key, word.rstrip("_-").lower(), field[len(word):]


def choose_texts(texts_of_word):
    """Choose among the texts of a key, {word: [(number, name)]}: those of the first of TEXT_WORDS
    that there is, or of any other word if it is the only one.

    Returns a list of names in the order of their numbers, which is empty if the choice is not
    clear."""
    words = [word for word in TEXT_WORDS if word in texts_of_word] or list(texts_of_word)
    if not words or (words[0] not in TEXT_WORDS and len(words) > 1):
        return []
    texts = dict(texts_of_word[words[0]])
    if len(texts) < len(texts_of_word[words[0]]):  # two have the same number, or none
        return []
    return [texts[number] for number in sorted(texts, key=natural)]


def photo_rank(name):
    """A key for sorting the pictures of one key, the one that is most likely the photo first."""
    field, suffix = os.path.splitext(first_dot(name)[1].lower())
    suffix = suffix or f".{field}"
    plain = first_dot(name)[0] == os.path.splitext(name)[0]
    return (not plain, field not in PHOTO_WORDS,
            PHOTO_SUFFIXES.index(suffix) if suffix in PHOTO_SUFFIXES else len(PHOTO_SUFFIXES))


def photo_keys(photos, folded):
    """Return {photo: [keys under which its text may stand, the closest first]}. folded: a function
    that is applied to the names."""
    photos_of_key = collections.defaultdict(list)
    for photo in photos:
        photos_of_key[folded(first_dot(photo)[0])].append(photo)
    keys_of_photo = {}
    for key, group in photos_of_key.items():
        ranks = [photo_rank(photo)[:2] for photo in group]
        for photo, rank in zip(group, ranks):
            keys_of_photo[photo] = [folded(photo), folded(os.path.splitext(photo)[0])]
            field = os.path.splitext(first_dot(photo)[1])[0]
            # "DSC.001.jpg" is not the photo of the key "DSC", and "a.depth.png" is not that of "a"
            # if there is "a.image.jpg".
            if FIELD.fullmatch(field) and rank == min(ranks) and ranks.count(rank) == 1:
                keys_of_photo[photo].append(key)
    return keys_of_photo


def match_texts(photos, texts):
    """Find the texts of photos by their names.

    photos, texts: names, which may contain folders. Returns {photo: [names of its texts]} for the
    photos that have any, in the order of `photos`."""
    texts = sorted(texts, key=natural)
    plain = {os.path.splitext(text)[0]: text for text in texts if text.lower().endswith(".txt")}
    texts_of_photo = {photo: [plain[os.path.splitext(photo)[0]]]
                      for photo in photos if os.path.splitext(photo)[0] in plain}
    for folded in (str, fold):
        taken = {text for of_photo in texts_of_photo.values() for text in of_photo}
        remaining = [text for text in texts if text not in taken]
        if not remaining or len(texts_of_photo) == len(photos):
            break
        texts_of_key = collections.defaultdict(lambda: collections.defaultdict(list))
        for text in remaining:
            for key, word, number in text_keys(text):
                texts_of_key[folded(key)][word].append((number, text))
        for photo, keys in photo_keys(photos, folded).items():
            if photo not in texts_of_photo:
                found = (choose_texts(texts_of_key[key]) for key in keys if key in texts_of_key)
                found = next(filter(None, found), None)
                if found:
                    texts_of_photo[photo] = found
    return {photo: texts_of_photo[photo] for photo in photos if photo in texts_of_photo}


def decode_text(content, place):
    """Return the captions of a text, which has one a line. Raises DataError, with the place of the
    text, if it is not UTF-8."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: the file is not UTF-8 text ({error.reason} at byte "
                        f"{error.start})") from None
    return [one_line(line) for line in lines if line.strip()]


def is_label(line):
    """Whether a line is one of the labels that detectors learn from, such as "0 0.5 0.5 0.2 0.1" or
    "Car 0 0 587 173 614 200", or holds only numbers."""
    tokens = [token for token in re.split(r"[\s,;]+", line) if token]
    numbers = sum(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", token, re.IGNORECASE)
                  is not None for token in tokens)
    return numbers == len(tokens) or (numbers >= 4 and len(tokens) - numbers <= 2)


def captions_in(value, photo_suffixes=()):
    """Return the captions in the content of a JSON file: a string, a list, or an object that has
    them under one of the names that a table's column of captions may have. The name of a photo,
    which some programs put into a field "title", is no caption."""
    if isinstance(value, str):
        is_photo = os.path.splitext(value)[1].lower() in photo_suffixes
        return [one_line(value)] if value.strip() and not is_photo else []
    if isinstance(value, list):
        return [caption for item in value for caption in captions_in(item, photo_suffixes)]
    if isinstance(value, dict):
        by_name = {name.strip().lower(): item for name, item in value.items()}
        for name in COLUMNS["caption"]:
            captions = captions_in(by_name.get(name), photo_suffixes)
            if captions:
                return captions
    return []


def parse_json(content):
    """Return the content of a JSON file, or None if it is not valid."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def orientation_in(content):
    """Return the value of EXIF's orientation that img2dataset has put into NAME.json, or 1.

    img2dataset encodes a photo anew, as its pixels lie and without EXIF, and lists the tags that
    the photo had in this file."""
    if b"Image Orientation" not in content:
        return 1
    content = parse_json(content)
    exif = content.get("exif") if isinstance(content, dict) else None
    exif = parse_json(exif) if isinstance(exif, str) else exif
    value = exif.get("Image Orientation") if isinstance(exif, dict) else None
    return ORIENTATIONS.get(value, 1) if isinstance(value, str) else 1


class Samples:
    """The photos that have captions, in one folder or in one .tar file.

    prefix: what precedes the names of the files in notes. place: the same in error messages. names:
    of all files. read: a function from a name to the bytes of a file. one_photo: whether a text
    belongs to only one photo. findings: the `Findings` to add to."""

    def __init__(self, prefix, place, names, read, one_photo, findings):
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
        self.texts_of_photo = match_texts(self.photos, texts)
        self.keys_of_photo = photo_keys(self.photos, str)
        self.json_of_key = {fold(name[:-5]): name for name in jsons}
        self.json_of_key |= {name[:-5]: name for name in jsons}
        if one_photo:
            self._choose_photos()
        read_texts = set(itertools.chain.from_iterable(self.texts_of_photo.values()))
        for name in texts:
            if name not in read_texts:
                findings.add("texts that are not read, because no photo has their name, or because "
                             "it has another text", prefix + name)

    def _choose_photos(self):
        """Leave only one photo to each text."""
        photos_of_text = collections.defaultdict(list)
        for photo, texts in self.texts_of_photo.items():
            photos_of_text[texts[0]].append(photo)
        left_out = set()
        for photos in photos_of_text.values():
            chosen = min(photos, key=photo_rank)
            for photo in photos:
                if photo != chosen:
                    left_out.add(photo)
                    self.findings.add("pictures that are left out, because another one has the "
                                      "same text", f"{self.prefix}{photo} beside {chosen}")
        self.photos = [photo for photo in self.photos if photo not in left_out]

    def _read_json(self, photo):
        """Return the bytes of the NAME.json of a photo, which are none if there is no such file."""
        keys = self.keys_of_photo[photo]
        for key in [*keys, *map(fold, keys)]:
            if key in self.json_of_key:
                return self.read(self.json_of_key[key])
        return b""

    def _read_captions(self, photo, json_bytes):
        """Return the captions of a photo, or None if it has no text."""
        if photo not in self.texts_of_photo:
            return captions_in(parse_json(json_bytes), self.suffixes) or None
        captions = []
        texts = self.texts_of_photo[photo]
        for text in texts:
            captions_of_text = decode_text(self.read(text), self.place + text)
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
            json_bytes = self._read_json(photo)
            captions = self._read_captions(photo, json_bytes)
            if captions is None:
                self.findings.add("photos without a text, which are left out", self.prefix + photo)
                continue
            orientation = orientation_in(json_bytes)
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
    for folder, subfolders, names in os.walk(root):
        # os.walk descends into what is left in this list.
        subfolders[:] = own_folders(folder, subfolders)
        prefix = Path(folder, "_").relative_to(root).as_posix()[:-1]

        def read(name, folder=folder):
            try:
                return Path(folder, name).read_bytes()
            except OSError as error:
                raise DataError(f"{Path(folder, name)}: the file cannot be read "
                                f"({error.strerror})") from None

        samples = Samples(prefix, f"{folder}{os.sep}", sorted(names), read, False, findings)
        for photo, captions, orientation in samples:
            path = Path(folder, photo)
            if orientation > 1:
                path = TurnedPhoto(path)
                path.orientation = orientation
            photos[prefix + photo] = path
            yield from rows_of(prefix + photo, captions)
    notes += findings.lines(root)


def find_archives(root):
    """Return the sorted paths of the .tar files in a folder and below it, and of those that are
    compressed."""
    paths = [path for path in root.rglob("*")
             if path.name.endswith((".tar", *COMPRESSED)) and path.is_file()]
    return (sorted(path for path in paths if path.suffix == ".tar"),
            sorted(path for path in paths if path.suffix != ".tar"))


def read_members(path):
    """Return {name: (offset, size)} of the files in a .tar file. Raises DataError if it is
    truncated or something else."""
    members = {}
    try:
        with tarfile.open(path, "r:") as archive:  # ":" for an archive that is not compressed
            for member in archive:
                if member.isfile():
                    members[member.name] = member.offset_data, member.size
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
        mtime_ns = path.stat().st_mtime_ns
        prefix = f"{path.relative_to(root).as_posix()}/"
        members = read_members(path)
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
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = own_folders(folder, subfolders)
        count_suffixes([name for name in names if not name.startswith(".")], counter)
    return f" It has {list_suffixes(counter)}." if counter else ""
