import unicodedata

import numpy as np
import pytest

from src.utils.tokenizers import (
    PAD_ID,
    BPETokenizer,
    CharTokenizer,
    build_tokenizer,
    different_pairs,
    normalize_text,
    number_texts,
    tokenizer_from_state,
)

tokenizer = CharTokenizer()
CAPTIONS = ["A dog runs .", "Two dogs run , a dog jumps .", "The dog 's ball", "A man runs"] * 2


def test_34_ids_with_padding():
    assert tokenizer.vocab_size == 34
    assert tokenizer.encode(tokenizer.vocabulary.strip()) == list(range(2, 34))
    assert tokenizer.encode("a b") == [2, 1, 3] and PAD_ID == 0


@pytest.mark.parametrize("text, expected", [
    ("A black dog .", "a black dog ."),
    ("  two \t spaces\n", "two spaces"),
    ("2 dogs & 10 cats", "two dogs and one zero cats"),
    ("caf\u00e9 na\u00efve \u00c5", "cafe naive a"),
    ("\u201cStop\u201d \u2013 it\u2019s", "'stop' - it's"),
    ("a dog; (brown) #1", "a dog brown one"),
    ("dog \U0001f415 \u72d7", "dog"),
])
def test_other_characters_are_replaced_or_dropped(text, expected):
    assert tokenizer.normalize(text) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_nothing_is_cut_and_padding_is_not_decoded():
    assert len(tokenizer.encode("x" * 5000)) == 5000
    assert tokenizer.decode([*tokenizer.encode("dog"), PAD_ID, PAD_ID]) == "dog"


@pytest.mark.parametrize("text", ["", "   ", "\u72d7 #*"])
def test_a_text_without_known_characters_is_refused(text):
    with pytest.raises(ValueError, match="no character"):
        tokenizer.encode(text)


def test_state_round_trip():
    assert tokenizer_from_state(tokenizer.state_dict()).encode("a dog") == tokenizer.encode("a dog")
    with pytest.raises(ValueError, match="not one of this version"):
        tokenizer_from_state({"name": "char", "vocabulary": "abc"})


def test_word_starts():
    starts = [tokenizer.word_start[i] for i in tokenizer.encode("a dog")]
    assert starts == [False, True, False, False, False] and len(tokenizer.word_start) == 34
    bpe = BPETokenizer.learn(CAPTIONS, 300)
    for text in ("a dog jumps", "zebras fly ."):
        assert sum(bpe.word_start[i] for i in bpe.encode(text)) == len(text.split())


def slow_bpe(texts, merges):
    """Learn merges the slow way: count all pairs again before each merge."""
    words = [
        [bytes([byte]) for byte in piece.encode()]
        for text in texts
        for piece in BPETokenizer.split(text.lower())
    ]
    id_of, learned = {bytes([byte]): byte + 1 for byte in range(256)}, []
    for new_id in range(257, 257 + merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        pair = min(counts, key=lambda pair: (-counts[pair], id_of[pair[0]], id_of[pair[1]]))
        learned.append((id_of[pair[0]], id_of[pair[1]]))
        id_of[b"".join(pair)] = new_id
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = [b"".join(pair)]
                i += 1
    return learned


def test_bpe_learns_the_same_merges_as_the_slow_way():
    assert BPETokenizer.learn(CAPTIONS, 257 + 20).merges == slow_bpe(CAPTIONS, 20)


def test_bpe_makes_tokens_of_frequent_words():
    bpe = BPETokenizer.learn(CAPTIONS, 1000)
    assert bpe.vocab_size < 1000  # it stopped because no pair was left that occurs twice
    assert len(bpe.encode("A dog runs .")) == 4 and len(bpe.encode("dog")) == 1
    # A word has the same token at the start of a caption and within it.
    assert bpe.encode("dog dog")[0] == bpe.encode("dog dog")[1]


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "  A  Dog ,\truns!!\n",
        "x" * 300,
        "caf\u00e9 \u72d7\U0001f415 1,000 $",
        "_ a__b _",
        "\u0130stanbul",
        "it's-'odd",
        "\x00\x7f",
        "\ud800",
    ],
)
def test_bpe_round_trip_of_any_text(text):
    for vocab_size in (257, 290):
        bpe = BPETokenizer.learn(CAPTIONS, vocab_size)
        ids = bpe.encode(text)
        assert bpe.decode([*ids, PAD_ID]) == bpe.normalize(text) and PAD_ID not in ids
        assert bpe.encode(bpe.decode(ids)) == ids and max(ids) < bpe.vocab_size == len(
            bpe.word_start
        )


def test_bpe_state_round_trip_and_refusals():
    bpe = BPETokenizer.learn(CAPTIONS, 300)
    same = tokenizer_from_state(bpe.state_dict())
    assert same.merges == bpe.merges and same.encode("a dog jumps") == bpe.encode("a dog jumps")
    with pytest.raises(ValueError, match="white space"):
        bpe.encode(" \n")
    with pytest.raises(ValueError, match="no room"):
        BPETokenizer.learn(CAPTIONS, 256)
    for state in (None, {"name": "bpe"}, {"name": "word", "merges": []}):
        with pytest.raises(ValueError, match="not one of this version"):
            tokenizer_from_state(state)


@pytest.mark.parametrize(
    "tokenizer, known, unknown",
    [
        (CharTokenizer(), ["a dog", "2", "日 x"], ["日本", "", "#"]),
        (
            BPETokenizer.learn(["a dog runs", "a dog sits"], 300),
            ["dog", "a 日", "xd"],
            ["日本", " ", "qqq"],
        ),
    ],
)
def test_texts_that_a_tokenizer_knows(tokenizer, known, unknown):
    assert all(map(tokenizer.knows, known)) and not any(map(tokenizer.knows, unknown))


FRENCH = ["Un caf\u00e9 tr\u00e8s noir", "Un caf\u00e9 pr\u00e8s d'un caf\u00e9 - noir"]


@pytest.mark.parametrize("text, same", [
    (FRENCH[0], unicodedata.normalize("NFD", FRENCH[0])),
    (FRENCH[0], FRENCH[0].replace(" ", "\u00a0")),
    (FRENCH[0], FRENCH[0].upper()),
    (FRENCH[0], "Un ca\u00adf\u00e9 tr\u200b\u00e8s noi\ufeffr"),
    ("red circle 12", "\uff32\uff45\uff44\u3000\uff43\uff49\uff52\uff43\uff4c\uff45 \uff11\uff12"),
    (FRENCH[1], FRENCH[1].replace("'", "\u2019").replace("-", "\u2013")),
    ('a "stop" sign', "a \u201cstop\u201d sign"),
    ("five \ufb01ve", "five five"),
    ("a \u2764 b", "a \u2764\ufe0f b"),
    (FRENCH[0], FRENCH[0].replace("f", "f\U000e0100")),
])
def test_texts_that_look_the_same_have_the_same_tokens(text, same):
    """Whichever of the two a tokenizer has learned from."""
    for captions in (FRENCH * 2, [unicodedata.normalize("NFD", caption) for caption in FRENCH] * 2):
        for name in ("char", "bpe"):
            learned = build_tokenizer(name, [*captions, "red circle five"])
            assert learned.encode(text) == learned.encode(same), name
            assert learned.knows(same)
    assert normalize_text(text) == normalize_text(same)


def test_the_merges_are_learned_from_normalized_texts():
    decomposed = [unicodedata.normalize("NFD", caption) for caption in FRENCH] * 3
    assert BPETokenizer.learn(decomposed, 400).merges == BPETokenizer.learn(FRENCH * 3, 400).merges
    assert len(BPETokenizer.learn(decomposed, 400).encode("caf\u00e9")) == 1


def test_a_normalized_text_stays_as_it_is():
    for number in range(0x30000):
        once = normalize_text(f"x{chr(number)}y")
        assert normalize_text(once) == once, hex(number)
    assert normalize_text("STRASSE & ASCII\t1") == "strasse & ascii 1"


@pytest.mark.parametrize("learned", [CharTokenizer(), BPETokenizer.learn(FRENCH * 2, 300)])
def test_a_run_of_an_earlier_version_keeps_the_tokens_that_it_has_learned(learned):
    """Its checkpoint does not say how texts are normalized, because they were not."""
    state = learned.state_dict()
    del state["nfkc"]
    old = tokenizer_from_state(state)
    soft_hyphen = "ca\u00adf\u00e9"
    assert old.encode("A dog's 2") == learned.encode("A dog's 2")
    assert old.encode(soft_hyphen) != learned.encode(soft_hyphen) == learned.encode("caf\u00e9")
    again = tokenizer_from_state(old.state_dict())
    assert again.encode(soft_hyphen) == old.encode(soft_hyphen)


def test_texts_are_numbered():
    texts = ["A dog", "a  dog", "a cat", "a dog .", "\uff41 \uff24og", "\ud800", "a dog!"]
    numbers = number_texts(texts).tolist()
    assert numbers[0] == numbers[1] == numbers[3] == numbers[4]
    assert sorted(set(numbers)) == [1, 2, 3, 4]
    assert number_texts(texts[:1]).tolist() == [1] and number_texts([]).tolist() == []


def test_pairs_of_photos_and_texts_are_there_once():
    photos, texts = different_pairs(np.array([2, 0, 2, 2]), np.array([3, 1, 3, 2]))
    assert photos.tolist() == [0, 2, 2] and texts.tolist() == [1, 2, 3]
