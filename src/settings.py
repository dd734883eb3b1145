"""What a run is trained with: the recipes of the presets, the flags, and what follows from the machine."""
import argparse
import inspect
import math
import shlex
import sys

import torch

from src.model import PRESETS, MultiModalMemoryNetwork

# What each preset trains with unless a flag says otherwise. `text_lr` multiplies the learning rate of the text encoder.
COMMON = dict(captions_per_image=5, weight_decay=5e-4, temperature=0.1, warmup=0.1, final_lr=0.0, ema=0.0,
              label_smoothing=0.0, hard_negatives=0.0, caption_contrast=1.0, queue_size=0, min_crop=0.5, flip=0.5,
              color_jitter=0.0, erasing=0.0, word_dropout=0.0, eval_size=0, tokenizer="bpe")
RECIPES = {
    "tiny": COMMON | dict(epochs=7, batch_size=100, captions_per_image=2, lr=0.1, text_lr=4.0, tokenizer="char"),
    "small": COMMON | dict(epochs=100, batch_size=500, lr=0.1, text_lr=10.0, weight_decay=2e-3, min_crop=0.25,
                           color_jitter=0.2, word_dropout=0.2, ema=0.998, final_lr=0.4, eval_size=80),
    "base": COMMON | dict(epochs=30, batch_size=64, lr=0.03, text_lr=4.0),
    "large": COMMON | dict(epochs=100, batch_size=64, lr=0.03, text_lr=4.0),
}
# The run that this project started from, as far as its write-up says; the rest (temperature, no weight decay) is guessed.
REFERENCE = COMMON | dict(epochs=30, batch_size=64, captions_per_image=1, caption_contrast=0.0, lr=0.01, text_lr=1.0,
                          weight_decay=0.0, temperature=0.07, warmup=0.0, min_crop=1.0, flip=0.0, tokenizer="char")
MODEL_FLAGS = ("image_size", "image_layers", "num_layers", "latent_dim", "memory_size", "qk_norm", "stochastic_depth")
LOSS_FLAGS = ("label_smoothing", "hard_negatives", "caption_contrast")
COMPILE_FROM_EPOCHS = 5  # on CUDA, base and large: compiling takes about a minute


class UsageError(Exception):
    """What the user asked for cannot be done; exit status 2."""


def preset_defaults(preset, recipe="own"):
    """Everything that a preset sets: the model's arguments and the recipe's, its own or the "reference"."""
    signature = inspect.signature(MultiModalMemoryNetwork).parameters.values()
    return ({parameter.name: parameter.default for parameter in signature} | PRESETS[preset]
            | (REFERENCE if recipe == "reference" else RECIPES[preset]))


def eval_size(arguments):
    """Side of the photos in validation and in use, in pixels."""
    return max(arguments["eval_size"], arguments["image_size"])


def parse_args(description, argv=None):
    """The training script's flags, None where the user gave none: `default_arguments` fills in the rest."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument

    def number(kind, low, high=math.inf, low_itself=True):
        def parse(text):
            value = kind(text)
            if not (low <= value <= high) or (value == low and not low_itself):
                raise argparse.ArgumentTypeError(f"{value} is not {'at least' if low_itself else 'above'} {low}"
                                                 + (f" and at most {high}" if high < math.inf else ""))
            return value
        parse.__name__ = kind.__name__  # what argparse calls a text that is no number
        return parse

    count, positive = number(int, 1), number(float, 0, sys.float_info.max, low_itself=False)
    share = number(float, 0, 1 - 1e-9)
    add("--data_dir", help="folder of the dataset (default: data/flickr8k, or data/synthetic with --synthetic)")
    add("--output_dir", help="folder that the run writes (default: outputs/flickr8k_sgd, or outputs/synthetic_sgd)")
    add("--model", choices=list(PRESETS), help="preset (default: base, or tiny with --synthetic)")
    add("--recipe", choices=["own", "reference"], help="what the preset trains with: its own, or what the run that this "
        "project started from trained with (default: own)")
    for name, kind, meaning in (
            ("epochs", count, "passes over all pairs"),
            ("batch_size", number(int, 2), "pairs a step, of all processes together; the others of a batch are the negatives"),
            ("captions_per_image", count, "captions of a photo that a step takes together, the photo encoded once"),
            ("lr", positive, "peak learning rate"),
            ("text_lr", positive, "the text encoder's, as a multiple of --lr"),
            ("weight_decay", number(float, 0, 1), "of weight matrices only"),
            ("temperature", positive, "at the start; it is learned"),
            ("warmup", share, "share of the steps over which the learning rate rises"),
            ("final_lr", number(float, 0, 1), "what the cosine ends at, as a share of --lr"),
            ("ema", share, "what an exponential moving average of the weights, the one validated and kept, keeps of itself "
             "each step, less at first; 0: none"),
            ("label_smoothing", share, "share of the loss's target that is spread over the batch"),
            ("hard_negatives", number(float, 0, 1e6), "weight of a triplet loss on the nearest negative"),
            ("caption_contrast", number(float, 0, 1e6), "weight of a contrast among captions, those of one photo being "
             "each other's positives"),
            ("queue_size", number(int, 0), "pairs of earlier batches that serve as negatives too"),
            ("min_crop", number(float, 0, 1, low_itself=False), "smallest share of a photo's area in a training crop"),
            ("flip", number(float, 0, 1), "probability of mirroring a training photo"),
            ("color_jitter", share, "largest change of brightness, contrast and saturation in training"),
            ("erasing", number(float, 0, 1), "probability of blanking a rectangle of a training photo"),
            ("word_dropout", share, "share of a caption's words left out at random in training"),
            ("tokenizer", str, "char: 33 characters; bpe: byte pairs learned from the training captions"),
            ("image_size", count, "side of the training photos, in pixels"),
            ("eval_size", number(int, 0), "side of the photos in validation and in use, where that is more than --image_size"),
            ("image_layers", number(int, 0), "transformer blocks over a photo's patches"),
            ("num_layers", number(int, 0), "transformer blocks over a caption's tokens; 0: a bag of tokens"),
            ("latent_dim", count, "width of the shared space"),
            ("memory_size", number(int, 0), "slots of the memory; 0: no memory"),
            ("stochastic_depth", share, "probability of skipping a residual branch in training")):
        values = {preset: preset_defaults(preset)[name] for preset in PRESETS}
        defaults = ", ".join(f"{preset} {v if isinstance(v, str) else format(v, 'g')}" for preset, v in values.items())
        add(f"--{name}", type=kind, choices=["char", "bpe"] if name == "tokenizer" else None,
            help=f"{meaning} (default: {defaults})")
    add("--qk_norm", action=argparse.BooleanOptionalAction, help="normalise queries and keys (default: off)")
    add("--vocab_size", type=number(int, 257), help="ids of the bpe tokenizer, padding and 256 bytes included (default: 4000)")
    add("--momentum", type=number(float, 0, 1 - 1e-9, low_itself=False), help="Nesterov momentum (default: 0.9)")
    add("--clip_grad", type=positive, help="largest norm of the gradient (default: 1.0)")
    add("--chunk_size", type=count, help="pairs encoded at a time, for batches larger than memory (default: all)")
    add("--num_workers", type=number(int, 0), help="threads that decode photos, before the first run only "
        "(default: 0, one a core)")
    add("--seed", type=number(int, 0, 2**32 - 1), help="of weights, order and augmentation (default: 0)")
    add("--device", help="cuda, cuda:1, mps, cpu (default: the first of these that is there)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: on where it is faster: CUDA, and CPUs that multiply bfloat16 matrices)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help=f"torch.compile (default: on for base and large on CUDA from {COMPILE_FROM_EPOCHS} epochs)")
    add("--synthetic", action="store_true", default=None,
        help="train on the built-in dataset, made where it is absent (default: Flickr8k)")
    add("--allow_incomplete", action="store_true", default=None,
        help="leave out photos that are missing or unreadable (default: refuse to start)")
    add("--resume", action="store_true", help="go on with the run in --output_dir, with its own settings")
    add("--overwrite", action="store_true", help="delete the run in --output_dir first")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def default_arguments(args):
    """Parsed flags -> every setting of a run, a dict."""
    given = {name: value for name, value in vars(args).items()
             if value is not None and name not in ("resume", "overwrite", "output_dir")}
    defaults = {"synthetic": False, "allow_incomplete": False, "num_workers": 0, "seed": 0, "momentum": 0.9, "vocab_size": 4000,
                "clip_grad": 1.0, "recipe": "own", "chunk_size": None, "model": "tiny" if args.synthetic else "base",
                "data_dir": "data/synthetic" if args.synthetic else "data/flickr8k"}
    arguments = defaults | {"device": default_device()} | given
    own = preset_defaults(arguments["model"], arguments["recipe"])
    arguments |= {name: own[name] for name in (*MODEL_FLAGS, *COMMON, "epochs", "batch_size", "lr", "text_lr")
                  if name not in given}
    arguments.setdefault("amp", amp_pays(arguments["device"]))
    arguments.setdefault("compile", arguments["device"].startswith("cuda") and arguments["model"] in ("base", "large")
                         and arguments["epochs"] >= COMPILE_FROM_EPOCHS)
    return arguments


def command_of(arguments):
    """Every setting of a run -> the short command that trains so: what the flags' defaults say by themselves is left out.

    Where a run was trained on another kind of device, its --device, --amp and --compile are left out as well.
    """
    flags = ["--synthetic"] * arguments["synthetic"]
    for name in ("model", "recipe"):
        if arguments.get(name, "own") != default_arguments(parse_args("", flags))[name]:
            flags += [f"--{name}", arguments[name]]
    defaults = default_arguments(parse_args("", flags))
    for name, value in arguments.items():
        if value != defaults.get(name, value) and not (name in ("device", "amp", "compile") and arguments["device"] != defaults["device"]):
            flags += ([f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", shlex.quote(f"{value}")])
    return " ".join(["python train_flickr8k_sgd.py", *flags])


def default_device():
    """The name of the first of CUDA, MPS and CPU that is there."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def amp_pays(device):
    """Whether mixed precision is the faster choice: on CUDA, and on CPUs that multiply bfloat16 matrices."""
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device.startswith("cuda")


def amp_type(arguments):
    """The autocast type, None for float32. bfloat16 has float32's range and needs no loss scaling."""
    if not arguments["amp"]:
        return None
    on_cuda = arguments["device"].startswith("cuda")
    return torch.bfloat16 if arguments["device"] == "cpu" or (
        on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)) else torch.float16


def find_device(name):
    """torch.device of that name. Raises UsageError where there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name} is not to be had on this machine") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where no autocast is
        torch.backends.cudnn.benchmark = True
    return device
