"""Every setting of a run, once: type, default, meaning, unit, bounds. The flags are made of it.

A run's settings are the defaults of `Settings`, changed by its preset, by the reference recipe
where that is asked for, then by the user's flags: `make_settings`."""
import argparse
import dataclasses
import datetime
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

# The groups of flags in --help, each by the setting that it begins with.
GROUPS = {"data_dir": "data", "model": "model", "image_encoder": "pretrained encoders",
          "recipe": "training", "min_crop": "augmentation", "device": "machine"}
START_SHARE = 0.6  # of the epochs, the first, in which small's photos are smaller
# Of the second network, see `src/fisher.py`: the side of its photos, in pixels, how many it learns
# from at most, whose vectors take 2 GB and seven minutes on two cores, and its epochs.
FISHER_PIXELS, FISHER_PHOTOS, FISHER_EPOCHS = 160, 30_000, 12


class UsageError(Exception):
    """What the user asked for cannot be done; exit status 2."""


def setting(default, meaning=None, bounds=None, choices=None, auto=None, architecture=False):
    """A field of Settings. meaning: the flag's help; without it there is no flag. bounds: such as
    "[0, 1)". auto: a default that depends on the machine. architecture: the model takes it."""
    return dataclasses.field(default=default, metadata=dict(
        meaning=meaning, bounds=bounds, choices=choices, auto=auto, architecture=architecture))


def architecture(default, meaning=None, bounds=None):
    return setting(default, meaning, bounds, architecture=True)


@dataclass
class Settings:
    """All settings of a run. The defaults are those of the preset `base`."""

    data_dir: str = setting("data/flickr8k", "folder of photos and captions; --check says as what",
                            auto="data/flickr8k, or data/synthetic with --synthetic")
    synthetic: bool = setting(False, "train on the built-in shapes, made where absent")
    extra_data: list = setting((), "folders whose training pairs join the training split, less "
                               "photos of val and test", auto="none")
    extra_all: bool = setting(False, "all pairs of --extra_data, not those of its training splits")
    allow_incomplete: bool = setting(False, "leave out photos that are missing or unreadable")
    tokenizer: str = setting("bpe", "char: 33 characters; bpe: byte pairs of the captions",
                             choices=("char", "bpe"))

    model: str = setting(None, "preset", choices=("tiny", "small", "base", "large"),
                         auto="base on CUDA, small elsewhere, tiny with --synthetic")
    image_size: int = setting(96, "side of the training photos, in pixels", "[1, inf)")
    latent_dim: int = architecture(512, "width of the shared space", "[1, inf)")
    memory_size: int = architecture(128, "slots of the memory; 0: no memory", "[0, inf)")
    text_embed_dim: int = architecture(512)
    num_heads: int = architecture(8)
    num_layers: int = architecture(4)
    fusion_layers: int = architecture(4)
    conv_channels: list = architecture((64, 128, 256, 512))
    conv_units: int = architecture(2)
    fisher: bool = setting(True, "a second network beside, of photos' Fisher vectors")

    image_encoder: str = setting("", "a model of torchvision, of transformers (a name or a folder) "
                                 "or FILE.py:FUNCTION that photos go through first", auto="none")
    text_encoder: str = setting("", "one of transformers, or FILE.py:FUNCTION, whose features are "
                                "added to those of the model's own", auto="none")
    finetune: float = setting(0.0, "learning rate of these two as a multiple of --lr; 0: frozen, "
                              "everything is encoded once", "[0, inf)")
    dropout: float = architecture(0.0, "share of their features left out at random", "[0, 1)")

    recipe: str = setting("own", "the preset's own, or that of the run which this project started "
                          "from", choices=("own", "reference"))
    epochs: int = setting(30, "passes over all pairs", "[1, inf)")
    batch_size: int = setting(500, "pairs a step, of all processes together", "[2, inf)")
    captions_per_image: int = setting(
        5, "captions of a photo that a step takes together, the photo encoded once", "[1, inf)")
    lr: float = setting(0.1, "peak learning rate", "(0, inf)")
    text_lr: float = setting(10.0, "that of the bag of tokens, as a multiple of --lr", "(0, inf)")
    momentum: float = setting(0.9, "Nesterov momentum", "(0, 1)")
    weight_decay: float = setting(2e-3, "of weight matrices only", "[0, 1]")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", "[0, 1)")
    final_lr: float = setting(0.2, "what the cosine ends at, as a share of --lr", "[0, 1]")
    temperature: float = setting(0.1, "of the loss at the start; it is learned", "(0, inf)")
    ema: float = setting(0.998, "decay of the moving average of the weights, shorter at first, "
                         "that is validated and kept; 0: none", "[0, 1)")
    seed: int = setting(0, "of weights, order and augmentation", "[0, 4294967295]")

    min_crop: float = setting(0.25, "smallest share of a photo's area in a crop", "(0, 1]")
    flip: float = setting(0.5, "probability of mirroring a photo", "[0, 1]")
    # Of the photos in START_SHARE of the epochs; 0: --image_size, and so in validation.
    start_size: int = setting(64)
    color_jitter: float = setting(0.2, "change of brightness, contrast, saturation", "[0, 1)")
    word_dropout: float = setting(0.2, "share of a caption's words left out at random", "[0, 1)")

    device: str = setting(None, "cuda, cuda:1, mps or cpu", auto="the first that is there")
    amp: bool = setting(None, "mixed precision",
                        auto="on where it is faster: CUDA, CPUs with bfloat16 matrix products")
    chunk_size: int = setting(0, "pairs encoded at a time, to save memory; 0: all", "[0, inf)")
    num_workers: int = setting(0, "threads that decode photos; 0: one a core", "[0, inf)")

    @property
    def eval_pixels(self):
        """Side of the photos that the first network sees in validation and in use, in pixels: a
        sixth more than crops, in which things look larger (Touvron et al. 2019)."""
        return math.ceil(self.image_size * 7 / 6 / 16) * 16 if self.start_size else self.image_size

    def stored_pixels(self, split):
        """Side of the photos that a split's store keeps: as they are in use, or, to train with, an
        eighth larger than the crops that are taken of them."""
        side = uncropped(self.image_size) if split == "train" else self.eval_pixels
        return max(side, FISHER_PIXELS) if self.fisher else side

    def training_pixels(self, epoch):
        """Side of the training photos in an epoch, in pixels."""
        if not self.start_size or epoch > START_SHARE * self.epochs:
            return self.image_size
        return min(self.start_size, self.image_size)

    def model_arguments(self):
        """Those of the model, less the tokenizer's vocab_size."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.metadata["architecture"]}


PRESETS = {
    "tiny": dict(
        fisher=False, text_embed_dim=64, latent_dim=64, memory_size=16, num_heads=2, num_layers=1,
        fusion_layers=1, conv_channels=[16, 32, 64], image_size=32, start_size=0,
        epochs=7, batch_size=100, captions_per_image=2, text_lr=4.0, weight_decay=5e-4,
        final_lr=0.0, ema=0.0, min_crop=0.5, color_jitter=0.0, word_dropout=0.0),
    "small": dict(
        text_embed_dim=256, latent_dim=256, memory_size=16, num_heads=4, num_layers=0,
        fusion_layers=1, conv_channels=[32, 64, 128, 256], conv_units=1, epochs=90, final_lr=0.4),
    "base": dict(),
    "large": dict(text_embed_dim=768, latent_dim=768, num_heads=12, num_layers=12,
                  conv_channels=[160, 320, 640, 1280], epochs=100),
}
# With a pretrained image encoder, in the place of what the preset has.
PRETRAINED = dict(
    fisher=False, latent_dim=512, text_embed_dim=256, memory_size=128, num_heads=4, num_layers=0,
    fusion_layers=1, dropout=0.5, tokenizer="bpe", epochs=10, batch_size=1000,
    captions_per_image=5, lr=0.3, text_lr=1.0, weight_decay=2e-3, temperature=0.07, warmup=0.1,
    final_lr=0.0, ema=0.99, start_size=0)
# Where both encoders are one contrastive model, which has less to learn. (Chosen with one that this
# project trained on half of Flickr8k's photos, tuned on the other half: from 24.1 to 27.3.)
PAIR = PRETRAINED | dict(lr=0.1, dropout=0.2)
# The run that this project started from; its write-up is silent on temperature and weight decay.
REFERENCE = dict(
    epochs=30, batch_size=64, captions_per_image=1, lr=0.01, text_lr=1.0, weight_decay=0.0,
    temperature=0.07, warmup=0.0, final_lr=0.0, ema=0.0, min_crop=1.0, flip=0.0, color_jitter=0.0,
    word_dropout=0.0, start_size=0, tokenizer="char", fisher=False)


def uncropped(pixels):
    """Side of the photos that training photos of so many pixels are cut from."""
    return pixels * 8 // 7


def default_model(synthetic, device, image_encoder=""):
    if synthetic:
        return "tiny", "made for the built-in shapes"
    if image_encoder:
        return "small", "the default with a pretrained image encoder"
    if device.startswith("cuda"):
        return "base", "the default on a CUDA GPU"
    return "small", "the default where there is no CUDA GPU, as base takes an hour or more"


def make_settings(**given):
    """What is given and not None, the rest by preset, recipe and machine -> Settings."""
    given = {name: value for name, value in given.items() if value is not None}
    synthetic, device = given.get("synthetic", False), given.get("device", default_device())
    image_encoder, text_encoder = given.get("image_encoder", ""), given.get("text_encoder", "")
    chosen = {"device": device, "model": default_model(synthetic, device, image_encoder)[0],
              "data_dir": "data/synthetic" if synthetic else Settings.data_dir} | given
    recipe = REFERENCE if given.get("recipe") == "reference" else {}
    pretrained = PRETRAINED if image_encoder else {}
    if image_encoder and image_encoder == text_encoder:
        pretrained = PAIR
    settings = Settings(**PRESETS[chosen["model"]] | pretrained | recipe | chosen)
    settings.extra_data = list(settings.extra_data)
    settings.conv_channels = list(settings.conv_channels)
    if settings.extra_all and not settings.extra_data:
        raise UsageError("--extra_all needs --extra_data")
    if settings.fisher and settings.image_encoder:
        raise UsageError("--fisher goes with the preset's own image encoder")
    if settings.finetune and not (settings.image_encoder or settings.text_encoder):
        raise UsageError("--finetune needs an --image_encoder or a --text_encoder")
    if settings.amp is None:
        settings.amp = amp_pays(device)
    return settings


def settings_of(config, run_dir):
    """The Settings in a run's config. Raises UsageError for one of another version."""
    found = config.get("settings") if isinstance(config, dict) else None
    names = {f.name for f in dataclasses.fields(Settings)}
    if not isinstance(found, dict) or found.keys() != names:
        raise UsageError(f"{run_dir}: the run is of another version of this project; train anew")
    return Settings(**found)


class Parser(argparse.ArgumentParser):
    """argparse's, flags never abbreviated, an error being one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def text(value):
    """argparse's type for a path or a name: an empty one is an unset variable of the shell."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return value


def number(kind, bounds):
    """argparse's type for a number of that kind within bounds such as "[0, 1)"."""
    low, high = map(float, bounds[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value >= low if bounds[0] == "[" else value > low
        below = value <= high if bounds[-1] == "]" else value < high
        if not (above and below):  # NaN is neither
            raise argparse.ArgumentTypeError(f"{value} is not in {bounds}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls a text that is no number
    return parse


def add_flag(group, setting):
    about, default = setting.metadata, setting.metadata["auto"]
    values = {name: changes.get(setting.name, setting.default) for name, changes in PRESETS.items()}
    if default is None and len(set(values.values())) > 1:
        default = ", ".join(f"{preset} {value}" for preset, value in values.items())
    elif default is None:
        default = "off" if setting.default is False else setting.default
    if setting.name in PRETRAINED and str(PRETRAINED[setting.name]) != str(default):
        default = f"{default}; {PRETRAINED[setting.name]} with --image_encoder"
    options = {"help": f"{about['meaning']} (default: {default})"}
    if setting.type is bool:
        negatable = setting.default is not False
        options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
    elif about["choices"]:
        options["choices"] = about["choices"]
    elif about["bounds"]:
        options["type"] = number(setting.type, about["bounds"])
    else:
        options["type"] = text
    if setting.type is list:
        options |= {"nargs": "+", "metavar": "DIR"}
    group.add_argument(f"--{setting.name}", **options)


def add_flags(parser):
    """All flags of Settings, in their groups. What is not given is not in the parsed namespace."""
    for f in dataclasses.fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.metadata["meaning"]:
            add_flag(group, f)


def parse_args(description, argv=None):
    """The training script's flags -> a namespace of those that were given, for `make_settings`,
    and of output_dir, resume, check and overwrite."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=text, default=None, help="folder that the run writes (default: "
        "outputs/flickr8k_sgd, or outputs/synthetic_sgd with --synthetic)")
    add("--resume", action="store_true", default=False,
        help="go on with the run in --output_dir, with its own settings; with more --epochs, "
        "train on when it is done")
    add("--check", action="store_true", default=False,
        help="say what --data_dir holds, its layout, photos, captions and splits, and end")
    add("--overwrite", action="store_true", default=False,
        help="delete the run in --output_dir first")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def flags(given):
    """{name: value} -> a command's flags."""
    command = []
    for name, value in given.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            command += [f"--{name}", *value]
        else:
            command += [f"--{name}", str(value)]
    return command


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def amp_pays(device):
    """Whether mixed precision is faster: on CUDA, and CPUs that multiply bfloat16 matrices."""
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device.startswith("cuda")


def amp_type(settings):
    """The autocast type, None for float32. bfloat16 has float32's range: no loss scaling."""
    if not settings.amp:
        return None
    if settings.device.startswith("cuda"):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bfloat16 = settings.device == "cpu"
    return torch.bfloat16 if bfloat16 else torch.float16


def find_device(name):
    """torch.device of that name, made CUDA's current one; under torchrun the GPU of the process's
    own number, no other being touched. Raises UsageError."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # set_device wants a number
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name} is not available on this machine") from None
    return device


def allow_fast_kernels(device):
    """On CUDA: TF32 for float32 matrices (but see `full_float32`), and the fastest convolutions."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # on Linux platform.processor() says nothing of use
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = re.search(r"\nmodel name\s*: (.*)\n", facts)
        processor = named[1] if named else processor
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def describe(settings, device, processes=1):
    """What a result follows from: settings, precision, hardware, versions and date."""
    precision = "float32"
    if settings.amp:
        precision = f"mixed, {str(amp_type(settings)).removeprefix('torch.')}"
    return {"settings": dataclasses.asdict(settings), "precision": precision,
            "device": (f"{processes} x " if processes > 1 else "") + device_name(device),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "date": datetime.date.today().isoformat()}
