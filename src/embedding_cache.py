"""Embeddings that were computed once, in memory and in an SQLite file beside a run.

The file is only a cache. If it is damaged, it is replaced; if it is locked by another program, or
its folder cannot be written, the search works without it."""
import contextlib
import functools
import os
import sqlite3
from pathlib import Path

import numpy as np
import torch

READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"  # how SQLite begins a transaction
PHOTOS, TEXTS = "photos", "texts"  # the tables of rows


class CacheFile:
    """The SQLite file of a cache.

    The tables PHOTOS and TEXTS hold one row per item. An item is a key with a version: the path of
    a photo with the file's size and modification time, or a text with an empty version. A row
    holds the embedding and, for a run with a bank, the row of the bank's gallery, both as float32
    bytes. The table `meta` holds the key of the weights that the rows were computed with.

    Every method opens the file and closes it again, so that any thread may call it.

    path: the file, which need not exist. weights: a string that identifies the weights. Rows that
    were computed with other weights are ignored, and deleted by the next write."""

    def __init__(self, path, weights):
        self.path, self.weights = Path(path), weights
        self.failed = set()  # the kinds of transaction that failed once and are not tried again

    def read(self, table, items):
        """The stored rows of these items, as {item: (embedding, gallery row or None)}."""
        query = f"SELECT embedding, gallery FROM {table} WHERE key = ? AND version = ?"

        def select(connection):
            rows = {}
            if self._holds_our_weights(connection):
                for key, version in items:
                    row = connection.execute(query, (_to_bytes(key), version)).fetchone()
                    if row is not None:
                        rows[key, version] = tuple(map(_to_array, row))
            return rows

        return self._transaction(READ, select) or {}

    def write(self, table, rows):
        """Store rows, as `read` returns them. A row replaces another version of the same key."""
        def insert(connection):
            if not self._holds_our_weights(connection):
                self._create_tables(connection)
            connection.executemany(
                f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)",
                ((_to_bytes(key), version, embedding.tobytes(),
                  None if gallery is None else gallery.tobytes())
                 for (key, version), (embedding, gallery) in rows.items()))

        self._transaction(WRITE, insert)

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
                # Do not wait for the disk. Only a power cut can then damage the file.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(begin)
                result = action(connection)
                connection.execute("COMMIT")
                return result
        except sqlite3.OperationalError:  # locked, read-only, a full disk
            self.failed.add(begin)
        except sqlite3.DatabaseError:  # damaged, or not an SQLite file
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                Path(f"{self.path}-journal").unlink(missing_ok=True)
        return None

    def _holds_our_weights(self, connection):
        exists = "SELECT 1 FROM sqlite_master WHERE name = 'meta'"
        if connection.execute(exists).fetchone() is None:
            return False
        return connection.execute("SELECT weights FROM meta").fetchone() == (self.weights,)

    def _create_tables(self, connection):
        """Create empty tables in the place of those of other weights."""
        for table in (PHOTOS, TEXTS):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute(f"CREATE TABLE {table} (key BLOB PRIMARY KEY, version TEXT, "
                               "embedding BLOB, gallery BLOB)")
        connection.execute("DROP TABLE IF EXISTS meta")
        connection.execute("CREATE TABLE meta (weights TEXT)")
        connection.execute("INSERT INTO meta VALUES (?)", (self.weights,))


class CachedEmbeddings:
    """The embeddings of items, and the rows of a bank's gallery, of one table of a `CacheFile`.

    What was read or computed is also held in memory, so that it is still there if the file fails.

    file: the CacheFile. table: PHOTOS or TEXTS. make_gallery: a function from embeddings (N, D) to
    the rows of the bank's gallery, or None for a run without a bank."""

    def __init__(self, file, table, make_gallery):
        self.file, self.table, self.make_gallery = file, table, make_gallery
        self.rows = {}

    def missing(self, items):
        """The items, without repetitions, whose embeddings have to be computed."""
        unknown = [item for item in dict.fromkeys(items) if item not in self.rows]
        if unknown:
            self.rows |= self.file.read(self.table, unknown)
        return [item for item in unknown if item not in self.rows]

    def add(self, items, embeddings):
        """Keep the embeddings (N, D) of N items."""
        galleries = [None] * len(items)
        if self.make_gallery is not None:
            galleries = self.make_gallery(embeddings).numpy()
        rows = dict(zip(items, zip(embeddings.numpy(), galleries)))
        self.rows |= rows
        self.file.write(self.table, rows)

    def embeddings(self, items):
        """(N, D) of items that are not missing."""
        return torch.from_numpy(np.stack([self.rows[item][0] for item in items]))

    def gallery(self, items):
        """The bank's gallery rows, (N, D + 1), of items that are not missing."""
        return torch.from_numpy(np.stack([self.rows[item][1] for item in items]))


def _to_bytes(key):
    """A path or a text as bytes. Unlike SQLite's TEXT, they can hold a name that is not UTF-8."""
    return key.encode("utf-8", "surrogatepass")


def _to_text(content):
    return content.decode("utf-8", "surrogatepass")


def _to_array(content):
    return None if content is None else np.frombuffer(content, np.float32)
