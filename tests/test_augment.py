import pytest
import torch

from src.utils.augment import MEAN, STD, drop_words, normalize, random_resized_crop_and_flip


def test_normalize_is_per_channel():
    photo = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    expected = [(51 / 255 - mean) / std for mean, std in zip(MEAN, STD)]
    assert normalize(photo)[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert normalize(photo).dtype == torch.float32


def test_whole_photo_or_its_mirror_when_nothing_is_cropped():
    torch.manual_seed(0)
    photos = torch.rand(40, 3, 8, 8)
    # At min_scale=1 only the aspect ratio is drawn, and clamped to the photo: one side is whole, the other 3/4 to 1.
    out = random_resized_crop_and_flip(photos[:, :, :1].expand(-1, -1, 8, -1), 8, min_scale=1.0)
    assert out.shape == (40, 3, 8, 8)
    assert out.min() >= 0 and out.max() <= 1  # bilinear: nothing beyond what was there


def gradient_photos(count, size=64):
    """Channel 0 holds x, channel 1 holds y, from -1 to 1: what a crop shows says where it was taken."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size)]).expand(count, -1, -1, -1)


def test_crops_follow_the_stated_distribution():
    torch.manual_seed(0)
    out = random_resized_crop_and_flip(gradient_photos(4000), 64, min_scale=0.5)
    left, right = out[:, 0, 32, 8], out[:, 0, 32, -9]
    top, bottom = out[:, 1, 8, 32], out[:, 1, -9, 32]
    span = 2 * (64 - 17) / 64  # between the columns looked at, in an uncropped photo
    width, height = (right - left) / span, (bottom - top) / span
    assert (height > 0).all() and 0.45 < (width < 0).float().mean() < 0.55  # half are mirrored, none upside down
    area, ratio = width.abs() * height, width.abs() / height
    assert area.min() > 0.49 and area.max() < 1.01 and 0.7 < area.mean() < 0.78
    assert ratio.min() > 0.74 and ratio.max() < 1.35 and abs(ratio.log().mean()) < 0.02
    centre = (left + right) / 2
    assert abs(centre.mean()) < 0.02 and (centre.abs() + width.abs()).max() < 1.02  # anywhere, never beyond the margin


def test_each_photo_has_its_own_draw_and_the_seed_decides():
    torch.manual_seed(3)
    first = random_resized_crop_and_flip(gradient_photos(8), 32)
    torch.manual_seed(3)
    assert torch.equal(first, random_resized_crop_and_flip(gradient_photos(8), 32))
    assert len({tuple(photo.flatten().tolist()) for photo in first}) == 8


def test_words_are_dropped_whole_at_the_given_rate():
    torch.manual_seed(0)
    caption = [2, 3, 1, 4, 1, 5, 6, 7, 0, 0]  # "ab c def", two of padding; 1 is the space
    out = drop_words(torch.tensor([caption] * 4000), 0.25, space_id=1)
    kinds = {tuple(row) for row in out.tolist()}
    assert kinds == {(2, 3, *middle, *end, 0, 0) for middle in ((1, 4), (0, 0)) for end in ((1, 5, 6, 7), (0, 0, 0, 0))}
    for column in (3, 5):  # each word by its own draw
        assert 0.22 < (out[:, column] == 0).float().mean() < 0.28
    assert 0.04 < ((out[:, 3] == 0) & (out[:, 5] == 0)).float().mean() < 0.085


def test_no_words_are_dropped_at_zero():
    text = torch.randint(0, 5, (3, 8))
    assert torch.equal(drop_words(text, 0.0, space_id=1), text)
