"""The HTML of a run (its tables, its curves) and of the photos that a search found. A page is one
file that refers to no other."""
import base64
import io
import re
from html import escape
from pathlib import Path

from src import report
from src.retrieval import KS
from src.utils.errors import UsageError
from src.utils.photo_files import open_photo

THUMBNAIL, SMALL = 300, 180  # the longer side in pixels, of served photos and of those in a file
STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
a { color: inherit; } :focus-visible { outline: 3px solid Highlight; outline-offset: 2px; }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0; }
input, button { font: inherit; padding: .4rem .6rem; max-width: 100%; box-sizing: border-box; }
input[type=search] { flex: 1 1 12rem; } footer, li, table { font-size: .9rem; }
.photos, .runs { list-style: none; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.runs { gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.photos p { margin: .2rem 0; } .asked { max-width: 12rem; } .right { outline: 4px solid #09963c; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: rgb(128 128 128 / .15); }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
.facts td + td { overflow-wrap: anywhere; } svg { max-width: 36rem; }
td, th { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid rgb(128 128 128 / .3); }
td:first-child, th:first-child, .facts td { text-align: left; } figure { margin: 1rem 0; }
@media print { figure, tr, li { break-inside: avoid; } }
"""
CAPTION_CATEGORIES = {  # {name: a regular expression that finds captions of the category}
    "all": "", "8 words or less": r"^(\S+\s+){0,7}\S+\s*$", "15 words or more": r"(\S+\s+){14}\S",
    "people": r"\b(m[ae]n|wom[ae]n|boys?|girls?|child|children|people|person|kids?|player)\b",
    "dogs": r"\b(dogs?|puppy|puppies)\b",
    "numbers": r"\b(two|three|four|five|six|several|group)\b",
    "colours": r"\b(white|black|red|blue|green|yellow|brown|orange|pink|purple|gr[ae]y|blond)\b",
    "water, snow": r"\b(water|ocean|sea|pool|lake|river|beach|waves?|snow|snowy|ice)\b"}


def document(title, body, script=""):
    """An HTML page. title: plain text. body: HTML. script: JavaScript, or nothing."""
    if script:
        script = f"<script>{script}</script>"
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>\n<body>{body}{script}"
            "</body></html>\n")


def thumbnail(photo, pixels=THUMBNAIL):
    """A photo as JPEG bytes, upright, with a longer side of at most so many pixels. photo: a path,
    or an object with `open`. Raises DataError as `open_photo` does."""
    small = open_photo(photo, pixels)
    small.thumbnail((pixels, pixels))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def paragraph(text):
    """Plain text as an HTML paragraph."""
    return f"<p>{escape(text)}</p>"


def table(columns, rows, css_class=""):
    """An HTML table of plain texts. Its columns have names, or none at all."""
    rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}' for cell in row)}" for row in rows)
    head = "".join(f"<th>{escape(name)}" for name in columns)
    return f'<div class="wide"><table class="{css_class}"><tr>{head}{rows}</table></div>'


def svg_curves(title, epochs, lines):
    """Curves over the epochs as an SVG figure. lines: {name: values}, with None for an epoch that
    has no value. The plot is 422 x 200 pixels large, its upper left corner is at (48, 20)."""
    top = max((value for line in lines.values() for value in line if value is not None), default=1)
    top = top or 1  # the loss is 0 where all photos have one caption
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
    parts = []
    for y in (20, 120, 220):
        parts.append(f'<path d="M48 {y}H470" stroke="gray" stroke-width=".5"/>'
                     f'<text x="44" y="{y + 4}" text-anchor="end">{top * (220 - y) / 200:.3g}'
                     "</text>")
    parts.append(f'<text x="48" y="236" text-anchor="start">epoch {first}</text>')
    parts.append(f'<text x="470" y="236" text-anchor="end">{last}</text>')
    colours = ("#2a7de1", "#e0662a", "#0a9b52", "#b04ad8")
    for i, ((name, line), colour) in enumerate(zip(lines.items(), colours)):
        points = [f"{48 + 422 * (epoch - first) / (last - first):.1f},{220 - 200 * value / top:.1f}"
                  for epoch, value in zip(epochs, line) if value is not None]
        # The first point is drawn twice, so that a single one appears as a square.
        parts.append(f'<polyline points="{" ".join(points[:1] + points)}" fill="none" '
                     f'stroke="{colour}" stroke-width="3" stroke-linecap="square"/>'
                     f'<text x="{48 + 108 * i}" y="12" fill="{colour}">{escape(name)}</text>')
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 480 240" role="img" '
            f'aria-label="{title}" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
            "</figure>")


def recall_by_category(title, texts, ranks):
    """A table of R@K for each category of captions, as HTML. texts: the M captions. ranks: (M,) the
    rank of each caption's photo."""
    rows = []
    for name, pattern in CAPTION_CATEGORIES.items():
        members = [i for i, text in enumerate(texts) if re.search(pattern, text.lower())]
        recalls = []
        if members:
            recalls = [f"{100 * (ranks[members] <= k).double().mean():.2f}" for k in KS]
        rows.append([name, f"{len(members):,}", *recalls])
    columns = ["captions", "", *(f"R@{k} (%)" for k in KS)]
    return f"<h2>{escape(title)}</h2>" + table(columns, rows)


def photo_sheet(rows):
    """Rows of labelled photos as HTML. rows: [(title, [(path, label, marked)])]; a marked photo has
    a green frame. Raises DataError for a photo that cannot be read."""
    html = ""
    for title, cells in rows:
        html += f'<h2>{escape(title)}</h2><ul class="photos">'
        for photo, label, marked in cells:
            image = base64.b64encode(thumbnail(photo, SMALL)).decode()
            css_class = "right" if marked else ""
            html += (f'<li><img class="{css_class}" src="data:image/jpeg;base64,{image}" alt="">'
                     f"{paragraph(label)}</li>")
        html += "</ul>"
    return html


def run_section(run, more_html):
    """The tables and the curves of a Run as HTML, followed by more_html. Raises UsageError for a
    run whose files lack something."""
    with report.reading(run):
        config, history = run.config, run.history
        facts = {
            "training": report.training_time(run),
            "trained on": report.trained_on(run),
            "model": f"{run.settings.model}, {config['parameters']:,} parameters",
            "pretrained encoders": report.encoders(run),
            "hardware": config["device"],
            "precision": config["precision"],
            "date": config["date"],
            "command": config["command"],
        }
        html = f"<h1>{escape(str(run.dir))}</h1>" + table([], facts.items(), "facts")
        for title, columns, rows in report.recall_tables(run):
            html += f"<h2>{escape(title)}</h2>" + table(["", *columns], rows)
        html += "".join(paragraph(note) for note in report.recall_notes(run))
        epochs = [row["epoch"] for row in history]
        recalls = {}
        for name, direction in (("I->T", "i2t"), ("T->I", "t2i")):
            for k in (1, 10):
                recalls[f"{name} R@{k}"] = [row["val"][f"{direction}_r{k}"] for row in history]
        html += svg_curves("Recall on validation, in percent", epochs, recalls)
        html += svg_curves("Training loss", epochs, {"": [row["train"]["loss"] for row in history]})
        html += svg_curves("Learning rate at the end of the epoch", epochs,
                           {"": [row["lr"] for row in history]})
    return f"<section>{html}{more_html}</section>"


def write(path, title, body):
    """Write a `document` to a file. Raises UsageError if it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(document(title, body), "utf-8", "replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error})") from None
