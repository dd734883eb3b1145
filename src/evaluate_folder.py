"""R@K of a model on any folder with captions, which it need not have been trained on."""
from pathlib import Path

import torch

from src import report
from src.gallery import Search, photos_of_split
from src.retrieval import chance_metrics, correct_pairs, different_texts, retrieval_metrics
from src.runs import load_run
from src.search_results import embed_captions, embed_photos, open_cache
from src.utils.captions import read_folder
from src.utils.console import counted
from src.utils.tokenizers import number_texts


def evaluate_folder(args):
    """--evaluate: print the R@K of the run, or of the pair of encoders, on a split of the folder,
    or on all of its photos. args: the flags of the show script. Raises DataError for a folder that
    has no such split, no captions, or photos that cannot be read."""
    folder = read_folder(args.evaluate)
    photos, captions = photos_of_split(folder, args.split)
    search = Search(open_cache(args), photos, captions, args.bank)
    embed_photos(search)
    embed_captions(search)
    text_ids = None if folder.different_captions is None else number_texts(search.texts)
    embeddings = search.photo_embeddings, search.text_embeddings, search.photo_of_text
    columns = {"cosine": retrieval_metrics(*embeddings, text_ids=text_ids)}
    if search.bank is not None:
        columns["with the bank"] = retrieval_metrics(*embeddings, search.bank, text_ids)
    columns["chance"] = chance(search.photo_of_text, text_ids)
    name = args.output_dir[0] if args.output_dir else args.image_encoder
    size = f"{counted(len(photos), 'photo')}, {counted(len(search.texts), 'caption')}"
    print(f"{name} on {args.split} of {args.evaluate}: {size}")
    for line in report.format_table(list(columns), report.recall_rows(columns)):
        print(line)
    notes = list(folder.notes)
    if folder.by_hash and args.split != "all":
        notes.append("split by a hash of the photos' names; --split all takes all of them")
    if text_ids is not None:
        notes.append("photos share captions: a caption is right for every photo that has it")
    if len(photos) < report.FEW:
        notes.append(f"one photo moves I->T R@1 by {100 / len(photos):.1f} points")
    if args.output_dir and args.split in ("train", "all"):
        settings = load_run(args.output_dir[0]).settings
        folders = [Path(path).resolve() for path in (settings.data_dir, *settings.extra_data)]
        if Path(args.evaluate).resolve() in folders:
            notes.append("the run was trained on photos of this folder: the figures are too good")
    for note in notes:
        print(f"  {note}")


def chance(photo_of_text, text_ids):
    """The metrics of random embeddings for M captions. photo_of_text: (M,), the row of each
    caption's photo. text_ids: see `retrieval_ranks`."""
    _, text_of_caption = different_texts(text_ids, len(photo_of_text), torch.device("cpu"))
    text_of_pair, photo_of_pair = correct_pairs(text_of_caption, torch.tensor(photo_of_text))
    photos_of_text = text_of_pair.bincount()
    return chance_metrics(photo_of_pair.bincount(), photos_of_text[text_of_caption],
                          len(photos_of_text))
