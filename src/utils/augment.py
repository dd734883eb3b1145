"""Batched augmentation of photos and captions, on whatever device the batch is on. It draws from
torch's global generator of that device and copies nothing between host and device."""
import functools
import math

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

# Of ImageNet's photos, per channel, on a scale of 0 to 1: the field's usual constants.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


@functools.cache
def _per_channel(values, device):
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def normalize(images):
    """Photos (B, 3, H, W), uint8, or floats from 0 to 1 -> float32 photos of about zero mean and
    unit variance.
    """
    images = images / 255.0 if images.dtype == torch.uint8 else images
    return (images - _per_channel(MEAN, images.device)) / _per_channel(STD, images.device)


def resize(images, side, mode="bilinear"):
    """Photos (..., 3, H, W), uint8 or float -> (..., 3, side, side), smoothed where they shrink.
    mode: "bilinear" or "bicubic"."""
    if images.shape[-2:] == (side, side):
        return images
    return v2.functional.resize(images, [side, side], v2.InterpolationMode(mode), antialias=True)


def random_resized_crop_and_flip(images, size, min_scale=0.5, flip=0.5):
    """Photos (B, C, H, W), H = W, uint8 or float -> float (B, C, size, size), each cropped and
    mirrored by its own draw: torchvision's RandomResizedCrop((min_scale, 1)) and
    RandomHorizontalFlip, for a whole batch at once. But a crop may begin between two pixels, and
    sampling is bilinear without smoothing, so that photos should not be much larger than size."""
    batch = len(images)
    area, log_ratio = torch.rand(2, batch, 10, device=images.device)
    area = min_scale + (1 - min_scale) * area
    ratio = torch.exp((2 * log_ratio - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()  # shares of the photo's
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)
    width, height = (
        torch.where(fits.any(1), side.gather(1, first).squeeze(1), 1.0) for side in (width, height)
    )
    x, y, side = torch.rand(3, batch, device=images.device)
    zero = torch.zeros_like(x)
    # Output coordinates, from -1 to 1, -> input coordinates.
    theta = torch.stack([torch.where(side < flip, -width, width), zero, (2 * x - 1) * (1 - width),
                         zero, height, (2 * y - 1) * (1 - height)], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, (batch, images.shape[1], size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def color_jitter(images, strength):
    """Float photos (B, 3, H, W) from 0 to 1 -> torchvision's ColorJitter(strength, strength,
    strength) of them, for a whole batch at once, but clipped once, at the end: till then
    brightness, contrast and saturation are linear, and their order makes no difference."""
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
    """Token ids (B, L) -> the same with each word but a caption's first, at the given probability,
    turned into padding (0). word_start: (vocab_size,) bool, True for the ids that begin a word."""
    if probability == 0:
        return text
    word = word_start[text].cumsum(1)  # (B, L) which word of its caption each token belongs to
    keep = torch.rand(text.shape[0], text.shape[1] + 1, device=text.device) >= probability
    keep.scatter_(1, word[:, :1], True)
    return text * keep.gather(1, word)
