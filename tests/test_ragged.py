"""Sequences of different lengths in one array."""
import hashlib

import numpy as np

from src.utils.ragged import Ragged, Texts


def digest(ragged):
    content = hashlib.sha256()
    ragged.update_hash(content)
    return content.hexdigest()


def test_sequences_are_read_selected_and_concatenated():
    ragged = Ragged.from_sequences([[9], [5, 6, 7], [], [8]], "H")
    assert len(ragged) == 4
    assert [ragged[i].tolist() for i in range(4)] == [[9], [5, 6, 7], [], [8]]
    selected = ragged.take(np.array([3, 1]))
    assert selected.flat is ragged.flat
    assert [selected[i].tolist() for i in range(2)] == [[8], [5, 6, 7]]
    assert ragged.concatenated([3, 2, 1]).tolist() == [8, 5, 6, 7]
    both = selected + ragged
    assert [both[i].tolist() for i in range(6)] == [[8], [5, 6, 7], [9], [5, 6, 7], [], [8]]


def test_sequences_are_padded_to_the_longest_or_to_a_multiple():
    ragged = Ragged.from_sequences([[9], [5, 6, 7], [8]], "H")
    assert ragged.padded([1, 2]).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert ragged.padded([2, 1], 4).tolist() == [[8, 0, 0, 0], [5, 6, 7, 0]]


def test_the_hash_depends_on_the_sequences_and_not_on_how_they_are_stored():
    ragged = Ragged.from_sequences([[1, 2], [3], [4, 5]], "H")
    selected = ragged.take(np.array([2, 0]))
    assert digest(selected) == digest(Ragged.from_sequences([[4, 5], [1, 2]], "H"))
    assert digest(selected) != digest(ragged)
    # The same numbers in all, but other sequences.
    assert digest(ragged) != digest(Ragged.from_sequences([[1], [2, 3], [4, 5]], "H"))


def test_texts_are_strings():
    strings = ["a dog", "", "caf\u00e9 \U0001f415", "\ud800"]  # the last one is a lone surrogate
    texts = Texts.from_sequences([text.encode("utf-8", "surrogatepass") for text in strings], "B")
    assert list(texts) == strings
    assert list(texts.take(np.array([2, 0]))) == [strings[2], strings[0]]
