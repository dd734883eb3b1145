"""Measure how long the preset `small` takes, from nothing, to reach a validation R@1.

    python -m src.experiments.speedrun --data_dir data/flickr8k

For each target, a new training runs with a recipe that is as short as the target allows, and is
stopped once it has reached it. The clock runs from the start of the command until the epoch stands
in the run's history, so it includes the start-up, the Fisher network and the validations.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import train_flickr8k_sgd as training
from src.device import describe, find_device
from src.runs import HISTORY, load_json
from src.settings import flags, make_settings
from src.utils.console import Parser, prepare_output, text
from src.utils.errors import RunError

# A short training does not have the time to memorise its captions, so it needs less augmentation
# and weight decay than the preset's recipe, and smaller photos.
SHORT_RECIPE = {"model": "small", "weight_decay": 5e-4, "min_crop": 0.5, "color_jitter": 0.0,
                "word_dropout": 0.0, "final_lr": 0.0, "image_size": 64}
# The target, average R@1 on validation in percent, and the recipe of the training towards it.
TRAININGS = [
    (1.7, {**SHORT_RECIPE, "epochs": 4, "fisher": False}),
    (3.1, {**SHORT_RECIPE, "epochs": 8, "fisher": False}),  # what open_clip reaches, see the log
    (4.0, {**SHORT_RECIPE, "epochs": 8, "fisher": False}),
    (8.0, {**SHORT_RECIPE, "epochs": 8}),
]


def time_to_target(target, given):
    """Train with the settings `given` until avg R@1 reaches the target; return a dict.

    "seconds" counts until the target was reached, or until the training ended without it. Raises
    RunError for a training that fails.
    """
    command = [sys.executable, training.__file__, *flags(given)]
    best, reached, running = None, False, True
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / HISTORY
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--output_dir", folder])
        try:
            while running and not reached:
                time.sleep(0.1)
                running = process.poll() is None
                if history.exists():
                    best = max(load_json(history), key=lambda row: row["val"]["avg_r1"])
                    reached = best["val"]["avg_r1"] >= target
            seconds = time.perf_counter() - start
        finally:
            process.terminate()
            process.wait()
    if not reached and process.returncode:
        raise RunError(f"the training ended with exit status {process.returncode}: "
                       f"{' '.join(command)}")
    return {"target": target, "avg_r1": best["val"]["avg_r1"], "reached": reached,
            "epoch": best["epoch"], "epochs": make_settings(**given).epochs, "seconds": seconds}


def table(results):
    """Return the results of `time_to_target` as lines of text."""
    lines = [f"  {'target':>8}{'val avg R@1':>14}{'at epoch':>12}{'seconds':>14}"]
    for r in results:
        seconds = f"{r['seconds']:.1f}" if r["reached"] else "not reached"
        epoch = f"{r['epoch']} of {r['epochs']}"
        lines.append(f"  {r['target']:>8g}{r['avg_r1']:>14.2f}{epoch:>12}{seconds:>14}")
    return lines


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=text, default="data/flickr8k",
                        help="folder of photos and captions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trainings (default: 0)")
    args = parser.parse_args(argv)
    try:
        results = [time_to_target(target, {**recipe, "data_dir": args.data_dir, "seed": args.seed})
                   for target, recipe in TRAININGS]
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = make_settings(**TRAININGS[0][1])
    machine = describe(settings, find_device(settings.device))
    print(f"{machine['device']}, torch {machine['versions']['torch']}, {machine['date']}")
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
