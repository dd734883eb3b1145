"""From a model and a split to metrics; several processes are tested in test_distributed.py."""
import pytest
import torch
import torch.nn.functional as F

from src import evaluation
from src.evaluation import (
    compare_bank,
    compare_photo_and_text,
    embed,
    embed_dataset,
    evaluate,
    make_bank,
    prepare_photos,
)
from src.model import combine_photo_and_text
from src.retrieval import retrieval_metrics
from tests.test_training import start_run


def test_a_dataset_is_embedded_in_its_own_order(shapes, monkeypatch):
    run, splits = start_run(shapes, device="cpu")
    data = splits["val"]
    photos, texts, photo_of_caption = embed_dataset(run.model, data)
    assert photos.shape == (12, 64) and texts.shape == (60, 64)
    assert photo_of_caption.equal(data.photo_of_caption)
    for rows in (torch.tensor([3]), torch.tensor([7, 0])):
        photo_latents, caption_latents = embed(run.model, data, rows, rows.numpy())
        assert torch.allclose(photo_latents, photos[rows], atol=1e-5)
        assert torch.allclose(caption_latents, texts[rows], atol=1e-5)
    monkeypatch.setattr(evaluation, "PHOTO_BATCH", 5)
    monkeypatch.setattr(evaluation, "CAPTION_BATCH", 7)
    calls = []
    metrics = evaluate(run.model, data, progress=lambda *counts: calls.append(counts))
    assert calls[:4] == [(5, 12, "photos"), (10, 12, "photos"), (12, 12, "photos"),
                         (7, 60, "captions")]
    assert metrics == pytest.approx(retrieval_metrics(photos, texts, photo_of_caption))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(shapes, training):
    run, splits = start_run(shapes, device="cpu")
    run.model.train(training)
    evaluate(run.model, splits["val"])
    assert run.model.training is training


def test_photos_are_prepared_once_unless_they_are_many(shapes, monkeypatch):
    run, splits = start_run(shapes, device="cpu")
    data = splits["val"]
    prepared = prepare_photos(data, 32, torch.bfloat16, torch.device("cpu"))
    assert prepared.photos.shape == (12, 3, 32, 32) and prepared.photos.dtype == torch.bfloat16
    assert data.photos.dtype == torch.uint8
    photos, texts, _ = embed_dataset(run.model, data, torch.bfloat16)
    prepared_photos, prepared_texts, _ = embed_dataset(run.model, prepared, torch.bfloat16)
    assert torch.allclose(photos, prepared_photos, atol=1e-3) and torch.equal(texts, prepared_texts)
    monkeypatch.setattr(evaluation, "PREPARED_PHOTOS", 11)
    assert prepare_photos(data, 32, None, torch.device("cpu")) is data


def test_the_seed_draws_the_photos_of_a_bank(shapes, monkeypatch):
    monkeypatch.setattr(evaluation, "BANK_SIZE", 9)
    run, splits = start_run(shapes)
    data = splits["val"]  # its photos have the size that the model is used with
    bank, same_seed, other_seed = (make_bank(run.model, data, 32, seed) for seed in (0, 0, 1))
    assert bank.photos.equal(same_seed.photos) and not bank.photos.equal(other_seed.photos)
    assert bank.texts.equal(same_seed.texts) and not bank.texts.equal(other_seed.texts)

    # There are nine different photos, each with all its captions.
    photos, texts, photo_of_caption = embed_dataset(run.model, data)
    photo_ids = (bank.photos.float() @ F.normalize(photos, dim=-1).cpu().T).argmax(1)
    caption_ids = (bank.texts.float() @ F.normalize(texts, dim=-1).cpu().T).argmax(1)
    assert len(bank.photos) == len(photo_ids.unique()) == 9
    assert len(bank.texts) == torch.isin(photo_of_caption, photo_ids).sum() > 9
    assert photo_of_caption[caption_ids].equal(photo_ids[bank.photo_of_text])


def test_photos_of_a_bank_are_resized(shapes):
    """Training photos are stored larger than those that the model is used with."""
    run, splits = start_run(shapes, device="cpu")
    sides = []
    run.model.image_encoder.register_forward_pre_hook(
        lambda module, inputs: sides.append(inputs[0].shape[-1]))
    make_bank(run.model, splits["train"], 32)
    assert splits["train"].photos.shape[-1] == 36 and sides == [32]


def test_the_comparison_of_a_bank_is_the_metrics_without_and_with_it(shapes):
    run, splits = start_run(shapes, device="cpu")
    data = splits["val"]
    bank = make_bank(run.model, splits["train"], 32)
    results = compare_bank(run.model, data, bank)
    photos, texts, photo_of_caption = embed_dataset(run.model, data)
    assert results["without_bank"] == evaluate(run.model, data)
    assert results["with_bank"] == retrieval_metrics(photos, texts, photo_of_caption, bank)
    assert results["with_bank"] != results["without_bank"]
    assert results["hub_share"].keys() == {"without_bank", "with_bank"}
    assert results["photo_and_text"].keys() == {"caption", "photo", "both"}


def test_other_captions_are_found_by_a_caption_by_the_photo_and_by_both():
    generator = torch.Generator().manual_seed(0)
    photo_of_caption = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])  # the second photo has one caption
    photos = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    texts = photos[photo_of_caption] + 0.5 * torch.randn(8, 8, generator=generator)
    texts = F.normalize(texts, dim=-1)
    query_photos, first_captions = [0, 2, 3], [0, 4, 6]
    combined = combine_photo_and_text(photos[query_photos], texts[first_captions])
    queries = {"caption": texts[first_captions], "photo": photos[query_photos], "both": combined}
    expected = {}
    for name, latents in queries.items():
        hits = 0
        for latent, photo, caption in zip(latents, query_photos, first_captions):
            candidates = [c for c in range(8) if c != caption]
            nearest = max(candidates, key=lambda c: float(texts[c] @ latent))
            hits += int(photo_of_caption[nearest]) == photo
        expected[name] = 100 * hits / 3
    results = compare_photo_and_text(photos, texts, photo_of_caption)
    assert {name: recalls["r1"] for name, recalls in results.items()} == pytest.approx(expected)
    assert results["photo"]["r10"] == 100  # there are only eight captions


def test_without_a_second_caption_there_are_no_other_captions_to_find():
    assert compare_photo_and_text(torch.eye(3), torch.eye(3), torch.arange(3)) is None


def test_a_text_is_right_for_every_photo_that_has_it(shapes):
    run, splits = start_run(shapes, device="cpu")
    data = splits["val"]
    bank = make_bank(run.model, splits["train"], 32)
    plain = compare_bank(run.model, data, bank)
    assert bank.correct_hubs
    data.text_ids = data.photo_of_caption // 4 + 1  # of 12 photos, four have the same text
    shared = compare_bank(run.model, data, bank)
    assert shared["without_bank"] == evaluate(run.model, data)
    photos, texts, photo_of_caption = embed_dataset(run.model, data)
    for column, given in (("without_bank", None), ("with_bank", bank)):
        assert shared[column] == retrieval_metrics(
            photos, texts, photo_of_caption, given, data.text_ids)
        assert shared[column]["t2i_r5"] > plain[column]["t2i_r5"]
    assert shared["hub_share"]["without_bank"] == 100  # three texts have at most three photos
    assert shared["photo_and_text"] is None  # no photo has two different captions
    assert not make_bank(run.model, data, 32).correct_hubs
