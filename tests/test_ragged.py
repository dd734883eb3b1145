from src.utils.ragged import Ragged, Texts


def test_rows_are_padded_to_the_longest_or_to_a_multiple():
    sequences = Ragged.from_sequences([[9], [5, 6, 7], [8]], "H")
    assert sequences.padded([1, 2]).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert sequences.padded([2, 1], 4).tolist() == [[8, 0, 0, 0], [5, 6, 7, 0]]


def test_texts_can_be_selected_and_added():
    texts = Texts.from_sequences([text.encode() for text in ("a dog", "", "\u72d7")], "B")
    assert list(texts) == ["a dog", "", "\u72d7"]
    both = texts.take([2, 0]) + texts.take([0])
    assert list(both) == ["\u72d7", "a dog", "a dog"]
    assert len(both) == 3
