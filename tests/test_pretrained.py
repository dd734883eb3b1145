"""Pretrained encoders. Tiny ones with random weights stand in, so that nothing is downloaded."""
import threading
import warnings

import numpy as np
import pytest
import torch

import show_flickr8k_results
import train_flickr8k_sgd as training
from src import pretrained
from src.encoder_sources import load_encoder
from src.experiments import test_time_training
from src.gallery import photos_of_split
from src.pretrained import PretrainedEncoder
from src.retrieval import retrieval_metrics
from src.runs import BEST, CONFIG, HISTORY, load_checkpoint, load_json
from src.search import embed_photos, embed_texts, load_model
from src.utils.errors import UsageError
from tests.conftest import arguments, encoder_flags, main, run_script


def test_a_run_saves_no_weights_of_frozen_encoders(trained, encoder_file):
    best = load_checkpoint(trained / BEST, ["config"])
    assert not [name for name in best["model_state_dict"] if "backbone" in name]
    names = best["config"]["encoders"]
    assert names["image"]["name"] == f"{encoder_file}:photos" and names["text"]["width"] == 16
    assert load_json(trained / CONFIG)["encoders"] == names
    assert "image_encoder.mean" in best["model_state_dict"]


def test_a_loaded_model_scores_files_as_the_run_scored_features(trained, shapes):
    model, tokenizer, transform = load_model(trained)
    photos, captions = photos_of_split(shapes, "val")
    owners = [i for i, texts in enumerate(captions) for _ in texts]
    images = embed_photos(model, transform, photos)
    texts = embed_texts(model, tokenizer, [text for texts in captions for text in texts])
    found = retrieval_metrics(images, texts, owners)
    stored = load_checkpoint(trained / BEST, ["metrics"])["metrics"]
    # Stored features are rounded to float16, and may have been computed in bfloat16, so a rank or
    # two may change.
    assert found["avg_r1"] == pytest.approx(stored["avg_r1"], abs=100 * 2 / len(photos))
    assert found["i2t_r10"] == pytest.approx(stored["i2t_r10"], abs=100 * 2 / len(photos))


def test_a_second_run_uses_the_stored_features(
        trained, shapes, encoder_file, tmp_path, monkeypatch):
    def encode(*arguments):
        raise AssertionError("a photo or a text was encoded again")

    monkeypatch.setattr(PretrainedEncoder, "encode", encode)
    assert main(*arguments(shapes, tmp_path / "run", *encoder_flags(encoder_file))) == 0
    rows, before = ([row | {"seconds": 0} for row in load_json(folder / HISTORY)]
                    for folder in (tmp_path / "run", trained))
    assert rows == before


def test_resume_ends_with_the_same_weights(trained, shapes, encoder_file, tmp_path, monkeypatch):
    calls = []

    end_epoch = training.end_epoch

    def stop_at_second(run, row, stopping):
        end_epoch(run, row, stopping)
        calls.append(row["epoch"])
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("train_flickr8k_sgd.end_epoch", stop_at_second)
    folder = tmp_path / "run"
    assert main(*arguments(shapes, folder, *encoder_flags(encoder_file))) == 130
    assert main("--resume", "--output_dir", folder) == 0 and calls == [1, 2, 3]
    weights, before = (load_checkpoint(path / BEST, ["epoch"])["model_state_dict"]
                       for path in (folder, trained))
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_search_and_tables_use_the_encoders(trained, shapes, encoder_file, capsys):
    show = show_flickr8k_results.main
    photo = next((shapes / "Flicker8k_Dataset").iterdir())
    assert show(["--output_dir", str(trained), "--query", "a red circle", "--split", "val"]) == 0
    assert show(["--output_dir", str(trained), "--image", str(photo), "--split", "val"]) == 0
    assert show(["--output_dir", str(trained)]) == 0
    out = capsys.readouterr().out
    assert f"image {encoder_file}:photos + text {encoder_file}:texts" in out and "1    " in out
    assert show(["--compare", str(trained)]) == 0
    # What is the same for all runs is said below the table.
    assert f"encoders:image{encoder_file}:photos" in "".join(capsys.readouterr().out.split())


def test_the_memory_of_a_run_with_encoders_can_go_on_learning(shapes, encoder_file, tmp_path):
    assert main(*arguments(shapes, tmp_path, "--memory_size", 16, *encoder_flags(encoder_file),
                           epochs=1)) == 0
    assert test_time_training.main(["--output_dir", str(tmp_path)]) == 0


def test_the_names_of_weights_do_not_count():
    """Versions of transformers name the same weights differently."""
    first, second = torch.nn.Module(), torch.nn.Module()
    first.query, first.key = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.k_proj, second.q_proj = first.key, first.query
    before = pretrained.hash_tensors(first)
    assert pretrained.hash_tensors(second) == before
    second.k_proj.bias.data[0] += 1e-6
    assert pretrained.hash_tensors(second) != before


def test_weights_of_quantized_layers_count():
    def quantized(bias):
        layer = torch.nn.Linear(3, 3)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
        with warnings.catch_warnings(action="ignore"):
            return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer))

    first, same, other = (pretrained.hash_tensors(quantized(bias)) for bias in (0.0, 0.0, 1.0))
    assert first and first == same != other


class Odd(torch.nn.Linear):
    def __init__(self, forward):
        super().__init__(3 * 32 * 32, 4)
        self.function = forward

    def forward(self, images):
        return self.function(super().forward(images.flatten(1)))


def odd_encoder(forward):
    return PretrainedEncoder("odd", "image", Odd(forward), lambda photo: torch.from_numpy(
        np.array(photo.resize((32, 32)), np.float32)).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("forward", [torch.squeeze, lambda x: x - x.mean(0)])
def test_features_that_depend_on_the_batch_are_refused(forward):
    with pytest.raises(UsageError, match="odd makes other features of a photo alone than"):
        odd_encoder(forward)


def test_weights_without_values_are_refused():
    with pytest.raises(UsageError, match="odd fails as an encoder of images .RuntimeError: Can't"):
        PretrainedEncoder("odd", "image", torch.nn.LazyLinear(3), None)


def test_a_network_that_has_no_eval_mode_is_refused():
    exported = torch.export.export(torch.nn.Linear(3, 3), (torch.zeros(1, 3),)).module()
    with pytest.raises(UsageError, match="odd fails as an encoder of images .NotImplementedError"):
        PretrainedEncoder("odd", "image", exported, None)


@pytest.mark.parametrize("forward, error", [
    (lambda x: torch.from_numpy(x.numpy()), "cannot be trained"),
    (torch.detach, "depend on no weights")])
def test_what_cannot_be_trained_is_refused(forward, error):
    encoder = odd_encoder(forward)
    with pytest.raises(UsageError, match=f"--finetune: .*odd {error}"):
        encoder.freeze_unused()


def test_what_cannot_be_copied_is_not_trained():
    encoder = odd_encoder(torch.tanh)
    encoder.lock = threading.Lock()
    with pytest.raises(UsageError, match="--finetune: odd cannot be trained .TypeError: cannot"):
        encoder.freeze_unused()


def test_a_network_whose_copy_fails_is_not_trained():
    encoder = odd_encoder(torch.tanh)
    layer = encoder.module

    def hook(module, inputs):
        assert module is layer, "it is a copy"

    layer.register_forward_pre_hook(hook)
    with pytest.raises(UsageError, match="--finetune: odd cannot be trained .*it is a copy"):
        encoder.freeze_unused()


def test_a_network_that_keeps_its_last_output_is_trained():
    encoder = odd_encoder(torch.tanh)

    def keep(module, inputs, output):
        module.last = output

    encoder.module.register_forward_hook(keep)
    encoder.freeze_unused()
    assert encoder.module.weight.requires_grad


def test_a_state_of_other_values_than_tensors_is_not_trained(monkeypatch):
    monkeypatch.setattr(Odd, "get_extra_state", lambda self: "a text", raising=False)
    encoder = odd_encoder(torch.tanh)
    with pytest.raises(UsageError, match="--finetune: odd cannot be trained .TypeError: its state"):
        encoder.freeze_unused()


def test_an_encoder_is_made_trainable_where_it_is():
    """The device of the weights need not be the one on which photos are prepared."""
    encoder = odd_encoder(torch.tanh)
    encoder.configure(torch.device("meta"), None, frozen=False)
    encoder.freeze_unused()
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("modality, function", [("image", "photos"), ("text", "texts")])
def test_one_pretrained_encoder_alone(modality, function, shapes, encoder_file, tmp_path):
    folder = tmp_path / "run"
    given = [f"--{modality}_encoder", f"{encoder_file}:{function}"]
    assert main(*arguments(shapes, folder, *given, epochs=1)) == 0
    best = load_checkpoint(folder / BEST, ["config"])
    assert list(best["config"]["encoders"]) == [modality]
    model, tokenizer, _ = load_model(folder)
    width = best["config"]["settings"]["latent_dim"]
    assert embed_texts(model, tokenizer, ["a red circle"]).shape == (1, width)


def test_finetuning_trains_the_encoders_and_keeps_them(shapes, encoder_file, tmp_path):
    folder = tmp_path / "run"
    given = [*encoder_flags(encoder_file), "--finetune", "0.5", "--lr", "0.1"]
    status, out, err = run_script("train_flickr8k_sgd.py", *arguments(shapes, folder, *given))
    assert (status, err) == (0, "") and "an epoch will take about" in out
    best = load_checkpoint(folder / BEST, ["config"])
    weights, settings = best["model_state_dict"], best["config"]["settings"]
    assert settings["image_size"] == 32
    image = load_encoder(f"{encoder_file}:photos", "image").module
    name = "image_backbone.1.module."
    assert not torch.equal(weights[f"{name}weight"], image.weight)
    assert torch.equal(weights[f"{name}unused"], image.unused)
    model, tokenizer, transform = load_model(folder)
    photos, captions = photos_of_split(shapes, "val")
    owners = [i for i, texts in enumerate(captions) for _ in texts]
    found = retrieval_metrics(
        embed_photos(model, transform, photos),
        embed_texts(model, tokenizer, sum(captions, [])), owners)
    assert found["avg_r1"] == pytest.approx(best["metrics"]["avg_r1"], abs=100 * 2 / len(photos))
    assert main("--resume", "--output_dir", folder, "--epochs", 4) == 0


def test_pretrained_is_imported_without_transformers():
    assert not hasattr(pretrained, "transformers")
