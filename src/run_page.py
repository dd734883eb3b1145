"""A run as HTML: its headline, hits and misses, curves and tables."""
import math
import random
import re
from html import escape

import numpy as np

from src import report
from src.gallery import Search, cache_of_run, photos_of_split
from src.page import paragraph, photo_sheet, table
from src.retrieval import KS, retrieval_ranks
from src.search_results import find_data_dir
from src.utils.tokenizers import number_texts

EXAMPLES = 4  # hits, and as many misses
HEADLINE = {"I->T R@1 (%)": "photo to text, R@1 (%)", "T->I R@1 (%)": "text to photo, R@1 (%)"}
CAPTION_CATEGORIES = {  # {name: a regular expression that finds captions of the category}
    "all": "", "8 words or less": r"^(\S+\s+){0,7}\S+\s*$", "15 words or more": r"(\S+\s+){14}\S",
    "people": r"\b(m[ae]n|wom[ae]n|boys?|girls?|child|children|people|person|kids?|player)\b",
    "dogs": r"\b(dogs?|puppy|puppies)\b",
    "numbers": r"\b(two|three|four|five|six|several|group)\b",
    "colours": r"\b(white|black|red|blue|green|yellow|brown|orange|pink|purple|gr[ae]y|blond)\b",
    "water, snow": r"\b(water|ocean|sea|pool|lake|river|beach|waves?|snow|snowy|ice)\b"}


def heading(title):
    return f"<h3>{escape(title)}</h3>"


def round_ticks(top, most=5):
    """Round numbers (1, 2 or 5 times a power of ten apart) from 0 to `top` or beyond, at most so
    many steps of them."""
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(step * power for step in (1, 2, 5, 10) if step * power * most >= top * (1 - 1e-9))
    return [step * i for i in range(math.ceil(top / step * (1 - 1e-9)) + 1)]


def svg_curves(title, epochs, lines):
    """Curves over the epochs as an SVG figure. lines: {name: values}, with None for an epoch that
    has no value. The plot is 422 x 200 pixels large, its upper left corner is at (48, 20)."""
    top = max((value for line in lines.values() for value in line if value is not None), default=1)
    y_ticks = round_ticks(top or 1)  # the loss is 0 where all photos have one caption
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)

    def x(epoch):
        return f"{48 + 422 * (epoch - first) / (last - first):.1f}"

    def y(value):
        return f"{220 - 200 * value / y_ticks[-1]:.1f}"

    parts = []
    for tick in y_ticks:
        parts.append(f'<path d="M48 {y(tick)}H470" stroke="gray" stroke-width=".5"/>'
                     f'<text x="42" y="{y(tick)}" dy="4" text-anchor="end">{tick:g}</text>')
    for tick in round_ticks(last):
        if first <= tick <= last and tick == int(tick):
            parts.append(f'<path d="M{x(tick)} 220v4" stroke="gray"/>'
                         f'<text x="{x(tick)}" y="238" text-anchor="middle">{tick:g}</text>')
    parts.append('<text x="42" y="238" text-anchor="end">epoch</text>')
    colours = ("#2a7de1", "#e0662a", "#0a9b52", "#b04ad8")
    for i, ((name, line), colour) in enumerate(zip(lines.items(), colours)):
        points = [f"{x(epoch)},{y(value)}" for epoch, value in zip(epochs, line)
                  if value is not None]
        # The first point is drawn twice, so that a single one appears as a square.
        parts.append(f'<polyline points="{" ".join(points[:1] + points)}" fill="none" '
                     f'stroke="{colour}" stroke-width="3" stroke-linecap="square"/>')
        if name:
            parts.append(f'<path d="M{48 + 106 * i} 8h14" stroke="{colour}" stroke-width="4"/>'
                         f'<text x="{68 + 106 * i}" y="12">{escape(name)}</text>')
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 480 244" role="img" '
            f'aria-label="{title}" font-size="13" fill="currentColor">{"".join(parts)}</svg>'
            "</figure>")


def recall_by_category(title, texts, ranks):
    """A table of R@K for each category of captions, as HTML. texts: the M captions. ranks: (M,) the
    rank of each caption's photo."""
    rows = []
    for name, pattern in CAPTION_CATEGORIES.items():
        members = [i for i, text in enumerate(texts) if re.search(pattern, text.lower())]
        recalls = []
        if members:
            recalls = [f"{100 * (ranks[members] <= k).double().mean():.2f}" for k in KS]
        rows.append([name, f"{len(members):,}", *recalls])
    columns = ["captions", "", *(f"R@{k} (%)" for k in KS)]
    return heading(title) + table(columns, rows)


def hits_and_misses(search, ranks, text_ids):
    """Captions drawn at random, whose photo is ranked first or is not, as rows for
    `photo_sheet`. Beside the correct photo stands the best of the others. ranks: (M,), the
    rank of each caption's photo. text_ids: (M,), equal for captions that count as equal."""
    cosines = search.text_embeddings @ search.photo_embeddings.T
    photo_of_text, rows = np.array(search.photo_of_text), []
    for outcome, chosen, other_rank in (("hit", ranks == 1, "ranked 2"),
                                        ("miss", ranks > 1, "ranked first")):
        candidates = chosen.nonzero().flatten().tolist()
        for i in random.Random(0).sample(candidates, min(EXAMPLES, len(candidates))):
            best = cosines[i].argsort(descending=True, stable=True).tolist()
            with_text = set(photo_of_text[text_ids == text_ids[i]].tolist())
            correct = next(photo for photo in best if photo in with_text)
            label = f"correct, ranked {int(ranks[i]):,}: {search.photos[correct].name}"
            cells = [(search.photos[correct], label, True)]
            others = [photo for photo in best if photo not in with_text]
            for photo in others[:1]:
                label = f"{other_rank}: {search.captions[photo][0]}"
                cells.append((search.photos[photo], label, False))
            rows.append((f"{outcome}: {search.texts[i]}", cells))
    return rows


def photos_section(args, run):
    """Hits and misses of a Run, and how well it finds the photos of each category of captions, as
    two pieces of HTML. Raises UsageError if the photos or the best model are missing."""
    photos, captions = photos_of_split(find_data_dir(args, run.dir), args.split)
    search = Search(cache_of_run(run.dir, args.device), photos, captions, use_bank=False)
    search.embed_photos()
    with report.reading(run):
        captions_are_shared = "different_captions" in run.config["data"]["val"]
    if captions_are_shared:
        text_ids = number_texts(search.texts)
    else:
        text_ids = np.arange(len(search.texts))
    ranks = retrieval_ranks(search.photo_embeddings, search.text_embeddings, search.photo_of_text,
                            text_ids=text_ids)["t2i"]
    title = f"Text to photo by category of caption: {len(photos):,} photos of {args.split}"
    examples = photo_sheet(hits_and_misses(search, ranks, text_ids), level=3)
    return (f'<div class="pairs">{examples}</div>',
            recall_by_category(title, search.texts, ranks))


def run_section(run, examples="", categories=""):
    """The headline, the curves and the tables of a Run as HTML. examples, categories: HTML that is
    put before the curves, and after the tables of recall. Raises UsageError for a run whose files
    lack something."""
    with report.reading(run):
        config, history = run.config, run.history
        tables = report.recall_tables(run)
        title, columns, rows = tables[-1]  # test, once the run is finished
        rows = [[HEADLINE[name], *cells] for name, *cells in rows if name in HEADLINE]
        html = f"<h2>{escape(str(run.dir))}</h2>{paragraph(title)}"
        html += table(["", *columns], rows, "headline") + examples

        epochs = [row["epoch"] for row in history]
        recalls = {}
        for name, direction in (("I->T", "i2t"), ("T->I", "t2i")):
            for k in (1, 10):
                recalls[f"{name} R@{k}"] = [row["val"][f"{direction}_r{k}"] for row in history]
        html += '<div class="curves">'
        html += svg_curves("Recall on validation, in percent", epochs, recalls)
        html += svg_curves("Training loss", epochs, {"": [row["train"]["loss"] for row in history]})
        html += svg_curves("Learning rate at the end of the epoch", epochs,
                           {"": [row["lr"] for row in history]})
        html += "</div>"

        for title, columns, rows in tables:
            html += heading(title) + table(["", *columns], rows)
        html += "".join(map(paragraph, report.recall_notes(run))) + categories
        facts = {
            "training": report.training_time(run),
            "trained on": report.trained_on(run),
            "model": f"{run.settings.model}, {config['parameters']:,} parameters",
            "pretrained encoders": report.encoders(run),
            "hardware": config["device"],
            "precision": config["precision"],
            "date": config["date"],
            "command": config["command"],
        }
        html += heading("How it was trained") + table([], facts.items(), "facts")
    return f"<section>{html}</section>"
