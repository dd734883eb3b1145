"""Ranking with a bank is compared with a slow and obvious implementation."""
import math

import pytest
import torch
import torch.nn.functional as F

from src import bank as bank_module
from src import retrieval
from src.bank import BETA, NEIGHBOUR_WEIGHT, NEIGHBOURS, Bank
from src.retrieval import hub_share, retrieval_metrics
from tests.test_retrieval import slow_cosines, slow_metrics


def slow_expansion(latents, neighbours, partners, queries):
    """Expand one latent at a time. partners: that of each neighbour. Returns the expanded latents
    and their hubness."""
    latents, neighbours = F.normalize(latents.double(), dim=-1), neighbours.double()
    partners, queries = partners.double(), queries.double()
    expanded, hubness = [], []
    for latent in latents:
        cosines = [float(neighbour @ latent) for neighbour in neighbours]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:NEIGHBOURS]
        weights = [math.exp(BETA * cosines[i]) for i in nearest]
        mean = sum(w * partners[i] for w, i in zip(weights, nearest)) / sum(weights)
        expanded.append(F.normalize(latent + NEIGHBOUR_WEIGHT * mean, dim=-1))
        terms = [math.exp(BETA * float(expanded[-1] @ query)) for query in queries]
        hubness.append(math.log(sum(terms)) / BETA)
    return torch.stack(expanded), torch.tensor(hubness)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_metrics_with_a_bank_equal_the_slow_implementation(chunk_size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 7, (23,), generator=generator)
    photo_of_caption = torch.arange(23).repeat_interleave(counts)
    hub = torch.randn(6, generator=generator)  # all latents are near to it
    texts = torch.randn(len(photo_of_caption), 6, generator=generator) + hub
    images = torch.randn(23, 6, generator=generator) + hub
    images.index_add_(0, photo_of_caption, 0.3 * texts)
    counts = torch.randint(1, 7, (40,), generator=generator)
    photo_of_text = torch.arange(40).repeat_interleave(counts)
    photo_of_text = photo_of_text[torch.randperm(len(photo_of_text), generator=generator)]
    bank = Bank(torch.randn(40, 6, generator=generator) + hub,
                torch.randn(len(photo_of_text), 6, generator=generator) + hub, photo_of_text)

    mean_texts = torch.stack([bank.texts[photo_of_text == i].mean(0) for i in range(40)])
    mean_texts = F.normalize(mean_texts, dim=-1)
    expanded_images, photo_hubness = slow_expansion(images, bank.photos, mean_texts, bank.texts)
    expanded_texts, text_hubness = slow_expansion(
        texts, bank.texts, bank.photos[photo_of_text], bank.photos)
    cosines = expanded_images @ expanded_texts.T
    expected = slow_metrics(
        cosines - text_hubness, cosines - photo_hubness[:, None], photo_of_caption)

    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    monkeypatch.setattr(bank_module, "CHUNK_SIZE", chunk_size)
    assert retrieval_metrics(images, texts, photo_of_caption, bank) == pytest.approx(expected)
    plain = slow_cosines(images, texts)
    assert expected != pytest.approx(slow_metrics(plain, plain, photo_of_caption))


def test_a_bank_corrects_for_hubs():
    generator = torch.Generator().manual_seed(0)

    def directions(number):
        return F.normalize(torch.randn(number, 16, generator=generator), dim=-1)

    common = torch.eye(16)[0]  # all texts share it, and one photo shows nothing else
    details = directions(30)
    texts, images = details + common, details + 0.5 * directions(30)
    images[0] = common
    bank = Bank(directions(500), directions(500) + common, torch.arange(500))
    without_bank = retrieval_metrics(images, texts, torch.arange(30))
    with_bank = retrieval_metrics(images, texts, torch.arange(30), bank)
    assert with_bank["t2i_r1"] > without_bank["t2i_r1"] + 20
    assert hub_share(images, texts, bank) < hub_share(images, texts) - 20


def test_a_text_that_many_photos_share_is_no_hub():
    """99 % of the training photos have the text 0, and a photo to be ranked looks a little
    more like it than like the text 1."""
    texts = torch.eye(3)[:2]
    class_of_photo = (torch.arange(1000) >= 990).long()
    photo = torch.tensor([[1.0, 0.99, 0.0]])
    state = Bank(texts[class_of_photo], texts[class_of_photo], torch.arange(1000)).state_dict()
    nearest = {}
    for correct_hubs in (True, False):
        bank = Bank(**state | {"correct_hubs": correct_hubs})
        assert Bank(**bank.state_dict()).correct_hubs == correct_hubs
        photo_queries = bank.photo_queries(F.normalize(photo, dim=-1))
        nearest[correct_hubs] = (photo_queries @ bank.text_gallery(texts).T).argmax().item()
    assert nearest == {True: 1, False: 0}


def test_a_bank_expands_a_latent_by_the_partners_of_its_neighbours():
    """Photos and texts here have nothing in common except that the bank pairs them."""
    generator = torch.Generator().manual_seed(0)
    photos = F.normalize(torch.randn(12, 64, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(12, 64, generator=generator), dim=-1)
    pairs = torch.arange(12)
    without_bank = retrieval_metrics(photos, texts, pairs)
    with_bank = retrieval_metrics(photos, texts, pairs, Bank(photos, texts, pairs))
    assert without_bank["avg_r1"] < 30 and with_bank["avg_r1"] > 90


def test_a_bank_is_the_same_after_it_was_saved():
    latents = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    bank = Bank(7 * latents[:12], latents[12:], torch.arange(12))
    loaded = Bank(**bank.state_dict())
    for name in ("photos", "texts", "photo_of_text"):
        assert bank.state_dict()[name].equal(loaded.state_dict()[name])
    assert bank.state_dict()["photos"].dtype == bank.state_dict()["texts"].dtype == torch.float16
    for tensor in (loaded.photos, loaded.texts, loaded.mean_texts):
        assert torch.allclose(tensor.norm(dim=1), torch.ones(len(tensor)), atol=1e-3)
    assert bank.nbytes == 2 * 32 * (12 + 12) + 8 * 12


def test_latents_of_another_width_are_refused():
    bank = Bank(torch.randn(12, 32), torch.randn(12, 32), torch.arange(12))
    for method in (bank.photo_queries, bank.photo_gallery, bank.text_queries, bank.text_gallery):
        assert method(torch.ones(24, 32)).shape == (24, 33)
        with pytest.raises(ValueError, match="a width of 31, but those of the bank .* of 32"):
            method(torch.ones(3, 31))


def test_a_familiar_text_is_as_near_to_a_caption_as_captions_are_to_each_other(monkeypatch):
    """The captions lie on a circle, two of each photo, at multiples of an angle."""
    angles = torch.arange(40) * 0.1
    texts = torch.stack([angles.cos(), angles.sin()], 1)
    bank = Bank(torch.randn(20, 2), texts, torch.arange(20).repeat_interleave(2))
    # The nearest caption of another photo is one angle away from each, but two from both ends.
    monkeypatch.setattr(bank_module, "UNUSUAL", 0.0)

    def is_familiar(angle):
        angle = torch.tensor(angle)
        return bank.is_familiar(torch.stack([angle.cos(), angle.sin()])[None])

    assert is_familiar(1.23) and is_familiar(3.9 + 0.18) and not is_familiar(3.9 + 0.22)
    # Equal captions of different photos, such as class names, say nothing about other texts.
    twice = Bank(torch.randn(40, 2), torch.cat([texts, texts]), torch.arange(80) // 2)
    assert twice._familiar_texts[1] == pytest.approx(math.cos(0.1), abs=1e-3)
