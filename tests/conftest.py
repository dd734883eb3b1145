import io
import logging
import os
import re
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
from src.utils.caption_files import table_rows, token_rows
from src.utils.captions import SPLIT_FILES
from src.utils.splits import open_split
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import CharTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
# Deprecations that a script of ours causes; pytest's own filter does not reach into another
# process.
OUR_DEPRECATIONS = re.compile(
    rf"^{re.escape(str(REPOSITORY))}.*(Deprecation|Future)Warning", re.MULTILINE
)

# A user's file with encoders of photos and of texts, and with functions that do not return one.
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
    """Start a script as a user would, from the repository's root; -> subprocess.Popen."""
    command = [
        sys.executable,
        "-W",
        "always::DeprecationWarning",
        "-W",
        "always::FutureWarning",
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_script(*arguments, **options):
    """-> (exit status, what it printed, what it printed as errors); never a traceback, never a
    deprecation of ours.
    """
    process = start_script(*arguments, **options)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    assert not OUR_DEPRECATIONS.search(err), err
    return process.returncode, out, err


def main(*given):
    """The training script inside this process: a second instead of five."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = logging.getLogger("flickr8k_sgd")
    try:
        return train_flickr8k_sgd.main([str(argument) for argument in given])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


def colour_of_photo(index):
    """The colour (red, green, blue) of a photo of `write_dataset`, which tells its index."""
    return index * 20 % 256, 255 - index * 20 % 256, index * 7 % 256


def write_dataset(root, counts=None, captions=5):
    """Write a small dataset in the official layout. Each photo has one plain colour, see
    `colour_of_photo`. counts: the number of photos of each split. captions: of each photo."""
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


def dataset(root, split="train", image_size=16, **options):
    """Open a split of a dataset, with tokens that are characters."""
    return open_split(root, split, image_size, CharTokenizer(), **options)


def truncated_jpeg():
    """The first half of a JPEG file."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[:len(file.getvalue()) // 2]


def read_captions(path):
    """{photo: [captions]} of a file, in its order."""
    captions = {}
    for name, caption, _ in (table_rows if path.name == "captions.txt" else token_rows)(path):
        captions.setdefault(name, []).append(caption)
    return captions


def model_arguments(preset, **changes):
    """What the model of a preset is made with."""
    return make_settings(model=preset).model_arguments() | changes


def without_batch_norm(model):
    """The model, in which no photo depends on the others of its chunk."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(part, name, torch.nn.Identity())
    return model


def arguments(shapes, output_dir, *more, epochs=3):
    """Flags of a short training on a small synthetic dataset."""
    return [
        "--synthetic",
        "--data_dir",
        shapes,
        "--output_dir",
        output_dir,
        "--epochs",
        epochs,
        "--batch_size",
        10,
        "--captions_per_image",
        5,
        "--device",
        "cpu",
        *more,
    ]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small synthetic dataset."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(root, num_pictures={"train": 40, "val": 12, "test": 8})
    return root


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """A run that nothing interrupted, and what it printed. Not to be written into."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    status, out, err = run_script("train_flickr8k_sgd.py", *arguments(shapes, output_dir))
    assert (status, err) == (0, "")
    return output_dir, out


@pytest.fixture
def dataset_dir(tmp_path):
    return write_dataset(tmp_path / "flickr8k")


@pytest.fixture(scope="session")
def real_photos():
    """Folder of the real dataset, from FLICKR8K_DIR or data/flickr8k."""
    folder = Path(os.environ.get("FLICKR8K_DIR", "data/flickr8k"))
    if not (folder / "Flickr8k.token.txt").exists() and not (folder / "captions.txt").exists():
        pytest.skip(f"the real Flickr8k photos are not in {folder} (set FLICKR8K_DIR)")
    return folder


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory):
    """A Python file with functions that return encoders, or fail to."""
    path = tmp_path_factory.mktemp("encoders") / "encoders.py"
    path.write_text(ENCODER_FILE.replace("SEED", "0"))
    return path
