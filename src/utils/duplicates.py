"""Photos that are the same, or nearly so: what training must not have seen of the others.

A photo's signature is two thumbnails, of the whole and of what is left without a margin. Compared
are the differences from cell to cell, as in the difference hash (dHash), but in colour, and how
large they are instead of their sign alone: flat areas count for nothing."""
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GRID = 8  # rows and columns of a thumbnail
MARGINS = (0.0, 0.05)
SIGNATURE = (len(MARGINS), GRID, GRID, 3)  # uint8
ALIKE = 0.85  # cosine from which on two are copies: of seven thousand Flickr photos, two pairs are
REDUCED = 64  # pixels, to which a photo is reduced first
COMPARED = 2000  # photos compared at a time
# Flickr's own file names: the photo's number, and in some a secret and a size.
FLICKR_NAME = re.compile(r"([1-9]\d{6,11})(_[0-9a-f]{10}(_[a-z])?)?")


def signature(photo):
    """A PIL image, RGB -> uint8 array of the shape SIGNATURE."""
    small = photo.resize((REDUCED, REDUCED), Image.Resampling.BILINEAR)
    thumbnails = []
    for margin in MARGINS:
        low, high = REDUCED * margin, REDUCED * (1 - margin)
        thumbnails.append(small.resize((GRID, GRID), Image.Resampling.BILINEAR,
                                       (low, low, high, high)))
    return np.stack(thumbnails)


def differences(thumbnails):
    """(N, GRID, GRID, 3) -> (N, D) of unit length, whose dot products are compared. The root keeps
    a strong edge from counting for all."""
    across, down = thumbnails.diff(dim=2), thumbnails.diff(dim=1)
    both = torch.cat([across.flatten(1), down.flatten(1)], 1)
    return F.normalize(both.sign() * both.abs().sqrt(), dim=1)


def near_duplicates(signatures, others):
    """For each photo, by signatures (N, *SIGNATURE), the row of the one among others, alike, that
    it is a copy of -> (N,), -1 for none. A copy may be compressed, resized, brighter or darker,
    mirrored, and cropped at the margins, as may be the other."""
    whole, inner = (differences(torch.cat([part, part.flip(2)])).T
                    for part in torch.as_tensor(others).float().unbind(1))
    copy_of = []
    for start in range(0, len(signatures), COMPARED):
        own = torch.as_tensor(signatures[start:start + COMPARED]).float()
        own_whole, own_inner = map(differences, own.unbind(1))
        cosine = torch.maximum(own_whole @ whole, own_whole @ inner)
        cosine = torch.maximum(cosine, own_inner @ whole)
        most, row = cosine.max(1)
        copy_of.append(torch.where(most >= ALIKE, row % len(others), -1))
    return torch.cat(copy_of).numpy()


def flickr_id(name):
    """The number of a photo on Flickr by its file's name, None for other names."""
    found = FLICKR_NAME.fullmatch(name.rpartition("/")[2].rpartition(".")[0])
    return found and found[1]
