"""The measures against a slow and obvious implementation, and on cases made by hand."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from src import retrieval
from src.bank import BETA, NEIGHBOUR_WEIGHT, NEIGHBOURS, Bank
from src.retrieval import (
    TIE,
    chance_metrics,
    hub_share,
    ranks_of_others,
    retrieval_metrics,
    retrieval_ranks,
)


def slow_completion(latents, alike, partners, others):
    """One latent at a time -> the completed, and how near each stands to the others in general."""
    alike, partners, others = alike.double(), partners.double(), others.double()
    completed, hubness = [], []
    for latent in latents:
        nearest = sorted(range(len(alike)), key=lambda i: -(alike[i] @ latent))[:NEIGHBOURS]
        weights = [math.exp(BETA * (alike[i] @ latent)) for i in nearest]
        mean = sum(w * partners[i] for w, i in zip(weights, nearest)) / sum(weights)
        completed.append(F.normalize(latent + NEIGHBOUR_WEIGHT * mean, dim=-1))
        hubness.append(math.log(sum(math.exp(BETA * (completed[-1] @ other))
                                    for other in others)) / BETA)
    return torch.stack(completed), torch.tensor(hubness)


def slow_metrics(images, texts, photo_of_caption, bank=None):
    """Both protocols as one would tell them, one query at a time. bank: (photos, the photo of each
    text, texts, the mean of each photo's texts)."""
    images = F.normalize(images.double(), dim=-1)
    texts = F.normalize(texts.double(), dim=-1)
    to_texts = to_photos = images @ texts.T
    if bank:
        bank_photos, of_text, bank_texts, of_photo = bank
        images, photo_hubness = slow_completion(images, bank_photos, of_photo, bank_texts)
        texts, text_hubness = slow_completion(texts, bank_texts, of_text, bank_photos)
        to_texts = images @ texts.T - text_hubness
        to_photos = images @ texts.T - photo_hubness[:, None]
    num_photos, num_captions = to_texts.shape
    owner = photo_of_caption.tolist()
    i2t, t2i, pair_i2t, pair_t2i = [], [], [], {k: [] for k in (1, 5, 10)}
    for photo in range(num_photos):
        own = [c for c in range(num_captions) if owner[c] == photo]
        if own:
            best = max(to_texts[photo, c].item() for c in own)
            i2t.append(
                1
                + sum(
                    to_texts[photo, c].item() >= best - TIE
                    for c in range(num_captions)
                    if c not in own
                )
            )
        for c in own:
            pair_i2t.append(
                1
                + sum(
                    to_texts[photo, other].item() >= to_texts[photo, c].item() - TIE
                    for other in range(num_captions)
                    if other != c
                )
            )
    for c in range(num_captions):
        own = to_photos[owner[c], c].item()
        t2i.append(
            1
            + sum(
                to_photos[photo, c].item() >= own - TIE
                for photo in range(num_photos)
                if photo != owner[c]
            )
        )
        ahead = sum(to_photos[owner[other], c].item() >= own - TIE for other in range(num_captions)
                    if owner[other] != owner[c])
        copies = owner.count(owner[c])
        # the copy of the pair itself is equally likely in each place among the copies of its photo
        for k in pair_t2i:
            pair_t2i[k].append(sum(ahead + place <= k for place in range(1, copies + 1)) / copies)
    percent = lambda hits: 100 * sum(hits) / len(hits)  # noqa: E731
    expected = {
        f"{way}_r{k}": percent([rank <= k for rank in ranks])
        for way, ranks in (("i2t", i2t), ("t2i", t2i), ("pair_i2t", pair_i2t))
        for k in (1, 5, 10)
    }
    expected |= {f"pair_t2i_r{k}": percent(hits) for k, hits in pair_t2i.items()}
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        ranks = sorted(ranks)
        expected[f"{way}_medr"] = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
    for protocol in ("", "pair_"):
        expected[f"{protocol}avg_r1"] = (
            expected[f"{protocol}i2t_r1"] + expected[f"{protocol}t2i_r1"]
        ) / 2
    return expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_equals_the_slow_implementation(seed, chunk_size, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    # seed 0: five a photo
    counts = torch.randint(0 if seed else 5, 7 if seed else 6, (23,), generator=generator)
    photo_of_caption = torch.repeat_interleave(torch.arange(23), counts)
    photo_of_caption = photo_of_caption[torch.randperm(len(photo_of_caption), generator=generator)]
    texts = torch.randn(len(photo_of_caption), 6, generator=generator)
    images = torch.randn(23, 6, generator=generator)
    images.index_add_(0, photo_of_caption, 0.3 * texts)  # better than chance, far from perfect
    expected = slow_metrics(images, texts, photo_of_caption)
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    assert retrieval_metrics(images, texts, photo_of_caption) == pytest.approx(expected)
    assert 0 < expected["avg_r1"] < 100


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_the_bank_equals_the_slow_implementation(chunk_size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 7, (23,), generator=generator)
    photo_of_caption = torch.arange(23).repeat_interleave(counts)
    hub = torch.randn(6, generator=generator)  # which all are near to
    texts = torch.randn(len(photo_of_caption), 6, generator=generator) + hub
    images = torch.randn(23, 6, generator=generator) + hub
    images.index_add_(0, photo_of_caption, 0.3 * texts)
    counts = torch.randint(1, 7, (40,), generator=generator)
    owners = torch.arange(40).repeat_interleave(counts)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    bank = Bank(torch.randn(40, 6, generator=generator) + hub,
                torch.randn(len(owners), 6, generator=generator) + hub, owners)
    means = torch.stack([bank.texts[owners == i].float().mean(0) for i in range(40)])
    means = F.normalize(means, dim=-1)
    expected = slow_metrics(images, texts, photo_of_caption,
                            (bank.photos, bank.photos[owners], bank.texts, means))
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    assert retrieval_metrics(images, texts, photo_of_caption, bank) == pytest.approx(expected)
    assert expected != pytest.approx(slow_metrics(images, texts, photo_of_caption))


def test_the_bank_takes_hubs_back():
    generator = torch.Generator().manual_seed(0)

    def directions(number):
        return F.normalize(torch.randn(number, 16, generator=generator), dim=-1)

    common = torch.eye(16)[0]  # what all texts say and one photo shows
    own = directions(30)
    texts, images = own + common, own + 0.5 * directions(30)
    images[0] = common
    bank = Bank(directions(500), directions(500) + common)
    plain = retrieval_metrics(images, texts, torch.arange(30))
    better = retrieval_metrics(images, texts, torch.arange(30), bank)
    assert better["t2i_r1"] > plain["t2i_r1"] + 20
    assert hub_share(images, texts, bank) < hub_share(images, texts) - 20
    assert hub_share(torch.eye(5), torch.eye(5)) == 100  # no more than ten photos
    assert hub_share(torch.eye(40), torch.eye(40)) == 25  # each is found once


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_ranks_of_a_photos_other_captions(monkeypatch, chunk_size):
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    texts = torch.randn(10, 3, generator=generator)
    texts[4] = texts[0]  # a tie with one of another photo
    asked, own = torch.tensor([0, 1, 3]), torch.tensor([1, 3, 9])
    queries = torch.randn(3, 3, generator=generator)
    queries[1] = texts[4]
    cosine = F.cosine_similarity(queries[:, None], texts[None], dim=-1)
    expected = []
    for row, photo, skipped in zip(cosine, asked.tolist(), own.tolist()):
        best = max(row[j] for j in range(10) if owners[j] == photo and j != skipped)
        expected.append(1 + sum(row[j] >= best - TIE for j in range(10) if owners[j] != photo))
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    assert ranks_of_others(queries, texts, owners, asked, own).tolist() == expected
    assert expected[1] == 2


def test_the_bank_completes_a_latent_by_the_partners_of_its_nearest():
    """Photos and texts that have nothing in common but what the bank's pairs say."""
    generator = torch.Generator().manual_seed(0)
    photos = F.normalize(torch.randn(12, 64, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(12, 64, generator=generator), dim=-1)
    plain = retrieval_metrics(photos, texts, torch.arange(12))
    remembered = retrieval_metrics(photos, texts, torch.arange(12), Bank(photos, texts))
    assert plain["avg_r1"] < 30 and remembered["avg_r1"] > 90


def test_the_bank_in_half_precision_is_that_of_its_latents():
    latents = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    bank = Bank(7 * latents[:12], latents[12:])
    again = Bank(**bank.state_dict())
    for name, tensor in bank.state_dict().items():
        assert tensor.equal(again.state_dict()[name])
    assert bank.state_dict()["photos"].dtype == bank.state_dict()["texts"].dtype == torch.float16
    for tensor in (again.photos, again.texts, again.captions):
        assert torch.allclose(tensor.float().norm(dim=1), torch.ones(len(tensor)), atol=1e-3)
    assert bank.nbytes == 2 * 32 * (12 + 12) + 8 * 12
    for of in (bank.photo_queries, bank.photo_gallery, bank.text_queries, bank.text_gallery):
        assert of(latents).shape == (24, 33)
        with pytest.raises(ValueError, match="a width of 32, these of 31"):
            of(torch.ones(3, 31))


def test_perfect_embeddings():
    photo_of_caption = torch.arange(20).repeat_interleave(5)
    metrics = retrieval_metrics(torch.eye(20), torch.eye(20)[photo_of_caption], photo_of_caption)
    assert metrics["avg_r1"] == 100 and metrics["i2t_medr"] == metrics["t2i_medr"] == 1
    # the five captions are equal: a tie never counts in the model's favour
    assert metrics["pair_i2t_r1"] == 0
    assert metrics["pair_t2i_r1"] == pytest.approx(20) and metrics["pair_t2i_r5"] == 100


def test_pair_protocol_is_a_fifth_of_the_standard_one():
    generator = torch.Generator().manual_seed(0)
    photo_of_caption = torch.arange(40).repeat_interleave(5)
    images = torch.randn(40, 8, generator=generator)
    texts = images[photo_of_caption] + 1.5 * torch.randn(200, 8, generator=generator)
    metrics = retrieval_metrics(images, texts, photo_of_caption)
    assert metrics["pair_avg_r1"] == pytest.approx(metrics["avg_r1"] / 5)


def test_constant_embeddings_are_no_better_than_chance():
    photo_of_caption = torch.arange(50).repeat_interleave(5)
    chance = chance_metrics([5] * 50)
    for bank in (None, Bank(torch.randn(9, 7), torch.randn(9, 7))):
        metrics = retrieval_metrics(
            torch.full((50, 7), 0.3), torch.full((250, 7), 0.3), photo_of_caption, bank
        )
        assert all(metrics[key] <= chance[key] for key in chance)
        assert metrics["t2i_medr"] == 50 and metrics["i2t_medr"] == 246


def test_hand_made_case():
    # Photo 0 at 0 degrees, photo 1 at 90; captions at 10 (of 0), 80 (of 0), 60 (of 1).
    angle = torch.deg2rad(torch.tensor([0.0, 90.0, 10.0, 80.0, 60.0]))
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    ranks = retrieval_ranks(points[:2], points[2:], torch.tensor([0, 0, 1]))
    # photo 1 sees the caption at 80 first, which is photo 0's
    assert ranks["i2t"].tolist() == [1, 2]
    assert ranks["t2i"].tolist() == [1, 2, 1]
    assert ranks["pair_i2t"].tolist() == [1, 3, 2]
    assert ranks["pair_t2i_ahead"].tolist() == [0, 1, 0]
    assert ranks["copies"].tolist() == [2, 2, 1]


def test_chance_is_what_random_embeddings_score():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2, 5, 0, 3] * 4)
    photo_of_caption = torch.repeat_interleave(torch.arange(20), counts)
    runs = [
        retrieval_metrics(
            torch.randn(20, 64, generator=generator),
            torch.randn(44, 64, generator=generator),
            photo_of_caption,
        )
        for _ in range(300)
    ]
    for key, expected in chance_metrics(counts).items():
        assert sum(run[key] for run in runs) / len(runs) == pytest.approx(expected, abs=2.5), key


@pytest.mark.parametrize("break_it, message", [
    (lambda i, t, p: (i.index_fill(0, torch.tensor([1]), float("nan")), t, p), "NaN"),
    (lambda i, t, p: (i, t.index_fill(0, torch.tensor([1]), float("inf")), p), "infinity"),
    (lambda i, t, p: (i, t, p[:-1]), "indices"),
    (lambda i, t, p: (i, t, p + 1), "indices"),
    (lambda i, t, p: (i[:0], t, p), "at least one"),
    (lambda i, t, p: (i, t[:0], p[:0]), "at least one"),
])
def test_refuses(break_it, message):
    arguments = break_it(torch.randn(3, 4), torch.randn(6, 4), torch.arange(3).repeat_interleave(2))
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*arguments)


def test_ranking_is_in_full_float32_where_tf32_is_on(monkeypatch):
    """On CUDA "high" is TF32, whose error of 1e-3 is far above a tie's 1e-6."""
    seen, mm, before = [], torch.mm, torch.get_float32_matmul_precision()

    def recording(*given, **options):
        seen.append(torch.get_float32_matmul_precision())
        return mm(*given, **options)

    monkeypatch.setattr(torch, "mm", recording)
    try:
        torch.set_float32_matmul_precision("high")
        retrieval_metrics(torch.eye(4), torch.eye(4), torch.arange(4))
        assert seen and set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_does_not_grow_with_photos_times_captions():
    """25,000 captions x 5,000 photos: what it takes beyond the process before is measured, and is
    under 1 GB.
    """
    script = """
import resource, torch
from src.utils.retrieval import retrieval_metrics
images, texts = torch.randn(5000, 64), torch.randn(25000, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_metrics(images, texts, torch.arange(5000).repeat_interleave(5))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    assert int(out) * unit < 1e9, f"{int(out) * unit / 1e6:.0f} MB"
