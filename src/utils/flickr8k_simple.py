"""Flickr8k on disk -> photos, captions, splits, batches. Two layouts:

    the official archives'                           Kaggle's copy
    Flicker8k_Dataset/*.jpg   (spelled so)           Images/*.jpg
    Flickr8k.token.txt                               captions.txt   (CSV: image,caption)
    Flickr_8k.{train,dev,test}Images.txt             the same three, which that copy lacks

The text files lie at the root or in Flickr8k_text/.
"""
import collections
import csv
import hashlib
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt")
PHOTO_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images")
STORE_FOLDER = "photo_store"
STORE_VERSION = 3  # to be raised with any change to what `load_photo` gives
SECONDS_TO_BUILD = 3600  # a half-written store that old is nobody's any more
GPU_SHARE = 0.5  # photos stay on the GPU if they take no more than this share of its free memory
TEXT_BUCKET = 16  # a batch's text is as long as a multiple of this: few shapes
# What Pillow raises for files that it cannot read:
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class DataError(Exception):
    """The dataset is missing, incomplete or damaged; the message says what and where."""


def find_text_file(root_dir, name):
    """Path of a text file at the root or in Flickr8k_text/, None where there is none."""
    for folder in (Path(root_dir), Path(root_dir) / "Flickr8k_text"):
        if (folder / name).is_file():
            return folder / name
    return None


def find_photo_folder(root_dir):
    """Path of the photos' folder. Raises DataError where there is none."""
    for name in PHOTO_FOLDERS:
        if (Path(root_dir) / name).is_dir():
            return Path(root_dir) / name
    raise DataError(f"{root_dir}: no folder of photos, none of {', '.join(PHOTO_FOLDERS)}")


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
    rows = csv.reader(lines, strict=True)
    try:
        if [column.strip().lower() for column in next(rows, [])] != ["image", "caption"]:
            raise DataError(f"{path}, line 1: expected the header 'image,caption', "
                            f"found {lines[0][:80]!r}")
        for row in filter(None, rows):
            cells = [cell.strip() for cell in row]
            if len(cells) != 2 or not all(cells):
                raise DataError(f"{path}, line {rows.line_num}: expected 'image,caption', "
                                f"found {','.join(row)[:80]!r}")
            captions.setdefault(cells[0], []).append(cells[1])
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error})") from None
    return captions


def find_caption_file(root_dir):
    """Path of the captions, of either layout. Raises DataError where there are none."""
    if not Path(root_dir).is_dir():
        raise DataError(f"no Flickr8k in {root_dir}. Either fetch it: python download_flickr8k.py "
                        f"--data_dir {root_dir}\nor train on the built-in shapes: python "
                        "train_flickr8k_sgd.py --synthetic")
    for name in CAPTION_FILES:
        path = find_text_file(root_dir, name)
        if path is not None:
            return path
    raise DataError(f"{root_dir}: no captions, neither {CAPTION_FILES[0]} nor {CAPTION_FILES[1]}")


def read_split(root_dir, split):
    """The photos' file names of "train", "val" or "test", in the split file's order. Raises
    DataError where that is missing, empty or lists a photo twice."""
    path = find_text_file(root_dir, SPLIT_FILES[split])
    if path is None:
        raise DataError(f"{root_dir}: {SPLIT_FILES[split]} is missing. `python "
                        "download_flickr8k.py --text_only` (2 MB) brings it.")
    names = [line.strip() for line in _read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no photos")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: lists {name} twice")
    return names


def open_photo(path, size):
    """A photo file of any mode Pillow reads -> PIL image, RGB, upright by EXIF. JPEG is decoded to
    a smaller scale, no less than size, which is faster. Raises DataError with the file's name for
    one that is missing, empty, truncated or no image."""
    try:
        with Image.open(path) as photo:
            photo.draft("RGB", (size, size))
            ImageOps.exif_transpose(photo, in_place=True)
            if "transparency" in photo.info:
                photo = photo.convert("RGBA")
            return photo.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except UnidentifiedImageError:
        fault = "not an image" if os.path.getsize(path) else "the file is empty"
        raise DataError(f"{path}: {fault}") from None
    except PILLOW_ERRORS as error:
        raise DataError(f"{path}: {error}") from None


def load_photo(path, size):
    """A photo file -> uint8 array (3, size, size), squeezed to a square, so that no margin is lost.
    Raises DataError as `open_photo` does: no photo becomes a blank one."""
    pixels = torch.from_numpy(np.array(open_photo(path, size))).permute(2, 0, 1)
    # Pillow's own bicubic to within one level of 255, in a sixth of its time.
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].numpy()


def store_path(store, folder, names, size):
    """Where the photo store of these files lies; any change to them or to the size changes it."""
    found = [(name, (folder / name).stat()) for name in names]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    key = hashlib.sha256(json.dumps([STORE_VERSION, size, stats]).encode()).hexdigest()[:16]
    return Path(f"{store}_{key}.uint8")


def open_photo_store(store, folder, names, size, num_workers=0, progress=None):
    """Photos of a folder, decoded once -> uint8 (N, 3, size, size), and {name: fault} of those that
    cannot be read, which are left out.

    store: path of the cache less its key, or None. The cache is moved into place when it is whole
    and opened by memory map; nothing is cached where a photo has a fault or the folder cannot be
    written. num_workers: threads that decode, 0 for one a core. `progress(done, total)` is called
    as photos are decoded. Raises DataError for a full disk."""
    def as_photos(content):  # channels last
        return content.view(-1, size, size, 3).permute(0, 3, 1, 2)

    path, partial, num_bytes = None, None, len(names) * 3 * size * size
    if store is not None:
        path = store_path(store, folder, names, size)
        if path.is_file() and path.stat().st_size == num_bytes:
            return as_photos(torch.from_file(str(path), size=num_bytes, dtype=torch.uint8)), {}
        try:
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(f".partial{os.getpid()}")
            partial.touch()
        except OSError:
            path = partial = None
    try:
        with io.BytesIO() if partial is None else open(partial, "w+b") as file:
            faults = _decode(file, folder, names, size, num_workers, progress)
            if path is None or faults:
                file.seek(0)
                content = np.frombuffer(bytearray(file.read()), np.uint8)
                return as_photos(torch.from_numpy(content)), faults
            file.flush()
            os.fsync(file.fileno())  # before the name points to the bytes
        for old in path.parent.glob(f"{Path(store).name}_*"):  # of other files, or a kill's
            if old.suffix == ".uint8" or time.time() - old.stat().st_mtime > SECONDS_TO_BUILD:
                old.unlink(missing_ok=True)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the photo store takes "
                        f"{num_bytes / 1e6:.0f} MB") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return open_photo_store(store, folder, names, size)


def _decode(file, folder, names, size, num_workers, progress):
    """Write the photos one after the other -> {name: fault} of those left out."""
    def decode(name):
        try:
            return load_photo(folder / name, size).transpose(1, 2, 0).tobytes(), None
        except DataError as error:
            return b"", str(error).removeprefix(f"{folder}{os.sep}")

    faults = {}
    pool = ThreadPoolExecutor(num_workers or os.cpu_count())  # Pillow decodes outside Python's lock
    try:
        for done, (name, (photo, fault)) in enumerate(zip(names, pool.map(decode, names)), start=1):
            file.write(photo)
            if fault:
                faults[name] = fault
            if progress:
                progress(done, len(names))
    finally:
        pool.shutdown(cancel_futures=True)
    return faults


class Flickr8kImageTextDataset:
    """One split of Flickr8k as photo-caption pairs, each photo decoded once (`open_photo_store`).

    `photos` (N, 3, image_size, image_size), uint8, and `names` stand in the split file's order;
    `captions` (strings), `texts` (token ids) and `photo_of_caption` (M,) in the caption file's.

    Raises DataError when a photo is missing, cannot be read or has no captions; with
    `allow_incomplete`, such photos are left out and listed in `left_out`. `cache` keeps the decoded
    photos in a file under root_dir."""

    def __init__(self, root_dir, split, image_size, tokenizer, allow_incomplete=False, cache=True,
                 num_workers=0, progress=None):
        root_dir = Path(root_dir)
        caption_file, photo_folder = find_caption_file(root_dir), find_photo_folder(root_dir)
        captions_of = read_captions(caption_file)
        names = read_split(root_dir, split)
        self.split, self.root_dir, self.allow_incomplete = split, root_dir, allow_incomplete
        self.left_out = []

        names = self._without(names, "missing", set(names) - set(os.listdir(photo_folder)))
        names = self._without(names, "without captions", set(names) - captions_of.keys())
        store = root_dir / STORE_FOLDER / f"{split}_{image_size}" if cache else None
        self.photos, unreadable = open_photo_store(
            store, photo_folder, names, image_size, num_workers, progress)
        self.names = self._without(names, "unreadable", unreadable)
        if not self.names:
            raise DataError(f"{root_dir}: not one photo of {split} is usable")

        self.captions = [caption for name in self.names for caption in captions_of[name]]
        counts = torch.tensor([len(captions_of[name]) for name in self.names])
        self.photo_of_caption = torch.arange(len(self.names)).repeat_interleave(counts)
        self.texts = []
        for caption, photo in zip(self.captions, self.photo_of_caption.tolist()):
            try:
                self.texts.append(torch.tensor(tokenizer.encode(caption)))
            except ValueError as error:
                raise DataError(f"{caption_file}, {self.names[photo]}: {error}") from None

    def _without(self, names, fault, faulty):
        """The names less the faulty ones, {name} or {name: what is wrong}, if that is allowed."""
        found = [name for name in names if name in faulty]
        if found and not self.allow_incomplete:
            said = [faulty[name] if isinstance(faulty, dict) else name for name in found]
            more = f" and {len(said) - 3} more" if len(said) > 3 else ""
            raise DataError(
                f"{self.root_dir} is incomplete: {len(found)} of the {len(names)} photos of "
                f"{self.split} are {fault} ({', '.join(said[:3])}{more}).\n`python "
                "download_flickr8k.py` mends it; --allow_incomplete trains without them.")
        self.left_out += found
        return [name for name in names if name not in faulty]

    def __len__(self):
        return len(self.captions)

    def counts(self):
        """What config.json says of the split; "captions_per_photo" is {captions: photos}."""
        captions = torch.bincount(self.photo_of_caption)
        photos = dict(enumerate(torch.bincount(captions).tolist()))
        return {"photos": len(self.names), "pixels": self.photos.shape[-1], "captions": len(self),
                "left_out": len(self.left_out),
                "captions_per_photo": {str(k): n for k, n in photos.items() if n}}


def epoch_batches(photo_of_caption, captions_per_image, batch_size, seed):
    """One epoch's batches, a list of lists of pairs, in an order that follows from the seed.

    The captions of a photo stand side by side in groups of captions_per_image, drawn anew each
    epoch; a photo with fewer captions gives them all. What fills no group, and the groups that fill
    no batch at the end, sit this epoch out: all batches have one shape, batch_size //
    captions_per_image groups, at least one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photo_of_caption), generator=generator)
    order = order[torch.argsort(photo_of_caption[order], stable=True)]  # by photo, then shuffled
    groups = []
    for captions in order.split(torch.bincount(photo_of_caption).tolist()):
        whole = min(captions_per_image, len(captions))
        groups += [group for group in captions.split(captions_per_image) if len(group) == whole]
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    groups_a_batch = min(max(1, batch_size // captions_per_image), len(groups))
    starts = range(0, len(groups) - groups_a_batch + 1, groups_a_batch)
    return [torch.cat([groups[i] for i in shuffled[start:start + groups_a_batch]]).tolist()
            for start in starts]


def place_photos(photos, device):
    """The photos, moved to a GPU if they take no more than GPU_SHARE of its free memory."""
    if device.type == "cuda" and photos.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return photos.to(device)
    return photos


def iterate_batches(data, photos, batches, device):
    """Lists of pairs (see `epoch_batches`) -> batches on the device; for a GPU, the next is
    prepared while one is in use. photos: `data.photos`, or a copy of them. A batch is a dict of
    - "images": uint8 (P, 3, H, W), a photo being there once for its captions
    - "photo_ids": (P,) their rows in `data.photos`
    - "text": (B, L), padded to a multiple of TEXT_BUCKET
    - "photo_of_pair": (B,) from 0 to P - 1, rising: the photo of each caption"""
    def prepare(pairs):
        photo_ids, photo_of_pair = torch.unique_consecutive(data.photo_of_caption[pairs],
                                                            return_inverse=True)
        batch = {"photo_ids": photo_ids, "photo_of_pair": photo_of_pair,
                 "text": pad_texts([data.texts[i] for i in pairs], TEXT_BUCKET)}
        if photos.device.type == "cpu":
            batch["images"] = photos[photo_ids]
        if device.type == "cuda":  # the host need not wait for a copy from pinned memory
            with torch.cuda.device(device):  # else pinning in this thread would touch the first GPU
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        return batch if "images" in batch else batch | {"images": photos[batch["photo_ids"]]}

    if device.type == "cpu":  # where a thread would take more from the step than a batch costs
        yield from map(prepare, batches)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for pairs in batches:
            prepared, ahead = ahead, pool.submit(prepare, pairs)
            if prepared:
                yield prepared.result()
        if ahead:
            yield ahead.result()


def pad_texts(texts, multiple=1):
    """List of (L,) -> (B, longest L, rounded up to a multiple), filled up with padding, 0."""
    text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return F.pad(text, (0, -text.shape[1] % multiple))
