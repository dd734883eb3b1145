"""Answers browsers on this machine by HTTP with the pages of a search."""
import base64
import email
import email.policy
import hashlib
import io
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from src.search_page import SCRIPT, Refused, error_page
from src.utils.errors import DataError, UsageError
from src.utils.photo_files import open_reduced

HOST = "127.0.0.1"
# The names of this machine for itself. The port may be another one, where a tunnel leads here.
OWN_ADDRESS = r"(localhost\.?|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?"
MAX_UPLOAD = 20_000_000  # bytes
HTML = "text/html; charset=utf-8"
FIELDS = ("q", "photo", "upload", "top", "seed")  # of an address, see `SearchPages.answer`
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Browsers may load nothing from other sites, run no script but that of the pages, and show them in
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
FOR_LONG = {"Cache-Control": "private, max-age=31536000"}


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
        fields = {name: value for name, value in parse_qsl(url.query)[:20] if name in FIELDS}
        if url.path == "/":
            self.reply(200, HTML, pages.answer(**fields).encode())
        elif folder == "view":
            self.reply(200, HTML, pages.view(name, **fields).encode())
        elif folder in ("photo", "file"):
            self.reply(200, *pages.image(name, full=folder == "file"), FOR_LONG)
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
        content = uploaded_picture(content_type, self.rfile.read(int(length)))
        key = self.server.pages.add_upload(content)
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
        self.reply(code, HTML, error_page(message).encode())

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves `pages`, a SearchPages that has to be set, to this machine alone. Port 0 stands for
    any free one. Raises UsageError if the port is not available."""
    request_queue_size, daemon_threads, pages = 64, False, None
    allow_reuse_address = os.name == "posix"  # on Windows two servers would share a port

    def __init__(self, port):
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} is not available ({error.strerror}); choose another one "
                             "with --serve PORT") from None

    def handle_error(self, request, client_address):
        pass  # the client went away
