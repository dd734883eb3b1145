"""Photos as browsers show them: small, at full size, and when they were taken."""
import contextlib
import datetime
import io

from PIL import ExifTags, Image

from src.utils.orientation import lost_orientation
from src.utils.photo_files import (
    TRANSPOSE_OF_ORIENTATION,
    open_photo,
    open_reduced,
    orientation_of,
)

FULL_SIZE = 4096  # the longer side in pixels of a photo that is encoded anew to be shown
# The formats that browsers show, and the modes of Pillow that have 8 bits.
MEDIA_TYPES = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "GIF": "image/gif",
               "WEBP": "image/webp", "AVIF": "image/avif", "BMP": "image/bmp"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"}


def thumbnail(photo, pixels, quality=80):
    """A photo as JPEG bytes, upright, with a longer side of at most so many pixels. photo: a path,
    or an object with `open`. Raises DataError as `open_photo` does."""
    small = open_photo(photo, pixels)
    small.thumbnail((pixels, pixels))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return file.getvalue()


def full_size(photo):
    """The media type and the bytes of a photo at full size: its file as it is where browsers show
    it the way that `open_photo` reads it, and else a JPEG of at most FULL_SIZE pixels. photo: as in
    `thumbnail`. Raises DataError as `open_photo` does."""
    media_type = None
    with contextlib.suppress(Exception):  # odd files raise any exception
        with photo.open("rb") as file, open_reduced(file, 2 ** 16) as picture:  # not reduced
            orientation = orientation_of(picture) or lost_orientation(photo)
            is_right = orientation not in TRANSPOSE_OF_ORIENTATION
            if not is_right and picture.format in ("JPEG", "MPO"):
                # Browsers turn a JPEG as its EXIF says, but not as its XMP or another file does.
                exif = Image.Exif()
                exif.load(picture.info["exif"])
                is_right = exif[ExifTags.Base.Orientation] == orientation
            if (is_right and picture.mode in MODES
                    and picture.width * picture.height <= Image.MAX_IMAGE_PIXELS):
                media_type = MEDIA_TYPES.get(picture.format)
    if media_type is None:
        return "image/jpeg", thumbnail(photo, FULL_SIZE, quality=90)
    return media_type, photo.read_bytes()


def date_taken(photo):
    """When a photo was taken, as a datetime, by the camera's clock, or None if its EXIF does not
    say. photo: as in `thumbnail`."""
    with contextlib.suppress(Exception):  # odd files, odd EXIF and dates like "0000:00:00"
        with photo.open("rb") as file, open_reduced(file, 1) as picture:
            exif = picture.getexif().get_ifd(ExifTags.IFD.Exif)
            text = exif[ExifTags.Base.DateTimeOriginal]
            return datetime.datetime.strptime(text.strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
    return None
