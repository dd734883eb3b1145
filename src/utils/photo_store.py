"""What a file is made of once and kept: photos decoded, or encoded, into a store of shards that are
read by memory map."""
import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from src.utils.augment import resize
from src.utils.duplicates import SIGNATURE, signature
from src.utils.errors import DataError

STORE_FOLDER = "photo_store"
STORE_VERSION = 5  # to be raised with any change to what `load_photo` gives
SHARD_SIZE = 1000  # photos in a file of a store: what a kill costs
DIGEST_BYTES = 32  # of SHA-256
SECONDS_TO_BUILD = 3600  # a half-written shard that old is nobody's any more
# Pillow warns of odd tags and of pictures of over 89 megapixels, which are read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


def to_8_bits(photo):
    """A grey PIL image of more than 8 bits, or of floats -> of 8. Integers are scaled by as many
    bits as the brightest needs of 8, 10, 12, 14 and 16, for cameras store fewer in 16; floats, and
    integers beyond 16 bits, by their range. Raises ValueError where no pixel is finite."""
    values = np.asarray(photo, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("not one pixel is a finite number")
    low, high = finite.min(), finite.max()
    if photo.mode != "F" and low >= 0 and high < 2 ** 16:
        low, high = 0, next(2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2 ** bits)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    scaled[values == photo.info.get("transparency", np.nan)] = 1.0  # a PNG's transparent grey
    return Image.fromarray(np.rint(255 * scaled).astype(np.uint8))


def open_photo(path, size):
    """A photo file of any mode Pillow reads -> PIL image, RGB, upright by EXIF, what is transparent
    on white. JPEG is decoded to a smaller scale, no less than size, which is faster. Raises
    DataError with the file's name for one that is missing, empty, truncated or no image."""
    path = Path(path) if isinstance(path, str) else path
    try:
        with path.open("rb") as file, Image.open(file) as photo:
            photo.draft("RGB", (size, size))
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode in ("I", "F") or photo.mode.startswith("I;"):
                photo = to_8_bits(photo)
            if photo.has_transparency_data:
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            return photo.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except UnidentifiedImageError:
        fault = "not an image" if path.stat().st_size else "the file is empty"
        raise DataError(f"{path}: {fault}") from None
    except Exception as error:  # Pillow's decoders raise anything for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}") from None


def to_square(photo, size):
    """A PIL image, RGB -> uint8 array (size, size, 3), squeezed, so that no margin is lost."""
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    # Within one level of 255 of Pillow's bicubic filter, in a sixth of its time.
    square = resize(pixels, size, "bicubic")
    return square.permute(1, 2, 0).contiguous().numpy()


def load_photo(path, size):
    """A photo file -> uint8 array (3, size, size). Raises DataError as `open_photo` does: no photo
    becomes a blank one."""
    return to_square(open_photo(path, size), size).transpose(2, 0, 1)


@contextlib.contextmanager
def decoding_threads():
    """A pool of one thread for each core; Pillow decodes outside Python's lock. What is not begun
    when the block is left, by Ctrl-C for one, is not done."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def store_key(*parts):
    """A short name for what JSON can say, which changes with any of it."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_shard(path, num_bytes, write):
    """A file that is made once -> its bytes, an array, and what `write(file)`, which makes them,
    gives back: {name: fault}.

    path: None for one that is not kept. It is moved into place when it is whole and opened by
    memory map; nothing is kept where there are faults or the folder cannot be written. Raises
    DataError for a full disk."""
    partial = None
    if path is not None:
        if path.is_file() and path.stat().st_size == num_bytes:
            return np.memmap(path, np.uint8, "r"), {}
        try:
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(f".partial{os.getpid()}")
            partial.touch()
        except OSError:
            partial = None
    try:
        with io.BytesIO() if partial is None else open(partial, "w+b") as file:
            faults = write(file)
            if partial is None or faults:
                file.seek(0)
                return np.frombuffer(file.read(), np.uint8), faults
            file.flush()
            os.fsync(file.fileno())  # before the name points to the bytes
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the shard takes {num_bytes / 1e6:.0f} MB"
                        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return open_shard(path, num_bytes, write)


def delete_others(store, shards):
    """Delete the files of a store that are not among its shards: of other photos, or a kill's."""
    if store is None or not store.parent.is_dir():
        return
    current = {path.name for path in shards}
    for old in store.parent.glob(f"{store.name}_*"):
        age = time.time() - old.stat().st_mtime
        if old.name not in current and (".partial" not in old.name or age > SECONDS_TO_BUILD):
            old.unlink(missing_ok=True)


class Rows:
    """Arrays (n, ...), one after another, that are read as one tensor: `rows[some]`, by numbers, a
    slice or one number, copies some. They may lie in memory maps and be larger than memory. view:
    what is done to the tensor. chosen: (N,) the rows that there are, None for all."""

    device = torch.device("cpu")

    def __init__(self, parts, view=lambda rows: rows, chosen=None):
        self.parts, self.view = [np.asarray(part) for part in parts], view
        self.starts = np.cumsum([0, *map(len, parts)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        none = self[[]]
        self.shape, self.dtype = (len(self), *none.shape[1:]), none.dtype

    def __len__(self):
        return len(self.chosen)

    @property
    def nbytes(self):
        return len(self) * self.parts[0][:1].nbytes

    def part_of(self, rows):
        """The number of the part in which each of the rows lies."""
        return np.searchsorted(self.starts, self.chosen[rows], side="right") - 1

    def __getitem__(self, rows):
        if isinstance(rows, int):
            return self[[rows]][0]
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        parts = self.part_of(rows)
        for i, part, row in zip(range(len(rows)), parts, self.chosen[rows] - self.starts[parts]):
            out[i] = self.parts[part][row]
        return self.view(torch.from_numpy(out))

    def choose(self, rows):
        """-> those rows alone."""
        return Rows(self.parts, self.view, self.chosen[rows])

    def __add__(self, other):
        """These rows, then those of another of the same kind."""
        chosen = np.concatenate([self.chosen, other.chosen + self.starts[-1]])
        return Rows(self.parts + other.parts, self.view, chosen)


def read_photo(path, open_file, prepare):
    """-> (prepare(open_file(path)), (the file's SHA-256, the photo's signature), None), or (None,
    None, what is wrong)."""
    try:
        photo = open_file(path)
        known = hashlib.sha256(path.read_bytes()).digest(), signature(photo).tobytes()
        return prepare(photo), known, None
    except DataError as error:
        return None, None, str(error).removeprefix(f"{path.parent}{os.sep}")


class Pixels:
    """What a store keeps of a photo: its pixels, as `load_photo` gives them. Pretrained encoders
    have their own of this kind, for features; see `open_photo_store`."""

    dtype = np.uint8

    def __init__(self, size):
        self.shape, self.name, self.key = (size, size, 3), size, STORE_VERSION

    def rows(self, paths):
        """Yields what `read_photo` gives, for each path."""
        size = self.shape[0]

        def read(path):
            return read_photo(path, lambda path: open_photo(path, size),
                              lambda photo: to_square(photo, size))

        with decoding_threads() as pool:
            yield from pool.map(read, paths)

    @staticmethod
    def view(rows):  # channels last
        return rows.permute(0, 3, 1, 2)


def shard_path(store, kind, number, names, path_of):
    """The file of a store's shard, whose name changes with any change to its photos' files or to
    the kind."""
    stats = [(name, path_of(name).stat()) for name in names]
    key = store_key(kind.key, [(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    suffix = np.dtype(kind.dtype).name
    return store.with_name(f"{store.name}_{kind.name}_{number:05d}_{key}.{suffix}")


def open_photo_store(store, names, path_of, kind, progress=None):
    """Photos, read once -> what `kind` makes of them, such as uint8 (N, 3, size, size) by `Pixels`,
    as `Rows`; the SHA-256 of their files, an array (N, DIGEST_BYTES); their signatures, `Rows`; and
    {name: fault} of those that cannot be read, which are left out.

    store: path that the shards' names begin with, see `open_shard`, or None. path_of(name): where a
    photo lies. `progress(done, total)` is
    called as photos are read."""
    row_bytes = int(np.prod(kind.shape)) * np.dtype(kind.dtype).itemsize
    sizes = np.array([row_bytes, DIGEST_BYTES, np.prod(SIGNATURE)])
    paths, all_rows, digests, signatures, faults = [], [], [], [], {}
    for start in range(0, len(names), SHARD_SIZE):
        shard = names[start:start + SHARD_SIZE]

        def write(file, shard=shard, start=start):
            known, faults = [], {}
            rows = kind.rows([path_of(name) for name in shard])
            for done, (name, (row, of_file, fault)) in enumerate(zip(shard, rows), start=1):
                if fault:
                    faults[name] = fault
                else:
                    file.write(row.tobytes())
                    known.append(of_file)
                if progress:
                    progress(start + done, len(names))
            for part in zip(*known):
                file.write(b"".join(part))
            return faults

        path = None
        if store is not None:
            path = shard_path(store, kind, start // SHARD_SIZE, shard, path_of)
        content, found = open_shard(path, int(len(shard) * sizes.sum()), write)
        ends = np.cumsum(len(content) // sizes.sum() * sizes)
        all_rows.append(content[:ends[0]].view(kind.dtype).reshape(-1, *kind.shape))
        digests.append(content[ends[0]:ends[1]].reshape(-1, DIGEST_BYTES))
        signatures.append(content[ends[1]:].reshape(-1, *SIGNATURE))
        paths.append(path)
        faults |= found
    if store is not None:
        delete_others(store.with_name(f"{store.name}_{kind.name}"), paths)
    return Rows(all_rows, kind.view), np.concatenate(digests), Rows(signatures), faults
