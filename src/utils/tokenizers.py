"""Tokenizers: text -> token ids.

Id 0 is padding. Both tokenizers have `vocab_size`, the number of ids with padding, and
`word_start`, a list that says for each id whether it begins a word.
"""
import collections
import hashlib
import heapq
import re
import unicodedata
from array import array

import numpy as np

PAD_ID = 0
NUM_BYTES = 256
VOCAB_SIZE = 4000  # ids of the byte-pair tokenizer, with padding and the bytes
# Quotes and dashes that word processors and phones type in place of the plain ones.
TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
# Invisible characters outside Unicode's category Cf: selectors of a variant, such as that which
# colours an emoji or those of Japanese names.
SELECTORS = {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), *range(0x180B, 0x1810), 0x34F}


def normalize_text(text):
    """Return a text in the one form that stands for all texts that look the same: lowercase, in
    Unicode's form NFKC, with plain quotes and dashes, without invisible characters such as soft
    hyphens, and with one space for each run of white space."""
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf"
                       and ord(c) not in SELECTORS)
        # A text in lowercase may have another form again, so it is normalized before and after.
        text = unicodedata.normalize("NFKC", text).translate(TYPOGRAPHY)
        text = unicodedata.normalize("NFKC", text.lower())
    return " ".join(text.lower().split())


def number_texts(texts):
    """Return a number for each text, from 1 to the number of different texts (M,). Texts are equal
    if `normalize_text` makes them equal, apart from a full stop at the end."""
    keys = array("Q")
    for text in texts:
        content = normalize_text(text).rstrip(" .").encode("utf-8", "surrogatepass")
        keys.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))
    return np.unique(np.frombuffer(keys, np.uint64), return_inverse=True)[1].astype(np.int64) + 1


def different_pairs(photo_of_caption, numbers):
    """Return the photos (P,) and the texts (P,) that belong together, sorted, each pair once.
    numbers: those of the captions, see `number_texts`."""
    most = numbers.max(initial=0) + 1
    pairs = np.unique(photo_of_caption * most + numbers)
    return pairs // most, pairs % most


class CharTokenizer:
    """One id for each of 33 characters: with padding, 34 ids.

    Text is normalized by `normalize_text`. Then accents are removed, a digit is spelled out
    ("2" -> "two") and "&" becomes "and". Any other character becomes a space, and runs of white
    space become one space.

    nfkc: False for a run of an earlier version, which has learned texts as they were.
    """

    name = "char"
    vocabulary = " abcdefghijklmnopqrstuvwxyz.,!?'-"
    words = "zero one two three four five six seven eight nine and".split()
    spelling = dict(zip("0123456789&", words))
    plain_characters = str.maketrans({
        "\u2018": "'", "\u2019": "'", '"': "'", "\u201c": "'", "\u201d": "'", "\u2013": "-",
        "\u2014": "-", "\u00df": "ss", "\u00e6": "ae", "\u00f8": "o", "\u0153": "oe"})

    def __init__(self, nfkc=True):
        self.nfkc = nfkc
        self.id_of = {character: i for i, character in enumerate(self.vocabulary, start=PAD_ID + 1)}
        self.word_start = [False] * self.vocab_size
        self.word_start[self.id_of[" "]] = True

    @property
    def vocab_size(self):
        return len(self.vocabulary) + 1

    def normalize(self, text):
        """Return the text as the model sees it, with only characters of the vocabulary."""
        if self.nfkc:
            text = normalize_text(text)
        text = unicodedata.normalize("NFKD", text.lower().translate(self.plain_characters))
        result = ""
        for character in text:
            if character in self.spelling:
                result += f" {self.spelling[character]} "
            elif not unicodedata.combining(character):
                result += character if character in self.id_of else " "
        return " ".join(result.split())

    def knows(self, text):
        """Return whether the text has a character of the vocabulary."""
        return bool(self.normalize(text))

    def encode(self, text):
        """Return the ids of a text as a list. Raises ValueError if the text has none."""
        ids = [self.id_of[character] for character in self.normalize(text)]
        if not ids:
            raise ValueError(f"the text {text[:80]!r} has no character that the char tokenizer "
                             "knows; --tokenizer bpe reads any text")
        return ids

    def decode(self, ids):
        """Return the text of ids. Decoding what was encoded gives `normalize` of the text."""
        return "".join(self.vocabulary[i - 1] for i in ids if i != PAD_ID)

    def state_dict(self):
        """Return what `tokenizer_from_state` makes the same tokenizer of."""
        return {"name": self.name, "vocabulary": self.vocabulary, "nfkc": self.nfkc}


def merge(ids, pair, new_id):
    """Replace each occurrence of a pair of ids in a list, from the left, by a new id."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


class BPETokenizer:
    """Byte-pair encoding (Sennrich, Haddow and Birch 2016).

    Ids 1 to 256 are the bytes of UTF-8, so any text has tokens. Id 257 + i is the pair of earlier
    ids `merges[i]`. Text is normalized by `normalize_text`; apart from that, decoding returns what
    was encoded.

    Text is split into pieces, each a run of letters and digits, or a run of other signs, together
    with the space before it. Nothing is merged across pieces.

    nfkc: False for a run of an earlier version, which has learned texts as they were, in lowercase.
    """

    name = "bpe"
    first_merged_id = NUM_BYTES + 1
    piece_pattern = re.compile(r" ?\w+| ?[^\w ]+")

    def __init__(self, merges, nfkc=True):
        self.nfkc = nfkc
        self.merges = [tuple(pair) for pair in merges]
        self.bytes_of = [b""] + [bytes([byte]) for byte in range(NUM_BYTES)]  # of each id
        for left, right in self.merges:
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.word_start = [token.startswith(b" ") for token in self.bytes_of]
        # The ids that occurred in the texts that the merges come from, but the space.
        merged_ids = {i for pair in self.merges for i in pair} - {ord(" ") + 1}
        self.learned_ids = merged_ids | set(range(self.first_merged_id, self.vocab_size))
        self.cache = {}  # the ids of each piece that was encoded: captions have few different ones

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learn a tokenizer: merge the most frequent pair of ids in the texts, again and again.

        Of equally frequent pairs, the one with the smaller ids is merged first. It ends with
        vocab_size ids, or when no pair occurs twice. Raises ValueError for a vocab_size below 257.
        """
        max_merges = vocab_size - cls.first_merged_id
        if max_merges < 0:
            raise ValueError(f"vocab_size={vocab_size} has no room for padding and the 256 bytes")
        counts = collections.Counter(piece for text in texts
                                     for piece in cls.split(normalize_text(text)))
        pieces = [(cls.byte_ids(piece), count) for piece, count in counts.items()]
        frequency = collections.Counter()  # of each pair
        pieces_with = collections.defaultdict(set)  # the indices of the pieces that hold a pair
        for i, (ids, count) in enumerate(pieces):
            for pair in zip(ids, ids[1:]):
                frequency[pair] += count
                pieces_with[pair].add(i)
        heap = [(-count, pair) for pair, count in frequency.items()]
        heapq.heapify(heap)
        merges = []
        while heap and len(merges) < max_merges:
            negative_count, pair = heapq.heappop(heap)
            if -negative_count != frequency[pair]:
                continue  # the frequency has changed since, and the heap has a newer entry
            if frequency[pair] < 2:
                break
            new_id = cls.first_merged_id + len(merges)
            merges.append(pair)
            changed = set()
            for i in pieces_with.pop(pair):
                ids, count = pieces[i]
                merged = merge(ids, pair, new_id)
                for old_pair in zip(ids, ids[1:]):
                    frequency[old_pair] -= count
                    changed.add(old_pair)
                for new_pair in zip(merged, merged[1:]):
                    frequency[new_pair] += count
                    pieces_with[new_pair].add(i)
                    changed.add(new_pair)
                pieces[i] = merged, count
            for pair in changed:
                if frequency[pair] > 0:
                    heapq.heappush(heap, (-frequency[pair], pair))
        return cls(merges)

    def knows(self, text):
        """Return whether any part of the text, apart from spaces, was in the texts that the
        tokenizer has learned from."""
        ids = (i for piece in self.split(self.normalize(text))
               for i in self._encode_piece(piece))
        return not self.learned_ids.isdisjoint(ids)

    @staticmethod
    def byte_ids(piece):
        # A lone surrogate, as a damaged file may hold, is encoded too.
        return [byte + 1 for byte in piece.encode("utf-8", "surrogatepass")]

    def normalize(self, text):
        """Return the text as decoding returns it."""
        return normalize_text(text) if self.nfkc else " ".join(text.lower().split())

    @classmethod
    def split(cls, text):
        """Return the pieces of a normalized text, within which ids are merged."""
        return cls.piece_pattern.findall(" " + text)

    @property
    def vocab_size(self):
        return len(self.bytes_of)

    def encode(self, text):
        """Return the ids of a text as a list. Raises ValueError for a text of white space."""
        ids = []
        for piece in self.split(self.normalize(text)):
            if piece not in self.cache:
                self.cache[piece] = self._encode_piece(piece)
            ids += self.cache[piece]
        if not ids:
            raise ValueError(f"the text {text[:80]!r} has no character but white space")
        return ids

    def _encode_piece(self, piece):
        """Merge the pairs of a piece in the order in which they were learned."""
        def rank(pair):
            return self.rank.get(pair, len(self.rank))

        ids = self.byte_ids(piece)
        while True:
            pair = min(zip(ids, ids[1:]), key=rank, default=None)
            if pair not in self.rank:
                return ids
            ids = merge(ids, pair, self.first_merged_id + self.rank[pair])

    def decode(self, ids):
        """Return the text of ids. Decoding what was encoded gives `normalize` of the text."""
        text = b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "surrogatepass")
        return text.removeprefix(" ")

    def state_dict(self):
        """Return what `tokenizer_from_state` makes the same tokenizer of."""
        return {"name": self.name, "merges": self.merges, "nfkc": self.nfkc}


def tokenizer_from_state(state):
    """Return the tokenizer whose state a checkpoint holds. Raises ValueError for another state."""
    if isinstance(state, dict):
        nfkc = state.get("nfkc", False)  # runs of earlier versions do not have it
        char = CharTokenizer(nfkc)
        if state | {"nfkc": nfkc} == char.state_dict():
            return char
        if state.get("name") == BPETokenizer.name and "merges" in state:
            return BPETokenizer(state["merges"], nfkc)
    raise ValueError("the checkpoint's tokenizer is not one of this version of the project: "
                     f"{state!r:.200}")


def build_tokenizer(name, captions):
    """Return the tokenizer "char", or "bpe", which is learned from the captions."""
    if name == CharTokenizer.name:
        return CharTokenizer()
    return BPETokenizer.learn(captions, VOCAB_SIZE)
