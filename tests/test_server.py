"""The pages of a search, by real requests."""
import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import re
import shutil
import signal
import socket
import threading
import time
import zlib
from html import unescape
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from PIL import Image

import show_flickr8k_results
from src import search_page, server
from src.gallery import CACHE, Search, cache_of_run, photos_of_split
from src.utils.photo_files import photos_of_folder
from src.utils.samples import TarMember
from tests.conftest import start_script


@contextlib.contextmanager
def served(search, example_queries=(), find_photos=None):
    with server.Server(0) as http:
        http.pages = search_page.SearchPages(search, "a run", "of val", example_queries,
                                             find_photos)
        thread = threading.Thread(target=http.serve_forever, args=[0.01])
        thread.start()
        try:
            yield SimpleNamespace(port=http.server_port, pages=http.pages, search=search)
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def site(run, shapes):
    search = Search(cache_of_run(run), *photos_of_split(shapes, "val"), use_bank=True)
    search.embed_photos()
    with served(search, example_queries=search.texts) as site:
        yield site


def ask(site, path, method="GET", body=None, **headers):
    """Send a request -> (status, headers, content)."""
    connection = http.client.HTTPConnection(server.HOST, site.port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def look(site, expected_status=200, **fields):
    """The page of a search, as HTML."""
    return look_at(site, "/?" + urlencode(fields), expected_status)


def look_at(site, path, expected_status=200):
    status, headers, content = ask(site, path)
    assert status == expected_status and headers["Content-Type"] == "text/html; charset=utf-8"
    return content.decode()


def shown(html):
    """The photos of the last grid, in order -> [(number, score)]."""
    grid = html.rsplit('<ol class="photos">', 1)[1].split("</ol>")[0]
    return [(int(number), float(score or "nan")) for number, score in re.findall(
        r'src="/photo/(\d+)\?[^>]*></a>(?:<p class="score"><b>([-.\d]*)</b>)?', grid)]


def form(content, name="a.png"):
    """The body and the headers of an upload, as arguments of `ask`."""
    head = f'Content-Disposition: form-data; name="image"; filename="{name}"'
    body = b"\r\n".join([b"--xyz", head.encode(), b"", content, b"--xyz--", b""])
    return {"body": body, "Content_Type": "multipart/form-data; boundary=xyz"}


def png(size=(40, 30), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def expected(scores, leave_out=None):
    """What `shown` should give of the page of one query. scores: (N,)."""
    order = scores.argsort(descending=True, stable=True).tolist()
    return [(i, pytest.approx(scores[i].item(), abs=6e-4)) for i in order if i != leave_out]


def test_a_search_by_words(site):
    search, text = site.search, "two red circles & a \"square\""
    html = look(site, q=text)
    scores = search.score_photos(search.embed_texts([text]))[0]
    assert shown(html) == expected(scores)
    assert f"The number is the {search.score_meaning()}." in html
    bars = [int(width) for width in re.findall('style="width:([0-9]+)%"', html)]
    assert bars[0] == 100 and bars == sorted(bars, reverse=True) and bars[-1] == 0
    assert 'value="two red circles &amp; a &quot;square&quot;"' in html  # kept in the box
    assert "12 of 12 photos" in html and "Nearest captions" not in html
    for i, captions in enumerate(search.captions):
        assert unescape(html).count(captions[0]) >= 1 and search.photos[i].name in html
    html = look(site, q=text, top=5)
    assert shown(html) == expected(scores)[:5] and "5 of 12 photos" in html
    more = unescape(re.search(r'href="([^"]*)">more', html)[1])
    assert len(shown(ask(site, more)[2].decode())) == 10


def test_a_search_by_a_photo(site):
    search = site.search
    html = look(site, photo=3)
    query = search.photo_embeddings[3:4]
    assert shown(html) == expected(search.similar_photos(query), leave_out=3)
    scores = search.score_captions(query)[0]
    first = scores.argmax()
    captions = html.split("Nearest captions")[1]
    assert unescape(re.search("<li>(.*?)<li>", captions)[1]) == (
        f'{scores[first]:.3f} <a href="/view/{search.photo_of_text[first]}">'
        f"{search.texts[first]}</a>")
    html = look(site, photo=3, q="two red circles")
    query = search.embed_texts(["two red circles"], search.photo_embeddings[3:4])
    assert shown(html) == expected(search.score_photos(query)[0], leave_out=3)
    assert '<input type="hidden" name="photo" value="3">' in html
    for photo in (-1, 12, "x", "٣", "1" * 30):
        assert "There is no photo with that number" in look(site, 404, photo=photo)


def test_a_search_by_an_uploaded_picture(site, run, monkeypatch):
    search = site.search
    before = sorted(path.name for path in run.iterdir())
    content = search.photos[5].read_bytes()
    status, headers, _ = ask(site, "/upload", "POST", **form(content))
    assert status == 303
    html = ask(site, headers["Location"])[2].decode()
    first = shown(html)[0]
    assert first == (5, 1.0) and "the picture that you uploaded" in html
    key = headers["Location"].rsplit("=", 1)[1]
    status, headers, small = ask(site, f"/upload/{key}")
    assert status == 200 and Image.open(io.BytesIO(small)).format == "JPEG"
    picture = search.embed_photo(search.photos[5])
    query = search.embed_texts(["red"], picture)
    assert shown(look(site, upload=key, q="red")) == expected(search.score_photos(query)[0])
    assert sorted(path.name for path in run.iterdir()) == before
    monkeypatch.setattr(search_page, "KEPT_UPLOADS", 2)
    for colour in ("red", "green", "blue"):
        assert ask(site, "/upload", "POST", **form(png(colour=colour)))[0] == 303
    assert len(site.pages.uploads) == 2
    assert "no longer kept" in look(site, 410, upload=key)
    assert ask(site, f"/upload/{key}")[0] == 410


def test_the_first_page(site):
    html = look(site)
    assert len(shown(html)) == 12 and "12 of 12 photos, at random" in html
    examples = [unescape(text) for text in re.findall(r'"/\?q=[^"]*">(.*?)</a>', html)]
    assert len(examples) == 3
    assert set(examples) <= {text.rstrip(" .") for text in site.search.texts}
    assert "a run · 12 photos of val" in html and "Look for new photos" not in html
    assert "autofocus" in html
    assert html.count('type="file"') == 1 and "<noscript><button>" in html
    link = unescape(re.search(r'href="/view/\d+(\?seed=\d+)"', html)[1])
    assert shown(ask(site, "/" + link)[2].decode()) == [  # the way back finds the same photos
        (number, pytest.approx(float("nan"), nan_ok=True)) for number, _ in shown(html)]
    assert look(site, q="   ").count("at random") == 1
    headers = ask(site, "/")[1]
    policy = headers["Content-Security-Policy"]
    script = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = server.base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r'(src|href|action)="(?!/|data:)', html)  # nothing from elsewhere
    status, headers, content = ask(site, "/", "HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 1000 and content == b""


def test_words_that_the_model_cannot_read_and_that_are_not_words(site):
    html = look(site, q="日本")
    assert "has learned none of these words" in html and "photos, best first" not in html
    html = look(site, q="red " * 2500)
    assert "Only the first 1,000 characters of the words are read" in html
    assert len(shown(html)) == 12
    assert shown(html) == shown(look(site, q=("red " * 250).strip()))
    for query in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\0\n\r \x1b"):
        html = look(site, q="red" + query)
        assert "alert(1)<" not in html and "<img src=x" not in html
        assert html.count("<script>") == 1
    assert ask(site, "/?q=%ff%fe&photo=&top=-3&x=1&q=b")[0] == 200
    assert ask(site, "/?" + "&".join(f"q={i}" for i in range(500)))[0] == 200


def test_photos_with_odd_names(run, shapes, tmp_path):
    names = ["<script>alert(1)<.png", "a'b\"c&.png", "ü 日本.png", "gone.png"]
    for name, photo in zip(names, photos_of_split(shapes, "val")[0]):
        shutil.copy(photo, tmp_path / name)
    photos = photos_of_folder(tmp_path)
    search = Search(cache_of_run(run), photos, [[] for _ in photos], use_bank=True)
    search.embed_photos()
    with served(search) as site:
        html = look(site, q="red")
        assert len(shown(html)) == 4 and html.count("<script>") == 1
        assert {unescape(alt) for alt in re.findall('alt="(.*?)"', html)} == set(names)
        assert "Nearest captions" not in look(site, photo=0) and "For example" not in look(site)
        gone = [photo.name for photo in photos].index("gone.png")
        (tmp_path / "gone.png").unlink()
        status, headers, content = ask(site, f"/photo/{gone}")
        assert status == 200 and headers["Content-Type"] == "image/svg+xml"
        assert b"gone.png" in content and b"<script" not in content
        assert "gone.png: the file is missing" in look(site, 410, photo=gone)


def test_the_view_of_a_photo(site):
    search = site.search
    text = "two red circles & more"
    html = look(site, q=text, top=5)
    number = shown(html)[2][0]
    photo = search.photos[number]
    href = unescape(re.search(rf'href="(/view/{number}\?[^"]*)"', html)[1])
    status, _, content = ask(site, href)
    view = unescape(content.decode())
    assert status == 200 and f"<h2>{photo.name}</h2>" in view
    assert f'<code id="path">{photo.absolute()}</code>' in view
    assert f"<dd>{photo.absolute().parent}<" in view and "Taken" not in view
    assert all(caption in view for caption in search.captions[number])
    assert f'<a href="/?photo={number}">more like this</a>' in view
    back = re.search('href="([^"]*)">back to the results', view)[1]
    assert shown(ask(site, back.split("#")[0])[2].decode()) == shown(html)
    assert f'id="{back.split("#")[1]}"' in html  # where the photo is
    status, headers, content = ask(site, re.search('src="(/file/[^"]*)"', view)[1])
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert content == photo.read_bytes()
    assert headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"


def test_the_view_of_photos_of_other_kinds(run, shapes, tmp_path):
    source = Image.open(photos_of_split(shapes, "val")[0][0])
    exif = Image.Exif()
    exif.get_ifd(0x8769)[36867] = "2014:05:02 10:30:05"
    source.save(tmp_path / "a.jpg", exif=exif)
    source.save(tmp_path / "b.tif")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "c.tar").write_bytes(b"0123" + content)
    member = TarMember(tmp_path / "c.tar", "00/<c>.jpg", 4, len(content), 0)
    photos = [tmp_path / "a.jpg", tmp_path / "b.tif", member]
    search = Search(cache_of_run(run), photos, [[]] * 3, use_bank=True)
    search.embed_photos()
    with served(search) as site:
        views = [ask(site, f"/view/{i}")[2].decode() for i in range(3)]
        assert all("<dt>Taken<dd>2 May 2014, 10:30" in views[i] for i in (0, 2))
        assert f'Archive<dd><code id="path">{tmp_path / "c.tar"}</code>' in views[2]
        assert "<h2>00/&lt;c&gt;.jpg</h2>" in views[2] and "back to the start page" in views[2]
        assert ask(site, "/file/0")[2] == ask(site, "/file/2")[2] == content
        _, headers, content = ask(site, "/file/1")
        assert headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(content)).size == source.size
        (tmp_path / "b.tif").unlink()
        html = look_at(site, "/view/1", 410)
        assert "b.tif: the file is missing" in html
        assert b"missing or unreadable" in ask(site, "/file/1")[2]
        assert "There is no photo with that number" in look_at(site, "/view/3", 404)


@pytest.mark.parametrize("answer, is_said", [(False, True), (True, False), (None, False)])
def test_it_is_said_if_nothing_fits(site, monkeypatch, answer, is_said):
    given = []
    monkeypatch.setattr(site.search, "fits", lambda query: given.append(query) or answer)
    assert ("Nothing fits well" in look(site, q="red")) == is_said
    query, = given
    assert query.equal(site.search.embed_texts(["red"]))
    assert "Nothing fits well" not in look(site, photo=3)


def test_thumbnails(site):
    status, headers, content = ask(site, "/photo/0?v=abc")
    assert status == 200 and headers["Cache-Control"].startswith("private, max-age=")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    # With "no-referrer" browsers send a form with the Origin "null", which is refused.
    assert headers["Referrer-Policy"] == "same-origin"
    photo = Image.open(io.BytesIO(content))
    assert photo.format == "JPEG" and max(photo.size) <= search_page.THUMBNAIL
    site.pages.thumbnail.cache_clear()
    for _ in range(3):
        ask(site, "/photo/0")
    assert site.pages.thumbnail.cache_info().hits == 2


def bomb(side):
    """A small PNG file whose header claims side x side pixels."""
    def chunk(name, content):
        crc = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + crc
    head = side.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what, expected_status, message", [
    ("text", 400, "not a picture that can be read"), ("truncated", 400, "damaged"),
    ("empty", 400, "No picture was chosen"), ("none", 400, "No picture was chosen"),
    ("bomb", 413, "more than 89,478,485 pixels"), ("bigger bomb", 400, "not a picture"),
    ("30 MB", 413, "more than 20 MB"), ("no length", 411, "does not state the size"),
    ("wrong length", 411, "does not state the size"), ("another form", 404, "no such page"),
    ("another place", 404, "no such page"),
    ("another site", 403, "only requests to its own address")])
def test_pictures_that_are_refused(site, what, expected_status, message):
    kept = dict(site.pages.uploads)
    given = {"text": form(b"hello"), "truncated": form(png((400, 400))[:200]), "empty": form(b""),
             "bomb": form(bomb(12_000)), "bigger bomb": form(bomb(40_000)),
             "30 MB": form(bytes(30_000_000)), "none": form(b"") | {"body": b"--xyz--\r\n"},
             "another form": {"body": b"image=1"}}.get(what, form(png()))
    path = "/elsewhere" if what == "another place" else "/upload"
    if what == "another site":
        given["Origin"] = "http://example.com"
    if what == "no length":
        given |= {"body": iter([b"x"]), "Transfer_Encoding": "chunked"}
    if what == "wrong length":
        given |= {"body": None, "Content_Length": "-5"}
    status, headers, content = ask(site, path, "POST", **given)
    assert status == expected_status and message in content.decode()
    assert dict(site.pages.uploads) == kept


@pytest.mark.parametrize("path, status", [
    ("/../../etc/passwd", 404), ("/photo/../../../etc/passwd", 404), ("/photo/%2e%2e", 404),
    ("/photo/99", 404), ("/photo/", 404), ("/photo/0/1", 404), ("/upload/x", 410), ("/x", 404),
    ("/?" + "q" * 70_000, 414), ("http://example.com/photo/0", 403)])
def test_addresses(site, path, status):
    found, headers, content = ask(site, path)
    assert found == status and b"root:" not in content
    assert b"<h2>" in content and b'name="q"' in content  # a page with the field of a search
    assert b"a run" not in content and b"of val" not in content  # other sites may get it


@pytest.mark.parametrize("host, status", [
    # Port 80 is not named, and a tunnel may have any port.
    ("127.0.0.1", 200), ("localhost", 200), ("127.0.0.1:1", 200), ("LOCALHOST:9000", 200),
    ("[::1]:9000", 200), ("127.0.1.1:PORT", 200), ("localhost:PORT", 200), ("localhost.", 200),
    ("localhost.example", 403), ("localhost..", 403),
    ("example.com", 403), ("", 403), ("example.com:PORT", 403), ("my-box.lan:PORT", 403),
    ("localhost.example.com:PORT", 403), ("127.0.0.1.example.com:PORT", 403),
    ("example.com@localhost:PORT", 403), ("localhost:PORT@example.com", 403),
    ("127.example.com", 403), ("128.0.0.1:PORT", 403), ("10.127.0.0.1", 403),
    ("localhost:x", 403), ("localhost/", 403), ("[::2]", 403), ("0.0.0.0:PORT", 403)])
def test_only_requests_to_the_loopback_address_are_answered(site, host, status):
    for path in ("/", "/photo/0"):
        found, _, content = ask(site, path, Host=host.replace("PORT", str(site.port)))
        assert found == status and (status == 200 or b"photo" not in content.split(b"<h1>")[0][-9:])


@pytest.mark.parametrize("origin, status", [
    ("http://127.0.0.1:PORT", 303), ("http://localhost:9000", 303), ("http://localhost", 303),
    ("https://localhost:9000", 303), ("http://[::1]:9000", 303),
    ("null", 403), ("", 403), ("http://example.com", 403), ("http://example.com:PORT", 403),
    ("http://localhost.example.com", 403), ("http://127.0.0.1@example.com", 403),
    ("http://127.0.0.1:PORT.example.com", 403), ("file://", 403), ("localhost", 403)])
def test_only_pages_of_the_loopback_address_may_send_a_picture(site, origin, status):
    origin = origin.replace("PORT", str(site.port))
    assert ask(site, "/upload", "POST", Origin=origin, **form(png()))[0] == status


def test_a_gallery_of_one_photo_holds_none_like_it(run, shapes):
    photos, captions = photos_of_split(shapes, "val")
    search = Search(cache_of_run(run), photos[:1], captions[:1], use_bank=True)
    search.embed_photos()
    with served(search) as site:
        assert "1 of 1 photos, best first" in look(site, q="red")
        for words in ("", "red"):
            html = look(site, photo=0, q=words)
            assert "There are no other photos to search." in html
            assert 'class="score"' not in html


def test_photos_are_added_changed_and_deleted_while_it_serves(run, shapes, tmp_path, capfd):
    sources = photos_of_split(shapes, "val")[0]
    for name, photo in zip(("a.png", "b.png", "c.png"), sources):
        shutil.copy(photo, tmp_path / name)
    photos = photos_of_folder(tmp_path)
    search = Search(cache_of_run(run), photos, [[] for _ in photos], use_bank=True)
    search.embed_photos()
    with served(search, find_photos=lambda: photos_of_folder(tmp_path)) as site:
        def press():
            status, headers, _ = ask(site, "/look", "POST", Origin=f"http://localhost:{site.port}")
            assert (status, headers["Location"]) == (303, "/")
            return look(site)

        assert "Look for new photos" in look(site)
        assert "Found: 0 new photos, 0 changed, 0 deleted." in press()
        assert "Found: " not in look(site)
        old = {number: site.pages.photo(str(number)) for number in range(3)}
        picture = ask(site, "/photo/1")[2]

        (tmp_path / "a.png").unlink()
        html = look(site, q="red")
        assert "a.png: the file is missing" in html and len(shown(html)) == 2
        assert b"missing or unreadable" in ask(site, "/photo/0")[2]
        assert "a.png: the file is missing" in look(site, 410, photo=0)

        shutil.copy(sources[3], tmp_path / "0.png")
        shutil.copy(sources[4], tmp_path / "b.png")
        (tmp_path / "bad.png").write_text("no photo")
        html = press()
        assert "Found: 1 new photo, 1 changed, 1 deleted." in html
        assert "1 cannot be read: " in html and "bad.png: not an image" in html
        assert "a run · 3 photos of val" in html
        html = look(site, q="red")
        assert "3 of 3 photos, best first" in html and "a.png" not in html
        assert sorted(number for number, _ in shown(html)) == [2, 3, 4]
        assert [site.pages.photo(str(number)).name for number in (3, 4)] == ["0.png", "b.png"]
        assert {number: site.pages.photo(str(number)) for number in range(3)} == old
        assert ask(site, "/photo/4")[2] != picture  # b.png as it is now
        # What was appended is ranked as if it had been there from the start.
        fresh = Search(search.cache, search.photos[2:], [[]] * 3, use_bank=True)
        fresh.embed_photos()
        query = fresh.embed_texts(["red"])
        rank = dict(expected(fresh.score_photos(query)[0]))
        assert dict(shown(html)) == {i + 2: similarity for i, similarity in rank.items()}

        shutil.copy(sources[0], tmp_path / "a.png")  # back again
        assert "Found: 1 new photo, 0 changed, 0 deleted." in press()
        for headers in ({"Origin": "http://example.com"}, {"Host": "example.com"}):
            assert ask(site, "/look", "POST", **headers)[0] == 403
        assert ask(site, "/look")[0] == 404
        shutil.rmtree(tmp_path)
        status, _, content = ask(site, "/look", "POST")
        assert status == 410 and b"there is no such folder" in content
        assert "the file is missing" in look(site, q="red")
    assert capfd.readouterr().err == ""


def test_there_is_nothing_to_look_for_in_a_split(site):
    assert ask(site, "/look", "POST")[0] == 404


def test_other_methods_get_an_error_page(site):
    status, headers, content = ask(site, "/", "DELETE")
    assert status == 501 and b"<h2>Unsupported method" in content


def test_many_requests(site, capfd):
    paths = ["/", "/?q=red", "/?photo=1", "/?photo=1&q=blue", "/photo/2"]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda i: ask(site, paths[i % 5])[0], range(100)))
    assert found == [200] * 100
    connection = http.client.HTTPConnection(server.HOST, site.port, timeout=30)
    for i in range(1000):  # over a connection that is kept
        connection.request("GET", paths[i % 5])
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    connection.close()
    with socket.create_connection((server.HOST, site.port)) as client:  # this one goes away
        client.sendall(b"POST /upload HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 999\r\n"
                       b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" % site.port)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # at once
    with socket.create_connection((server.HOST, site.port)) as client:
        client.sendall(b"\x16\x03\x01 not http at all\r\n\r\n")
        assert b"<title>Bad request" in client.recv(1000)
    time.sleep(0.1)
    assert ask(site, "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_failure_is_reported_in_the_terminal_and_survived(site, capfd, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("no such luck")
    monkeypatch.setattr(site.pages, "answer", fails)
    assert ask(site, "/")[0] == 500
    assert capfd.readouterr().err == "a request failed: RuntimeError: no such luck\n"


def test_serving_from_the_command_line(run, shapes, capsys):
    script = start_script("show_flickr8k_results.py", "--output_dir", run, "--serve", "0",
                          "--split", "val")
    try:
        address = script.stdout.readline()
        pattern = r"http://127\.0\.0\.1:(\d+) \(press Ctrl-C to stop\)\n"
        port = int(re.fullmatch(pattern, address)[1])
        html = look(SimpleNamespace(port=port), q="red")
        assert len(shown(html)) == 12 and f"{run} · 12 photos of val" in html
        taken = ["--output_dir", str(run), "--serve", str(port)]
        assert show_flickr8k_results.main(taken) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"port {port} is not available" in err and err.count("\n") == 1
        script.send_signal(signal.SIGINT)
        out, err = script.communicate(timeout=60)
        assert script.returncode == 130 and out == "" and err.count("\n") == 1
    finally:
        script.kill()


def test_serving_a_folder_takes_examples_from_the_data(run, shapes, tmp_path, monkeypatch):
    shutil.copy(photos_of_split(shapes, "val")[0][0], tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no photo")
    pages = []
    monkeypatch.setattr(server.Server, "serve_forever", lambda http: pages.append(http.pages))
    given = ["--output_dir", str(run), "--serve", "0", "--photos", str(tmp_path)]
    (run / CACHE).unlink(missing_ok=True)
    assert show_flickr8k_results.main(given) == 0
    assert len(pages[0].search.photos) == 1 and "1 photos in" in pages[0].footer()
    assert pages[0].find_photos() == [tmp_path / "a.png", tmp_path / "b.png"]
    first_captions = [captions[0] for captions in photos_of_split(shapes, "val")[1]]
    assert pages[0].example_queries == first_captions


@pytest.mark.parametrize("wrong, message", [
    (["--page", "FOLDER.html"], "cannot be written"),
    (["--page", "sheet.png"], "has to end in .html"),
    (["--serve", "--page", "a.html"], "cannot be combined"),
    (["--serve", "--compare", "a"], "not allowed"),
    (["--serve", "70000"], "70000"),
    (["--serve", "--query", "x"], "cannot be combined"),
    (["--output_dir", "nowhere", "--serve"], "nowhere"),
    (["--output_dir", "a", "b", "--serve"], "take one --output_dir")])
def test_wrong_arguments_give_a_one_line_error(run, tmp_path, capsys, wrong, message):
    given = ["--output_dir", str(run)] * ("--output_dir" not in wrong)
    (tmp_path / "FOLDER.html").mkdir()
    given += [str(tmp_path / word) if "FOLDER" in word else word for word in wrong]
    try:
        status = show_flickr8k_results.main(given)
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
