"""What each step of a recipe is worth: python -m src.experiments.ladder --model small

Goes, step by step, from the recipe of the run that this project began with to the preset's own;
then tries changes to that one, each alone. A row is a run of the training script, by the command
beside it. Runs that are done are kept: stopped, the same command goes on."""
import hashlib
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import train_flickr8k_sgd as training
from src.report import markdown_table
from src.runs import CONFIG, TEST, load_run
from src.settings import PRESETS, REFERENCE, flags, make_settings
from src.utils.console import Parser, prepare_output, text
from src.utils.errors import RunError, UsageError

# Step by step, the settings that turn from the reference's into the preset's own.
STEPS = {
    "the reference recipe": (),
    "a photo once with several captions, more pairs a step": ("captions_per_image", "batch_size"),
    "byte-pair tokens": ("tokenizer",),
    "learning rates, warm-up, temperature, weight decay": (
        "lr", "text_lr", "warmup", "temperature", "weight_decay"),
    "random crops, mirroring, colour jitter, word dropout": (
        "min_crop", "flip", "color_jitter", "word_dropout"),
    "a moving average of the weights, a learning rate that stays high": ("ema", "final_lr"),
    "a second network, of Fisher vectors": ("fisher",),
    "small photos first, larger ones in validation: the preset's own recipe": tuple(REFERENCE),
}
# On top of the preset's own recipe, each alone.
CHANGES = {
    "no memory": {"memory_size": 0},
}


def rows(preset):
    """[(what, flags)] of a preset's ladder: first the steps, then the changes."""
    own, given, found = make_settings(model=preset), {"recipe": "reference"}, []
    for what, names in STEPS.items():
        changed = {name: getattr(own, name) for name in names if name != "epochs"
                   and getattr(own, name) != given.get(name, REFERENCE[name])}
        if changed or not names:  # the preset may not take this step
            given = given | changed
            found.append((what, given))
    found[-1] = (found[-1][0], {})  # the same thing by its short name
    found += CHANGES.items()
    return [(what, flags(given)) for what, given in found]


def run(command, output_dir):
    """Run or go on with one training -> its Run. Raises RunError for one that fails."""
    if not (output_dir / TEST).exists():
        if (output_dir / CONFIG).exists():
            command = ["--resume"]
        command = [sys.executable, training.__file__, *command, "--output_dir", str(output_dir)]
        process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches us alone
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if status:
            raise RunError(f"the training ended with exit status {status}: "
                                f"{' '.join(command)}")
    return load_run(output_dir)


def table(results):
    """[(what, command, Runs of each seed)] -> a markdown table."""
    lines = []
    for what, command, runs in results:
        vals = [run.best["val"] for run in runs]
        avg_r1, i2t, t2i = (statistics.mean(val[name] for val in vals)
                            for name in ("avg_r1", "i2t_r10", "t2i_r10"))
        each = ", ".join(f"{val['avg_r1']:.2f}" for val in vals)
        minutes = statistics.mean(run.minutes for run in runs)
        lines.append((what, f"{avg_r1:.2f} ({each})", f"{i2t:.1f} / {t2i:.1f}", f"{minutes:.1f}",
                      f"`{' '.join(command)}`"))
    columns = ["what", "val avg R@1 (of each seed)", "R@10", "minutes", "command"]
    return markdown_table(columns, lines)


def parse_args(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="small", help="preset (default: small)")
    add("--data_dir", type=text, default="data/flickr8k",
        help="Flickr8k's folder (default: %(default)s)")
    add("--epochs", type=int, default=8, help="of every run (default: 8)")
    add("--seeds", type=int, nargs="+", default=[0], help="of a run of each row (default: 0)")
    add("--rows", type=int, nargs="+", help="which, from 1 (default: all)")
    add("--output_dir", type=text, default="outputs/ladder", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    number_of_rows = len(rows(args.model))
    args.rows = args.rows or range(1, number_of_rows + 1)
    if not all(1 <= number <= number_of_rows for number in args.rows):
        parser.error(f"--rows go from 1 to {number_of_rows}")
    return args


def run_rows(args, results):
    ladder = rows(args.model)
    for number in args.rows:
        what, flags = ladder[number - 1]
        command, runs = ["--model", args.model, *flags, "--epochs", str(args.epochs)], []
        for seed in args.seeds:
            full = [*command, "--seed", str(seed), "--data_dir", args.data_dir]
            key = hashlib.sha256(" ".join(full).encode()).hexdigest()[:8]
            name = re.sub("[^a-z0-9]+", "_", what.lower())
            runs.append(run(full, Path(args.output_dir) / f"{name}_{key}"))
        results.append((what, command, runs))


def main(argv=None):
    args, results, status = parse_args(argv), [], 0
    for number in (signal.SIGINT, signal.SIGTERM):  # so that the training hears of it
        signal.signal(number, signal.default_int_handler)
    try:
        run_rows(args, results)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    print(table(results))
    return status


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
