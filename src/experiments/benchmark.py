"""Measure how long a training step and an epoch take on this machine.

    python -m src.experiments.benchmark --model small --data_dir data/flickr8k --baseline

It takes the flags of the training script, too. Without --data_dir it measures on the built-in
shapes. With --baseline it also measures the plain way to train, for comparison: JPEG files decoded
by a DataLoader with one process per core, one caption per photo, text of 77 tokens, float32.

Each part of a step is timed alone, with the GPU waited for on both sides. The time of a whole step
is taken from a loop that waits for nothing. An epoch is its steps and one validation.
"""
import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import time

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from src.device import (
    allow_fast_kernels,
    describe,
    find_device,
    keep_freed_memory,
    memory_format,
)
from src.encoder_sources import load_encoders
from src.encoders import NO_ENCODERS
from src.evaluation import evaluate
from src.first_stage import prepare_splits
from src.settings import add_flags, make_settings
from src.training import RunState, augment, forward_backward, training_step, update
from src.utils.augment import MEAN, STD
from src.utils.console import Parser, number, prepare_output
from src.utils.errors import UsageError
from src.utils.flickr8k_simple import iterate_batches, place_photos
from src.utils.splits import load_splits
from train_flickr8k_sgd import build_model

# FLOP/s of dense bfloat16 or float16 matrix products with float32 accumulation, from NVIDIA's data
# sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "T4": 65e12}
BASELINE_TOKENS = 77
WARM_UP_STEPS = 2


def timed(function, device):
    """Call `function()` and return (seconds, its result). A GPU is waited for on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_memory(device):
    """Return the most bytes that tensors took on a GPU, or that this process took on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device):
    """Return the data sheet's FLOP/s of this GPU, or None for a device that is not in the table."""
    if device.type == "cuda":
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    return None


class PlainDataset(Dataset):
    """The plain way to read a pair: its JPEG file is decoded and augmented each time."""

    def __init__(self, data, settings):
        self.data = data
        self.transform = v2.Compose([
            v2.RandomResizedCrop(settings.image_size, (settings.min_crop, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        """Return the photo (3, H, W), the token ids (BASELINE_TOKENS,) and the photo's row."""
        photo_id = int(self.data.photo_of_caption[i])
        path = self.data.folders[0].path(self.data.names[photo_id])
        with Image.open(path) as image:
            photo = self.transform(image.convert("RGB"))
        token_ids = self.data.texts.padded([i], BASELINE_TOKENS)[0, :BASELINE_TOKENS]
        return photo, torch.from_numpy(token_ids), photo_id


def plain_batches(data, settings, device):
    """Yield batches of the plain way without end."""
    is_cuda = device.type == "cuda"
    loader = DataLoader(
        PlainDataset(data, settings), settings.batch_size, shuffle=True, drop_last=True,
        num_workers=os.cpu_count(), pin_memory=is_cuda)
    while True:
        for batch in loader:
            images, text, photo_ids = (part.to(device, non_blocking=is_cuda) for part in batch)
            yield {"images": images, "text": text, "photo_ids": photo_ids,
                   "photo_of_pair": torch.arange(len(text), device=device)}


def stored_batches(data, settings, device):
    """Yield batches as the training script makes them, without end."""
    photos = place_photos(data.photos, device)
    for epoch in itertools.count(1):
        batches = data.epoch(settings.captions_per_image, settings.batch_size, epoch)
        yield from iterate_batches(data, photos, batches, device)


def start_run(settings, tokenizer, device, encoders=NO_ENCODERS, layout=None):
    """Return a RunState with a new model, in its last epoch, where photos have their full size.
    layout: a memory format, by default that of the training script."""
    torch.manual_seed(0)
    model = build_model(settings, tokenizer, encoders)
    if settings.finetune:
        for encoder in encoders:
            encoder.freeze_unused()
        encoders.attach(model, settings)
    model.to(device, memory_format=layout or memory_format(device)).train()
    run = RunState(settings, model, tokenizer, device, total_steps=1_000_000)
    run.epoch = settings.epochs
    return run


def train_steps(run, batches, steps):
    """Train so many steps as the training script does."""
    for batch in itertools.islice(batches, steps):
        training_step(run, batch)


def count_flops(run, batch):
    """Return the floating-point operations of one forward and backward pass."""
    graphs, run.graphs = run.graphs, None  # the counter does not see what a CUDA graph replays
    with FlopCounterMode(display=False) as counter:
        forward_backward(run, batch)
    run.graphs = graphs
    return counter.get_total_flops()


def time_parts(run, batches, steps):
    """Return ({part of a step: [seconds of each step]}, floating-point operations of a step)."""
    parts = {"data wait": [], "augmentation": [], "forward, backward": [], "optimizer": []}
    flops = None
    for step in range(WARM_UP_STEPS + steps):
        wait_seconds, batch = timed(lambda: next(batches), run.device)
        augment_seconds, _ = timed(lambda: augment(run, batch), run.device)
        if flops is None:
            flops = count_flops(run, batch)
        backward_seconds, _ = timed(lambda: forward_backward(run, batch), run.device)
        update_seconds, _ = timed(lambda: update(run), run.device)
        if step >= WARM_UP_STEPS:
            seconds = (wait_seconds, augment_seconds, backward_seconds, update_seconds)
            for values, value in zip(parts.values(), seconds):
                values.append(value)
    return parts, flops


def measure_training(settings, splits, tokenizer, encoders, steps, plain=False):
    """Measure the training script's way, or the plain way, and return a dict of the figures."""
    device, train = find_device(settings.device), splits["train"]
    if plain:
        settings = dataclasses.replace(settings, amp=False, ema=0.0, captions_per_image=1)
        run = start_run(settings, tokenizer, device, encoders, torch.contiguous_format)
        run.graphs = None
        batches = plain_batches(train, settings, device)
    else:
        run = start_run(settings, tokenizer, device, encoders)
        batches = stored_batches(train, settings, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parts, flops = time_parts(run, batches, steps)
    seconds, _ = timed(lambda: train_steps(run, batches, steps), device)
    step_seconds = seconds / steps
    memory = peak_memory(device)

    val = prepare_splits(run, {"val": splits["val"]})["val"]
    for _ in range(2):  # during the first validation, a GPU's kernels are chosen
        validation_seconds, _ = timed(lambda: evaluate(run.model, val, run.amp_dtype), device)
    epoch = train.epoch(settings.captions_per_image, settings.batch_size, seed=0)
    peak = peak_flops(device)
    return describe(settings, device) | {
        "parts": parts,
        "step seconds": step_seconds,
        "pairs per step": len(epoch[0]),
        "FLOP per step": flops,
        "MFU": flops / step_seconds / peak if peak else None,
        "validation seconds": validation_seconds,
        "steps per epoch": len(epoch),
        "epoch seconds": step_seconds * len(epoch) + validation_seconds,
        "peak memory bytes": memory,
    }


def table(title, r):
    """Return the lines of text that show one result of `measure_training`."""
    pairs, seconds = r["pairs per step"], r["step seconds"]
    captions = r["settings"]["captions_per_image"]
    lines = ["", f"{title}: {pairs} pairs per step, captions per photo: {captions}, "
                 f"{r['precision']}"]
    for part, values in r["parts"].items():
        median = f"{1000 * statistics.median(values):.2f} ms"
        spread = f"({1000 * min(values):.2f} to {1000 * max(values):.2f})"
        lines.append(f"  {part:<24}{median:>16}   {spread}")
    rows = {
        "whole step": f"{1000 * seconds:.2f} ms",
        "throughput": f"{pairs / seconds:.0f} pairs/s",
        "arithmetic": f"{r['FLOP per step'] / seconds / 1e9:.1f} GFLOP/s",
        "share of peak (MFU)": f"{100 * r['MFU']:.1f} %" if r["MFU"] else "peak unknown",
        "validation": f"{r['validation seconds']:.2f} s",
        "epoch": f"{r['epoch seconds']:.1f} s   ({r['steps per epoch']} steps, validation)",
        "peak memory": f"{r['peak memory bytes'] / 1e6:.0f} MB",
    }
    for row, value in rows.items():
        figure, _, rest = value.partition("   ")
        lines.append(f"  {row:<24}{figure:>16}{'   ' + rest if rest else ''}")
    return lines


def parse_args(argv):
    """Return (this program's flags, the settings that were given)."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--baseline", action="store_true", default=False,
                       help="also measure the plain way to train")
    group.add_argument("--steps", type=number(int, "[1, inf)"), default=10,
                       help="number of steps that are measured (default: 10)")
    add_flags(parser)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name not in ("baseline", "steps")}
    if "data_dir" not in given:
        given["synthetic"] = True
    return args, {"model": "small"} | given


def measure(args, given):
    """Return {"ours": dict} or {"ours": dict, "plain": dict}. Raises UsageError."""
    settings = make_settings(**given)
    if args.baseline and settings.image_encoder:
        raise UsageError("--baseline trains from scratch; leave --image_encoder out")
    keep_freed_memory()
    device = find_device(settings.device)
    allow_fast_kernels(device)
    encoders = load_encoders(settings, device)
    settings = encoders.fit_settings(settings)
    splits, tokenizer = load_splits(settings, None, encoders.image, encoders.text)
    given = (settings, splits, tokenizer, encoders, args.steps)
    results = {"ours": measure_training(*given)}
    if args.baseline:
        results["plain"] = measure_training(*given, plain=True)
    return results


def main(argv=None):
    args, given = parse_args(argv)
    try:
        results = measure(args, given)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ours = results["ours"]
    model = ours["settings"]["model"]
    lines = [f"{ours['device']}, torch {ours['versions']['torch']}, {ours['date']}"]
    lines += table(f"{model}, the training script", ours)
    if args.baseline:
        lines += table(f"{model}, the plain way", results["plain"])
        ratio = results["plain"]["epoch seconds"] / ours["epoch seconds"]
        lines += ["", f"An epoch of the plain way takes {ratio:.2f} times as long."]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
