"""The search page by real requests, and the page of a run."""
import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import json
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
from src import page, server
from src.gallery import CACHE, Search, cache_of_run, photos_of_split
from src.runs import BEST, CONFIG, HISTORY
from src.utils.photo_files import photos_of_folder
from tests.conftest import start_script


@contextlib.contextmanager
def served(search, example_queries=(), find_photos=None):
    with server.Server(0) as http:
        http.pages = server.SearchPages(search, "a run", "of val", example_queries, find_photos)
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
    status, headers, content = ask(site, "/?" + urlencode(fields))
    assert status == expected_status and headers["Content-Type"] == "text/html; charset=utf-8"
    return content.decode()


def shown(html):
    """The photos of the last grid, in order -> [(number, similarity)]."""
    grid = html.rsplit('<ol class="photos">', 1)[1]
    return [(int(number), float(similarity or "nan")) for number, similarity in
            re.findall(r'src="/photo/(\d+)\?.*?<b>([-.\d]*)</b>', grid)]


def form(content, name="a.png"):
    """The body and the headers of an upload, as arguments of `ask`."""
    head = f'Content-Disposition: form-data; name="image"; filename="{name}"'
    body = b"\r\n".join([b"--xyz", head.encode(), b"", content, b"--xyz--", b""])
    return {"body": body, "Content_Type": "multipart/form-data; boundary=xyz"}


def png(size=(40, 30), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def expected(search, query, scores, leave_out=None):
    """What `shown` should give of the page of one query (1, D). scores: (1, N)."""
    cosines, scores = (query @ search.photo_embeddings.T)[0], scores[0]
    order = scores.argsort(descending=True, stable=True).tolist()
    return [(i, pytest.approx(cosines[i].item(), abs=6e-4)) for i in order if i != leave_out]


def test_a_search_by_words(site):
    search, text = site.search, "two red circles & a \"square\""
    html = look(site, q=text)
    query = search.embed_texts([text])
    found = query, search.score_photos(query)
    assert shown(html) == expected(search, *found)
    assert 'value="two red circles &amp; a &quot;square&quot;"' in html  # kept in the box
    assert "12 of 12 photos" in html and "Nearest captions" not in html
    for i, captions in enumerate(search.captions):
        assert unescape(html).count(captions[-1]) >= 1 and search.photos[i].name in html
    html = look(site, q=text, top=5)
    assert shown(html) == expected(search, *found)[:5] and "5 of 12 photos" in html
    more = unescape(re.search(r'href="([^"]*)">more', html)[1])
    assert len(shown(ask(site, more)[2].decode())) == 10


def test_a_search_by_a_photo(site):
    search = site.search
    html = look(site, photo=3)
    query = search.photo_embeddings[3:4]
    cosines = query @ search.photo_embeddings.T
    assert shown(html) == expected(search, query, cosines, leave_out=3)
    first = search.score_captions(query)[0].argmax()
    cosines = query @ search.text_embeddings.T
    captions = html.split("Nearest captions")[1].split("</ol>")[0]
    assert unescape(re.search("<li>(.*?)</li>", captions)[1]) == (
        f'{cosines[0, first]:.3f} <a href="/?photo={search.photo_of_text[first]}">'
        f"{search.texts[first]}</a>")
    html = look(site, photo=3, q="two red circles")
    query = search.embed_texts(["two red circles"], search.photo_embeddings[3:4])
    assert shown(html) == expected(search, query, search.score_photos(query), leave_out=3)
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
    assert shown(look(site, upload=key, q="red")) == expected(
        search, query, search.score_photos(query))
    assert sorted(path.name for path in run.iterdir()) == before
    monkeypatch.setattr(server, "KEPT_UPLOADS", 2)
    for colour in ("red", "green", "blue"):
        assert ask(site, "/upload", "POST", **form(png(colour=colour)))[0] == 303
    assert len(site.pages.uploads) == 2
    assert "no longer kept" in look(site, 410, upload=key)
    assert ask(site, f"/upload/{key}")[0] == 410


def test_the_first_page(site):
    html = look(site)
    assert len(shown(html)) == 12 and "12 of 12 photos, at random" in html
    examples = [unescape(text) for text in re.findall(r'"/\?q=[^"]*">(.*?)</a>', html)]
    assert len(examples) == 3 and set(examples) <= set(site.search.texts)
    assert "a run · 12 photos of val" in html and "Look for new photos" not in html
    assert "autofocus" in html
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
        assert "Nearest captions" not in look(site, photo=0) and "For example" in look(site)
        gone = [photo.name for photo in photos].index("gone.png")
        (tmp_path / "gone.png").unlink()
        status, headers, content = ask(site, f"/photo/{gone}")
        assert status == 200 and headers["Content-Type"] == "image/svg+xml"
        assert b"gone.png" in content and b"<script" not in content
        assert "gone.png: the file is missing" in look(site, 410, photo=gone)


def test_thumbnails(site):
    status, headers, content = ask(site, "/photo/0?v=abc")
    assert status == 200 and headers["Cache-Control"].startswith("private, max-age=")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    # With "no-referrer" browsers send a form with the Origin "null", which is refused.
    assert headers["Referrer-Policy"] == "same-origin"
    photo = Image.open(io.BytesIO(content))
    assert photo.format == "JPEG" and max(photo.size) <= page.THUMBNAIL
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
    assert b"<h1>" in content and b"Search photos" in content  # a page, in words


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
        assert "Found: 1 new photos, 1 changed, 1 deleted." in html
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
        rank = dict(expected(fresh, query, fresh.score_photos(query)))
        assert dict(shown(html)) == {i + 2: similarity for i, similarity in rank.items()}

        shutil.copy(sources[0], tmp_path / "a.png")  # back again
        assert "Found: 1 new photos, 0 changed, 0 deleted." in press()
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
    assert status == 501 and b"<h1>Unsupported method" in content


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


def write_page(capsys, out, *runs, more=()):
    status = show_flickr8k_results.main(["--page", str(out), *more, "--output_dir",
                                         *map(str, runs)])
    return status, *capsys.readouterr()


def test_the_page_of_a_run(run, tmp_path, capsys):
    out = tmp_path / "new" / "run.html"
    status, printed, err = write_page(capsys, out, run)
    assert (status, printed, err) == (0, f"wrote {out}\n", "")
    html = out.read_text("utf-8")
    assert len(html) < 2_000_000
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|https?://', html)  # stands alone
    config, history = (json.loads((run / name).read_text()) for name in (CONFIG, HISTORY))
    text = unescape(html)
    best = max(history, key=lambda row: row["val"]["avg_r1"])
    for words in (config["command"], config["device"], "built-in shapes", "chance",
                 "40 photos, 200 captions", "3 of 3 epochs", "with the bank", "Test, best model",
                 f"{best['val']['avg_r1']:.2f}"):
        assert words in text, words
    for figure in ("i2t_r1", "t2i_r10"):
        for row in (best, history[-1]):
            assert f"<td>{row['val'][figure]:.2f}" in html
    assert html.count("<svg") == 3 and html.count("<polyline") == 6
    drawn = []
    for points in re.findall('polyline points="(.*?)"', html):
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        assert [x for x, _ in places] == [48, 48, 259, 470]  # the first one is drawn twice
        assert all(20 <= y <= 220 for _, y in places)
        drawn.append([y for _, y in places[1:]])
    for line, values in zip(drawn[-2:], ([row["train"]["loss"] for row in history],
                                         [row["lr"] for row in history])):
        assert line == [pytest.approx(220 - 200 * value / max(values), abs=0.1)
                        for value in values]
    photos = re.findall(r'src="data:image/jpeg;base64,(.*?)"', html)
    hits, misses = text.count("<h2>hit: "), text.count("<h2>miss: ")
    assert 0 < hits + misses <= 8 and len(photos) == 2 * (hits + misses)
    counts = dict(re.findall(r"<tr><td>([^<]*)<td>([\d,]+)<td>", html))
    assert counts["all"] == "40" and 0 < int(counts["colours"]) <= 40


def test_the_page_of_several_runs_one_of_which_is_still_training(run, tmp_path, capsys):
    training = shutil.copytree(run, tmp_path / "<i>training")
    rows = json.loads((run / HISTORY).read_text())
    (training / HISTORY).write_text(json.dumps(rows[:1]))
    lost = shutil.copytree(run, tmp_path / "lost")
    (lost / BEST).unlink()
    out = tmp_path / "runs.html"
    status, printed, err = write_page(capsys, out, run, training, lost, more=["--split", "val"])
    assert status == 0 and err.count("\n") == 1 and "lost: no photos on the page" in err
    html = out.read_text("utf-8")
    assert html.count("<section>") == 3 and "1 of 3 epochs" in html and "<i>" not in html
    assert "no best model yet" in html and html.count("<svg") == 9


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
