"""How fast everything is on this machine. It also takes the flags of the training script.

    python -m src.experiments.benchmark --model small --baseline       also times the plain way
    python -m src.experiments.benchmark --speedrun --data_dir data/flickr8k    time to 1.7, 4 and 8
    python -m src.experiments.benchmark --pairs 1000000        a million pairs against 30,000

Times are medians over several steps after a warm-up, with quartiles. The time of an epoch is that
of its steps at the throughput of a loop that waits for nothing, plus the validation."""
import argparse
import dataclasses
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import train_flickr8k_sgd as training
from src.device import allow_fast_kernels, describe, find_device
from src.encoder_sources import load_encoders
from src.evaluation import evaluate
from src.fisher import with_fisher_vectors
from src.runs import HISTORY, load_json, save_json
from src.settings import add_flags, flags, make_settings
from src.training import RunState
from src.utils.augment import MEAN, STD
from src.utils.console import Parser, number, prepare_output, text
from src.utils.errors import DataError, UsageError
from src.utils.flickr8k_simple import iterate_batches, load_splits, place_photos
from src.utils.photo_store import STORE_FOLDER
from src.utils.synthetic import write_large

# Dense bfloat16 or float16 peak with float32 accumulation, FLOP/s, from NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "T4": 65e12}
BASELINE_TOKENS = 77
WARM_UP = 2
SPEEDRUN_TARGETS = (1.7, 4.0, 8.0)  # val avg_r1 in percent
# What a training towards a low target is given besides its recipe: a schedule as short, and less
# of what keeps a long training from learning its captions by heart.
SHORT = {"weight_decay": 5e-4, "min_crop": 0.5, "color_jitter": 0.0, "word_dropout": 0.0,
         "final_lr": 0.0, "image_size": 64}
SCALE_BASE = 30_000  # pairs that --pairs is compared with
SCALE_ROUNDS = 3  # of both, in turn
SPEEDRUN_SETTINGS = {"small": {1.7: {"epochs": 4, "fisher": False, **SHORT},
                               4.0: {"epochs": 14, "fisher": False, **SHORT},
                               8.0: {"epochs": 8, **SHORT}}}


def timed(function, device):
    """-> seconds, the function's result; a GPU is waited for on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def quartiles(values):
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU, or that this process took on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory():
    """Bytes that this process holds on the host less the photos that it maps; NaN unless Linux."""
    if not Path("/proc/self/smaps").exists():
        return float("nan")
    total, counts = 0, True
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the head of a mapping, with its file's path
            counts = STORE_FOLDER not in rest[-1]
        elif first == "Rss:" and counts:
            total += 1024 * int(rest[0])
    return total


def peak_flops(device):
    if device.type == "cuda":
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    return None


class PlainDataset(Dataset):
    """The plain way: a pair's JPEG decoded and augmented each time, its text of 77 tokens."""

    def __init__(self, data, settings):
        self.data, self.folder = data, data.folders[0]
        self.transform = v2.Compose([
            v2.RandomResizedCrop(settings.image_size, (settings.min_crop, 1.0)),
            v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        photo = int(self.data.photo_of_caption[i])
        with Image.open(self.folder.path(self.data.names[photo])) as image:
            image = self.transform(image.convert("RGB"))
        text = torch.from_numpy(self.data.texts.padded([i], BASELINE_TOKENS)[0, :BASELINE_TOKENS])
        return image, text, photo


def plain_batches(data, settings):
    """Endless batches of the plain way, prepared by one process a core."""
    device = find_device(settings.device)
    loader = DataLoader(
        PlainDataset(data, settings), settings.batch_size, shuffle=True, drop_last=True,
        num_workers=os.cpu_count(), pin_memory=torch.cuda.is_available())
    while True:
        for batch in loader:
            images, text, photo_ids = (part.to(device, non_blocking=True) for part in batch)
            yield {"images": images, "text": text, "photo_ids": photo_ids,
                   "photo_of_pair": torch.arange(len(text), device=device)}


def stored_batches(data, settings):
    device = find_device(settings.device)
    photos = place_photos(data.photos, device)
    for epoch in itertools.count(1):
        batches = data.epoch(settings.captions_per_image, settings.batch_size, epoch)
        yield from iterate_batches(data, photos, batches, device)


def count_flops(run, batch):
    """Of one forward and backward pass, kernel by kernel."""
    graphs, run.graphs = run.graphs, None
    with FlopCounterMode(display=False) as counter:
        training.forward_backward(run, batch)
    run.graphs = graphs
    return counter.get_total_flops()


def measure_training(splits, tokenizer, settings, encoders, steps, plain):
    """Step times of one preset, by the training script's way or the plain way -> dict."""
    device, data = find_device(settings.device), splits["train"]
    if plain:
        settings = dataclasses.replace(settings, amp=False, ema=0.0, captions_per_image=1)
    torch.manual_seed(0)
    model = training.build_model(settings, tokenizer, encoders)
    layout = torch.contiguous_format if plain else torch.channels_last
    model.to(device, memory_format=layout).train()
    run = RunState(settings, model, tokenizer, device, total_steps=1_000_000)
    run.epoch = settings.epochs  # photos have their full size
    run.graphs = None if plain else run.graphs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = plain_batches(data, settings) if plain else stored_batches(data, settings)

    parts = {"data wait": [], "augmentation": [], "forward, backward": [], "optimizer": []}
    for i in range(WARM_UP + steps):
        wait, batch = timed(lambda: next(batches), device)
        seconds = [wait, timed(lambda: training.augment(run, batch), device)[0]]
        if i == 0:
            flops = count_flops(run, batch)
        seconds.append(timed(lambda: training.forward_backward(run, batch), device)[0])
        seconds.append(timed(lambda: training.update(run), device)[0])
        if i >= WARM_UP:
            for values, value in zip(parts.values(), seconds):
                values.append(value)

    def run_steps():
        for batch in itertools.islice(batches, steps):
            training.training_step(run, batch)

    seconds = timed(run_steps, device)[0] / steps
    order_seconds, epoch = timed(lambda: data.epoch(
        settings.captions_per_image, settings.batch_size, seed=0), torch.device("cpu"))
    pairs, memory, peak = len(epoch[0]), peak_memory(device), peak_flops(device)
    if settings.fisher:
        splits = with_fisher_vectors(model, {"val": splits["val"]}, run.amp_dtype)
    for _ in range(2):  # in the first, a GPU's kernels are chosen
        validation, _ = timed(lambda: evaluate(model, splits["val"], run.amp_dtype), device)
    return describe(settings, device) | {
        "step seconds": seconds,
        "parts": {name: quartiles(values) for name, values in parts.items()},
        "data-wait share": statistics.median(parts["data wait"]) / seconds,
        "pairs a step": pairs,
        "pairs a second": pairs / seconds,
        "model FLOP a pair": flops / pairs,
        "model FLOP/s": flops / seconds,
        "share of peak (MFU)": flops / seconds / peak if peak else None,
        "validation seconds": validation,
        "epoch seconds": seconds * len(epoch) + validation,
        "steps an epoch": len(epoch),
        "order seconds": order_seconds,
        "peak memory bytes": memory,
    }


def scale(given, pairs, steps):
    """This program on made-up data sets of SCALE_BASE and of so many pairs, in processes of their
    own -> {pairs: medians of SCALE_ROUNDS}."""
    given = {name: value for name, value in given.items() if name != "synthetic"}
    settings, results = make_settings(**given), {SCALE_BASE: [], pairs: []}
    sizes = {split: settings.stored_pixels(split) for split in ("train", "val", "test")}
    with tempfile.TemporaryDirectory() as folder:
        for number in results:
            (Path(folder) / str(number)).mkdir()
            write_large(Path(folder) / str(number), number, sizes)
        for number in [*results] * SCALE_ROUNDS:
            output = Path(folder) / "results.json"
            command = flags(given | {"data_dir": f"{folder}/{number}", "steps": steps,
                                     "output": str(output)})
            start = time.time()
            done = subprocess.run([sys.executable, "-m", "src.experiments.benchmark", *command],
                                  stdout=subprocess.DEVNULL)
            if done.returncode:
                raise UsageError(f"the measurement of {number:,} pairs failed")
            found = load_json(output)
            results[number].append({
                "start-up seconds": found["ready"] - start, "data bytes": found["data bytes"],
                "order seconds": found["ours"]["order seconds"],
                "step seconds": found["ours"]["step seconds"]})
    return {number: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            for number, rows in results.items()}


def scale_lines(results):
    lines = [f"  {'pairs':>12}{'start-up':>12}{'order':>12}{'step':>12}{'memory':>12}"]
    for pairs, r in results.items():
        lines.append(f"  {pairs:>12,}{r['start-up seconds']:>10.1f} s{r['order seconds']:>10.2f} s"
                     f"{1000 * r['step seconds']:>9.1f} ms{r['data bytes'] / 1e6:>9.0f} MB")
    few, many = results.values()
    lines.append(f"  a step takes {100 * (many['step seconds'] / few['step seconds'] - 1):+.1f} %; "
                 "memory: what the data takes, less the photos' pages")
    return lines


def time_to_targets(given, targets):
    """Train from nothing until val avg_r1 has passed the last of the rising targets -> a dict for
    each. The clock runs from the command to the epoch's line in the history. Raises UsageError for
    a training that fails."""
    results, targets = [], list(targets)
    command, epochs = [sys.executable, training.__file__], make_settings(**given).epochs
    command += flags(given)
    with tempfile.TemporaryDirectory() as folder:
        history, running, start = Path(folder) / HISTORY, True, time.perf_counter()
        process = subprocess.Popen([*command, "--output_dir", folder])
        try:
            while running and targets:
                time.sleep(0.1)
                running = process.poll() is None
                rows = load_json(history) if history.exists() else []
                best = max(rows, key=lambda row: row["val"]["avg_r1"], default=None)
                while targets and best and (best["val"]["avg_r1"] >= targets[0] or not running):
                    target, avg_r1 = targets.pop(0), best["val"]["avg_r1"]
                    results.append({
                        "target": target, "epochs": epochs, "avg_r1": avg_r1,
                        "epoch": best["epoch"], "reached": avg_r1 >= target,
                        "seconds": time.perf_counter() - start, "command": " ".join(command)})
        finally:
            process.terminate()
            process.wait()
    if targets:
        raise UsageError(f"the training ended with exit status {process.returncode} before "
                                 "its first epoch was over")
    return results


def speedrun(given):
    own, results = SPEEDRUN_SETTINGS.get(given["model"], {}), []
    for changes, targets in itertools.groupby(SPEEDRUN_TARGETS, lambda target: own.get(target, {})):
        results += time_to_targets(given | changes, targets)
    return results


def speedrun_lines(results):
    lines = [f"  {'val avg_r1':>12}{'reached':>10}{'at epoch':>12}{'seconds':>12}"]
    for r in results:
        seconds = f"{r['seconds']:.1f}" if r["reached"] else "not reached"
        epoch = f"{r['epoch']} of {r['epochs']}"
        lines.append(f"  {r['target']:>12g}{r['avg_r1']:>10.2f}{epoch:>12}{seconds:>12}")
    return lines


def training_lines(title, r):
    photos = f"{r['settings']['captions_per_image']} a photo, {r['precision']}"
    lines = ["", f"{title}: {r['pairs a step']} pairs a step, {photos}"]
    lines += [f"  {part:<28}{1000 * median:>12.2f} ms   ({1000 * low:.2f} to {1000 * high:.2f})"
              for part, (low, median, high) in r["parts"].items()]
    flops = f" TFLOP/s ({r['model FLOP a pair'] / 1e9:.2f} GFLOP a pair)"
    if r["share of peak (MFU)"]:
        flops += f", {100 * r['share of peak (MFU)']:.1f} % of the peak (MFU)"
    share = 100 * r["validation seconds"] / r["epoch seconds"]
    steps = f" s ({r['steps an epoch']} steps, validation included)"
    rows = {"whole step": (f"{1000 * r['step seconds']:.2f}", " ms"),
            "data wait": (f"{100 * r['data-wait share']:.2f}", " % of the step"),
            "throughput": (f"{r['pairs a second']:.0f}", " pairs/s"),
            "model": (f"{r['model FLOP/s'] / 1e12:.3f}", flops),
            "validation": (f"{r['validation seconds']:.2f}", f" s ({share:.1f} % of an epoch)"),
            "epoch": (f"{r['epoch seconds']:.1f}", steps),
            "peak memory": (f"{r['peak memory bytes'] / 1e6:.0f}", " MB")}
    return lines + [f"  {row:<28}{value:>12}{unit}" for row, (value, unit) in rows.items()]


def table(results):
    model = results["settings"]["model"]
    lines = [f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"]
    if "scale" in results:
        return "\n".join([*lines, model, *scale_lines(results["scale"])])
    if "speedrun" in results:
        return "\n".join([*lines, model, *speedrun_lines(results["speedrun"])])
    lines += training_lines(f"{model}, the training script", results["ours"])
    if "plain" in results:
        lines += training_lines(f"{model}, the plain way (--baseline)", results["plain"])
        ratio = results["plain"]["epoch seconds"] / results["ours"]["epoch seconds"]
        lines.append(f"  {'speed-up, whole epoch':<28}{ratio:>12.2f} x")
    return "\n".join(lines)


def parse_args(argv):
    """-> (this program's options, the settings that were given)."""
    parser = Parser(description=__doc__.split("\n")[0],
                            argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("benchmark").add_argument
    add("--baseline", action="store_true", default=False, help="the plain way as well: JPEGs "
        "decoded in a DataLoader, text of 77 tokens, one caption a photo, float32")
    add("--speedrun", action="store_true", default=False,
        help=f"only: how long fresh trainings take to val avg_r1 {SPEEDRUN_TARGETS}")
    add("--pairs", type=number(int, "[1000, inf)"),
        help=f"only: what so many pairs take beside {SCALE_BASE:,}, both made up")
    add("--steps", type=number(int, "[1, inf)"), default=10,
        help="measured steps of each kind (default: 10)")
    add("--output", type=text, default="outputs/benchmark.json",
        help="JSON (default: %(default)s)")
    add_flags(parser)
    args = parser.parse_args(argv)
    given = dict(vars(args))
    for name in ("baseline", "speedrun", "pairs", "steps", "output"):
        given.pop(name, None)
    built_in = {} if "data_dir" in given else {"synthetic": True}
    return args, {"model": "small"} | built_in | given


def measure(args, given):
    settings = make_settings(**given)
    device = find_device(settings.device)
    allow_fast_kernels(device)
    results = describe(settings, device)
    if args.speedrun:
        return results | {"speedrun": speedrun(given)}
    if "pairs" in args:
        return results | {"scale": scale(given, args.pairs, args.steps)}
    encoders = load_encoders(settings, device)
    settings = encoders.fit_settings(settings)
    if args.baseline and settings.image_encoder:
        raise UsageError("--baseline is of training from scratch, without --image_encoder")
    before = resident_memory()
    splits, tokenizer = load_splits(settings, None, encoders.image, encoders.text)
    results |= {"ready": time.time(), "data bytes": resident_memory() - before}
    for kind in ("ours", "plain") if args.baseline else ("ours",):
        results[kind] = measure_training(
            splits, tokenizer, settings, encoders, args.steps, kind == "plain")
    return results


def main(argv=None):
    args, given = parse_args(argv)
    try:
        results = measure(args, given)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        save_json(results, args.output)
    except (DataError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
