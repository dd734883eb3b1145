"""What each step of a recipe is worth:  python -m src.ladder --model small --data_dir data/flickr8k

Goes, step by step, from the recipe of the run that this project began with to the preset's own; then tries changes to that
one, each alone. A row is a run of the training script, by the command that stands beside it. Runs that are done are
kept: stopped, by Ctrl-C or by --minutes, the same command goes on where it was.
"""
import argparse
import hashlib
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import train_flickr8k_sgd as training
from src.model import PRESETS
from src.settings import RECIPES, REFERENCE
from src.utils import report
from src.utils.checkpoint import CheckpointError, load_json

# Step by step, the settings that turn from the reference's into the preset's own.
STEPS = (
    ("the reference recipe", ()),
    ("a photo once with several captions, more pairs a step", ("captions_per_image", "batch_size")),
    ("byte-pair tokens", ("tokenizer",)),
    ("learning rates, warm-up, temperature, weight decay", ("lr", "text_lr", "warmup", "temperature", "weight_decay")),
    ("a contrast among captions", ("caption_contrast",)),
    ("random crops and mirroring", ("min_crop", "flip")),
    ("colour jitter, word dropout", ("color_jitter", "word_dropout")),
    ("a moving average of the weights", ("ema",)),
    ("a learning rate that stays high to the end", ("final_lr",)),
    ("photos judged larger than the training crops: the preset's own recipe", tuple(REFERENCE)),
)
# On top of the preset's own recipe, each alone.
CHANGES = (
    ("no memory", {"memory_size": 0}),
    ("512 memory slots", {"memory_size": 512}),
    ("photos of 96 px", {"image_size": 96}),
    ("two transformer blocks over a photo's patches", {"image_layers": 2}),
    ("label smoothing", {"label_smoothing": 0.1}),
    ("hard negatives", {"hard_negatives": 1}),
    ("a queue of 2,000 pairs", {"queue_size": 2000}),
    ("stochastic depth", {"stochastic_depth": 0.1}),
    ("queries and keys normalised", {"qk_norm": True}),
    ("colour jitter of 0.4", {"color_jitter": 0.4}),
    ("erasing", {"erasing": 0.25}),
    ("word dropout of 0.3", {"word_dropout": 0.3}),
    ("a vocabulary of 1,000", {"vocab_size": 1000}),
    ("a vocabulary of whole words (10,000)", {"vocab_size": 10000}),
)


def rows(preset):
    """[(what, flags)] of a preset's ladder: first the steps, then the changes."""
    own, given, found = RECIPES[preset], {"recipe": "reference"}, []
    for what, names in STEPS:
        changed = {name: own[name] for name in names if own[name] != given.get(name, REFERENCE[name]) and name != "epochs"}
        if changed or not names:  # the preset may not take this step
            given = given | changed
            found.append((what, given))
    found[-1] = (found[-1][0], {})  # the same thing by its short name
    found += CHANGES
    return [(what, [part for name, value in flags.items() for part in (f"--{name}", f"{value}") if part != "True"])
            for what, flags in found]


def run(command, output_dir, deadline):
    """Run or go on with one training -> its best epoch's row and its minutes, None where time ran out.

    Raises CheckpointError for a training that fails.
    """
    done = output_dir / report.TEST
    if not done.exists():
        if (output_dir / report.CONFIG).exists():
            command = ["--resume"]
        process = subprocess.Popen([sys.executable, training.__file__, *command, "--output_dir", str(output_dir)])
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            process.send_signal(signal.SIGINT)  # it saves its state
            process.wait()
            if isinstance(reason, KeyboardInterrupt):
                raise
            return None
        if process.returncode:
            raise CheckpointError(f"the training ended with exit status {process.returncode}: {' '.join(command)}")
    history = load_json(output_dir / report.HISTORY)
    return (max(history, key=lambda row: row["val"]["avg_r1"])["val"], sum(row["seconds"] for row in history) / 60)


def table(results):
    """[(what, command, runs)] -> a markdown table; `runs` are what `run` gave for each seed."""
    lines = ["| what | val avg R@1 (of each seed) | R@10 | minutes | command |", "| --- | --- | --- | --- | --- |"]
    for what, command, runs in results:
        vals, minutes = [val for val, _ in runs], statistics.mean(minutes for _, minutes in runs)
        each = ", ".join(f"{val['avg_r1']:.2f}" for val in vals)
        mean = {name: statistics.mean(val[name] for val in vals) for name in ("avg_r1", "i2t_r10", "t2i_r10")}
        lines.append(f"| {what} | {mean['avg_r1']:.2f} ({each}) | "
                     f"{mean['i2t_r10']:.1f} / {mean['t2i_r10']:.1f} | {minutes:.1f} | `{' '.join(command)}` |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(PRESETS), default="small", help="preset (default: small)")
    parser.add_argument("--data_dir", default="data/flickr8k", help="Flickr8k's folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of every run (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each row with each (default: 0)")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows wanted, from 1 (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; run again to go on (default: never)")
    parser.add_argument("--output_dir", default="outputs/ladder", help="folder of the runs (default: %(default)s)")
    args = parser.parse_args(argv)
    wanted = rows(args.model)
    if args.rows and not all(1 <= number <= len(wanted) for number in args.rows):
        parser.error(f"--rows go from 1 to {len(wanted)}")
    deadline, results, status = time.monotonic() + 60 * args.minutes, [], 0
    try:
        for number in args.rows or range(1, len(wanted) + 1):
            what, flags = wanted[number - 1]
            command, runs = ["--model", args.model, *flags, "--epochs", str(args.epochs)], []
            for seed in args.seeds:
                full = [*command, "--seed", str(seed), "--data_dir", args.data_dir]
                name = f"{re.sub('[^a-z0-9]+', '_', what.lower())}_{hashlib.sha256(' '.join(full).encode()).hexdigest()[:8]}"
                outcome = run(full, Path(args.output_dir) / name, deadline)
                if outcome is None:
                    break
                runs.append(outcome)
            if runs:
                results.append((what, command, runs))
            if time.monotonic() > deadline:
                print("time is up; the same command goes on from here", file=sys.stderr)
                break
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    print(table(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
