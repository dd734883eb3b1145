"""Search photos by words, with a run or with a pretrained pair of encoders, and show what came out
of training runs, finished or still training.

    python show_flickr8k_results.py                             the tables of the newest run
    python show_flickr8k_results.py --query "two dogs run"      photos for a text
    python show_flickr8k_results.py --query "a cake" --photos ~/Pictures
                                                                among your own photos
    python show_flickr8k_results.py --serve --photos ~/Pictures a search in the browser
    python show_flickr8k_results.py --image my_photo.jpg        captions for a photo
    python show_flickr8k_results.py --image my_photo.jpg --photos ~/Pictures
                                                                photos like it
    python show_flickr8k_results.py --image my_photo.jpg --query "in the snow"
                                                                photos for both together
    python show_flickr8k_results.py --evaluate my_photos        R@K on any folder with captions
    python show_flickr8k_results.py --page run.html             a run as one file, to keep or send
    python show_flickr8k_results.py --compare outputs/*         several runs side by side

With --image_encoder openai/clip-vit-base-patch32, or another model of photos and texts, no run is
needed for --query, --image, --serve and --evaluate.
"""
import argparse
import contextlib
import functools
import os
import sys
import threading
import webbrowser
from pathlib import Path

from src.utils.console import Parser, Paths, number, prepare_output, single_path, text
from src.utils.folder import MAX_LENGTH, SPLIT_FILES

OUTPUTS = Path("outputs")  # where the training script writes its runs, unless told otherwise
PAGE_TITLE = "Image-text retrieval"
SEARCHES = ("--query", "--image", "--serve")
# What each of these flags has an effect on, so that none is ignored without a word.
USED_WITH = {
    "data_dir": (*SEARCHES, "--page"),
    "split": (*SEARCHES, "--page", "--evaluate"),
    "photos": SEARCHES,
    "image_encoder": (*SEARCHES, "--evaluate"),
    "bank": (*SEARCHES, "--evaluate"),
    "device": (*SEARCHES, "--page", "--evaluate"),
    "top": ("--query", "--image"),
    "browser": ("--serve",),
    "format": ("--query", "--image", "--compare"),
}
DEFAULTS = {"split": "test", "bank": True, "top": 5, "format": "lines", "browser": True}


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="show_flickr8k_results.py [options]")

    group = parser.add_argument_group(
        "what to show", "Without one of these flags, the tables of the run are printed.")
    add = group.add_argument
    add("--query", nargs="+", metavar="TEXT",
        help=f"rank photos by each text; its first {MAX_LENGTH:,} characters are read")
    add("--image", type=single_path, metavar="FILE",
        help="rank captions by this photo; with --photos: rank photos by it; with --query: rank "
        "photos by the photo and the text")
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--serve", type=number(int, "[0, 65535]"), nargs="?", const=8008, metavar="PORT",
        help="serve a search page to the browsers of this machine; port 0 stands for any free one "
        "(default: 8008)")
    exclusive.add_argument("--evaluate", type=single_path, metavar="DIR",
                           help="compute R@K on a folder with captions, in any layout")
    exclusive.add_argument("--compare", action=Paths, nargs="+", metavar="DIR",
                           help="compare runs in one table, the best on validation first")
    add("--page", type=single_path, metavar="FILE.html",
        help="write one HTML file: the runs with curves, hits and misses, or what --query or "
        "--image found")

    add = parser.add_argument_group("which model and which photos").add_argument
    add("--output_dir", action=Paths, nargs="+", metavar="DIR",
        help="folder of the run; several for --page and the tables (default: the newest run in "
        f"{OUTPUTS})")
    add("--image_encoder", type=single_path, metavar="NAME",
        help="search or evaluate without a run, with a model of photos and texts such as CLIP: one "
        "of transformers (a name or a folder), or FILE.py:FUNCTION for its encoder of photos")
    add("--text_encoder", type=single_path, metavar="NAME",
        help="the encoder of texts of that model (default: that of --image_encoder)")
    add("--split", choices=[*SPLIT_FILES, "all"],
        help="the split whose photos and captions are ranked (default: test)")
    add("--data_dir", type=single_path, metavar="DIR",
        help="folder of the dataset (default: the one that the run was trained on)")
    add("--photos", type=single_path, metavar="DIR",
        help="search the photos in this folder and below it instead, without thumbnails and "
        "recycle bins")

    add = parser.add_argument_group("how to show it").add_argument
    add("--bank", action=argparse.BooleanOptionalAction,
        help="rank with the run's bank of training photos and captions (default: on)")
    add("--top", type=number(int, "[1, inf)"), metavar="K",
        help="number of results of --query or --image (default: 5)")
    add("--format", choices=["lines", "paths", "json", "markdown"],
        help="format of the results: lines; of --query and --image also paths, one absolute path "
        "a line, or json; of --compare also markdown (default: lines)")
    add("--browser", action=argparse.BooleanOptionalAction,
        help="open the page of --serve in a browser (default: where there is a display)")
    add("--device", type=text, help="cuda, cuda:1, mps or cpu (default: the best one of this "
        "machine)")

    args = parser.parse_args(argv)
    serve, search = args.serve is not None, bool(args.query or args.image)
    if args.output_dir and len(args.output_dir) > 1 and (search or serve or args.evaluate):
        parser.error("--query, --image, --serve and --evaluate take one --output_dir")
    if (search or args.page) and (args.compare or serve or args.evaluate):
        parser.error("--query, --image and --page cannot be combined with --compare, --serve or "
                     "--evaluate")
    if args.page and not args.page.lower().endswith(".html"):
        parser.error(f"--page writes an HTML file, so {args.page} has to end in .html")
    if args.format and args.format not in {
            True: ("lines", "markdown"), False: ("lines", "paths", "json")}[bool(args.compare)]:
        parser.error(f"--format {args.format} is not one of "
                     f"{'--compare' if args.compare else '--query and --image'}")
    check_encoders(parser, args)
    check_flags_are_used(parser, args)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def check_encoders(parser, args):
    """Complete the pair of encoders that replaces a run, or raise the parser's error."""
    if args.text_encoder and not args.image_encoder:
        parser.error("--text_encoder has no effect without --image_encoder")
    if not args.image_encoder:
        return
    if ".py:" in args.image_encoder and not args.text_encoder:
        parser.error(f"--image_encoder {args.image_encoder} needs a --text_encoder, such as "
                     "another function of this file")
    args.text_encoder = args.text_encoder or args.image_encoder
    if args.output_dir:
        parser.error("--image_encoder and --output_dir exclude each other: a run has its encoders")
    if args.bank:
        parser.error("--bank has no effect with --image_encoder, as only a run has a bank")
    if args.page and not (args.query or args.image):
        parser.error("--page shows runs, or what --query or --image found with --image_encoder")
    if not (args.photos or args.data_dir or args.evaluate):
        parser.error("--image_encoder needs --photos, the folder to search, or --data_dir")


def check_flags_are_used(parser, args):
    """Raise the parser's error for a flag that would have no effect."""
    what = ["--query", "--image", "--serve", "--page", "--evaluate", "--compare"]
    given = [flag for flag in what if getattr(args, flag[2:]) is not None]
    for name, users in USED_WITH.items():
        if getattr(args, name) is not None and not set(given) & set(users):
            flag = f"--no-{name}" if getattr(args, name) is False else f"--{name}"
            parser.error(f"{flag} has no effect without {' or '.join(users)}")
    if args.photos and args.split:
        parser.error("--split has no effect with --photos, which are searched instead of a split")
    if args.photos and args.data_dir and args.serve is None:
        parser.error("--data_dir has no effect with --photos, which are searched instead of it")
    if args.compare and args.output_dir:
        parser.error("--output_dir has no effect with --compare, which takes the runs itself")


if __name__ == "__main__":
    # --help and wrong arguments are answered before torch is imported, which takes seconds.
    parse_args()

from src import page, report, run_page, search_page, server
from src.comparison import comparison
from src.device import full_memory, keep_freed_memory
from src.evaluate_folder import evaluate_folder
from src.gallery import photos_of_split
from src.runs import HISTORY, TRAIN_FIRST, load_run
from src.search_results import (
    embed_captions,
    embed_gallery,
    find_data_dir,
    open_search,
    say,
    show_captions,
    show_photos,
    show_similar_photos,
)
from src.utils.errors import DataError, UsageError
from src.utils.photo_files import photos_of_folder


def newest_run():
    """The run in OUTPUTS whose history was written last. Raises UsageError if there is none."""
    histories = list(OUTPUTS.glob(f"*/{HISTORY}"))
    if not histories:
        raise UsageError(f"{OUTPUTS.absolute()}: holds no run; {TRAIN_FIRST}, name a run with "
                         "--output_dir, or search without one, with --image_encoder (see --help)")
    return str(max(histories, key=lambda path: path.stat().st_mtime).parent)


def serve(args):
    """--serve: answer browsers until Ctrl-C."""
    with server.Server(args.serve) as http:
        search, place = open_search(args)
        embed_gallery(search, args)
        embed_captions(search)
        name = args.output_dir[0] if args.output_dir else args.image_encoder
        example_queries = []
        if search.texts:
            example_queries = [search.texts[row] for row in search.different_texts()]
        elif args.output_dir or args.data_dir:
            with contextlib.suppress(DataError, UsageError):
                _, captions = photos_of_split(find_data_dir(args, name), "val")
                example_queries = list(dict.fromkeys(texts[0] for texts in captions))
        find_photos = functools.partial(photos_of_folder, args.photos) if args.photos else None
        http.pages = search_page.SearchPages(search, name, place, example_queries, find_photos)
        address = f"http://{server.HOST}:{http.server_port}"
        print(f"{address} (press Ctrl-C to stop)", flush=True)
        if args.browser and has_display():
            # Some browsers only return when they are closed.
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        http.serve_forever()


def has_display():
    """Whether a browser could be opened on the display of this machine. A session over SSH has
    none, or one far away."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def write_page(args):
    """--page: write the runs to one HTML file, with photos where they are available."""
    sections = []
    for run_dir in args.output_dir:
        run = load_run(run_dir)
        try:
            photos = run_page.photos_section(args, run)
        except UsageError as error:
            photos = [page.paragraph(f"No photos are shown: {error}")]
            print(f"{run_dir}: no photos on the page: {error}", file=sys.stderr)
        sections.append(run_page.run_section(run, *photos))
    page.write(args.page, PAGE_TITLE, f'<div class="runs">{"".join(sections)}</div>')


def load_runs(paths):
    """The runs among the paths. Other files and folders are skipped with a message. Raises
    UsageError for a path that does not exist, and if not one is a run."""
    runs, errors = [], {}
    for path in paths:
        try:
            runs.append(load_run(path))
        except UsageError as error:
            errors[path] = error
            if not Path(path).exists():
                raise
    if not runs:
        raise errors[paths[0]]
    for path in errors:
        print(f"skipped {path}: not a run of this version", file=sys.stderr)
    return runs


def show(args):
    """Print, serve or write what was asked for."""
    if args.compare:
        table_format = "markdown" if args.format == "markdown" else "terminal"
        print(comparison(load_runs(args.compare), table_format))
        return
    search = bool(args.query or args.image)
    if args.output_dir is None and not args.image_encoder:
        args.output_dir = [newest_run()]
        if search or args.page:  # the tables and the other results name the run themselves
            say(f"using the newest run, {args.output_dir[0]}")
    if args.serve is not None:
        serve(args)
    elif args.evaluate:
        evaluate_folder(args)
    elif search:
        find = show_similar_photos if args.photos else show_captions
        rows = show_photos(args) if args.query else find(args)
        if args.page:
            page.write(args.page, PAGE_TITLE, page.photo_sheet(rows))
    elif args.page:
        write_page(args)
    else:
        print("\n\n".join(report.summary(load_run(path)) for path in args.output_dir))
    if args.page:
        say(f"wrote {args.page}")


def main(argv=None):
    args = parse_args(argv)
    keep_freed_memory()
    try:
        show(args)
    except (UsageError, ValueError) as error:  # the tokenizer raises ValueError for an empty text
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        memory = full_memory(error)
        if memory is None and not isinstance(error, OSError):
            raise
        if memory:
            error = f"{memory} is full; close other programs, or search fewer photos"
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was embedded is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
