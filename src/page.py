"""What all pages have in common, and the page of the photos that a search found. A page refers to
no other site, and one that is written to a file is that single file."""
import base64
from html import escape
from pathlib import Path

from src.pictures import thumbnail
from src.utils.errors import UsageError

SMALL = 240  # the longer side in pixels of the photos in a file
STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif;
  background: Canvas; color: CanvasText;
  --line: rgb(128 128 128 / .35); --soft: rgb(128 128 128 / .15); --strong: #2a7de1; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; } p { margin: .5rem 0; }
a { color: inherit; } :focus-visible { outline: 3px solid Highlight; outline-offset: 2px; }
header, form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
header { gap: .5rem 1rem; } header form { min-width: 0; max-width: 100%; }
header h1 { margin: 0; } form[role=search] { flex: 1 1 18rem; }
input, button, .button { font: inherit; padding: .4rem .7rem; box-sizing: border-box;
  max-width: 100%; border: 1px solid var(--line); border-radius: .4rem; }
::placeholder { color: inherit; opacity: .8; }
input[type=search] { flex: 1 1 10rem; min-width: 0; border-color: GrayText; }
button, .button { background: var(--soft); color: inherit; cursor: pointer; }
.button:focus-within { outline: 3px solid Highlight; outline-offset: 2px; }
.unseen { position: absolute; width: 1px; height: 1px; padding: 0; border: 0; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
@media (scripting: none) { .button .unseen { position: static; width: auto; height: auto;
  clip-path: none; } }
.warning { border-left: .3rem solid #d97706; padding: .3rem .8rem; font-size: 1.1rem; }
.photos, .runs, .chips { list-style: none; padding: 0; display: grid; gap: 1rem; margin: .5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.chips { display: flex; flex-wrap: wrap; gap: .5rem; }
.chips a { display: block; padding: .3rem .8rem; border-radius: 1rem; text-decoration: none;
  border: 1px solid var(--line); }
.runs { gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.photos li { min-width: 0; font-size: .9rem; } .photos p { margin: .2rem 0; }
.photos img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft);
  border-radius: .3rem; display: block; } .photos .right { outline: 4px solid #09963c; }
.photos a, .view a { display: block; } .view a { width: fit-content; }
.asked { max-width: 9rem; margin-top: 1rem; } footer { margin-top: 2rem; font-size: .9rem; }
.line { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.lines { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.line, .lines, h2, h3, dd, li, input[type=search] { unicode-bidi: plaintext; }
.score { display: flex; gap: .5rem; align-items: center; }
.bar { flex: 1; height: .25rem; border-radius: 1rem; background: var(--soft); }
.bar i { display: block; height: 100%; border-radius: 1rem; background: var(--strong); }
@media (min-width: 60rem) { .view { display: grid; gap: 2rem;
  grid-template-columns: fit-content(calc(100% - 22rem)) 1fr; } }
.view img { max-width: 100%; max-height: 85vh; display: block; }
dl { margin: 0; } dt { font-weight: bold; margin-top: .5rem; } dd { margin: 0; }
#path { user-select: all; }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
table { font-size: .9rem; } .headline { font-size: min(1.2rem, 4.5vw); }
.facts td { overflow-wrap: anywhere; } svg { max-width: 36rem; display: block; }
td, th { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid var(--line); }
th { font-weight: normal; white-space: nowrap; } thead th { font-weight: bold; }
thead th, .headline th, .facts th { white-space: normal; }
td:first-child, th:first-child, .facts td { text-align: left; }
.pairs { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.pairs .photos { grid-template-columns: 1fr 1fr; }
.curves { display: grid; gap: 1rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); } figure { margin: 0; }
@media print { h1, h2, h3, figcaption { break-after: avoid; }
  .pairs > div, .curves, .wide, li { break-inside: avoid; } .wide { overflow: visible; }
  .runs { display: block; } section + section { break-before: page; }
  .curves { grid-template-columns: 1fr 1fr; } }
"""


def document(title, body, script=""):
    """An HTML page. title: plain text. body: HTML. script: JavaScript, or nothing."""
    if script:
        script = f"<script>{script}</script>"
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>\n<body>{body}{script}"
            "</body></html>\n")


def paragraph(text):
    """Plain text as an HTML paragraph."""
    return f"<p>{escape(text)}</p>"


def table(columns, rows, css_class=""):
    """An HTML table of plain texts, whose first column names the rows. Its columns have names, or
    none at all."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}{"".join(f"<td>{escape(str(c))}" for c in cells)}'
        for name, *cells in rows)
    head = "".join(f'<th scope="col">{escape(name)}' if name else "<td>" for name in columns)
    if head:
        head = f"<thead><tr>{head}</thead>"
    return ('<div class="wide" tabindex="0">'  # so that the arrow keys can scroll it
            f'<table class="{css_class}">{head}<tbody>{rows}</table></div>')


def photo_sheet(rows, level=2):
    """Rows of labelled photos as HTML. rows: [(title, [(path, label, marked)])]; a marked photo has
    a green frame. level: of the headings. Raises DataError for a photo that cannot be read."""
    html = ""
    for title, cells in rows:
        html += f'<div><h{level}>{escape(title)}</h{level}><ul class="photos">'
        for photo, label, marked in cells:
            image = base64.b64encode(thumbnail(photo, SMALL)).decode()
            css_class = "right" if marked else ""
            html += (f'<li><img class="{css_class}" src="data:image/jpeg;base64,{image}" alt="">'
                     f"{paragraph(label)}</li>")
        html += "</ul></div>"
    return html


def write(path, title, body):
    """Write a `document` to a file. Raises UsageError if it cannot be written."""
    body = f"<main><h1>{escape(title)}</h1>{body}</main>"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(document(title, body), "utf-8", "replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error})") from None
