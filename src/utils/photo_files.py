"""Photo files: which files of a folder are photos, and how one is opened.

This module must not import torch."""
import collections
import contextlib
import functools
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from src.utils.console import printable
from src.utils.errors import DataError
from src.utils.orientation import lost_orientation

# Formats that Pillow recognises but cannot decode by itself.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Formats whose first bytes tell them apart from anything else, so that a name is not needed.
SELF_EVIDENT = {"JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"}
# What a NAS, a system or a program makes beside the photos: thumbnails, and what was deleted. Each
# pattern is for the names, in lower case, of a folder and of the one that it is in.
SYSTEM_FOLDERS = re.compile(r"""
    .*/(@eadir|@tmp|[#@]recycle|[#@]snapshots?|@recently-snapshot|@__thumb|trashbox)  # NAS
    |.*/(\$recycle\.bin|recycler|system\ volume\ information|lost\+found)  # Windows, Linux
    |.*/(__macosx|network\ trash\ folder|temporary\ items)  # macOS
    |.*\.(photos|photo|ap)library/(resources|scopes|thumbnails|previews)  # Photos, Aperture
    |.*/.*\.lrdata|captureone/cache|.*\.cocatalog/cache  # Lightroom, Capture One
    |appdata_.*/preview  # Nextcloud
    |.*/\.(thumb|trash|dtrash|@__|wdmc|photostructure|picasaoriginals).*""",
                            re.VERBOSE | re.DOTALL)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # of an iPhone's photos, and of some cameras'
JPEG_START = b"\xff\xd8\xff"
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
# Pillow warns of odd tags and of pictures above 89 megapixels, but it reads them.
warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def register_heif():
    """Let Pillow read HEIC photos if pillow-heif is installed. Return whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@functools.cache
def photo_suffixes():
    """Return the suffixes, such as ".jpg", of all files that the installed Pillow can decode."""
    Image.init()
    register_heif()
    readable = (Image.OPEN.keys() | {"MPO"}) - NOT_DECODED
    return {suffix for suffix, image_format in Image.EXTENSION.items() if image_format in readable}


def is_system_folder(place, name):
    """Whether a folder holds thumbnails or deleted photos, by its name and that of its place."""
    return SYSTEM_FOLDERS.fullmatch(f"{Path(place).name}/{name}".lower()) is not None


def own_folders(place, names):
    """Return those of the subfolders of a place, sorted, that are a user's own: neither hidden nor
    a system's, see `is_system_folder`."""
    return sorted(name for name in names
                  if not (name.startswith(".") or is_system_folder(place, name)))


def walk_own_folders(root):
    """Yield (folder, names of its files) of a folder and of those below it that are a user's own,
    see `own_folders`. Links that lead out of the folder are followed, and each folder is entered
    once."""
    real_root, entered = os.path.realpath(root), set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        leads_back = os.path.islink(folder) and f"{real}{os.sep}".startswith(f"{real_root}{os.sep}")
        if real in entered or (leads_back and str(folder) != str(root)):
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = own_folders(folder, subfolders)  # os.walk descends into what is left
        yield folder, names


def is_photo(path):
    """Whether a file is a photo, by its suffix, or by its content if its name has no suffix, like
    "photo" and "2024-05-12 10.30"."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in photo_suffixes():
        return True
    if re.fullmatch(r"\.[a-z]\w*", suffix):
        return False
    formats = [name for name in Image.OPEN if name in SELF_EVIDENT]
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file, open_reduced(file, 1, formats):
            return True
    except Image.DecompressionBombError:  # a photo, even if it is not read
        return True
    except Exception:  # what is odd in a file raises any exception
        return False


def photos_of_folder(folder, skipped=None, left_out=None):
    """The sorted paths of the photos in a folder and below it.

    Links are followed, and each folder is entered once. Hidden files and folders, whose names begin
    with a dot, are ignored, and so is what systems keep beside the photos, see `is_system_folder`,
    unless it is the folder itself.

    skipped: a Counter to which the files that are not photos are added, by suffix. left_out: a list
    to which hidden photos and those in systems' folders are added. Raises DataError if there is no
    such folder, and if there are no photos in it."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder")
    skipped = collections.Counter() if skipped is None else skipped
    left_out = [] if left_out is None else left_out
    suffixes = photo_suffixes()
    photos, entered = [], set()

    def count_error(error):
        skipped["folders that cannot be opened"] += 1

    def leave_out(place, names):
        left_out.extend(Path(place, name) for name in sorted(names)
                        if os.path.splitext(name)[1].lower() in suffixes)

    for place, folders, names in os.walk(folder, onerror=count_error, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        for name in folders:
            if is_system_folder(place, name):
                for below, _, inner_names in os.walk(Path(place, name)):
                    leave_out(below, inner_names)
        folders[:] = own_folders(place, folders)
        leave_out(place, [name for name in names if name.startswith(".")])
        for name in names:
            if name.startswith("."):
                continue
            path = Path(place, name)
            if not path.is_file():
                skipped["broken links or special files"] += 1
            elif is_photo(path):
                photos.append(path)
            else:
                skipped[path.suffix.lower() or "files without a suffix"] += 1
    if not photos:
        reasons = [list_skipped(skipped) + heif_hint(skipped)] if skipped else []
        if left_out:
            reasons.append(list_left_out(left_out))
        reason = f" (skipped: {', '.join(reasons)})" if reasons else ""
        raise DataError(f"{folder}: holds no photos that can be read{reason}")
    return sorted(photos, key=lambda path: path.parts)  # on Windows, too, capitals come first


def list_left_out(left_out):
    """List of left out photos -> "2 thumbnails, deleted or hidden photos, such as @eaDir/a.jpg"."""
    return (f"{len(left_out):,} thumbnails, deleted or hidden photos, such as "
            f"{printable(str(left_out[0]))}")


def list_skipped(skipped):
    """Counter of skipped files by suffix -> "3 .heic, 1 .txt"."""
    return ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(skipped.items()))


def heif_hint(skipped):
    """What to say after a list of skipped files about HEIC photos among them. skipped: see
    `list_skipped`."""
    number = sum(skipped[suffix] for suffix in HEIF_SUFFIXES)
    if not number or register_heif():
        return ""
    return f"; {number:,} of them can be read after pip install -r requirements-extra.txt"


def to_8_bits(photo):
    """Convert a grey PIL image of more than 8 bits, or of floats, to 8 bits.

    Cameras store 10, 12 or 14 bits in 16, so integers are scaled by the fewest bits, of 8, 10, 12,
    14 and 16, that the brightest pixel needs. Floats, and integers beyond 16 bits, are scaled by
    their range. Raises ValueError if no pixel is finite."""
    values = np.asarray(photo, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("not one pixel is a finite number")
    low, high = finite.min(), finite.max()
    if photo.mode != "F" and low >= 0 and high < 2 ** 16:
        low, high = 0, next(2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2 ** bits)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    scaled[values == photo.info.get("transparency", np.nan)] = 1.0  # a PNG's transparent grey
    return Image.fromarray(np.rint(255 * scaled).astype(np.uint8))


class PlainJpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG of which nothing but the picture is read, and which may have any size."""

    def _read_dpi_from_exif(self):  # raises for some odd resolutions
        pass


def open_plain_jpeg(file, size):
    """Open a JPEG at a smaller scale, see `open_photo`, whatever is odd in its EXIF.

    Decoding may take as much memory as Pillow's limit of pixels permits to any JPEG. Raises
    DecompressionBombError if it would take more."""
    photo = PlainJpeg(file)
    file.seek(-4 - 2 * photo.layers, os.SEEK_CUR)  # to the header of the first scan
    several_scans = "progressive" in photo.info or file.read(1)[0] != photo.layers
    coefficients = 0
    if several_scans:  # then the decoder keeps all coefficients, whatever the scale
        samples = [across * down for _, across, down, _ in photo.layer]
        coefficients = photo.width * photo.height * sum(samples) / max(samples)
    photo.draft("RGB", (size, size))
    pixels = photo.width * photo.height
    limit = 2 * (Image.MAX_IMAGE_PIXELS or np.inf)
    # Pillow takes 4 bytes per pixel, and the decoder 2 per coefficient, of which a pixel has 3.
    if pixels > limit or 4 * pixels + 2 * coefficients > (4 + 2 * 3) * limit:
        raise Image.DecompressionBombError
    return photo


def open_reduced(file, size, formats=None):
    """Open a picture as Image.open does, a JPEG at a smaller scale, see `open_photo`. A JPEG that
    Image.open refuses, because of its size or of odd EXIF, is opened all the same. formats: those
    that are tried, by default all."""
    register_heif()
    try:
        photo = Image.open(file, formats=formats)
    except Exception as error:  # odd EXIF raises any exception
        file.seek(0)
        if file.read(len(JPEG_START)) != JPEG_START:
            raise
        file.seek(0)
        try:
            return open_plain_jpeg(file, size)
        except SyntaxError:
            raise error from None
    photo.draft("RGB", (size, size))
    return photo


def orientation_of(photo):
    """Return EXIF's orientation of a photo that is loaded, 1 to 8, or None if none is found."""
    orientation = None
    with contextlib.suppress(Exception):  # odd EXIF raises any exception
        orientation = photo.getexif().get(ExifTags.Base.Orientation)
    if orientation is None:
        # Pillow stops at the first tag that is odd, so the tags of the first directory are read
        # here, each of 12 bytes.
        with contextlib.suppress(struct.error, KeyError, TypeError):
            exif = re.sub(b"^(Exif\0\0)*", b"", photo.info.get("exif"))
            order = {b"II": "<", b"MM": ">"}[exif[:2]]
            directory, = struct.unpack_from(f"{order}I", exif, 4)
            count, = struct.unpack_from(f"{order}H", exif, directory)
            for i in range(count):
                tag, kind, _, value = struct.unpack_from(
                    f"{order}HHIH", exif, directory + 2 + 12 * i)
                if tag == ExifTags.Base.Orientation and kind == 3:  # an integer of 16 bits
                    return value
    return orientation


def turn_upright(photo, path):
    """Return a photo turned as EXIF says, or else as `lost_orientation` does. Unlike
    ImageOps.exif_transpose, this does not write the EXIF anew, which fails for odd tags."""
    photo.load()  # a TIFF is turned while it is loaded
    orientation = orientation_of(photo)
    if orientation is None and photo.format != "TIFF":
        orientation = lost_orientation(path)
    method = None
    with contextlib.suppress(TypeError):  # not even hashable
        method = TRANSPOSE_OF_ORIENTATION.get(orientation)
    return photo if method is None else photo.transpose(method)


def open_photo(path, size):
    """Open a photo file of any mode that Pillow reads. Return a PIL image in RGB.

    The photo is turned upright according to EXIF, or to the NAME.json of img2dataset beside it, and
    its transparent parts become white. A JPEG is decoded at a smaller scale, which is faster, but
    not below `size` pixels. Raises DataError, with the name of the file, if it is missing, empty,
    truncated, too large or not an image."""
    path = Path(path) if isinstance(path, str) else path
    try:
        if isinstance(path, Path) and path.is_fifo():
            raise ValueError("a pipe, not a file")  # opening it would wait for a writer
        with path.open("rb") as file, open_reduced(file, size) as photo:
            photo = turn_upright(photo, path)
            if photo.mode in ("I", "F") or photo.mode.startswith("I;"):
                photo = to_8_bits(photo)
            if photo.has_transparency_data:
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            return photo.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except UnidentifiedImageError:
        fault = "not an image" if path.stat().st_size else "the file is empty"
        if path.suffix.lower() in HEIF_SUFFIXES and not register_heif():
            fault = "a HEIC photo, which needs pip install -r requirements-extra.txt"
        raise DataError(f"{path}: {fault}") from None
    except Image.DecompressionBombError:
        megapixels = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise DataError(f"{path}: the picture has more than {megapixels:.0f} megapixels, and only "
                        "JPEGs are read at a smaller scale, unless they are progressive; please "
                        "save it smaller") from None
    except Exception as error:  # for a damaged file, Pillow's decoders raise any exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}") from None


def version_of(path):
    """Return a tuple that changes with what is read from a photo file: its size, the time of its
    last change, and its `lost_orientation` if that is not 1."""
    stat = path.stat()
    version = stat.st_size, stat.st_mtime_ns
    orientation = lost_orientation(path)
    return version if orientation == 1 else (*version, orientation)
