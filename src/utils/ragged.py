"""Many texts or lists of numbers in a few arrays."""
from array import array

import numpy as np

HASHED = 10_000  # sequences that `update_hash` takes at a time


class Ragged:
    """Sequences of unlike lengths in one array: the i-th is flat[starts[i]:starts[i] + lengths[i]].
    A Python object each would take five times the memory."""

    def __init__(self, flat, starts, lengths):
        self.flat, self.starts, self.lengths = flat, starts, lengths

    @classmethod
    def of(cls, sequences, typecode):
        """Iterable of sequences; typecode: that of the array module."""
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
        """Those of the rows, in their order, in the same array."""
        return type(self)(self.flat, self.starts[rows], self.lengths[rows])

    def joined(self, rows):
        """Those of the rows, one after another."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        places = np.repeat(self.starts[rows] - (ends - lengths), lengths)
        return self.flat[places + np.arange(len(places))]

    def padded(self, rows, multiple=1):
        """Those of the rows -> int64 (B, longest, rounded up to a multiple), filled up with 0."""
        lengths = self.lengths[rows]
        longest = -(-lengths.max() // multiple) * multiple
        out = np.zeros((len(lengths), longest), np.int64)
        out[np.arange(longest) < lengths[:, None]] = self.joined(rows)
        return out

    def update_hash(self, hasher):
        """By the sequences and their lengths."""
        hasher.update(np.ascontiguousarray(self.lengths))
        for start in range(0, len(self), HASHED):
            hasher.update(self.joined(slice(start, start + HASHED)))

    def __add__(self, other):
        return type(self)(np.concatenate([self.flat, other.flat]),
                          np.concatenate([self.starts, other.starts + len(self.flat)]),
                          np.concatenate([self.lengths, other.lengths]))


class Texts(Ragged):
    """Strings, kept as UTF-8."""

    def __getitem__(self, i):
        return super().__getitem__(i).tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self):
        return (self[i] for i in range(len(self)))
