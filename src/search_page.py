"""The pages of a search among photos, as HTML. All of them work without JavaScript."""
import collections
import functools
import hashlib
import io
import os
import random
import re
import threading
from html import escape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import torch

from src.page import document, paragraph
from src.pictures import date_taken, full_size, thumbnail
from src.ranking import best_rows
from src.utils.console import counted, first_three, printable
from src.utils.errors import DataError
from src.utils.folder import MAX_LENGTH, cut_text

RESULTS = 24  # photos that a search shows at first
RANDOM_PHOTOS, EXAMPLE_QUERIES = 12, 3  # on the start page
NEAREST_CAPTIONS = 10
THUMBNAIL = 448  # pixels of the longer side: two for each of those that a page shows it on
KEPT_THUMBNAILS, KEPT_UPLOADS = 1000, 20  # they take about 40 MB, and at most 30 MB
# Searches by a picture as soon as it is chosen or dropped on the page; moves the focus through the
# photos by the arrow keys, and to the field by "/"; copies the path of a photo.
SCRIPT = """
const words = document.getElementById("q"), form = document.getElementById("upload");
const file = form.elements.image, copy = document.getElementById("copy");
const say = text => { document.getElementById("status").textContent = text; };
const send = () => { if (file.files.length) form.requestSubmit(); };
const caretToEnd = () => words.setSelectionRange(words.value.length, words.value.length);
caretToEnd();
document.addEventListener("submit", () => say("searching …"));
window.addEventListener("pageshow", () => say(""));
file.addEventListener("change", send);
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault(); file.files = event.dataTransfer.files; send(); });
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const links = [...document.querySelectorAll("ol.photos a")], key = event.key;
  const inWords = document.activeElement == words, at = links.indexOf(document.activeElement);
  const top = link => link.getBoundingClientRect().top;
  const columns = links.filter(link => Math.abs(top(link) - top(links[0])) < 2).length;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  let to = null;
  if (key == "/" && !inWords || key == "ArrowUp" && at >= 0 && at < columns) to = words;
  else if (inWords && key == "ArrowDown") to = links[0];
  else if (at >= 0 && key in steps) to = links[at + steps[key]];
  if (to) { event.preventDefault(); to.focus(); if (to == words) caretToEnd(); }
});
if (copy) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const path = document.getElementById("path");
    getSelection().selectAllChildren(path);
    try { await navigator.clipboard.writeText(path.textContent); say("The path is copied."); }
    catch { say("The path is selected."); }
  });
}
"""


def link(page="/", **fields):
    """The address of a page, escaped for HTML. Fields that are empty are omitted."""
    fields = {name: value for name, value in fields.items() if value != ""}
    return escape(f"{page}?{urlencode(fields)}" if fields else page)


class Refused(Exception):
    """A request that is answered by an error page. Its arguments are the HTTP status and the
    message."""


def page(title, body, words="", has_focus=False, fields=None, footer=""):
    """A page with the form of a search. title: plain text. body, footer: HTML. words: what stands
    in the field. has_focus: whether the field has the focus. fields: the form's hidden fields, by
    which words are added to a picture instead of replacing it."""
    hidden = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">'
                     for name, value in (fields or {}).items() if value)
    label = "Words for the picture" if hidden else "Words"
    autofocus = "autofocus" if has_focus else ""
    return document(title, f"""<header><h1><a href="/">Search photos</a></h1>
<form role="search" action="/"><label for="q" class="unseen">{label}</label>
<input type="search" id="q" name="q" value="{escape(words)}" placeholder="{label}" {autofocus}>
{hidden}<button>Search</button></form>
<form id="upload" action="/upload" method="post" enctype="multipart/form-data">
<label class="button">Picture …
<input type="file" class="unseen" name="image" accept="image/*" required></label>
<noscript><button>Search by picture</button></noscript></form></header>
<main><p id="status" role="status"></p>{body}</main>{footer}""", SCRIPT)


def error_page(message):
    """The page of a request that failed. It tells nothing of the photos, as other sites get it."""
    return page(message, f"<h2>{escape(message)}</h2>")


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
        self.searching = threading.Lock()
        self.decoding = threading.Lock()  # one photo at a time, as a large one needs much memory
        self.uploads = collections.OrderedDict()  # {key: (embedding, thumbnail)}
        self.thumbnail = functools.lru_cache(KEPT_THUMBNAILS)(
            functools.partial(thumbnail, pixels=THUMBNAIL))
        # Photos that are added have no captions, so these rows remain the same.
        self.different_texts = torch.tensor(search.different_texts() if search.texts else [])
        self.prepare()

    def prepare(self):
        """Compute what a search of this gallery needs, so that no query has to wait for it."""
        query = self.search.photo_embeddings[:1]
        self.search.score_photos(query)
        self.search.fits(query)
        self.nearest_captions(query)

    def look_for_photos(self):
        """Add the photos that were added to the folder to the gallery, and leave out those that
        were deleted from it. A photo that was changed is both. The start page says once what
        was found. Photos keep their numbers, since open pages refer to them."""
        with self.searching:
            paths = self.find_photos()
            there = set(paths)
            number_of = {photo: number for number, photo in enumerate(self.search.photos)
                         if number not in self.gone}
            gone = {number for photo, number in number_of.items()
                    if photo not in there or not self.search.cache.is_current(photo)}
            new = [path for path in paths if path not in number_of or number_of[path] in gone]
            unreadable, before = {}, len(self.search.photos)
            self.search.add_photos(new, unreadable)
            self.prepare()
            self.gone |= gone
            self.thumbnail.cache_clear()  # those of changed photos are out of date
            changed = len({self.search.photos[i] for i in gone} & set(self.search.photos[before:]))
            added = counted(len(self.search.photos) - before - changed, "new photo")
            self.note = f"Found: {added}, {changed:,} changed, {len(gone) - changed:,} deleted."
            if unreadable:
                self.note += (f" {len(unreadable):,} cannot be read: "
                              f"{printable(first_three(unreadable.values()))}.")

    def photo(self, number):
        """The path of a photo, by its number in an address."""
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.search.photos):
            raise Refused(404, "There is no photo with that number.")
        return self.search.photos[int(number)]

    def existing_photo(self, number):
        """The path of a photo whose file is there, by its number in an address. Raises DataError
        if it is missing."""
        photo = self.photo(number)
        if not photo.is_file():
            raise DataError(f"{printable(str(photo))}: the file is missing")
        return photo

    def image(self, number, full=False):
        """The media type and the bytes of a photo's thumbnail, or of the photo at full size. A
        photo that cannot be read becomes a grey square with its name."""
        photo = self.photo(number)
        try:
            self.existing_photo(number)
            with self.decoding:
                return full_size(photo) if full else ("image/jpeg", self.thumbnail(photo))
        except (DataError, OSError):
            svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300">'
                   '<rect width="300" height="300" fill="#999"/>'
                   '<text x="150" y="150" text-anchor="middle">'
                   f"{escape(printable(photo.name))}</text>"
                   '<text x="150" y="180" text-anchor="middle">missing or unreadable</text></svg>')
            return "image/svg+xml", svg.encode()

    def add_upload(self, content):
        """Embed a picture, given by its bytes, and return the key of its page. Only the last
        KEPT_UPLOADS pictures are kept, and only in memory."""
        key = hashlib.sha256(content).hexdigest()[:20]
        picture = SimpleNamespace(open=lambda mode: io.BytesIO(content))
        with self.searching:
            try:
                self.uploads[key] = (self.search.embed_photo(picture),
                                     thumbnail(picture, THUMBNAIL))
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

    def answer(self, q="", photo="", upload="", top="", seed=""):
        """The page of a search, as HTML. Raises Refused, and DataError for a photo that is gone.

        q: the words. photo: the number of a photo, or upload: the key of an uploaded picture. top:
        the number of photos to show. seed: an integer, by which the start page draws photos. All of
        them are strings from an address, and optional."""
        words, body = cut_text(q.strip()), ""
        if len(q) > MAX_LENGTH:
            body += paragraph(f"Only the first {MAX_LENGTH:,} characters of the words are read.")
        with self.searching:
            picture, card = self.query_picture(photo, upload)
            if card:
                body += (f'<ul class="photos asked">{card}</ul>'
                         f'<p><a href="{link(q=words)}">without the picture</a></p>')
            if words and not self.search.knows(words):
                body += paragraph("The model has learned none of these words. Try other words, in "
                                  "the language of its captions.")
            elif words or card:
                body += self.results(words, picture, q=words, photo=photo, upload=upload, top=top)
            else:
                note, self.note = self.note, ""  # later it would no longer be true
                body += (paragraph(note) if note else "") + self.start(seed)
        return page(words or "Search photos", body, words, has_focus=True,
                    fields={"photo": photo, "upload": upload}, footer=self.footer_html())

    def query_picture(self, photo, upload):
        """The embedding (1, D) of the picture to search by, and its card as HTML. Both are empty
        for a search by words alone."""
        if photo:
            self.existing_photo(photo)
            number = int(photo)
            return self.search.photo_embeddings[number:number + 1], self.card(number)
        if upload:
            embedding, _ = self.upload(upload)
            return embedding, (f'<li><img src="/upload/{upload}" '
                               'alt="the picture that you uploaded"></li>')
        return None, ""

    def results(self, words, picture, **fields):
        """The photos that are found by words, by the embedding (1, D) of a picture, or by both.
        fields: those of this page's address."""
        body = captions = ""
        if words:
            query = self.search.embed_texts([words], picture)
            scores = self.search.score_photos(query)[0]
            meaning = self.search.score_meaning()
        else:
            scores = self.search.similar_photos(picture)
            meaning = "cosine of the picture and the photo"
            captions = self.nearest_captions(picture)
        is_shown = torch.ones(len(scores), dtype=torch.bool)
        is_shown[[*self.gone, *([int(fields["photo"])] if fields["photo"] else [])]] = False
        total = int(is_shown.sum())
        if not total:
            return paragraph("There are no other photos to search.") + captions
        lowest = scores[is_shown].min()
        if words and picture is None and self.search.fits(query) is False:
            body += ('<p class="warning"><strong>Nothing fits well,</strong> as the run has '
                     "learned no such words.</p>")
        top = max(1, int(fields["top"])) if re.fullmatch("[0-9]{1,6}", fields["top"]) else RESULTS
        rows = best_rows(scores.masked_fill(~is_shown, -torch.inf), min(top, total))
        body += (f"<h2>{len(rows):,} of {total:,} photos, best first</h2>"
                 f"{paragraph(f'The number is the {meaning}.')}"
                 f"{self.grid(rows, fields, scores[rows], lowest)}")
        if top < total:
            body += f'<p><a href="{link(**fields | {"top": 2 * top})}">more</a></p>'
        return body + captions

    def start(self, seed):
        """Example queries and photos at random."""
        seed = seed if re.fullmatch("[0-9]{1,9}", seed) else str(random.randrange(10 ** 6))
        draw, count = random.Random(seed), len(self.search.photos)
        chips = ""
        for query in draw.sample(self.example_queries,
                                 min(EXAMPLE_QUERIES, len(self.example_queries))):
            query = query.rstrip(" .") or query
            chips += f'<li><a href="{link(q=query)}">{escape(query)}</a></li>'
        if chips:
            chips = f'<h2>For example</h2><ul class="chips">{chips}</ul>'
        numbers = draw.sample(range(count), min(count, RANDOM_PHOTOS + len(self.gone)))
        numbers = [number for number in numbers if number not in self.gone][:RANDOM_PHOTOS]
        return (f"{chips}<h2>{len(numbers)} of {count - len(self.gone):,} photos, at random</h2>"
                f'{self.grid(numbers, {"seed": seed})}')

    def nearest_captions(self, embedding):
        """The different captions that are nearest to a photo, each a link to its own photo, or to
        the first of those that share it."""
        if not self.search.texts:
            return ""
        scores = self.search.score_captions(embedding)[0, self.different_texts]
        items = ""
        for i in best_rows(scores, NEAREST_CAPTIONS):
            row = int(self.different_texts[i])
            href = link(f"/view/{self.search.photo_of_text[row]}")
            items += f'<li>{scores[i]:z.3f} <a href="{href}">{escape(self.search.texts[row])}</a>'
        return (f"<h2>Nearest captions</h2>"
                f"{paragraph(f'The number is the {self.search.score_meaning()}.')}<ol>{items}</ol>")

    def grid(self, numbers, fields, scores=(), lowest=0):
        """Photos by their numbers. fields: those of the address of this page. scores: those of
        these photos, the highest first. lowest: the lowest of all photos', where a bar begins."""
        cards = ""
        for i, number in enumerate(numbers):
            score = ""
            if len(scores):
                width = 100 * (scores[i] - lowest) / (scores[0] - lowest).clamp(min=1e-9)
                score = (f'<p class="score"><b>{scores[i]:z.3f}</b>'
                         f'<span class="bar"><i style="width:{width:.0f}%"></i></span></p>')
            cards += self.card(number, fields, score)
        return f'<ol class="photos">{cards}</ol>'

    def card(self, number, fields=None, score=""):
        """A photo with its name, its first caption, and a link to its view."""
        photo, captions = self.search.photos[number], self.search.captions[number]
        name = escape(printable(photo.name))
        if not photo.is_file():
            return f'<li id="p{number}">{score}<p>{name}: the file is missing</p></li>'
        # Browsers keep the image for long, so its address has to change with the file.
        version = self.search.cache.photo_version(photo)
        alt, lines = name, f'<p class="line" title="{name}">{name}</p>'
        if captions:  # the caption is read aloud once, as the text in place of the photo
            alt = escape(captions[0])
            lines += f'<p class="lines" title="{alt}" aria-hidden="true">{alt}</p>'
        return (f'<li id="p{number}"><a href="{link(f"/view/{number}", **(fields or {}))}">'
                f'<img src="/photo/{number}?v={version}" loading="lazy" alt="{alt}"></a>'
                f"{score}{lines}</li>")

    def view(self, number, **fields):
        """The page of one photo. fields: those of the address of the search that found it."""
        photo, number = self.existing_photo(number), int(number)
        captions = self.search.captions[number]
        name, parent = printable(photo.name), printable(os.path.abspath(photo.parent))
        facts = {"Folder": parent, "Path": printable(os.path.abspath(photo))} if isinstance(
            photo, Path) else {"Archive": parent}
        *rest, (what, path) = facts.items()
        html = "".join(f"<dt>{term}<dd>{escape(value)}" for term, value in rest)
        html += (f'<dt>{what}<dd><code id="path">{escape(path)}</code> '
                 f'<button type="button" id="copy" hidden>Copy path</button>')
        with self.decoding:
            date = date_taken(photo)
        if date:
            html += f"<dt>Taken<dd>{date.day} {date:%B %Y, %H:%M}"
        if captions:
            html += f"<dt>Captions{''.join(f'<dd>{escape(text)}' for text in captions)}"
        file = f"/file/{number}?v={self.search.cache.photo_version(photo)}"
        alt = escape(captions[0]) if captions else escape(name)
        results = "results" if fields.keys() - {"seed"} else "start page"
        body = (f'<p><a href="{link(**fields)}#p{number}">back to the {results}</a> · '
                f'<a href="{link(photo=number)}">more like this</a></p><h2>{escape(name)}</h2>'
                f'<div class="view"><a href="{file}"><img src="{file}" alt="{alt}"></a>'
                f"<dl>{html}</dl></div>")
        return page(name, body, fields.get("q", ""), footer=self.footer_html())

    def footer(self):
        """What is searched, in one line."""
        return f"{self.run} · {len(self.search.photos) - len(self.gone):,} photos {self.place}"

    def footer_html(self):
        look = ""
        if self.find_photos is not None:
            look = ('<form action="/look" method="post"><button>Look for new photos</button>'
                    "</form>")
        return f"<footer>{look}{paragraph(printable(self.footer()))}</footer>"
