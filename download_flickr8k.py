"""Download Flickr8k (Hodosh et al. 2013), unpack it, and check every photo and caption.

    python download_flickr8k.py                      1.1 GB, into data/flickr8k
    python download_flickr8k.py --text_only          2 MB: the captions and splits, which complete
                                                     Kaggle's copy of the photos
    python download_flickr8k.py --archive_dir DIR    from the two zips in a folder, without network

The script can be run again at any time: it checks what is there, and downloads only what is missing
or damaged. The dataset is for non-commercial research, and the photos belong to their owners on
Flickr."""
import errno
import http.client
import shutil
import socket
import sys
import urllib.error
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from src.utils.captions import read_folder
from src.utils.console import Parser, ProgressLine, prepare_output, single_path, text
from src.utils.errors import DataError, RunError
from src.utils.folder import SPLIT_FILES

URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
TEXT, PHOTOS = "Flickr8k_text.zip", "Flickr8k_Dataset.zip"
MD5 = {TEXT: "bf6c1abcb8e4a833b7f922104de18627", PHOTOS: "f18a1e2920de5bd84dae7cf08ec78978"}
TIMEOUT = 60  # seconds without a byte from the server


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", type=single_path, default="data/flickr8k",
        help="folder for the dataset (default: %(default)s)")
    add("--archive_dir", type=single_path,
        help="folder that holds the two zips (default: they are downloaded)")
    add("--url", type=text,
        help=f"address of the folder that the two zips are downloaded from (default: {URL})")
    add("--text_only", action="store_true",
        help="get the captions and splits only, 2 MB (default: the photos as well)")
    args = parser.parse_args(argv)
    if args.archive_dir and args.url:
        parser.error("--url has no effect with --archive_dir, which needs no network")
    args.url = args.url or URL
    return args


if __name__ == "__main__":
    # --help and wrong arguments are answered before torch is imported, which takes seconds.
    prepare_output(end_with_reader=True)
    parse_args()

from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from src.utils import files
from src.utils.splits import read_pairs


def check_text(data_dir):
    """Check that every photo of a split has captions, and describe what is there.

    Raises DataError if the captions or the splits are missing or incomplete."""
    folder = read_folder(data_dir)
    if folder.layout != "Flickr8k":
        raise DataError(f"{data_dir}: this folder holds {folder.layout}, not Flickr8k; name "
                        "another one with --data_dir")
    for split, names in folder.splits.items():
        without_captions = [name for name in names if name not in folder.row_of]
        if without_captions:
            raise DataError(f"{folder.source}: {len(without_captions)} photos of {split} have no "
                            f"captions, such as {without_captions[0]}")
    return "captions and splits"


def check_photos(data_dir):
    """Check that every photo can be decoded, just as training decodes it, and count what is there.

    Raises DataError if a photo is missing or unreadable."""
    folder = read_folder(data_dir)
    line = ProgressLine()
    photos = captions = 0
    for split in SPLIT_FILES:
        try:
            # The cache of decoded photos is not used, as the files themselves are to be checked.
            pairs = read_pairs(folder, split, image_size=16, cache=False,
                               progress=line.counter(f"checking {split}"))
        finally:
            line.clear()
        photos += len(pairs.names)
        captions += len(pairs)
    return f"{photos:,} photos, {captions:,} captions"


def fetch(name, data_dir, archive_dir, url):
    """Return the path of an archive whose MD5 is correct.

    The archive is taken from archive_dir; if that is None, it is downloaded into data_dir. Raises
    DataError if archive_dir lacks it or holds a damaged one, and RunError if the download fails."""
    if archive_dir is not None:
        path = Path(archive_dir) / name
        if not path.is_file():
            raise DataError(f"{path}: there is no such archive")
        if not check_integrity(path, MD5[name]):
            raise DataError(f"{path}: the archive is damaged, or it is another file: its MD5 is "
                            f"not {MD5[name]}")
        return path
    path = data_dir / name
    address = f"{url.rstrip('/')}/{name}"
    print(f"downloading {address}")
    try:
        download_url(address, data_dir, name, MD5[name])
        return path
    except RuntimeError:
        reason = f"the file that arrived is damaged, or another one: its MD5 is not {MD5[name]}"
    except urllib.error.HTTPError as error:
        reason = f"the server answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = f"there is no connection ({error.reason})"
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = f"the connection was lost ({type(error).__name__})"
    except ValueError as error:  # the address is not a URL
        reason = str(error)
    except BaseException:
        files.delete(path)
        raise
    files.delete(path)  # a download cannot be continued: the next run starts again
    raise RunError(f"{address}: {reason}.\nRun the script again, or name a mirror with --url, or a "
                   "folder that holds the two zips with --archive_dir.")


def unpack(archive, data_dir):
    """Unpack an archive into the dataset's folder.

    The files are unpacked into a folder beside the dataset and then moved one by one, so that no
    half-written file is ever part of the dataset. Raises DataError if the archive is not a zip, is
    damaged, or has an entry that leads out of the folder."""
    print(f"unpacking {archive}")
    staging = data_dir / ".unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if (".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name
                        or PureWindowsPath(name).drive):
                    raise DataError(f"{archive}: the archive was refused, as its entry {name!r} "
                                    "leads out of the folder")
        extract_archive(archive, staging)
        for path in sorted(staging.rglob("*")):
            inside = path.relative_to(staging)
            if path.is_file() and inside.parts[0] != "__MACOSX":
                (data_dir / inside).parent.mkdir(parents=True, exist_ok=True)
                files.replace(path, data_dir / inside)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:  # raised by zipfile
        raise DataError(f"{archive}: this is not a zip that can be unpacked ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def ensure(name, check, args):
    """Download and unpack an archive, unless its files are there already and pass the check.

    check: `check_text` or `check_photos`. Returns the line to print at the end."""
    data_dir = Path(args.data_dir)
    try:
        return f"{data_dir}: {check(data_dir)}, complete; nothing to do"
    except DataError as error:
        if data_dir.exists():
            print(f"not complete yet: {str(error).splitlines()[0]}")
    data_dir.mkdir(parents=True, exist_ok=True)
    archive = fetch(name, data_dir, args.archive_dir, args.url)
    unpack(archive, data_dir)
    try:
        return f"{data_dir}: {check(data_dir)}, complete"
    except DataError as error:  # which may advise to run this script
        raise DataError(f"{str(error).splitlines()[0]}\n{archive} was unpacked just now, so "
                        "downloading it again will not help; `python train_flickr8k_sgd.py "
                        "--allow_incomplete` trains without them.") from None


def main(argv=None):
    args = parse_args(argv)
    socket.setdefaulttimeout(TIMEOUT)  # otherwise a silent server would be waited for for ever
    try:
        result = ensure(TEXT, check_text, args)
        if not args.text_only:
            result = ensure(PHOTOS, check_photos, args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full; free 2.5 GB and run the script again"
        print(f"error: {args.data_dir}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the script again to continue", file=sys.stderr)
        return 130
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
