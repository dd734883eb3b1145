"""A comparison of several runs as one table, for the terminal or in markdown."""
import itertools
import textwrap
import unicodedata

from src.report import data_name, encoders, reading
from src.utils.console import printable

# A comparison in the terminal: some columns are too wide for it, and words in which all runs are
# the same are said once. If it is still too wide, words are shortened, to TEXT_WIDTH characters at
# first, and some columns of numbers are left out, in this order.
COMPARISON_WIDTH, TEXT_WIDTH = 100, 24
MARKDOWN_ONLY = ("hardware, date", "command")
BANK_COLUMN = "bank"
TEXT_COLUMNS = ("run", "data", "trained on", "model", "encoders", "tokens")
OPTIONAL_COLUMNS = ("MedR", "R@5", "rsum", "R@10", "minutes")


def comparison(runs, table_format="terminal"):
    """A table with one row for each Run, the best on validation first. table_format: "terminal", or
    "markdown" for all columns. Raises UsageError if the files of a run lack something."""
    rows = []
    for run in runs:
        with reading(run):
            rows.append((run.best["val"]["avg_r1"], _comparison_row(run)))
    rows.sort(key=lambda row: row[0], reverse=True)
    rows = [cells for _, cells in rows]
    columns = list(rows[0])
    if table_format == "markdown":
        return markdown_table(columns, [list(cells.values()) for cells in rows])
    rows = [{BANK_COLUMN if name == "with the bank" else name: printable(cell)
             for name, cell in cells.items() if name not in MARKDOWN_ONLY} for cells in rows]
    common = [name for name in TEXT_COLUMNS[1:] if len({cells[name] for cells in rows}) == 1]
    widths = {name: max(len(name), *(display_width(cells[name]) for cells in rows))
              for name in rows[0] if name not in common}
    _fit_widths(widths)
    lines = []
    for cells in [{name: name for name in widths}, *rows]:
        texts = [shortened(cells[name], width) for name, width in widths.items()]
        padded = [text + " " * (width - display_width(text))
                  for text, width in zip(texts, widths.values())]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(display_width, lines)))
    if common:
        text = "the same for all: " if len(rows) > 1 else ""
        text += "; ".join(f"{name}: {rows[0][name]}" for name in common)
        lines += textwrap.wrap(text, COMPARISON_WIDTH)
    lines.append("R@K in percent on validation, photo to text / text to photo, of the best epoch; "
                 "+: not finished")
    lines.append(f"{BANK_COLUMN}: avg R@1 when ranked with help from training pairs")
    return "\n".join(lines)


def _fit_widths(widths):
    """Make a table's columns, {name: width}, fit the terminal: narrower, or left out."""
    def excess():
        return sum(widths.values()) + 2 * (len(widths) - 1) - COMPARISON_WIDTH

    def narrow(limit):
        words = [name for name in TEXT_COLUMNS if name in widths]
        while excess() > 0 and (widest := max(words, key=widths.get)) and widths[widest] > limit:
            widths[widest] -= 1

    narrow(TEXT_WIDTH)
    for name in OPTIONAL_COLUMNS:
        if excess() > 0:
            del widths[name]
    narrow(1)


def display_width(text):
    """The number of the terminal's columns that a text takes: a character of the wide scripts of
    East Asia takes two, and a mark that combines with the character before it takes none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c)
               for c in text)


def shortened(text, width):
    """A text that takes at most `width` columns, with an ellipsis in the middle of one that would
    take more."""
    if display_width(text) <= width:
        return text

    def beginning(text, width):
        return text[:sum(end <= width for end in itertools.accumulate(map(display_width, text)))]

    head, tail = width // 2, (width - 1) // 2
    return f"{beginning(text, head)}…{beginning(text[::-1], tail)[::-1]}"


def _comparison_row(run):
    """{column: cell} of a Run."""
    settings, config, best, val = run.settings, run.config, run.best, run.best["val"]
    trained_pairs = f"{config['data']['train']['captions']:,} pairs"
    for folder in config["extra_data"]:
        trained_pairs += f", {folder['captions']:,} of {folder['folder']}"
    data = f"{data_name(run)}, {config['data']['val']['photos']:,} val"
    if "different_captions" in config["data"]["val"]:  # runs of earlier versions ranked otherwise
        data += " that share captions"
    epochs = f"{best['epoch']} of {run.history[-1]['epoch']}"
    with_bank = f"{run.bank['val']['with_bank']['avg_r1']:.2f}" if run.bank else "-"
    return {
        "run": run.dir.name,
        "data": data,
        "trained on": trained_pairs,
        "model": f"{settings.model}, {config['parameters'] / 1e6:.1f} M",
        "encoders": encoders(run),
        "tokens": settings.tokenizer,
        "epochs": epochs if run.finished else f"{epochs}+",
        "minutes": f"{run.minutes:.1f}",
        "avg R@1": f"{val['avg_r1']:.2f}",
        "with the bank": with_bank,
        "R@1": f"{val['i2t_r1']:.1f} / {val['t2i_r1']:.1f}",
        "R@5": f"{val['i2t_r5']:.1f} / {val['t2i_r5']:.1f}",
        "R@10": f"{val['i2t_r10']:.1f} / {val['t2i_r10']:.1f}",
        "rsum": f"{val['rsum']:.1f}",
        "MedR": f"{val['i2t_medr']:g} / {val['t2i_medr']:g}",
        "hardware, date": f"{config['device']}, {config['date']}",
        "command": f"`{config['command']}`"}


def markdown_table(columns, rows):
    """columns: names. rows: lists of as many cells."""
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)
