"""Pretrained encoders. Tiny ones with random weights stand in, so that nothing is downloaded."""
import json
import shutil
import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import show_flickr8k_results
import train_flickr8k_sgd as training
from src import feature_store, pretrained
from src.encoder_sources import load_encoder, load_encoders
from src.experiments import test_time_training
from src.pretrained import Encoders, PretrainedEncoder, Renormalize
from src.retrieval import retrieval_metrics
from src.runs import BEST, CONFIG, HISTORY, load_checkpoint, load_json
from src.search import embed_photos, embed_texts, load_model, photos_of_split
from src.settings import make_settings
from src.utils.augment import normalize
from src.utils.errors import UsageError
from src.utils.photo_store import STORE_FOLDER, open_photo
from src.utils.ragged import Texts
from src.utils.splits import hold_out, load_splits, open_split, read_pairs
from src.utils.tokenizers import CharTokenizer
from tests.conftest import ENCODER_FILE, arguments, main, run_script, write_dataset


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the small synthetic dataset, without its stores."""
    return shutil.copytree(shapes, tmp_path / "shapes", ignore=shutil.ignore_patterns(STORE_FOLDER))


def flags(encoder_file):
    return ["--image_encoder", f"{encoder_file}:photos", "--text_encoder", f"{encoder_file}:texts"]


@pytest.fixture(scope="session")
def trained(shapes, encoder_file, tmp_path_factory):
    """A finished run with two frozen encoders. Tests must not write into it."""
    output_dir = tmp_path_factory.mktemp("runs") / "pretrained"
    assert main(*arguments(shapes, output_dir, *flags(encoder_file))) == 0
    return output_dir


def word_tokenizer(folder):
    """Save a tokenizer of transformers that knows a few words; it ends each text with [EOS]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = "[PAD] [UNK] [EOS] a an the red blue green small large circle square above below"
    vocabulary = {word: i for i, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_max_length=20).save_pretrained(folder)
    return vocabulary


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a saved CLIPModel with a few thousand weights."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an extra (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = word_tokenizer(folder)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=small | dict(vocab_size=len(vocabulary), max_position_embeddings=20,
                                 eos_token_id=vocabulary["[EOS]"], pad_token_id=0, bos_token_id=1),
        vision_config=small | dict(image_size=32, patch_size=8), projection_dim=12))
    for parameter in model.parameters():  # so that features of two photos differ clearly
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an extra (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = word_tokenizer(folder)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20), add_pooling_layer=False
    ).save_pretrained(folder)
    return folder


# Features and their stores.


def test_features_are_those_of_the_photo_and_its_mirror_image(dataset_dir, encoder_file):
    image = load_encoder(f"{encoder_file}:photos", "image")
    text = load_encoder(f"{encoder_file}:texts", "text")
    settings = dict(image_encoder=image, text_encoder=text)
    data = open_split(dataset_dir, "train", 16, CharTokenizer(), **settings)
    assert data.photos.shape == (6, 2, 24) and data.photos.dtype == torch.float16
    assert data.counts()["features"] == 24
    for name, row in zip(data.names, data.photos[:].float()):
        photo = image.prepare(open_photo(dataset_dir / "Flicker8k_Dataset" / name, 64))
        assert torch.allclose(row[0], image(photo[None])[0], rtol=1e-3, atol=2e-3)
        assert torch.allclose(row[1], image(photo.flip(-1)[None])[0], rtol=1e-3, atol=2e-3)
    for caption, row in zip(data.captions, data.text_features[:].float()):
        assert torch.allclose(row, text(text.prepare([caption]))[0], rtol=1e-3, atol=2e-3)
    val = open_split(dataset_dir, "val", 16, CharTokenizer(), **settings)
    assert val.photos.shape == (3, 1, 24)


def test_a_stop_while_captions_are_encoded_costs_one_shard(dataset_dir, encoder_file, monkeypatch):
    monkeypatch.setattr(feature_store, "TEXT_SHARD", 8)
    text = load_encoder(f"{encoder_file}:texts", "text")
    texts = Texts.from_sequences([f"caption {i} of them".encode() for i in range(20)], "B")
    whole, store, encode = text.text_features(None, texts)[:], dataset_dir / "texts", text.encode
    encoded = []

    def failing(tokens):
        encoded.append(len(tokens["ids"]))
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(tokens)

    monkeypatch.setattr(text, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        text.text_features(store, texts)
    assert torch.equal(text.text_features(store, texts)[:], whole) and encoded == [8, 8, 8, 4]
    assert torch.equal(text.text_features(store, texts)[:], whole) and len(encoded) == 4


def test_held_out_photos_take_their_features_along(dataset_dir, encoder_file):
    folder = dataset_dir / "Flicker8k_Dataset"
    shutil.copy(folder / "1006_abc.jpg", folder / "1001_abc.jpg")  # a photo of val is in train, too
    encoders = {"image_encoder": load_encoder(f"{encoder_file}:photos", "image"),
                "text_encoder": load_encoder(f"{encoder_file}:texts", "text")}
    train, val = (read_pairs(dataset_dir, split, 16, allow_incomplete=True, **encoders)
                  for split in ("train", "val"))
    kept = train.photos[[0, 2, 3, 4, 5]], train.text_features[[*range(5), *range(10, 30)]]
    train = hold_out(train, [val], allow_incomplete=True)
    assert torch.equal(train.photos[:], kept[0])
    assert torch.equal(train.text_features[:], kept[1])


def test_a_photo_that_cannot_be_read_is_skipped_and_nothing_is_stored(dataset_dir, encoder_file):
    (dataset_dir / "Flicker8k_Dataset" / "1002_abc.jpg").write_bytes(b"no photo")
    image = load_encoder(f"{encoder_file}:photos", "image")
    whole = [f"{1000 + i}_abc.jpg" for i in (0, 1, 3, 4, 5)]
    data = open_split(dataset_dir, "train", 16, CharTokenizer(), image_encoder=image,
                                    allow_incomplete=True)
    assert data.names == whole and data.skipped == ["1002_abc.jpg"] and len(data.photos) == 5
    assert not list((dataset_dir / STORE_FOLDER).iterdir())


def test_stores_follow_encoder_weights_precision_and_files(dataset_dir, encoder_file, tmp_path):
    def store_of(path, amp_dtype=None, modality="image", function="photos"):
        encoder = load_encoder(f"{path}:{function}", modality)
        encoder.configure(torch.device("cpu"), amp_dtype, frozen=True)
        open_split(dataset_dir, "val", 16, CharTokenizer(),
                                 **{f"{modality}_encoder": encoder})
        return {path.name for path in (dataset_dir / STORE_FOLDER).glob(f"val_{modality}_*")}

    first = store_of(encoder_file)
    assert len(first) == 1 and store_of(encoder_file) == first
    other = tmp_path / "other.py"
    other.write_text(ENCODER_FILE.replace("SEED", "1"))
    second = store_of(other)
    assert len(second) == 2 and first < second  # each encoder keeps its own store
    assert len(store_of(encoder_file, torch.bfloat16)) == 3
    texts = store_of(encoder_file, modality="text", function="texts")
    assert len(texts) == 1
    captions = dataset_dir / "Flickr8k.token.txt"
    captions.write_text(captions.read_text().replace("a dog", "a cat"))
    assert len(store_of(encoder_file, modality="text", function="texts") | texts) == 2
    Image.new("RGB", (9, 9)).save(dataset_dir / "Flicker8k_Dataset" / "1006_abc.jpg")
    assert len(store_of(encoder_file) & first) == 0  # its photo has changed


def test_a_full_disk_is_one_line(copied, encoder_file, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(*arguments(copied, tmp_path / "run", *flags(encoder_file))) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
    assert not list((copied / STORE_FOLDER).iterdir())


def test_photos_are_renormalised_for_an_encoder_in_training(encoder_file):
    encoder = load_encoder(f"{encoder_file}:photos", "image")
    photo = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = torchvision.transforms.v2.functional.pil_to_tensor(photo)
    ours = Renormalize(encoder)(normalize(pixels[None]))
    assert torch.allclose(ours[0], encoder.prepare(photo), atol=1e-5)


# A run.


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
    assert main(*arguments(shapes, tmp_path / "run", *flags(encoder_file))) == 0
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
    assert main(*arguments(shapes, folder, *flags(encoder_file))) == 130
    assert main("--resume", "--output_dir", folder) == 0 and calls == [1, 2, 3]
    weights, before = (load_checkpoint(path / BEST, ["epoch"])["model_state_dict"]
                       for path in (folder, trained))
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_search_and_tables_use_the_encoders(trained, shapes, encoder_file, capsys):
    show = show_flickr8k_results.main
    photo = next((shapes / "Flicker8k_Dataset").iterdir())
    assert show(["--output_dir", str(trained), "--query", "a red circle", "--split", "val"]) == 0
    assert show(["--output_dir", str(trained), "--image", str(photo), "--split", "val"]) == 0
    assert test_time_training.main(["--output_dir", str(trained)]) == 0
    assert show(["--output_dir", str(trained)]) == 0
    out = capsys.readouterr().out
    assert f"image {encoder_file}:photos + text {encoder_file}:texts" in out and "1    " in out
    assert show(["--compare", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "encoders" in lines[0] and f"image {encoder_file}:photos" in lines[2]


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
    given = [*flags(encoder_file), "--finetune", "0.5", "--lr", "0.1"]
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


def test_the_names_of_weights_do_not_count():
    """Versions of transformers name the same weights differently."""
    first, second = torch.nn.Module(), torch.nn.Module()
    first.query, first.key = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.k_proj, second.q_proj = first.key, first.query
    before = pretrained.hash_weights(first)
    assert pretrained.hash_weights(second) == before
    second.k_proj.bias.data[0] += 1e-6
    assert pretrained.hash_weights(second) != before


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
    folder, given = tmp_path / "run", [*flags(encoder_file), "--finetune", "0.5", "--lr", "0.1"]
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


# Encoders that fail for some photos or texts.

FAILING_FILE = '''
import torch
from torchvision.transforms import v2
TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class Standardized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(48))

    def forward(self, images):
        rows = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) * self.scale
        return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)


class Strict(Standardized):
    def forward(self, images):
        if (images.amax((1, 2, 3)) == images.amin((1, 2, 3))).any():
            raise ArithmeticError("a blank photo")
        return super().forward(images)


class Lengths(torch.nn.Module):
    def forward(self, numbers):
        return 6 / numbers


def nan():
    return Standardized(), v2.Compose([v2.Resize((16, 16)), *TENSOR])


def strict():
    return Strict(), nan()[1]


def picky():
    return Standardized(), v2.Compose([no_black, v2.Resize((16, 16)), *TENSOR])


def no_black(photo):
    if not photo.getbbox():
        raise ValueError("all black\\nsecond line")
    return photo


def constant():
    return torch.nn.Sequential(Standardized(), torch.nn.Threshold(99, 1)), nan()[1]


def bug():
    return Standardized(), lambda photo: photo.no_such_method()


def any_shape():
    return Standardized(), v2.Compose([v2.Resize(16), *TENSOR])


def count(texts):
    if any("broken" in text for text in texts):
        raise KeyError("broken")
    return {"numbers": torch.tensor([[0.0 if "zero" in text else len(text)] * 4
                                     for text in texts])}


def texts():
    return Lengths(), count
'''


@pytest.fixture(scope="session")
def failing(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / "failing.py"
    path.write_text(FAILING_FILE)
    return path


@pytest.fixture
def blank(copied):
    """A dataset whose second training photo is black. Return the folder and the photo's name."""
    name = (copied / "Flickr_8k.trainImages.txt").read_text().split()[1]
    Image.new("RGB", (200, 150)).save(copied / "Flicker8k_Dataset" / name)
    return copied, name


@pytest.mark.parametrize("function, reason", [
    ("nan", "its features by {name} are NaN or too large for float16"),
    ("strict", "{name} fails for it (ArithmeticError: a blank photo)"),
    ("picky", "{name} cannot take it (ValueError: all black)")])
def test_a_photo_that_an_encoder_fails_for_is_named(
        function, reason, failing, blank, tmp_path, capsys):
    root, name = blank
    encoder = f"{failing}:{function}"
    given = arguments(root, tmp_path / "run", "--image_encoder", encoder, epochs=1)
    assert main(*given) == 2
    err = capsys.readouterr().err
    assert f"1 of the 40 photos of train are unreadable ({name}: " in err
    assert reason.format(name=encoder) in err and "\n--allow_incomplete trains without" in err
    assert main(*given, "--allow_incomplete") == 0
    assert "train: 1 photos left out" in capsys.readouterr().out


@pytest.mark.parametrize("function", ["nan", "picky", "strict"])
def test_a_search_leaves_out_the_photos_that_an_encoder_fails_for(
        function, failing, shapes, tmp_path, capsys):
    folder, encoder = tmp_path / "run", f"{failing}:{function}"
    assert main(*arguments(shapes, folder, "--image_encoder", encoder, epochs=1)) == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in list((shapes / "Flicker8k_Dataset").iterdir())[:3]:
        shutil.copy(photo, photos)
    Image.new("RGB", (200, 150)).save(photos / "lens_cap.png")
    show = ["--output_dir", str(folder)]
    capsys.readouterr()
    for _ in range(2):  # the second time, the embeddings are in the cache
        assert show_flickr8k_results.main([*show, "--query", "red", "--photos", str(photos)]) == 0
        out, err = capsys.readouterr()
        assert "in 3 photos" in out and "nan" not in out and "lens_cap" not in out
        assert f"(1): {photos / 'lens_cap.png'}: {encoder}" in err and err.count("\n") == 1
    image = ["--image", str(photos / "lens_cap.png")]
    assert show_flickr8k_results.main([*show, *image, "--split", "val"]) == 2
    err = capsys.readouterr().err
    assert f"lens_cap.png: {encoder}" in err and err.count("\n") == 1


def test_an_encoder_that_fails_for_all_photos_says_why(failing, shapes, tmp_path, capsys):
    for function, message in (("bug", "AttributeError: 'Image' object has no attribute 'no_such"),
                              ("any_shape", "prepares photos of different shapes as tensors of "
                               "different shapes, (3, 16, 21) and (3, 21, 16)"),
                              ("constant", "makes the same features of all photos")):
        name = f"{failing}:{function}"
        assert main(*arguments(shapes, tmp_path / "run", "--image_encoder", name)) == 2
        err = capsys.readouterr().err
        assert name in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize("word, reason", [
    ("zero", "ValueError: its features are NaN or too large"), ("broken", "KeyError: 'broken'")])
def test_a_text_that_an_encoder_fails_for_is_named(
        word, reason, failing, copied, tmp_path, capsys):
    captions, name = copied / "Flickr8k.token.txt", f"{failing}:texts"
    lines = captions.read_text().splitlines()
    folder, given = tmp_path / "run", ["--text_encoder", name]
    assert main(*arguments(copied, folder, *given, epochs=1)) == 0
    capsys.readouterr()
    search = ["--output_dir", str(folder), "--query", "red", f"{word} reds"]
    assert show_flickr8k_results.main(search) == 2
    err = capsys.readouterr().err
    assert f'"{word} reds"' in err and name in err and err.count("\n") == 1
    lines[3] = lines[3].split("\t")[0] + f"\ta {word} circle"
    captions.write_text("".join(f"{line}\n" for line in lines))
    assert main(*arguments(copied, tmp_path / "second", *given)) == 2
    err = capsys.readouterr().err
    assert f'{name} cannot take the text "a {word} circle' in err and reason in err


def test_a_finetuned_encoder_that_makes_nan_names_the_photo(failing, blank, tmp_path, capsys):
    root, name = blank
    given = ["--image_encoder", f"{failing}:nan", "--finetune", 1]
    assert main(*arguments(root, tmp_path / "run", *given)) == 2
    assert f"its features of {name} are NaN" in capsys.readouterr().err


# Encoders that cannot be loaded.


def test_an_unavailable_encoder_is_one_line_of_error(
        encoder_file, shapes, tmp_path, monkeypatch, capsys):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    raises = 1 + ENCODER_FILE.splitlines().index('    raise ValueError("no such luck")')
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    for modality, name, message in (
            ("image", "resnet51", "no such model (did you mean resnet50"),
            ("image", "resnet50", "cannot be downloaded"),
            ("image", "squeezenet1_0", "cannot be downloaded"),
            ("text", "resnet50", "encodes images, not texts"),
            ("image", "nobody/nothing", "needs transformers"),
            ("text", "nobody/nothing", "pip install -r requirements-extra.txt"),
            ("image", "no_file.py:build", "there is no file no_file.py"),
            ("image", f"{encoder_file}:raises", f"no such luck, line {raises}"),
            ("image", f"{encoder_file}:absent", "absent"),
            ("image", f"{encoder_file}:wrong", "TypeError"),
            ("image", f"{encoder_file}:maps", "must return features"),
            ("image", f"{encoder_file}:texts", "fails as an encoder of images"),
            ("text", f"{encoder_file}:photos", "fails as an encoder of texts"),
            ("image", f"{encoder_file}:infinite", "too large for float16")):
        status = main(*arguments(shapes, tmp_path / "run", f"--{modality}_encoder", name))
        err = capsys.readouterr().err
        assert (status, err.count("\n")) == (2, 1) and message in err, (name, err)
    given = ["--image_encoder", f"{encoder_file}:tall", "--finetune", "1"]
    assert main(*arguments(shapes, tmp_path / "run", *given)) == 2
    assert main(*arguments(shapes, tmp_path / "run", "--finetune", "1")) == 2
    err = capsys.readouterr().err
    assert "needs a square" in err and "needs an --image_encoder" in err


def test_features_of_a_torchvision_model_are_its_classifiers_input(tmp_path, monkeypatch):
    name = "mobilenet_v3_small"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    torch.save(model.state_dict(), folder / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder = load_encoder(name, "image")
    photo = Image.effect_noise((300, 260), 80).convert("RGB")
    image = weights.transforms()(photo)[None]
    assert torch.equal(encoder.prepare(photo), image[0]) and encoder.pixels == (224, 224)
    features = encoder(image)
    assert features.shape == (1, encoder.width) == (1, 1024)
    assert torch.allclose(model.classifier[3](features), model(image), atol=1e-5)


# Models of transformers.


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
    encoders.initialize(model, splits["train"], None)
    # CLIP starts training at a temperature of 0.07.
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    with torch.no_grad():
        images = F.normalize(model(images=splits["val"].photos[:][:, 0])["central_latent"], dim=-1)
        inputs = splits["val"].text_inputs(list(range(len(texts))))
        found = F.normalize(model(**inputs)["central_latent"], dim=-1) @ images.T
    assert (found - cosines).abs().max() < 1e-3


@pytest.mark.extra
def test_epoch_0_can_be_the_best(clip, shapes, tmp_path, monkeypatch, capsys):
    def worse(run, val):
        metrics = validate(run, val)
        return metrics | {"avg_r1": 100.0 if run.epoch == 0 else 0.0}

    validate = training.validate
    monkeypatch.setattr("train_flickr8k_sgd.validate", worse)
    folder, names = tmp_path / "run", ["--image_encoder", clip, "--text_encoder", clip]
    assert main(*arguments(shapes, folder, *names, epochs=1)) == 0
    assert load_checkpoint(folder / BEST, ["epoch"])["epoch"] == 0
    assert "best (epoch 0)" in capsys.readouterr().out
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


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.extra
@pytest.mark.parametrize("modality, file, changes, changed", [
    ("image", "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]},
     "the configuration or the image processor"),
    ("image", "config.json", {"hidden_act": "relu"}, "the configuration or the image processor"),
    ("text", "config.json", {"hidden_act": "relu"}, "the configuration or the tokenizer"),
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
    with pytest.raises(UsageError, match=f"{folder}.*{changed} changed"):
        encoders.check_unchanged(config, "run")


def load_one(folder, modality):
    return Encoders(**{modality: load_encoder(str(folder), modality)})


@pytest.mark.extra
def test_an_image_processor_must_give_all_photos_one_shape(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    edit_json(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(UsageError, match="different shapes, .*set do_center_crop to true"):
        load_encoder(str(folder), "image")


@pytest.mark.extra
def test_captions_that_are_longer_than_the_text_encoder_reads_are_counted(
        clip, copied, tmp_path, capsys):
    captions = copied / "Flickr8k.token.txt"
    lines = [" ".join(line.split(" ")[:8]) for line in captions.read_text().splitlines()]
    for i, words in ((2, 19), (3, 20), (4, 100)):  # [EOS] is the 20th token
        lines[i] = lines[i].split("\t")[0] + "\t" + " ".join(["circle"] * words)
    captions.write_text("".join(f"{line}\n" for line in lines))
    given = arguments(copied, tmp_path / "run", "--text_encoder", clip, epochs=1)
    for more in ([], ["--overwrite"]):  # the second time, the features are stored
        assert main(*given, *more) == 0
        assert (f"2 captions are longer than the 20 tokens that {clip} reads, and were cut"
                in capsys.readouterr().out)
    show = ["--output_dir", str(tmp_path / "run"), "--query", "a red circle", "red " * 30]
    assert show_flickr8k_results.main(show) == 0
    assert (capsys.readouterr().err
            == f"a query is longer than the 20 tokens that {clip} reads, and is cut\n")


@pytest.mark.extra
@pytest.mark.parametrize("kind, max_tokens", [
    ("Roberta", 18), ("XLMRoberta", 18), ("MPNet", 18), ("Camembert", 18), ("Bert", 20),
    ("OPT", 20), ("Bloom", None)])
def test_the_tokens_that_a_model_has_positions_for(kind, max_tokens, tmp_path):
    """The tokenizer does not state a length."""
    transformers = pytest.importorskip("transformers")
    vocabulary = word_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=int(1e30))
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 max_position_embeddings=20, pad_token_id=1)
    if kind == "OPT":
        sizes |= dict(ffn_dim=32, word_embed_proj_dim=16)
    if kind == "Bloom":
        sizes = dict(hidden_size=16, n_layer=1, n_head=2)
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}Model")(config(vocab_size=len(vocabulary), **sizes))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), "text")
    assert encoder.max_tokens == max_tokens
    long = " ".join(["red"] * 30)
    assert encoder.encode_texts([long, "a red circle"]).shape == (2, 16)
    assert encoder.count_cut([long, "a red circle"]) == (max_tokens is not None)


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


@pytest.mark.extra
def test_features_of_a_text_model_are_the_mean_over_its_tokens(bert, clip, tmp_path):
    encoder = load_encoder(str(bert), "text")
    tokens = encoder.prepare(["a red circle", "a square"])
    hidden = encoder.module.model(**tokens).last_hidden_state
    assert torch.allclose(encoder(tokens)[1], hidden[1, :3].mean(0), atol=1e-6)
    assert load_encoder(str(bert), "text").key == encoder.key  # no weight is random
    alone = encoder(encoder.prepare(["a square"]))
    assert torch.allclose(encoder(tokens)[1], alone[0], atol=1e-5)  # padding makes no difference
    long = encoder.prepare(["a red circle above " * 20])
    assert long["input_ids"].shape == (1, 20)
    with pytest.raises(UsageError, match="does not encode images; it takes input_ids"):
        load_encoder(str(bert), "image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="transformers finds no such model"):
        load_encoder(str(tmp_path / "empty"), "text")


@pytest.mark.extra
def test_a_model_file_that_lacks_weights_is_refused(bert, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="file lacks weights, such as encoder.layer.0"):
        load_encoder(str(folder), "text")


@pytest.mark.extra
def test_only_safetensors_are_read(bert, tmp_path):
    from safetensors.torch import load_file
    folder = shutil.copytree(bert, tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="safetensors"):
        load_encoder(str(folder), "text")


def test_several_processes_share_a_store(encoder_file, tmp_path):
    root = write_dataset(tmp_path / "data", {"train": 8, "val": 4, "test": 2})
    status, out, err = run_script(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "train_flickr8k_sgd.py", "--data_dir",
        root, "--output_dir", tmp_path / "run", "--epochs", 1, "--batch_size", 8, "--device", "cpu",
        "--model", "tiny", *flags(encoder_file))
    assert status == 0, err
    stores = [path for path in (root / STORE_FOLDER).iterdir() if path.name.startswith("train_")]
    assert len(stores) == 2 and len(load_json(tmp_path / "run" / HISTORY)) == 1


def test_pretrained_is_imported_without_transformers():
    assert not hasattr(pretrained, "transformers")
