import pytest

from src.utils.tokenizers import PAD_ID, CharTokenizer, tokenizer_from_state

tokenizer = CharTokenizer()


def test_34_ids_with_padding():
    assert tokenizer.vocab_size == 34
    assert tokenizer.encode(tokenizer.vocabulary.strip()) == list(range(2, 34))
    assert tokenizer.encode("a b") == [2, 1, 3] and PAD_ID == 0


@pytest.mark.parametrize("text, seen", [
    ("A black dog .", "a black dog ."),
    ("  two \t spaces\n", "two spaces"),
    ("2 dogs & 10 cats", "two dogs and one zero cats"),
    ("caf\u00e9 na\u00efve \u00c5", "cafe naive a"),
    ("\u201cStop\u201d \u2013 it\u2019s", "'stop' - it's"),
    ("a dog; (brown) #1", "a dog brown one"),
    ("dog \U0001f415 \u72d7", "dog"),
])
def test_rule_for_other_characters(text, seen):
    assert tokenizer.normalize(text) == seen
    assert tokenizer.decode(tokenizer.encode(text)) == seen


def test_nothing_is_cut_and_padding_is_not_decoded():
    assert len(tokenizer.encode("x" * 5000)) == 5000
    assert tokenizer.decode([*tokenizer.encode("dog"), PAD_ID, PAD_ID]) == "dog"


@pytest.mark.parametrize("text", ["", "   ", "\u72d7 #*"])
def test_refuses_a_text_of_which_nothing_is_left(text):
    with pytest.raises(ValueError, match="no character"):
        tokenizer.encode(text)


def test_state_round_trip():
    assert tokenizer_from_state(tokenizer.state_dict()).encode("a dog") == tokenizer.encode("a dog")
    with pytest.raises(ValueError, match="not known here"):
        tokenizer_from_state({"name": "char", "vocabulary": "abc"})
