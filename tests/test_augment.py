import itertools

import pytest
import torch
from torchvision.transforms import v2

from src.utils.augment import (
    MEAN,
    STD,
    color_jitter,
    drop_words,
    normalize,
    random_resized_crop_and_flip,
)


def test_normalize_is_per_channel():
    photo = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    expected = [(51 / 255 - mean) / std for mean, std in zip(MEAN, STD)]
    assert normalize(photo)[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert normalize(photo).dtype == torch.float32
    assert torch.equal(normalize(photo / 255.0), normalize(photo))


def test_a_crop_holds_nothing_that_the_photo_does_not():
    torch.manual_seed(0)
    photos = torch.rand(40, 3, 8, 8)
    out = random_resized_crop_and_flip(photos[:, :, :1].expand(-1, -1, 8, -1), 8, min_scale=1.0)
    assert out.shape == (40, 3, 8, 8)
    # Bilinear interpolation stays within the range of the pixels.
    assert out.min() >= 0 and out.max() <= 1


def gradient_photos(count, size=64):
    """Channel 0 holds x and channel 1 holds y, from -1 to 1, so that a crop shows where it was
    taken.
    """
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size)]).expand(
        count, -1, -1, -1
    )


@pytest.mark.parametrize("min_scale", [0.1, 0.5, 0.9])
def test_crops_have_the_same_distribution_as_torchvisions(min_scale):
    torch.manual_seed(0)
    out = random_resized_crop_and_flip(gradient_photos(4000), 64, min_scale)
    left, right = out[:, 0, 32, 8], out[:, 0, 32, -9]
    top, bottom = out[:, 1, 8, 32], out[:, 1, -9, 32]
    span = 2 * (64 - 17) / 64  # the distance of the two columns in a photo that is not cropped
    width, height = (right - left) / span, (bottom - top) / span
    # Half of the photos are mirrored, and none is upside down.
    assert (height > 0).all() and 0.46 < (width < 0).float().mean() < 0.54
    assert ((left + right).abs() / 2 + width.abs()).max() < 1.03  # a crop lies within the photo
    ours = {
        "area": width.abs() * height,
        "ratio": (width.abs() / height).log(),
        "x": (left + right) / 2,
        "y": (top + bottom) / 2,
    }
    crop, photo = v2.RandomResizedCrop(64, (min_scale, 1.0)), torch.empty(3, 1000, 1000)
    draws = [crop.make_params([photo]) for _ in range(4000)]
    top, left, height, width = (torch.tensor([draw[name] / 1000 for draw in draws])
                                for name in ("top", "left", "height", "width"))
    theirs = {
        "area": width * height,
        "ratio": (width / height).log(),
        "x": 2 * left + width - 1,
        "y": 2 * top + height - 1,
    }
    # For two samples of the same distribution, the Kolmogorov-Smirnov distance is below 0.044 in
    # 99.9 % of cases.
    for name in ours:
        both = torch.cat([ours[name], theirs[name]]).sort().values
        share = [
            torch.searchsorted(sample[name].sort().values, both, right=True) / 4000
            for sample in (ours, theirs)
        ]
        assert (share[0] - share[1]).abs().max() < 0.05, name


def test_colour_jitter_is_the_same_as_torchvisions_functions_in_any_order(monkeypatch):
    """Both have the same factors, and the photos are such that nothing is clipped."""
    photos, factors = (
        torch.rand(3, 3, 8, 8) * 0.2 + 0.3,
        torch.tensor([[1.3, 0.8, 1.0], [0.7, 1.2, 1.4], [1.1, 1.4, 0.6]]),
    )
    monkeypatch.setattr(torch, "rand", lambda *size, device: (((factors - 1) / 0.4 + 1) / 2
                                                              ).view(size))
    out = color_jitter(photos, 0.4)
    change = (
        v2.functional.adjust_brightness,
        v2.functional.adjust_contrast,
        v2.functional.adjust_saturation,
    )
    for order in itertools.permutations(range(3)):
        for i, photo in enumerate(photos):
            for step in order:
                photo = change[step](photo, factors[step, i].item())
            assert torch.allclose(out[i], photo, atol=1e-4)
    bright = color_jitter(torch.ones(3, 3, 8, 8) * 0.95, 0.4)
    assert bright.max() == 1 and bright.min() > 0


def test_colour_jitter_has_the_same_distribution_as_torchvisions():
    torch.manual_seed(0)
    photo = torch.rand(3, 4, 4) * 0.6 + 0.2
    ours = color_jitter(photo.expand(6000, -1, -1, -1), 0.4)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    theirs = torch.stack([jitter(photo) for _ in range(6000)])
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.015
    assert (ours.std(0) - theirs.std(0)).abs().max() < 0.015 and ours.std(0).min() > 0.05
    assert torch.equal(color_jitter(photo[None], 0.0), photo[None])


def test_each_photo_has_a_draw_of_its_own_which_follows_from_the_seed():
    torch.manual_seed(3)
    first = random_resized_crop_and_flip(gradient_photos(8), 32)
    torch.manual_seed(3)
    assert torch.equal(first, random_resized_crop_and_flip(gradient_photos(8), 32))
    assert len({tuple(photo.flatten().tolist()) for photo in first}) == 8


@pytest.mark.parametrize("flip", [0.0, 0.2, 1.0])
def test_photos_are_mirrored_at_the_given_rate(flip):
    torch.manual_seed(0)
    out = random_resized_crop_and_flip(gradient_photos(2000, 16), 16, 1.0, flip)
    mirrored = (out[:, 0, 0, 0] > 0).float().mean()
    assert abs(mirrored - flip) < 0.03 and (flip % 1 or mirrored == flip)


@pytest.mark.parametrize("caption, starts, first, others", [
    # The characters of "ab c def", where id 1 is the space.
    ([2, 3, 1, 4, 1, 5, 6, 7, 0, 0], [1], (2, 3), [(1, 4), (1, 5, 6, 7)]),
    # Byte pairs, where a word starts with a token that includes the space before it.
    ([4, 2, 5, 6, 2, 2, 0, 0], [4, 5, 6], (4, 2), [(5,), (6, 2, 2)]),
])
def test_words_are_dropped_whole_at_the_given_rate(caption, starts, first, others):
    torch.manual_seed(0)
    word_start = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(starts), True)
    out = drop_words(torch.tensor([caption] * 4000), 0.25, word_start)
    (second, third), padding = others, (0,) * caption.count(0)
    different = {tuple(row) for row in out.tolist()}
    assert different == {
        (*first, *middle, *end, *padding)
        for middle in (second, (0,) * len(second)) for end in (third, (0,) * len(third))}
    dropped = [out[:, len(first)] == 0, out[:, len(first) + len(second)] == 0]
    for word in dropped:
        assert 0.22 < word.float().mean() < 0.28
    # The words are dropped independently of each other.
    assert 0.04 < (dropped[0] & dropped[1]).float().mean() < 0.085


def test_no_words_are_dropped_at_zero():
    text = torch.randint(0, 5, (3, 8))
    assert torch.equal(drop_words(text, 0.0, torch.ones(5, dtype=torch.bool)), text)
