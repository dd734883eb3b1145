"""What a search finds, printed in the terminal.

The functions take the flags of the show script, as it has parsed them."""
import collections
import sys
from pathlib import Path
from typing import NamedTuple

from src.gallery import Search, cache_of_run, photos_of_split
from src.ranking import best_rows, rank_of_best, similarities
from src.runs import check_data_dir, load_run
from src.utils.console import ProgressLine, first_three, printable
from src.utils.errors import DataError, UsageError
from src.utils.folder import MAX_LENGTH, cut_text
from src.utils.photo_files import list_left_out, list_skipped, photos_of_folder
from src.utils.tokenizers import normalize_text


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
    split or "in FOLDER" for --photos. A photo that is a part of the query is not searched. Raises
    DataError if no photo is left."""
    if args.photos:
        skipped, left_out = collections.Counter(), []
        photos = photos_of_folder(args.photos, skipped, left_out)
        captions = [[] for _ in photos]
        place = f"in {args.photos}"
        if skipped:
            print(f"skipped, because they are not photos that can be read: {list_skipped(skipped)}",
                  file=sys.stderr)
        if left_out:
            print(f"left out: {list_left_out(left_out)}", file=sys.stderr)
    else:
        photos, captions = photos_of_split(find_data_dir(args, args.output_dir[0]), args.split)
        place = f"of {args.split}"
    if args.image and args.query:
        image = Path(args.image).resolve()
        kept = [i for i, photo in enumerate(photos) if photo.resolve() != image]
        photos, captions = [photos[i] for i in kept], [captions[i] for i in kept]
        if not photos:
            raise DataError(f"there are no photos {place} other than that of --image")
    return photos, captions, place


def open_cache(args):
    """The EmbeddingCache of the run. Without a bank in the run, args.bank is switched off."""
    run_dir = args.output_dir[0]
    cache = cache_of_run(run_dir)
    if args.bank and cache.bank is None:
        print(f"{run_dir}: has no bank yet, because training makes it at the end; ranking by plain "
              "cosines", file=sys.stderr)
        args.bank = False
    return cache


def open_search(args, cache):
    """Embed the photos to search -> (Search, place), see `open_gallery`. Photos of --photos that
    cannot be read are skipped with a message; those of the dataset raise DataError."""
    photos, captions, place = open_gallery(args)
    search = Search(cache, photos, captions, args.bank)
    line = ProgressLine(stream=sys.stderr)
    unreadable = {} if args.photos else None
    try:
        search.embed_photos(line.counter("embedding"), unreadable)
    finally:
        line.clear()
    if unreadable:
        print(f"skipped photos that cannot be read ({len(unreadable):,}): "
              f"{printable(first_three(unreadable.values()))}", file=sys.stderr)
    return search, place


class Result(NamedTuple):
    """A photo or a caption of the gallery, as a ranking shows it."""
    line: str  # in the terminal
    label: str  # on a page
    photo: Path


def print_ranking(title, query, scores, embeddings, correct, describe, args):
    """Print the best --top results and return them as (title, cells) for `page.photo_sheet`.

    query: (1, D). scores: (N,), which give the order. embeddings: (N, D), whose cosines with the
    query are shown. correct: the rows that the dataset pairs with the query. describe: a function
    from a row to its Result."""
    if args.bank:
        title += ", ranked with the bank"
    if correct:
        title += f"; the correct one is ranked {rank_of_best(scores, correct):,}"
    print(title)
    rows = best_rows(scores, args.top)
    cosines = similarities(query, embeddings[rows])[0].tolist()
    cells = []
    for rank, (row, cosine) in enumerate(zip(rows, cosines), start=1):
        result, is_correct = describe(row), row in correct
        mark = "*" if is_correct else " "
        print(f"{mark} {rank:3d}  {cosine:6.3f}  {printable(result.line).rstrip()}")
        cells.append((result.photo, f"{rank}.  {cosine:.3f}  {result.label}", is_correct))
    return title, cells


def cut_query(query):
    """The part of a query that the model reads."""
    if len(query) > MAX_LENGTH:
        print(f"the query is cut to its first {MAX_LENGTH:,} characters", file=sys.stderr)
    return cut_text(query)


def comparable(caption):
    """A caption without what does not distinguish it: capitals, full stops and spacing."""
    return " ".join(normalize_text(caption).replace(".", " ").split())


def show_photos(args):
    """--query: print the photos nearest to each text, or to each text together with the photo of
    --image. Returns rows for `page.photo_sheet`."""
    cache = open_cache(args)
    queries = [cut_query(query) for query in args.query]
    for query in queries:
        if not cache.tokenizer.knows(query):
            raise UsageError(f"the query {query[:80]!r} has nothing that the model has learned to "
                             "read")
    encoder = cache.model.text_backbone
    if encoder is not None and encoder.count_cut(queries):
        print(f"a query is longer than the {encoder.max_tokens:,} tokens that {encoder.name} "
              "reads, and is cut", file=sys.stderr)
    search, place = open_search(args, cache)
    image = search.embed_photo(args.image) if args.image else None
    photos_with = collections.defaultdict(list)  # {caption: the rows of its photos}
    for row, captions in enumerate(search.captions):
        for caption in captions:
            photos_with[comparable(caption)].append(row)

    def describe(row):
        photo, captions = search.photos[row], search.captions[row]
        name = str(photo.relative_to(args.photos)) if args.photos else photo.name
        return Result(f"{name}  {captions[0] if captions else ''}", name, photo)

    embeddings = search.embed_texts(queries, image)
    rows = []
    for query, embedding, scores in zip(queries, embeddings, search.score_photos(embeddings)):
        title = f'"{query}" in {len(search.photos):,} photos {place}'
        if args.image:
            title = f"{args.image} and {title}"
        correct = photos_with.get(comparable(query), [])
        title, cells = print_ranking(
            title, embedding[None], scores, search.photo_embeddings, correct, describe, args)
        if args.image:
            cells = [(args.image, "the photo", False), *cells]
        rows.append((title, cells))
        print()
    return rows


def show_captions(args):
    """--image: print the different captions nearest to a photo. Those of the photo itself are
    marked, if it is one of the split's. Returns rows for `page.photo_sheet`."""
    cache = open_cache(args)
    photos, captions, _ = open_gallery(args)
    search = Search(cache, photos, captions, args.bank)
    query = search.embed_photo(args.image)
    image = Path(args.image).resolve()
    is_image = [photo.resolve() == image for photo in photos]
    rows = search.different_texts(is_image.index(True) if any(is_image) else -1)
    correct = [i for i, row in enumerate(rows) if is_image[search.photo_of_text[row]]]

    def describe(i):
        caption, photo = search.texts[rows[i]], photos[search.photo_of_text[rows[i]]]
        return Result(f"{caption}  ({photo.name})", caption, photo)

    title = f"{args.image} among {len(rows):,} different captions of {args.split}"
    title, cells = print_ranking(title, query, search.score_captions(query)[0, rows],
                                 search.text_embeddings[rows], correct, describe, args)
    return [(title, [(args.image, "the photo", False), *cells])]
