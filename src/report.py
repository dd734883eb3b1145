"""What the scripts print: the progress line of a running epoch, and the tables of runs."""
import contextlib
import math
from pathlib import Path

from src.retrieval import KS, chance_metrics
from src.utils.errors import UsageError

WIDTH = 80


def epoch_line(row):
    val, loss = row["val"], row["train"]["loss"]
    loss = "zero-shot" if loss is None else f"loss {loss:.4f}"  # the encoders' own, before training
    return (f"epoch {row['epoch']:3d}  {loss}  "
            f"val R@1 {val['avg_r1']:5.2f} (i2t {val['i2t_r1']:.2f}, t2i {val['t2i_r1']:.2f})  "
            f"R@10 {val['i2t_r10']:.1f}/{val['t2i_r10']:.1f}  "
            f"MedR {val['i2t_medr']:g}/{val['t2i_medr']:g}  {row['seconds']:.1f} s")


def _heading(title):
    return ["", title, "-" * WIDTH]


def _facts(facts):
    return [f"  {name:<24}{value}" for name, value in facts.items()]


def recall_rows(columns):
    """{heading: metrics} -> [[name, cells]]: one row a measure, one cell a set of metrics, and a
    row without cells before those of each protocol."""
    rows = []
    for protocol, prefix in (("standard", ""), ("pair", "pair_")):
        rows.append([f"{protocol} protocol"])
        keys = {}
        for arrow, direction in (("I->T", "i2t"), ("T->I", "t2i")):
            keys |= {f"{arrow} R@{k} (%)": f"{prefix}{direction}_r{k}" for k in KS}
        if not prefix:
            keys |= {"I->T median rank": "i2t_medr", "T->I median rank": "t2i_medr"}
        keys["Avg R@1 (%)"] = f"{prefix}avg_r1"
        for name, key in keys.items():
            values = [metrics.get(key) for metrics in columns.values()]
            rows.append([name, *("-" if value is None else f"{value:.2f}" for value in values)])
    return rows


def _recall_lines(columns):
    widths = [max(9, len(name) + 2) for name in columns]
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name, width in zip(columns, widths))]
    for name, *cells in recall_rows(columns):
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        lines.append(f"    {name:<20}{row}" if cells else f"  {name}")
    return lines


def _counts(data):
    size = f" of {data['pixels']} px" if "pixels" in data else ""  # else they are features
    text = f"{data['photos']:,} photos{size}, {data['captions']:,} captions"
    return text + (f", {data['skipped']:,} photos left out" if data["skipped"] else "")


def _chance(data):
    counts = []
    for captions, photos in data["captions_per_photo"].items():
        counts += [int(captions)] * photos
    return chance_metrics(counts)


@contextlib.contextmanager
def reading(run):
    """Inside, what a file of a Run lacks is a UsageError."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"{run.dir}: a file of the run lacks what it should hold "
                              f"({type(error).__name__}: {error})") from None


def summary(run):
    """The tables of a Run, as one string. Raises UsageError for files that do not fit."""
    with reading(run):
        return "\n".join(_results(run) + _progress(run) + _description(run))


def _results(run):
    title = data_name(run).upper() + (" (NOT FLICKR8K)" if run.settings.synthetic else "")
    lines = ["=" * WIDTH, f"{title}, RETRIEVAL WITH SGD", "=" * WIDTH]
    lines += _facts({"run": run.dir, "training": training(run), "trained on": trained_on(run)})
    for title, columns in recalls(run).items():
        lines += _heading(title) + _recall_lines(columns)
    if run.bank:
        share = run.bank["val"]["hub_share"]
        lines += ["", f"  {share['off']:.1f} % of val's captions find one of the ten commonest "
                      f"photos first, {share['on']:.1f} % with the bank"]
    found = run.bank and run.bank["val"].get("photo_and_text")
    if found:
        lines += _heading("Validation: a photo's other captions, found by")
        names = {"caption": "one caption", "photo": "the photo", "both": "both"}
        lines.append(" " * 24 + "".join(f"{name:>14}" for name in names.values()))
        for k in KS:
            cells = "".join(f"{found[name][f'r{k}']:>14.2f}" for name in names)
            lines.append(f"    {f'R@{k} (%)':<20}{cells}")
    return lines


def training(run):
    """How far a Run is, in a few words."""
    epochs = f"{run.history[-1]['epoch']} of {run.settings.epochs} epochs"
    return f"{epochs} in {run.minutes:.1f} minutes" + ("" if run.finished else ": not finished")


def recalls(run):
    """{title: {heading: metrics}} of a Run, on val and, when it is done, on test."""
    data, best, last = run.config["data"], run.best, run.history[-1]
    tables = {f"Validation: {_counts(data['val'])}": {
        f"best (epoch {best['epoch']})": best["val"], **_with_bank(run, "val"),
        f"final (epoch {last['epoch']})": last["val"], "chance": _chance(data["val"])}}
    if run.test:
        tables[f"Test, best model: {_counts(data['test'])}"] = {
            "test": run.test, **_with_bank(run, "test"), "chance": _chance(data["test"])}
    return tables


def _with_bank(run, split):
    """The best model's metrics with its bank, where it has one."""
    return {"with the bank": run.bank[split]["on"]} if run.bank else {}


def _progress(run):
    history = run.history
    lines = _heading("Training progress (validation, standard protocol)")
    lines.append(f"  {'epoch':>5} {'loss':>9} {'Avg R@1':>9} {'I->T R@1':>9} {'T->I R@1':>9} "
                 f"{'lr':>9} {'seconds':>9}")
    step = math.ceil(len(history) / 12)  # a screenful
    for row in history:
        if row["epoch"] % step == 0 or row in (history[0], history[-1], run.best):
            val, loss = row["val"], row["train"]["loss"]
            lines.append(f"  {row['epoch']:>5} {'-' if loss is None else f'{loss:.4f}':>9} "
                         f"{val['avg_r1']:>9.2f} {val['i2t_r1']:>9.2f} {val['t2i_r1']:>9.2f} "
                         f"{row['lr']:>9.2g} {row['seconds']:>9.1f}")
    return lines


def _description(run):
    config, settings = run.config, run.settings
    lines = _heading("Dataset")
    lines += _facts({"folder": settings.data_dir, "layout": config["layout"]}
                    | {split: _counts(data) for split, data in config["data"].items()})
    lines += _heading("Model")
    lines += _facts({"preset": settings.model, "parameters": f"{config['parameters']:,}",
                     "pretrained encoders": encoders(run)} | settings.model_arguments())
    lines += _heading("Training: SGD with Nesterov momentum, warm-up, cosine")
    said = {"data_dir", "model", "image_encoder", "text_encoder", *settings.model_arguments()}
    lines += _facts({name: value for name, value in config["settings"].items() if name not in said})
    return lines + _facts({
        "precision": config["precision"], "hardware": config["device"], "date": config["date"],
        "PyTorch": config["versions"]["torch"], "Python": config["versions"]["python"]})


def data_name(run):
    """What was validated on: a known data set, else the folder's name."""
    if run.settings.synthetic:
        return "built-in shapes"
    layout = run.config["layout"]
    known = layout.startswith(("Flickr8k", "Flickr30k", "COCO"))
    return layout if known else Path(run.settings.data_dir).resolve().name


def trained_on(run):
    """The training split of a Run in a few words, extra data named apart."""
    total, extra = run.config["data"]["train"], run.config["extra_data"]
    photos = total["photos"] - sum(joined["photos"] for joined in extra)
    captions = total["captions"] - sum(joined["captions"] for joined in extra)
    parts = [f"{photos:,} photos, {captions:,} captions of {data_name(run)}"]
    for joined in extra:
        skipped = sum(joined["skipped"].values())
        parts.append(f"{joined['photos']:,} photos, {joined['captions']:,} captions of "
                     f"{joined['folder']}" + (f" ({skipped:,} left out)" if skipped else ""))
    return " + ".join(parts)


def encoders(run):
    """The pretrained encoders of a Run in a few words."""
    settings = run.settings
    names = [f"{kind} {name}" for kind, name in
             (("image", settings.image_encoder), ("text", settings.text_encoder)) if name]
    if not names:
        return "none, from scratch"
    return " + ".join(names) + (", fine-tuned" if settings.finetune else "")


def _cells(run):
    """-> {column: cell}; the last two where there is room."""
    settings, config, best = run.settings, run.config, run.best
    val = best["val"]
    cells = {
        "run": run.dir.name,
        "data": f"{data_name(run)}, {config['data']['val']['photos']:,} val",
        "trained on": f"{config['data']['train']['captions']:,} pairs" + "".join(
            f", {joined['captions']:,} of {joined['folder']}" for joined in config["extra_data"]),
        "model": f"{settings.model}, {config['parameters'] / 1e6:.1f} M",
        "encoders": encoders(run), "tokens": settings.tokenizer,
        "epochs": f"{best['epoch']} of {run.history[-1]['epoch']}" + ("" if run.finished else "+"),
        "minutes": f"{run.minutes:.1f}", "avg R@1": f"{val['avg_r1']:.2f}",
        "with the bank": f"{run.bank['val']['on']['avg_r1']:.2f}" if run.bank else "-"}
    cells |= {f"R@{k}": f"{val[f'i2t_r{k}']:.1f} / {val[f't2i_r{k}']:.1f}" for k in KS}
    return cells | {
        "MedR": f"{val['i2t_medr']:g} / {val['t2i_medr']:g}",
        "pair R@1": f"{val['pair_avg_r1']:.2f}",
        "hardware, date": f"{config['device']}, {config['date']}",
        "command": f"`{config['command']}`"}


def comparison(runs, form="terminal"):
    """One row a Run, best on validation first, as "terminal" or "markdown" table. Raises
    UsageError for files that do not fit."""
    rows = []
    for run in runs:
        with reading(run):
            rows.append((-run.best["val"]["avg_r1"], _cells(run)))
    rows = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    if form == "markdown":
        return markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    columns = list(rows[0])[:-2]
    table = [columns] + [[row[column] for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
             for row in table]
    note = ("R@K in percent on validation, photo to text / text to photo, of the best epoch; "
            "+: not finished")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], note])


def markdown_table(columns, rows):
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)
