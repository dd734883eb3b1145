"""Measure what each step from the reference recipe to a preset's own recipe is worth.

    python -m src.experiments.ladder --model small --seeds 0 1 2

The first row of the table is the recipe of the run that this project started from. Each of the next
rows adds one step, until the preset's own recipe is reached. The last rows change the preset's own
recipe, one change each. Every row is one training per seed, by the command that the row shows.

Finished trainings are kept in --output_dir, so the same command continues an interrupted ladder.
"""
import hashlib
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import train_flickr8k_sgd as training
from src.comparison import markdown_table
from src.runs import CONFIG, TEST, load_run
from src.settings import PRESETS, REFERENCE, flags, make_settings
from src.utils.console import Parser, prepare_output, text
from src.utils.errors import RunError, UsageError

# In each step these settings change from the reference recipe's values to the preset's own.
STEPS = {
    "the reference recipe": (),
    "each photo once with several captions, and more pairs per step": (
        "captions_per_image", "batch_size"),
    "tokens are learned byte pairs instead of characters": ("tokenizer",),
    "other learning rates, warmup, temperature and weight decay": (
        "lr", "text_lr", "warmup", "temperature", "weight_decay"),
    "random crops, mirroring, colour jitter and word dropout": (
        "min_crop", "flip", "color_jitter", "word_dropout"),
    "a moving average of the weights, and a learning rate that stays high": ("ema", "final_lr"),
    "a second network on Fisher vectors": ("fisher",),
    "smaller photos at first, larger ones in validation, no memory loss: the preset's recipe":
        tuple(REFERENCE),
}
# Each of these changes the preset's own recipe.
CHANGES = {
    "the preset's own recipe without the memory": {"memory_size": 0},
}


def rows(preset):
    """Return [(description, flags of the training script)] of a preset's ladder.

    A step that changes nothing in this preset is left out.
    """
    preset_settings = make_settings(model=preset)
    given, ladder = {"recipe": "reference"}, []
    for description, names in STEPS.items():
        changes = {}
        for name in names:
            value = getattr(preset_settings, name)
            if name != "epochs" and value != given.get(name, REFERENCE[name]):
                changes[name] = value
        if changes or not names:
            given = given | changes
            ladder.append((description, given))
    description, _ = ladder.pop()
    ladder.append((description, {}))  # the last step has arrived at the preset's defaults
    ladder += CHANGES.items()
    return [(description, flags(given)) for description, given in ladder]


def train(command, output_dir):
    """Run the training script, or resume it, unless its run is finished; return the Run.

    Raises RunError for a training that fails.
    """
    if not (output_dir / TEST).exists():
        if (output_dir / CONFIG).exists():
            command = ["--resume"]
        command = [sys.executable, training.__file__, *command, "--output_dir", str(output_dir)]
        # In a session of its own, the training does not get the terminal's Ctrl-C. It is passed on
        # below, once.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if status:
            raise RunError(f"the training ended with exit status {status}: {' '.join(command)}")
    return load_run(output_dir)


def mean_and_deviation(values, digits):
    """Format numbers as "mean ± standard deviation", or one number as itself."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results):
    """Format [(description, command, [Run of each seed])] as a markdown table."""
    lines = []
    for description, command, runs in results:
        metrics = [run.best["val"] for run in runs]
        avg_r1 = [val["avg_r1"] for val in metrics]
        i2t_r10 = statistics.mean(val["i2t_r10"] for val in metrics)
        t2i_r10 = statistics.mean(val["t2i_r10"] for val in metrics)
        minutes = statistics.mean(run.minutes for run in runs)
        lines.append((
            description,
            mean_and_deviation(avg_r1, 2),
            ", ".join(f"{value:.2f}" for value in avg_r1),
            f"{i2t_r10:.1f} / {t2i_r10:.1f}",
            mean_and_deviation([val["rsum"] for val in metrics], 1),
            f"{minutes:.1f}",
            f"`{' '.join(command)}`"))
    columns = ["what changes", "val avg R@1", "of each seed",
               "R@10 (photo to text / text to photo)", "rsum", "minutes", "command"]
    return markdown_table(columns, lines)


def parse_args(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="small", help="preset (default: small)")
    add("--data_dir", type=text, default="data/flickr8k",
        help="folder of photos and captions (default: %(default)s)")
    add("--epochs", type=int, default=8, help="epochs of every training (default: 8)")
    add("--seeds", type=int, nargs="+", default=[0], help="one training per seed (default: 0)")
    add("--rows", type=int, nargs="+", help="numbers of the rows, from 1 (default: all)")
    add("--output_dir", type=text, default="outputs/ladder",
        help="folder of the trainings (default: %(default)s)")
    args = parser.parse_args(argv)
    number_of_rows = len(rows(args.model))
    args.rows = args.rows or range(1, number_of_rows + 1)
    if not all(1 <= number <= number_of_rows for number in args.rows):
        parser.error(f"--rows: the rows have the numbers 1 to {number_of_rows}")
    return args


def train_rows(args, results):
    """Train the rows, and append each to `results` once all of its seeds are done."""
    ladder = rows(args.model)
    for number in args.rows:
        description, row_flags = ladder[number - 1]
        command = ["--model", args.model, *row_flags, "--epochs", str(args.epochs)]
        name = re.sub("[^a-z0-9]+", "_", description.lower())
        runs = []
        for seed in args.seeds:
            full_command = [*command, "--seed", str(seed), "--data_dir", args.data_dir]
            key = hashlib.sha256(" ".join(full_command).encode()).hexdigest()[:8]
            runs.append(train(full_command, Path(args.output_dir) / f"{name}_{key}"))
        results.append((description, command, runs))


def main(argv=None):
    args, results, status = parse_args(argv), [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # `train` passes it on to the training
    try:
        train_rows(args, results)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        status = 130
    print(table(results))
    return status


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
