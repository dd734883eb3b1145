"""How fast everything is on this machine:  python -m src.benchmark

    python -m src.benchmark --model small --baseline            a preset on the built-in dataset, against the plain way
    python -m src.benchmark --model base --data_dir data/flickr8k
    python -m src.benchmark --speedrun --data_dir data/flickr8k      how long until val avg_r1 is 1.7, 4 and 8

Times are medians of several steps after a warm-up, with the spread (25th to 75th percentile) beside them; on a GPU each
part is waited for, and throughput is measured in a loop of its own that waits for nothing. An epoch's time is the steps of
an epoch at that throughput plus the validation, which is run. The results are printed and written as JSON.
"""
import argparse
import datetime
import itertools
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import train_flickr8k_sgd as training
from src.losses import contrastive_backward
from src.model import PRESETS
from src.settings import RECIPES, UsageError, amp_type, default_arguments, find_device, parse_args
from src.utils import report
from src.utils.augment import MEAN, STD
from src.utils.checkpoint import load_json, save_json
from src.utils.flickr8k_simple import (DataError, epoch_batches, find_photo_folder, iterate_batches, open_photo_store,
                                       pad_texts, place_photos)
from src.utils.retrieval import evaluate, retrieval_metrics

# Dense bfloat16 or float16 peak with float32 accumulation, FLOP/s, from NVIDIA's data sheets of each card.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "L4": 121e12, "V100": 125e12, "T4": 65e12}
BASELINE_TOKENS = 77
WARM_UP = 2
RETRIEVAL_PHOTOS = (1000, 5000, 25000)
SPEEDRUN_TARGETS = (1.7, 4.0, 8.0)  # val avg_r1 in percent, the first being that of the run this project started from
# What a training towards a target is given besides its recipe: a short schedule gets to a low target sooner than the first
# part of a long one, and what keeps a long training from learning its captions by heart only slows a short one.
SHORT = {"weight_decay": 5e-4, "min_crop": 0.5, "color_jitter": 0, "word_dropout": 0, "final_lr": 0}
SPEEDRUN_SETTINGS = {"small": {1.7: {"epochs": 4, **SHORT}, 4.0: {"epochs": 14, **SHORT}}}


def timed(function, device):
    """-> seconds, the function's result; a GPU is waited for on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def median_and_spread(values):
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU, or that this process took on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PlainDataset(Dataset):
    """The plain way: a pair's JPEG decoded and augmented each time it comes up, its text padded or cut to 77 tokens."""

    def __init__(self, data, arguments):
        self.data, self.folder = data, find_photo_folder(arguments["data_dir"])
        self.transform = v2.Compose([
            v2.RandomResizedCrop(arguments["image_size"], (arguments["min_crop"], 1.0)), v2.RandomHorizontalFlip(),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        photo = int(self.data.photo_of_caption[i])
        with Image.open(self.folder / self.data.names[photo]) as image:
            image = self.transform(image.convert("RGB"))
        return image, pad_texts([self.data.texts[i]], BASELINE_TOKENS)[0, :BASELINE_TOKENS], photo


def plain_batches(data, arguments):
    """Endless batches of the plain way, prepared by one process a core."""
    loader = DataLoader(PlainDataset(data, arguments), arguments["batch_size"], shuffle=True, drop_last=True,
                        num_workers=os.cpu_count(), pin_memory=torch.cuda.is_available())
    device = torch.device(arguments["device"])
    for _ in itertools.count():
        for images, text, photo_ids in loader:
            images, text, photo_ids = (x.to(device, non_blocking=True) for x in (images, text, photo_ids))
            yield {"images": images, "text": text, "photo_ids": photo_ids,
                   "photo_of_pair": torch.arange(len(text), device=device)}


def stored_batches(data, arguments):
    """Endless batches of the training script's way."""
    device = torch.device(arguments["device"])
    photos = place_photos(data.photos, device)
    for epoch in itertools.count(1):
        batches = epoch_batches(data.photo_of_caption, arguments["captions_per_image"], arguments["batch_size"], epoch)
        yield from iterate_batches(data, photos, batches, device)


def measure_training(splits, tokenizer, arguments, steps, plain):
    """Step times of one preset, by the training script's way or the plain way -> dict of results."""
    device, data = torch.device(arguments["device"]), splits["train"]
    torch.manual_seed(0)
    model, _ = training.build_model(arguments, tokenizer)
    amp_dtype = None if plain else amp_type(arguments)
    model.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last).train()
    encode, eager = training.PairEncoder(model, amp_dtype), training.PairEncoder(model, amp_dtype)
    if arguments["compile"] and not plain:
        encode.compile()
    optimizer, contrast = training.build_optimizer(model, arguments), training.build_loss(arguments)
    ema = training.moving_average(model, 0.0 if plain else arguments["ema"])
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    word_start = torch.tensor(tokenizer.word_start, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = plain_batches(data, arguments) if plain else stored_batches(data, arguments)

    def augment(batch):
        if not plain:  # there the loader's processes did it
            training.augment(batch, arguments, word_start)

    def forward(batch):
        image_latents, text_latents, logit_scale, memory_losses = encode(batch["images"], batch["text"])
        rows = batch["photo_of_pair"]
        return contrast(image_latents[rows], text_latents, logit_scale, batch["photo_ids"][rows]), memory_losses

    def both_passes(batch, encode=encode):
        optimizer.zero_grad(set_to_none=True)
        contrastive_backward(encode, batch, training.MEMORY_LOSS_WEIGHT, arguments["chunk_size"], scaler.scale,
                             contrast)

    def update():
        training.update(model, optimizer, scaler, arguments["clip_grad"], ema)

    parts = {name: [] for name in ("data wait", "augmentation", "forward", "backward", "optimizer")}
    for step in range(WARM_UP + steps):
        wait, batch = timed(lambda: next(batches), device)
        augmentation, _ = timed(lambda: augment(batch), device)
        if step == 0:
            with FlopCounterMode(display=False) as counter:
                both_passes(batch, eager)  # what is compiled cannot be counted
            flops = counter.get_total_flops()
        first, _ = timed(lambda: forward(batch), device)
        passes, _ = timed(lambda: both_passes(batch), device)
        rest, _ = timed(update, device)
        if step >= WARM_UP:
            for name, value in zip(parts, (wait, augmentation, first, max(passes - first, 0.0), rest)):
                parts[name].append(value)

    def run():
        for _ in range(steps):
            batch = next(batches)
            augment(batch)
            both_passes(batch)
            update()

    step_seconds = timed(run, device)[0] / steps
    epoch = epoch_batches(data.photo_of_caption, 1 if plain else arguments["captions_per_image"], arguments["batch_size"], 0)
    steps_an_epoch, pairs = len(epoch), len(epoch[0])
    memory = peak_memory(device)
    validation, _ = timed(lambda: evaluate(model, splits["val"], amp_dtype), device)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if device.type == "cuda"
                 and name in torch.cuda.get_device_name(device)), None)
    return {
        "step seconds": step_seconds,
        "parts": {name: median_and_spread(values) for name, values in parts.items()},
        "data-wait share": statistics.median(parts["data wait"]) / step_seconds,
        "pairs a step": pairs,
        "pairs a second": pairs / step_seconds,
        "model FLOP a pair": flops / pairs,
        "model FLOP/s": flops / step_seconds,
        "share of peak (MFU)": flops / step_seconds / peak if peak else None,
        "validation seconds": validation,
        "epoch seconds": step_seconds * steps_an_epoch + validation,
        "steps an epoch": steps_an_epoch,
        "peak memory bytes": memory,
    }


def measure_photos(data, arguments, repeats):
    """Photos a second, on all cores: decoded from their files and no more, made into a store, and taken from a store."""
    folder, size, names = find_photo_folder(arguments["data_dir"]), data.photos.shape[-1], data.names[:1000]
    rates = {"photos only decoded": [], "photos made into a store": [], "photos taken from a store": []}

    def decode(name):
        with Image.open(folder / name) as photo:
            photo.convert("RGB")

    for _ in range(repeats):
        rows = torch.randperm(len(data.photos))[:1000]
        with ThreadPoolExecutor(os.cpu_count()) as pool, tempfile.TemporaryDirectory() as empty:
            for rate, number, work in zip(rates.values(), (len(names), len(names), len(rows)), (
                    lambda: list(pool.map(decode, names)),
                    lambda: open_photo_store(Path(empty) / "photos", folder, names, size),
                    lambda: data.photos[rows])):
                rate.append(number / timed(work, torch.device("cpu"))[0])
    return {f"{name} a second": median_and_spread(values) for name, values in rates.items()}


def measure_retrieval(device, dim=256):
    """Seconds, and bytes beyond the peak before, of R@K on random embeddings, five captions a photo."""
    results = {}
    for photos in RETRIEVAL_PHOTOS:
        torch.manual_seed(0)
        images, texts = torch.randn(photos, dim, device=device), torch.randn(5 * photos, dim, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory(device)
        seconds, _ = timed(lambda: retrieval_metrics(images, texts, torch.arange(photos).repeat_interleave(5)), device)
        results[f"{photos:,} photos"] = {"seconds": seconds, "bytes": peak_memory(device) - before}
    return results


def time_to_targets(preset, targets, settings, given):
    """Train from nothing, as a user would, until val avg_r1 has passed the last of the rising targets -> a dict for each.

    settings: {flag: value} besides the preset's recipe; given: flags that the user gave. The clock runs from the command
    to the epoch's line in the history, the start of Python, an absent photo store and every validation included.
    """
    results, targets, settings = [], list(targets), {"epochs": RECIPES[preset]["epochs"]} | settings
    flags = [part for name, value in settings.items() for part in (f"--{name}", f"{value}")]
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / report.HISTORY
        command = [sys.executable, training.__file__, "--model", preset, *flags, "--output_dir", folder, *given]
        begun, rows, running = time.perf_counter(), [], True
        process = subprocess.Popen(command)
        try:
            while running and targets:
                time.sleep(0.1)
                running = process.poll() is None  # before the last look at the history
                rows = load_json(history) if history.exists() else []
                best = max(rows, key=lambda row: row["val"]["avg_r1"], default=None)
                while targets and best and (best["val"]["avg_r1"] >= targets[0] or not running):
                    target = targets.pop(0)
                    results.append({
                        "preset": preset, "target": target, "epochs": settings["epochs"], "avg_r1": best["val"]["avg_r1"],
                        "epoch": best["epoch"], "reached": best["val"]["avg_r1"] >= target,
                        "seconds": time.perf_counter() - begun, "command": " ".join(command[1:])})
        finally:
            process.terminate()
            process.wait()
    if targets:
        raise UsageError(f"the training ended with exit status {process.returncode} before its first epoch was over")
    return results


def speedrun_table(results):
    """The speedrun's results as lines of text."""
    lines = [f"{results['device']}, torch {results['torch']}, {results['date']}",
             f"  {'preset':<8}{'val avg_r1':>12}{'reached':>10}{'at epoch':>12}{'seconds':>12}"]
    lines += [f"  {r['preset']:<8}{r['target']:>12g}{r['avg_r1']:>10.2f}{r['epoch']:>5} of {r['epochs']:<4}"
              + (f"{r['seconds']:>12.1f}" if r["reached"] else f"{'not reached':>12}") for r in results["speedrun"]]
    return "\n".join(lines)


def table(results):
    """The results as lines of text."""
    lines = [f"{results['device']}, torch {results['torch']}, {results['date']}"]
    for name, of in results["presets"].items():
        for way in filter(of.__contains__, ("ours", "plain")):
            r = of[way]
            lines += ["", f"{name}, {'the training script' if way == 'ours' else 'the plain way (--baseline)'}: "
                          f"{r['pairs a step']} pairs a step, "
                          f"{of['arguments']['captions_per_image'] if way == 'ours' else 1} a photo, {r['precision']}"]
            lines += [f"  {part:<28}{1000 * t['median']:>12.2f} ms   ({1000 * t['low']:.2f} to {1000 * t['high']:.2f})"
                      for part, t in r["parts"].items()]
            mfu = r["share of peak (MFU)"]
            lines += [f"  {text:<28}{value:>12}{unit}" for text, value, unit in (
                ("whole step", f"{1000 * r['step seconds']:.2f}", " ms"),
                ("data wait", f"{100 * r['data-wait share']:.2f}", " % of the step"),
                ("throughput", f"{r['pairs a second']:.0f}", " pairs/s"),
                ("model", f"{r['model FLOP/s'] / 1e12:.3f}", f" TFLOP/s ({r['model FLOP a pair'] / 1e9:.2f} GFLOP a pair)"
                 + (f", {100 * mfu:.1f} % of the peak (MFU)" if mfu else "")),
                ("validation", f"{r['validation seconds']:.2f}", f" s ({100 * r['validation seconds'] / r['epoch seconds']:.1f}"
                                                                " % of an epoch)"),
                ("epoch", f"{r['epoch seconds']:.1f}", f" s ({r['steps an epoch']} steps, validation included)"),
                ("peak memory", f"{r['peak memory bytes'] / 1e6:.0f}", " MB"))]
        if "plain" in of:
            lines += [f"  {'speed-up, whole epoch':<28}{of['plain']['epoch seconds'] / of['ours']['epoch seconds']:>12.2f} x"]
        lines += ["", f"{name}, photos ({of['arguments']['image_size']} px)"]
        lines += [f"  {text:<36}{t['median']:>8.0f} /s   ({t['low']:.0f} to {t['high']:.0f})" for text, t in of["photos"].items()]
    lines += ["", "retrieval measures (R@K both ways, five captions a photo)"]
    lines += [f"  {text:<28}{r['seconds']:>12.2f} s   {r['bytes'] / 1e6:.0f} MB" for text, r in results["retrieval"].items()]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", nargs="+", choices=list(PRESETS), default=["small"], help="presets (default: small)")
    parser.add_argument("--data_dir", help="Flickr8k's folder (default: the built-in dataset, in data/synthetic)")
    parser.add_argument("--baseline", action="store_true", help="the plain way as well: JPEGs decoded in a DataLoader, text "
                        "padded to 77 tokens, one caption a photo, float32, no compile")
    parser.add_argument("--speedrun", action="store_true", help="only: how long fresh trainings take to reach a val avg_r1 of "
                        + ", ".join(f"{target:g}" for target in SPEEDRUN_TARGETS))
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each kind (default: 10)")
    parser.add_argument("--batch_size", type=int, help="pairs a step (default: the preset's)")
    parser.add_argument("--captions_per_image", type=int, help="captions of a photo a step takes together (default: the preset's)")
    parser.add_argument("--chunk_size", type=int, help="pairs encoded at a time (default: all)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the first of these that is there)")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: where it is faster)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: as in training)")
    parser.add_argument("--output", default="outputs/benchmark.json", help="JSON to write (default: outputs/benchmark.json)")
    options = vars(parser.parse_args(argv))
    if options["steps"] < 1:
        parser.error("--steps must be at least 1")
    log = logging.getLogger("benchmark")

    results = {"date": datetime.date.today().isoformat(), "torch": str(torch.__version__), "python": platform.python_version(),
               "presets": {}}
    try:
        for preset in options["model"]:
            given = ["--model", preset, *([] if options["data_dir"] else ["--synthetic"])]
            for name in ("data_dir", "batch_size", "captions_per_image", "chunk_size", "device"):
                given += [f"--{name}", str(options[name])] if options[name] is not None else []
            for name in ("amp", "compile"):
                given += [f"--{'' if options[name] else 'no-'}{name}"] if options[name] is not None else []
            arguments = default_arguments(parse_args("", given))
            device = find_device(arguments["device"])
            results["device"] = report.device_name(device)
            if options["speedrun"]:
                of_target = {target: SPEEDRUN_SETTINGS.get(preset, {}).get(target, {}) for target in SPEEDRUN_TARGETS}
                for settings in {str(settings): settings for settings in of_target.values()}.values():
                    targets = [target for target in SPEEDRUN_TARGETS if of_target[target] == settings]  # one training for all
                    results.setdefault("speedrun", []).extend(time_to_targets(preset, targets, settings, given[2:]))
                continue
            training.find_data(arguments, log)
            tokenizer = training.build_tokenizer(arguments)
            splits = training.load_data(arguments, tokenizer, log)
            of = {"arguments": arguments, "photos": measure_photos(splits["train"], arguments, 3)}
            for way in ("ours", "plain") if options["baseline"] else ("ours",):
                of[way] = measure_training(splits, tokenizer, arguments, options["steps"], way == "plain")
                of[way]["precision"] = report.precision_name(amp_type(arguments) if way == "ours" else None)
            results["presets"][preset] = of
        if not options["speedrun"]:
            results["retrieval"] = measure_retrieval(device)
        Path(options["output"]).parent.mkdir(parents=True, exist_ok=True)
        save_json(results, options["output"])
    except (DataError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(speedrun_table(results) if options["speedrun"] else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
