"""Text -> token ids, 0 being padding. `word_start` says for each id whether it begins a word."""
import collections
import heapq
import re
import unicodedata

PAD_ID = 0
VOCAB_SIZE = 4000  # ids of the bpe tokenizer, padding and 256 bytes included


class CharTokenizer:
    """One id a character, over 33 characters; with padding, 34 ids. Capitals become small; accents
    and the typographic forms of quotes and dashes are dropped; a digit is spelled out ("2" ->
    "two"), "&" becomes "and"; the rest becomes a space. Runs of white space become one."""

    name = "char"
    vocabulary = " abcdefghijklmnopqrstuvwxyz.,!?'-"
    words = "zero one two three four five six seven eight nine and".split()
    spelled = dict(zip("0123456789&", words))
    plain = str.maketrans({
        "\u2018": "'", "\u2019": "'", '"': "'", "\u201c": "'", "\u201d": "'", "\u2013": "-",
        "\u2014": "-", "\u00df": "ss", "\u00e6": "ae", "\u00f8": "o", "\u0153": "oe"})

    def __init__(self):
        self.id_of = {character: i for i, character in enumerate(self.vocabulary, start=PAD_ID + 1)}
        self.word_start = [False] * self.vocab_size
        self.word_start[self.id_of[" "]] = True

    @property
    def vocab_size(self):
        return len(self.vocabulary) + 1

    def normalize(self, text):
        """The text as the model sees it: only characters of the vocabulary."""
        text = unicodedata.normalize("NFKD", text.lower().translate(self.plain))
        known = ""
        for c in text:
            if c in self.spelled:
                known += f" {self.spelled[c]} "
            elif not unicodedata.combining(c):
                known += c if c in self.id_of else " "
        return " ".join(known.split())

    def knows(self, text):
        return bool(self.normalize(text))

    def encode(self, text):
        """str -> list of ids. Raises ValueError when nothing of the text is left."""
        ids = [self.id_of[character] for character in self.normalize(text)]
        if not ids:
            raise ValueError(f"the text {text[:80]!r} has no character that the char tokenizer "
                             "knows; --tokenizer bpe reads any text")
        return ids

    def decode(self, ids):
        """Ids -> str, the inverse of encode up to `normalize`."""
        return "".join(self.vocabulary[i - 1] for i in ids if i != PAD_ID)

    def state_dict(self):
        return {"name": self.name, "vocabulary": self.vocabulary}


def merge(ids, pair, new):
    """Every occurrence of the pair in a list of ids, from the left, replaced by the id `new`."""
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016). Ids 1 to 256 are the bytes of UTF-8, so that any
    text has tokens; `merges[i]`, two earlier ids, is id 257 + i. Capitals become small and runs of
    white space one space; beyond that, decoding gives back what was encoded. A word carries the
    space before it; nothing is merged across words, or between letters and other signs."""

    name = "bpe"
    pieces = re.compile(r" ?\w+| ?[^\w ]+")

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.bytes_of = [b""] + [bytes([byte]) for byte in range(256)]
        for left, right in self.merges:
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.word_start = [token.startswith(b" ") for token in self.bytes_of]
        merged = {i for pair in self.merges for i in pair} - {ord(" ") + 1}
        self.learned = merged | set(range(257, self.vocab_size))
        self.cache = {}  # piece -> ids: captions have few different words

    @classmethod
    def learn(cls, texts, vocab_size):
        """Merge again and again the most frequent pair of the texts, of equals the one of smaller
        ids, until no pair occurs twice. Raises ValueError for a vocab_size below 257."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} has no room for padding and the 256 bytes")
        counts = collections.Counter(piece for text in texts for piece in cls.split(text))
        words = [(cls.byte_ids(piece), count) for piece, count in counts.items()]
        frequency, where = collections.Counter(), collections.defaultdict(set)
        for i, (ids, count) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                frequency[pair] += count
                where[pair].add(i)
        heap, merges = [(-count, pair) for pair, count in frequency.items()], []
        heapq.heapify(heap)
        while heap and len(merges) < vocab_size - 257:
            count, pair = heapq.heappop(heap)
            if -count != frequency[pair]:  # an old entry, a newer one is in the heap
                continue
            if -count < 2:
                break
            merges.append(pair)
            changed = set()
            for i in where.pop(pair):
                ids, count = words[i]
                merged = merge(ids, pair, 256 + len(merges))
                for old in zip(ids, ids[1:]):
                    frequency[old] -= count
                    changed.add(old)
                for new in zip(merged, merged[1:]):
                    frequency[new] += count
                    where[new].add(i)
                    changed.add(new)
                words[i] = merged, count
            for pair in changed:
                if frequency[pair] > 0:
                    heapq.heappush(heap, (-frequency[pair], pair))
        return cls(merges)

    def knows(self, text):
        """Whether any of it, spaces aside, was in the texts that the merges come from."""
        ids = (i for piece in self.split(text) for i in self._encode_piece(piece))
        return not self.learned.isdisjoint(ids)

    @staticmethod
    def byte_ids(piece):
        return [byte + 1 for byte in piece.encode("utf-8", "surrogatepass")]

    @staticmethod
    def normalize(text):
        """The text as decoding gives it back."""
        return " ".join(text.lower().split())

    @classmethod
    def split(cls, text):
        return cls.pieces.findall(" " + cls.normalize(text))

    @property
    def vocab_size(self):
        return len(self.bytes_of)

    def encode(self, text):
        """str -> list of ids. Raises ValueError for a text of white space only."""
        ids = []
        for piece in self.split(text):
            if piece not in self.cache:
                self.cache[piece] = self._encode_piece(piece)
            ids += self.cache[piece]
        if not ids:
            raise ValueError(f"the text {text[:80]!r} has no character but white space")
        return ids

    def _encode_piece(self, piece):
        def rank(pair):
            return self.rank.get(pair, len(self.rank))

        ids = self.byte_ids(piece)
        while True:
            first = min(zip(ids, ids[1:]), key=rank, default=None)
            if first not in self.rank:
                return ids
            ids = merge(ids, first, 257 + self.rank[first])

    def decode(self, ids):
        text = b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "surrogatepass")
        return text.removeprefix(" ")

    def state_dict(self):
        return {"name": self.name, "merges": self.merges}


def tokenizer_from_state(state):
    """The tokenizer of a checkpoint. Raises ValueError for one that is not known here."""
    if state == CharTokenizer().state_dict():
        return CharTokenizer()
    if isinstance(state, dict) and state.get("name") == BPETokenizer.name and "merges" in state:
        return BPETokenizer(state["merges"])
    raise ValueError(f"the checkpoint's tokenizer is not known here: {state!r:.200}")


def build_tokenizer(name, captions):
    """"char", or "bpe": byte pairs learned from the captions."""
    return CharTokenizer() if name == "char" else BPETokenizer.learn(captions, VOCAB_SIZE)
