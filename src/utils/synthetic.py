"""The built-in dataset: pictures of coloured shapes with captions, in Flickr8k's layout.

A picture shows a scene of one or two groups of equal shapes. A group has a count, a size, a colour,
a shape and a place. No two scenes of the dataset are the same. Each has five captions, of which one
omits the places and another one the sizes and the places. The seed determines every byte."""
import contextlib
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from src.utils import files
from src.utils.captions import CAPTION_FILES, read_split
from src.utils.errors import DataError
from src.utils.folder import SPLIT_FILES
from src.utils.photo_names import PHOTO_FOLDERS

NUM_PICTURES = {"train": 2000, "val": 200, "test": 200}
PICTURE_SIZE = 80  # pixels
COLOURS = {"red": (214, 40, 40), "blue": (40, 70, 200), "green": (40, 150, 60),
           "yellow": (240, 210, 40), "orange": (240, 130, 30), "purple": (130, 50, 170),
           "pink": (245, 150, 190), "black": (25, 25, 25)}
# Every size, shape and place has several names, so that the captions are worded differently.
SHAPES = {"circle": ("circle", "disc"), "square": ("square", "box"),
          "triangle": ("triangle", "pyramid"), "cross": ("cross", "plus sign")}
SIZES = {"small": (7, ("small", "tiny", "little")),  # the radius in pixels, and the names
         "large": (12, ("large", "big", "huge"))}
PLACES = {"left": ("on the left", "at the left side"),
          "right": ("on the right", "at the right side"),
          "top": ("at the top", "up above"), "bottom": ("at the bottom", "down below")}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATION = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
NUMBERS = ("a", "two", "three")


def draw_scene(rng):
    """Draw a scene at random: a tuple of one or two groups (count, size, colour, shape, place)."""
    place = rng.choice(list(PLACES))
    places = (place, OPPOSITE[place]) if rng.random() < 0.75 else (place,)
    return tuple((rng.randint(1, 3), rng.choice(list(SIZES)), rng.choice(list(COLOURS)),
                  rng.choice(list(SHAPES)), place) for place in places)


def caption_scene(scene, rng):
    """Write five captions of a scene, with words drawn at random."""
    def phrase(group, with_size=True):
        """Describe a group: "two small red discs"."""
        count, size, colour, shape, _ = group
        size_name, shape_name = rng.choice(SIZES[size][1]), rng.choice(SHAPES[shape])
        words = [size_name, colour, shape_name] if with_size else [colour, shape_name]
        number = "an" if count == 1 and words[0][0] in "aeiou" else NUMBERS[count - 1]
        plural = "es" if words[-1][-1] in "sx" else "s"
        return f"{number} {' '.join(words)}{'' if count == 1 else plural}"

    def place(group):
        return rng.choice(PLACES[group[4]])

    first, last = scene[0], scene[-1]
    is_single = len(scene) == 1
    with_places = [f"{phrase(group)} {place(group)}" for group in scene]
    captions = [f"{' and '.join(with_places)} ."]

    verb = "is" if first[0] == 1 else "are"
    phrases = [phrase(group) for group in scene]
    captions.append(f"There {verb} {' and '.join(phrases)} .")

    places_first = [f"{place(group)} {phrase(group)}" for group in reversed(scene)]
    captions.append(f"{', '.join(places_first)} .")

    subject = phrase(first)
    predicate = place(first) if is_single else f"{RELATION[first[4]]} {phrase(last)}"
    captions.append(f"{subject} {predicate} .")

    without_sizes = [phrase(group, with_size=False) for group in scene]
    captions.append(f"A picture of {' with '.join(without_sizes)} .")
    return captions


def paint_scene(scene, rng):
    """Paint a scene as a PIL image in RGB, with light noise in the background, the colours, the
    sizes and the positions."""
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


def is_complete(root_dir):
    """Whether the captions, the splits and all photos that the splits list are there."""
    try:
        names = [name for split in SPLIT_FILES for name in read_split(root_dir, split)]
    except DataError:
        return False
    paths = [root_dir / PHOTO_FOLDERS[0] / name for name in names]
    return all(path.is_file() for path in [root_dir / CAPTION_FILES[0], *paths])


def write_synthetic(root_dir, seed=0, num_pictures=None):
    """Write the dataset into root_dir, unless it is already there and complete. Return whether it
    was written.

    num_pictures: {"train", "val", "test": number}, NUM_PICTURES by default. The dataset is written
    into a temporary folder and then moved, so that several processes may call this at once. Raises
    DataError if root_dir holds anything else, also if that is the dataset of another seed."""
    root_dir = Path(root_dir)
    readme = root_dir / "README.txt"
    about = f"Captioned scenes of shapes, made by src/utils/synthetic.py from seed {seed}.\n"
    if root_dir.exists() and any(root_dir.iterdir()):
        if not (readme.is_file() and readme.read_text(encoding="utf-8") == about):
            raise DataError(f"{root_dir}: this folder holds something other than the synthetic "
                            "dataset; name another one with --data_dir")
        if is_complete(root_dir):
            return False
    root_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root_dir.name}.", dir=root_dir.parent) as staging:
        new_dir = Path(staging) / root_dir.name
        write_files(new_dir, seed, num_pictures or NUM_PICTURES)
        (new_dir / readme.name).write_text(about, encoding="utf-8")
        with contextlib.suppress(OSError):  # not every system's rename() replaces an empty folder
            root_dir.rmdir()
        try:
            new_dir.rename(root_dir)
        except OSError:  # another process was faster, or root_dir holds an incomplete dataset
            if not is_complete(root_dir):
                replace_files(new_dir, root_dir)
    return True


def write_files(folder, seed, num_pictures):
    """Write the photos, captions and splits into a new folder."""
    photos = folder / PHOTO_FOLDERS[0]
    photos.mkdir(parents=True)
    rng = random.Random(seed)
    seen_scenes, caption_lines, index = set(), [], 0
    for split, count in num_pictures.items():
        names = []
        while len(names) < count:
            scene = draw_scene(rng)
            if frozenset(scene) in seen_scenes:
                continue
            seen_scenes.add(frozenset(scene))
            name = f"scene_{index:05d}.jpg"
            names.append(name)
            index += 1
            for i, caption in enumerate(caption_scene(scene, rng)):
                caption_lines.append(f"{name}#{i}\t{caption}")
            paint_scene(scene, rng).save(photos / name, "JPEG", quality=92)
        write_lines(folder / SPLIT_FILES[split], names)
    write_lines(folder / CAPTION_FILES[0], caption_lines)


def write_lines(path, lines):
    """Write a text file, which has the same bytes on every system."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def replace_files(new_dir, root_dir):
    """Replace the files of an incomplete dataset one by one. The photos come first, so that the
    lists never name a photo that is not there yet."""
    for path in sorted(new_dir.rglob("*")):
        if path.is_file():
            place = root_dir / path.relative_to(new_dir)
            place.parent.mkdir(parents=True, exist_ok=True)
            files.replace(path, place)
