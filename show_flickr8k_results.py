"""See what came out of training runs, finished or still going, and use them.

    python show_flickr8k_results.py                             the tables of a run
    python show_flickr8k_results.py --query "two dogs run"      photos for a text
    python show_flickr8k_results.py --image my_photo.jpg        captions for a photo
    python show_flickr8k_results.py --compare outputs/*         several runs
"""
import argparse
import random
import signal
import sys
from pathlib import Path

from src.inference import (
    EmbeddingCache,
    embed_photos,
    embed_texts,
    load_model,
    photos_of_folder,
    photos_of_split,
)
from src.settings import UsageError
from src.utils import report
from src.utils.checkpoint import CheckpointError, load_run
from src.utils.flickr8k_simple import SPLIT_FILES, DataError, Flickr8kImageTextDataset
from src.utils.pictures import contact_sheet, plot_curves
from src.utils.retrieval import compare_test_time_training, retrieval_ranks


def same(text):
    """A text as it is compared with captions: without capitals, full stops and spacing."""
    return " ".join(text.lower().replace(".", " ").split())


def open_gallery(args):
    """-> (cache, photos, captions of each, "1,000 photos of val"): the split's, or --photos."""
    cache = EmbeddingCache(args.output_dir[0])
    if args.photos:
        photos = photos_of_folder(args.photos)
        return cache, photos, [[] for _ in photos], f"{len(photos):,} photos in {args.photos}"
    data_dir = args.data_dir or load_run(args.output_dir[0]).settings.data_dir
    photos, captions = photos_of_split(data_dir, args.split)
    return cache, photos, captions, f"{len(photos):,} photos of {args.split}"


def embed_gallery(cache, photos):
    line = report.ProgressLine(stream=sys.stderr)
    embeddings = cache.photos(photos, line.counter("embedding"))
    line.clear()
    return embeddings


def print_ranking(title, scores, top, about):
    """Print the best `top` of the scores (N,) -> (title, cells) for a contact sheet. about(i) gives
    what the line and the sheet say of i, its photo, and whether it is a right one."""
    order = scores.argsort(descending=True, stable=True).tolist()
    ranks = [rank for rank, i in enumerate(order, start=1) if about(i)[3]]
    title += f"; the right one is ranked {ranks[0]:,}" if ranks else ""
    print(title)
    cells = []
    for rank, i in enumerate(order[:top], start=1):
        line, label, photo, right = about(i)
        print(f"{'*' if right else ' '} {rank:3d}  {scores[i]:6.3f}  {line}".rstrip())
        cells.append((photo, f"{rank}.  {scores[i]:.3f}  {label}", right))
    return title, cells


def show_photos(args):
    """--query: the photos nearest to each text."""
    cache, photos, captions, gallery = open_gallery(args)
    for query in args.query:
        if not cache.tokenizer.knows(query):
            raise UsageError(f"the query {query!r} has nothing that the model has learned to read")
    texts = embed_texts(cache.model, cache.tokenizer, args.query)
    rows = []
    for query, scores in zip(args.query, texts @ embed_gallery(cache, photos).T):
        def about(i, query=query):
            name = photos[i].relative_to(args.photos) if args.photos else photos[i].name
            caption = captions[i][0] if captions[i] else ""
            return f"{name}  {caption}", name, photos[i], same(query) in map(same, captions[i])

        rows.append(print_ranking(f'"{query}" in {gallery}', scores, args.top, about))
        print()
    return rows


def show_captions(args):
    """--image: the captions nearest to a photo, its own marked where it is one of the split's."""
    cache, photos, captions, _ = open_gallery(args)
    texts = [text for own in captions for text in own]
    of_photo = [i for i, own in enumerate(captions) for _ in own]
    image = embed_photos(cache.model, cache.transform, [args.image])[0]
    scores = cache.texts(texts) @ image
    own = [photo.resolve() == Path(args.image).resolve() for photo in photos]

    def about(i):
        photo = photos[of_photo[i]]
        return f"{texts[i]}  ({photo.name})", texts[i], photo, own[of_photo[i]]

    title = f"{args.image} among {len(texts):,} captions of {args.split}"
    title, cells = print_ranking(title, scores, args.top, about)
    return [(title, [(args.image, "the photo", False), *cells])]


def show_examples(args):
    """--examples: captions drawn at random among hits and misses, and how many hit."""
    cache, photos, captions, gallery = open_gallery(args)
    texts = [text for own in captions for text in own]
    of_photo = [i for i, own in enumerate(captions) for _ in own]
    image_rows, text_rows = embed_gallery(cache, photos), cache.texts(texts)
    ranks = retrieval_ranks(image_rows, text_rows, of_photo)
    nearest = (text_rows @ image_rows.T).topk(min(2, len(photos)), dim=1).indices.tolist()
    print(f"{gallery}, {len(texts):,} captions: of the right photos, "
          f"{100 * (ranks['t2i'] == 1).double().mean():.2f} % are ranked first")
    rows = []
    for what, other, wanted in (("hit", "ranked 2", ranks["t2i"] == 1),
                                ("miss", "ranked first", ranks["t2i"] > 1)):
        drawn = wanted.nonzero().flatten().tolist()
        for i in random.Random(0).sample(drawn, min(args.examples, len(drawn))):
            right = of_photo[i]
            label = f"right, ranked {int(ranks['t2i'][i]):,}: {photos[right].name}"
            cells = [(photos[right], label, True)]
            cells += [(photos[photo], f"{other}: {captions[photo][0]}", False)
                      for photo in nearest[i] if photo != right][:1]
            rows.append((f"{what}: {texts[i]}", cells))
    return rows


def show_test_time(args):
    """--test_time: avg R@1 with and without the memory's test-time training, for each run."""
    results = {}
    for folder in args.output_dir:
        model, tokenizer, _ = load_model(folder)
        if model.memory is None:
            raise UsageError(f"{folder}: the model has no memory that could adapt")
        settings = load_run(folder).settings
        data = Flickr8kImageTextDataset(args.data_dir or settings.data_dir, args.split,
                                        settings.eval_pixels, tokenizer, settings.allow_incomplete)
        results[Path(folder).name] = compare_test_time_training(model, data)
    title = f"Test-time training of the memory: avg R@1, {len(data.names):,} photos of {args.split}"
    print(report.adaptation_table(title, results))


def runs_of(paths):
    """The runs among the paths; what else lies there is named and left out, unless all is."""
    runs, faults = [], {}
    for path in paths:
        try:
            runs.append(load_run(path))
        except (CheckpointError, UsageError) as error:
            faults[path] = error
            if not Path(path).exists():
                raise
    if not runs:
        raise faults[paths[0]]
    for path in faults:
        print(f"left out {path}: no run of this version", file=sys.stderr)
    return runs


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Without one of these: the tables of the run.")
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--output_dir", nargs="+", default=["outputs/flickr8k_sgd"], help="of the run; several "
        "for --plot, --test_time and the tables (default: outputs/flickr8k_sgd)")
    what.add_argument("--plot", action="store_true", help="draw loss, R@K and learning rate")
    what.add_argument("--query", nargs="+", metavar="TEXT", help="rank photos by each text")
    what.add_argument("--image", help="rank a split's captions by this photo")
    what.add_argument("--examples", type=int, metavar="N", help="show N hits and N misses")
    what.add_argument("--test_time", action="store_true",
                      help="measure what the memory's test-time training adds")
    what.add_argument("--compare", nargs="+", metavar="DIR", help="runs, best on validation first")
    add("--photos", metavar="DIR", help="with --query: rank the photos in this folder and below it")
    add("--split", choices=list(SPLIT_FILES), help="whose photos and captions are ranked "
        "(default: test; val with --test_time)")
    add("--data_dir", help="Flickr8k's folder (default: the one that the run was trained on)")
    add("--top", type=int, default=5, metavar="K", help="results to show (default: 5)")
    add("--out", metavar="FILE", help="picture to write (default: none; in --output_dir "
        "examples.png of --examples, curves.png of --plot)")
    add("--format", choices=["terminal", "markdown"], default="terminal",
        help="of --compare (default: terminal)")
    args = parser.parse_args(argv)
    args.split = args.split or ("val" if args.test_time else "test")
    for name in ("top", "examples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if len(args.output_dir) > 1 and (args.query or args.image or args.examples):
        parser.error("--query, --image and --examples take one --output_dir")
    if args.photos and not args.query:
        parser.error("--photos needs a --query")
    return args


def show(args):
    """Print what was asked for -> path of the picture that was written, None for none."""
    folder, out = Path(args.output_dir[0]), args.out
    if args.compare:
        print(report.comparison(runs_of(args.compare), args.format))
        return None
    if args.test_time:
        show_test_time(args)
        return None
    if args.plot:
        out = out or folder / "curves.png"
        plot_curves([load_run(path) for path in args.output_dir], out)
        return out
    if args.query or args.image or args.examples:
        if args.query:
            rows = show_photos(args)
        elif args.image:
            rows = show_captions(args)
        else:
            rows, out = show_examples(args), out or folder / "examples.png"
        if out:
            contact_sheet(rows, out)
        return out
    print("\n\n".join(report.summary(load_run(path)) for path in args.output_dir))
    return None


def main(argv=None):
    args = parse_args(argv)
    try:
        out = show(args)
        if out:
            print(f"wrote {out}")
    except (CheckpointError, DataError, UsageError, ValueError) as error:  # a text of no tokens
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no failure
    sys.exit(main())
