"""Features of frozen encoders in their stores, also those of encoders that fail for some photos or
texts."""
import shutil

import pytest
import torch
from PIL import Image

import show_flickr8k_results
from src import feature_store
from src.encoder_sources import load_encoder
from src.encoders import Renormalize
from src.runs import HISTORY, load_json
from src.utils.augment import normalize
from src.utils.photo_store import STORE_FOLDER, open_photo
from src.utils.ragged import Texts
from src.utils.splits import hold_out, open_split, read_pairs
from src.utils.tokenizers import CharTokenizer
from tests.conftest import ENCODER_FILE, arguments, encoder_flags, main, run_script, write_dataset


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
    assert main(*arguments(copied, tmp_path / "run", *encoder_flags(encoder_file))) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
    assert not list((copied / STORE_FOLDER).iterdir())


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
    assert "train: 1 photo left out" in capsys.readouterr().out


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


def test_an_encoder_that_fails_in_mixed_precision_says_what_to_try(shapes, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(ENCODER_FILE.replace("SEED", "0").replace(
        "return torch.nn.functional", "assert not torch.is_autocast_enabled('cpu')\n"
        "        return torch.nn.functional"))
    given = arguments(shapes, tmp_path / "run", "--image_encoder", f"{file}:photos", epochs=1)
    assert main(*given, "--amp") == 2
    err = capsys.readouterr().err
    assert f"{file}:photos fails (AssertionError" in err and "; try --no-amp\n" in err
    assert main(*given, "--no-amp") == 0


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
    assert f"({name}: its features by {failing}:nan are NaN" in capsys.readouterr().err


def test_an_encoder_that_is_trained_takes_photos_of_its_own_preprocessing(dataset_dir):
    """Here that is a part of the photo, in which the pixels are not squeezed."""
    file = dataset_dir / "crop.py"
    file.write_text(ENCODER_FILE.replace("SEED", "0").replace(
        "v2.Resize((32, 32))", "v2.Resize(48), v2.CenterCrop(32)"))
    folder = dataset_dir / "Flicker8k_Dataset"
    for i, path in enumerate(sorted(folder.iterdir())):
        Image.effect_noise((50 + 9 * i, 70), 60 + i).convert("RGB").save(path)
    encoder = load_encoder(f"{file}:photos", "image")
    encoder.configure(encoder.device, None, frozen=False)
    data = open_split(dataset_dir, "train", 16, CharTokenizer(), image_encoder=encoder)
    assert data.photos.shape == (6, 3, 32, 32) and data.photos.dtype == torch.uint8
    renormalize = Renormalize(encoder)
    for name, photo in zip(data.names, data.photos[:]):
        expected = encoder.load(folder / name)
        assert torch.allclose(renormalize(normalize(photo[None]))[0], expected, atol=1e-5)
    again = open_split(dataset_dir, "train", 16, CharTokenizer(), image_encoder=encoder)
    assert torch.equal(again.photos[:], data.photos[:])


def test_preprocessing_that_differs_from_photo_to_photo_cannot_be_trained(
        shapes, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(ENCODER_FILE.replace("SEED", "0").replace(
        "v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))", "lambda photo: photo / photo.max()"))
    given = arguments(shapes, tmp_path / "run", "--image_encoder", f"{file}:photos", "--finetune")
    assert main(*given) == 2
    err = capsys.readouterr().err
    assert "normalises each photo by itself" in err and err.count("\n") == 1


def test_several_processes_share_a_store(encoder_file, tmp_path):
    root = write_dataset(tmp_path / "data", {"train": 8, "val": 4, "test": 2})
    status, out, err = run_script(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "train_flickr8k_sgd.py", "--data_dir",
        root, "--output_dir", tmp_path / "run", "--epochs", 1, "--batch_size", 8, "--device", "cpu",
        "--model", "tiny", *encoder_flags(encoder_file))
    assert status == 0, err
    stores = [path for path in (root / STORE_FOLDER).iterdir() if path.name.startswith("train_")]
    assert len(stores) == 2 and len(load_json(tmp_path / "run" / HISTORY)) == 1
