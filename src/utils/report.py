"""What the scripts print: the progress line of a running epoch, and the tables of a run, read from its files."""
import platform
import shutil
import sys
from pathlib import Path

import torch

from src.utils.checkpoint import CheckpointError, load_checkpoint, load_json
from src.utils.retrieval import chance_metrics

HISTORY, BEST, LAST, TEST, LOG, CONFIG = RUN_FILES = (
    "history_flickr8k.json", "best_model_flickr8k.pt", "last_checkpoint_flickr8k.pt", "test_results_flickr8k.json",
    "flickr8k_sgd_training.log", "config.json")
BEST_KEYS = ("epoch", "model_state_dict", "metrics", "config", "tokenizer")
WIDTH = 80


def duration(seconds):
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """One line on a terminal, written over itself; nothing at all where the output is not a terminal, or unless `on`."""

    def __init__(self, on=True, stream=None):
        self.stream = sys.stdout if stream is None else stream
        self.live = on and self.stream.isatty()

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


def device_name(device):
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def precision_name(amp_dtype):
    """The autocast type, None for none, in words."""
    return "float32" if amp_dtype is None else f"mixed, {str(amp_dtype).removeprefix('torch.')}"


def data_counts(data):
    """What config.json says of a Flickr8kImageTextDataset."""
    captions = torch.bincount(data.photo_of_caption)
    return {"photos": len(data.names), "captions": len(data), "left_out": len(data.left_out),
            "captions_per_photo": {str(count): photos for count, photos in enumerate(torch.bincount(captions).tolist())
                                   if photos}}


def epoch_line(row):
    """A row of the history -> the plain line that stands for it in console and log."""
    val = row["val"]
    return (f"epoch {row['epoch']:3d}  loss {row['train']['loss']:.4f}  "
            f"val R@1 {val['avg_r1']:5.2f} (i2t {val['i2t_r1']:.2f}, t2i {val['t2i_r1']:.2f})  "
            f"R@10 {val['i2t_r10']:.1f}/{val['t2i_r10']:.1f}  MedR {val['i2t_medr']:g}/{val['t2i_medr']:g}  "
            f"{row['seconds']:.1f} s")


def load_run(output_dir):
    """Read a run's files, finished or not -> {"dir", "history", "config", "test", "best"}.

    "test" and "best" are None where the run has not come so far; "best" is the checkpoint, with its size in
    "megabytes". Raises CheckpointError when there is no run, no finished epoch
    yet, or a file is damaged.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise CheckpointError(f"{output_dir}: there is no such folder; train first: python train_flickr8k_sgd.py")
    if not (output_dir / HISTORY).exists():
        started = (output_dir / CONFIG).exists()
        raise CheckpointError(f"{output_dir}: " + ("the run has not finished its first epoch yet" if started else
                              "holds no run; train first: python train_flickr8k_sgd.py"))
    run = {"dir": output_dir, "history": load_json(output_dir / HISTORY), "config": load_json(output_dir / CONFIG),
           "test": None, "best": None}
    if not (isinstance(run["history"], list) and run["history"]):
        raise CheckpointError(f"{output_dir / HISTORY}: holds no epochs")
    if (output_dir / TEST).exists():
        run["test"] = load_json(output_dir / TEST)
    if (output_dir / BEST).exists():
        run["best"] = load_checkpoint(output_dir / BEST, BEST_KEYS)
        run["best"]["megabytes"] = (output_dir / BEST).stat().st_size / 1e6
    return run


def _heading(title):
    return ["", title, "-" * WIDTH]


def _facts(rows):
    return [f"  {name:<24}{value}" for name, value in rows]


def _recall_rows(columns):
    """columns: {heading: metrics}. One row a measure, one column a set of metrics."""
    width = max(12, *(len(name) + 2 for name in columns))
    lines = [" " * 34 + "".join(f"{name:>{width}}" for name in columns)]
    for protocol, prefix in (("standard", ""), ("pair", "pair_")):
        lines.append(f"  {protocol} protocol")
        keys = [(f"{arrow} R@{k} (%)", f"{prefix}{way}_r{k}") for arrow, way in (("I->T", "i2t"), ("T->I", "t2i"))
                for k in (1, 5, 10)]
        if not prefix:
            keys += [("I->T median rank", "i2t_medr"), ("T->I median rank", "t2i_medr")]
        for name, key in keys + [("Avg R@1 (%)", f"{prefix}avg_r1")]:
            cells = (metrics.get(key) for metrics in columns.values())
            lines.append(f"    {name:<30}" + "".join(f"{'-' if v is None else f'{v:.2f}':>{width}}" for v in cells))
    return lines


def _change(first, last, unit=""):
    change = f", {100 * (last - first) / first:+.1f} %" if first else ""
    return f"{first:.4g}{unit} -> {last:.4g}{unit}{change}"


def summary(run):
    """The tables of a run (see `load_run`), as one string. Raises CheckpointError for files that do not fit."""
    try:
        return _summary(run)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{run['dir']}: a file of the run lacks what it should hold "
                              f"({type(error).__name__}: {error})") from None


def _summary(run):
    history, config = run["history"], run["config"]
    arguments, data = config["arguments"], config["data"]
    best = max(history, key=lambda row: row["val"]["avg_r1"])  # the first of equals, as in training
    first, last = history[0], history[-1]
    seconds = sum(row["seconds"] for row in history)
    chance = {split: chance_metrics([int(k) for k, photos in data[split]["captions_per_photo"].items()
                                     for _ in range(photos)]) for split in ("val", "test")}

    done = len(history) >= arguments["epochs"]
    lines = ["=" * WIDTH, "FLICKR8K RETRIEVAL WITH SGD" if not arguments["synthetic"] else
             "BUILT-IN SHAPES (NOT FLICKR8K), RETRIEVAL WITH SGD", "=" * WIDTH]
    lines += _facts([("run", run["dir"]),
                     ("training", f"{len(history)} epoch{'s' * (len(history) > 1)} in {seconds / 60:.1f} minutes, "
                                  + ("finished" if done else f"of {arguments['epochs']} planned: not finished"))])
    lines += _heading(f"Validation: {data['val']['photos']:,} photos, {data['val']['captions']:,} captions")
    lines += _recall_rows({f"best (epoch {best['epoch']})": best["val"], f"final (epoch {last['epoch']})": last["val"],
                           "chance": chance["val"]})
    if run["test"]:
        lines += _heading(f"Test, best model: {data['test']['photos']:,} photos, {data['test']['captions']:,} captions")
        lines += _recall_rows({"test": run["test"], "chance": chance["test"]})

    lines += _heading("Training progress (validation, standard protocol)")
    lines += [f"  {'epoch':>5} {'loss':>9} {'Avg R@1':>9} {'I->T R@1':>9} {'T->I R@1':>9} {'lr':>9} {'seconds':>9}"]
    step = max(1, round(len(history) / 60) * 10 if len(history) > 30 else 5 if len(history) > 10 else 1)
    for row in history:
        if row["epoch"] % step == 0 or row in (first, last, best):
            val = row["val"]
            lines.append(f"  {row['epoch']:>5} {row['train']['loss']:>9.4f} {val['avg_r1']:>9.2f} "
                         f"{val['i2t_r1']:>9.2f} {val['t2i_r1']:>9.2f} {row['lr']:>9.2g} {row['seconds']:>9.1f}")
    lines += [""] + _facts([
        ("train loss", _change(first["train"]["loss"], last["train"]["loss"]) + f" (epoch {last['epoch']})"),
        ("val Avg R@1", _change(first["val"]["avg_r1"], best["val"]["avg_r1"], " %") + f" (epoch {best['epoch']})")])

    if run["best"]:
        lines += _heading("Checkpoint")
        lines += _facts([("file", run["dir"] / BEST), ("size", f"{run['best']['megabytes']:.1f} MB"),
                         ("epoch", run["best"]["epoch"]), ("val Avg R@1", f"{run['best']['metrics']['avg_r1']:.2f} %")])
    lines += _heading("Dataset")
    lines += _facts([("folder", arguments["data_dir"])] + [
        (split, f"{data[split]['photos']:,} photos, {data[split]['captions']:,} captions"
                + (f", {data[split]['left_out']:,} photos left out" if data[split]["left_out"] else ""))
        for split in ("train", "val", "test")])
    lines += _heading("Model")
    lines += _facts([("preset", arguments["model"]), ("parameters", f"{config['parameters']:,}")]
                    + [(name, value) for name, value in config["model"].items()])
    lines += _heading("Optimizer")
    lines += _facts([(name, value) for name, value in config["optimizer"].items()]
                    + [("batch size", f"{arguments['batch_size']} pairs, {arguments['captions_per_image']} a photo"),
                       ("precision", config["precision"]),
                       ("device", config["device"]), ("seed", arguments["seed"]),
                       ("PyTorch, Python", f"{config['versions']['torch']}, {config['versions']['python']}")])
    return "\n".join(lines)
