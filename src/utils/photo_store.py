"""Cache of decoded photos, memory-mapped, and how a photo file is decoded.

A store keeps one row for each photo of a split: its pixels, or the features of a frozen encoder. It
consists of shards, files of SHARD_SIZE photos whose names change with the photos' files, so that a
changed photo is read anew."""
import contextlib
import hashlib
import io
import json
import os
import re
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from src.utils.augment import resize
from src.utils.duplicates import SIGNATURE, signature
from src.utils.errors import DataError

STORE_FOLDER = "photo_store"
STORE_VERSION = 6  # to be raised whenever a photo gets other pixels or another signature
SHARD_SIZE = 1000  # photos in a shard, and at most so many are lost when the program is killed
DIGEST_BYTES = 32  # of SHA-256
SECONDS_TO_BUILD = 3600  # an unfinished shard that is older has been abandoned
JPEG_START = b"\xff\xd8\xff"
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
# Pillow warns of odd tags and of pictures above 89 megapixels, but it reads them.
warnings.filterwarnings("ignore", module=r"PIL\.")


def to_8_bits(photo):
    """Convert a grey PIL image of more than 8 bits, or of floats, to 8 bits.

    Cameras store 10, 12 or 14 bits in 16, so integers are scaled by the fewest bits, of 8, 10, 12,
    14 and 16, that the brightest pixel needs. Floats, and integers beyond 16 bits, are scaled by
    their range. Raises ValueError if no pixel is finite."""
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


class PlainJpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG of which nothing but the picture is read, and which may have any size."""

    def _read_dpi_from_exif(self):  # raises for some odd resolutions
        pass


def open_plain_jpeg(file, size):
    """Open a JPEG at a smaller scale, see `open_photo`, whatever is odd in its EXIF.

    Decoding may take as much memory as Pillow's limit of pixels permits to any JPEG. Raises
    DecompressionBombError if it would take more."""
    photo = PlainJpeg(file)
    file.seek(-4 - 2 * photo.layers, os.SEEK_CUR)  # to the header of the first scan
    several_scans = "progressive" in photo.info or file.read(1)[0] != photo.layers
    coefficients = 0
    if several_scans:  # then the decoder keeps all coefficients, whatever the scale
        samples = [across * down for _, across, down, _ in photo.layer]
        coefficients = photo.width * photo.height * sum(samples) / max(samples)
    photo.draft("RGB", (size, size))
    pixels = photo.width * photo.height
    limit = 2 * (Image.MAX_IMAGE_PIXELS or np.inf)
    # Pillow takes 4 bytes per pixel, and the decoder 2 per coefficient, of which a pixel has 3.
    if pixels > limit or 4 * pixels + 2 * coefficients > (4 + 2 * 3) * limit:
        raise Image.DecompressionBombError
    return photo


def open_reduced(file, size):
    """Open a picture as Image.open does, a JPEG at a smaller scale, see `open_photo`. A JPEG that
    Image.open refuses, because of its size or of odd EXIF, is opened all the same."""
    try:
        photo = Image.open(file)
    except Exception as error:  # odd EXIF raises any exception
        file.seek(0)
        if file.read(len(JPEG_START)) != JPEG_START:
            raise
        file.seek(0)
        try:
            return open_plain_jpeg(file, size)
        except SyntaxError:
            raise error from None
    photo.draft("RGB", (size, size))
    return photo


def orientation_of(photo):
    """Return EXIF's orientation of a photo that is loaded, 1 to 8, or None if none is found."""
    orientation = None
    with contextlib.suppress(Exception):  # odd EXIF raises any exception
        orientation = photo.getexif().get(ExifTags.Base.Orientation)
    if orientation is None:
        # Pillow stops at the first tag that is odd, so the tags of the first directory are read
        # here, each of 12 bytes.
        with contextlib.suppress(struct.error, KeyError, TypeError):
            exif = re.sub(b"^(Exif\0\0)*", b"", photo.info.get("exif"))
            order = {b"II": "<", b"MM": ">"}[exif[:2]]
            directory, = struct.unpack_from(f"{order}I", exif, 4)
            count, = struct.unpack_from(f"{order}H", exif, directory)
            for i in range(count):
                tag, kind, _, value = struct.unpack_from(
                    f"{order}HHIH", exif, directory + 2 + 12 * i)
                if tag == ExifTags.Base.Orientation and kind == 3:  # an integer of 16 bits
                    return value
    return orientation


def turn_upright(photo):
    """Return a photo turned as EXIF says. Unlike ImageOps.exif_transpose, this does not write the
    EXIF anew, which fails for odd tags."""
    photo.load()  # a TIFF is turned while it is loaded
    orientation = orientation_of(photo)
    method = None
    with contextlib.suppress(TypeError):  # not even hashable
        method = TRANSPOSE_OF_ORIENTATION.get(orientation)
    return photo if method is None else photo.transpose(method)


def open_photo(path, size):
    """Open a photo file of any mode that Pillow reads. Return a PIL image in RGB.

    The photo is turned upright according to EXIF, and its transparent parts become white. A JPEG is
    decoded at a smaller scale, which is faster, but not below `size` pixels. Raises DataError, with
    the name of the file, if it is missing, empty, truncated, too large or not an image."""
    path = Path(path) if isinstance(path, str) else path
    try:
        with path.open("rb") as file, open_reduced(file, size) as photo:
            photo = turn_upright(photo)
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
    except Image.DecompressionBombError:
        megapixels = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise DataError(f"{path}: the picture has more than {megapixels:.0f} megapixels, and only "
                        "JPEGs are read at a smaller scale, unless they are progressive; please "
                        "save it smaller") from None
    except Exception as error:  # for a damaged file, Pillow's decoders raise any exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}") from None


def to_square(photo, size):
    """Resize a PIL image in RGB to a uint8 array (size, size, 3). The photo is squeezed rather than
    cropped, so that nothing at the margins is lost."""
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    # Within one level of 255 of Pillow's bicubic filter, in a sixth of its time.
    square = resize(pixels, size, "bicubic")
    return square.permute(1, 2, 0).contiguous().numpy()


def load_photo(path, size):
    """Read a photo file as a uint8 array (3, size, size).

    Raises DataError as `open_photo` does: a photo that cannot be read never becomes a blank one."""
    return to_square(open_photo(path, size), size).transpose(2, 0, 1)


@contextlib.contextmanager
def decoding_threads():
    """A pool of one thread per core. Pillow releases Python's lock while it decodes. If the block
    is left early, for instance by Ctrl-C, work that has not begun is dropped."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def store_key(*parts):
    """Return a short hash of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_shard(path, num_bytes, write):
    """Open a shard, and write it first if it is not there.

    path: its file, or None for a shard that is not kept. write(file): writes the num_bytes bytes of
    the shard and returns {name: error message} of the photos that it had to leave out. The file is
    renamed into place when it is complete, and is memory-mapped. A shard with errors is not kept,
    nor is one whose folder cannot be written.

    Returns the bytes as an array, and the errors. Raises DataError if the disk is full."""
    if path is not None and path.is_file() and path.stat().st_size == num_bytes:
        return np.memmap(path, np.uint8, "r"), {}
    partial = partial_file(path)
    try:
        with io.BytesIO() if partial is None else open(partial, "w+b") as file:
            errors = write(file)
            if partial is None or errors:
                file.seek(0)
                return np.frombuffer(file.read(), np.uint8), errors
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points to them
        os.replace(partial, path)
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the shard takes {num_bytes / 1e6:.0f} MB"
                        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    if len(content) != num_bytes:
        raise DataError(f"{path}: has {len(content):,} bytes instead of {num_bytes:,}; is the disk "
                        "full?")
    return content, {}


def partial_file(path):
    """Create an empty file beside a shard, which only this process writes. Return its path, or None
    if the shard is not kept or the folder cannot be written."""
    if path is None:
        return None
    partial = path.with_suffix(f".partial{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.touch()
    except OSError:
        return None
    return partial


def delete_other_shards(store, shards):
    """Delete the files of a store that are not among its shards: those of other photos, and those
    that a killed process has left unfinished. Another process may be doing the same."""
    if store is None or not store.parent.is_dir():
        return
    current = {path.name for path in shards}
    for old in store.parent.glob(f"{store.name}_*"):
        if old.name in current:
            continue
        try:
            age = time.time() - old.stat().st_mtime
        except FileNotFoundError:
            continue
        if ".partial" not in old.name or age > SECONDS_TO_BUILD:
            old.unlink(missing_ok=True)


class Rows:
    """Arrays (n, ...), one after the other, that are read like one tensor. They may be memory maps,
    whose sum is larger than the memory.

    `rows[selection]`, with row numbers, a slice or one number, copies the selected rows into a
    tensor. view: a function applied to that tensor. chosen: (N,) the rows that exist; None for
    all."""

    device = torch.device("cpu")

    def __init__(self, parts, view=lambda rows: rows, chosen=None):
        self.parts, self.view = [np.asarray(part) for part in parts], view
        self.starts = np.cumsum([0, *map(len, parts)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        empty = self[[]]
        self.shape, self.dtype = (len(self), *empty.shape[1:]), empty.dtype

    def __len__(self):
        return len(self.chosen)

    @property
    def nbytes(self):
        """The bytes of the chosen rows."""
        return int(np.prod(self.shape)) * self.parts[0].dtype.itemsize

    def part_of(self, rows):
        """The number of the part in which each of these rows lies."""
        return np.searchsorted(self.starts, self.chosen[rows], side="right") - 1

    def __getitem__(self, rows):
        if isinstance(rows, int):
            return self[[rows]][0]
        rows = self._row_numbers(rows)
        out = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        parts = self.part_of(rows)
        rows_in_parts = self.chosen[rows] - self.starts[parts]
        for i, (part, row) in enumerate(zip(parts, rows_in_parts)):
            out[i] = self.parts[part][row]
        return self.view(torch.from_numpy(out))

    def choose(self, rows):
        """Return these rows alone, as `Rows`."""
        return Rows(self.parts, self.view, self.chosen[self._row_numbers(rows)])

    def _row_numbers(self, rows):
        """Return the row numbers that a slice, a list, an array or a tensor selects, as an
        array."""
        if isinstance(rows, slice):
            return np.arange(len(self))[rows]
        return np.asarray(rows, np.int64)

    def __add__(self, other):
        """Return these rows followed by those of another store of the same row format."""
        chosen = np.concatenate([self.chosen, other.chosen + self.starts[-1]])
        return Rows(self.parts + other.parts, self.view, chosen)


def read_photo(path, open_file, prepare):
    """Read one photo.

    Returns (prepare(open_file(path)), (SHA-256 of the file, signature of the photo), None), or
    (None, None, error message) if the photo cannot be read."""
    try:
        photo = open_file(path)
        identity = hashlib.sha256(path.read_bytes()).digest(), signature(photo).tobytes()
        return prepare(photo), identity, None
    except DataError as error:
        return None, None, str(error).removeprefix(f"{path.parent}{os.sep}")


class Pixels:
    """The row format of a store of decoded photos: pixels, as `load_photo` gives them. That of
    features is `PhotoFeatures` in `src/pretrained.py`."""

    dtype = np.uint8

    def __init__(self, size):
        self.shape, self.name, self.key = (size, size, 3), size, STORE_VERSION

    def rows(self, paths):
        """Yield what `read_photo` returns for each path."""
        size = self.shape[0]

        def read(path):
            return read_photo(path, lambda path: open_photo(path, size),
                              lambda photo: to_square(photo, size))

        with decoding_threads() as pool:
            yield from pool.map(read, paths)

    @staticmethod
    def view(rows):  # the rows are stored with channels last
        return rows.permute(0, 3, 1, 2)


def shard_path(store, row_format, number, names, path_of):
    """Return the path of a store's shard. Its name changes with the photos' files and the row
    format."""
    stats = [(name, path_of(name).stat()) for name in names]
    key = store_key(row_format.key, [(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    suffix = np.dtype(row_format.dtype).name
    return store.with_name(f"{store.name}_{row_format.name}_{number:05d}_{key}.{suffix}")


def open_photo_store(store, names, path_of, row_format, progress=None):
    """Open the store of these photos, and make it first where it is not there.

    store: the path that the names of its shards begin with, or None for one that is not kept.
    path_of(name): where a photo lies. row_format: `Pixels` or `PhotoFeatures`.
    `progress(done, total)` is called while photos are read.

    Returns the rows as `Rows`, such as uint8 (N, 3, size, size); the SHA-256 of the photos' files,
    an array (N, DIGEST_BYTES); their signatures as `Rows`; and {name: error message} of photos that
    cannot be read and have no row."""
    row_bytes = int(np.prod(row_format.shape)) * np.dtype(row_format.dtype).itemsize
    sizes = np.array([row_bytes, DIGEST_BYTES, np.prod(SIGNATURE)])
    paths, all_rows, digests, signatures, errors = [], [], [], [], {}
    for start in range(0, len(names), SHARD_SIZE):
        shard = names[start:start + SHARD_SIZE]

        def write(file, shard=shard, start=start):
            identities, shard_errors = [], {}
            rows = row_format.rows([path_of(name) for name in shard])
            for done, (name, (row, identity, error)) in enumerate(zip(shard, rows), start=1):
                if error:
                    shard_errors[name] = error
                else:
                    file.write(row.tobytes())
                    identities.append(identity)
                if progress:
                    progress(start + done, len(names))
            for part in zip(*identities):  # all digests, then all signatures
                file.write(b"".join(part))
            return shard_errors

        path = None
        if store is not None:
            path = shard_path(store, row_format, start // SHARD_SIZE, shard, path_of)
        content, shard_errors = open_shard(path, int(len(shard) * sizes.sum()), write)
        ends = np.cumsum(len(content) // sizes.sum() * sizes)
        rows = content[:ends[0]].view(row_format.dtype)
        all_rows.append(rows.reshape(-1, *row_format.shape))
        digests.append(content[ends[0]:ends[1]].reshape(-1, DIGEST_BYTES))
        signatures.append(content[ends[1]:].reshape(-1, *SIGNATURE))
        paths.append(path)
        errors |= shard_errors
    if store is not None:
        delete_other_shards(store.with_name(f"{store.name}_{row_format.name}"), paths)
    return Rows(all_rows, row_format.view), np.concatenate(digests), Rows(signatures), errors
