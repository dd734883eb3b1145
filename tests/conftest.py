"""What several tests share: small datasets, runs of the scripts, and encoders of a user."""
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_flickr8k_sgd
from src.settings import make_settings
from src.utils.caption_files import token_rows
from src.utils.folder import SPLIT_FILES
from src.utils.photo_store import STORE_FOLDER
from src.utils.splits import open_split
from src.utils.synthetic import write_synthetic
from src.utils.tables import table_rows
from src.utils.tokenizers import CharTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
# Warnings about deprecated functions that this project calls, as a script prints them. The filter
# of pytest does not apply to other processes.
OUR_DEPRECATIONS = re.compile(
    rf"^{re.escape(str(REPOSITORY))}.*(Deprecation|Future)Warning", re.MULTILINE)

# A user's file with functions that return encoders of photos and of texts, and with others that
# fail in various ways.
ENCODER_FILE = '''
import torch
from torchvision.transforms import v2


class Photos(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.weight = torch.nn.Parameter(torch.randn(24, 3 * 8 * 8, generator=generator) / 8)
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ self.weight.T


class Texts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.table = torch.nn.Parameter(torch.randn(128, 16, generator=generator))

    def forward(self, ids, mask):
        return (self.table[ids] * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def photos():
    return Photos(), v2.Compose([v2.Resize((32, 32)), v2.ToImage(),
                                 v2.ToDtype(torch.float32, scale=True),
                                 v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])


def tokenize(texts):
    ids = [torch.tensor([min(ord(c), 127) for c in text]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"ids": ids, "mask": (ids > 0).float()}


def texts():
    return Texts(), tokenize


def raises():
    raise ValueError("no such luck")


def wrong():
    return 3


def maps():
    return torch.nn.Conv2d(3, 4, 3), photos()[1]


def infinite():
    class Infinite(Photos):
        def forward(self, images):
            return super().forward(images) * 1e9
    return Infinite(), photos()[1]


def tall():
    return Photos(), v2.Compose([v2.Resize((32, 16)), photos()[1].transforms[1],
                                 photos()[1].transforms[2]])
'''


def start_script(*arguments, **options):
    """Start a script as a user would, from the root of the repository. Return a
    subprocess.Popen."""
    command = [sys.executable, "-W", "always::DeprecationWarning", "-W", "always::FutureWarning",
               *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def run_script(*arguments, **options):
    """Run a script as a user would. Return (exit status, standard output, standard error).

    The script must neither print a traceback nor call a deprecated function."""
    process = start_script(*arguments, **options)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    assert not OUR_DEPRECATIONS.search(err), err
    return process.returncode, out, err


def main(*flags):
    """Run the training script inside this process, which saves the seconds of importing torch.
    Return its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = logging.getLogger("flickr8k_sgd")
    try:
        return train_flickr8k_sgd.main([str(argument) for argument in flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


def colour_of_photo(i):
    """Return the colour (red, green, blue) of photo i of `write_dataset`, which tells it from the
    other photos."""
    return i * 20 % 256, 255 - i * 20 % 256, i * 7 % 256


def write_dataset(root, counts=None, captions=5):
    """Write a small dataset in Flickr8k's layout and return its folder.

    counts: {split: number of photos}. captions: the number of captions of each photo. A photo has a
    single colour, see `colour_of_photo`."""
    root = Path(root)
    (root / "Flicker8k_Dataset").mkdir(parents=True)
    lines, index = [], 0
    for split, count in (counts or {"train": 6, "val": 3, "test": 2}).items():
        names = []
        for _ in range(count):
            names.append(f"{1000 + index}_abc.jpg")
            photo = Image.new("RGB", (50, 40), colour_of_photo(index))
            photo.save(root / "Flicker8k_Dataset" / names[-1], quality=95)
            lines += [f"{names[-1]}#{i}\tCaption {i} of photo {index} , a dog ."
                      for i in range(captions)]
            index += 1
        (root / SPLIT_FILES[split]).write_text("".join(f"{name}\n" for name in names))
    (root / "Flickr8k.token.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def give_class_names(root, names=("a red one", "A  RED one", "a green one")):
    """Replace the captions of a dataset of `write_dataset`: photo i has the name i modulo their
    number. Return the folder."""
    path = root / "Flickr8k.token.txt"
    photos = sorted({line.split("#")[0] for line in path.read_text().splitlines()})
    path.write_text("".join(f"{photo}#0\t{names[i % len(names)]}\n"
                            for i, photo in enumerate(photos)))
    return root


def write_photo(path, number):
    """Write a small photo of the colour `colour_of_photo`, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), colour_of_photo(number)).save(path)


def write_lines(path, lines, end="\r\n"):
    """Write a text file with a byte order mark, an empty line, and the line ends of Windows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}{end}" for line in [*lines, ""]).encode())


def write_table(root, *lines, name="captions.csv"):
    """Write a table of captions into a new folder, which is returned."""
    root.mkdir()
    write_lines(root / name, lines)
    return root


def read_captions(path):
    """Read Flickr8k.token.txt, or Kaggle's captions.txt. Return {name of a photo: [captions]}, in
    the order of the file."""
    rows = table_rows(path, []) if path.name == "captions.txt" else token_rows(path)
    captions = {}
    for name, caption, _ in rows:
        captions.setdefault(name, []).append(caption)
    return captions


def open_dataset(root, split="train", image_size=16, **options):
    """Open a split with photos of 16 pixels and with the tokenizer of characters."""
    return open_split(root, split, image_size, CharTokenizer(), **options)


def truncated_jpeg():
    """Return the first half of a JPEG file."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[:len(file.getvalue()) // 2]


def model_arguments(preset, **changes):
    """Return the arguments that make the model of a preset, with some of them changed."""
    return make_settings(model=preset).model_arguments() | changes


def without_batch_norm(model):
    """Replace batch normalisation by the identity, so that the embedding of a photo does not depend
    on the other photos of its batch. Return the model."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(part, name, torch.nn.Identity())
    return model


def arguments(shapes, output_dir, *more, epochs=3):
    """Return the flags of a short training on a small synthetic dataset."""
    return ["--synthetic", "--data_dir", shapes, "--output_dir", output_dir, "--epochs", epochs,
            "--batch_size", 10, "--captions_per_image", 5, "--device", "cpu", *more]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a small synthetic dataset."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(root, num_pictures={"train": 40, "val": 12, "test": 8})
    return root


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of a finished run, which a test may change."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """The folder of a run that was not interrupted, and its output. Tests share the folder and must
    not write into it."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    status, out, err = run_script("train_flickr8k_sgd.py", *arguments(shapes, output_dir))
    assert (status, err) == (0, "")
    return output_dir, out


@pytest.fixture
def dataset_dir(tmp_path):
    """The folder of a small dataset in Flickr8k's layout, which a test may change."""
    return write_dataset(tmp_path / "flickr8k")


@pytest.fixture(scope="session")
def real_photos():
    """The folder of the real dataset, FLICKR8K_DIR or data/flickr8k."""
    folder = Path(os.environ.get("FLICKR8K_DIR", "data/flickr8k"))
    if not (folder / "Flickr8k.token.txt").exists() and not (folder / "captions.txt").exists():
        pytest.skip(f"the real Flickr8k photos are not in {folder} (set FLICKR8K_DIR)")
    return folder


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory):
    """The path of ENCODER_FILE."""
    path = tmp_path_factory.mktemp("encoders") / "encoders.py"
    path.write_text(ENCODER_FILE.replace("SEED", "0"))
    return path


def encoder_flags(encoder_file):
    return ["--image_encoder", f"{encoder_file}:photos", "--text_encoder", f"{encoder_file}:texts"]


@pytest.fixture(scope="session")
def trained(shapes, encoder_file, tmp_path_factory):
    """A finished run with two frozen encoders. Tests must not write into it."""
    output_dir = tmp_path_factory.mktemp("runs") / "pretrained"
    assert main(*arguments(shapes, output_dir, *encoder_flags(encoder_file))) == 0
    return output_dir


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the small synthetic dataset, without its stores."""
    return shutil.copytree(shapes, tmp_path / "shapes", ignore=shutil.ignore_patterns(STORE_FOLDER))


def word_tokenizer(folder, more=""):
    """Save a tokenizer of transformers that knows a few words; it ends each text with [EOS]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = "[PAD] [UNK] [EOS] a an the red blue green small large circle square above below "
    vocabulary = {word: i for i, word in enumerate((words + more).split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_max_length=20).save_pretrained(folder)
    return vocabulary


def start_model(tmp_path_factory, name):
    """Return transformers, a folder with a tokenizer for a tiny model, and its {word: id}."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an extra (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp(name)
    return transformers, folder, word_tokenizer(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a saved CLIPModel with a few thousand weights."""
    transformers, folder, vocabulary = start_model(tmp_path_factory, "clip")
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
    transformers, folder, vocabulary = start_model(tmp_path_factory, "bert")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20), add_pooling_layer=False
    ).save_pretrained(folder)
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
