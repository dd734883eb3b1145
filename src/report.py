"""The tables that the scripts print: the line of an epoch, the end of a training, and the summary
of a run. Several runs are compared in `comparison.py`.

All figures are those of the standard protocol (see `retrieval.py`), except for one row of the
results. It shows R@1 by the measure of the run that this project started from: each photo was there
as often as it has captions, and only the caption of the very same pair was correct. If every photo
has n captions, that R@1 is the standard one divided by n."""
import contextlib
import math
from pathlib import Path

from src.retrieval import KS, chance_metrics
from src.utils.console import counted, shell_command
from src.utils.errors import UsageError

WIDTH = 80
PROGRESS_ROWS = 12  # about as many epochs are shown of a long run
METRICS = {"I->T R@1 (%)": "i2t_r1", "I->T R@5 (%)": "i2t_r5", "I->T R@10 (%)": "i2t_r10",
           "T->I R@1 (%)": "t2i_r1", "T->I R@5 (%)": "t2i_r5", "T->I R@10 (%)": "t2i_r10",
           "I->T median rank": "i2t_medr", "T->I median rank": "t2i_medr",
           "rsum": "rsum", "Avg R@1 (%)": "avg_r1"}
ORIGINAL_AVG_R1 = "original Avg R@1 (%)"
FEW = 100  # photos of a split, below which the tables say how coarse its figures are


@contextlib.contextmanager
def reading(run):
    """Inside, an entry that is missing in the files of a Run raises UsageError."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"{run.dir}: a file of the run lacks an entry or is damaged "
                         f"({type(error).__name__}: {error}); please retrain") from None


def epoch_line(row, config):
    """One epoch of the history as a line of the log. config: that of the run."""
    val, loss = row["val"], row["train"]["loss"]
    if loss is not None:
        loss_text = f"loss {loss:.4f}"
    else:  # epoch 0 has no training; another run may have been trained on these photos
        loss_text = "as it was" if "init_from" in config else "zero-shot"
    return (f"epoch {row['epoch']:3d}  {loss_text}  "
            f"val R@1 {val['avg_r1']:5.2f} (i2t {val['i2t_r1']:.2f}, t2i {val['t2i_r1']:.2f})  "
            f"R@10 {val['i2t_r10']:.1f}/{val['t2i_r10']:.1f}  "
            f"MedR {val['i2t_medr']:g}/{val['t2i_medr']:g}  {row['seconds']:.1f} s")


# ----------------------------------------------------------------------------- the end of a run


def ending(run):
    """What a training says at its end: how good the Run is, where it lies, and what may follow."""
    data, best = run.config["data"], run.best
    of_split = {"val": best["val"], "test": run.test}
    rows = {"best epoch, " + f"{best['epoch']} of {run.history[-1]['epoch']}": of_split,
            "with the bank": {split: run.bank[split]["with_bank"] for split in of_split},
            "chance": {split: _chance(data[split]) for split in of_split}}
    headings = [f"{split}, {counted(data[split]['photos'], 'photo')}" for split in of_split]
    lines = [f"{'R@1 (%), photo to text / text to photo':<40}"
             + "".join(f"{heading:>20}" for heading in headings)]
    for name, metrics in rows.items():
        cells = [f"{m['i2t_r1']:.2f} / {m['t2i_r1']:.2f}" for m in metrics.values()]
        lines.append(f"  {name:<38}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append(f"{counted(run.settings.epochs, 'epoch')} in {run.minutes:.1f} minutes; all files "
                 f"are in {run.dir}")
    show = ["python", "show_flickr8k_results.py"]
    of_run = ["--output_dir", run.dir]
    lines.append(f"search with it:  {shell_command([*show, '--serve', *of_run])}")
    lines.append(f"all its tables:  {shell_command([*show, *of_run])}")
    return "\n".join(lines)


# ------------------------------------------------------------------------- the summary of a run


def summary(run):
    """All tables of a Run as one string. Raises UsageError if its files lack something."""
    with reading(run):
        lines = _title(run) + _results(run)
        if run.bank:
            lines += _hubs(run) + _photo_and_text(run)
        lines += _progress(run) + _dataset(run) + _model(run) + _training(run)
    return "\n".join(lines)


def _heading(title):
    return ["", title, "-" * WIDTH]


def _facts(facts):
    return [f"  {name:<24}{value}" for name, value in facts.items()]


def _title(run):
    title = f"{data_name(run).upper()}, RETRIEVAL WITH SGD"
    if run.settings.synthetic:
        title = f"{data_name(run).upper()} (NOT FLICKR8K), RETRIEVAL WITH SGD"
    facts = {"run": run.dir, "training": training_time(run), "trained on": trained_on(run)}
    return ["=" * WIDTH, title, "=" * WIDTH, *_facts(facts)]


def _results(run):
    lines = []
    for i, (title, columns, rows) in enumerate(recall_tables(run)):
        lines += _heading(title) + format_table(columns, rows)
        if i == 0:
            lines += [f"  {note}" for note in recall_notes(run)]
    return lines


def format_table(columns, rows):
    """The lines of a table. rows: the first cell of each is the name of its metric."""
    lines, widths = [], [max(9, len(name) + 2) for name in columns]
    for name, *cells in [["", *columns], *rows]:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths)]
        lines.append(f"  {name:<22}{''.join(aligned)}")
    return lines


def recall_tables(run):
    """The results of a Run: validation and, once it is finished, test. Returns a list of (title,
    columns, rows). The first cell of a row is the name of its metric."""
    data, best, last = run.config["data"], run.best, run.history[-1]
    val = {f"best (epoch {best['epoch']})": best["val"]}
    if run.bank:
        val["with the bank"] = run.bank["val"]["with_bank"]
    val[f"final (epoch {last['epoch']})"] = last["val"]
    tables = [_recall_table("Validation", data["val"], val)]
    if run.test:
        test = {"test": run.test}
        if run.bank:
            test["with the bank"] = run.bank["test"]["with_bank"]
        tables.append(_recall_table("Test, best model", data["test"], test))
    return tables


def _recall_table(title, split, metrics_of_column):
    """split: what config.json says about the split. metrics_of_column: {heading: metrics}."""
    columns = metrics_of_column | {"chance": _chance(split)}
    rows = recall_rows(columns)
    n = _captions_of_each_photo(split)
    if n is not None:
        values = [metrics["avg_r1"] / n for metrics in columns.values()]
        rows.append([ORIGINAL_AVG_R1, *(f"{value:.2f}" for value in values)])
    return f"{title}: {_counts(split)}", list(columns), rows


def recall_rows(metrics_of_column):
    """The rows of METRICS. metrics_of_column: {heading: metrics}, of which some may be missing."""
    rows = []
    for name, key in METRICS.items():
        values = [metrics.get(key) for metrics in metrics_of_column.values()]
        rows.append([name, *("-" if value is None else f"{value:.2f}" for value in values)])
    return rows


def recall_notes(run):
    """What has to be explained in the first of the `recall_tables`, a list of lines."""
    notes, data = [], run.config["data"]
    n = _captions_of_each_photo(data["val"])
    if n is not None:
        notes.append(f"original: by the measure of the original run, 1/{n} of the standard one")
    if "different_captions" in data["val"]:
        notes.append("photos share captions: a caption is right for every photo that has it")
    if run.bank:
        notes.append("with the bank: ranked with help from training pairs")
    return notes + notes_on_the_splits(run.config, ("val", "test") if run.test else ("val",))


def notes_on_the_splits(config, splits=("val", "test")):
    """A line for each of the splits whose figures are coarse, because it has fewer than FEW photos,
    and one if the run that this one began with may have seen these photos. config: the run's."""
    data, notes = config["data"], []
    seen_before = config.get("init_from", {}).get("seen_before")
    if seen_before:
        notes.append(seen_before)
    for name in splits:
        number, chance = data[name]["photos"], _chance(data[name])["avg_r1"]
        if number < FEW:
            notes.append(f"{name} has {counted(number, 'photo')}: one photo moves I->T R@1 by "
                         f"{100 / number:.1f} points; chance is {chance:.1f} % (avg R@1)")
    return notes


def _captions_of_each_photo(split):
    """The number of captions of every photo, or None if it is not the same for all photos, or if
    photos share captions."""
    numbers = list(split["captions_per_photo"])
    return int(numbers[0]) if len(numbers) == 1 and "different_captions" not in split else None


def _chance(split):
    def numbers(name):
        return [int(n) for n, times in split[name].items() for _ in range(times)]

    if "different_captions" in split:
        return chance_metrics(numbers("texts_per_photo"), numbers("photos_per_caption"),
                              split["different_captions"])
    return chance_metrics(numbers("captions_per_photo"))


def _counts(split):
    text = counted(split["photos"], "photo")
    if "pixels" in split:  # otherwise they are features of a pretrained encoder
        text += f" of {split['pixels']} px"
    text += f", {counted(split['captions'], 'caption')}"
    if "different_captions" in split:
        text += f", {split['different_captions']:,} different"
    if split["skipped"]:
        text += f", {counted(split['skipped'], 'photo')} left out"
    return text


def _hubs(run):
    share = run.bank["val"]["hub_share"]
    return ["", f"  {share['without_bank']:.1f} % of val's captions find one of the ten commonest "
                f"photos first, {share['with_bank']:.1f} % with the bank"]


def _photo_and_text(run):
    recalls = run.bank["val"]["photo_and_text"]
    if recalls is None:
        return []
    columns = {"caption": "one caption", "photo": "the photo", "both": "both"}
    lines = _heading("Validation: a photo's other captions, found by")
    lines.append(" " * 24 + "".join(f"{name:>14}" for name in columns.values()))
    for k in KS:
        cells = [f"{recalls[query][f'r{k}']:>14.2f}" for query in columns]
        lines.append(f"  {f'R@{k} (%)':<22}{''.join(cells)}")
    return lines


def _progress(run):
    lines = _heading("Training progress (validation, standard protocol)")
    lines.append(f"  {'epoch':>5} {'loss':>9} {'Avg R@1':>9} {'I->T R@1':>9} {'T->I R@1':>9} "
                 f"{'lr':>9} {'seconds':>9}")
    step = math.ceil(len(run.history) / PROGRESS_ROWS)
    always_shown = (run.history[0], run.best, run.history[-1])
    for row in run.history:
        if row["epoch"] % step == 0 or row in always_shown:
            val, loss = row["val"], row["train"]["loss"]
            loss_text = "-" if loss is None else f"{loss:.4f}"
            lines.append(f"  {row['epoch']:>5} {loss_text:>9} {val['avg_r1']:>9.2f} "
                         f"{val['i2t_r1']:>9.2f} {val['t2i_r1']:>9.2f} {row['lr']:>9.2g} "
                         f"{row['seconds']:>9.1f}")
    return lines


def _dataset(run):
    facts = {"folder": run.settings.data_dir, "layout": run.config["layout"]}
    for name, split in run.config["data"].items():
        facts[name] = _counts(split)
    return _heading("Dataset") + _facts(facts)


def _model(run):
    facts = {"preset": run.settings.model, "parameters": f"{run.config['parameters']:,}",
             "pretrained encoders": encoders(run)}
    return _heading("Model") + _facts(facts | run.settings.model_arguments())


def _training(run):
    config = run.config
    shown_above = {"data_dir", "model", "image_encoder", "text_encoder",
                   *run.settings.model_arguments()}
    facts = {name: value for name, value in config["settings"].items() if name not in shown_above}
    facts |= {"precision": config["precision"], "hardware": config["device"],
              "date": config["date"], "PyTorch": config["versions"]["torch"],
              "Python": config["versions"]["python"]}
    return _heading("Training: SGD with Nesterov momentum, warm-up, cosine") + _facts(facts)


# ------------------------------------------------------------------ facts about a run, in words


def training_time(run):
    """How long a Run has been trained, such as "3 of 30 epochs in 1.2 minutes: not finished"."""
    text = (f"{run.history[-1]['epoch']} of {run.settings.epochs} epochs in {run.minutes:.1f} "
            "minutes")
    return text if run.finished else f"{text}: not finished"


def data_name(run):
    """The name of the data that a Run was validated on: that of a known dataset, or else that of
    its folder."""
    if run.settings.synthetic:
        return "built-in shapes"
    layout = run.config["layout"]
    if layout.startswith(("Flickr8k", "Flickr30k", "COCO")):
        return layout
    return Path(run.settings.data_dir).resolve().name


def trained_on(run):
    """The training split of a Run in words. Each folder of extra data is named by itself."""
    total, extra = run.config["data"]["train"], run.config["extra_data"]
    photos = total["photos"] - sum(folder["photos"] for folder in extra)
    captions = total["captions"] - sum(folder["captions"] for folder in extra)
    parts = [f"{counted(photos, 'photo')}, {counted(captions, 'caption')} of {data_name(run)}"]
    for folder in extra:
        part = (f"{counted(folder['photos'], 'photo')}, {counted(folder['captions'], 'caption')} "
                f"of {folder['folder']}")
        skipped = sum(folder["skipped"].values())
        parts.append(f"{part} ({skipped:,} left out)" if skipped else part)
    return " + ".join(parts)


def encoders(run):
    """The pretrained encoders of a Run in words, and the run that it began with."""
    settings, names = run.settings, []
    initial = run.config.get("init_from")
    begun = f", begun with {Path(initial['run']).resolve().name}" if initial else ""
    if settings.image_encoder:
        names.append(f"image {settings.image_encoder}")
    if settings.text_encoder:
        names.append(f"text {settings.text_encoder}")
    if not names:
        return f"none{begun or ', from scratch'}"
    text = " + ".join(names)
    return f"{text}, fine-tuned{begun}" if settings.finetune else text + begun
