"""The metrics are compared with a slow and obvious implementation, and with cases made by hand."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from src import retrieval
from src.bank import Bank
from src.retrieval import (
    DIRECTIONS,
    KS,
    TIE,
    chance_metrics,
    hub_share,
    other_caption_ranks,
    retrieval_metrics,
    retrieval_ranks,
)
from tests.conftest import REPOSITORY


def slow_metrics(photo_to_text, text_to_photo, photo_of_caption):
    """The standard protocol as one would explain it, one query at a time. Both similarities are
    (N, M); a bank makes them differ."""
    num_photos, num_captions = photo_to_text.shape
    photo_of_caption = photo_of_caption.tolist()
    ranks = {"i2t": [], "t2i": []}
    for photo in range(num_photos):
        row = photo_to_text[photo].tolist()
        correct = [c for c in range(num_captions) if photo_of_caption[c] == photo]
        others = [c for c in range(num_captions) if photo_of_caption[c] != photo]
        if correct:
            best = max(row[c] for c in correct)
            ranks["i2t"].append(1 + sum(row[c] >= best - TIE for c in others))
    for caption in range(num_captions):
        column = text_to_photo[:, caption].tolist()
        correct = photo_of_caption[caption]
        others = [photo for photo in range(num_photos) if photo != correct]
        ranks["t2i"].append(1 + sum(column[photo] >= column[correct] - TIE for photo in others))

    metrics = {}
    for direction in DIRECTIONS:
        sorted_ranks = sorted(ranks[direction])
        for k in KS:
            hits = sum(rank <= k for rank in sorted_ranks)
            metrics[f"{direction}_r{k}"] = 100 * hits / len(sorted_ranks)
        middle = len(sorted_ranks) // 2
        lower_middle = (len(sorted_ranks) - 1) // 2
        metrics[f"{direction}_medr"] = (sorted_ranks[lower_middle] + sorted_ranks[middle]) / 2
    metrics["avg_r1"] = (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2
    metrics["rsum"] = (metrics["i2t_r1"] + metrics["i2t_r5"] + metrics["i2t_r10"]
                       + metrics["t2i_r1"] + metrics["t2i_r5"] + metrics["t2i_r10"])
    return metrics


def slow_cosines(images, texts):
    return F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_metrics_equal_the_slow_implementation(seed, chunk_size, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    if seed == 0:
        counts = torch.full((23,), 5)
    else:
        counts = torch.randint(0, 7, (23,), generator=generator)
    photo_of_caption = torch.repeat_interleave(torch.arange(23), counts)
    photo_of_caption = photo_of_caption[torch.randperm(len(photo_of_caption), generator=generator)]
    texts = torch.randn(len(photo_of_caption), 6, generator=generator)
    images = torch.randn(23, 6, generator=generator)
    images.index_add_(0, photo_of_caption, 0.3 * texts)  # better than chance, but far from perfect
    cosines = slow_cosines(images, texts)
    expected = slow_metrics(cosines, cosines, photo_of_caption)
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    assert retrieval_metrics(images, texts, photo_of_caption) == pytest.approx(expected)
    assert 0 < expected["avg_r1"] < 100


def slow_shared_ranks(photo_to_text, text_to_photo, photo_of_caption, text_ids):
    """Ranks where a text is right for every photo that has it. Each different text is there once.
    Both similarities are (N, M)."""
    pairs = sorted(set(zip(text_ids, photo_of_caption)))
    first = {text: text_ids.index(text) for text in text_ids}
    ranks = {"i2t": [], "t2i": []}
    for photo in range(len(photo_to_text)):
        row = {text: photo_to_text[photo, first[text]].item() for text in first}
        own = [text for text in first if (text, photo) in pairs]
        if own:
            best = max(row[text] for text in own)
            ranks["i2t"].append(1 + sum(row[text] >= best - TIE for text in set(first) - set(own)))
    for text in text_ids:
        column = text_to_photo[:, first[text]].tolist()
        own = [photo for photo in range(len(column)) if (text, photo) in pairs]
        best = max(column[photo] for photo in own)
        others = set(range(len(column))) - set(own)
        ranks["t2i"].append(1 + sum(column[photo] >= best - TIE for photo in others))
    return ranks


def photos_that_share_texts(seed, num_photos=23, num_texts=9, width=6):
    """Photos of which some have no caption, some several, and some the same one twice; returns
    images, texts, photo_of_caption and text_ids. Equal captions have equal embeddings."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (num_photos,), generator=generator)
    photo_of_caption = torch.arange(num_photos).repeat_interleave(counts)
    photo_of_caption = photo_of_caption[torch.randperm(len(photo_of_caption), generator=generator)]
    numbers = torch.randint(0, num_texts, (len(photo_of_caption),), generator=generator)
    texts = torch.randn(num_texts, width, generator=generator)[numbers]
    images = torch.randn(num_photos, width, generator=generator)
    images.index_add_(0, photo_of_caption, 0.5 * texts)
    return images, texts, photo_of_caption, 100 - 7 * numbers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_ranks_of_shared_texts_equal_the_slow_implementation(seed, chunk_size, monkeypatch):
    images, texts, photo_of_caption, text_ids = photos_that_share_texts(seed)
    cosines = slow_cosines(images, texts)
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    ranks = retrieval_ranks(images, texts, photo_of_caption, text_ids=text_ids)
    expected = slow_shared_ranks(cosines, cosines, photo_of_caption.tolist(), text_ids.tolist())
    assert {name: values.tolist() for name, values in ranks.items()} == expected
    assert max(expected["i2t"]) > 1 and max(expected["t2i"]) > 1


def test_a_perfect_model_of_class_names_scores_100_percent():
    class_of_photo = torch.arange(60) % 4
    images, texts = torch.eye(4)[class_of_photo], torch.eye(4)[class_of_photo]
    bank = Bank(images, texts, torch.arange(60))
    for given in (None, bank):
        metrics = retrieval_metrics(images, texts, torch.arange(60), given, class_of_photo)
        assert metrics["rsum"] == 600 and metrics["i2t_medr"] == metrics["t2i_medr"] == 1
    # Without the ids, the other photos of a class are ties, which count against the model.
    assert retrieval_metrics(images, texts, torch.arange(60))["avg_r1"] == 0


def test_constant_embeddings_of_class_names_are_no_better_than_chance():
    class_of_photo = torch.arange(50) % 20
    chance = chance_metrics([1] * 50, class_of_photo.bincount()[class_of_photo], 20)
    metrics = retrieval_metrics(torch.ones(50, 7), torch.ones(50, 7), torch.arange(50), None,
                                class_of_photo)
    assert all(metrics[key] <= chance[key] for key in chance)
    assert metrics["i2t_medr"] == 20


def test_ids_of_different_captions_change_nothing():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(9, 5, generator=generator), torch.randn(27, 5, generator=generator)
    photo_of_caption = torch.arange(9).repeat_interleave(3)
    bank = Bank(texts[:9], images, torch.arange(9))
    for given in (None, bank):
        assert retrieval_metrics(images, texts, photo_of_caption, given, torch.arange(27)
                                 ) == retrieval_metrics(images, texts, photo_of_caption, given)


def test_chance_of_shared_texts_is_what_random_embeddings_score():
    _, _, photo_of_caption, text_ids = photos_that_share_texts(0)
    pairs = torch.stack([photo_of_caption, text_ids], 1).unique(dim=0)
    photos_of_text = pairs[:, 1].bincount()
    chance = chance_metrics(pairs[:, 0].bincount(minlength=23), photos_of_text[text_ids],
                            int((photos_of_text > 0).sum()))
    generator = torch.Generator().manual_seed(1)
    trials = []
    for _ in range(300):
        images = torch.randn(23, 64, generator=generator)
        texts = torch.randn(101, 64, generator=generator)[text_ids]
        trials.append(retrieval_metrics(images, texts, photo_of_caption, text_ids=text_ids))
    for key, expected in chance.items():
        mean = sum(metrics[key] for metrics in trials) / len(trials)
        assert mean == pytest.approx(expected, abs=6 * 2.5 if key == "rsum" else 2.5), key


def test_perfect_embeddings():
    photo_of_caption = torch.arange(20).repeat_interleave(5)
    metrics = retrieval_metrics(torch.eye(20), torch.eye(20)[photo_of_caption], photo_of_caption)
    assert metrics["avg_r1"] == 100 and metrics["rsum"] == 600
    assert metrics["i2t_medr"] == metrics["t2i_medr"] == 1


def test_constant_embeddings_are_no_better_than_chance():
    photo_of_caption = torch.arange(50).repeat_interleave(5)
    chance = chance_metrics([5] * 50)
    for bank in (None, Bank(torch.randn(9, 7), torch.randn(9, 7), torch.arange(9))):
        metrics = retrieval_metrics(
            torch.full((50, 7), 0.3), torch.full((250, 7), 0.3), photo_of_caption, bank)
        assert all(metrics[key] <= chance[key] for key in chance)
        assert metrics["t2i_medr"] == 50 and metrics["i2t_medr"] == 246


def test_ranks_of_a_case_made_by_hand():
    # Photos at 0 and 90 degrees. The captions of the first are at 10 and 80, that of the second at
    # 60 degrees.
    angle = torch.deg2rad(torch.tensor([0.0, 90.0, 10.0, 80.0, 60.0]))
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    ranks = retrieval_ranks(points[:2], points[2:], torch.tensor([0, 0, 1]))
    # The second photo is nearest to the caption at 80 degrees, which is the first photo's.
    assert ranks["i2t"].tolist() == [1, 2]
    assert ranks["t2i"].tolist() == [1, 2, 1]


def test_chance_is_what_random_embeddings_score():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2, 5, 0, 3] * 4)
    photo_of_caption = torch.repeat_interleave(torch.arange(20), counts)
    trials = []
    for _ in range(300):
        images = torch.randn(20, 64, generator=generator)
        texts = torch.randn(44, 64, generator=generator)
        trials.append(retrieval_metrics(images, texts, photo_of_caption))
    for key, expected in chance_metrics(counts).items():
        mean = sum(metrics[key] for metrics in trials) / len(trials)
        assert mean == pytest.approx(expected, abs=6 * 2.5 if key == "rsum" else 2.5), key


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_ranks_of_a_photos_other_captions(monkeypatch, chunk_size):
    generator = torch.Generator().manual_seed(0)
    photo_of_caption = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    texts = torch.randn(10, 3, generator=generator)
    texts[4] = texts[0]  # a tie between captions of different photos
    photo_of_query, caption_of_query = torch.tensor([0, 1, 3]), torch.tensor([1, 3, 9])
    queries = torch.randn(3, 3, generator=generator)
    queries[1] = texts[4]
    cosines = F.cosine_similarity(queries[:, None], texts[None], dim=-1)
    expected = []
    for row, photo, excluded in zip(cosines, photo_of_query.tolist(), caption_of_query.tolist()):
        best = max(row[c] for c in range(10) if photo_of_caption[c] == photo and c != excluded)
        others = [c for c in range(10) if photo_of_caption[c] != photo]
        expected.append(1 + sum(row[c] >= best - TIE for c in others))
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    ranks = other_caption_ranks(queries, texts, photo_of_caption, photo_of_query, caption_of_query)
    assert ranks.tolist() == expected
    assert expected[1] == 2  # the tie counts against the model


def test_other_captions_of_photos_that_share_texts():
    """Photo 0 has the texts 5 and 6, photo 1 has 6 and 7, photo 2 has 7 and 8."""
    photo_of_caption, text_ids = torch.arange(3).repeat_interleave(2), torch.tensor(
        [5, 6, 6, 7, 7, 8])
    texts = torch.eye(4)[text_ids - 5]
    # By its own text, each query finds nothing but ties: one other text of the photo, two wrong.
    first = torch.tensor([0, 2, 4])
    ranks = other_caption_ranks(texts[first], texts, photo_of_caption, torch.arange(3), first,
                                text_ids)
    assert ranks.tolist() == [3, 3, 3]
    # The text 6, which photo 1 has as well, is right for photo 0.
    query = torch.tensor([[0.0, 1.0, 0.5, 0.5]])
    assert other_caption_ranks(query, texts, photo_of_caption, torch.tensor([0]),
                               torch.tensor([0]), text_ids).tolist() == [1]


def test_equal_texts_count_once_among_those_that_find_a_hub():
    texts = torch.eye(40)[[0] * 30 + list(range(1, 31))]
    assert hub_share(torch.eye(40), texts, text_ids=texts.argmax(1)) == pytest.approx(1000 / 31)


def test_hub_share():
    assert hub_share(torch.eye(5), torch.eye(5)) == 100  # there are fewer photos than hubs
    assert hub_share(torch.eye(40), torch.eye(40)) == 25  # each photo is nearest once
    assert hub_share(torch.eye(40), torch.eye(40)[[0] * 30 + list(range(1, 31))]) == 65


@pytest.mark.parametrize("damage, message", [
    (lambda i, t, p: (i.index_fill(0, torch.tensor([1]), float("nan")), t, p), "NaN"),
    (lambda i, t, p: (i, t.index_fill(0, torch.tensor([1]), float("inf")), p), "infinity"),
    (lambda i, t, p: (i, t, p[:-1]), "indices"),
    (lambda i, t, p: (i, t, p + 1), "indices"),
    (lambda i, t, p: (i[:0], t, p), "at least one"),
    (lambda i, t, p: (i, t[:0], p[:0]), "at least one"),
])
def test_invalid_inputs_are_refused(damage, message):
    inputs = damage(torch.randn(3, 4), torch.randn(6, 4), torch.arange(3).repeat_interleave(2))
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*inputs)


@pytest.mark.parametrize("text_ids", [torch.arange(4), torch.ones(3, 1), ["cat", "dog", "cat"]])
def test_as_many_text_ids_as_captions_are_needed(text_ids):
    with pytest.raises(ValueError, match="text_ids must hold 3 integers"):
        retrieval_metrics(torch.eye(3), torch.eye(3), torch.arange(3), text_ids=text_ids)


def test_ranking_is_in_full_float32_where_tf32_is_allowed(monkeypatch):
    """On CUDA "high" allows TF32, whose error of 1e-3 is far above a tie's 1e-6."""
    seen, mm, before = [], torch.mm, torch.get_float32_matmul_precision()

    def recording_mm(*given, **options):
        seen.append(torch.get_float32_matmul_precision())
        return mm(*given, **options)

    monkeypatch.setattr(torch, "mm", recording_mm)
    try:
        torch.set_float32_matmul_precision("high")
        retrieval_metrics(torch.eye(4), torch.eye(4), torch.arange(4))
        assert seen and set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
@pytest.mark.parametrize("equal_captions", [1, 100])
def test_memory_does_not_grow_with_photos_times_captions(equal_captions):
    """Ranking 25,000 captions and 5,000 photos, whose similarities would take 500 MB, needs less
    than 250 MB in addition to the process and its data."""
    script = """
import resource, torch
from src.retrieval import retrieval_metrics
images, texts = torch.randn(5000, 64), torch.randn(25000, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_metrics(images, texts, torch.arange(5000).repeat_interleave(5),
                  text_ids=torch.arange(25000) // GROUP)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    script = script.replace("GROUP", str(equal_captions))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, cwd=REPOSITORY)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    megabytes = int(done.stdout) * unit / 1e6
    assert megabytes < 250
