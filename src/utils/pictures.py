"""Pictures of what a run learned: contact sheets of photos (Pillow) and curves of its history (matplotlib, an extra)."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from src.utils.checkpoint import CheckpointError
from src.utils.flickr8k_simple import DataError

CELL, GAP, FRAME = 220, 16, 5  # pixels: side of a photo's square, space around it, width of the mark
RIGHT = (0, 150, 60)  # the colour of a mark
TITLE_SIZE, LABEL_SIZE = 20, 14


def wrap(text, font, width):
    """Text -> lines no wider than `width` pixels; a word that is wider by itself is cut."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines += [line] * bool(line) + [word[:fits]]
            line, word = "", word[fits:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return lines + [line] * bool(line)


def contact_sheet(rows, path):
    """Write rows of labelled photos to a PNG or JPEG file.

    rows: [(title, [(photo's path, label, marked)])], a marked photo standing in a green frame. Raises DataError for a
    photo that cannot be read, and for a path that cannot be written.
    """
    title_font, label_font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(LABEL_SIZE)
    columns = max(3, *(len(cells) for _, cells in rows))  # room for a title above a single photo, too
    width = GAP + columns * (CELL + GAP)
    laid, height = [], GAP
    for title, cells in rows:
        titles = wrap(title, title_font, width - 2 * GAP)
        labels = [wrap(label, label_font, CELL) for _, label, _ in cells]
        laid.append((height, titles, labels))
        height += len(titles) * (TITLE_SIZE + 6) + CELL + GAP + max(map(len, labels)) * (LABEL_SIZE + 4) + 2 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for (top, titles, labels), (_, cells) in zip(laid, rows):
        for line in titles:
            draw.text((GAP, top), line, "black", title_font)
            top += TITLE_SIZE + 6
        top += GAP // 2
        for column, ((photo, _, marked), lines) in enumerate(zip(cells, labels)):
            left = GAP + column * (CELL + GAP)
            try:
                with Image.open(photo) as image:
                    image.draft("RGB", (CELL, CELL))
                    small = ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (CELL, CELL))
            except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises
                raise DataError(f"{photo}: {error}") from None
            x, y = left + (CELL - small.width) // 2, top + (CELL - small.height) // 2
            sheet.paste(small, (x, y))
            if marked:
                draw.rectangle((x - FRAME, y - FRAME, x + small.width + FRAME - 1, y + small.height + FRAME - 1),
                               outline=RIGHT, width=FRAME)
            for i, line in enumerate(lines):
                draw.text((left, top + CELL + 8 + i * (LABEL_SIZE + 4)), line, RIGHT if marked else "black", label_font)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not know
        raise DataError(f"{path}: cannot be written ({error})") from None


def plot_curves(runs, path):
    """Loss, R@1, R@5 and R@10 both ways, and learning rate over the epochs of runs (see `load_run`), in one PNG.

    Raises CheckpointError where matplotlib is missing, a history lacks a figure, or the path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise CheckpointError("curves need matplotlib: pip install -r requirements-extra.txt") from None
    figure = Figure(figsize=(12, 8), layout="constrained")
    (loss, i2t), (rate, t2i) = figure.subplots(2, 2)
    for i, run in enumerate(runs):
        try:
            epochs = [row["epoch"] for row in run["history"]]
            loss.plot(epochs, [row["train"]["loss"] for row in run["history"]], f"C{i}", label=str(run["dir"]))
            rate.plot(epochs, [row["lr"] for row in run["history"]], f"C{i}")
            for axes, way in ((i2t, "i2t"), (t2i, "t2i")):
                for k, style in ((1, "-"), (5, "--"), (10, ":")):
                    axes.plot(epochs, [row["val"][f"{way}_r{k}"] for row in run["history"]], f"C{i}", linestyle=style)
        except (KeyError, TypeError):
            raise CheckpointError(f"{run['dir']}: an epoch of its history lacks what it should hold") from None
    for axes, title in ((loss, "training loss"), (rate, "learning rate at the epoch's end"),
                        (i2t, "validation, photo to text, R@K in %"), (t2i, "validation, text to photo, R@K in %")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
    for axes in (i2t, t2i):
        axes.set_ylim(bottom=0)
        axes.legend(handles=[Line2D([], [], color="black", linestyle=style, label=f"R@{k}")
                             for k, style in ((10, ":"), (5, "--"), (1, "-"))], loc="upper left")
    loss.legend(loc="upper right")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from None
