"""The search among photos as a page in the browser. `Server` answers the requests.

The page loads nothing from other sites, and all of it works without JavaScript."""
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

from src.page import document, paragraph, thumbnail
from src.ranking import best_rows, similarities
from src.utils.console import first_three, printable
from src.utils.errors import DataError, UsageError
from src.utils.folder import MAX_LENGTH, cut_text
from src.utils.photo_files import open_reduced

HOST = "127.0.0.1"
# The names of this machine for itself. The port may be another one, where a tunnel leads here.
OWN_ADDRESS = r"(localhost\.?|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?"
RESULTS = 24  # photos that a search shows at first
RANDOM_PHOTOS, EXAMPLE_QUERIES = 12, 3  # on the start page
NEAREST_CAPTIONS = 10
MAX_UPLOAD = 20_000_000  # bytes
KEPT_THUMBNAILS, KEPT_UPLOADS = 1000, 20  # they take about 20 MB, and at most 30 MB
# Shows "searching …", and searches by a picture as soon as it is chosen or dropped on the page.
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
# Browsers may load nothing from other sites, run no script but the one above, and show the page in
# no other site's frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; form-action 'self'; "
    "style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'; "
    f"script-src 'sha256-{SCRIPT_HASH}'",
    "X-Content-Type-Options": "nosniff",
    # With "no-referrer", the Origin of a form would be "null", which is refused.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store"}


def search_link(**fields):
    """The address of a search, escaped for HTML. Fields that are empty are omitted."""
    fields = {name: value for name, value in fields.items() if value != ""}
    return escape("/?" + urlencode(fields)) if fields else "/"


class Refused(Exception):
    """A request that is answered by an error page. Its arguments are the HTTP status and the
    message."""


def uploaded_picture(content_type, body):
    """The bytes of the picture in the body of a form. Raises Refused if there is none, if it cannot
    be read, and if it has more pixels than Pillow accepts without a warning."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    contents = [part.get_payload(decode=True) for part in form.iter_parts() if part.get_filename()]
    if not any(contents):
        raise Refused(400, "No picture was chosen.")
    try:
        with open_reduced(io.BytesIO(contents[0]), 2 ** 16) as picture:  # not reduced
            pixels = picture.width * picture.height
    except Exception:  # Pillow's decoders raise anything
        raise Refused(400, "That file is not a picture that can be read.") from None
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise Refused(413, f"That picture has more than {Image.MAX_IMAGE_PIXELS:,} pixels.")
    return contents[0]


class SearchPages:
    """The pages of a search. Any number of threads may ask for them.

    search: a `Search` whose photos are embedded. run: the name of the run. place: where the photos
    are, such as "of val". example_queries: texts, a few of which the start page offers.
    find_photos: a function that returns the paths of the photos that are there now, or None if none
    are ever added."""

    def __init__(self, search, run, place, example_queries, find_photos=None):
        self.search = search
        self.run, self.place = run, place
        self.example_queries = example_queries
        self.find_photos = find_photos
        self.gone = set()  # numbers of photos that were deleted or changed since they were embedded
        self.note = ""  # what `look_for_photos` has found
        self.lock = threading.Lock()
        self.uploads = collections.OrderedDict()  # {key: (embedding, thumbnail)}
        self.thumbnail = functools.lru_cache(KEPT_THUMBNAILS)(thumbnail)

    def footer(self):
        """The last line of every page."""
        return f"{self.run} · {len(self.search.photos) - len(self.gone):,} photos {self.place}"

    def look_for_photos(self):
        """Add the photos that were added to the folder to the gallery, and leave out those that
        were deleted from it. A photo that was changed is both. The start page then says what was
        found. Photos keep their numbers, since open pages refer to them."""
        with self.lock:
            paths = self.find_photos()
            there = set(paths)
            number_of = {photo: number for number, photo in enumerate(self.search.photos)
                         if number not in self.gone}
            gone = {number for photo, number in number_of.items()
                    if photo not in there or not self.search.cache.is_current(photo)}
            new = [path for path in paths if path not in number_of or number_of[path] in gone]
            unreadable, before = {}, len(self.search.photos)
            self.search.add_photos(new, unreadable)
            self.gone |= gone
            self.thumbnail.cache_clear()  # those of changed photos are out of date
            changed = len({self.search.photos[i] for i in gone} & set(self.search.photos[before:]))
            self.note = (f"Found: {len(self.search.photos) - before - changed:,} new photos, "
                         f"{changed:,} changed, {len(gone) - changed:,} deleted.")
            if unreadable:
                self.note += (f" {len(unreadable):,} cannot be read: "
                              f"{printable(first_three(unreadable.values()))}.")

    def photo(self, number):
        """The path of a photo, by its number in an address."""
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.search.photos):
            raise Refused(404, "There is no photo with that number.")
        return self.search.photos[int(number)]

    def image(self, number):
        """The media type and the bytes of a photo's thumbnail. A photo that cannot be read becomes
        a grey square with its name."""
        photo = self.photo(number)
        try:
            with self.lock:  # decode one at a time, because a large photo needs much memory
                return "image/jpeg", self.thumbnail(photo)
        except DataError:
            svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300">'
                   '<rect width="300" height="300" fill="#999"/>'
                   '<text x="150" y="150" text-anchor="middle">'
                   f"{escape(printable(photo.name))}</text>"
                   '<text x="150" y="180" text-anchor="middle">missing or unreadable</text></svg>')
            return "image/svg+xml", svg.encode()

    def add_upload(self, content_type, body):
        """Embed the picture in the body of a form, and return the key of its page. Only the last
        KEPT_UPLOADS pictures are kept, and only in memory."""
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
        """The embedding and the thumbnail of an uploaded picture."""
        if key not in self.uploads:
            raise Refused(410, "That picture is no longer kept here. Please choose it again.")
        return self.uploads[key]

    def answer(self, q="", photo="", upload="", top=""):
        """The page of a search, as HTML. Raises Refused.

        q: the words. photo: the number of a photo, or upload: the key of an uploaded picture. top:
        the number of photos to show. All of them are strings from an address, and optional."""
        words = cut_text(q.strip())
        notes = ""
        if len(q) > MAX_LENGTH:
            notes += paragraph(f"Only the first {MAX_LENGTH:,} characters of the words are read.")
        readable = not words or self.search.cache.tokenizer.knows(words)
        if not readable:
            notes += paragraph("The model has learned none of these words. Try other words, in the "
                               "language of its captions.")

        body = ""
        scores = None
        with self.lock:
            picture, card = self.query_picture(photo, upload)
            if card:
                body += (f'<ul class="photos asked">{card}</ul>'
                         f'<p><a href="{search_link(q=words)}">without the picture</a></p>')
            if words and readable:
                query = self.search.embed_texts([words], picture)
                scores = self.search.score_photos(query)[0]
            elif picture is not None and not words:
                # The bank ranks photos for texts, not for another photo.
                query = picture
                scores = similarities(query, self.search.photo_embeddings)[0]
                body += self.nearest_captions(picture)

        if scores is not None:
            left_out = self.gone | {int(photo)} if photo else self.gone
            shown = max(1, int(top)) if re.fullmatch("[0-9]{1,6}", top) else RESULTS
            rows = [i for i in best_rows(scores, shown + len(left_out)) if i not in left_out]
            rows, total = rows[:shown], len(scores) - len(left_out)
            cosines = similarities(query, self.search.photo_embeddings[rows])[0].tolist()
            with_bank = ", ranked with the bank" if words and self.search.bank else ""
            body += (f"<h2>{len(rows):,} of {total:,} photos, best first{with_bank}</h2>"
                     f"{self.grid(rows, cosines)}")
            if shown < total:
                more = search_link(q=words, photo=photo, upload=upload, top=2 * shown)
                body += f'<p><a href="{more}">more</a></p>'
        elif readable:
            notes += paragraph(self.note) if self.note else ""
            body += self.start()
        return self.page(words, {"photo": photo, "upload": upload}, notes, body)

    def query_picture(self, photo, upload):
        """The embedding (1, D) of the picture to search by, and its card as HTML. Both are empty
        for a search by words alone."""
        if photo:
            return self.search.embed_photo(self.photo(photo)), self.card(int(photo))
        if upload:
            embedding, _ = self.upload(upload)
            return embedding, (f'<li><img src="/upload/{upload}" '
                               'alt="the picture that you uploaded"></li>')
        return None, ""

    def start(self):
        """Example queries and photos at random."""
        queries = random.sample(self.example_queries,
                                min(EXAMPLE_QUERIES, len(self.example_queries)))
        links = "".join(f'<li><a href="{search_link(q=query)}">{escape(query)}</a></li>'
                        for query in queries)
        numbers = [i for i in range(len(self.search.photos)) if i not in self.gone]
        total = len(numbers)
        drawn = random.sample(numbers, min(RANDOM_PHOTOS, total))
        return (f"<h2>For example</h2><ul>{links}</ul>"
                f"<h2>{len(drawn)} of {total:,} photos, at random</h2>{self.grid(drawn)}")

    def nearest_captions(self, embedding):
        """The different captions that are nearest to a photo, each a link to its own photo, or to
        the first of those that share it."""
        if not self.search.texts:
            return ""
        different = self.search.different_texts()
        scores = self.search.score_captions(embedding)[0, different]
        rows = [different[i] for i in best_rows(scores, NEAREST_CAPTIONS)]
        cosines = similarities(embedding, self.search.text_embeddings[rows])[0].tolist()
        items = ""
        for i, cosine in zip(rows, cosines):
            href = search_link(photo=self.search.photo_of_text[i])
            items += (f'<li>{cosine:.3f} <a href="{href}">{escape(self.search.texts[i])}</a></li>')
        return f"<h2>Nearest captions</h2><ol>{items}</ol>"

    def grid(self, numbers, cosines=None):
        """Photos by their numbers. cosines: those of these photos, which are shown as well."""
        labels = [""] * len(numbers) if cosines is None else [f"{c:.3f}" for c in cosines]
        cards = map(self.card, numbers, labels)
        return f'<ol class="photos">{"".join(cards)}</ol>'

    def card(self, number, similarity=""):
        """A photo with its name, its captions, and a link to a search by it."""
        photo, captions = self.search.photos[number], self.search.captions[number]
        name = escape(printable(photo.name))
        if not photo.is_file():
            return f"<li><p><b>{similarity}</b> {name}: the file is missing</p></li>"
        captions_html = ""
        if captions:
            others = "".join(map(paragraph, captions[1:]))
            captions_html = (f"<details><summary>{escape(captions[0])}</summary>{others}"
                             "</details>")
        # Browsers keep the image for long, so its address has to change with the file.
        version = self.search.cache.photo_version(photo)
        return (f'<li><a href="{search_link(photo=number)}">'
                f'<img src="/photo/{number}?v={version}" loading="lazy" '
                f'alt="{escape(captions[0]) if captions else name}"></a>'
                f"<p><b>{similarity}</b> {name}</p>{captions_html}</li>")

    def page(self, words, picture_fields, notes, body):
        """The whole page. picture_fields: the form's hidden fields, so that words are added to the
        picture instead of replacing it."""
        hidden = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">'
                         for name, value in picture_fields.items() if value)
        label = "Words for the picture" if hidden else "Words"
        look = ""
        if self.find_photos is not None:
            look = ('<form action="/look" method="post"><button>Look for new photos</button>'
                    "</form>")
        return document(words or "Search photos", f"""<h1><a href="/">Search photos</a></h1>
<form role="search"><label for="q">{label}</label>
<input type="search" id="q" name="q" value="{escape(words)}" autofocus>{hidden}
<button>Search</button></form>
<form id="upload" action="/upload" method="post" enctype="multipart/form-data">
<label for="image">or a picture</label>
<input type="file" id="image" name="image" accept="image/*" required>
<button>Search by picture</button></form>
<main><div id="status" role="status">{notes}</div>{body}</main>
<footer>{look}{escape(printable(self.footer()))}</footer>""", SCRIPT)


class Handler(BaseHTTPRequestHandler):
    """Answers one request by HTTP/1.0: the connection, and its thread, end with the answer."""
    server_version, sys_version = "photos", ""
    timeout = 10  # seconds that a client may be silent

    def do_GET(self):
        self.guarded(self.get)

    do_HEAD = do_GET

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, method):
        """Call the method. Whatever it raises becomes an error page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_own = re.fullmatch(OWN_ADDRESS, host, re.IGNORECASE) and (
            origin is None or re.fullmatch(f"https?://{OWN_ADDRESS}", origin, re.IGNORECASE))
        try:
            # Another site must not read the photos by a name that it made lead here (DNS
            # rebinding).
            if not is_own:
                raise Refused(403, "This server answers only requests to its own address and from "
                                   "its own pages.")
            method()
        except Refused as refused:
            self.send_error(*refused.args)
        except DataError as error:  # a photo was deleted after it was embedded
            self.send_error(410, str(error))
        except (ConnectionError, TimeoutError):  # the client went away
            pass
        except Exception as error:
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)
            self.send_error(500, "The search failed; the terminal says why.")

    def get(self):
        url, pages = urlsplit(self.path), self.server.pages
        folder, _, name = url.path[1:].partition("/")
        if url.path == "/":
            fields = {name: value for name, value in parse_qsl(url.query)[:20]
                      if name in ("q", "photo", "upload", "top")}
            self.reply(200, "text/html; charset=utf-8", pages.answer(**fields).encode())
        elif folder == "photo":
            self.reply(200, *pages.image(name), {"Cache-Control": "private, max-age=31536000"})
        elif folder == "upload":
            self.reply(200, "image/jpeg", pages.upload(name)[1])
        else:
            raise Refused(404, "There is no such page.")

    def post(self):
        if self.path == "/look" and self.server.pages.find_photos is not None:
            self.server.pages.look_for_photos()
            self.reply(303, "text/html", b"", {"Location": "/"})
            return
        length = self.headers.get("Content-Length", "")
        content_type = self.headers.get("Content-Type", "")
        if self.path != "/upload" or not content_type.startswith("multipart/form-data"):
            raise Refused(404, "There is no such page.")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise Refused(411, "The request does not state the size of the picture.")
        if int(length) > MAX_UPLOAD:
            # The client reads the error page only after it has sent its data.
            for left in range(min(int(length), 10 * MAX_UPLOAD), 0, -2 ** 16):
                self.rfile.read(min(left, 2 ** 16))
            raise Refused(413, f"That picture has more than {MAX_UPLOAD // 1_000_000} MB.")
        key = self.server.pages.add_upload(content_type, self.rfile.read(int(length)))
        self.reply(303, "text/html", b"", {"Location": f"/?upload={key}"})

    def reply(self, status, content_type, content, headers=None):
        self.send_response(status)
        headers = {**HEADERS, "Content-Type": content_type, "Content-Length": len(content),
                   **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """Send an error page. The base class calls it, too."""
        message = message or self.responses[code][0]
        body = f'<h1>{escape(message)}</h1><p><a href="/">Search photos</a></p>'
        self.reply(code, "text/html; charset=utf-8", document(message, body).encode())

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves `pages`, a SearchPages that has to be set, to this machine alone. Port 0 stands for
    any free one. Raises UsageError if the port is not available."""
    request_queue_size, daemon_threads, pages = 64, False, None

    def __init__(self, port):
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} is not available ({error.strerror}); choose another one "
                             "with --serve PORT") from None

    def handle_error(self, request, client_address):
        pass  # the client went away
