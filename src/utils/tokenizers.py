"""Text -> token ids. Id 0 is padding in every tokenizer."""
import unicodedata

PAD_ID = 0


class CharTokenizer:
    """One id a character, over 33 characters; with padding, 34 ids.

    The rule for everything else, in this order: capitals become small; accents are dropped (é -> e), and so are the
    typographic forms of quotes and dashes; a digit is spelled out ("2" -> "two"), "&" becomes "and"; whatever is still
    unknown becomes a space. Runs of white space become one space, and none is kept at either end. Nothing is cut.
    """

    name = "char"
    vocabulary = " abcdefghijklmnopqrstuvwxyz.,!?'-"
    spelled = dict(zip("0123456789&", "zero one two three four five six seven eight nine and".split()))
    plain = str.maketrans({"\u2018": "'", "\u2019": "'", '"': "'", "\u201c": "'", "\u201d": "'", "\u2013": "-",
                           "\u2014": "-", "\u00df": "ss", "\u00e6": "ae", "\u00f8": "o", "\u0153": "oe"})

    def __init__(self):
        self.id_of = {character: i for i, character in enumerate(self.vocabulary, start=PAD_ID + 1)}
        self.space_id = self.id_of[" "]

    @property
    def vocab_size(self):
        return len(self.vocabulary) + 1

    def normalize(self, text):
        """The text as the model sees it: only characters of the vocabulary."""
        text = unicodedata.normalize("NFKD", text.lower().translate(self.plain))
        text = "".join(c for c in text if not unicodedata.combining(c))
        text = "".join(f" {self.spelled[c]} " if c in self.spelled else c if c in self.id_of else " " for c in text)
        return " ".join(text.split())

    def encode(self, text):
        """str -> list of ids. Raises ValueError when nothing of the text is left."""
        ids = [self.id_of[character] for character in self.normalize(text)]
        if not ids:
            raise ValueError(f"the text {text!r} has no character that the tokenizer knows")
        return ids

    def decode(self, ids):
        """Ids -> str, padding left out; the inverse of encode up to `normalize`."""
        return "".join(self.vocabulary[i - 1] for i in ids if i != PAD_ID)

    def state_dict(self):
        """What a checkpoint holds, for `tokenizer_from_state`."""
        return {"name": self.name, "vocabulary": self.vocabulary}


def tokenizer_from_state(state):
    """The tokenizer of a checkpoint. Raises ValueError for one that this version does not know."""
    tokenizer = CharTokenizer()
    if state != tokenizer.state_dict():
        raise ValueError(f"the checkpoint's tokenizer is not known here: {state!r:.200}")
    return tokenizer
