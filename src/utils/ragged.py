"""Many sequences of different lengths in one array.

The captions of a large dataset, and their token ids, take a fifth of the memory that a Python
object for each of them would take. This module must not import torch."""
from array import array

import numpy as np

HASH_CHUNK = 10_000  # sequences that are concatenated at a time in order to hash them


class Ragged:
    """Sequences of numbers. Sequence i is flat[starts[i]:starts[i] + lengths[i]].

    flat: an array of any numeric type. starts, lengths: arrays (N,). The sequences may lie in flat
    in any order, so that a selection of them can share the array."""

    def __init__(self, flat, starts, lengths):
        self.flat, self.starts, self.lengths = flat, starts, lengths

    @classmethod
    def from_sequences(cls, sequences, typecode):
        """Make it from an iterable of sequences, such as lists. typecode: the type of the numbers,
        as in the module `array`."""
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
        """Select sequences, in this order. The numbers are not copied."""
        return type(self)(self.flat, self.starts[rows], self.lengths[rows])

    def concatenated(self, rows):
        """Return the selected sequences, one after another, in one array."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        shifts = np.repeat(self.starts[rows] - (ends - lengths), lengths)
        return self.flat[shifts + np.arange(len(shifts))]

    def padded(self, rows, multiple=1):
        """Return the selected sequences as rows of an int64 array (B, L), padded with 0.

        L is the length of the longest, rounded up to a multiple of `multiple`."""
        lengths = self.lengths[rows]
        longest = -(-lengths.max() // multiple) * multiple
        out = np.zeros((len(lengths), longest), np.int64)
        out[np.arange(longest) < lengths[:, None]] = self.concatenated(rows)
        return out

    def update_hash(self, hasher):
        """Feed the lengths and the sequences to an object of `hashlib`. Equal sequences give equal
        hashes, in whichever order they lie in `flat`."""
        hasher.update(np.ascontiguousarray(self.lengths))
        for start in range(0, len(self), HASH_CHUNK):
            hasher.update(self.concatenated(slice(start, start + HASH_CHUNK)))

    def __add__(self, other):
        """Return these sequences followed by those of another object."""
        return type(self)(np.concatenate([self.flat, other.flat]),
                          np.concatenate([self.starts, other.starts + len(self.flat)]),
                          np.concatenate([self.lengths, other.lengths]))


class Texts(Ragged):
    """Strings, kept as UTF-8. A caption in JSON may contain a lone surrogate, which only
    "surrogatepass" can encode."""

    def __getitem__(self, i):
        return super().__getitem__(i).tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self):
        return (self[i] for i in range(len(self)))
