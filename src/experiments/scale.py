"""Measure what a training takes with many pairs, compared with as many as Flickr8k has.

    python -m src.experiments.scale --pairs 1000000 --steps 20

Both datasets are made up: their captions have the statistics of Flickr8k's, and their stored photos
are mostly holes in sparse files. Each dataset is loaded several times, in a new process each time,
and in turns. The table shows the medians.
"""
import dataclasses
import statistics
import string
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from src.device import allow_fast_kernels, describe, find_device, keep_freed_memory
from src.experiments.benchmark import WARM_UP_STEPS, start_run, stored_batches, timed, train_steps
from src.settings import make_settings
from src.utils.captions import CAPTION_FILES
from src.utils.console import Parser, number, prepare_output
from src.utils.duplicates import SIGNATURE
from src.utils.folder import SPLIT_FILES
from src.utils.photo_names import PHOTO_FOLDERS
from src.utils.photo_store import DIGEST_BYTES, SHARD_SIZE, STORE_FOLDER, Pixels, shard_path
from src.utils.splits import load_splits

FLICKR8K_PAIRS = 30_000
ROUNDS = 3  # measurements of each dataset

# The statistics of Flickr8k's captions: the number of different words, the exponent of their
# frequencies, (rank + 1) ** -exponent (Zipf, Mandelbrot), and the number of words in a caption.
NUM_WORDS, ZIPF_EXPONENT, MEAN_WORDS, STD_WORDS = 8424, 1.2, 11.8, 3.9
CAPTIONS_PER_PHOTO = 5
HELD_OUT_PHOTOS = 1000  # in val and in test
NOISE_PHOTOS = 10  # photos of each shard that are noise; the others are a hole in the file


def random_captions(count, rng):
    """Yield captions of made-up words, as common and as many in a caption as Flickr8k's."""
    letters = np.array(list(string.ascii_lowercase))
    ranks = np.arange(1, NUM_WORDS + 1)
    words = ["".join(rng.choice(letters, int(1.6 * rank ** 0.17) + 1)) for rank in ranks]
    frequencies = (ranks + 1.0) ** -ZIPF_EXPONENT
    lengths = rng.normal(MEAN_WORDS, STD_WORDS, count).clip(2, 40).astype(int)
    drawn = iter(rng.choice(words, lengths.sum(), p=frequencies / frequencies.sum()).tolist())
    for length in lengths:
        yield " ".join(next(drawn) for _ in range(length))


def write_large(root_dir, num_pairs, sizes):
    """Write a dataset of num_pairs training pairs, five per photo, in Flickr8k's layout.

    The photo files are empty. Their photo store exists already, with photos of sizes[split] pixels
    a side, and is sparse, so that it takes next to no space on the disk.
    """
    root_dir, rng, number = Path(root_dir), np.random.default_rng(0), 0
    folder, stores = root_dir / PHOTO_FOLDERS[0], root_dir / STORE_FOLDER
    folder.mkdir()
    stores.mkdir()
    with open(root_dir / CAPTION_FILES[0], "w", encoding="utf-8") as captions:
        for split in SPLIT_FILES:
            count = num_pairs // CAPTIONS_PER_PHOTO if split == "train" else HELD_OUT_PHOTOS
            names = [f"{i:07d}.jpg" for i in range(number, number + count)]
            number += count
            (root_dir / SPLIT_FILES[split]).write_text("".join(f"{name}\n" for name in names))
            texts = random_captions(CAPTIONS_PER_PHOTO * count, rng)
            for name in names:
                (folder / name).touch()
                captions.writelines(f"{name}#{i}\t{next(texts)}\n"
                                    for i in range(CAPTIONS_PER_PHOTO))
            row_format = Pixels(sizes[split])
            photo_bytes = int(np.prod(row_format.shape))
            for start in range(0, count, SHARD_SIZE):
                shard = names[start:start + SHARD_SIZE]
                path = shard_path(stores / split, row_format, start // SHARD_SIZE, shard,
                                  lambda name: folder / name)
                with open(path, "wb") as file:
                    file.write(rng.bytes(NOISE_PHOTOS * photo_bytes))
                    file.seek(len(shard) * photo_bytes)
                    file.write(rng.bytes(len(shard) * DIGEST_BYTES))
                    file.truncate(file.tell() + int(len(shard) * np.prod(SIGNATURE)))


def resident_memory():
    """Return the bytes that this process holds in memory, without the pages of stored photos.

    Returns NaN on systems other than Linux.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return float("nan")
    total, is_counted = 0, True
    for line in smaps.read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the first line of a mapping, which ends with its file's path
            is_counted = STORE_FOLDER not in rest[-1]
        elif first == "Rss:" and is_counted:
            total += 1024 * int(rest[0])
    return total


def measure(settings, steps, started):
    """Load a dataset and train a few steps. It runs in a process of its own.

    started: the time at which the start of this process was asked for.
    """
    device = find_device(settings.device)
    allow_fast_kernels(device)
    memory_before = resident_memory()
    splits, tokenizer = load_splits(settings)
    data_bytes = resident_memory() - memory_before
    start_up_seconds = time.time() - started
    keep_freed_memory()  # not before, as it would count towards the data

    train = splits["train"]
    order_seconds, _ = timed(lambda: train.epoch(
        settings.captions_per_image, settings.batch_size, seed=0), device)
    run = start_run(settings, tokenizer, device)
    batches = stored_batches(train, settings, device)
    train_steps(run, batches, WARM_UP_STEPS)
    seconds, _ = timed(lambda: train_steps(run, batches, steps), device)
    return {"start-up seconds": start_up_seconds, "order seconds": order_seconds,
            "step seconds": seconds / steps, "data bytes": data_bytes}


def compare(settings, sizes, steps):
    """Return {number of pairs: medians of what `measure` returns} for the numbers in `sizes`."""
    pixels = {split: settings.stored_pixels(split) for split in SPLIT_FILES}
    results = {num_pairs: [] for num_pairs in sizes}
    with tempfile.TemporaryDirectory() as folder:
        for num_pairs in sizes:
            root_dir = Path(folder) / str(num_pairs)
            root_dir.mkdir()
            write_large(root_dir, num_pairs, pixels)
        for num_pairs in [*sizes] * ROUNDS:
            here = dataclasses.replace(settings, data_dir=f"{folder}/{num_pairs}")
            with ProcessPoolExecutor(1, get_context("spawn")) as new_process:
                job = new_process.submit(measure, here, steps, time.time())
                results[num_pairs].append(job.result())
    return {num_pairs: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            for num_pairs, rows in results.items()}


def table(results):
    """Return the results of `compare` as lines of text."""
    lines = [f"  {'pairs':>12}{'start-up':>12}{'order':>12}{'step':>12}{'memory':>12}"]
    for num_pairs, r in results.items():
        lines.append(f"  {num_pairs:>12,}{r['start-up seconds']:>10.1f} s"
                     f"{r['order seconds']:>10.2f} s{1000 * r['step seconds']:>9.1f} ms"
                     f"{r['data bytes'] / 1e6:>9.0f} MB")
    return [*lines, "start-up: from the start of the process until its data is loaded",
            "order: of an epoch's pairs; memory: of the data without the photos"]


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=number(int, "[1000, inf)"), default=1_000_000,
                        help="training pairs of the larger dataset (default: 1000000)")
    parser.add_argument("--steps", type=number(int, "[1, inf)"), default=10,
                        help="number of steps that are measured (default: 10)")
    args = parser.parse_args(argv)
    settings = make_settings(model="small")
    machine = describe(settings, find_device(settings.device))
    results = compare(settings, (FLICKR8K_PAIRS, args.pairs), args.steps)
    print(f"small on {machine['device']}, torch {machine['versions']['torch']}, {machine['date']}")
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
