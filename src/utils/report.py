"""What the scripts print: the progress line of a running epoch, and the tables of runs."""
import contextlib
import json
import logging
import re
import shutil
import statistics
import sys
import time

import torch

from src.settings import command_of
from src.utils.checkpoint import BEST, CheckpointError
from src.utils.distributed import rank_and_world
from src.utils.retrieval import KS, chance_metrics

WIDTH = 80
MAX_LENGTH = 999
LENGTHS = ((1, 6), (7, 9), (10, 12), (13, 16), (17, MAX_LENGTH))  # words of a caption


def log_to_console(log):
    """The log's lines to standard output, of the main process alone, its errors to the other."""
    to_stdout, to_stderr = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    to_stdout.addFilter(lambda record: (record.levelno < logging.ERROR
                                        and rank_and_world()[0] == 0))
    to_stderr.setLevel(logging.ERROR)
    log.setLevel(logging.INFO)
    log.addHandler(to_stdout)
    log.addHandler(to_stderr)


def duration(seconds):
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """One line on a terminal, written over itself; nothing elsewhere, or unless `on`."""

    def __init__(self, on=True, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self.live = on and self.stream.isatty()
        self.started = time.time()

    def update(self, text):
        if self.live:
            columns = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{text[:columns]:<{columns}}")
            self.stream.flush()

    def clear(self):
        """Take the line away, so that a plain line can follow."""
        if self.live:
            self.update("")
            self.stream.write("\r")
            self.stream.flush()

    def counter(self, what):
        """-> function(done, total) that says, now and then, how many photos are done."""
        def update(done, total):
            if done % 50 == 0:
                self.update(f"{what}: {done:,} of {total:,} photos")
        return update

    def speed(self, steps, remaining_steps, pairs):
        """Pairs a second, and how long the rest takes. steps: of `pairs` each, since the start."""
        seconds = (time.time() - self.started) / steps
        return f"{pairs / seconds:.0f} pairs/s  {duration(remaining_steps * seconds)} left"


def epoch_line(row):
    """A row of the history -> the plain line that stands for it in console and log."""
    val = row["val"]
    return (f"epoch {row['epoch']:3d}  loss {row['train']['loss']:.4f}  "
            f"val R@1 {val['avg_r1']:5.2f} (i2t {val['i2t_r1']:.2f}, t2i {val['t2i_r1']:.2f})  "
            f"R@10 {val['i2t_r10']:.1f}/{val['t2i_r10']:.1f}  "
            f"MedR {val['i2t_medr']:g}/{val['t2i_medr']:g}  {row['seconds']:.1f} s")


def _heading(title):
    return ["", title, "-" * WIDTH]


def _facts(facts):
    """{name: value} -> lines."""
    return [f"  {name:<24}{value}" for name, value in facts.items()]


def _recall_rows(columns):
    """columns: {heading: metrics}. One row a measure, one column a set of metrics."""
    width = max(12, *(len(name) + 2 for name in columns))
    lines = [" " * 34 + "".join(f"{name:>{width}}" for name in columns)]
    for protocol, prefix in (("standard", ""), ("pair", "pair_")):
        lines.append(f"  {protocol} protocol")
        keys = {}
        for arrow, way in (("I->T", "i2t"), ("T->I", "t2i")):
            keys |= {f"{arrow} R@{k} (%)": f"{prefix}{way}_r{k}" for k in KS}
        if not prefix:
            keys |= {"I->T median rank": "i2t_medr", "T->I median rank": "t2i_medr"}
        keys["Avg R@1 (%)"] = f"{prefix}avg_r1"
        for name, key in keys.items():
            values = [metrics.get(key) for metrics in columns.values()]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            lines.append(f"    {name:<30}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines


def _counts(data):
    """The counts of one split, as `Flickr8kImageTextDataset.counts` gives them, in words."""
    text = f"{data['photos']:,} photos of {data['pixels']} px, {data['captions']:,} captions"
    return text + (f", {data['left_out']:,} photos left out" if data["left_out"] else "")


def _change(first, last, unit=""):
    change = f", {100 * (last - first) / first:+.1f} %" if first else ""
    return f"{first:.4g}{unit} -> {last:.4g}{unit}{change}"


def _chance(data):
    """`chance_metrics` of a split, from its counts."""
    counts = []
    for captions, photos in data["captions_per_photo"].items():
        counts += [int(captions)] * photos
    return chance_metrics(counts)


@contextlib.contextmanager
def _reading(run):
    """What is missing in a run's files -> CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{run.dir}: a file of the run lacks what it should hold "
                              f"({type(error).__name__}: {error})") from None


def summary(run):
    """The tables of a Run, as one string. Raises CheckpointError for files that do not fit."""
    with _reading(run):
        return "\n".join(_results(run) + _progress(run) + _description(run))


def _results(run):
    data, best, last = run.config["data"], run.best, run.history[-1]
    title = "BUILT-IN SHAPES (NOT FLICKR8K)" if run.settings.synthetic else "FLICKR8K"
    epochs = f"{len(run.history)} of {run.settings.epochs} epochs in {run.minutes:.1f} minutes"
    state = "" if len(run.history) >= run.settings.epochs else ": not finished"
    lines = ["=" * WIDTH, f"{title}, RETRIEVAL WITH SGD", "=" * WIDTH]
    lines += _facts({"run": run.dir, "training": epochs + state})
    lines += _heading(f"Validation: {_counts(data['val'])}")
    lines += _recall_rows({f"best (epoch {best['epoch']})": best["val"],
                           f"final (epoch {last['epoch']})": last["val"],
                           "chance": _chance(data["val"])})
    if run.test:
        lines += _heading(f"Test, best model: {_counts(data['test'])}")
        lines += _recall_rows({"test": run.test, "chance": _chance(data["test"])})
    return lines


def _progress(run):
    history, best = run.history, run.best
    first, last = history[0], history[-1]
    lines = _heading("Training progress (validation, standard protocol)")
    lines.append(f"  {'epoch':>5} {'loss':>9} {'Avg R@1':>9} {'I->T R@1':>9} {'T->I R@1':>9} "
                 f"{'lr':>9} {'seconds':>9}")
    step = 1
    if len(history) > 30:
        step = max(1, round(len(history) / 60)) * 10
    elif len(history) > 10:
        step = 5
    for row in history:
        if row["epoch"] % step == 0 or row in (first, last, best):
            val = row["val"]
            lines.append(f"  {row['epoch']:>5} {row['train']['loss']:>9.4f} "
                         f"{val['avg_r1']:>9.2f} {val['i2t_r1']:>9.2f} {val['t2i_r1']:>9.2f} "
                         f"{row['lr']:>9.2g} {row['seconds']:>9.1f}")
    loss = _change(first["train"]["loss"], last["train"]["loss"])
    avg_r1 = _change(first["val"]["avg_r1"], best["val"]["avg_r1"], " %")
    return lines + [""] + _facts({"train loss": f"{loss} (epoch {last['epoch']})",
                                  "val Avg R@1": f"{avg_r1} (epoch {best['epoch']})"})


def _description(run):
    config, settings, lines = run.config, run.settings, []
    best = run.dir / BEST
    if best.exists():
        lines += _heading("Checkpoint")
        lines += _facts({"file": best, "size": f"{best.stat().st_size / 1e6:.1f} MB",
                         "epoch": run.best["epoch"]})
    lines += _heading("Dataset")
    lines += _facts({"folder": settings.data_dir}
                    | {split: _counts(data) for split, data in config["data"].items()})
    lines += _heading("Model")
    lines += _facts({"preset": settings.model, "parameters": f"{config['parameters']:,}"}
                    | settings.model_arguments())
    lines += _heading("Training: SGD with Nesterov momentum, warm-up, cosine")
    others = {name: value for name, value in config["settings"].items()
              if name not in settings.model_arguments() and name not in ("data_dir", "model")}
    versions = config["versions"]
    return lines + _facts(others | {
        "precision": config["precision"], "hardware": config["device"], "date": config["date"],
        "PyTorch, Python": f"{versions['torch']}, {versions['python']}"})


def comparison_rows(runs):
    """Runs -> a list of dicts, one a run, best on validation first.

    "val" is the run's best epoch, "test" that model on the test split, None before the run's end.
    Raises CheckpointError for files that do not fit.
    """
    rows = []
    for run in runs:
        settings, config = run.settings, run.config
        with _reading(run):
            rows.append({
                "run": str(run.dir), "data": "built-in shapes" if settings.synthetic else "Flickr8k",
                "val_photos": config["data"]["val"]["photos"], "model": settings.model,
                "tokenizer": settings.tokenizer, "parameters": config["parameters"],
                "seed": settings.seed, "epochs": len(run.history),
                "planned_epochs": settings.epochs, "best_epoch": run.best["epoch"],
                "minutes": run.minutes, "val": run.best["val"], "test": run.test,
                "device": config["device"], "date": config["date"],
                "command": command_of(settings)})
            _cells(rows[-1])  # every figure is there
    return sorted(rows, key=lambda row: -row["val"]["avg_r1"])


def _cells(row):
    """A row of `comparison_rows` -> {column: cell}; the last two where there is room."""
    val, finished = row["val"], row["epochs"] >= row["planned_epochs"]
    cells = {
        "run": row["run"].rstrip("/").split("/")[-1],
        "data": f"{row['data']}, {row['val_photos']:,} val",
        "model": f"{row['model']}, {row['parameters'] / 1e6:.1f} M",
        "tokens": row["tokenizer"],
        "epochs": f"{row['best_epoch']} of {row['epochs']}" + ("" if finished else "+"),
        "minutes": f"{row['minutes']:.1f}",
        "avg R@1": f"{val['avg_r1']:.2f}"}
    cells |= {f"R@{k}": f"{val[f'i2t_r{k}']:.1f} / {val[f't2i_r{k}']:.1f}" for k in KS}
    return cells | {
        "MedR": f"{val['i2t_medr']:g} / {val['t2i_medr']:g}",
        "pair R@1": f"{val['pair_avg_r1']:.2f}",
        "hardware, date": f"{row['device']}, {row['date']}",
        "command": f"`{row['command']}`"}


def comparison(rows, form="terminal"):
    """`comparison_rows` as "terminal" or "markdown" table, or as "json"."""
    if form == "json":
        return json.dumps(rows, indent=1)
    cells = [_cells(row) for row in rows]
    if form == "markdown":
        return markdown_table(list(cells[0]), [list(row.values()) for row in cells])
    columns = list(cells[0])[:-2]
    table = [columns] + [[row[column] for column in columns] for row in cells]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
             for row in table]
    note = ("R@K in percent on validation, photo to text / text to photo, of the epoch with the "
            "best avg R@1; +: not finished")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], note])


def markdown_table(columns, rows):
    """Headings and rows of cells -> a markdown table."""
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


def adaptation_table(title, results):
    """What `compare_test_time_training` gave for each run, {run: results} -> lines of text."""
    width = max(20, *(len(name) + 2 for name in results))
    lines = [title, f"  {'':<{width}}{'off':>8}{'on':>8}{'gain':>8}{'seconds off':>14}{'on':>8}"]
    gains = []
    for name, of in results.items():
        off, on, seconds = of["off"]["avg_r1"], of["on"]["avg_r1"], of["seconds"]
        gains.append(on - off)
        lines.append(f"  {name:<{width}}{off:>8.2f}{on:>8.2f}{gains[-1]:>+8.2f}"
                     f"{seconds['off']:>14.2f}{seconds['on']:>8.2f}")
    if len(gains) > 1:
        spread = f"gain {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}"
        lines.append(f"  mean ± standard deviation of {len(gains)} runs: {spread}")
    return "\n".join(lines)


def length_table(captions, t2i):
    """R@K of text to photo by the captions' length. t2i: (M,) rank of each caption's photo, see
    `retrieval_ranks`."""
    lengths = torch.tensor([len(re.findall(r"[\w'-]+", caption)) for caption in captions])
    groups = {}
    for low, high in LENGTHS:
        name = f"{low} to {high} words" if high < MAX_LENGTH else f"{low} words or more"
        groups[name] = t2i[(lengths >= low) & (lengths <= high)]
    lines = ["Text to photo, by the caption's length",
             f"  {'':<20}{'captions':>10}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MedR':>8}"]
    for name, ranks in (groups | {"all": t2i}).items():
        cells = ["-"] * 4
        if len(ranks):
            cells = [f"{100 * (ranks <= k).double().mean():.2f}" for k in KS]
            cells.append(f"{ranks.double().quantile(0.5):g}")
        row = "".join(f"{cell:>8}" for cell in cells)
        lines.append(f"  {name:<20}{len(ranks):>10,}{row}")
    return "\n".join(lines)
