"""Augmentation of photos and captions, for a whole batch at once.

The functions run on the device that the batch is on. They draw from torch's global generator of
that device and never make the host wait for it.
"""
import functools
import math

import torch
import torch.nn.functional as F

# The usual constants: mean and standard deviation of ImageNet's channels, on a scale of 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)  # the weights with which torchvision adds red, green and blue
CROP_DRAWS = 10  # a crop is drawn until it fits into the photo, at most so often


@functools.cache
def _per_channel(values, device):
    """A constant for each channel, to be combined with photos. It is copied to a device once."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def normalize(images):
    """Scale photos (B, 3, H, W) to about zero mean and unit variance in each channel.

    The photos are uint8, or floats from 0 to 1. The result is float32.
    """
    images = images / 255.0 if images.dtype == torch.uint8 else images
    return (images - _per_channel(MEAN, images.device)) / _per_channel(STD, images.device)


def resize(images, side, mode="bilinear"):
    """Resize photos (..., 3, H, W), uint8 or float, to (..., 3, side, side), with antialiasing.

    mode: "bilinear" or "bicubic".
    """
    if images.shape[-2:] == (side, side):
        return images
    # To import it takes a second, which a search in a gallery that is embedded can do without.
    from torchvision.transforms import v2
    return v2.functional.resize(images, [side, side], v2.InterpolationMode(mode), antialias=True)


def random_resized_crop_and_flip(images, size, min_scale=0.5, flip=0.5):
    """Crop and mirror square photos (B, C, H, H), each by its own draw -> (B, C, size, size).

    A crop covers a share between min_scale and 1 of the photo's area, and `flip` is the probability
    of mirroring. The draws follow torchvision's RandomResizedCrop and RandomHorizontalFlip, with
    two differences: a crop may begin between two pixels, and there is no antialiasing, so photos
    should not be much larger than `size`.
    """
    batch = len(images)
    area, log_ratio = torch.rand(2, batch, CROP_DRAWS, device=images.device)
    area = min_scale + (1 - min_scale) * area
    ratio = torch.exp((2 * log_ratio - 1) * math.log(4 / 3))
    # Width and height of the crop, relative to the photo: of the first draw that fits, or 1.
    widths, heights = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    any_fits = fits.any(1)
    first = fits.int().argmax(1, keepdim=True)
    width = torch.where(any_fits, widths.gather(1, first).squeeze(1), 1.0)
    height = torch.where(any_fits, heights.gather(1, first).squeeze(1), 1.0)
    x, y, mirror = torch.rand(3, batch, device=images.device)
    zero = torch.zeros_like(x)
    # The affine map from coordinates of the crop to coordinates of the photo, both from -1 to 1.
    theta = torch.stack([
        torch.where(mirror < flip, -width, width), zero, (2 * x - 1) * (1 - width),
        zero, height, (2 * y - 1) * (1 - height)], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, (batch, images.shape[1], size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def color_jitter(images, strength):
    """Change brightness, contrast and saturation of float photos (B, 3, H, W) from 0 to 1.

    Each photo has three factors of its own, drawn from 1 - strength to 1 + strength, as in
    torchvision's ColorJitter(strength, strength, strength). Unlike there, values are clipped only
    once, at the end. Without clipping in between, the order of the three makes no difference, and
    they can be computed as one.
    """
    if strength == 0:
        return images
    batch, grey = len(images), _per_channel(GREY, images.device)
    brightness, contrast, saturation = 1 + strength * (
        2 * torch.rand(3, batch, 1, 1, 1, device=images.device) - 1)
    luma = (images * grey).sum(1, keepdim=True)
    grey_part = contrast * (1 - saturation) * luma + (1 - contrast) * luma.mean((2, 3), True)
    images = torch.addcmul(grey_part, contrast * saturation, images)
    return (brightness * images).clamp_(0, 1)


def drop_words(text, probability, word_start):
    """Replace words of token ids (B, L) by padding, each with the given probability.

    The first word of a caption always stays. word_start: bool (vocab_size,), True for the ids that
    begin a word.
    """
    if probability == 0:
        return text
    word = word_start[text].cumsum(1)  # (B, L): the number of the word that each token belongs to
    keep = torch.rand(text.shape[0], text.shape[1] + 1, device=text.device) >= probability
    keep.scatter_(1, word[:, :1], True)
    return text * keep.gather(1, word)
