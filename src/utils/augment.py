"""Batched augmentation of photos and captions, run on whatever device the batch is on."""
import torch
import torch.nn.functional as F

# Per-channel mean and standard deviation of ImageNet's photos, on a scale of 0 to 1: the field's usual constants.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(images):
    """uint8 photos (B, 3, H, W) -> float32 photos of about zero mean and unit variance."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def random_resized_crop_and_flip(images, size, min_scale=0.5):
    """Float photos (B, C, H, W) -> (B, C, size, size), each cropped and mirrored by its own draw.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, for a whole batch at once: the crop holds a share of
    the area drawn from [min_scale, 1], its aspect ratio is drawn from [3/4, 4/3] on a log scale, and half of the
    photos are mirrored. Sampling is bilinear. Randomness comes from torch's global generator.
    """
    batch = len(images)
    area, log_ratio, x, y, flip = torch.rand(5, batch, device=images.device)
    area = min_scale + (1 - min_scale) * area
    ratio = torch.exp((2 * log_ratio - 1) * torch.log(torch.tensor(4 / 3)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of the photo's
    theta = torch.zeros(batch, 2, 3, device=images.device)  # output coordinates, from -1 to 1, -> input coordinates
    theta[:, 0, 0] = torch.where(flip < 0.5, -width, width)
    theta[:, 0, 2] = (2 * x - 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = (2 * y - 1) * (1 - height)
    grid = F.affine_grid(theta, (batch, images.shape[1], size, size), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def drop_words(text, probability, space_id):
    """Token ids (B, L) -> the same with each word, at the given probability, turned into padding (0) in its place.

    A word is what stands between two `space_id`; the space before it goes with it. The first word of a caption always
    stays, so that something does. Randomness comes from torch's global generator.
    """
    if probability == 0:
        return text
    word = (text == space_id).cumsum(1)  # (B, L) which word of its caption each token belongs to
    keep = torch.rand(text.shape, device=text.device) >= probability  # column w is word w's draw: words < L
    keep[:, 0] = True
    return text * keep.gather(1, word.clamp(max=text.shape[1] - 1))
