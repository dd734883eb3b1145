"""Pictures of what a run learned: contact sheets of photos (Pillow) and curves of its history
(matplotlib, an extra)."""
import functools
import importlib.util
import unicodedata
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from src.settings import UsageError
from src.utils.checkpoint import CheckpointError
from src.utils.report import printable
from src.utils.stores import open_photo

CELL, GAP, FRAME = 220, 16, 5  # pixels: a photo's square, space around it, width of a mark
RIGHT = (0, 150, 60)  # its colour
TITLE_SIZE, LABEL_SIZE = 20, 14
TITLE_LINE, LABEL_LINE = TITLE_SIZE + 6, LABEL_SIZE + 4
# With Latin, Greek and Cyrillic letters; one of them is on most machines.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf",
         "arial.ttf", "Arial.ttf", "Arial Unicode.ttf")
NO_CHARACTER = "\uffff"


@functools.cache
def load_font(size):
    """One of FONTS, from the system or matplotlib's copy; else Pillow's, whose letters are ASCII's.
    """
    paths, matplotlib = list(FONTS), importlib.util.find_spec("matplotlib")
    if matplotlib is not None:
        paths.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / FONTS[0])
    for path in paths:
        try:
            # Raqm, the other engine, raises for some texts.
            return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            continue
    return ImageFont.load_default(size)


@functools.cache
def has_glyph(font, character):
    mask, none = font.getmask(character), font.getmask(NO_CHARACTER)
    return mask.size != none.size or bytes(mask) != bytes(none)


def drawable(text, font):
    """The text in what the font can draw: without accents where it lacks them, else "?"."""
    drawn = ""
    for character in printable(unicodedata.normalize("NFC", text)):
        if not has_glyph(font, character):
            base = unicodedata.normalize("NFKD", character)[0]
            character = base if base != character and has_glyph(font, base) else "?"
        drawn += character
    return drawn


def wrap(text, font, width):
    """Text -> lines no wider than `width` pixels; a word that is wider by itself is cut."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            fits = len(word) - 1
            while fits > 1 and font.getlength(word[:fits]) > width:
                fits -= 1
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
    """Write rows of labelled photos, [(title, [(photo's path, label, marked)])], to a PNG or JPEG
    file, a marked photo in a green frame. Raises DataError for what cannot be read, UsageError for
    a path that cannot be written."""
    title_font, label_font = load_font(TITLE_SIZE), load_font(LABEL_SIZE)
    columns = max(3, *(len(cells) for _, cells in rows))  # room for a title above a single photo
    width = GAP + columns * (CELL + GAP)
    laid, height = [], GAP
    for title, cells in rows:
        titles = wrap(drawable(title, title_font), title_font, width - 2 * GAP)
        labels = [wrap(drawable(label, label_font), label_font, CELL) for _, label, _ in cells]
        laid.append((height, titles, labels))
        height += len(titles) * TITLE_LINE + CELL + max(map(len, labels)) * LABEL_LINE + 3 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for (top, titles, labels), (_, cells) in zip(laid, rows):
        for line in titles:
            draw.text((GAP, top), line, "black", title_font)
            top += TITLE_LINE
        top += GAP // 2
        left = GAP
        for (photo, _, marked), lines in zip(cells, labels):
            small = ImageOps.contain(open_photo(photo, CELL), (CELL, CELL))
            x, y = left + (CELL - small.width) // 2, top + (CELL - small.height) // 2
            sheet.paste(small, (x, y))
            if marked:
                right, bottom = x + small.width + FRAME - 1, y + small.height + FRAME - 1
                draw.rectangle((x - FRAME, y - FRAME, right, bottom), outline=RIGHT, width=FRAME)
            colour = RIGHT if marked else "black"
            for i, line in enumerate(lines):
                draw.text((left, top + CELL + 8 + i * LABEL_LINE), line, colour, label_font)
            left += CELL + GAP
    write(path, sheet.save)


def write(path, save):
    """Make the file's folder and call save(path). Raises UsageError where it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that the library does not know
        raise UsageError(f"{path}: cannot be written ({error})") from None


def plot_curves(runs, path):
    """Loss, R@1, R@5 and R@10 both ways, and learning rate over the epochs of Runs, in one PNG.
    Raises UsageError where matplotlib is missing or the path cannot be written, CheckpointError
    where a history lacks a figure."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UsageError("curves need matplotlib: pip install -r requirements-extra.txt") from None
    figure = Figure(figsize=(12, 8), layout="constrained")
    (loss, i2t), (rate, t2i) = figure.subplots(2, 2)
    styles = {10: ":", 5: "--", 1: "-"}
    for i, run in enumerate(runs):
        color, rows = f"C{i}", run.history
        try:
            epochs = [row["epoch"] for row in rows]
            losses = [row["train"]["loss"] for row in rows]
            name = drawable(str(run.dir), load_font(LABEL_SIZE))
            mark = "o" if len(rows) == 1 else None  # a line of one point cannot be seen
            loss.plot(epochs, losses, color, marker=mark, label=name)
            rate.plot(epochs, [row["lr"] for row in rows], color, marker=mark)
            for axes, direction in ((i2t, "i2t"), (t2i, "t2i")):
                for k in (1, 5, 10):
                    recall = [row["val"][f"{direction}_r{k}"] for row in rows]
                    axes.plot(epochs, recall, color, linestyle=styles[k], marker=mark)
        except (KeyError, TypeError):
            raise CheckpointError(f"{run.dir}: an epoch of its history lacks what it should "
                                  "hold") from None
    titles = {loss: "training loss", rate: "learning rate at the epoch's end",
              i2t: "validation, photo to text, R@K in %",
              t2i: "validation, text to photo, R@K in %"}
    for axes, title in titles.items():
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (i2t, t2i):
        axes.set_ylim(bottom=0)
        handles = [Line2D([], [], color="black", linestyle=style, label=f"R@{k}")
                   for k, style in styles.items()]
        axes.legend(handles=handles, loc="upper left")
    loss.legend(loc="upper right")
    write(path, lambda path: figure.savefig(path, dpi=120))


def svg_curves(title, epochs, lines):
    """Lines over the epochs, {name: values, None where there is none}, as SVG."""
    top = max((value for line in lines.values() for value in line if value is not None), default=1)
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
    parts = [f'<path d="M40 {y}H470" stroke="gray" stroke-width=".5"/><text x="36" y="{y + 4}" '
             f'text-anchor="end">{top * (220 - y) / 200:.3g}</text>' for y in (20, 120, 220)]
    parts += [f'<text x="{x}" y="236" text-anchor="{anchor}">{said}</text>' for x, anchor, said in
              ((40, "start", f"epoch {first}"), (470, "end", last))]
    for i, (name, line) in enumerate(lines.items()):
        points = [f"{40 + 430 * (epoch - first) / (last - first):.1f},{220 - 200 * value / top:.1f}"
                  for epoch, value in zip(epochs, line) if value is not None]
        colour = ("#2a7de1", "#e0662a", "#0a9b52", "#b04ad8")[i]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
                     'stroke-width="2" stroke-linecap="square"/>'
                     f'<text x="{40 + 110 * i}" y="12" fill="{colour}">{escape(name)}</text>')
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 480 240" role="img" '
            f'aria-label="{title}" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
            "</figure>")
