"""The download script, run against a server on this machine that fails as real servers do."""
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


def make_archives(folder, dataset, extra_entries=()):
    """Pack a small dataset into two archives with the structure of the official ones."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / TEXT, "w") as archive:
        for path in sorted(dataset.glob("*.txt")):
            archive.write(path, path.name)
        archive.writestr("__MACOSX/._readme.txt", "")
    with zipfile.ZipFile(folder / PHOTOS, "w") as archive:
        for path in sorted((dataset / "Flicker8k_Dataset").iterdir()):
            archive.write(path, f"Flicker8k_Dataset/{path.name}")
        archive.writestr("__MACOSX/Flicker8k_Dataset/._1000_abc.jpg", "")
        for name in extra_entries:
            archive.writestr(name, "harm")
    return folder


@pytest.fixture
def archives(tmp_path):
    return make_archives(tmp_path / "archives", write_dataset(tmp_path / "original"))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. It can drop the connection in the middle of the photos' archive."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if not (self.server.drops_connection and PHOTOS in self.path):
            super().do_GET()
            return
        size = os.path.getsize(self.translate_path(self.path))
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        with open(self.translate_path(self.path), "rb") as file:
            self.wfile.write(file.read(size // 2))
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve(folder, drops_connection=False):
    """Serve a folder while the block runs. Yields the server and its address."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
    server.drops_connection, server.requests = drops_connection, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def download(*arguments, md5_of=None, own_process=False, **options):
    """Run the script and return (exit status, output, errors).

    md5_of: the folder of small archives whose MD5 replace those of the official ones. own_process:
    whether the script runs in a process of its own, as it does for a user. By default it runs
    inside this one, which saves importing torch again."""
    md5 = {}
    if md5_of is not None:
        md5 = {name: hashlib.md5((md5_of / name).read_bytes()).hexdigest()
               for name in (TEXT, PHOTOS)}
    if own_process:
        code = ("import json, sys, download_flickr8k as script; "
                "script.MD5.update(json.loads(sys.argv[1])); "
                "sys.exit(script.main(sys.argv[2:]))")
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


def read_files(folder):
    """Return {path inside the folder: content} of all files below it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def assert_error(result, status, *messages):
    """The script ended with this exit status and with one error, which contains the messages."""
    assert result[0] == status, result
    errors = [line for line in result[2].splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result[2]
    assert all(message in result[2] for message in messages), result[2]


def test_the_dataset_is_downloaded_once_and_then_only_checked(tmp_path, archives):
    target = tmp_path / "data"
    with serve(archives) as (server, url):
        flags = ["--data_dir", target, "--url", url]
        status, out, err = download(*flags, md5_of=archives, own_process=True)
        assert status == 0
        assert "11 photos, 55 captions, complete" in out
        assert "nothing to do" not in out
        before, requests = read_files(target), len(server.requests)
        assert read_files(tmp_path / "original").items() <= before.items()
        assert not any("MACOSX" in name for name in before)

        status, out, err = download(*flags, md5_of=archives, own_process=True)
        assert (status, err) == (0, "")
        assert "nothing to do" in out
        assert len(server.requests) == requests
        assert read_files(target) == before


def test_a_lost_connection_is_repaired_by_running_the_script_again(tmp_path, archives):
    target = tmp_path / "data"
    with serve(archives, drops_connection=True) as (server, url):
        flags = ["--data_dir", target, "--url", url]
        status, out, err = download(*flags, md5_of=archives, own_process=True)
        assert status == 1
        assert PHOTOS in err and "Run the script again" in err
        assert not (target / "Flicker8k_Dataset").exists()
        assert not (target / PHOTOS).exists()
        server.drops_connection = False
        assert download(*flags, md5_of=archives)[0] == 0


def test_a_partial_archive_that_a_killed_run_left_is_downloaded_again(tmp_path, archives):
    target = tmp_path / "data"
    target.mkdir()
    (target / PHOTOS).write_bytes((archives / PHOTOS).read_bytes()[:500])
    with serve(archives) as (_, url):
        assert download("--data_dir", target, "--url", url, md5_of=archives)[0] == 0


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_damaged_photos_are_noticed_and_restored(tmp_path, archives, damage):
    target = tmp_path / "data"
    flags = ["--data_dir", target, "--archive_dir", archives]
    assert download(*flags, md5_of=archives)[0] == 0
    photo = target / "Flicker8k_Dataset" / "1004_abc.jpg"
    original = photo.read_bytes()
    photo.write_bytes(b"" if damage == "empty" else original[:len(original) // 2])
    if damage == "remove":
        photo.unlink()
    (target / "Flicker8k_Dataset" / "mine.jpg").write_bytes(b"a file of the user")

    status, out, _ = download(*flags, md5_of=archives)
    assert status == 0 and "1004_abc.jpg" in out
    assert photo.read_bytes() == original
    assert (target / "Flicker8k_Dataset" / "mine.jpg").read_bytes() == b"a file of the user"


def test_text_only_completes_the_copy_of_kaggle(tmp_path, archives):
    target = tmp_path / "data"
    shutil.copytree(tmp_path / "original" / "Flicker8k_Dataset", target / "Images")
    (target / "captions.txt").write_text("image,caption\n1000_abc.jpg,A dog .\n")
    with serve(archives) as (server, url):
        status, out, err = download("--data_dir", target, "--url", url, "--text_only",
                                    md5_of=archives)
        assert status == 0 and "complete" in out
        assert not [path for path in server.requests if PHOTOS in path]
    flags = ["--data_dir", target, "--archive_dir", archives]
    assert "nothing to do" in download(*flags, "--text_only", md5_of=archives)[1]
    assert "11 photos" in download(*flags, md5_of=archives)[1]


def test_a_failed_download_says_why(tmp_path, archives):
    target = tmp_path / "data"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = download("--data_dir", target, "--url", nobody, own_process=True)
        assert_error(result, 1, "there is no connection", "--archive_dir")
    with serve(archives) as (_, url):
        result = download("--data_dir", target, "--url", f"{url}/nowhere")
        assert_error(result, 1, "404", TEXT)
        result = download("--data_dir", target, "--url", url)
        assert_error(result, 1, "is damaged, or another one", TEXT)
    assert_error(download("--data_dir", target, "--url", "no address"), 1, "unknown url type")
    assert read_files(target) == {}


def test_missing_and_damaged_archives_on_the_disk_are_refused(tmp_path, archives):
    target = tmp_path / "data"
    result = download("--data_dir", target, "--archive_dir", tmp_path / "none")
    assert_error(result, 2, "there is no such archive")
    flags = ["--data_dir", target, "--archive_dir", archives]
    assert_error(download(*flags), 2, TEXT, "its MD5 is not bf6c")
    (archives / PHOTOS).write_bytes(b"not a zip")
    assert_error(download(*flags, md5_of=archives), 2, "not a zip")
    assert not (target / "Flicker8k_Dataset").exists()


@pytest.mark.parametrize("name", [
    "../evil.txt", "Flicker8k_Dataset/../../evil.txt", "/tmp/evil.txt", "C:/evil.txt",
    "..\\evil.txt"])
def test_a_zip_with_an_entry_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    dataset = write_dataset(tmp_path / "original")
    archives = make_archives(tmp_path / "archives", dataset, extra_entries=[name])
    target = tmp_path / "data"
    result = download("--data_dir", target, "--archive_dir", archives, md5_of=archives)
    assert_error(result, 2, "refused", "leads out")
    assert not (target / "Flicker8k_Dataset").exists()
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the file size are POSIX")
def test_a_full_disk_leaves_nothing_behind_and_is_reported(tmp_path, archives):
    """A limit of the file size makes the same calls fail that a full disk makes fail."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    target = tmp_path / "data"
    with serve(archives) as (_, url):
        result = download("--data_dir", target, "--url", url, md5_of=archives, own_process=True,
                          preexec_fn=limit)
    assert_error(result, 1, "the disk is full")
    assert not (target / "Flicker8k_Dataset").exists()
    assert download("--data_dir", target, "--archive_dir", archives, md5_of=archives)[0] == 0


def test_an_archive_that_lacks_a_photo_is_an_error(tmp_path):
    original = write_dataset(tmp_path / "original")
    (original / "Flicker8k_Dataset" / "1002_abc.jpg").unlink()
    archives = make_archives(tmp_path / "archives", original)
    result = download("--data_dir", tmp_path / "data", "--archive_dir", archives, md5_of=archives)
    assert_error(result, 2, "1002_abc.jpg")
    assert "downloading it again will not help" in result[2] and "repairs it" not in result[2]


def test_an_address_is_of_no_use_with_archives_on_the_disk(capsys):
    with pytest.raises(SystemExit) as stopped:
        download_flickr8k.parse_args(["--archive_dir", "a", "--url", "http://localhost"])
    assert stopped.value.code == 2 and "--url has no effect" in capsys.readouterr().err
