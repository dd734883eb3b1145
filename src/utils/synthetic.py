"""The built-in dataset: captioned scenes of coloured shapes, in Flickr8k's layout.

A scene holds one or two groups of shapes: a count, a size, a colour, a shape and a place. No two
scenes are the same. Of five captions two leave things out. Everything follows from the seed."""
import contextlib
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from src.utils.captions import CAPTION_FILES, PHOTO_FOLDERS, SPLIT_FILES, read_split
from src.utils.errors import DataError

NUM_PICTURES = {"train": 2000, "val": 200, "test": 200}
PICTURE_SIZE = 80  # pixels
COLOURS = {"red": (214, 40, 40), "blue": (40, 70, 200), "green": (40, 150, 60),
           "yellow": (240, 210, 40), "orange": (240, 130, 30), "purple": (130, 50, 170),
           "pink": (245, 150, 190), "black": (25, 25, 25)}
SHAPES = {"circle": ("circle", "disc"), "square": ("square", "box"),
          "triangle": ("triangle", "pyramid"), "cross": ("cross", "plus sign")}  # two names each
SIZES = {"small": (7, ("small", "tiny", "little")),  # radius in pixels, names
         "large": (12, ("large", "big", "huge"))}
PLACES = {"left": ("on the left", "at the left side"),
          "right": ("on the right", "at the right side"),
          "top": ("at the top", "up above"), "bottom": ("at the bottom", "down below")}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATION = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
NUMBERS = ("a", "two", "three")


def draw_scene(rng):
    """-> tuple of one or two groups (count, size, colour, shape, place)."""
    place = rng.choice(list(PLACES))
    places = (place, OPPOSITE[place]) if rng.random() < 0.75 else (place,)
    return tuple((rng.randint(1, 3), rng.choice(list(SIZES)), rng.choice(list(COLOURS)),
                  rng.choice(list(SHAPES)), place) for place in places)


def caption_scene(scene, rng):
    def phrase(group, with_size=True):
        count, size, colour, shape, _ = group
        names = [rng.choice(SIZES[size][1])] * with_size + [colour, rng.choice(SHAPES[shape])]
        number = "an" if count == 1 and names[0][0] in "aeiou" else NUMBERS[count - 1]
        plural = "" if count == 1 else "es" if names[-1][-1] in "sx" else "s"
        return f"{number} {' '.join(names)}{plural}"

    def placed(group):
        return f"{phrase(group)} {rng.choice(PLACES[group[4]])}"

    first, last, one = scene[0], scene[-1], len(scene) == 1
    captions = [f"{' and '.join(placed(group) for group in scene)} ."]
    verb = "is" if first[0] == 1 else "are"
    captions.append(f"There {verb} {phrase(first)}{'' if one else ' and ' + phrase(last)} .")
    reverse = [f"{rng.choice(PLACES[group[4]])} {phrase(group)}" for group in reversed(scene)]
    captions.append(f"{', '.join(reverse)} .")
    start = phrase(first)
    where = rng.choice(PLACES[first[4]]) if one else f"{RELATION[first[4]]} {phrase(last)}"
    captions.append(f"{start} {where} .")
    short = [phrase(group, with_size=False) for group in scene]
    return captions + [f"A picture of {' with '.join(short)} ."]


def paint_scene(scene, rng):
    """The scene as an RGB picture, with light noise in background, colours and positions."""
    grey = rng.randint(205, 245)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (grey, grey, grey))
    draw = ImageDraw.Draw(picture)
    for count, size, colour, shape, place in scene:
        radius = SIZES[size][0]
        for i in range(count):
            along = PICTURE_SIZE * (i + 1) / (count + 1) + rng.uniform(-3, 3)
            across = PICTURE_SIZE * (0.25 if place in ("left", "top") else 0.75)
            across += rng.uniform(-5, 5)
            x, y = (across, along) if place in ("left", "right") else (along, across)
            r = radius + rng.uniform(-1, 1)
            fill = tuple(max(0, min(255, c + rng.randint(-15, 15))) for c in COLOURS[colour])
            if shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill)
            elif shape == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill)
            elif shape == "triangle":
                draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
            else:
                draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
                draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    return picture


def is_whole(root_dir):
    """Whether all is there that the split files list."""
    try:
        names = [name for split in SPLIT_FILES for name in read_split(root_dir, split)]
    except DataError:
        return False
    paths = [root_dir / PHOTO_FOLDERS[0] / name for name in names]
    return all(path.is_file() for path in [root_dir / CAPTION_FILES[0], *paths])


def write_synthetic(root_dir, seed=0, num_pictures=None):
    """Write the dataset into root_dir, unless it is there and whole -> whether it was written. It
    is made in a folder of this process's own and moved into place, so that several processes may do
    it at once. Raises DataError when root_dir holds something else."""
    root_dir = Path(root_dir)
    readme = root_dir / "README.txt"
    about = f"Captioned scenes of shapes, made by src/utils/synthetic.py from seed {seed}.\n"
    if root_dir.exists() and any(root_dir.iterdir()):
        if not (readme.is_file() and readme.read_text(encoding="utf-8") == about):
            raise DataError(f"{root_dir}: holds something other than the synthetic dataset; name "
                            "another --data_dir")
        if is_whole(root_dir):
            return False
    root_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root_dir.name}.", dir=root_dir.parent) as staging:
        made = Path(staging) / root_dir.name
        _write_files(made, seed, num_pictures or NUM_PICTURES)
        (made / readme.name).write_text(about, encoding="utf-8")
        with contextlib.suppress(OSError):  # where rename() does not replace an empty folder
            root_dir.rmdir()
        try:
            made.rename(root_dir)
        except OSError:  # another process was first, or what is there is not whole
            _complete(made, root_dir)
    return True


def _write_files(folder, seed, num_pictures):
    photos = folder / PHOTO_FOLDERS[0]
    photos.mkdir(parents=True)
    rng = random.Random(seed)
    seen, captions, index = set(), [], 0
    for split, count in num_pictures.items():
        names = []
        while len(names) < count:
            scene = draw_scene(rng)
            if frozenset(scene) in seen:
                continue
            seen.add(frozenset(scene))
            names.append(f"scene_{index:05d}.jpg")
            index += 1
            for i, caption in enumerate(caption_scene(scene, rng)):
                captions.append(f"{names[-1]}#{i}\t{caption}")
            paint_scene(scene, rng).save(photos / names[-1], "JPEG", quality=92)
        (folder / SPLIT_FILES[split]).write_bytes("".join(f"{name}\n" for name in names).encode())
    (folder / CAPTION_FILES[0]).write_bytes("".join(f"{line}\n" for line in captions).encode())


def _complete(made, root_dir):
    """Replace the files of a dataset that is not whole, one by one: photos, then lists."""
    if is_whole(root_dir):
        return
    for path in sorted(made.rglob("*")):
        if path.is_file():
            place = root_dir / path.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
