"""Cache of decoded photos, memory-mapped.

A store keeps one row for each photo of a split: its pixels, or the features of a frozen encoder. It
consists of shards, files of SHARD_SIZE photos whose names change with the photos' files, so that a
changed photo is read anew."""
import collections
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src.utils import files
from src.utils.augment import resize
from src.utils.duplicates import SIGNATURE, signature
from src.utils.errors import DataError
from src.utils.photo_files import open_photo, version_of

log = logging.getLogger("flickr8k_sgd")
STORE_FOLDER = "photo_store"
STORE_VERSION = 6  # to be raised whenever a photo gets other pixels or another signature
SHARD_SIZE = 1000  # photos in a shard, and at most so many are lost when the program is killed
DIGEST_BYTES = 32  # of SHA-256
SECONDS_TO_BUILD = 3600  # an unfinished shard that is older has been abandoned



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


def map_ahead(pool, function, items, count):
    """Yield function(item) of each item, in order. The pool works on at most `count` items ahead of
    the one that is asked for, so that only so many results are in memory."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > count:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


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
    if path is not None and is_whole(path, num_bytes):
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
        if not is_whole(path, num_bytes):  # another process may have written it meanwhile
            files.replace(partial, path)
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the shard takes {num_bytes / 1e6:.0f} MB"
                        ) from None
    finally:
        if partial is not None:
            with contextlib.suppress(PermissionError):  # it is deleted later
                files.delete(partial)
    if len(content) != num_bytes:
        raise DataError(f"{path}: has {len(content):,} bytes instead of {num_bytes:,}; is the disk "
                        "full?")
    return content, {}


def is_whole(path, num_bytes):
    """Whether a file is there and has so many bytes."""
    return path.is_file() and path.stat().st_size == num_bytes


def partial_file(path):
    """Create an empty file beside a shard, which only this process writes. Return its path, or None
    if the shard is not kept or the folder cannot be written."""
    if path is None:
        return None
    partial = path.with_suffix(f".partial{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.touch()
    except OSError as error:
        say_that_nothing_is_kept(path.parent, error.strerror)
        return None
    return partial


@functools.cache  # once for each folder, not for each shard
def say_that_nothing_is_kept(folder, reason):
    log.info(f"{folder}: cannot be written ({reason}), so decoded photos are not kept there, and "
             "the next run decodes them again")


def files_of_store(root):
    """The files of the store in a dataset's folder, {name: bytes}."""
    files = {}
    with contextlib.suppress(OSError):  # there is none, or another process is deleting a file
        for path in (root / STORE_FOLDER).iterdir():
            files[path.name] = path.stat().st_size
    return files


def announce_store(root, files_before):
    """Say where decoded photos are kept and how much room they take, if some are new there.
    files_before: what `files_of_store` returned before they were read."""
    files = files_of_store(root)
    if files.keys() - files_before:
        megabytes = sum(files.values()) / 1e6
        log.info(f"{root / STORE_FOLDER}: decoded photos, or their features, are kept in this "
                 f"folder ({megabytes:,.1f} MB) for the next run; it may be deleted")


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
            with contextlib.suppress(PermissionError):  # on Windows another process has mapped it
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
    features is `PhotoFeatures` in `src/feature_store.py`."""

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
    versions = [(name, *version_of(path_of(name))) for name in names]
    key = store_key(row_format.key, versions)
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
