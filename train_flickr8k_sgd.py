"""Train the multimodal memory network on Flickr8k with SGD and a cosine schedule.

    python train_flickr8k_sgd.py --synthetic            the built-in dataset, about a minute on any machine
    python train_flickr8k_sgd.py                        Flickr8k in data/flickr8k (see download_flickr8k.py)
    python train_flickr8k_sgd.py --model small          the preset for a laptop

Read it from the top: settings, data, model, the loop, the files it leaves. After any interruption, --resume goes on
from the last checkpoint as if nothing had happened: the order of the pairs, the crops and the learning rate follow
from the seed and the step alone, so there is no other random state to restore.
"""
import argparse
import inspect
import logging
import math
import platform
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from src.losses import info_nce_loss
from src.model import PRESETS, MultiModalMemoryNetwork
from src.utils import report
from src.utils.augment import drop_words, normalize, random_resized_crop_and_flip
from src.utils.checkpoint import CheckpointError, load_checkpoint, load_json, save_checkpoint, save_json
from src.utils.flickr8k_simple import DataError, Flickr8kImageTextDataset, collate_fn, epoch_batches
from src.utils.retrieval import evaluate
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import CharTokenizer

# What each preset trains with unless a flag says otherwise. `text_lr` multiplies the learning rate of the text encoder.
RECIPES = {
    "tiny": dict(epochs=8, batch_size=100, captions_per_image=1, lr=0.1, text_lr=4.0, weight_decay=5e-4,
                 temperature=0.1, min_crop=0.5, word_dropout=0.0),
    "small": dict(epochs=20, batch_size=256, captions_per_image=2, lr=0.06, text_lr=4.0, weight_decay=4e-3,
                  temperature=0.1, min_crop=0.3, word_dropout=0.1),
    "base": dict(epochs=30, batch_size=64, captions_per_image=1, lr=0.01, text_lr=1.0, weight_decay=5e-4,
                 temperature=0.1, min_crop=0.5, word_dropout=0.0),
    "large": dict(epochs=100, batch_size=64, captions_per_image=1, lr=0.01, text_lr=1.0, weight_decay=5e-4,
                  temperature=0.1, min_crop=0.5, word_dropout=0.0),
}
WARMUP = 0.1  # share of the steps over which the learning rate rises
MEMORY_LOSS_WEIGHT = 0.1
STEPS_A_LOOK = 10  # the loss is brought from the device, checked and shown every so many steps: a sync point
SECONDS_A_CHECKPOINT = 300  # inside a long epoch, so that a power cut costs minutes
LAST_KEYS = ("epoch", "step", "loss_sum", "seconds", "model_state_dict", "optimizer_state_dict", "scaler_state_dict",
             "scheduler_state_dict", "history", "config")


class UsageError(Exception):
    """What the user asked for cannot be done; exit status 2."""


class TrainingError(Exception):
    """The run failed while running; exit status 1."""


def preset_defaults(preset):
    """Everything that a preset sets: the model's arguments and the recipe's."""
    signature = inspect.signature(MultiModalMemoryNetwork).parameters.values()
    return {parameter.name: parameter.default for parameter in signature} | PRESETS[preset] | RECIPES[preset]


def parse_args(argv=None):
    """The flags, None where the user gave none: `resolve` fills in the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument

    def by_preset(name):
        return ", ".join(f"{preset} {preset_defaults(preset)[name]:g}" for preset in PRESETS)

    add("--data_dir", help="folder of the dataset (default: data/flickr8k, or data/synthetic with --synthetic)")
    add("--output_dir", help="folder that the run writes (default: outputs/flickr8k_sgd, or outputs/synthetic_sgd)")
    add("--model", choices=list(PRESETS), help="preset (default: base, or tiny with --synthetic)")
    add("--epochs", type=int, help=f"passes over all pairs (default: {by_preset('epochs')})")
    add("--batch_size", type=int, help=f"pairs a step (default: {by_preset('batch_size')})")
    add("--captions_per_image", type=int, help="captions of a photo that a step takes together, the photo encoded once "
        f"(default: {by_preset('captions_per_image')})")
    add("--lr", type=float, help=f"peak learning rate (default: {by_preset('lr')})")
    add("--text_lr", type=float, help=f"the text encoder's, as a multiple of --lr (default: {by_preset('text_lr')})")
    add("--momentum", type=float, help="Nesterov momentum (default: 0.9)")
    add("--weight_decay", type=float, help=f"of weight matrices only (default: {by_preset('weight_decay')})")
    add("--clip_grad", type=float, help="largest norm of the gradient (default: 1.0)")
    add("--temperature", type=float, help=f"at the start; it is learned (default: {by_preset('temperature')})")
    add("--min_crop", type=float, help=f"smallest share of a photo in a training crop (default: {by_preset('min_crop')})")
    add("--word_dropout", type=float, help="share of a caption's words left out at random in training "
        f"(default: {by_preset('word_dropout')})")
    add("--image_size", type=int, help=f"side of the photos, in pixels (default: {by_preset('image_size')})")
    add("--latent_dim", type=int, help=f"width of the shared space (default: {by_preset('latent_dim')})")
    add("--memory_size", type=int, help=f"slots of the memory (default: {by_preset('memory_size')})")
    add("--num_workers", type=int, help="processes that collate batches (default: 0, the main process does)")
    add("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    add("--device", help="cuda, cuda:1, mps, cpu (default: the first of these that is there)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision (default: on where it is faster: CUDA, and CPUs that multiply bfloat16 matrices)")
    add("--synthetic", action="store_true", default=None,
        help="train on the built-in dataset, made where it is absent (default: Flickr8k)")
    add("--allow_incomplete", action="store_true", default=None,
        help="leave out photos that are missing or unreadable (default: refuse to start)")
    add("--resume", action="store_true", help="go on with the run in --output_dir, with its own settings")
    add("--overwrite", action="store_true", help="delete the run in --output_dir first")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "captions_per_image", "image_size", "latent_dim", "memory_size", "lr", "text_lr",
                 "clip_grad", "temperature"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be above 0, not {value}")
    if args.batch_size == 1:
        parser.error("--batch_size must be at least 2: the other pairs of a batch are the negatives")
    if args.momentum is not None and not 0 < args.momentum < 1:
        parser.error(f"--momentum must lie between 0 and 1, not {args.momentum}")
    if args.min_crop is not None and not 0 < args.min_crop <= 1:
        parser.error(f"--min_crop must be above 0 and at most 1, not {args.min_crop}")
    if args.word_dropout is not None and not 0 <= args.word_dropout < 1:
        parser.error(f"--word_dropout must be at least 0 and below 1, not {args.word_dropout}")
    for name in ("weight_decay", "num_workers", "seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            parser.error(f"--{name} must be at least 0 and below 2 ** 32")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def resolve(args):
    """Parsed flags -> (arguments, output_dir, state): every setting of the run, and the checkpoint to go on from.

    Raises UsageError for a folder that holds a run already, for nothing to resume, and for a flag that contradicts
    the run being resumed.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    default_dir = "outputs/synthetic_sgd" if args.synthetic else "outputs/flickr8k_sgd"
    output_dir = Path(given.pop("output_dir", default_dir))
    if resume:
        if not (output_dir / report.CONFIG).exists():
            raise UsageError(f"nothing to resume in {output_dir}: it holds no {report.CONFIG}")
        arguments, state = load_json(output_dir / report.CONFIG)["arguments"], None
        if (output_dir / report.LAST).exists():  # else the run was stopped before its first checkpoint: from the start
            state = load_checkpoint(output_dir / report.LAST, LAST_KEYS)
        for name, value in given.items():
            if name in ("data_dir", "device", "num_workers"):  # where it runs, not what is computed
                arguments[name] = value
            elif arguments[name] != value:
                raise UsageError(f"--resume goes on with the run's own --{name} {arguments[name]}, not {value}; "
                                 "leave the flag out, or start a new run in another --output_dir")
        return arguments, output_dir, state
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir {output_dir} is a file, not a folder")
    found = [name for name in report.RUN_FILES if name != report.LOG and (output_dir / name).exists()]
    if found and not overwrite:
        raise UsageError(f"{output_dir} holds a run already ({found[0]}); "
                         "--resume goes on with it, --overwrite deletes it, or name another --output_dir")
    defaults = {"synthetic": False, "allow_incomplete": False, "num_workers": 0, "seed": 0, "momentum": 0.9,
                "clip_grad": 1.0, "model": "tiny" if args.synthetic else "base",
                "data_dir": "data/synthetic" if args.synthetic else "data/flickr8k"}
    defaults["device"] = ("cuda" if torch.cuda.is_available() else
                          "mps" if torch.backends.mps.is_available() else "cpu")
    arguments = defaults | given
    own = preset_defaults(arguments["model"])
    arguments |= {name: own[name] for name in
                  ("image_size", "latent_dim", "memory_size", *RECIPES["base"]) if name not in given}
    arguments.setdefault("amp", amp_pays(arguments["device"]))
    return arguments, output_dir, None


def amp_pays(device):
    """Whether mixed precision is the faster choice: on CUDA, and on CPUs that multiply bfloat16 matrices (AMX)."""
    if device == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return device.startswith("cuda")


def load_data(arguments, log):
    """The three splits. Training photos are kept an eighth larger than the model takes, for the crops to choose from."""
    root = Path(arguments["data_dir"])
    if arguments["synthetic"]:
        if write_synthetic(root):
            log.info(f"made the built-in dataset in {root}")
    elif not root.is_dir():
        raise DataError(f"no Flickr8k in {root}. Either fetch it: python download_flickr8k.py --data_dir {root}\n"
                        "or train on the built-in dataset, no download: python train_flickr8k_sgd.py --synthetic")
    line, splits = report.ProgressLine(), {}
    for split in ("train", "val", "test"):
        size = arguments["image_size"] * 8 // 7 if split == "train" else arguments["image_size"]
        splits[split] = data = Flickr8kImageTextDataset(
            root, split, size, CharTokenizer(), arguments["allow_incomplete"],
            progress=lambda done, total: done % 50 == 0 and line.update(f"reading {split}: {done} of {total} photos"))
        line.clear()
        if data.left_out:
            log.info(f"{split}: {len(data.left_out)} photos left out, among them {data.left_out[0]}")
    if len(splits["train"]) < 2:
        raise DataError(f"{root}: training needs at least two pairs")
    return splits


def build_optimizer(model, arguments):
    """SGD with Nesterov momentum. Weight decay shrinks matrices; norms, biases and other vectors are left alone."""
    groups = []
    for text in (False, True):
        factor = arguments["text_lr"] if text else 1.0
        for decays in (False, True):
            groups.append({
                "params": [parameter for name, parameter in model.named_parameters()
                           if name.startswith("text_encoder.") == text and (parameter.ndim > 1) == decays],
                "lr": arguments["lr"] * factor,
                "weight_decay": arguments["weight_decay"] / factor if decays else 0.0})  # a step shrinks by lr * decay
    return torch.optim.SGD(groups, momentum=arguments["momentum"], nesterov=True)


def describe(arguments, splits, model, model_arguments, precision):
    """What config.json holds."""
    device = torch.device(arguments["device"])
    return {
        "arguments": arguments,
        "model": model_arguments,
        "optimizer": {"name": "SGD", "momentum": arguments["momentum"], "nesterov": True, "peak lr": arguments["lr"],
                      "text encoder's lr": arguments["lr"] * arguments["text_lr"],
                      "schedule": f"linear warm-up over {WARMUP:.0%} of the steps, then cosine to 0",
                      "weight decay": arguments["weight_decay"], "gradient clipping": arguments["clip_grad"]},
        "precision": precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
                  f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "data": {name: {"photos": len(data.names), "captions": len(data), "left_out": len(data.left_out),
                        "captions_per_photo": {str(count): photos for count, photos in enumerate(
                            torch.bincount(torch.bincount(data.photo_of_caption)).tolist()) if photos}}
                 for name, data in splits.items()},
    }


class StopRequest:
    """Ctrl-C and SIGTERM while the loop runs: finish the step, save, stop. A second one, or one outside the loop,
    stops at once."""

    def __init__(self):
        self.in_loop = self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.requested or not self.in_loop:
            raise KeyboardInterrupt
        self.requested = True


def ignore_interrupt(worker_id):
    """In a loader's process: Ctrl-C reaches every process of the terminal, and the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(arguments, output_dir, state, stop, log):
    """One run, from its settings to its files. `state` is the checkpoint to go on from, None for a run from the start."""
    try:
        device = torch.device(arguments["device"])
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {arguments['device']} is not to be had on this machine") from None
    tokenizer = CharTokenizer()

    torch.manual_seed(arguments["seed"])
    model_arguments = dict(PRESETS[arguments["model"]], vocab_size=tokenizer.vocab_size, **{
        name: arguments[name] for name in ("image_size", "latent_dim", "memory_size")})
    try:
        model = MultiModalMemoryNetwork(**model_arguments)
    except ValueError as error:
        raise UsageError(f"these sizes make no model: {error}") from None
    with torch.no_grad():
        model.logit_scale.fill_(-math.log(arguments["temperature"]))
        model.clamp_logit_scale_()
    model.to(device, memory_format=torch.channels_last)

    splits = load_data(arguments, log)
    data = splits["train"]
    output_dir.mkdir(parents=True, exist_ok=True)
    if state is None:  # what --overwrite deletes, now that nothing else can be wrong
        for name in report.RUN_FILES:
            (output_dir / name).unlink(missing_ok=True)
    to_file = logging.FileHandler(output_dir / report.LOG, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    log.addHandler(to_file)

    optimizer = build_optimizer(model, arguments)

    def batches_of(epoch):
        return epoch_batches(data.photo_of_caption, arguments["captions_per_image"], arguments["batch_size"],
                             arguments["seed"] * 1_000_003 + epoch)

    steps_an_epoch, pairs_a_step = len(batches_of(1)), len(batches_of(1)[0])
    total_steps = steps_an_epoch * arguments["epochs"]
    warmup_steps = max(1, round(WARMUP * total_steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / total_steps)))

    amp_dtype = None
    if arguments["amp"]:  # bfloat16 has float32's range and needs no loss scaling
        amp_dtype = torch.bfloat16 if device.type == "cpu" or (
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)) else torch.float16
    precision = "float32" if amp_dtype is None else f"mixed, {str(amp_dtype).removeprefix('torch.')}"
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    config = describe(arguments, splits, model, model_arguments, precision)
    epoch, step_in_epoch, loss_sum, seconds_before, history = 1, 0, 0.0, 0.0, []
    if state is not None:
        try:
            model.load_state_dict(state["model_state_dict"])
            optimizer.load_state_dict(state["optimizer_state_dict"])
        except (RuntimeError, ValueError):
            raise UsageError(f"{output_dir / report.LAST} is of another model than {report.CONFIG} beside it") from None
        scheduler.load_state_dict(state["scheduler_state_dict"])
        scaler.load_state_dict(state["scaler_state_dict"])
        if state["config"]["data"] != config["data"]:
            raise UsageError(f"{arguments['data_dir']} is not the dataset that the run in {output_dir} began with")
        epoch, step_in_epoch, loss_sum = state["epoch"], state["step"], state["loss_sum"]
        seconds_before, history = state["seconds"], state["history"]
        log.info(f"resumed at epoch {epoch}, step {step_in_epoch}")
        save_json(history, output_dir / report.HISTORY)  # a kill may have come between the two files
    save_json(config, output_dir / report.CONFIG)
    log.info(f"{arguments['model']}: {config['parameters']:,} parameters, {precision}, on {config['device']}")
    log.info(f"{len(data):,} pairs of {len(data.names):,} photos in {arguments['data_dir']}: {arguments['epochs']} "
             f"epochs of {steps_an_epoch} steps of {pairs_a_step} pairs")

    def save_last():
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            raise TrainingError(f"the weights are no longer finite in epoch {epoch}, step {step_in_epoch}; {advice}")
        save_checkpoint({
            "epoch": epoch, "step": step_in_epoch, "loss_sum": loss_sum, "seconds": seconds_before + time.time() - began,
            "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
            "scaler_state_dict": scaler.state_dict(), "scheduler_state_dict": scheduler.state_dict(),
            "history": history, "config": config}, output_dir / report.LAST)

    advice = f"the last good checkpoint is kept in {output_dir}. A smaller --lr may help."
    line, run_began, first_step = report.ProgressLine(), time.time(), (epoch - 1) * steps_an_epoch + step_in_epoch
    model.train()
    stop.in_loop = True
    while epoch <= arguments["epochs"]:
        began = saved = time.time()
        loader = DataLoader(data, batch_sampler=batches_of(epoch)[step_in_epoch:], collate_fn=collate_fn,
                            num_workers=arguments["num_workers"], pin_memory=device.type == "cuda",
                            worker_init_fn=ignore_interrupt)
        losses = []  # on the device, since the last look
        for batch in loader:
            step = (epoch - 1) * steps_an_epoch + step_in_epoch
            torch.manual_seed(arguments["seed"] * 1_000_003 + step)  # crops depend on the step, not on what came before
            # A photo that stands there with several of its captions, side by side, is encoded once.
            _, photo_of_pair, counts = torch.unique_consecutive(batch["photo_ids"], return_inverse=True,
                                                                return_counts=True)
            images = batch["images"][counts.cumsum(0) - counts]
            images = normalize(images.to(device, non_blocking=True))
            images = random_resized_crop_and_flip(images, arguments["image_size"], arguments["min_crop"])
            images = images.contiguous(memory_format=torch.channels_last)
            text = batch["text"].to(device, non_blocking=True)
            text = drop_words(text, arguments["word_dropout"], tokenizer.space_id)
            photo_ids = batch["photo_ids"].to(device, non_blocking=True)

            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                of_images, of_text = model(images=images), model(text=text)
                image_latents = of_images["central_latent"][photo_of_pair.to(device, non_blocking=True)]
                contrastive = info_nce_loss(image_latents, of_text["central_latent"], model.logit_scale, photo_ids)
                memory_loss = of_images["memory_loss"] + of_text["memory_loss"]
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(contrastive + MEMORY_LOSS_WEIGHT * memory_loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments["clip_grad"])
            scaler.step(optimizer)
            scaler.update()
            lr = optimizer.param_groups[0]["lr"]
            scheduler.step()
            model.clamp_logit_scale_()
            step_in_epoch += 1
            losses.append(contrastive.detach())

            save_now = stop.requested or time.time() - saved > SECONDS_A_CHECKPOINT
            if len(losses) == STEPS_A_LOOK or step_in_epoch == steps_an_epoch or save_now:
                for i, loss in enumerate(torch.stack(losses).tolist(), start=step_in_epoch - len(losses) + 1):  # a sync
                    if not math.isfinite(loss):
                        raise TrainingError(f"the loss became {loss} in epoch {epoch}, step {i}; {advice}")
                    loss_sum += loss
                losses = []
                done = step + 1 - first_step
                left = (total_steps - step - 1) * (time.time() - run_began) / done
                line.update(f"epoch {epoch}/{arguments['epochs']}  step {step_in_epoch}/{steps_an_epoch}  loss {loss:.3f}  "
                            f"{done * pairs_a_step / (time.time() - run_began):.0f} pairs/s  {report.duration(left)} left")
            if save_now and step_in_epoch < steps_an_epoch:
                save_last()
                saved = time.time()
                if stop.requested:
                    raise KeyboardInterrupt

        line.update(f"epoch {epoch}/{arguments['epochs']}  validating")
        try:
            metrics = evaluate(model, splits["val"], amp_dtype)
        except ValueError as error:  # embeddings that are not finite
            raise TrainingError(f"validation after epoch {epoch}: {error}; {advice}") from None
        row = {"epoch": epoch, "train": {"loss": loss_sum / steps_an_epoch}, "val": metrics,
               "lr": lr, "seconds": seconds_before + time.time() - began}
        # In this order a kill between any two files costs nothing: the checkpoint decides where --resume starts.
        if metrics["avg_r1"] > max((other["val"]["avg_r1"] for other in history), default=-1.0):
            save_checkpoint({"epoch": epoch, "model_state_dict": model.state_dict(), "metrics": metrics,
                             "config": config, "tokenizer": tokenizer.state_dict()}, output_dir / report.BEST)
        history.append(row)
        epoch, step_in_epoch, loss_sum, seconds_before, began = epoch + 1, 0, 0.0, 0.0, time.time()
        save_last()
        save_json(history, output_dir / report.HISTORY)
        line.clear()
        log.info(report.epoch_line(row))
        if stop.requested:
            raise KeyboardInterrupt
    stop.in_loop = False

    best = load_checkpoint(output_dir / report.BEST, report.BEST_KEYS)
    model.load_state_dict(best["model_state_dict"])
    save_json(evaluate(model, splits["test"], amp_dtype), output_dir / report.TEST)


def main(argv=None):
    args = parse_args(argv)
    stop = StopRequest()
    log = logging.getLogger("flickr8k_sgd")
    log.setLevel(logging.INFO)
    to_stdout, to_stderr = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    to_stdout.addFilter(lambda record: record.levelno < logging.ERROR)
    to_stderr.setLevel(logging.ERROR)
    log.addHandler(to_stdout)
    log.addHandler(to_stderr)
    output_dir = None
    try:
        arguments, output_dir, state = resolve(args)
        train(arguments, output_dir, state, stop, log)
        log.info(report.summary(report.load_run(output_dir)))
        return 0
    except (UsageError, DataError) as error:
        status, message = 2, f"error: {error}"
    except torch.OutOfMemoryError:
        status, message = 1, "error: the device is out of memory; a smaller --batch_size or --model needs less"
    except (TrainingError, CheckpointError, OSError) as error:
        status, message = 1, f"error: {error}"
    except KeyboardInterrupt:
        begun = output_dir is not None and (output_dir / report.CONFIG).exists()
        status, message = 130, "interrupted; " + (
            f"go on with: python train_flickr8k_sgd.py --resume --output_dir {output_dir}" if begun else "nothing was begun")
    report.ProgressLine().clear()
    log.error(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
