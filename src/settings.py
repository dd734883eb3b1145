"""Every setting of a run, declared once with its type, default, meaning and bounds. The command
line flags are made from these declarations.

The settings of a run are the defaults of `Settings`, changed by the preset, then by the reference
recipe if it is asked for, then by the user's flags; see `make_settings`. This file does not import
torch, so that --help answers at once."""
import argparse
import dataclasses
import math
from dataclasses import dataclass

from src.utils.console import Parser, Paths, number, single_path, text
from src.utils.errors import UsageError

# The groups of flags in --help. Each begins with the setting that is named here.
GROUPS = {"data_dir": "data", "model": "model", "image_encoder": "pretrained encoders",
          "recipe": "training", "min_crop": "augmentation", "device": "machine"}
START_SHARE = 0.6  # the share of the epochs, from the first on, that train on smaller photos
# The network of Fisher vectors, see `src/fisher.py`: the side of its photos in pixels, the largest
# number of training photos (their vectors take 2 GB, and some minutes on two cores), its epochs.
FISHER_PIXELS, FISHER_PHOTOS, FISHER_EPOCHS = 160, 30_000, 12


def setting(default, meaning=None, bounds=None, choices=None, shown=None, architecture=False,
            bare=None):
    """A field of `Settings`.

    meaning: the help text of the flag; a setting without a meaning has no flag. bounds: the allowed
    range, such as "[0, 1)". shown: the default as --help describes it, where it is not a constant.
    architecture: whether the model's constructor takes it. bare: the value of the flag where it
    stands without one; None for flags that need a value."""
    return dataclasses.field(default=default, metadata=dict(
        meaning=meaning, bounds=bounds, choices=choices, shown=shown, architecture=architecture,
        bare=bare))


def architecture(default, meaning=None, bounds=None):
    return setting(default, meaning, bounds, architecture=True)


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are those of the preset `base`."""

    data_dir: str = setting("data/flickr8k", "folder of photos and captions; --check tells how it "
                            "is understood",
                            shown="data/flickr8k, or data/synthetic with --synthetic")
    synthetic: bool = setting(False, "train on the built-in shapes, which are made if absent")
    extra_data: list = setting((), "folders whose training pairs join the training split, without "
                               "photos that are in val or test", shown="none")
    extra_all: bool = setting(False, "use all pairs of --extra_data, not only the training "
                              "splits")
    allow_incomplete: bool = setting(False, "skip photos that are missing or unreadable")
    tokenizer: str = setting("bpe", "char: one token per character, of 33; bpe: byte pairs "
                             "learned from the captions", choices=("char", "bpe"))

    model: str = setting(None, "preset of the model and its recipe",
                         choices=("tiny", "small", "base", "large"),
                         shown="small, or tiny with --synthetic")
    image_size: int = setting(96, "side of the training photos in pixels", "[1, inf)")
    memory_size: int = architecture(128, "slots of the memory; 0 turns it off", "[0, inf)")
    # Weight of the memory's self-supervised loss. Without it the memory learns from the contrastive
    # loss alone.
    memory_loss: float = setting(0.1)
    latent_dim: int = architecture(512)
    text_embed_dim: int = architecture(512)
    num_heads: int = architecture(8)
    num_layers: int = architecture(4)
    fusion_layers: int = architecture(4)
    conv_channels: list = architecture((64, 128, 256, 512))
    conv_units: int = architecture(2)
    stem_stride: int = architecture(2)
    fisher: bool = setting(True, "train a second network, on Fisher vectors of the photos, and add "
                           "its cosines to those of the first")

    image_encoder: str = setting("", "pretrained image encoder: a model of torchvision, one of "
                                 "transformers (a name or a folder), or FILE.py:FUNCTION",
                                 shown="none")
    text_encoder: str = setting("", "pretrained text encoder: one of transformers, or "
                                "FILE.py:FUNCTION; its latent is added to that of the text encoder "
                                "trained here", shown="none")
    finetune: float = setting(0.0, "train the pretrained encoders, too, after the rest; the value "
                              "is the learning rate of that second stage relative to --lr",
                              "[0, inf)", shown="off; 0.1 if no value is given", bare=0.1)
    dropout: float = architecture(0.0)

    recipe: str = setting("own", "own: the preset's recipe; reference: the original run's",
                          choices=("own", "reference"))
    epochs: int = setting(30, "passes over all pairs", "[1, inf)")
    batch_size: int = setting(500, "pairs per step, over all processes", "[2, inf)")
    captions_per_image: int = setting(
        5, "captions per photo in a batch; the photo is encoded once for them", "[1, inf)")
    lr: float = setting(0.1, "peak learning rate", "(0, inf)")
    text_lr: float = setting(10.0, "learning rate of the token embedding, relative to --lr",
                             "(0, inf)")
    momentum: float = setting(0.9)
    weight_decay: float = setting(2e-3, "weight decay of weight matrices; biases and norms have "
                                  "none", "[0, 1]")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", "[0, 1)")
    final_lr: float = setting(0.2, "learning rate at the end of the cosine, relative to --lr",
                              "[0, 1]")
    temperature: float = setting(0.1, "initial temperature of the loss, which is learned",
                                 "(0, inf)")
    ema: float = setting(0.998, "decay of the moving average of the weights, which is what is "
                         "evaluated and saved; 0 turns it off", "[0, 1)")
    seed: int = setting(0, "seed of the weights, the order of the pairs and the augmentation",
                        "[0, 4294967295]")

    min_crop: float = setting(0.25, "smallest share of a photo's area in a random crop", "(0, 1]")
    flip: float = setting(0.5, "probability of mirroring a photo", "[0, 1]")
    # Side of the photos in the first START_SHARE of the epochs. At 0 it is --image_size, in
    # validation too.
    start_size: int = setting(64)
    color_jitter: float = setting(0.2, "largest relative change of brightness, contrast and "
                                  "saturation", "[0, 1)")
    word_dropout: float = setting(0.2, "share of the words of a caption left out at random",
                                  "[0, 1)")

    device: str = setting(None, "cuda, cuda:1, mps or cpu", shown="the best one of this machine")
    amp: bool = setting(None, "mixed precision", shown="where it is faster: on CUDA, and on CPUs "
                        "that multiply bfloat16 matrices")
    chunk_size: int = setting(0, "pairs encoded at a time, to save memory; 0 encodes all at once",
                              "[0, inf)")

    @property
    def eval_pixels(self):
        """Side in pixels of the photos that the convnet sees in validation and in use: a sixth
        larger than the training crops, in which things look larger (Touvron et al. 2019)."""
        return math.ceil(self.image_size * 7 / 6 / 16) * 16 if self.start_size else self.image_size

    def stored_pixels(self, split):
        """Side in pixels of the decoded photos of a split: as large as the model uses them, and for
        training an eighth larger than the crops that are taken from them."""
        side = size_before_crop(self.image_size) if split == "train" else self.eval_pixels
        return max(side, FISHER_PIXELS) if self.fisher else side

    def training_pixels(self, epoch):
        """Side in pixels of the training crops in an epoch."""
        if not self.start_size or epoch > START_SHARE * self.epochs:
            return self.image_size
        return min(self.start_size, self.image_size)

    def model_arguments(self):
        """The arguments of the model's constructor, except for the tokenizer's vocab_size."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.metadata["architecture"]}


PRESETS = {
    "tiny": dict(
        fisher=False, text_embed_dim=64, latent_dim=64, memory_size=16, num_heads=2, num_layers=1,
        fusion_layers=1, conv_channels=[16, 32, 64], image_size=32, start_size=0,
        epochs=7, batch_size=100, captions_per_image=2, text_lr=4.0, weight_decay=5e-4,
        final_lr=0.0, ema=0.0, min_crop=0.5, color_jitter=0.0, word_dropout=0.0),
    "small": dict(
        text_embed_dim=256, latent_dim=256, memory_size=16, memory_loss=0.0, num_heads=4,
        num_layers=0, fusion_layers=1, stem_stride=4, conv_channels=[64, 128, 256], conv_units=1,
        epochs=90, final_lr=0.4),
    "base": dict(),
    "large": dict(text_embed_dim=768, latent_dim=768, num_heads=12, num_layers=12,
                  conv_channels=[160, 320, 640, 1280], epochs=100),
}
# With a pretrained image encoder these values replace those of the preset.
PRETRAINED = dict(
    fisher=False, latent_dim=512, text_embed_dim=256, memory_size=0, memory_loss=0.1,
    num_heads=4, num_layers=0, fusion_layers=0, dropout=0.5, tokenizer="bpe", epochs=15,
    batch_size=1000, captions_per_image=5, lr=0.3, text_lr=1.0, weight_decay=2e-3,
    temperature=0.07, warmup=0.1, final_lr=0.0, ema=0.99, start_size=0)
# These values replace those of PRETRAINED if both encoders are halves of one contrastive model,
# which has less to learn. They were chosen with a model that was trained on half of Flickr8k's
# photos and tuned on the other half.
CONTRASTIVE_PAIR = dict(lr=0.1, dropout=0.2)
# With --finetune and a pretrained image encoder these values replace those of PRETRAINED once the
# rest of the model has been trained on features of frozen encoders. The chunks fit a ViT-B and its
# text encoder into 24 GB.
FINETUNED = dict(epochs=3, batch_size=500, chunk_size=100, min_crop=0.5, color_jitter=0.0)
# The recipe of the original run. Its write-up does not mention temperature and weight decay.
REFERENCE = dict(
    epochs=30, batch_size=64, captions_per_image=1, lr=0.01, text_lr=1.0, weight_decay=0.0,
    temperature=0.07, warmup=0.0, final_lr=0.0, ema=0.0, min_crop=1.0, flip=0.0, color_jitter=0.0,
    word_dropout=0.0, start_size=0, tokenizer="char", fisher=False, memory_loss=0.1)


# What a run takes from the one that it begins with, beside the sizes of the model.
INHERITED = ("model", "tokenizer", "image_size", "start_size", "memory_loss", "fisher",
             "image_encoder", "text_encoder", "data_dir", "synthetic")


def size_before_crop(pixels):
    """Side of the photos from which training crops of this side are taken."""
    return pixels * 8 // 7


def make_settings(**given):
    """`Settings` from what is given and not None; the rest follows from preset and recipe. Raises
    UsageError for settings that contradict each other."""
    given = {name: value for name, value in given.items() if value is not None}
    synthetic = given.get("synthetic", False)
    chosen = {"model": "tiny" if synthetic else "small",
              "data_dir": "data/synthetic" if synthetic else Settings.data_dir} | given
    pretrained = PRETRAINED if given.get("image_encoder") else {}
    recipe = REFERENCE if given.get("recipe") == "reference" else {}
    finetuned = FINETUNED if pretrained and given.get("finetune") else {}
    values = PRESETS[chosen["model"]] | pretrained | finetuned | recipe | chosen
    for name in ("extra_data", "conv_channels"):  # lists, as they are when read from a config.json
        values[name] = list(values.get(name, getattr(Settings, name)))
    if values.get("memory_size"):  # what it recalls is read by the fusion
        values["fusion_layers"] = values.get("fusion_layers", Settings.fusion_layers) or 1
    settings = Settings(**values)
    if settings.extra_all and not settings.extra_data:
        raise UsageError("--extra_all needs --extra_data")
    if settings.fisher and settings.image_encoder:
        raise UsageError("--fisher needs the preset's own image encoder; leave --image_encoder out")
    if settings.finetune and not (settings.image_encoder or settings.text_encoder):
        raise UsageError("--finetune needs an --image_encoder or a --text_encoder")
    return settings


def settings_from_run(before, given, run_dir):
    """The settings of a run that begins with the weights of the run in run_dir, whose settings are
    `before`. What the user has given, {name: value}, replaces them. Another --recipe, and
    --finetune, bring their own defaults, and data are only those that are given, if some are.
    Raises UsageError for settings that contradict each other or those weights."""
    def wanted(name):
        return given.get(name, getattr(before, name))

    for name in ("tokenizer", "fisher", "image_encoder", "text_encoder"):
        old, new = getattr(before, name), wanted(name)
        may_be_the_same = name.endswith("_encoder") and old and new  # under another name
        if old != new and not may_be_the_same:
            has, flag = (" ".join(flags({name: value})) if value != "" else f"no --{name}"
                         for value in (old, new))
            raise UsageError(f"--init_from {run_dir}: its weights do not fit {flag}, as that run "
                             f"has {has}; leave the flag out")
    fresh = make_settings(**{name: wanted(name) for name in (
        "model", "recipe", "image_encoder", "text_encoder", "finetune")})
    replaced, of_model = set(), before.model_arguments().keys()
    if wanted("model") != before.model:  # refused later, unless the weights fit
        replaced |= of_model
    if wanted("recipe") != before.recipe:
        replaced |= {f.name for f in dataclasses.fields(Settings)} - of_model - {*INHERITED}
    if wanted("finetune") and before.image_encoder and not before.finetune:
        replaced |= {*FINETUNED}
    values = dataclasses.asdict(before) | {name: getattr(fresh, name) for name in replaced}
    for name in ("extra_data", "extra_all", "allow_incomplete", "device", "amp"):
        del values[name]
    if "data_dir" in given or "synthetic" in given:
        del values["data_dir"], values["synthetic"]
    return make_settings(**values | given)


def for_contrastive_pair(settings, given):
    """The settings for two encoders that are halves of one contrastive model. What the user has
    given, and what the reference recipe prescribes, stays as it is."""
    fixed = {*given, *(REFERENCE if settings.recipe == "reference" else ())}
    changes = {name: value for name, value in CONTRASTIVE_PAIR.items() if name not in fixed}
    return dataclasses.replace(settings, **changes)


def for_first_stage(settings):
    """The settings of the first stage of fine-tuning, in which the encoders are frozen: those of a
    run that keeps them frozen."""
    frozen = make_settings(model=settings.model, recipe=settings.recipe,
                           image_encoder=settings.image_encoder)
    changes = {name: getattr(frozen, name) for name in FINETUNED}
    return dataclasses.replace(settings, finetune=0.0, **changes)


def settings_of(config, run_dir):
    """The Settings in a run's config. Raises UsageError for a run of another version."""
    values = config.get("settings") if isinstance(config, dict) else None
    names = {f.name for f in dataclasses.fields(Settings)}
    if not isinstance(values, dict) or values.keys() != names:
        raise UsageError(f"{run_dir}: the run is of another version of this project; please "
                         "retrain")
    return Settings(**values)


def add_flag(group, setting):
    about = setting.metadata
    default = about["shown"]
    if default is None:
        values = {name: changes.get(setting.name, setting.default)
                  for name, changes in PRESETS.items()}
        if len(set(values.values())) > 1:
            default = ", ".join(f"{preset} {value}" for preset, value in values.items())
        else:
            default = "off" if setting.default is False else setting.default
        if setting.name in PRETRAINED and str(PRETRAINED[setting.name]) != str(default):
            default = f"{default}; {PRETRAINED[setting.name]} with --image_encoder"
        if setting.name in FINETUNED:
            default = f"{default}; {FINETUNED[setting.name]} with --finetune"
    options = {"help": f"{about['meaning']} (default: {default})"}
    if setting.type is bool:
        negatable = setting.default is not False
        options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
    elif about["choices"]:
        options["choices"] = about["choices"]
    elif about["bounds"]:
        options["type"] = number(setting.type, about["bounds"])
    elif setting.type is str:
        options["type"] = text if setting.name == "device" else single_path
    if about["bare"] is not None:
        options |= {"nargs": "?", "const": about["bare"]}
    if setting.type is list:
        options |= {"nargs": "+", "metavar": "DIR", "action": Paths}
    group.add_argument(f"--{setting.name}", **options)


def add_flags(parser):
    """Add the flags of all settings, in their groups. The parsed namespace will hold only those
    that were given."""
    for f in dataclasses.fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.metadata["meaning"]:
            add_flag(group, f)


def parse_args(description, argv=None):
    """The flags of the training script -> a namespace of the settings that were given, for
    `make_settings`, and of output_dir, resume, init_from, check and overwrite."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=single_path, default=None, help="folder that the run is written to "
        "(default: outputs/flickr8k_sgd, or outputs/synthetic_sgd with --synthetic)")
    add("--resume", action="store_true", default=False,
        help="continue the run in --output_dir with its own settings; --epochs may change, and so "
        "may --data_dir, --extra_data, --device and --amp")
    add("--init_from", type=single_path, metavar="RUN", default=None,
        help="begin with the weights and the tokenizer of the run in this folder, which must not "
        "have seen the photos of val and test; settings that are not given are that run's "
        "(default output_dir: outputs/DATA_from_RUN)")
    add("--check", action="store_true", default=False,
        help="only describe what --data_dir holds: its layout, photos, captions and splits; it is "
             "an error if photos are missing")
    add("--overwrite", action="store_true", default=False,
        help="delete the run in --output_dir first")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.resume and args.init_from:
        parser.error("--resume continues with a run's own weights; leave --init_from out")
    return args


def flags(given):
    """{name: value} -> the command line flags that set these values."""
    command = []
    for name, value in given.items():
        if value is False and getattr(Settings, name, None) is False:
            continue  # this flag cannot be negated, and False is its default
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            command += [f"--{name}", *value]
        else:
            command += [f"--{name}", str(value)]
    return command
