"""Embeddings that were computed once, in files beside a run or in the cache folder of the user.

The files are only a cache. If they are damaged, they are replaced; if they are locked by another
program, or their folder cannot be written, the search works without them."""
import contextlib
import functools
import glob
import os
import secrets
import sqlite3
from pathlib import Path

import numpy as np
import torch

from src.utils import files
from src.utils.photo_files import version_of

READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"  # how SQLite begins a transaction
PHOTOS, TEXTS = "photos", "texts"  # the tables of items
FORMAT = 2  # of the files; to be raised when it changes


class CacheFile:
    """The files of a cache: one of vectors for each table, and one of SQLite that says whose they
    are.

    The tables PHOTOS and TEXTS hold one row per item. An item is a key with a version: the path of
    a photo with the file's size and modification time, or a text with an empty version. Its vector
    is the embedding and, for a run with a bank, the row of the bank's gallery, side by side as
    float32. The files of vectors are memory-mapped. They only grow, so that the vectors that
    another process has mapped do not change; the vector of an item that was deleted remains until
    there are other weights. The table `meta` holds the key of the weights that the vectors were
    computed with, their width, and a part of the names of their files.

    Every method opens the files and closes them again, so that any thread may call it.

    path: the SQLite file, which need not exist. weights: a string that identifies the weights.
    Vectors that were computed with other weights are ignored, and deleted by the next write."""

    def __init__(self, path, weights):
        self.path, self.weights = Path(path), f"{weights} {FORMAT}"
        self.failed = set()  # the kinds of transaction that failed once and are not tried again

    def read(self, table, items):
        """The rows of those of the items that are stored, {item: row}, and all vectors, a
        memory-mapped array (rows, width)."""
        items = list(items)

        def select(connection):
            if not self._holds_our_weights(connection):
                return {}, None
            # One query for all items is faster than one for each. The temporary table is in memory.
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("CREATE TEMP TABLE wanted (key BLOB, version TEXT)")
            connection.executemany("INSERT INTO wanted VALUES (?, ?)",
                                   ((_to_bytes(key), version) for key, version in items))
            # A CROSS JOIN goes through the first table and looks up the rows of the second.
            found = connection.execute("SELECT wanted.rowid - 1, row FROM wanted "
                                       f"CROSS JOIN {table} USING (key, version)")
            rows = {items[i]: row for i, row in found}
            path, shape = self._vectors(connection, table)
            # A private map is writable, as torch demands, but nothing is written to it.
            return rows, np.memmap(path, np.float32, "c", shape=shape) if rows else None

        return self._transaction(READ, select) or ({}, None)

    def write(self, table, items, vectors):
        """Store the vectors (N, width) of N items. One replaces that of another version of the same
        key."""
        outdated = []

        def insert(connection):
            if not self._holds_our_weights(connection):
                outdated.extend(self._files_of_vectors())
                self._create_tables(connection, vectors.shape[1])
            path, (start, width) = self._vectors(connection, table)
            with open(path, "r+b") as file:
                file.seek(start * width * vectors.itemsize)
                file.write(vectors.tobytes())
            # Only now do the rows exist, as part of the transaction.
            connection.executemany(
                f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",
                ((row, _to_bytes(key), version) for row, (key, version) in enumerate(items, start)))
            return True

        if self._transaction(WRITE, insert):
            _delete(outdated)

    def delete_missing_photos(self, existing):
        """Delete the rows of photos whose file is gone although its folder is still there. An
        unplugged drive takes the folder with it, so its rows stay, and so do those of photos in
        .tar files, which lie in no folder. existing: paths that need not be checked."""
        def select(connection):
            if not self._holds_our_weights(connection):
                return []
            return [_to_text(key) for key, in connection.execute(f"SELECT key FROM {PHOTOS}")]

        is_folder = functools.cache(os.path.isdir)
        paths = self._transaction(READ, select) or []
        gone = [path for path in paths if path not in existing and not os.path.exists(path)
                and is_folder(os.path.dirname(path))]

        def delete(connection):
            if self._holds_our_weights(connection):
                connection.executemany(f"DELETE FROM {PHOTOS} WHERE key = ?",
                                       ((_to_bytes(path),) for path in gone))

        if gone:
            self._transaction(WRITE, delete)

    def _transaction(self, begin, action):
        """Return action(connection), called inside one transaction, or None if the file is of no
        use. begin: READ or WRITE."""
        if begin in self.failed:
            return None
        try:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                # Do not wait for the disk. Only a power cut can then damage the files.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(begin)
                result = action(connection)
                connection.execute("COMMIT")
                return result
        except (sqlite3.OperationalError, OSError):  # locked, read-only, a full disk
            self.failed.add(begin)
        except sqlite3.DatabaseError:  # damaged, or not an SQLite file
            _delete([self.path, Path(f"{self.path}-journal"), *self._files_of_vectors()])
        return None

    def _holds_our_weights(self, connection):
        exists = "SELECT 1 FROM sqlite_master WHERE name = 'meta'"
        if connection.execute(exists).fetchone() is None:
            return False
        return connection.execute("SELECT weights FROM meta").fetchone() == (self.weights,)

    def _create_tables(self, connection, width):
        """Create empty tables in the place of those of other weights. The files of vectors get new
        names, since another process may still have mapped the old ones."""
        name = secrets.token_hex(4)
        for table in (PHOTOS, TEXTS):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute(f"CREATE TABLE {table} (row INTEGER PRIMARY KEY, key BLOB UNIQUE, "
                               "version TEXT)")
            self._file_of_vectors(table, name).touch()
        connection.execute("DROP TABLE IF EXISTS meta")
        connection.execute("CREATE TABLE meta (weights TEXT, width INTEGER, name TEXT)")
        connection.execute("INSERT INTO meta VALUES (?, ?, ?)", (self.weights, width, name))

    def _file_of_vectors(self, table, name):
        return self.path.with_name(f"{self.path.name}.{table}.{name}")

    def _files_of_vectors(self):
        name = glob.escape(self.path.name)
        return [path for table in (PHOTOS, TEXTS)
                for path in self.path.parent.glob(f"{name}.{table}.*")]

    def _vectors(self, connection, table):
        """The file of a table's vectors and its shape (rows, width). Raises sqlite3.DatabaseError
        if some of them are missing."""
        width, name = connection.execute("SELECT width, name FROM meta").fetchone()
        path = self._file_of_vectors(table, name)
        size = path.stat().st_size if path.exists() else -1
        rows = size // (width * np.dtype(np.float32).itemsize)
        needed, = connection.execute(f"SELECT COALESCE(MAX(row) + 1, 0) FROM {table}").fetchone()
        if rows < needed:
            raise sqlite3.DatabaseError(f"{path}: vectors are missing")
        return path, (rows, width)


class CachedEmbeddings:
    """The embeddings of items, and the rows of a bank's gallery, of one table of a `CacheFile`.

    What was computed is also held in memory, and what was read remains mapped, so that it is still
    there if the file fails.

    file: the CacheFile. table: PHOTOS or TEXTS. make_gallery: a function from embeddings (N, D) to
    the rows of the bank's gallery, or None for a run without a bank."""

    def __init__(self, file, table, make_gallery):
        self.file, self.table, self.make_gallery = file, table, make_gallery
        self.arrays = []  # of vectors
        self.places = {}  # {item: (its array, its row in there)}

    def missing(self, items):
        """The items, without repetitions, whose embeddings have to be computed."""
        unknown = [item for item in dict.fromkeys(items) if item not in self.places]
        if unknown:
            rows, vectors = self.file.read(self.table, unknown)
            self._keep(rows, vectors)
        return [item for item in unknown if item not in self.places]

    def add(self, items, embeddings):
        """Keep the embeddings (N, D) of N items."""
        vectors = embeddings
        if self.make_gallery is not None:
            vectors = torch.cat([embeddings, self.make_gallery(embeddings)], 1)
        vectors = vectors.numpy()
        self._keep({item: row for row, item in enumerate(items)}, vectors)
        self.file.write(self.table, items, vectors)

    def _keep(self, rows, vectors):
        """rows: {item: its row in the array `vectors`}."""
        if rows:
            self.places |= {item: (len(self.arrays), row) for item, row in rows.items()}
            self.arrays.append(vectors)

    def embeddings(self, items):
        """(N, D) of items that are not missing."""
        return self._select(items)[:, :self._latent_dim()]

    def gallery(self, items):
        """The bank's gallery rows, (N, D + 1), of items that are not missing."""
        return self._select(items)[:, self._latent_dim():]

    def _latent_dim(self):
        width = self.arrays[0].shape[1]
        return width if self.make_gallery is None else width // 2

    def _select(self, items):
        """The vectors of items as a tensor (N, width). They are copied only if they do not lie in
        this order in one array."""
        numbers, rows = np.array([self.places[item] for item in items]).T
        if (numbers != numbers[0]).any():
            vectors = np.stack([self.arrays[number][row] for number, row in zip(numbers, rows)])
        elif (np.diff(rows) == 1).all():
            vectors = self.arrays[numbers[0]][rows[0]:rows[0] + len(rows)]
        else:
            vectors = self.arrays[numbers[0]][rows]
        return torch.from_numpy(vectors)


def photo_item(path, real_folder=os.path.realpath):
    """The item of a photo file: its key and its version. Raises OSError if the file is missing.
    real_folder: os.path.realpath, or a version of it that remembers the folders it has seen."""
    # A photo in a .tar file has no `resolve` that would make its path absolute.
    key = str(path)
    if os.path.islink(key):
        key = os.path.realpath(key)
    else:
        folder, name = os.path.split(key)
        key = os.path.join(real_folder(folder), name)
    return key, " ".join(map(str, version_of(path)))


def _delete(paths):
    for path in paths:
        with contextlib.suppress(OSError):  # Windows deletes no file that is mapped
            files.delete(path)


def _to_bytes(key):
    """A path or a text as bytes. Unlike SQLite's TEXT, they can hold a name that is not UTF-8."""
    return key.encode("utf-8", "surrogatepass")


def _to_text(content):
    return content.decode("utf-8", "surrogatepass")
