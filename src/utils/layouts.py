"""Flickr8k on disk -> where its photos lie, captions, splits. Two layouts:

    the official archives'                           Kaggle's copy
    Flicker8k_Dataset/*.jpg   (spelled so)           Images/*.jpg
    Flickr8k.token.txt                               captions.txt   (CSV: image,caption)
    Flickr_8k.{train,dev,test}Images.txt             the same three, which that copy lacks

The text files lie at the root or in Flickr8k_text/, the photos in a folder of one of these names,
in any capitals, or in one such folder within another."""
import collections
import csv
import re
import shlex
from pathlib import Path

SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt")
PHOTO_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images")


class DataError(Exception):
    """The dataset is missing, incomplete or damaged; the message says what and where."""


def download_command(root_dir, *flags):
    return shlex.join(["python", "download_flickr8k.py", *flags, "--data_dir", str(root_dir)])


def find_text_file(root_dir, name):
    """Path of a text file at the root or in Flickr8k_text/, None where there is none. Raises
    DataError where there is no root."""
    if not Path(root_dir).is_dir():
        fetch = download_command(root_dir)
        raise DataError(f"no Flickr8k in {root_dir}. Either fetch it: {fetch}\n"
                        "or train on the built-in shapes: python train_flickr8k_sgd.py --synthetic")
    for folder in (Path(root_dir), Path(root_dir) / "Flickr8k_text"):
        if (folder / name).is_file():
            return folder / name
    return None


def find_photo_folder(root_dir, names):
    """Path of the folder that holds most of the photos of these names. Raises DataError where
    there is no folder of photos."""
    order = [name.lower() for name in PHOTO_FOLDERS]

    def folders_in(folder):
        found = [path for path in folder.iterdir()
                 if path.name.lower() in order and path.is_dir()]
        return sorted(found, key=lambda path: order.index(path.name.lower()))

    folders = folders_in(Path(root_dir))
    folders += [inner for folder in folders for inner in folders_in(folder)]
    if not folders:
        raise DataError(f"{root_dir}: no folder of photos, none of {', '.join(PHOTO_FOLDERS)}")
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))


def _read_lines(path):
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # -sig: a byte order mark or none
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_captions(path):
    """Caption file, either layout -> {photo's file name: [captions, in the file's order]}, whether
    or not a split lists the photo. Raises DataError with the file and line for a line that does not
    parse."""
    captions, lines = {}, _read_lines(path)
    if path.name != "captions.txt":
        for number, line in enumerate(lines, start=1):
            match = re.fullmatch(r"([^\t]+)#\d+\t\s*(\S.*)", line.rstrip())
            if match:
                captions.setdefault(match[1], []).append(match[2])
            elif line.strip():
                raise DataError(f"{path}, line {number}: expected 'photo.jpg#0<tab>caption', "
                                f"found {line[:80]!r}")
        return captions
    rows = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        if [column.strip().lower() for column in next(rows, [])] != ["image", "caption"]:
            raise DataError(f"{path}, line 1: expected the header 'image,caption', "
                            f"found {lines[0][:80]!r}")
        for row in filter(None, rows):
            cells = [cell.strip() for cell in row]
            if len(cells) != 2 or not all(cells):
                raise DataError(f"{path}, line {rows.line_num}: expected 'image,caption', "
                                f"found {','.join(row)[:80]!r}")
            captions.setdefault(cells[0], []).append(" ".join(cells[1].split()))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error})") from None
    return captions


def place_of_caption(path, name, caption):
    """"captions.txt, line 12, photo.jpg" for a message; without the line for a caption of several.
    """
    for number, line in enumerate(_read_lines(path), start=1):
        if name in line and caption in line:
            return f"{path}, line {number}, {name}"
    return f"{path}, {name}"


def find_caption_file(root_dir):
    """Path of the captions, of either layout. Raises DataError where there are none."""
    for name in CAPTION_FILES:
        path = find_text_file(root_dir, name)
        if path is not None:
            return path
    raise DataError(f"{root_dir}: no captions, neither {CAPTION_FILES[0]} nor {CAPTION_FILES[1]}")


def read_split(root_dir, split):
    """The photos' file names of "train", "val" or "test", in the split file's order; one may begin
    with a folder of its own, as in sub/photo.jpg. Raises DataError where that file is missing,
    empty or lists a photo twice."""
    path = find_text_file(root_dir, SPLIT_FILES[split])
    if path is None:
        raise DataError(f"{root_dir}: {SPLIT_FILES[split]} is missing. "
                        f"`{download_command(root_dir, '--text_only')}` (2 MB) brings it.")
    names = [line.strip() for line in _read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no photos")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: lists {name} twice")
    return names
