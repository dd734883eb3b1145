"""Ragged arrays: many texts, or many lists of token ids, kept in a few NumPy arrays.

A million Python strings or lists would take several times the memory of these arrays."""
from array import array

import numpy as np

HASHED = 10_000  # sequences that `update_hash` concatenates at a time


class Ragged:
    """N sequences of different lengths, one after another in one array. Sequence i is
    flat[starts[i]:starts[i] + lengths[i]]."""

    def __init__(self, flat, starts, lengths):
        self.flat, self.starts, self.lengths = flat, starts, lengths

    @classmethod
    def from_sequences(cls, sequences, typecode):
        """Make one from an iterable of sequences of integers. typecode: the type of the integers,
        as in Python's array module."""
        flat, lengths = array(typecode), array("i")
        for sequence in sequences:
            flat.extend(sequence)
            lengths.append(len(sequence))
        lengths = np.array(lengths, np.int32)
        return cls(np.frombuffer(flat, flat.typecode), np.cumsum(lengths) - lengths, lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        start = self.starts[i]
        return self.flat[start:start + self.lengths[i]]

    def take(self, rows):
        """The sequences of these rows, in this order. The array `flat` is shared, not copied."""
        return type(self)(self.flat, self.starts[rows], self.lengths[rows])

    def concatenate(self, rows):
        """The sequences of these rows, one after another, as one array."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        shifts = np.repeat(self.starts[rows] - (ends - lengths), lengths)
        return self.flat[shifts + np.arange(len(shifts))]

    def padded(self, rows, multiple=1):
        """The sequences of B rows, padded with 0, as int64 (B, L). L is the length of the longest,
        rounded up to a multiple of `multiple`."""
        lengths = self.lengths[rows]
        longest = -(-lengths.max() // multiple) * multiple
        out = np.zeros((len(lengths), longest), np.int64)
        out[np.arange(longest) < lengths[:, None]] = self.concatenate(rows)
        return out

    def update_hash(self, hasher):
        """Feed the lengths and the sequences to a hash of hashlib."""
        hasher.update(np.ascontiguousarray(self.lengths))
        for start in range(0, len(self), HASHED):
            hasher.update(self.concatenate(slice(start, start + HASHED)))

    def __add__(self, other):
        """These sequences followed by those of another ragged array."""
        return type(self)(np.concatenate([self.flat, other.flat]),
                          np.concatenate([self.starts, other.starts + len(self.flat)]),
                          np.concatenate([self.lengths, other.lengths]))


class Texts(Ragged):
    """A ragged array of strings, stored as UTF-8."""

    def __getitem__(self, i):
        return super().__getitem__(i).tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self):
        return (self[i] for i in range(len(self)))
