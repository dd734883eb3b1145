"""The orientation of photos whose files have lost their EXIF."""
import io
import json

import pytest
from PIL import Image

from src.utils.orientation import lost_orientation, orientation_in
from src.utils.photo_files import open_photo, version_of


def jpeg(**options):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("content, orientation", [
    ({"exif": '{"Image Orientation": "Rotated 90 CW"}'}, 6),
    ({"exif": {"Image Orientation": "Rotated 180", "Image Make": "x"}}, 3),
    ({"exif": '{"Thumbnail Orientation": "Rotated 180"}'}, 1),
    ({"exif": "Image Orientation"}, 1), ({"exif": None}, 1), (["Image Orientation"], 1),
    ({"exif": '{"Image Orientation": ["Rotated 180"]}'}, 1),
    ({"exif": '{"Image Orientation": "0"}'}, 1), ({"caption": "Image Orientation"}, 1)])
def test_the_orientation_in_json(content, orientation):
    assert orientation_in(json.dumps(content).encode()) == orientation
    assert orientation_in(json.dumps(content).encode()[:-1]) == 1


def test_a_photo_that_has_kept_its_exif_is_not_turned_twice(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    (tmp_path / "a.json").write_text(json.dumps({"exif": {"Image Orientation": "Rotated 90 CW"}}))
    path.write_bytes(jpeg(exif=exif))
    assert open_photo(path, 64).size == (40, 60)
    exif[0x0112] = 1
    path.write_bytes(jpeg(exif=exif))
    assert open_photo(path, 64).size == (60, 40)
    Image.new("RGB", (60, 40)).save(path, "TIFF", tiffinfo={0x0112: 6})
    assert open_photo(path, 64).size == (40, 60)
    path.write_bytes(jpeg())
    assert open_photo(path, 64).size == (40, 60)


def test_without_json_there_is_no_orientation(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    stat = path.stat()
    for content in (None, b"", b"\xff", b"{}"):
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        assert lost_orientation(path) == 1
        assert version_of(path) == (stat.st_size, stat.st_mtime_ns)
    assert lost_orientation(io.BytesIO()) == 1
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.json").mkdir()
    assert lost_orientation(path) == 1
