"""See what came out of training runs, finished or still going, and use them.

    python show_flickr8k_results.py                                         the tables of a run
    python show_flickr8k_results.py --plot                                  its curves, as a PNG
    python show_flickr8k_results.py --query "two dogs run" --out sheet.png  photos for a text
    python show_flickr8k_results.py --query "a birthday" --photos ~/Photos  among photos of your own
    python show_flickr8k_results.py --image my_photo.jpg                    captions for a photo
    python show_flickr8k_results.py --examples 4                            what it gets right and wrong
    python show_flickr8k_results.py --compare outputs/*                     several runs, side by side
"""
import argparse
import random
import signal
import sys
from pathlib import Path

from src.inference import EmbeddingCache, embed_photos, embed_texts, photos_of_folder, photos_of_split
from src.settings import command_of
from src.utils.checkpoint import CheckpointError
from src.utils.flickr8k_simple import SPLIT_FILES, DataError
from src.utils.pictures import contact_sheet, plot_curves
from src.utils.report import CONFIG, ProgressLine, agreement_table, comparison, comparison_rows, length_table, load_run, summary
from src.utils.retrieval import retrieval_ranks


def same(text):
    """A text as it is compared with captions: without capitals, full stops and spacing."""
    return " ".join(text.lower().replace(".", " ").split())


def open_gallery(args):
    """-> (cache, photos, captions of each, "1,000 photos of val"), the photos being the split's, or those of --photos."""
    cache = EmbeddingCache(args.output_dir[0])
    if args.photos:
        photos = photos_of_folder(args.photos)
        return cache, photos, [[] for _ in photos], f"{len(photos):,} photos in {args.photos}"
    photos, captions = photos_of_split(args.data_dir or load_run(args.output_dir[0])["config"]["arguments"]["data_dir"],
                                       args.split)
    return cache, photos, captions, f"{len(photos):,} photos of {args.split}"


def embed_gallery(cache, photos):
    line = ProgressLine(stream=sys.stderr)
    embeddings = cache.photos(photos, lambda done, total: line.update(f"embedding: {done} of {total} photos"))
    line.clear()
    return embeddings


def show_photos(args):
    """--query: the photos nearest to each text."""
    cache, photos, captions, gallery = open_gallery(args)
    for query in args.query:
        if not cache.tokenizer.knows(query):
            raise ValueError(f"the query {query!r} has nothing that the model has learned to read")
    similarity = embed_texts(cache.model, cache.tokenizer, args.query) @ embed_gallery(cache, photos).T
    rows = []
    for query, scores in zip(args.query, similarity):
        right = {i for i, of_photo in enumerate(captions) if same(query) in map(same, of_photo)}
        order = scores.argsort(descending=True, stable=True).tolist()
        ranks = [rank for rank, i in enumerate(order, start=1) if i in right]
        title = f'"{query}" in {gallery}' + (f"; the right one is ranked {ranks[0]:,}" if ranks else "")
        print(title)
        cells = []
        for rank, i in enumerate(order[:args.top], start=1):
            name = photos[i].relative_to(args.photos) if args.photos else photos[i].name
            print(f"{'*' if i in right else ' '} {rank:3d}  {scores[i]:6.3f}  {name}  {captions[i][0] if captions[i] else ''}".rstrip())
            cells.append((photos[i], f"{rank}.  {scores[i]:.3f}  {name}", i in right))
        rows.append((title, cells))
        print()
    return rows


def show_captions(args):
    """--image: the captions nearest to a photo; its own are marked where it is one of the split's."""
    cache, photos, captions, _ = open_gallery(args)
    similarity = (cache.texts([text for of_photo in captions for text in of_photo])
                  @ embed_photos(cache.model, cache.transform, [args.image])[0])
    of_photo = [i for i, texts in enumerate(captions) for _ in texts]
    texts = [text for texts in captions for text in texts]
    own = {i for i, photo in enumerate(photos) if photo.resolve() == Path(args.image).resolve()}
    title = f"{args.image} among {len(texts):,} captions of {args.split}"
    print(title)
    cells = [(args.image, "the photo", False)]
    for rank, i in enumerate(similarity.argsort(descending=True, stable=True).tolist()[:args.top], start=1):
        photo = of_photo[i]
        print(f"{'*' if photo in own else ' '} {rank:3d}  {similarity[i]:6.3f}  {texts[i]}  ({photos[photo].name})")
        cells.append((photos[photo], f"{rank}.  {similarity[i]:.3f}  {texts[i]}", photo in own))
    return [(title, cells)]


def show_examples(args):
    """--examples: captions drawn at random among hits and among misses, and where recall is high and low."""
    cache, photos, captions, gallery = open_gallery(args)
    texts = [text for of_photo in captions for text in of_photo]
    of_photo = [i for i, own in enumerate(captions) for _ in own]
    image_rows, text_rows = embed_gallery(cache, photos), cache.texts(texts)
    ranks = retrieval_ranks(image_rows, text_rows, of_photo)
    nearest = (text_rows @ image_rows.T).topk(min(2, len(photos)), dim=1).indices.tolist()
    print(f"{gallery}, {len(texts):,} captions\n")
    print(length_table(texts, ranks["t2i"]))
    print()
    print(agreement_table(captions, ranks["i2t"], ranks["t2i"]))
    rows = []
    for what, wanted in (("hit", ranks["t2i"] == 1), ("miss", ranks["t2i"] > 1)):
        drawn = wanted.nonzero().flatten().tolist()
        for i in random.Random(0).sample(drawn, min(args.examples, len(drawn))):
            right, rank = of_photo[i], int(ranks["t2i"][i])
            others = [photo for photo in nearest[i] if photo != right][:1]
            label = "ranked 2" if what == "hit" else "ranked first"
            rows.append((f"{what}: {texts[i]}", [(photos[right], f"right, ranked {rank:,}: {photos[right].name}", True)]
                         + [(photos[photo], f"{label}: {captions[photo][0]}", False) for photo in others]))
    return rows


def runs_among(paths):
    """The paths of runs. What is none is named and left out: in outputs/, the benchmark's file and the ladder's folder lie
    beside the runs. Where none is a run, all of them, for `load_run` to say so."""
    others = [path for path in paths if Path(path).exists() and not (Path(path) / CONFIG).exists()]
    if len(others) == len(paths):
        return paths
    for path in others:
        print(f"left out {path}: no run", file=sys.stderr)
    return [path for path in paths if path not in others]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Without --plot, --query, --image, --examples or --compare: the tables of the run.")
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--output_dir", nargs="+", default=["outputs/flickr8k_sgd"], help="folder of the run; several for --plot and the "
        "tables (default: outputs/flickr8k_sgd)")
    what.add_argument("--plot", action="store_true", help="draw loss, R@K and learning rate over the epochs")
    what.add_argument("--query", nargs="+", metavar="TEXT", help="rank photos by how well they fit a text, or several")
    what.add_argument("--image", help="rank a split's captions by how well they fit this photo")
    what.add_argument("--examples", type=int, metavar="N", help="show N hits and N misses, and R@K by kinds of captions")
    what.add_argument("--compare", nargs="+", metavar="DIR", help="folders of runs: one row a run, best on validation first")
    add("--photos", metavar="DIR", help="with --query: rank the photos in this folder and below it")
    add("--split", choices=list(SPLIT_FILES), default="test", help="whose photos and captions are ranked (default: test)")
    add("--data_dir", help="Flickr8k's folder (default: the one that the run was trained on)")
    add("--top", type=int, default=5, metavar="K", help="results to show (default: 5)")
    add("--out", metavar="FILE", help="picture to write: contact sheet of --query or --image, of --examples (default: "
        "examples.png in --output_dir), curves of --plot (default: curves.png in the first --output_dir)")
    add("--format", choices=["terminal", "markdown", "json"], default="terminal", help="of --compare (default: terminal)")
    args = parser.parse_args(argv)
    for name in ("top", "examples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if len(args.output_dir) > 1 and (args.query or args.image or args.examples):
        parser.error("--query, --image and --examples take one --output_dir")
    if args.photos and not args.query:
        parser.error("--photos needs a --query")
    try:
        if args.compare:
            print(comparison(comparison_rows([load_run(folder) for folder in runs_among(args.compare)],
                                             command_of), args.format))
            return 0
        if args.plot:
            out = args.out or Path(args.output_dir[0]) / "curves.png"
            plot_curves([load_run(folder) for folder in args.output_dir], out)
        elif args.query or args.image or args.examples:
            show = show_photos if args.query else show_captions if args.image else show_examples
            out, rows = args.out or (args.examples and Path(args.output_dir[0]) / "examples.png"), show(args)
            if out:
                contact_sheet(rows, out)
        else:
            out = None
            print("\n\n".join(summary(load_run(folder)) for folder in args.output_dir))
        if out:
            print(f"wrote {out}")
    except (CheckpointError, DataError, ValueError) as error:  # ValueError: a text without tokens
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no failure
    sys.exit(main())
