"""A search among photos in the browser, which `Server` answers. Nothing comes from elsewhere, and
all works without JavaScript."""
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
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlencode, urlsplit

from PIL import Image

from src.page import document, note, thumbnail
from src.utils.captions import MAX_LENGTH, cut_text
from src.utils.console import printable
from src.utils.errors import DataError, UsageError

HOST = "127.0.0.1"
TOP, AT_RANDOM, CAPTIONS, TRIES = 24, 12, 10, 3  # what a page shows of each
MAX_UPLOAD = 20_000_000  # bytes
KEPT_THUMBNAILS, KEPT_UPLOADS = 1000, 20  # about 20 MB, and at most 30 MB
# "searching ...", and searching for a picture as soon as it is chosen, or dropped anywhere.
SCRIPT = """
const form = document.getElementById("upload"), file = form.elements.image;
const send = () => { if (file.files.length) form.requestSubmit(); };
document.addEventListener("submit", () => {
  document.getElementById("status").textContent = "searching …"; });
file.addEventListener("change", send);
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault(); file.files = event.dataTransfer.files; send(); });
"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
HEADERS = {  # nothing from elsewhere, no script but that one, in no other's page
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; form-action 'self'; "
    "style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; "
    f"script-src 'sha256-{SCRIPT_HASH}'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a form's Origin is "null", and refused
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}


def link(**fields):
    """The address of a search."""
    fields = {name: value for name, value in fields.items() if value != ""}
    return escape("/?" + urlencode(fields)) if fields else "/"


class Refused(Exception):
    """A request that gets an error page: its HTTP status, and what is wrong in words."""


def uploaded_picture(content_type, body):
    """The bytes of the file in a form's body. Raises Refused for none, for what is no picture, and
    for more pixels than Pillow takes without a warning."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    contents = [part.get_payload(decode=True) for part in form.iter_parts() if part.get_filename()]
    if not any(contents):
        raise Refused(400, "No picture was chosen.")
    try:
        with Image.open(io.BytesIO(contents[0])) as picture:
            pixels = picture.width * picture.height
    except Exception:  # Pillow's decoders raise anything
        raise Refused(400, "That file is no picture that can be read.") from None
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise Refused(413, f"That picture has more than {Image.MAX_IMAGE_PIXELS:,} pixels.")
    return contents[0]


class SearchPages:
    """The pages of a search; they may be asked for by any number of threads.

    search: a `Search` of `src/inference.py`, its photos embedded. about: the page's last line.
    tries: captions."""

    def __init__(self, search, about, tries):
        self.search, self.about, self.tries = search, about, tries
        self.lock, self.uploads = threading.Lock(), collections.OrderedDict()
        self.thumbnail = functools.lru_cache(KEPT_THUMBNAILS)(thumbnail)

    def photo(self, number):
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.search.photos):
            raise Refused(404, "There is no photo of that number.")
        return self.search.photos[int(number)]

    def image(self, number):
        """-> media type and bytes of a photo's thumbnail; of one that cannot be read, a grey square
        with its name."""
        photo = self.photo(number)
        try:
            with self.lock:  # one at a time, as a large photo takes its memory
                return "image/jpeg", self.thumbnail(photo)
        except DataError:
            return "image/svg+xml", (
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300"><rect width="300" '
                'height="300" fill="#999"/><text x="150" y="150" text-anchor="middle">'
                f"{escape(printable(photo.name))}</text></svg>").encode()

    def add_upload(self, content_type, body):
        """-> the key under which a form's picture is kept while it is among the last."""
        with self.lock:
            content = uploaded_picture(content_type, body)
            key = hashlib.sha256(content).hexdigest()[:20]
            picture = SimpleNamespace(open=lambda mode: io.BytesIO(content))
            try:
                self.uploads[key] = self.search.embed_photo(picture), thumbnail(picture)
            except DataError:
                raise Refused(400, "That picture is damaged.") from None
            while len(self.uploads) > KEPT_UPLOADS:
                self.uploads.popitem(last=False)
        return key

    def upload(self, key):
        if key not in self.uploads:
            raise Refused(410, "That picture is no longer kept here. Choose it once more.")
        return self.uploads[key]

    def answer(self, q="", photo="", upload="", top=""):
        """The page for words, the number of a photo, the key of an upload, all optional; top: how
        many photos to show. Raises Refused."""
        words, notes, shown, picture, found = cut_text(q.strip()), "", "", None, None
        if len(q) > MAX_LENGTH:
            notes = note(f"Of the words, the first {MAX_LENGTH:,} characters are read.")
        readable = not words or self.search.cache.tokenizer.knows(words)
        if not readable:
            notes += note("The model has learned none of these words. Try others, in the language "
                          "of its captions.")
        with self.lock:
            if photo:
                picture, shown = self.search.embed_photo(self.photo(photo)), self.card(int(photo))
            elif upload:
                picture = self.upload(upload)[0]
                shown = f'<li><img src="/upload/{upload}" alt="the picture that you gave"></li>'
            if words and readable:
                found = self.search.photos_for(self.search.embed_texts([words], picture))
            elif picture is not None and readable:
                found = (picture @ self.search.rows.T,) * 2  # the bank is not for two photos
            captions = "" if words or picture is None else self.captions(picture)
        body = ""
        if found:
            top = max(1, int(top)) if re.fullmatch("[0-9]{1,6}", top) else TOP
            order = found[1][0].argsort(descending=True, stable=True).tolist()
            order = [i for i in order if not photo or i != int(photo)]
            by = ", by the bank" if words and self.search.bank else ""
            body = f"<h2>{min(top, len(order)):,} of {len(order):,} photos, best first{by}</h2>"
            body += self.grid(order[:top], found[0][0])
            if top < len(order):
                more = link(q=words, photo=photo, upload=upload, top=2 * top)
                body += f'<p><a href="{more}">more</a></p>'
        elif readable:
            body = self.start()
        if shown:
            shown = (f'<ul class="photos asked">{shown}</ul><p><a href="{link(q=words)}">without '
                     "the picture</a></p>")
        return self.page(words, {"photo": photo, "upload": upload}, notes, shown + captions + body)

    def start(self):
        tries = "".join(f'<li><a href="{link(q=text)}">{escape(text)}</a></li>'
                        for text in random.sample(self.tries, min(TRIES, len(self.tries))))
        number = len(self.search.photos)
        drawn = random.sample(range(number), min(AT_RANDOM, number))
        return (f"<h2>For example</h2><ul>{tries}</ul><h2>{len(drawn)} of {number:,} photos, at "
                f"random</h2>{self.grid(drawn)}")

    def captions(self, latent):
        if not self.search.texts:
            return ""
        (cosines,), (scores,) = self.search.captions_for(latent)
        items = ""
        for i in scores.argsort(descending=True, stable=True)[:CAPTIONS].tolist():
            href = link(photo=self.search.photo_of_text[i])
            items += (f'<li>{cosines[i]:.3f} <a href="{href}">{escape(self.search.texts[i])}</a>'
                      "</li>")
        return f"<h2>Nearest captions</h2><ol>{items}</ol>"

    def grid(self, numbers, cosines=None):
        cards = (self.card(i, "" if cosines is None else f"{cosines[i]:.3f}") for i in numbers)
        return f'<ol class="photos">{"".join(cards)}</ol>'

    def card(self, number, similarity=""):
        photo, captions = self.search.photos[number], self.search.captions[number]
        name = escape(printable(photo.name))
        version = hashlib.sha256(self.search.cache.keys[photo].encode()).hexdigest()[:8]
        said = ""
        if captions:
            more = "".join(map(note, captions[1:]))
            said = f"<details><summary>{escape(captions[0])}</summary>{more}</details>"
        return (f'<li><a href="{link(photo=number)}"><img src="/photo/{number}?v={version}" '
                f'loading="lazy" alt="{escape(captions[0]) if captions else name}"></a>'
                f"<p><b>{similarity}</b> {name}</p>{said}</li>")

    def page(self, words, fields, notes, body):
        """fields: the picture's, for words that are added to it."""
        hidden = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">'
                         for name, value in fields.items() if value)
        label = "Words for the picture" if hidden else "Words"
        return document(words or "Search photos", f"""<h1><a href="/">Search photos</a></h1>
<form role="search"><label for="q">{label}</label>
<input type="search" id="q" name="q" value="{escape(words)}" autofocus>{hidden}
<button>Search</button></form>
<form id="upload" action="/upload" method="post" enctype="multipart/form-data">
<label for="image">or a picture</label>
<input type="file" id="image" name="image" accept="image/*" required>
<button>Search by it</button></form>
<main><div id="status" role="status">{notes}</div>{body}</main>
<footer>{escape(printable(self.about))}</footer>""", SCRIPT)


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection ends with its answer, and its thread."""
    server_version, sys_version, timeout = "photos", "", 10  # seconds that a client may be silent

    def do_GET(self):
        self.guarded(self.get)

    do_HEAD = do_GET

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, method):
        hosts = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        try:
            # A page whose name was made to lead here (DNS rebinding) must not read the photos.
            if (self.headers.get("Host") not in hosts or self.headers.get("Origin")
                    not in (None, *(f"http://{host}" for host in hosts))):
                raise Refused(403, "This server answers to its own address and pages only.")
            method()
        except Refused as refused:
            self.send_error(*refused.args)
        except DataError as error:  # a photo that is gone meanwhile
            self.send_error(410, str(error))
        except (ConnectionError, TimeoutError):  # the client went away
            pass
        except Exception as error:
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)
            self.send_error(500, "Something failed here; the terminal says what.")

    def get(self):
        url, pages = urlsplit(self.path), self.server.pages
        folder, _, name = url.path[1:].partition("/")
        if url.path == "/":
            asked = {name: value for name, value in parse_qsl(url.query)[:20]
                     if name in ("q", "photo", "upload", "top")}
            self.reply(200, "text/html; charset=utf-8", pages.answer(**asked).encode())
        elif folder == "photo":  # whose address changes with the photo
            self.reply(200, *pages.image(name), {"Cache-Control": "private, max-age=31536000"})
        elif folder == "upload":
            self.reply(200, "image/jpeg", pages.upload(name)[1])
        else:
            raise Refused(404, "There is no such page.")

    def post(self):
        length, kind = self.headers.get("Content-Length", ""), self.headers.get("Content-Type", "")
        if self.path != "/upload" or not kind.startswith("multipart/form-data"):
            raise Refused(404, "There is no such page.")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise Refused(411, "The picture's size was not said.")
        if int(length) > MAX_UPLOAD:
            for left in range(min(int(length), 10 * MAX_UPLOAD), 0, -2 ** 16):
                self.rfile.read(min(left, 2 ** 16))  # so that the client comes to read the page
            raise Refused(413, f"That picture has more than {MAX_UPLOAD // 1_000_000} MB.")
        key = self.server.pages.add_upload(kind, self.rfile.read(int(length)))
        self.reply(303, "text/html", b"", {"Location": f"/?upload={key}"})

    def reply(self, status, kind, content, headers=None):
        self.send_response(status)
        headers = HEADERS | {"Content-Type": kind, "Content-Length": len(content)} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """A page that says what is wrong."""
        words = message or self.responses[code][0]
        body = f'<h1>{escape(words)}</h1><p><a href="/">Search photos</a></p>'
        self.reply(code, "text/html; charset=utf-8", document(words, body).encode())

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Answers at the loopback address with `pages`, a SearchPages, which is to be set. Raises
    UsageError for a port that cannot be had."""
    request_queue_size, daemon_threads, pages = 64, False, None

    def __init__(self, port):
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} cannot be had ({error.strerror}); name another with "
                             "--serve PORT") from None

    def handle_error(self, request, client_address):
        pass  # the client went away
