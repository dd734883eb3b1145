import json
import shutil
import threading

import pytest
import torch

from src import search
from src.evaluation import evaluate
from src.gallery import photos_of_split
from src.retrieval import retrieval_metrics
from src.runs import BEST, HISTORY
from src.search import embed_photos, embed_texts, load_model
from src.settings import PRESETS
from src.utils.errors import UsageError
from src.utils.splits import open_split
from tests.conftest import arguments, main


def change(key, value):
    def damage(run_dir):
        state = torch.load(run_dir / BEST, weights_only=True)
        torch.save(state | {key: value(state[key])}, run_dir / BEST)
    return damage


def test_embeddings_give_the_same_metrics_as_the_evaluation(finished, shapes):
    model, tokenizer, transform = load_model(finished[0])
    photos, captions = photos_of_split(shapes, "val")
    images = embed_photos(model, transform, photos, batch_size=5)
    all_captions = [caption for photo_captions in captions for caption in photo_captions]
    texts = embed_texts(model, tokenizer, all_captions, batch_size=7)
    photo_of_text = [i for i, photo_captions in enumerate(captions) for _ in photo_captions]
    metrics = retrieval_metrics(images, texts, photo_of_text)
    data = open_split(
        shapes, "val", transform(photos[0]).shape[-1], tokenizer, cache=False
    )
    assert metrics == pytest.approx(evaluate(model.cpu(), data))
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))


def test_photos_are_embedded_at_the_size_of_the_validation(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS["tiny"], "start_size", 32)
    assert main(*arguments(shapes, tmp_path, "--no-amp", epochs=1)) == 0
    model, tokenizer, transform = load_model(tmp_path)
    photos, captions = photos_of_split(shapes, "val")
    assert transform(photos[0]).shape == (3, 48, 48)
    metrics = retrieval_metrics(
        embed_photos(model, transform, photos),
        embed_texts(model, tokenizer, [text for texts in captions for text in texts]),
        [i for i, texts in enumerate(captions) for _ in texts],
    )
    assert metrics == pytest.approx(json.loads((tmp_path / HISTORY).read_text())[0]["val"])


def test_each_text_is_embedded_as_if_it_were_alone(finished):
    model, tokenizer, _ = load_model(finished[0])
    texts = [
        "a red circle on the left and a small blue square on the right",
        "a dog",
        "two green crosses",
    ]
    embeddings = embed_texts(model, tokenizer, texts)
    for text, row in zip(texts, embeddings):
        torch.testing.assert_close(
            embed_texts(model, tokenizer, [text])[0], row, rtol=1e-4, atol=1e-5
        )
    assert not model.training and (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.9999


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda run_dir: (run_dir / BEST).unlink(), "has no best model yet"),
        (lambda run_dir: (run_dir / BEST).write_bytes(b"nonsense"), "damaged"),
        (
            lambda run_dir: torch.save({"state_dict": {}}, run_dir / BEST),
            "not a checkpoint of this version",
        ),
        (change("model_state_dict", lambda weights: {}), "do not fit the model"),
        (
            change(
                "model_state_dict", lambda weights: weights | {"memory.slots": torch.zeros(2, 2)}
            ),
            "do not fit the model",
        ),
        (change("tokenizer", lambda state: {"name": "words"}), "do not fit the model"),
        (change("config", lambda config: {}), "the run is of another version"),
        (change("config", lambda config: {"arguments": {}}), "the run is of another version"),
        (
            change("config", lambda config: config | {"settings": config["settings"] | {"a": 1}}),
            "the run is of another version",
        ),
        (
            change(
                "config",
                lambda config: config | {"settings": config["settings"] | {"latent_dim": 32}},
            ),
            "do not fit the model",
        ),
    ],
)
def test_a_run_that_cannot_be_loaded_gives_a_one_line_error(run_dir, damage, message):
    damage(run_dir)
    with pytest.raises(UsageError, match=message) as error:
        load_model(run_dir)
    assert len(str(error.value).splitlines()) == 1 and str(run_dir) in str(error.value)


def test_the_next_photos_are_decoded_while_the_model_embeds(finished, shapes):
    photos = photos_of_split(shapes, "test")[0]
    decoded, is_read = [], [threading.Event() for _ in photos]

    def transform(path):
        decoded.append(path)
        is_read[photos.index(path)].set()
        return torch.zeros(3, 48, 48)

    def embed(images):
        assert is_read[min(2 * (len(embedded) + 1), len(photos) - 1)].wait(60)
        return {"central_latent": torch.ones(len(images), 4)}

    model, embedded = load_model(finished[0])[0], []
    model.forward = embed
    for batch, _ in search.embed_photo_batches(model, transform, photos, batch_size=2):
        embedded.append(batch)
        assert len(decoded) <= 2 * (len(embedded) + 2)
    assert embedded == [photos[i:i + 2] for i in range(0, 8, 2)] and sorted(decoded) == photos
