"""Near-duplicates: how to tell that two photo files show the same picture.

The signature of a photo consists of two thumbnails, one of the whole photo and one without its
margin. As in the difference hash (dHash), the differences between neighbouring cells are compared,
but in colour and with their size, not only their sign, so that flat areas hardly count."""
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GRID = 8  # rows and columns of a thumbnail
MARGINS = (0.0, 0.05)
SIGNATURE = (len(MARGINS), GRID, GRID, 3)  # uint8
SAME = 0.85  # the least cosine of copies; among seven thousand Flickr photos, two pairs reach it
REDUCED = 64  # pixels of the side to which a photo is reduced first
CHUNK_SIZE = 2000  # photos compared at a time
# The names of Flickr's files: the number of the photo, a secret, and perhaps a size. Flickr30k has
# kept the number alone.
FLICKR_NAME = re.compile(r"([1-9]\d{6,11})(_[0-9a-f]{10}(_[a-z])?)?")


def signature(photo):
    """Return the signature of a PIL image in RGB, a uint8 array of shape SIGNATURE."""
    small = photo.resize((REDUCED, REDUCED), Image.Resampling.BILINEAR)
    thumbnails = []
    for margin in MARGINS:
        low, high = REDUCED * margin, REDUCED * (1 - margin)
        thumbnails.append(small.resize((GRID, GRID), Image.Resampling.BILINEAR,
                                       (low, low, high, high)))
    return np.stack(thumbnails)


def differences(thumbnails):
    """Return the differences between the neighbouring cells of thumbnails (N, GRID, GRID, 3), as
    vectors (N, D) of unit length. Their square roots are taken, so that no single strong edge
    dominates."""
    across, down = thumbnails.diff(dim=2), thumbnails.diff(dim=1)
    both = torch.cat([across.flatten(1), down.flatten(1)], 1)
    return F.normalize(both.sign() * both.abs().sqrt(), dim=1)


def near_duplicates(signatures, others):
    """Find, for each of N photos, the one of M others that it is a copy of.

    signatures, others: (N, *SIGNATURE) and (M, *SIGNATURE). Either photo may have been compressed,
    resized, made brighter or darker, mirrored, and cropped at the margins. Returns an array (N,) of
    the rows of the others, with -1 for a photo that is not a copy."""
    others = torch.as_tensor(others).float()
    # The others (M photos) are followed by their mirror images, so there are 2 M columns.
    other_whole, other_inner = [differences(torch.cat([thumbnails, thumbnails.flip(2)])).T
                                for thumbnails in others.unbind(1)]
    copy_of = []
    for start in range(0, len(signatures), CHUNK_SIZE):
        chunk = torch.as_tensor(signatures[start:start + CHUNK_SIZE]).float()
        whole, inner = map(differences, chunk.unbind(1))
        cosine = torch.maximum(whole @ other_whole, whole @ other_inner)
        cosine = torch.maximum(cosine, inner @ other_whole)
        highest, row = cosine.max(1)
        copy_of.append(torch.where(highest >= SAME, row % len(others), -1))
    return torch.cat(copy_of).numpy()


def match_flickr_name(name):
    """Match the file name in a path, without its suffix, with FLICKR_NAME."""
    stem = name.rpartition("/")[2].rpartition(".")[0]  # pathlib would take ten times as long
    return FLICKR_NAME.fullmatch(stem)


def flickr_number(name):
    """Return the number in the name of a photo's file if it may be the photo's number on Flickr,
    else None. It certainly is one if `has_flickr_form`; otherwise only the picture can tell."""
    match = match_flickr_name(name)
    return None if match is None else match[1]


def has_flickr_form(name):
    """Whether a file's name has Flickr's own form, which is a number and a secret."""
    match = match_flickr_name(name)
    return match is not None and match[2] is not None
