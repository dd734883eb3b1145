"""Near-duplicates: how to tell that two photo files show the same picture.

The signature of a photo consists of three thumbnails: of the whole photo, of the photo without its
margin, and of the square in its middle. A photo whose border has one colour is also looked at
without that border, so it has three thumbnails more. As in the difference hash (dHash), the
differences between neighbouring cells are compared, but in colour and with their size, not only
their sign, so that flat areas hardly count."""
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

GRID = 8  # rows and columns of a thumbnail
MARGIN = 0.05  # the share of each side that is the margin
VIEWS, THUMBNAILS = 2, 3  # as the photo is and without its border; whole, inner and square
SIGNATURE = (VIEWS, THUMBNAILS, GRID, GRID, 3)  # uint8
SAME = 0.85  # the least cosine of copies; among seven thousand Flickr photos, two pairs reach it
REDUCED = 64  # pixels of the side to which a photo is reduced first
CHUNK_SIZE = 2000  # photos compared at a time
PROBED = 256  # pixels of the side in which a border is looked for
BORDER_NOISE = 16  # levels of 255 by which a border, once compressed, differs from its colour
LEAST_INSIDE = 0.25  # share of the width and of the height; with less inside, it is no border
# The names of Flickr's files: the number of the photo, a secret, and perhaps a size. Flickr30k has
# kept the number alone.
FLICKR_NAME = re.compile(r"([1-9]\d{6,11})(_[0-9a-f]{10}(_[a-z])?)?")


def inside_border(photo):
    """Return the box (left, top, right, bottom) inside the border of a PIL image in RGB, whose
    border has the colour of its top left pixel. Without such a border it is the whole image."""
    probe = photo.resize((PROBED, PROBED), Image.Resampling.NEAREST)
    border = Image.new("RGB", probe.size, probe.getpixel((0, 0)))
    channels = ImageChops.difference(probe, border).split()
    difference = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])
    box = difference.point(lambda level: 255 * (level > BORDER_NOISE)).getbbox()
    least = LEAST_INSIDE * PROBED
    if box is None or box[2] - box[0] < least or box[3] - box[1] < least:
        box = (0, 0, PROBED, PROBED)
    across, down = photo.width / PROBED, photo.height / PROBED
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def thumbnails_of(photo, box):
    """Return the three thumbnails of a part of a PIL image, uint8 (THUMBNAILS, GRID, GRID, 3)."""
    bilinear = Image.Resampling.BILINEAR
    small = photo.resize((REDUCED, REDUCED), bilinear, box)
    low, high = REDUCED * MARGIN, REDUCED * (1 - MARGIN)
    width, height = box[2] - box[0], box[3] - box[1]
    # What the square leaves out at the left and at the right, or at the top and at the bottom.
    left = REDUCED * max(0, 1 - height / width) / 2
    top = REDUCED * max(0, 1 - width / height) / 2
    parts = ((0, 0, REDUCED, REDUCED), (low, low, high, high),
             (left, top, REDUCED - left, REDUCED - top))
    return np.stack([small.resize((GRID, GRID), bilinear, part) for part in parts])


def signature(photo):
    """Return the signature of a PIL image in RGB, a uint8 array of shape SIGNATURE. Both views are
    equal if the photo has no border."""
    whole = (0, 0, *photo.size)
    view = thumbnails_of(photo, whole)
    box = inside_border(photo)
    return np.stack([view, view if box == whole else thumbnails_of(photo, box)])


def differences(thumbnails):
    """Return the differences between the neighbouring cells of thumbnails (N, GRID, GRID, 3), as
    vectors (N, D) of unit length. Their square roots are taken, so that no single strong edge
    dominates."""
    across, down = thumbnails.diff(dim=2), thumbnails.diff(dim=1)
    both = torch.cat([across.flatten(1), down.flatten(1)], 1)
    return F.normalize(both.sign() * both.abs().sqrt(), dim=1)


def views_of(signatures):
    """List the views of N photos: first all of them as they are, then those that have a border
    without it.

    Returns the thumbnails of the V views, float (V, THUMBNAILS, GRID, GRID, 3); the row of the
    photo of each, (V,); and whether the border of a photo is in the view, (V,)."""
    signatures = torch.as_tensor(signatures).float()
    has_border = (signatures[:, 0] != signatures[:, 1]).flatten(1).any(1)
    photo_of_view = torch.cat([torch.arange(len(signatures)), has_border.nonzero()[:, 0]])
    shows_border = torch.cat([has_border, torch.zeros(int(has_border.sum()), dtype=torch.bool)])
    return torch.cat([signatures[:, 0], signatures[has_border, 1]]), photo_of_view, shows_border


def near_duplicates(signatures, others):
    """Find, for each of N photos, the one of M others that it is a copy of.

    signatures, others: (N, *SIGNATURE) and (M, *SIGNATURE). Either photo may have been compressed,
    resized, made brighter or darker, mirrored, cropped at the margins or to a square, or given a
    border of one colour. Returns an array (N,) of the rows of the others, with -1 for a photo that
    is not a copy."""
    others, photo_of_other, other_shows_border = views_of(others)
    # The views of the others are followed by their mirror images.
    other_thumbnails = [differences(torch.cat([part, part.flip(2)])).T for part in others.unbind(1)]
    photo_of_other, other_shows_border = photo_of_other.repeat(2), other_shows_border.repeat(2)
    copy_of = np.full(len(signatures), -1)
    for start in range(0, len(signatures), CHUNK_SIZE):
        views, photo_of_view, shows_border = views_of(signatures[start:start + CHUNK_SIZE])
        whole, *parts = map(differences, views.unbind(1))
        other_whole, *other_parts = other_thumbnails
        cosine = whole @ other_whole
        for part, other_part in zip(parts, other_parts):
            cosine = torch.maximum(cosine, part @ other_whole)
            cosine = torch.maximum(cosine, whole @ other_part)
        # Equal borders make different photos look alike.
        cosine[shows_border[:, None] & other_shows_border] = -1
        highest, row = cosine.max(1)
        found = (highest >= SAME).nonzero()[:, 0]
        found = found[highest[found].argsort()]  # the better one of a photo's views is written last
        copy_of[start + photo_of_view[found].numpy()] = photo_of_other[row[found]].numpy()
    return copy_of


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
