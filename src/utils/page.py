"""What a browser shows of a run: `serve`, a search among photos, and `run_page`, the run in one
file. Nothing is fetched from elsewhere, and all works without JavaScript."""
import base64
import collections
import email
import email.policy
import functools
import hashlib
import io
import random
import re
import sys
import threading
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlencode, urlsplit

from PIL import Image

from src.settings import UsageError
from src.utils import report
from src.utils.flickr8k_simple import MAX_LENGTH
from src.utils.formats import DataError
from src.utils.retrieval import KS
from src.utils.stores import open_photo

HOST = "127.0.0.1"
THUMBNAIL, SMALL, TOP = 300, 180, 24  # longer sides in pixels, served and in a file; photos shown
MAX_UPLOAD = 20_000_000  # bytes
KEPT_THUMBNAILS, KEPT_UPLOADS = 1000, 20  # about 20 MB, and at most 30 MB
STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
a { color: inherit; } :focus-visible { outline: 3px solid Highlight; outline-offset: 2px; }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0; }
input, button { font: inherit; padding: .4rem .6rem; max-width: 100%; box-sizing: border-box; }
input[type=search] { flex: 1 1 12rem; } .small, footer { font-size: .85rem; opacity: .8; }
.photos { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); }
.photos img, .asked { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  background: rgb(128 128 128 / .15); }
.asked { max-width: 12rem; } .photos p { margin: .3rem 0; font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
td, th { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid rgb(128 128 128 / .3); }
td:first-child, th:first-child { text-align: left; }
.runs { display: grid; gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
svg { width: 100%; height: auto; } .right { outline: 4px solid #09963c; }
@media print { body { max-width: none; } figure, tr, li { break-inside: avoid; } }
"""
# Dropping a picture anywhere, searching for one as soon as it is chosen, and "searching ...".
SCRIPT = """
const upload = document.getElementById("upload"), file = upload.elements.image;
const say = text => { document.getElementById("status").textContent = text; };
const send = () => { if (file.files.length) upload.requestSubmit(); };
document.addEventListener("submit", () => say("searching …"));
file.addEventListener("change", send);
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault();
  if (event.dataTransfer.files.length) { file.files = event.dataTransfer.files; send(); }
});
"""


POLICY = ("default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; script-src 'sha256-"
          + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode() + "'")


def document(title, body, script=False):
    """An HTML page. title: plain text; body: HTML."""
    script = f"<script>{SCRIPT}</script>" if script else ""
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style>\n<body>{body}{script}</body></html>\n")


def thumbnail(photo, pixels=THUMBNAIL):
    """A photo's path, or what has `open`, -> JPEG, upright, its longer side of so many pixels.
    Raises DataError as `open_photo` does."""
    small, file = open_photo(photo, pixels), io.BytesIO()
    small.thumbnail((pixels, pixels))
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


class Refused(Exception):
    """A request that gets an error page: HTTP status, and what is wrong in words."""

    def __init__(self, status, words):
        super().__init__(words)
        self.status, self.words = status, words


class Upload:
    """A picture in memory, with as much of Path as `open_photo` takes."""

    def __init__(self, content):
        self.content = content

    def __str__(self):
        return "the picture"

    def open(self, mode="rb"):
        return io.BytesIO(self.content)

    def stat(self):
        return SimpleNamespace(st_size=len(self.content))


def uploaded_picture(content_type, body):
    """The file in the body of a form, as an Upload. Raises Refused for none, and for one of more
    pixels than Pillow takes without a warning."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    parts = [part for part in form.iter_parts() if part.get_filename()]
    content = parts[0].get_payload(decode=True) if parts else b""
    if not content:
        raise Refused(400, "No picture was chosen.")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = picture.width * picture.height
    except Exception:  # Pillow's decoders raise anything
        raise Refused(400, "That file is no picture that can be read.") from None
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise Refused(413, f"That picture has more than {Image.MAX_IMAGE_PIXELS:,} pixels.")
    return Upload(content)


class SearchPages:
    """The pages of a search, from the parts of an address, by any number of threads.

    search: a `Search` of `src/inference.py`, its photos embedded. both: whether the model was
    trained for a photo and a text together. about: the page's last line. examples: captions."""

    def __init__(self, search, both, about, examples):
        self.search, self.both, self.about, self.examples = search, both, about, examples
        self.lock, self.uploads = threading.Lock(), collections.OrderedDict()
        self.thumbnail = functools.lru_cache(KEPT_THUMBNAILS)(thumbnail)

    def photo_of(self, number):
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.search.photos):
            raise Refused(404, "There is no photo of that number.")
        return int(number)

    def add_upload(self, picture):
        """-> a picture's key, under which it is kept while it is among the last."""
        key = hashlib.sha256(picture.content).hexdigest()[:20]
        try:
            small = thumbnail(picture)
            with self.lock:
                self.uploads[key] = *self.search.embed_photo(picture), small
        except DataError as error:
            raise Refused(400, f"{error}.".capitalize()) from None
        while len(self.uploads) > KEPT_UPLOADS:
            self.uploads.popitem(last=False)
        return key

    def upload_of(self, key):
        if key not in self.uploads:
            raise Refused(410, "That picture is no longer kept here. Choose it once more.")
        return self.uploads[key]

    def picture(self, number):
        """-> media type and bytes of a photo's thumbnail; of one that cannot be read a grey square
        with its name."""
        photo = self.search.photos[self.photo_of(number)]
        try:
            return "image/jpeg", self.thumbnail(photo)
        except DataError:
            name = escape(photo.name.encode("utf-8", "replace").decode())
            return "image/svg+xml", (
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300"><rect width="300" '
                'height="300" fill="#999"/><text x="150" y="150" text-anchor="middle" '
                f'font-size="16">{name}</text></svg>').encode()

    def answer(self, asked):
        """{"q": words, "photo": number, "upload": key, "top": number}, texts, all optional -> the
        page, HTML. Raises Refused."""
        query = asked.get("q", "").strip()
        words, notes = query[:MAX_LENGTH], []
        if len(query) > MAX_LENGTH:
            notes.append(f"Of the query, the first {MAX_LENGTH:,} characters are read.")
        given = self.given(asked) if asked.get("photo") or asked.get("upload") else None
        if not words and given is None:
            return self.page(words, None, notes, self.start())
        if words and not self.search.cache.tokenizer.knows(words):
            notes.append("The model has learned none of these words. Try others, in the language "
                         "of the captions that it was trained on.")
            return self.page(words, given, notes, "")
        top = asked.get("top", "")
        top = max(1, int(top)) if re.fullmatch("[0-9]{1,6}", top) else TOP
        with self.lock:
            results = self.results(words, given, top)
        return self.page(words, given, notes, results)

    def given(self, asked):
        """The picture that is asked with: its fields of the address, its embedding (1, D), what the
        model takes of it, as a function, and its number in the gallery, None for an upload."""
        if asked.get("photo"):
            number = self.photo_of(asked["photo"])
            return SimpleNamespace(
                fields={"photo": number}, latent=self.search.rows[number:number + 1], number=number,
                inputs=lambda: self.search.embed_photo(self.search.photos[number])[0],
                image=self.image(number, "asked"))
        key = asked["upload"]
        inputs, latent, _ = self.upload_of(key)
        image = f'<img class="asked" src="/upload/{key}" alt="the picture that you gave">'
        return SimpleNamespace(fields={"upload": key}, latent=latent, number=None,
                               inputs=lambda: inputs, image=image)

    def results(self, words, given, top):
        """What was found, HTML: photos, for a picture alone captions, too."""
        search = self.search
        if words:
            inputs = given.inputs() if given else None
            cosines, scores = search.photos_for(search.embed_texts([words], inputs))
        else:
            cosines = scores = given.latent @ search.rows.T  # the bank is for texts and photos
        order = scores[0].argsort(descending=True, stable=True).tolist()
        order = [i for i in order if given is None or i != given.number]
        cards = "".join(self.card(i, f"{cosines[0, i]:.3f}") for i in order[:top])
        html = (f"<h2>{min(top, len(order)):,} of {len(order):,} photos, best first</h2>"
                f'<ol class="photos">{cards}</ol>')
        if top < len(order):
            fields = ({"q": words} if words else {}) | (given.fields if given else {})
            html += f'<p><a href="{link(fields | {"top": 2 * top})}">more</a></p>'
        if not words and search.texts:
            html = self.captions(given.latent) + html
        return html

    def captions(self, latent):
        cosines, scores = self.search.captions_for(latent)
        items = []
        for i in scores[0].argsort(descending=True, stable=True)[:10].tolist():
            href = link({"photo": self.search.photo_of_text[i]})
            text = escape(self.search.texts[i])
            items.append(f'<li><a href="{href}">{text}</a> <span class="small">'
                         f"{cosines[0, i]:.3f}</span></li>")
        return f"<h2>Nearest captions</h2><ol>{''.join(items)}</ol>"

    def start(self):
        """The first page: photos at random, and queries to try."""
        photos = self.search.photos
        drawn = random.sample(range(len(photos)), min(12, len(photos)))
        tries = random.sample(self.examples, min(3, len(self.examples)))
        tries = "".join(f'<li><a href="{link({"q": text})}">{escape(text)}</a></li>'
                        for text in tries)
        return ((f"<h2>For example</h2><ul>{tries}</ul>" if tries else "")
                + f'<h2>{len(drawn)} of {len(photos):,} photos, at random</h2><ul class="photos">'
                + "".join(map(self.card, drawn)) + "</ul>")

    def image(self, number, css=""):
        photo, captions = self.search.photos[number], self.search.captions[number]
        version = hashlib.sha256(self.search.cache.keys[photo].encode()).hexdigest()[:8]
        return (f'<img class="{css}" src="/photo/{number}?v={version}" loading="lazy" '
                f'alt="{escape(captions[0] if captions else photo.name)}">')

    def card(self, number, similarity=""):
        name, captions = escape(self.search.photos[number].name), self.search.captions[number]
        said = "".join(f"<p>{escape(text)}</p>" for text in captions[1:])
        if captions:
            said = f"<details><summary>{escape(captions[0])}</summary>{said}</details>"
        return (f'<li><a href="{link({"photo": number})}">{self.image(number)}</a>'
                f'<p><b>{similarity}</b> {name}</p><div class="small">{said}</div></li>')

    def page(self, words, given, notes, results):
        hidden = label = shown = ""
        if given is not None:
            label = "Words for it" if self.both else "Words, without the picture"
            if self.both:
                hidden = "".join(f'<input type="hidden" name="{name}" value="{value}">'
                                 for name, value in given.fields.items())
            name = ""
            if given.number is not None:
                name = escape(self.search.photos[given.number].name) + " · "
            without = link({"q": words} if words else {})
            shown = (f'{given.image}<p class="small">{name}<a href="{without}">without the '
                     "picture</a></p>")
        notes = "".join(f"<p>{note}</p>" for note in notes)
        body = f"""<header><h1><a href="/">Search photos</a></h1>
<form action="/" role="search"><label for="q">{label or "Words"}</label>
<input type="search" id="q" name="q" value="{escape(words)}" autofocus>{hidden}
<button>Search</button></form>
<form id="upload" action="/upload" method="post" enctype="multipart/form-data">
<label for="image">or a picture</label><input type="file" id="image" name="image" accept="image/*"
required><button>Search by it</button></form></header>
<main><div id="status" role="status">{notes}</div>{shown}{results}</main>
<footer><p>{escape(self.about)}</p></footer>"""
        title = words or ("photos like it" if given else "Search photos")
        return document(title, body, script=True)


def link(fields):
    return escape("/?" + urlencode(fields)) if fields else "/"


class Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version = "HTTP/1.1", "photos", ""
    timeout = 30  # seconds that a client may be silent

    def do_GET(self):
        self.guarded(self.get)

    do_HEAD = do_GET

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, method):
        hosts = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        try:
            # A page whose name was made to lead here (DNS rebinding) must not read the photos.
            if self.headers.get("Host") not in hosts:
                raise Refused(403, "This server answers to its own address only.")
            if self.headers.get("Origin") not in [None, *(f"http://{host}" for host in hosts)]:
                raise Refused(403, "This server takes pictures from its own pages only.")
            method()
        except Refused as refused:
            self.send_error(refused.status, refused.words)

    def get(self):
        url, pages = urlsplit(self.path), self.server.pages
        if url.path == "/":
            try:
                asked = parse_qs(url.query, max_num_fields=20)
            except ValueError:
                raise Refused(400, "That address has too many fields.") from None
            asked = {name: values[0] for name, values in asked.items()}
            self.reply(200, "text/html; charset=utf-8", pages.answer(asked).encode())
        elif url.path.startswith("/photo/"):
            kind, content = pages.picture(url.path.removeprefix("/photo/"))
            # The address changes with the photo.
            self.reply(200, kind, content, {"Cache-Control": "private, max-age=31536000"})
        elif url.path.startswith("/upload/"):
            self.reply(200, "image/jpeg", pages.upload_of(url.path.removeprefix("/upload/"))[2])
        else:
            raise Refused(404, "There is no such page.")

    def post(self):
        length, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type", "")
        if self.path != "/upload" or not kind.startswith("multipart/form-data"):
            raise Refused(404, "There is no such page.")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(411, "The picture's size was not said.")
        if int(length) > MAX_UPLOAD:
            raise Refused(413, f"That picture has more than {MAX_UPLOAD // 1_000_000} MB.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "The picture did not come whole.")
        key = self.server.pages.add_upload(uploaded_picture(kind, body))
        self.reply(303, "text/html", b"", {"Location": link({"upload": key})})

    def reply(self, status, kind, content, headers=None):
        """The policy: nothing from elsewhere, no script but the page's own, in no other's page."""
        headers = {"Content-Type": kind, "Content-Length": len(content),
                   "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                   "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
                   "Content-Security-Policy": POLICY} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """What is wrong as a page; the connection ends, as what follows may be an unread body."""
        words = message or self.responses.get(code, ("",))[0]
        body = f'<h1>{escape(words)}</h1><p><a href="/">Search photos</a></p>'
        self.close_connection = True
        self.reply(code, "text/html; charset=utf-8", document(words, body).encode(),
                   {"Connection": "close"})

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Of `pages`, a SearchPages, on the loopback address. Raises UsageError for a port that cannot
    be had."""
    request_queue_size, daemon_threads, pages = 64, True, None

    def __init__(self, port):
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} cannot be had ({error.strerror}); name another with "
                             "--serve PORT") from None

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):  # of a client that went away
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)


KINDS = {  # of captions, by the words in them
    "people": "man|men|woman|women|boys?|girls?|child|children|people|person|kids?|baby|players?",
    "dogs": "dogs?|puppy|puppies",
    "colours": "white|black|red|blue|green|yellow|brown|orange|pink|purple|gr[ae]y|tan|blond",
    "numbers": "two|three|four|five|six|several|many|group",
    "water, snow": "water|ocean|sea|pool|lake|river|beach|waves?|snow|snowy|ice",
}


def kinds_table(title, texts, ranks):
    """R@1, R@5, R@10 of captions by kind: of each's words, or by their number. ranks: (M,)."""
    groups = {name: [bool(re.search(rf"\b({words})\b", text.lower())) for text in texts]
              for name, words in KINDS.items()}
    lengths = [len(text.split()) for text in texts]
    groups |= {"up to 8 words": [n <= 8 for n in lengths],
               "9 to 14 words": [8 < n <= 14 for n in lengths],
               "15 words and more": [n > 14 for n in lengths], "all": [True] * len(texts)}
    rows = []
    for name, members in groups.items():
        own = [rank for rank, member in zip(ranks.tolist(), members) if member]
        if own:
            hits = [f"{100 * sum(rank <= k for rank in own) / len(own):.1f}" for k in KS]
            rows.append([name, f"{len(own):,}", *hits])
    columns = ["captions", "number", *(f"R@{k} (%)" for k in KS)]
    return f"<h2>{escape(title)}</h2>" + table(columns, rows)


def table(columns, rows):
    head = "".join(f"<th>{escape(str(name))}" for name in columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{head}{rows}</table></div>'


def curves(title, epochs, lines):
    """Lines over the epochs, as SVG. lines: {name: values, of which None are left out}."""
    width, height, left, bottom = 480, 240, 44, 24
    values = [value for line in lines.values() for value in line if value is not None]
    if not values:
        return ""
    top, last = max(values) or 1, max(epochs[-1], epochs[0] + 1)

    def place(epoch, value):
        x = left + (width - left - 10) * (epoch - epochs[0]) / (last - epochs[0])
        return f"{x:.1f},{(height - bottom) - (height - bottom - 14) * value / top:.1f}"

    parts = []
    for share in (0, 0.5, 1):
        x, y = place(epochs[0], share * top).split(",")
        parts.append(f'<path d="M{x} {y}H{width}" stroke="currentColor" stroke-opacity=".2"/>'
                     f'<text x="{left - 6}" y="{y}" text-anchor="end">{share * top:.3g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join(place(epoch, value) for epoch, value in zip(epochs, line)
                          if value is not None)
        colour = ("#2a7de1", "#e0662a", "#0a9b52", "#b04ad8")[i % 4]
        x, y = points.split()[0].split(",")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>'
                     f'<text x="{left + 12 + 105 * i}" y="11" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">epoch {last}</text>')
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="{title}" font-size="12" fill="currentColor">'
            f"{''.join(parts)}</svg></figure>")


def sheet(rows):
    """What `contact_sheet` takes, HTML, the photos in it."""
    html = ""
    for title, cells in rows:
        html += f'<h2>{escape(title)}</h2><ul class="photos">'
        for photo, label, marked in cells:
            image = base64.b64encode(thumbnail(photo, SMALL)).decode()
            html += (f'<li><img{" class=right" * marked} src="data:image/jpeg;base64,{image}" '
                     f'alt=""><p>{escape(label)}</p></li>')
        html += "</ul>"
    return html


def note(words):
    return f"<p>{escape(words)}</p>"


def run_section(run, shown):
    """What a Run has come to, HTML. shown: more of it, HTML. Raises CheckpointError for files that
    do not fit."""
    with report.reading(run):
        config, history = run.config, run.history
        facts = {"training": report.training(run), "trained on": report.trained_on(run),
                 "model": f"{run.settings.model}, {config['parameters']:,} parameters",
                 "pretrained encoders": report.encoders(run), "hardware": config["device"],
                 "precision": config["precision"], "date": config["date"],
                 "command": config["command"]}
        html = f"<h1>{escape(str(run.dir))}</h1>" + table([], facts.items())
        for title, columns in report.recalls(run).items():
            html += f"<h2>{escape(title)}</h2>" + table(["", *columns], report.recall_rows(columns))
        epochs = [row["epoch"] for row in history]
        recalls = {f"{name} R@{k}": [row["val"][f"{way}_r{k}"] for row in history]
                   for name, way in (("photo to text", "i2t"), ("text to photo", "t2i"))
                   for k in (1, 10)}
        html += curves("Recall on validation, in percent", epochs, recalls)
        html += curves("Loss in training", epochs,
                       {"loss": [row["train"]["loss"] for row in history]})
    return f"<section>{html}{shown}</section>"


def write_runs(sections, path):
    """What `run_section` gives of each run -> one file. Raises UsageError where it cannot be
    written."""
    html = document("Image-text retrieval", f'<div class="runs">{"".join(sections)}</div>')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
