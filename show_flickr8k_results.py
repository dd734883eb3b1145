"""See what came out of training runs, finished or still going, and use them.

    python show_flickr8k_results.py                             the tables of a run
    python show_flickr8k_results.py --query "two dogs run"      photos for a text
    python show_flickr8k_results.py --image my_photo.jpg        captions for a photo
    python show_flickr8k_results.py --image my_photo.jpg --query "in the snow"   photos for both
    python show_flickr8k_results.py --compare outputs/*         several runs
    python show_flickr8k_results.py --serve --photos ~/Pictures a search in the browser
    python show_flickr8k_results.py --page run.html             a run in one file, to keep or send
"""
import argparse
import collections
import contextlib
import random
import sys
from pathlib import Path

from src import page, report, server
from src.encoder_sources import load_encoders
from src.evaluation import compare_test_time_training
from src.retrieval import retrieval_ranks
from src.runs import check_data_dir, load_run
from src.search import EmbeddingCache, Search, kinds, load_model, photos_of_folder, photos_of_split
from src.utils.captions import MAX_LENGTH, SPLIT_FILES, cut_text
from src.utils.console import (
    Parser,
    ProgressLine,
    first_three,
    number,
    prepare_output,
    printable,
    text,
)
from src.utils.errors import DataError, UsageError
from src.utils.flickr8k_simple import Flickr8kImageTextDataset

EXAMPLES = 4  # hits, and as many misses, on the page of a run


def same(text):
    """A text as it is compared with captions: without capitals, full stops and spacing."""
    return " ".join(text.lower().replace(".", " ").split())


def data_dir_of(args, run_dir):
    """--data_dir, or the folder that the run was trained on. Raises UsageError where that is gone.
    """
    data_dir = args.data_dir or load_run(run_dir).settings.data_dir
    if not args.data_dir:
        check_data_dir(data_dir)
    return data_dir


def open_gallery(args):
    """-> (photos, captions of each, "of val"): the split's, or those in --photos, less the photo of
    --image where that is part of a query. Raises DataError where none is left."""
    if args.photos:
        skipped = collections.Counter()
        photos, place = photos_of_folder(args.photos, skipped), f"in {args.photos}"
        captions = [[] for _ in photos]
        if skipped:
            print(f"left out, not photos that can be read: {kinds(skipped)}", file=sys.stderr)
    else:
        photos, captions = photos_of_split(data_dir_of(args, args.output_dir[0]), args.split)
        place = f"of {args.split}"
    if args.image and args.query:
        given = Path(args.image).resolve()
        kept = [i for i, photo in enumerate(photos) if photo.resolve() != given]
        photos, captions = [photos[i] for i in kept], [captions[i] for i in kept]
        if not photos:
            raise DataError(f"there are no photos {place} but that of --image")
    return photos, captions, place


def open_search(args, cache):
    """-> (Search, "1,000 photos of val"). Photos in --photos that cannot be read are left out and
    said; in the dataset itself they raise DataError."""
    photos, captions, place = open_gallery(args)
    search = Search(cache, photos, captions, args.bank)
    line, faults = ProgressLine(stream=sys.stderr), {} if args.photos else None
    try:
        search.embed_photos(line.counter("embedding"), faults)
    finally:
        line.clear()
    if faults:
        said = printable(first_three(faults.values()))
        print(f"left out, {len(faults):,} photos that cannot be read: {said}", file=sys.stderr)
    return search, f"{len(search.photos):,} photos {place}"


def open_cache(args):
    cache = EmbeddingCache(args.output_dir[0])
    if args.bank and cache.bank is None:
        print(f"{args.output_dir[0]}: no bank, which training makes at its end; the order is that "
              "of the scores", file=sys.stderr)
        args.bank = False
    return cache


def print_ranking(title, cosines, scores, args, about):
    """Print the best --top by the scores (N,), with their cosines, -> (title, cells) for a `sheet`.
    about(i) gives what the line and the sheet say of i, its photo, and whether it is a right one.
    """
    title += ", in the bank's order" if args.bank else ""
    order = scores.argsort(descending=True, stable=True).tolist()
    ranks = [rank for rank, i in enumerate(order, start=1) if about(i)[3]]
    title += f"; the right one is ranked {ranks[0]:,}" if ranks else ""
    print(title)
    cells = []
    for rank, i in enumerate(order[:args.top], start=1):
        line, label, photo, right = about(i)
        line = printable(line).rstrip()
        print(f"{'*' if right else ' '} {rank:3d}  {cosines[i]:6.3f}  {line}")
        cells.append((photo, f"{rank}.  {cosines[i]:.3f}  {label}", right))
    return title, cells


def cut(query):
    """What the model reads of a query."""
    if len(query) > MAX_LENGTH:
        print(f"the query is cut to its first {MAX_LENGTH:,} characters", file=sys.stderr)
    return cut_text(query)


def show_photos(args):
    """--query: the photos nearest to each text, or to each together with the photo of --image."""
    cache, queries = open_cache(args), [cut(query) for query in args.query]
    for query in queries:
        if not cache.tokenizer.knows(query):
            raise UsageError(f"the query {query[:80]!r} has nothing that the model has learned to "
                             "read")
    search, gallery = open_search(args, cache)
    photo, rows = search.embed_photo(args.image) if args.image else None, []
    found = search.photos_for(search.embed_texts(queries, photo))
    for query, cosines, scores in zip(queries, *found):
        def about(i, query=query):
            photo, captions = search.photos[i], search.captions[i]
            name = photo.relative_to(args.photos) if args.photos else photo.name
            line = f"{name}  {captions[0] if captions else ''}"
            return line, name, photo, same(query) in map(same, captions)

        title = f'{args.image} and "{query}"' if args.image else f'"{query}"'
        title, cells = print_ranking(f"{title} in {gallery}", cosines, scores, args, about)
        first = [(args.image, "the photo", False)] if args.image else []
        rows.append((title, first + cells))
        print()
    return rows


def show_captions(args):
    """--image: the captions nearest to a photo, its own marked where it is one of the split's."""
    cache, (photos, captions, _) = open_cache(args), open_gallery(args)
    search = Search(cache, photos, captions, args.bank)
    cosines, scores = search.captions_for(search.embed_photo(args.image))
    own = [photo.resolve() == Path(args.image).resolve() for photo in search.photos]

    def about(i):
        text, photo = search.texts[i], search.photo_of_text[i]
        name = search.photos[photo]
        return f"{text}  ({name.name})", text, name, own[photo]

    title = f"{args.image} among {len(search.texts):,} captions of {args.split}"
    title, cells = print_ranking(title, cosines[0], scores[0], args, about)
    return [(title, [(args.image, "the photo", False), *cells])]


def examples(search, texts, ranks):
    """Hits and misses at random, each with the photo that is first, or second -> rows of a `sheet`.
    texts, ranks: the embeddings and the ranks of the search's texts."""
    nearest = (texts @ search.rows.T).topk(min(2, len(search.photos)), dim=1).indices.tolist()
    rows = []
    for what, other, wanted in (("hit", "ranked 2", ranks == 1),
                                ("miss", "ranked first", ranks > 1)):
        drawn = wanted.nonzero().flatten().tolist()
        for i in random.Random(0).sample(drawn, min(EXAMPLES, len(drawn))):
            right = search.photo_of_text[i]
            label = f"right, ranked {int(ranks[i]):,}: {search.photos[right].name}"
            cells = [(search.photos[right], label, True)]
            cells += [(search.photos[photo], f"{other}: {search.captions[photo][0]}", False)
                      for photo in nearest[i] if photo != right][:1]
            rows.append((f"{what}: {search.texts[i]}", cells))
    return rows


def serve(args):
    """--serve: a search in the browser, until Ctrl-C."""
    folder = args.output_dir[0]
    with server.Server(args.serve) as http:
        search, gallery = open_search(args, open_cache(args))
        tries = search.texts
        if tries:
            search.captions_for(search.rows[:1])  # embeds them before the first query comes
        else:
            with contextlib.suppress(DataError, UsageError):
                tries = [own[0] for own in photos_of_split(data_dir_of(args, folder), "val")[1]]
        http.pages = server.SearchPages(search, f"{folder} · {gallery}", tries)
        print(f"http://{server.HOST}:{http.server_port} (Ctrl-C ends it)", flush=True)
        http.serve_forever()


def write_page(args):
    """--page: the runs in one HTML file; of each, where its photos are at hand, how kinds of
    captions are found, hits and misses."""
    sections = []
    for folder in args.output_dir:
        run = load_run(folder)
        try:
            photos, captions = photos_of_split(data_dir_of(args, folder), args.split)
            search = Search(EmbeddingCache(folder), photos, captions, bank=False)
            search.embed_photos()
            texts = search.text_rows
            ranks = retrieval_ranks(search.rows, texts, search.photo_of_text)["t2i"]
            title = f"Text to photo by kind of caption: {len(photos):,} photos of {args.split}"
            shown = page.kinds_table(title, search.texts, ranks)
            shown += page.sheet(examples(search, texts, ranks))
        except UsageError as error:
            shown = page.note(f"No photos are shown: {error}")
            print(f"{folder}: no photos on the page: {error}", file=sys.stderr)
        sections.append(page.run_section(run, shown))
    runs = f'<div class="runs">{"".join(sections)}</div>'
    page.write(args.page, "Image-text retrieval", runs)


def show_test_time(args):
    """--test_time: avg R@1 with and without the memory's test-time training, for each run."""
    results = {}
    for folder in args.output_dir:
        model, tokenizer, _ = load_model(folder)
        if model.memory is None:
            raise UsageError(f"{folder}: the model has no memory that could adapt")
        settings = load_run(folder).settings
        encoders = load_encoders(settings)
        data = Flickr8kImageTextDataset(
            data_dir_of(args, folder), args.split, settings.stored_pixels("val"), tokenizer,
            settings.allow_incomplete, image_encoder=encoders.image, text_encoder=encoders.text)
        results[Path(folder).name] = compare_test_time_training(model, data)
    title = f"Test-time training of the memory: avg R@1, {len(data.names):,} photos of {args.split}"
    print(report.adaptation_table(title, results))


def runs_of(paths):
    """The runs among the paths; what else lies there is named and left out, unless all is."""
    runs, faults = [], {}
    for path in paths:
        try:
            runs.append(load_run(path))
        except UsageError as error:
            faults[path] = error
            if not Path(path).exists():
                raise
    if not runs:
        raise faults[paths[0]]
    for path in faults:
        print(f"left out {path}: no run of this version", file=sys.stderr)
    return runs


def parse_args(argv):
    parser = Parser(description=__doc__.split("\n")[0],
                    epilog="Without one of these: the tables of the run.")
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--output_dir", type=text, nargs="+", default=["outputs/flickr8k_sgd"], help="of the run; "
        "several for --page, --test_time and the tables (default: outputs/flickr8k_sgd)")
    what.add_argument("--test_time", action="store_true",
                      help="measure what the memory's test-time training adds")
    what.add_argument("--serve", type=number(int, "[0, 65535]"), nargs="?", const=8008,
                      metavar="PORT", help="search in the browser, at this port of this machine "
                      "alone; 0: one that is free (default: 8008)")
    what.add_argument("--compare", type=text, nargs="+", metavar="DIR",
                      help="runs, best on validation first")
    add("--query", nargs="+", metavar="TEXT", help="rank photos by each text, of which the first "
        f"{MAX_LENGTH:,} characters are read")
    add("--image", type=text, help="rank a split's captions by this photo; with --query: rank "
        "photos by both")
    add("--photos", type=text, metavar="DIR",
        help="with --query or --serve: the photos in this folder and below it")
    add("--split", choices=list(SPLIT_FILES), help="whose photos and captions are ranked "
        "(default: test; val with --test_time)")
    add("--data_dir", type=text,
        help="Flickr8k's folder (default: the one that the run was trained on)")
    add("--bank", action=argparse.BooleanOptionalAction, default=True,
        help="order photos and captions with the run's bank (default: on)")
    add("--top", type=int, default=5, metavar="K", help="results to show (default: 5)")
    add("--page", type=text, metavar="FILE.html", help="write one file: of the runs, with curves, "
        "hits and misses; with --query or --image, of what was found")
    add("--format", choices=["terminal", "markdown"], default="terminal",
        help="of --compare (default: terminal)")
    args = parser.parse_args(argv)
    args.split = args.split or ("val" if args.test_time else "test")
    if args.top < 1:
        parser.error("--top must be at least 1")
    serve, search = args.serve is not None, args.query or args.image
    if len(args.output_dir) > 1 and (search or serve):
        parser.error("--query, --image and --serve take one --output_dir")
    if args.photos and not (args.query or serve):
        parser.error("--photos needs a --query or --serve")
    if (search or args.page) and (args.test_time or args.compare or serve):
        parser.error("--query, --image and --page go with none of --test_time, --compare and "
                     "--serve")
    if args.page and not args.page.lower().endswith(".html"):
        parser.error("--page names an HTML file: FILE.html")
    return args


def show(args):
    """Print, serve or write what was asked for."""
    if args.compare:
        print(report.comparison(runs_of(args.compare), args.format))
    elif args.test_time:
        show_test_time(args)
    elif args.serve is not None:
        serve(args)
    elif args.query or args.image:
        rows = show_photos(args) if args.query else show_captions(args)
        if args.page:
            page.write(args.page, "Image-text retrieval", page.sheet(rows))
    elif args.page:
        write_page(args)
    else:
        print("\n\n".join(report.summary(load_run(path)) for path in args.output_dir))
    if args.page:
        print(f"wrote {args.page}")


def main(argv=None):
    args = parse_args(argv)
    try:
        show(args)
    except (UsageError, ValueError) as error:  # a text of no tokens
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was embedded is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
