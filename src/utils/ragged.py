"""Many texts or lists of numbers, in two arrays."""
from array import array

import numpy as np


class Ragged:
    """Sequences of unlike lengths, one after another in one array: the i-th is
    flat[offsets[i]:offsets[i + 1]]. A Python object each would take five times the memory."""

    def __init__(self, flat, offsets):
        self.flat, self.offsets = flat, offsets

    @classmethod
    def of(cls, sequences, typecode):
        """Iterable of sequences; typecode: that of the array module."""
        flat, offsets = array(typecode), array("q", [0])
        for sequence in sequences:
            flat.extend(sequence)
            offsets.append(len(flat))
        return cls(np.array(flat), np.array(offsets))

    @property
    def lengths(self):
        return np.diff(self.offsets)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.flat[self.offsets[i]:self.offsets[i + 1 if i != -1 else len(self)]]

    def take(self, rows):
        """Those of the rows, in their order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.empty(offsets[-1], self.flat.dtype)
        starts = self.offsets[:-1][rows]
        for start in range(0, len(lengths), 10_000):  # in parts: the numbers take eight bytes each
            part = slice(start, start + 10_000)
            first, last = offsets[start], offsets[min(start + 10_000, len(lengths))]
            shift = np.repeat(starts[part] - offsets[:-1][part], lengths[part])
            flat[first:last] = self.flat[np.arange(first, last) + shift]
        return type(self)(flat, offsets)

    def padded(self, rows, multiple=1):
        """Those of the rows -> int64 (B, longest, rounded up to a multiple), filled up with 0."""
        chosen = self.take(rows)
        longest = -(-chosen.lengths.max() // multiple) * multiple
        out = np.zeros((len(chosen), longest), np.int64)
        out[np.arange(longest) < chosen.lengths[:, None]] = chosen.flat
        return out

    def __add__(self, other):
        return type(self)(np.concatenate([self.flat, other.flat]),
                          np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]))


class Texts(Ragged):
    """Strings, kept as UTF-8."""

    def __getitem__(self, i):
        return super().__getitem__(i).tobytes().decode("utf-8", "surrogatepass")
