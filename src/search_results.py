"""What a search finds, printed in the terminal.

The functions take the flags of the show script, as it has parsed them."""
import collections
import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from src.gallery import Search, cache_of_pair, cache_of_run, photos_of_split
from src.ranking import best_rows, rank_of_best
from src.runs import check_data_dir, load_run
from src.utils.console import ProgressLine, counted, first_three, printable
from src.utils.errors import DataError, UsageError
from src.utils.folder import MAX_LENGTH, cut_text
from src.utils.photo_files import heif_hint, list_left_out, list_skipped, photos_of_folder
from src.utils.tokenizers import normalize_text

NOTHING_FITS = "nothing fits well, as the run has learned no such words"


def say(message):
    """Print a message, as one line, beside the results, which are all that standard output holds.
    """
    print(printable(message), file=sys.stderr)


def find_data_dir(args, run_dir):
    """--data_dir, or else the folder that the run was trained on. Raises UsageError if that folder
    does not exist any more."""
    if args.data_dir:
        return args.data_dir
    data_dir = load_run(run_dir).settings.data_dir
    check_data_dir(data_dir)
    return data_dir


def open_gallery(args):
    """Find the photos to search -> (paths, captions of each, place), place being "of test" for a
    split or "in FOLDER" for --photos. The photo of --image is not searched for photos. Raises
    DataError if no photo is left."""
    if args.photos:
        skipped, left_out = collections.Counter(), []
        photos = photos_of_folder(args.photos, skipped, left_out)
        captions = [[] for _ in photos]
        place = f"in {args.photos}"
        if skipped:
            say(f"skipped, because they are not photos that can be read: {list_skipped(skipped)}"
                f"{heif_hint(skipped)}")
        if left_out:
            say(f"left out: {list_left_out(left_out)}")
    else:
        run_dir = args.output_dir[0] if args.output_dir else None  # which --data_dir replaces
        photos, captions = photos_of_split(find_data_dir(args, run_dir), args.split)
        place = f"of {args.split}" if args.split != "all" else "of all splits"
    if args.image and (args.query or args.photos):
        image = Path(args.image).resolve()
        kept = [i for i, photo in enumerate(photos) if photo.resolve() != image]
        photos, captions = [photos[i] for i in kept], [captions[i] for i in kept]
        if not photos:
            raise DataError(f"there are no photos {place} other than that of --image")
    return photos, captions, place


def open_cache(args):
    """The EmbeddingCache of the run, or of the pair of encoders. Without a bank, args.bank is
    switched off."""
    if args.image_encoder:
        cache = cache_of_pair(args.image_encoder, args.text_encoder, args.device)
        args.bank = False
        if cache.model.is_presumed:
            say(f"{args.image_encoder} and {args.text_encoder} are taken for the two halves of one "
                "contrastive model; if they are not, the results are no better than chance")
        folder = cache.file.path.parent
        if os.access(folder, os.W_OK):
            say(f"embeddings are kept in {folder}")
        else:
            say(f"embeddings are not kept, as {folder} cannot be written")
        return cache
    run_dir = args.output_dir[0]
    cache = cache_of_run(run_dir, args.device)
    if args.bank and cache.bank is None:
        say(f"{run_dir}: has no bank yet, because training makes it at the end; ranking by plain "
            "cosines")
        args.bank = False
    return cache


def open_search(args):
    """Find the photos to search and load the model -> (Search, place), see `open_gallery`. The
    photos are not yet embedded."""
    photos, captions, place = open_gallery(args)  # first, as a wrong folder is found at once
    return Search(open_cache(args), photos, captions, args.bank), place


def embed_gallery(search, args):
    """Embed the photos to search. Those of --photos that cannot be read are skipped with a message;
    those of the dataset raise DataError."""
    unreadable = {} if args.photos else None
    embed_photos(search, unreadable)
    if unreadable:
        say(f"skipped photos that cannot be read ({len(unreadable):,}): "
            f"{first_three(unreadable.values())}")


def embed_photos(search, unreadable=None):
    """`Search.embed_photos` with a progress line."""
    with progress_of("photos") as progress:
        search.embed_photos(progress, unreadable)


def embed_captions(search):
    """`Search.embed_captions` with a progress line."""
    with progress_of("captions") as progress:
        search.embed_captions(progress)


@contextlib.contextmanager
def progress_of(unit):
    """A progress line of what is embedded: a function progress(done, total)."""
    line = ProgressLine(stream=sys.stderr)
    try:
        yield functools.partial(line.counter("embedding"), unit=unit)
    finally:
        line.clear()


class Found(NamedTuple):
    """A photo or a caption at its place in a ranking."""
    rank: int
    score: float
    photo: Path
    caption: str
    is_correct: bool


class Results(NamedTuple):
    """What was found for one query. meaning: what the scores are. fits: see `Search.fits`.
    are_captions: whether captions were searched, and not photos."""
    query: str
    title: str
    meaning: str
    fits: bool | None
    found: list
    are_captions: bool = False


def rank(scores, correct, describe, top):
    """The best of the scores (N,) as a list of Found. correct: the rows that the dataset pairs with
    the query. describe: a function from a row to its photo and its caption."""
    return [Found(i, scores[row].item(), *describe(row), row in correct)
            for i, row in enumerate(best_rows(scores, top), start=1)]


def print_results(all_results, args):
    """Print the Results in the format of --format."""
    if args.format == "json":
        rows = [{"query": results.query, "rank": found.rank, "score": found.score,
                 "path": os.path.abspath(str(found.photo)), "caption": found.caption}
                for results in all_results for found in results.found]
        print(json.dumps(rows, indent=1))
    if args.format == "paths":
        note_odd_paths([found.photo for results in all_results for found in results.found])
    for results in all_results:
        if args.format == "lines":
            print(results.title)
            print(f"score: {results.meaning}")
        if results.fits is False:
            if args.format == "lines":
                print(NOTHING_FITS)
            else:
                say(f'"{results.query}": {NOTHING_FITS}')
        for found in results.found:
            if args.format == "paths":
                sys.stdout.buffer.write(os.fsencode(os.path.abspath(str(found.photo))) + b"\n")
                sys.stdout.buffer.flush()
            elif args.format == "lines":
                mark = "*" if found.is_correct else " "
                text = f"{found.photo}  {found.caption}"
                if results.are_captions:
                    text = f"{found.caption}  ({found.photo})"
                print(f"{mark} {found.rank:3d}  {found.score:z6.3f}  {printable(text).rstrip()}")
        if args.format == "lines":
            print()


def note_odd_paths(photos):
    """Say which paths, one a line, other programs cannot use."""
    broken = [str(photo) for photo in photos if {"\n", "\r"} & set(str(photo))]
    if broken:
        say(f"{counted(len(broken), 'path')} with a line break, such as {broken[0]}: --format json "
            "keeps each in one piece")
    in_archives = [str(photo) for photo in photos if not isinstance(photo, Path)]
    if in_archives:
        say(f"{counted(len(in_archives), 'photo')} in .tar files, such as {in_archives[0]}: other "
            "programs have to unpack them first")


def page_row(results, image):
    """The Results as a row for `page.photo_sheet`, after the photo of --image if there is one."""
    title = results.title if results.fits is not False else f"{results.title}: {NOTHING_FITS}"
    cells = [(image, "the photo", False)] if image else []
    for found in results.found:
        name = found.caption if results.are_captions else found.photo.name
        cells.append((found.photo, f"{found.rank}.  {found.score:z.3f}  {name}", found.is_correct))
    return title, cells


def comparable(caption):
    """A caption without what does not distinguish it: capitals, full stops and spacing."""
    return " ".join(normalize_text(caption).replace(".", " ").split())


def check_queries(queries, cache):
    """Say which queries are cut. Raises UsageError for one that the model cannot read."""
    for query in queries:
        if len(query) > MAX_LENGTH:
            say(f"the query is cut to its first {MAX_LENGTH:,} characters")
        if not cache.knows(cut_text(query)):
            raise UsageError(f"the query {query[:80]!r} has nothing that the model has learned to "
                             "read")
    encoder = cache.model.text_backbone
    if encoder is not None and encoder.count_cut(list(map(cut_text, queries))):
        say(f"a query is longer than the {encoder.max_tokens:,} tokens that {encoder.name} reads, "
            "and is cut")


def show_photos(args):
    """--query: print the photos nearest to each text, or to each text together with the photo of
    --image. Returns rows for `page.photo_sheet`."""
    search, place = open_search(args)
    check_queries(args.query, search.cache)
    queries = [cut_text(query) for query in args.query]
    image = search.embed_photo(args.image) if args.image else None
    embed_gallery(search, args)
    photos_with = collections.defaultdict(list)  # {caption: the rows of its photos}
    for row, captions in enumerate(search.captions):
        for caption in captions:
            photos_with[comparable(caption)].append(row)

    def describe(row):
        return search.photos[row], next(iter(search.captions[row]), "")

    embeddings = search.embed_texts(queries, image)
    all_results = []
    for query, embedding, scores in zip(queries, embeddings, search.score_photos(embeddings)):
        title = f'"{query}" in {counted(len(search.photos), "photo")} {place}'
        fits = search.fits(embedding[None]) if image is None else None
        if args.image:
            title = f"{args.image} and {title}"
        correct = photos_with.get(comparable(query), [])
        if correct:
            title += f"; the correct one is ranked {rank_of_best(scores, correct):,}"
        found = rank(scores, correct, describe, args.top)
        all_results.append(Results(query, title, search.score_meaning(), fits, found))
    print_results(all_results, args)
    return [page_row(results, args.image) for results in all_results]


def show_similar_photos(args):
    """--image with --photos: print the photos that are most like it. Returns rows for
    `page.photo_sheet`."""
    search, place = open_search(args)
    image = search.embed_photo(args.image)
    embed_gallery(search, args)
    scores = search.similar_photos(image)
    found = rank(scores, [], lambda row: (search.photos[row], ""), args.top)
    title = f"photos like {args.image} among {counted(len(search.photos), 'photo')} {place}"
    results = Results(args.image, title, "cosine of both photos", None, found)
    print_results([results], args)
    return [page_row(results, args.image)]


def show_captions(args):
    """--image: print the different captions nearest to a photo. Those of the photo itself are
    marked, if it is one of the split's. Returns rows for `page.photo_sheet`."""
    search, place = open_search(args)
    query = search.embed_photo(args.image)
    embed_captions(search)
    image = Path(args.image).resolve()
    is_image = [photo.resolve() == image for photo in search.photos]
    rows = search.different_texts(is_image.index(True) if any(is_image) else -1)
    correct = [i for i, row in enumerate(rows) if is_image[search.photo_of_text[row]]]
    scores = search.score_captions(query)[0, rows]

    def describe(i):
        return search.photos[search.photo_of_text[rows[i]]], search.texts[rows[i]]

    found = rank(scores, correct, describe, args.top)
    title = f"{args.image} among {counted(len(rows), 'different caption')} {place}"
    if correct:
        title += f"; the correct one is ranked {rank_of_best(scores, correct):,}"
    meaning = "cosine of the photo and the caption"
    if args.bank:
        meaning += ", lower for a caption that is near to any photo"
    results = Results(args.image, title, meaning, None, found, are_captions=True)
    print_results([results], args)
    return [page_row(results, args.image)]
