"""What the scripts print: the progress line of a running epoch, and the tables of a run, read from its files."""
import collections
import json
import platform
import re
import shutil
import statistics
import sys
from pathlib import Path

import torch

from src.utils.checkpoint import CheckpointError, load_checkpoint, load_json
from src.utils.retrieval import chance_metrics

HISTORY, BEST, LAST, TEST, TEST_TIME, LOG, CONFIG = RUN_FILES = (
    "history_flickr8k.json", "best_model_flickr8k.pt", "last_checkpoint_flickr8k.pt", "test_results_flickr8k.json",
    "test_time_training_flickr8k.json", "flickr8k_sgd_training.log", "config.json")
BEST_KEYS = ("epoch", "model_state_dict", "metrics", "config", "tokenizer")
WIDTH = 80
LENGTHS = ((1, 6), (7, 9), (10, 12), (13, 16), (17, 999))  # words of a caption
# What does not name a thing: articles, pronouns, prepositions, conjunctions, auxiliaries, numbers.
FUNCTION_WORDS = frozenset("""a an the this that these those there it its he she his her him they their them who which what
    some other another each all both one two three four five several many and or but while as with without in on at of to by
    for from into onto off out up down over under above below near next behind front through across along around between
    against during is are was be being been has have having do does not no""".split())


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
    named = None
    if Path("/proc/cpuinfo").exists():  # on Linux platform.processor() says nothing, or only the architecture
        named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = named[1] if named else platform.processor() or platform.machine()
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def precision_name(amp_dtype):
    """The autocast type, None for none, in words."""
    return "float32" if amp_dtype is None else f"mixed, {str(amp_dtype).removeprefix('torch.')}"


def data_counts(data):
    """What config.json says of a Flickr8kImageTextDataset."""
    captions = torch.bincount(data.photo_of_caption)
    return {"photos": len(data.names), "pixels": data.photos.shape[-1], "captions": len(data), "left_out": len(data.left_out),
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
    """Read a run's files, finished or not -> {"dir", "history", "config", "test", "test_time", "best"}.

    "test", "test_time" and "best" are None where the run has not come so far; "best" is the checkpoint, with its size in
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
           "test": None, "test_time": None, "best": None}
    if not (isinstance(run["history"], list) and run["history"]):
        raise CheckpointError(f"{output_dir / HISTORY}: holds no epochs")
    for key, name in (("test", TEST), ("test_time", TEST_TIME)):
        if (output_dir / name).exists():
            run[key] = load_json(output_dir / name)
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


def _counts(data):
    """Of one split, see `data_counts`; runs of older versions have no "pixels"."""
    pixels = f" of {data['pixels']} px" if "pixels" in data else ""
    return f"{data['photos']:,} photos{pixels}, {data['captions']:,} captions"


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
    lines += _heading(f"Validation: {_counts(data['val'])}")
    lines += _recall_rows({f"best (epoch {best['epoch']})": best["val"], f"final (epoch {last['epoch']})": last["val"],
                           "chance": chance["val"]})
    if run["test"]:
        lines += _heading(f"Test, best model: {_counts(data['test'])}")
        lines += _recall_rows({"test": run["test"], "chance": chance["test"]})

    if run["test_time"]:
        columns = {f"{split} {way}": of[way] for split, of in run["test_time"].items() for way in ("off", "on")}
        lines += _heading("Test-time training of the memory, off and on (best model, standard protocol)")
        rows = _recall_rows(columns)
        lines += rows[:1] + rows[2:11]  # the standard protocol's
        width = max(12, *(len(name) + 2 for name in columns))
        lines.append(f"    {'seconds':<30}" + "".join(
            f"{of['seconds'][way]:>{width}.2f}" for of in run["test_time"].values() for way in ("off", "on")))

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
        (split, _counts(data[split]) + (f", {data[split]['left_out']:,} photos left out" if data[split]["left_out"] else ""))
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


def comparison_rows(runs, command_of):
    """Runs (see `load_run`) -> a list of dicts, one a run, best on validation first.

    command_of: arguments of a run -> the command that trains so. "val" is the run's best epoch, "test" that model on the
    test split, "test_time" the same with the memory's test-time training; the latter two are None where absent. Raises
    CheckpointError for files that do not fit.
    """
    rows = []
    for run in runs:
        try:
            arguments, data = run["config"]["arguments"], run["config"]["data"]["val"]
            best = max(run["history"], key=lambda row: row["val"]["avg_r1"])
            rows.append({
                "run": str(run["dir"]), "data": "built-in shapes" if arguments["synthetic"] else "Flickr8k",
                "val_photos": data["photos"], "model": arguments["model"], "tokenizer": arguments["tokenizer"],
                "parameters": run["config"]["parameters"], "seed": arguments["seed"],
                "epochs": len(run["history"]), "planned_epochs": arguments["epochs"], "best_epoch": best["epoch"],
                "minutes": sum(row["seconds"] for row in run["history"]) / 60, "val": best["val"], "test": run["test"],
                "test_time": run["test_time"], "device": run["config"]["device"],
                "date": run["config"].get("date"), "command": command_of(arguments)})
            _ = {name: cell(rows[-1]) for name, cell in _COLUMNS.items()}  # that every figure is there
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{run['dir']}: a file of the run lacks what it should hold "
                                  f"({type(error).__name__}: {error})") from None
    return sorted(rows, key=lambda row: -row["val"]["avg_r1"])


def _gain(row):
    """What test-time training adds to a run's val avg R@1."""
    return row["test_time"]["val"]["on"]["avg_r1"] - row["test_time"]["val"]["off"]["avg_r1"]


def _both(metrics, key, digits=1):
    return f"{metrics['i2t_' + key]:.{digits}f} / {metrics['t2i_' + key]:.{digits}f}"


_COLUMNS = {
    "run": lambda row: Path(row["run"]).name,
    "data": lambda row: f"{row['data']}, {row['val_photos']:,} val",
    "model": lambda row: f"{row['model']}, {row['parameters'] / 1e6:.1f} M",
    "tokens": lambda row: row["tokenizer"],
    "epochs": lambda row: f"{row['best_epoch']} of {row['epochs']}" + "+" * (row["epochs"] < row["planned_epochs"]),
    "minutes": lambda row: f"{row['minutes']:.1f}",
    "avg R@1": lambda row: f"{row['val']['avg_r1']:.2f}",
    "R@1": lambda row: _both(row["val"], "r1"),
    "R@5": lambda row: _both(row["val"], "r5"),
    "R@10": lambda row: _both(row["val"], "r10"),
    "MedR": lambda row: f"{row['val']['i2t_medr']:g} / {row['val']['t2i_medr']:g}",
    "pair R@1": lambda row: f"{row['val']['pair_avg_r1']:.2f}",
    "test-time": lambda row: "-" if row["test_time"] is None else f"{_gain(row):+.2f}",
}
_MORE_COLUMNS = {  # where there is room
    "hardware, date": lambda row: f"{row['device']}, {row['date'] or '-'}",
    "command": lambda row: f"`{row['command']}`",
}


def comparison(rows, form="terminal"):
    """`comparison_rows` as "terminal" or "markdown" table, or as "json"."""
    if form == "json":
        return json.dumps(rows, indent=1)
    columns = _COLUMNS | (_MORE_COLUMNS if form == "markdown" else {})
    cells = [list(columns)] + [[cell(row) for cell in columns.values()] for row in rows]
    if form == "markdown":
        cells.insert(1, ["---"] * len(columns))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in cells]
    lines = [lines[0], "-" * max(map(len, lines)), *lines[1:],
             "R@K in percent on validation, photo to text / text to photo, of the epoch with the best avg R@1; +: not finished",
             "test-time: what the memory's test-time training adds to avg R@1"]
    adapted = [row for row in rows if row["test_time"]]
    if len(adapted) > 1:
        times = [row["test_time"]["val"]["seconds"] for row in adapted]
        lines[-1] += (f"; mean of {len(adapted)} runs {statistics.mean(map(_gain, adapted)):+.2f}, evaluation taking "
                      f"{statistics.mean(of['on'] / of['off'] for of in times):.1f} times as long")
    return "\n".join(lines)


def _group_table(title, heading, groups):
    """groups: {name: {column: ranks (N,)}} -> lines with the number of ranks, R@1, R@5, R@10 and MedR of each."""
    lines = [title]
    columns = list(next(iter(groups.values())))
    lines.append(f"  {heading:<22}" + "".join(f"{column:>8}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MedR':>8}" for column in columns))
    for name, ranks_of in groups.items():
        lines.append(f"  {name:<22}" + "".join(
            f"{len(ranks):>8,}" + "".join(f"{100 * (ranks <= k).double().mean():>8.2f}" for k in (1, 5, 10))
            + f"{ranks.double().quantile(0.5):>8g}" if len(ranks) else f"{0:>8}" + f"{'-':>8}" * 4
            for ranks in ranks_of.values()))
    return "\n".join(lines)


def length_table(captions, t2i):
    """R@K of text to photo by the captions' length. t2i: (M,) rank of each caption's photo, see `retrieval_ranks`."""
    lengths = torch.tensor([len(re.findall(r"[\w'-]+", caption)) for caption in captions])
    names = [f"up to {LENGTHS[0][1]} words", *(f"{low} to {high} words" for low, high in LENGTHS[1:-1]),
             f"{LENGTHS[-1][0]} words or more"]
    groups = {name: {"T->I": t2i[(lengths >= low) & (lengths <= high)]} for name, (low, high) in zip(names, LENGTHS)}
    return _group_table("Text to photo, by the caption's length", "", groups | {"all": {"T->I": t2i}})


def agreement(captions):
    """How many of a photo's captions name the same thing: in how many stands the word that most of them share, function
    words left out and plurals taken as singulars."""
    words = ({word.rstrip("s") for word in re.findall(r"[a-z]+", caption.lower()) if word not in FUNCTION_WORDS}
             for caption in captions)
    return max(collections.Counter(word for of_caption in words for word in of_caption).values(), default=0)


def agreement_table(captions_of_photos, i2t, t2i):
    """R@K both ways by how many of a photo's captions name the same thing.

    captions_of_photos: [[caption]]. i2t: (photos with captions,), t2i: (captions,), see `retrieval_ranks`.
    """
    of_photo = torch.tensor([agreement(captions) for captions in captions_of_photos if captions])
    of_caption = torch.tensor([agreement(captions) for captions in captions_of_photos for _ in captions])
    groups = {f"{count} of its captions" if count else "none": {"I->T": i2t[of_photo == count], "T->I": t2i[of_caption == count]}
              for count in of_photo.unique().tolist()}
    return _group_table("Both ways, by how many captions of the photo share their commonest word (function words aside)",
                        "share a word", groups | {"all": {"I->T": i2t, "T->I": t2i}})
