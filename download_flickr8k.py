"""Fetch, check and unpack Flickr8k (Hodosh et al. 2013), then verify it photo by photo.

    python download_flickr8k.py                      1.1 GB into data/flickr8k
    python download_flickr8k.py --text_only          2 MB: captions, splits, for Kaggle's copy
    python download_flickr8k.py --archive_dir DIR    from zips on the disk, without the network

Run it again when in doubt: it verifies what is there and mends what is not whole. The dataset is
for non-commercial research; the photos belong to their owners on Flickr."""
import errno
import http.client
import shutil
import socket
import sys
import urllib.error
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from src.utils.captions import SPLIT_FILES, read_folder
from src.utils.console import Parser, ProgressLine, prepare_output, text
from src.utils.errors import DataError, RunError
from src.utils.splits import open_split

URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
TEXT, PHOTOS = "Flickr8k_text.zip", "Flickr8k_Dataset.zip"
MD5 = {TEXT: "bf6c1abcb8e4a833b7f922104de18627", PHOTOS: "f18a1e2920de5bd84dae7cf08ec78978"}
TIMEOUT = 60  # seconds without a byte


def check_text(data_dir):
    """-> what is there. Raises DataError unless every photo of a split has captions."""
    folder = read_folder(data_dir)
    if folder.layout != "Flickr8k":
        raise DataError(f"{data_dir} holds {folder.layout}, not Flickr8k")
    for split, names in folder.splits.items():
        without = [name for name in names if name not in folder.row_of]
        if without:
            raise DataError(f"{folder.source}: {len(without)} photos of {split} have no captions, "
                            f"among them {without[0]}")
    return "captions and splits"


def check_photos(data_dir):
    """-> what is there. Raises DataError unless every photo opens, by training's loader."""
    line, folder, photos, captions = ProgressLine(), read_folder(data_dir), 0, 0
    for split in SPLIT_FILES:
        try:
            data = open_split(  # without a cache: the files themselves are asked
                folder, split, image_size=16, cache=False,
                progress=line.counter(f"verifying {split}"))
        finally:
            line.clear()
        photos, captions = photos + len(data.names), captions + len(data)
    return f"{photos:,} photos, {captions:,} captions"


def fetch(name, data_dir, archive_dir, url):
    """Path of the archive, its MD5 checked. Raises DataError or RunError."""
    if archive_dir is not None:
        path = Path(archive_dir) / name
        if not path.is_file():
            raise DataError(f"{path}: there is no such archive")
        if not check_integrity(path, MD5[name]):
            raise DataError(f"{path}: damaged or another file, the MD5 is not {MD5[name]}")
        return path
    path, address = data_dir / name, f"{url.rstrip('/')}/{name}"
    print(f"fetching {address}")
    try:
        download_url(address, data_dir, name, MD5[name])
        return path
    except RuntimeError:
        reason = f"what arrived is damaged or another file (its MD5 is not {MD5[name]})"
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = f"no connection ({error.reason})"
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = f"the connection broke off ({type(error).__name__})"
    except ValueError as error:
        reason = str(error)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)  # a partial file is of no use: the next run starts afresh
    raise RunError(f"{address}: {reason}.\nRun again, or name a mirror with --url, or a "
                        "folder that holds the two zips with --archive_dir.")


def unpack(archive, data_dir):
    """Unpack beside the dataset, then move file by file into it: no file there is half-written.

    Raises DataError for an archive that is no zip, is damaged, or leads out of its folder.
    """
    print(f"unpacking {archive}")
    staging = data_dir / ".unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if (".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name
                        or PureWindowsPath(name).drive):
                    raise DataError(f"{archive}: refused, its entry {name!r} leads out of the "
                                    "folder")
        extract_archive(archive, staging)
        for path in sorted(staging.rglob("*")):
            inside = path.relative_to(staging)
            if path.is_file() and inside.parts[0] != "__MACOSX":
                (data_dir / inside).parent.mkdir(parents=True, exist_ok=True)
                path.replace(data_dir / inside)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:  # zipfile's own
        raise DataError(f"{archive}: not a zip that can be unpacked ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", type=text, default="data/flickr8k", help="where to (default: %(default)s)")
    add("--archive_dir", type=text, help="folder that holds the two zips (default: fetch them)")
    add("--url", type=text, default=URL, help="where the two zips lie (default: %(default)s)")
    add("--text_only", action="store_true", help="captions and splits, 2 MB (default: photos too)")
    args = parser.parse_args(argv)
    args.data_dir = Path(args.data_dir)
    socket.setdefaulttimeout(TIMEOUT)

    def ensure(name, check):
        """Fetch and unpack the archive unless what it brings is there and whole."""
        try:
            return f"{args.data_dir}: {check(args.data_dir)}, complete; nothing to do"
        except DataError as fault:
            if args.data_dir.exists():
                print(f"not complete yet: {str(fault).splitlines()[0]}")
        args.data_dir.mkdir(parents=True, exist_ok=True)
        unpack(fetch(name, args.data_dir, args.archive_dir, args.url), args.data_dir)
        return f"{args.data_dir}: {check(args.data_dir)}, complete"

    try:
        done = ensure(TEXT, check_text)
        if not args.text_only:
            done = ensure(PHOTOS, check_photos)
        print(done)
        return 0
    except (DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, DataError) else 1
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full; free 2.5 GB and run again"
        print(f"error: {args.data_dir}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
