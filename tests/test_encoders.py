"""The encoders of a run: what it remembers of them, and what they are to the model."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import show_flickr8k_results
import train_flickr8k_sgd as training
from src.encoder_sources import load_encoder, load_encoders
from src.encoders import Encoders, Renormalize
from src.gallery import photos_of_split
from src.pretrained import PretrainedEncoder
from src.runs import BEST, CONFIG, HISTORY, load_checkpoint, load_json
from src.search import embed_photos, embed_texts, load_model
from src.settings import make_settings
from src.utils.augment import normalize
from src.utils.errors import UsageError
from src.utils.photo_store import open_photo
from src.utils.splits import load_splits
from tests.conftest import arguments, edit_json, encoder_flags, main
from tests.test_train_flickr8k_sgd import interrupt_after


def test_photos_are_renormalised_for_an_encoder_in_training(encoder_file):
    encoder = load_encoder(f"{encoder_file}:photos", "image")
    photo = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = torchvision.transforms.v2.functional.pil_to_tensor(photo)
    ours = Renormalize(encoder)(normalize(pixels[None]))
    assert torch.allclose(ours[0], encoder.prepare(photo), atol=1e-5)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("modality, old, new, changed", [
    ("image", "manual_seed(0)", "manual_seed(1)", "the weights and the text of the file"),
    ("text", "127) for c in", "126) for c in", "the text of the file")])
def test_a_run_is_neither_resumed_nor_searched_with_a_changed_encoder(
        modality, old, new, changed, shapes, encoder_file, tmp_path, capsys):
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(encoder_file.read_text())
    name = f"{file}:{'photos' if modality == 'image' else 'texts'}"
    assert main(*arguments(shapes, folder, f"--{modality}_encoder", name, epochs=1)) == 0
    file.write_text(file.read_text().replace(old, new))
    before = contents(folder)
    capsys.readouterr()
    assert main("--resume", "--output_dir", folder, "--epochs", 2) == 2
    err = capsys.readouterr().err
    assert f"the {modality} encoder {name} is not the one" in err and f"as {changed} changed" in err
    assert "train a new run" in err and err.count("\n") == 2
    assert show_flickr8k_results.main(["--output_dir", str(folder), "--query", "a"]) == 2
    assert capsys.readouterr().err == err
    assert contents(folder) == before
    file.write_text(file.read_text().replace(new, old))
    assert main("--resume", "--output_dir", folder, "--epochs", 2) == 0


def test_a_finetuned_encoder_has_its_weights_from_the_run(
        shapes, encoder_file, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    given = [*encoder_flags(encoder_file), "--finetune", "0.5", "--lr", "0.1"]
    assert main(*arguments(shapes, folder, *given, epochs=1)) == 0
    model, tokenizer, _ = load_model(folder)
    before = embed_texts(model, tokenizer, ["a red circle"])
    build = PretrainedEncoder.__init__

    def changed(weights="", preprocessing=""):
        def build_changed(self, *given, **options):
            build(self, *given, **options)
            self.weights_hash += weights
            self.preprocessing_hash += preprocessing
            next(self.module.parameters()).data.mul_(2)
        monkeypatch.setattr(PretrainedEncoder, "__init__", build_changed)

    changed(weights="other")
    model, tokenizer, _ = load_model(folder)
    assert torch.equal(embed_texts(model, tokenizer, ["a red circle"]), before)
    assert main("--resume", "--output_dir", folder, "--epochs", 2) == 0
    changed(weights="other", preprocessing="other")
    assert main("--resume", "--output_dir", folder, "--epochs", 3) == 2
    assert "as the text of the file changed" in capsys.readouterr().err


def test_a_run_that_did_not_record_its_encoders_is_of_another_version(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    best = load_checkpoint(folder / BEST, ["config"])
    del best["config"]["encoders"]["image"]["preprocessing"]
    torch.save(best, folder / BEST)
    assert show_flickr8k_results.main(["--output_dir", str(folder), "--query", "a"]) == 2
    err = capsys.readouterr().err
    assert "please retrain" in err and err.count("\n") == 1


def load_one(folder, modality):
    return Encoders(**{modality: load_encoder(str(folder), modality)})


@pytest.mark.extra
@pytest.mark.parametrize("modality, file, changes, changed", [
    ("image", "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "the image processor"),
    ("image", "config.json", {"hidden_act": "relu"}, "the image processor"),
    ("text", "config.json", {"hidden_act": "relu"}, "the tokenizer"),
    ("text", "tokenizer_config.json", {"model_max_length": 12}, "the tokenizer"),
    ("text", "tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "the tokenizer"),
    ("text", "config.json", {"transformers_version": "4.0.0", "torch_dtype": "float32"}, None)])
def test_the_files_of_a_transformer_are_remembered(
        modality, file, changes, changed, clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    config = {"encoders": load_one(folder, modality).describe()}
    edit_json(folder / file, **changes)
    encoders = load_one(folder, modality)
    if changed is None:
        encoders.check_unchanged(config, "run")
        return
    with pytest.raises(UsageError, match=f"{folder}.*{changed} or the version of"):
        encoders.check_unchanged(config, "run")


@pytest.mark.extra
def test_other_weights_in_the_same_folder_are_noticed(clip, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(clip, tmp_path / "clip")
    config = {"encoders": load_one(folder, "image").describe()}
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="as the weights changed"):
        load_one(folder, "image").check_unchanged(config, "run")


def clip_features(folder, photos, texts):
    """The embeddings by the functions of transformers itself, of unit length. Its version 4 returns
    tensors, version 5 returns objects."""
    import transformers
    model = transformers.CLIPModel.from_pretrained(folder).float().eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = processor(images=[open_photo(photo, 64) for photo in photos], return_tensors="pt")
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
        outputs = model.get_image_features(**images), model.get_text_features(**tokens)
    return [F.normalize(getattr(output, "pooler_output", output), dim=-1) for output in outputs]


@pytest.mark.extra
def test_a_contrastive_pair_starts_as_itself(clip, shapes, tmp_path, capsys):
    folder, names = tmp_path / "run", ["--image_encoder", clip, "--text_encoder", clip]
    assert main(*arguments(shapes, folder, *names, "--no-amp", epochs=2)) == 0
    out = capsys.readouterr().out
    history = load_json(folder / HISTORY)
    assert [row["epoch"] for row in history] == [0, 1, 2] and "epoch   0  zero-shot" in out
    assert f"{clip} encodes every photo once; the features are stored: 12 features (its own" in out
    photos, captions = photos_of_split(shapes, "val")
    texts = sum(captions, [])
    owners = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    image_rows, text_rows = clip_features(clip, photos, texts)
    cosines = text_rows @ image_rows.T
    true_cosines = cosines.gather(1, owners[:, None])
    t2i = [int((row >= mine - 1e-6).sum()) for row, mine in zip(cosines, true_cosines)]
    i2t = []
    for photo in range(len(photos)):
        best = cosines[owners == photo, photo].max()
        i2t.append(1 + int((cosines[owners != photo, photo] >= best - 1e-6).sum()))
    zero_shot = history[0]["val"]
    for k in (1, 5, 10):
        assert zero_shot[f"t2i_r{k}"] == pytest.approx(100 * sum(r <= k for r in t2i) / len(t2i))
        assert zero_shot[f"i2t_r{k}"] == pytest.approx(100 * sum(r <= k for r in i2t) / len(i2t))
    # Before the first step, the similarities are those of the pair.
    settings = make_settings(**json.loads((folder / CONFIG).read_text())["settings"])
    encoders = load_encoders(settings)
    splits, tokenizer = load_splits(settings, None, encoders.image, encoders.text)
    model = training.build_model(settings, tokenizer, encoders).eval()
    encoders.initialize(model, splits["train"])
    # CLIP starts training at a temperature of 0.07.
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    with torch.no_grad():
        images = F.normalize(model(images=splits["val"].photos[:][:, 0])["central_latent"], dim=-1)
        inputs = splits["val"].text_inputs(list(range(len(texts))))
        found = F.normalize(model(**inputs)["central_latent"], dim=-1) @ images.T
    assert (found - cosines).abs().max() < 1e-3


@pytest.mark.extra
def test_a_pair_that_was_stopped_before_its_first_checkpoint_keeps_its_settings(
        clip, shapes, tmp_path):
    folder, names = tmp_path / "run", ["--image_encoder", clip, "--text_encoder", clip]
    with interrupt_after("save_json", lambda value, path: path.name == CONFIG):
        assert main(*arguments(shapes, folder, *names, "--lr", 0.05, epochs=1)) == 130
    before = load_json(folder / CONFIG)["settings"]
    assert main("--resume", "--output_dir", folder) == 0
    assert load_json(folder / CONFIG)["settings"] == before and before["lr"] == 0.05


@pytest.mark.extra
def test_epoch_0_can_be_the_best(clip, shapes, tmp_path, monkeypatch, capsys):
    def worse(run, *given):
        metrics = validate(run, *given)
        return metrics | {"avg_r1": 100.0 if run.epoch == 0 else 0.0}

    validate = training.validate
    monkeypatch.setattr("train_flickr8k_sgd.validate", worse)
    folder, names = tmp_path / "run", ["--image_encoder", clip, "--text_encoder", clip]
    assert main(*arguments(shapes, folder, *names, epochs=1)) == 0
    assert load_checkpoint(folder / BEST, ["epoch"])["epoch"] == 0
    assert "best epoch, 0 of 1" in capsys.readouterr().out
    assert main("--resume", "--output_dir", folder, "--epochs", 2) == 0
    assert [row["epoch"] for row in load_json(folder / HISTORY)] == [0, 1, 2]


@pytest.mark.extra
def test_a_contrastive_pair_is_finetuned(clip, shapes, tmp_path):
    folder = tmp_path / "run"
    given = ["--image_encoder", clip, "--text_encoder", clip, "--finetune", 0.1]
    assert main(*arguments(shapes, folder, *given, epochs=1)) == 0
    weights = load_checkpoint(folder / BEST, ["config"])["model_state_dict"]
    model, tokenizer, transform = load_model(folder)
    photos, captions = photos_of_split(shapes, "val")
    assert embed_photos(model, transform, photos).shape == (len(photos), 12)
    assert embed_texts(model, tokenizer, captions[0]).shape == (len(captions[0]), 12)
    # Each encoder holds a copy of the whole model. Its unused half has not been trained.
    name = "module.model.vision_model.encoder.layers.0.mlp.fc1.weight"
    image, text = weights[f"image_backbone.1.{name}"], weights[f"text_backbone.{name}"]
    before = load_encoder(str(clip), "image").state_dict()[name]
    if load_checkpoint(folder / BEST, ["epoch"])["epoch"] == 1:
        assert not torch.equal(image, before)
    assert torch.equal(text, before)
