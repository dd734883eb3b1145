"""The download script against a server on this machine, with the faults that real ones have."""
import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import sys
import threading
import zipfile
from unittest import mock

import pytest

import download_flickr8k
from tests.conftest import run_script, write_dataset

TEXT, PHOTOS = "Flickr8k_text.zip", "Flickr8k_Dataset.zip"


def make_archives(folder, dataset, extra=()):
    """The two archives of a small dataset, as the official ones are laid out."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / TEXT, "w") as archive:
        for path in sorted(dataset.glob("*.txt")):
            archive.write(path, path.name)
        archive.writestr("__MACOSX/._readme.txt", "")
    with zipfile.ZipFile(folder / PHOTOS, "w") as archive:
        for path in sorted((dataset / "Flicker8k_Dataset").iterdir()):
            archive.write(path, f"Flicker8k_Dataset/{path.name}")
        archive.writestr("__MACOSX/Flicker8k_Dataset/._1000_abc.jpg", "")
        for name in extra:
            archive.writestr(name, "harm")
    return folder


@pytest.fixture
def archives(tmp_path):
    return make_archives(tmp_path / "archives", write_dataset(tmp_path / "original"))


class Handler(http.server.SimpleHTTPRequestHandler):
    fault = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.server.fault == "break off" and PHOTOS in self.path:
            size = os.path.getsize(self.translate_path(self.path))
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            with open(self.translate_path(self.path), "rb") as file:
                self.wfile.write(file.read(size // 2))
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            super().do_GET()


@contextlib.contextmanager
def serve(folder, fault=None):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
    server.fault, server.requests = fault, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def download(*arguments, md5_of=None, own_process=False, **options):
    """Run the script -> (status, output, errors); the small archives' MD5 stand in for the official
    ones'.

    In a process of its own as a user does, or inside this one, which saves importing torch once
    more.
    """
    md5 = (
        {name: hashlib.md5((md5_of / name).read_bytes()).hexdigest() for name in (TEXT, PHOTOS)}
        if md5_of
        else {}
    )
    if own_process:
        code = (
            "import json, sys, download_flickr8k as script; "
            "script.MD5.update(json.loads(sys.argv[1])); "
            "sys.exit(script.main(sys.argv[2:]))"
        )
        return run_script("-c", code, json.dumps(md5), *arguments, **options)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(download_flickr8k.MD5, md5),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = download_flickr8k.main([str(argument) for argument in arguments])
        finally:
            socket.setdefaulttimeout(None)
    return status, out.getvalue(), err.getvalue()


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_fetch_verify_and_nothing_to_do(tmp_path, archives):
    target = tmp_path / "data"
    with serve(archives) as (server, url):
        status, out, err = download(
            "--data_dir", target, "--url", url, md5_of=archives, own_process=True
        )
        assert (
            status == 0 and "11 photos, 55 captions, complete" in out and "nothing to do" not in out
        )
        before, asked = files(target), len(server.requests)
        assert files(tmp_path / "original").items() <= before.items() and not any(
            "MACOSX" in name for name in before
        )
        status, out, err = download(
            "--data_dir", target, "--url", url, md5_of=archives, own_process=True
        )
        assert (status, err) == (0, "") and "nothing to do" in out
        assert len(server.requests) == asked and files(target) == before


def test_a_download_that_breaks_off_is_mended_by_running_again(tmp_path, archives):
    target = tmp_path / "data"
    with serve(archives, fault="break off") as (server, url):
        status, out, err = download(
            "--data_dir", target, "--url", url, md5_of=archives, own_process=True
        )
        assert status == 1 and PHOTOS in err and "Run again" in err
        assert not (target / "Flicker8k_Dataset").exists() and not (target / PHOTOS).exists()
        server.fault = None
        assert download("--data_dir", target, "--url", url, md5_of=archives)[0] == 0


def test_a_partial_archive_left_by_a_kill_is_fetched_again(tmp_path, archives):
    target = tmp_path / "data"
    target.mkdir()
    (target / PHOTOS).write_bytes((archives / PHOTOS).read_bytes()[:500])
    with serve(archives) as (_, url):
        assert download("--data_dir", target, "--url", url, md5_of=archives)[0] == 0


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_damaged_photos_are_noticed_and_mended(tmp_path, archives, damage):
    target = tmp_path / "data"
    assert download("--data_dir", target, "--archive_dir", archives, md5_of=archives)[0] == 0
    photo = target / "Flicker8k_Dataset" / "1004_abc.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(b"" if damage == "empty" else whole[:len(whole) // 2])
    if damage == "remove":
        photo.unlink()
    (target / "Flicker8k_Dataset" / "mine.jpg").write_bytes(b"my own")
    status, out, _ = download("--data_dir", target, "--archive_dir", archives, md5_of=archives)
    assert status == 0 and "1004_abc.jpg" in out and photo.read_bytes() == whole
    assert (target / "Flicker8k_Dataset" / "mine.jpg").read_bytes() == b"my own"


def test_text_only_completes_kaggles_copy(tmp_path, archives):
    target = tmp_path / "data"
    shutil.copytree(tmp_path / "original" / "Flicker8k_Dataset", target / "Images")
    (target / "captions.txt").write_text("image,caption\n1000_abc.jpg,A dog .\n")
    with serve(archives) as (server, url):
        status, out, err = download(
            "--data_dir", target, "--url", url, "--text_only", md5_of=archives
        )
        assert (
            status == 0
            and "complete" in out
            and not [path for path in server.requests if PHOTOS in path]
        )
    assert (
        "nothing to do"
        in download(
            "--data_dir", target, "--text_only", "--archive_dir", archives, md5_of=archives
        )[1]
    )
    assert (
        "11 photos" in download("--data_dir", target, "--archive_dir", archives, md5_of=archives)[1]
    )


def one_clear_error(result, status, *messages):
    assert result[0] == status, result
    error = [line for line in result[2].splitlines() if line.startswith("error:")]
    assert len(error) == 1 and all(message in result[2] for message in messages), result[2]


def test_no_server_not_found_and_bad_checksum(tmp_path, archives):
    target = tmp_path / "data"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        one_clear_error(
            download("--data_dir", target, "--url", nobody, own_process=True),
            1,
            "no connection",
            "--archive_dir",
        )
    with serve(archives) as (_, url):
        one_clear_error(download("--data_dir", target, "--url", f"{url}/nowhere"), 1, "404", TEXT)
        one_clear_error(
            download("--data_dir", target, "--url", url), 1, "damaged or another file", TEXT
        )
    one_clear_error(download("--data_dir", target, "--url", "no address"), 1, "unknown url type")
    assert files(target) == {}


def test_archive_dir_faults(tmp_path, archives):
    target = tmp_path / "data"
    one_clear_error(
        download("--data_dir", target, "--archive_dir", tmp_path / "none"), 2, "no such archive"
    )
    one_clear_error(
        download("--data_dir", target, "--archive_dir", archives), 2, TEXT, "the MD5 is not"
    )
    (archives / PHOTOS).write_bytes(b"not a zip")
    one_clear_error(
        download("--data_dir", target, "--archive_dir", archives, md5_of=archives), 2, "not a zip"
    )
    assert not (target / "Flicker8k_Dataset").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "Flicker8k_Dataset/../../evil.txt",
        "/tmp/evil.txt",
        "C:/evil.txt",
        "..\\evil.txt",
    ],
)
def test_a_zip_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    archives = make_archives(
        tmp_path / "archives", write_dataset(tmp_path / "original"), extra=[name]
    )
    target = tmp_path / "data"
    one_clear_error(
        download("--data_dir", target, "--archive_dir", archives, md5_of=archives),
        2,
        "refused",
        "leads out",
    )
    assert not (target / "Flicker8k_Dataset").exists() and not list(tmp_path.rglob("evil*"))


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk(tmp_path, archives):
    """A limit on file size fails in the same place as a full disk does, in download and in
    unpacking.
    """
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    target = tmp_path / "data"
    with serve(archives) as (_, url):
        result = download(
            "--data_dir", target, "--url", url, md5_of=archives, own_process=True, preexec_fn=limit
        )
    one_clear_error(result, 1, "disk is full")
    assert not (target / "Flicker8k_Dataset").exists()
    assert download("--data_dir", target, "--archive_dir", archives, md5_of=archives)[0] == 0


def test_an_archive_that_lacks_a_photo_is_not_taken_for_whole(tmp_path):
    original = write_dataset(tmp_path / "original")
    (original / "Flicker8k_Dataset" / "1002_abc.jpg").unlink()
    archives = make_archives(tmp_path / "archives", original)
    one_clear_error(
        download("--data_dir", tmp_path / "data", "--archive_dir", archives, md5_of=archives),
        2,
        "1002_abc.jpg",
    )
