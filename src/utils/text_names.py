"""Which text belongs to which photo, by their names alone.

A photo NAME.jpg, or NAME.image.jpg, is matched with NAME.txt; or else with NAME.caption,
NAME.caption.txt, NAME.caption0.txt and so on, or NAME.jpg.txt; or else with one of these in other
capitals. A match needs exactly one text, or several with different numbers.

This module must not import torch."""
import collections
import os
import re
import unicodedata

from src.utils.tables import COLUMNS

# The words that may stand for "txt" in NAME.txt; the first one that a photo has counts. NAME.raw is
# rather a photo as the camera took it.
TEXT_WORDS = ("txt", *(word for word in COLUMNS["caption"] if word != "raw"), "cap", "prompt")
TEXT_NAME = re.compile(rf"(.+?)\.({'|'.join(TEXT_WORDS)})[_-]?(\d*)(?:\.txt)?", re.IGNORECASE)
# The words that NAME.image.jpg may have there, if other pictures belong to NAME as well.
PHOTO_WORDS = ("image", "img", "photo", "picture", "rgb", "jpg", "jpeg")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".webp", ".png")  # a photo is preferably one of these
FIELD = re.compile(r"[a-z_][\w.-]*", re.IGNORECASE)  # what may follow the first dot in webdataset


def first_dot(name):
    """Split a name, which may contain folders, at the first dot of its last part, as webdataset
    does: "a.b/c.image.jpg" -> ("a.b/c", "image.jpg")."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return folder + slash + key, field


def fold(name):
    """Return a name without the difference between capitals and small letters, and between the two
    ways in which Unicode writes an accent."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def natural(name):
    """A key for sorting, which puts a2 before a10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def text_keys(name):
    """Yield (key, word, number) for each way to read the name of a text.

    "a.caption0.txt" -> ("a", "caption", "0"). "a.en.txt" is read as ("a.en", "txt", "") and, with
    webdataset, as ("a", "en", "")."""
    match = TEXT_NAME.fullmatch(name)
    if match:
        yield match[1], match[2].lower(), match[3]
    key, field = first_dot(name)
    field = os.path.splitext(field)[0]
    if field and not (match and match[1] == key):
        word = field.rstrip("0123456789")
        yield key, word.rstrip("_-").lower(), field[len(word):]


def choose_texts(texts_of_word):
    """Choose among the texts of a key, {word: [(number, name)]}: those of the first of TEXT_WORDS
    that there is, or of any other word if it is the only one.

    Returns a list of names in the order of their numbers, which is empty if the choice is not
    clear."""
    words = [word for word in TEXT_WORDS if word in texts_of_word] or list(texts_of_word)
    if not words or (words[0] not in TEXT_WORDS and len(words) > 1):
        return []
    texts = dict(texts_of_word[words[0]])
    if len(texts) < len(texts_of_word[words[0]]):  # two have the same number, or none
        return []
    return [texts[number] for number in sorted(texts, key=natural)]


def photo_rank(name):
    """A key for sorting the pictures of one key, the one that is most likely the photo first."""
    field, suffix = os.path.splitext(first_dot(name)[1].lower())
    suffix = suffix or f".{field}"
    plain = first_dot(name)[0] == os.path.splitext(name)[0]
    return (not plain, field not in PHOTO_WORDS,
            PHOTO_SUFFIXES.index(suffix) if suffix in PHOTO_SUFFIXES else len(PHOTO_SUFFIXES))


def photo_keys(photos, folded):
    """Return {photo: [keys under which its text may stand, the closest first]}. folded: a function
    that is applied to the names."""
    photos_of_key = collections.defaultdict(list)
    for photo in photos:
        photos_of_key[folded(first_dot(photo)[0])].append(photo)
    keys_of_photo = {}
    for key, group in photos_of_key.items():
        ranks = [photo_rank(photo)[:2] for photo in group]
        for photo, rank in zip(group, ranks):
            keys_of_photo[photo] = [folded(photo), folded(os.path.splitext(photo)[0])]
            field = os.path.splitext(first_dot(photo)[1])[0]
            # "DSC.001.jpg" is not the photo of the key "DSC", and "a.depth.png" is not that of "a"
            # if there is "a.image.jpg".
            if FIELD.fullmatch(field) and rank == min(ranks) and ranks.count(rank) == 1:
                keys_of_photo[photo].append(key)
    return keys_of_photo


def match_texts(photos, texts):
    """Find the texts of photos by their names.

    photos, texts: names, which may contain folders. Returns {photo: [names of its texts]} for the
    photos that have any, in the order of `photos`."""
    texts = sorted(texts)  # so that NAME.txt comes after NAME.TXT
    plain = {os.path.splitext(text)[0]: text for text in texts if text.lower().endswith(".txt")}
    texts_of_photo = {photo: [plain[os.path.splitext(photo)[0]]]
                      for photo in photos if os.path.splitext(photo)[0] in plain}
    for folded in (str, fold):
        taken = {text for of_photo in texts_of_photo.values() for text in of_photo}
        remaining = [text for text in texts if text not in taken]
        if not remaining or len(texts_of_photo) == len(photos):
            break
        texts_of_key = collections.defaultdict(lambda: collections.defaultdict(list))
        for text in remaining:
            for key, word, number in text_keys(text):
                texts_of_key[folded(key)][word].append((number, text))
        for photo, keys in photo_keys(photos, folded).items():
            if photo not in texts_of_photo:
                found = (choose_texts(texts_of_key[key]) for key in keys if key in texts_of_key)
                found = next(filter(None, found), None)
                if found:
                    texts_of_photo[photo] = found
    return {photo: texts_of_photo[photo] for photo in photos if photo in texts_of_photo}
