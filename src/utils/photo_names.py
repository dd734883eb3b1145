"""Where the photos of a dataset folder lie, given the names that its captions call them by.

Usually a name is the path of a photo, to the letter, relative to the folder or to one of the
folders in it. `PhotoFiles` finds out which one, and it finds photos whose names only nearly fit,
such as those that were written on Windows, on macOS or for another machine. `find_copies` finds the
photos that are stored more than once. This module must not import torch."""
import collections
import functools
import hashlib
import itertools
import os
import posixpath
import re
import unicodedata
import urllib.parse
from typing import NamedTuple

from PIL import Image

from src.utils.errors import DataError
from src.utils.orientation import lost_orientation
from src.utils.photo_files import photo_suffixes, photos_of_folder
from src.utils.samples import TarMember

PHOTO_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images",
                 "Images")
SAMPLE = 1000  # photos that are looked for in order to find their folder
MOST_SHOWN = 3  # files that a message names for one photo
EXCERPT = 4096  # bytes in the middle of a file; photos that differ usually differ there
WHOLE_NUMBER = re.compile(r"([0-9]+)\.0")  # how pandas writes a number in a column with gaps


class Spelling(NamedTuple):
    """A name without what programs spell differently: capitals, the composition of accents, the
    separators of folders, codes such as %20 and the suffixes of one format."""

    folders: tuple  # of strings; the first one of an absolute path is empty, or a drive
    stem: str
    photo_format: str | None  # as Pillow calls it; None if the name has no suffix of a photo

    def common_folders(self, other):
        """Return how many folders just above the file are the same in both names."""
        count = 0
        for one, two in zip(reversed(self.folders), reversed(other.folders)):
            if one != two:
                break
            count += 1
        return count


def spell(name, suffixes):
    """Return the `Spelling` of a name, in which %20 and the like, as addresses on the web have
    them, stand for their characters. suffixes: those of `photo_suffixes`."""
    name = urllib.parse.unquote(name)
    name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())
    first, *rest = name.replace("\\", "/").split("/")
    parts = [first, *(part for part in rest if part)]
    parts = [part for part in parts if part not in (".", "..")] or [""]
    stem, suffix = os.path.splitext(parts[-1])
    if suffix not in suffixes:
        stem, suffix = parts[-1], None
    number = WHOLE_NUMBER.fullmatch(stem)
    stem = number[1] if number else stem
    return Spelling(tuple(parts[:-1]), stem, Image.EXTENSION[suffix] if suffix else None)


def list_photos(root):
    """Return the photos below a folder as paths relative to it, with slashes."""
    try:
        return [path.relative_to(root).as_posix() for path in photos_of_folder(root)]
    except DataError:  # there are none
        return []


class Match(NamedTuple):
    """The files that a name may mean. files: relative to the root. shared: how many of the folders
    just above the file they have in common with the name."""

    spelling: Spelling
    files: list
    shared: int

    def foreign_folders(self):
        """Return the leading folders of the name that the files do not have."""
        return self.spelling.folders[:len(self.spelling.folders) - self.shared]


class Listing:
    """The photos below a folder, to be looked up by names that only nearly fit."""

    def __init__(self, root):
        self.suffixes = photo_suffixes()
        self.spelling_of = {}  # {path relative to root: its Spelling}
        self.by_stem = collections.defaultdict(list)
        self.by_number = collections.defaultdict(list)
        self.folder_names = set()
        for file in list_photos(root):
            spelling = self.spelling_of[file] = spell(file, self.suffixes)
            self.by_stem[spelling.stem].append(file)
            if spelling.stem.isdecimal():
                self.by_number[spelling.stem.lstrip("0") or "0"].append(file)
            self.folder_names.update(spelling.folders)

    def match(self, name):
        """Return the `Match` of a name: of the files that are spelled like it, those that share the
        most folders with it. A number may have lost its leading zeros. If there is none in the
        format that the name's suffix stands for, they are those in other formats."""
        spelling = spell(name, self.suffixes)
        files = self.by_stem.get(spelling.stem) or self.by_number.get(spelling.stem, [])
        files = [file for file in files if self.same_format(spelling, file)] or files
        shared = [spelling.common_folders(self.spelling_of[file]) for file in files]
        most = max(shared, default=0)
        files = [file for file, number in zip(files, shared) if number == most]
        return Match(spelling, files, most)

    def same_format(self, spelling, file):
        """Whether the suffixes of a name and a file stand for one format, or one is missing."""
        formats = {spelling.photo_format, self.spelling_of[file].photo_format} - {None}
        return len(formats) < 2

    def is_sure(self, match, file):
        """Whether a file of a match is the name's beyond doubt. It is not if it has another format,
        nor if it is in another folder although the name's own folder is there as well."""
        foreign = match.foreign_folders()
        is_elsewhere = foreign and match.shared < len(self.spelling_of[file].folders)
        if is_elsewhere and foreign[-1] in self.folder_names:
            return False
        return self.same_format(match.spelling, file)


class PhotoFiles:
    """The files of a folder's photos.

    folder: the folder below root that the names are relative to. others: {name: Path} of the photos
    whose names only nearly fit. missing: {name: how a message describes it}. notes: sentences that
    say what was done."""

    def __init__(self, root, names):
        self.root, self.names = root, names
        self.others, self.missing, self.notes = {}, {}, []
        self.folder = self._find_folder(names[::len(names) // SAMPLE + 1])
        absent = [name for name in names if not is_file(self.folder, name)]
        if absent:
            self._find_others(absent)

    @functools.cached_property
    def listing(self):
        """The `Listing` of root, which is only made when a photo is missing."""
        return Listing(self.root)

    def _find_folder(self, names):
        """Return the folder that holds the most photos of these names: root, one of PHOTO_FOLDERS
        in it, one such folder in another or, if photos are missing there, any folder below root."""
        order = [name.lower() for name in PHOTO_FOLDERS]

        def photo_folders_in(folder):
            paths = [path for path in folder.iterdir()
                     if path.name.lower() in order and path.is_dir()]
            return sorted(paths, key=lambda path: order.index(path.name.lower()))

        folders = photo_folders_in(self.root)
        folders += [inner for folder in folders for inner in photo_folders_in(folder)]
        folders.append(self.root)
        counts = [sum(is_file(folder, name) for name in names) for folder in folders]
        # If there are no photos at all, this is the first of PHOTO_FOLDERS that exists, which is
        # the folder that an error message should name.
        best = folders[counts.index(max(counts))]
        if max(counts) == len(names):
            return best

        exact, near = {}, {}  # {name: the folders that hold a photo of this name}
        for name in names:
            match = self.listing.match(name)
            near[name] = [folder_above(file, match.shared) for file in match.files]
            exact[name] = [folder for folder, file in zip(near[name], match.files)
                           if file == posixpath.join(folder, name)]
        holding = exact if any(exact.values()) else near
        votes = collections.Counter(itertools.chain.from_iterable(holding.values()))
        most = max(votes.values(), default=0)
        if most <= max(counts):
            return best
        tied = [folder for folder, count in votes.items() if count == most]
        for folder in folders:
            if self._relative(folder) in tied:
                return folder
        chosen = min(tied, key=lambda folder: (folder.count("/"), folder))
        rivals = {folder for others in holding.values() if chosen in others for folder in others}
        if len(rivals) > 1:
            rival = min(rivals - {chosen}, key=lambda folder: (-votes[folder], folder))
            self.notes.append(
                f"{len(rivals):,} folders hold photos of the same names, such as "
                f"{rival or self.root}; those in {chosen} are read")
        return self.root / chosen

    def _relative(self, folder):
        """Return the path of a folder relative to root, with slashes; empty for root itself."""
        return "" if folder == self.root else folder.relative_to(self.root).as_posix()

    def _find_others(self, absent):
        """Find the files of photos that are not there under their names to the letter."""
        matches = {name: self.listing.match(name) for name in absent}
        found = {}
        for name, match in matches.items():
            here = [file for file in match.files
                    if folder_above(file, match.shared) == self._relative(self.folder)]
            files = here if len(here) == 1 else match.files
            if len(files) == 1 and self.listing.is_sure(match, files[0]):
                found[name] = files[0]
        clashes = self._find_clashes(found, matches)
        for name in absent:
            if name in clashes:
                file = found.pop(name)
                self.missing[name] = f"{name} and {clashes[name]} both found as {file}"
            elif name not in found:
                files = " or ".join(matches[name].files[:MOST_SHOWN])
                self.missing[name] = f"{name} found as {files}" if files else name
        self.others = {name: self.root / file for name, file in found.items()}
        if found:
            name, file = next(iter(found.items()))
            self.notes.append(
                f"{len(found):,} of the {len(self.names):,} photos are found under slightly "
                f"different names; for example, {name} is read from {file}")

    def _find_clashes(self, found, matches):
        """Find the names that fit the same file as another name, but seem to mean another photo,
        because their folders or their leading zeros differ. The beginning of an absolute path tells
        nothing.

        found: {name: file}. matches: {name: Match}. Returns {name: the other name}."""
        # {file: [(name, (its stem, those of its folders that the file lacks))]}
        claims = collections.defaultdict(list)
        for name, file in found.items():
            meaning = matches[name].spelling.stem, matches[name].foreign_folders()
            claims[file].append((name, meaning))
        for name in self.names if found else ():
            file = posixpath.normpath(posixpath.join(self._relative(self.folder), name))
            if name not in matches and file in claims:
                claims[file].append((name, (self.listing.spelling_of[file].stem, ())))
        clashes = {}
        for claim in claims.values():
            stems = {stem for _, (stem, _) in claim}
            folders = {folders for _, (_, folders) in claim}
            if () in folders:
                folders = {foreign for foreign in folders if not (foreign and is_absolute(foreign))}
            if len(stems) > 1 or len(folders) > 1:
                for name, meaning in claim:
                    others = [other for other, its in claim if its != meaning]
                    if name in found and others:
                        clashes[name] = others[0]
        return clashes


def is_file(folder, name):
    """Whether a folder holds a file. Unlike Path.is_file, this is False for a name that is too long
    for a file, as a caption in the wrong column is."""
    return os.path.isfile(os.path.join(folder, name))


def folder_above(file, levels):
    """Return the folder that is so many levels above the folder of a file; empty for the root."""
    return "/".join(file.split("/")[:-levels - 1])


def is_absolute(folders):
    """Whether the folders of a `Spelling` begin at a root, a drive or a protocol."""
    return not folders[0] or folders[0].endswith(":")


def size(photo):
    return photo.stat().st_size


def excerpt(photo):
    """Return EXCERPT bytes from the middle of a photo's file."""
    middle = size(photo) // 2
    start, path = middle, photo
    if isinstance(photo, TarMember):
        start, path = photo.offset + middle, photo.archive
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(min(EXCERPT, size(photo) - middle))


def digest(photo):
    return hashlib.sha256(photo.read_bytes()).digest()


def find_copies(photos, split_of):
    """Find the photos whose files have equal content, to the byte.

    photos: {name: Path or TarMember}, without those that are missing. split_of: {name: its split or
    None}; only photos of the same split count. Returns {name: the first name with this content},
    without the first names themselves. Only files of equal size are read."""
    keys = {name: (split_of[name],) for name in photos}
    for measure in (size, excerpt, lost_orientation, digest):  # one of two may have to be turned
        counts = collections.Counter(keys.values())
        longer = {}
        for name, key in keys.items():
            if counts[key] > 1:
                try:
                    value = measure(photos[name])
                except OSError:
                    continue  # a file that cannot be read is reported when it is decoded
                if value:  # empty files are not photos
                    longer[name] = (*key, value)
        keys = longer
    first, copies = {}, {}
    for name, key in keys.items():
        if first.setdefault(key, name) != name:
            copies[name] = first[key]
    return copies
