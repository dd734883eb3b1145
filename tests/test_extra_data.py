"""The flag --extra_data adds pairs to the training split, but no photo of val or test."""
import io
import json

import numpy as np
import pytest
from PIL import Image

from src import report
from src.comparison import comparison
from src.runs import CONFIG, HISTORY, load_run
from src.settings import make_settings
from src.utils.folder import SPLIT_FILES
from src.utils.splits import load_splits
from tests.conftest import main
from tests.test_duplicates import FLIP, bordered, cropped, middle_square, scene


def jpeg(photo, quality=90):
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(root, photos):
    """Write a dataset in Flickr8k's layout. photos: {split: {name: (content of the file, number of
    the scene that its captions tell)}}."""
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, files in photos.items():
        (root / SPLIT_FILES[split]).write_text("".join(f"{name}\n" for name in files))
        for name, (content, number) in files.items():
            (root / "Images" / name).parent.mkdir(exist_ok=True)
            (root / "Images" / name).write_bytes(content)
            lines += [f"{name}#{i}\tphoto {number} told in way {i} .\n" for i in range(3)]
    (root / "Flickr8k.token.txt").write_text("".join(lines))
    return root


def numbered(*numbers):
    """Photos of these scenes under names as Flickr gives them, for `write`."""
    return {f"{1_000_000 + i}_0123456789.jpg": (jpeg(scene(i)), i) for i in numbers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with three datasets: the whole, its first half, and the rest, into whose training
    split copies of photos in val and test have been slipped."""
    root = tmp_path_factory.mktemp("extra")
    held_out = {"val": numbered(*range(40, 50)), "test": numbered(*range(50, 60))}
    write(root / "whole", {"train": numbered(*range(40))} | held_out)
    write(root / "half", {"train": numbered(*range(20))} | held_out)
    slipped_in = {
        "same_content.jpg": (jpeg(scene(41)), 41),
        "1000042.jpg": (jpeg(scene(999)), 42),  # only its Flickr number tells
        "compressed.jpg": (jpeg(scene(43), 30), 43),
        "mirrored.png": (jpeg(scene(50).transpose(FLIP)), 50),
        "cropped.jpg": (jpeg(cropped(scene(51))), 51),
        "bordered.jpg": (jpeg(bordered(scene(44))), 44),
        "square.jpg": (jpeg(middle_square(scene(52))), 52),
        "trained_on.jpg": (jpeg(scene(3)), 3),  # the training split has it already
    }
    write(root / "rest", {"train": slipped_in | numbered(*range(20, 40)),
                          "val": numbered(60, 61), "test": numbered(52, 62)})
    return root


def train(output_dir, *given, epochs=2):
    """Train a run -> its history, without the seconds."""
    assert main("--model", "tiny", "--tokenizer", "bpe", "--output_dir", output_dir, "--epochs",
                epochs, "--batch_size", 12, "--device", "cpu", *given) == 0
    history = json.loads((output_dir / HISTORY).read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


SKIPPED = {"equal content of a photo in val or test": 1,
           "the Flickr number of a photo in val or test": 1,
           "near-duplicates of a photo in val or test": 5,
           "equal content of a photo in training": 1}


@pytest.mark.parametrize("encoders", [False, True])
def test_training_on_a_half_and_the_rest_equals_training_on_the_whole(
        folders, tmp_path, capsys, encoder_file, encoders):
    given = []
    if encoders:
        given = ["--image_encoder", f"{encoder_file}:photos",
                 "--text_encoder", f"{encoder_file}:texts"]
    whole = train(tmp_path / "whole", "--data_dir", folders / "whole", *given)
    half = train(tmp_path / "half", "--data_dir", folders / "half", *given)
    capsys.readouterr()
    both = train(tmp_path / "both", "--data_dir", folders / "half", "--extra_data",
                 folders / "rest", *given)
    assert both == whole != half
    out = capsys.readouterr().out
    assert (f"{folders / 'rest'}: 20 photos with 60 captions join the training split; 1 left out: "
            "equal content of a photo in val or test; 1 left out: the Flickr number") in out
    config = json.loads((tmp_path / "both" / CONFIG).read_text())
    [extra] = config["extra_data"]
    assert extra["skipped"] == SKIPPED and extra["photos"] == 20 and extra["captions"] == 60
    assert config["data"]["train"]["photos"] == 40


def test_the_tables_name_all_datasets_of_the_training(folders, tmp_path):
    train(tmp_path / "run", "--data_dir", folders / "half", "--extra_data", folders / "rest",
          epochs=1)
    expected = (f"20 photos, 60 captions of Flickr8k + 20 photos, 60 captions of "
                f"{folders / 'rest'} (8")
    run = load_run(tmp_path / "run")
    assert expected in report.summary(run)
    assert f"| 120 pairs, 60 of {folders / 'rest'} |" in comparison([run], "markdown")


def test_missing_and_damaged_photos_of_the_extra_data_are_reported(folders, tmp_path, capsys):
    rest = write(tmp_path / "rest", {split: numbered(*range(first, first + 9)) for split, first in
                                     (("train", 20), ("val", 70), ("test", 90))})
    (rest / "Images" / "1000021_0123456789.jpg").unlink()
    (rest / "Images" / "1000022_0123456789.jpg").write_bytes(b"no photo")
    given = ["--data_dir", folders / "half", "--extra_data", rest]
    assert main(*given, "--output_dir", tmp_path / "run") == 2
    assert f"{rest} is incomplete: 1 of the 9 photos of train are missing" in (
        capsys.readouterr().err)
    train(tmp_path / "run", *given, "--allow_incomplete", epochs=1)
    expected = ("7 photos with 21 captions join the training split; 2 left out: missing, "
                "unreadable or")
    assert expected in capsys.readouterr().out
    [extra] = json.loads((tmp_path / "run" / CONFIG).read_text())["extra_data"]
    assert extra["skipped"] == {"missing, unreadable or without captions": 2}


def test_extra_all_takes_all_splits_of_the_extra_data(folders, tmp_path):
    train(tmp_path / "run", "--data_dir", folders / "half", "--extra_data", folders / "rest",
          "--extra_all", epochs=1)
    [extra] = json.loads((tmp_path / "run" / CONFIG).read_text())["extra_data"]
    assert extra["split"] == "all" and extra["photos"] == 23  # 60, 61 and 62; 52 is in test
    assert extra["skipped"] == SKIPPED | {"equal content of a photo in val or test": 2}


def test_a_run_can_only_be_resumed_with_the_same_extra_data(folders, tmp_path, capsys):
    given = ["--data_dir", folders / "half", "--extra_data", folders / "rest"]
    other = write(tmp_path / "other", {split: numbered(*range(first, first + 20)) for split, first
                                       in (("train", 20), ("val", 70), ("test", 90))})
    (other / "Images" / "1000020_0123456789.jpg").write_bytes(jpeg(scene(20), 80))
    train(tmp_path / "run", *given, epochs=1)
    resume = ["--output_dir", tmp_path / "run", "--resume", "--epochs", 2]
    assert main(*resume, "--extra_data", other) == 2
    assert "the captions or their order have changed in train" in capsys.readouterr().err
    assert main(*resume) == 0
    assert len(json.loads((tmp_path / "run" / HISTORY).read_text())) == 2


def test_extra_data_that_is_missing_or_adds_nothing_is_refused(folders, tmp_path, capsys):
    given = ["--data_dir", folders / "half", "--output_dir", tmp_path / "run"]
    assert main(*given, "--extra_data", tmp_path / "nowhere") == 2
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in capsys.readouterr().err
    assert main(*given, "--extra_all") == 2
    assert "--extra_all needs --extra_data" in capsys.readouterr().err
    assert main(*given, "--extra_data", folders / "half") == 2
    message = capsys.readouterr().err
    assert f"{folders / 'half'}: no photo of this folder can join the training split" in message
    assert "20 left out: equal content of a photo in training" in message


def test_copies_of_held_out_photos_leave_training_if_a_hash_made_the_splits(tmp_path, capsys):
    """In a user's folder, photos taken right after each other may fall into different splits."""
    root = tmp_path / "data"
    root.mkdir()
    for i in range(30):
        for copy in range(2):
            (root / f"{i}_{copy}.jpg").write_bytes(jpeg(scene(i), 90 - 30 * copy))
            (root / f"{i}_{copy}.txt").write_text(f"photo {i} told\n")
    train(tmp_path / "run", "--data_dir", root, epochs=1)
    data = json.loads((tmp_path / "run" / CONFIG).read_text())["data"]
    out = capsys.readouterr().out
    assert "by a hash of the photos' names" in out and "photos left out, such as" in out
    held_out = data["val"]["photos"] + data["test"]["photos"] + data["val"]["skipped"]
    assert held_out == 12 and data["train"]["photos"] + data["train"]["skipped"] == 48
    assert 0 < data["train"]["skipped"] <= 12


def noise(seed):
    """A JPEG that resembles no other photo."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    return jpeg(Image.fromarray(pixels))


def write_cameras(root, splits):
    """Write a table of captions of several cameras' photos, which are all different but have the
    same names: their date. splits: that of each camera's photos."""
    rows = ["image,caption,split"]
    for camera, split in enumerate(splits):
        (root / f"cam{camera}").mkdir(parents=True)
        for day in range(20210410, 20210414):
            name = f"cam{camera}/{day}.jpg"
            (root / name).write_bytes(noise(day + 100 * camera))
            rows.append(f"{name},photo {day} of camera {camera},{split}")
    (root / "captions.csv").write_text("\n".join(rows))


def test_dates_as_names_do_not_stop_a_run_with_a_split_column(tmp_path):
    write_cameras(tmp_path, ["train", "val", "test"])
    splits, _ = load_splits(make_settings(data_dir=str(tmp_path), model="tiny"))
    assert {split: len(data.names) for split, data in splits.items()} == {
        "train": 4, "val": 4, "test": 4}


def test_dates_as_names_lose_no_photo_of_the_extra_data(tmp_path):
    write_cameras(tmp_path / "data", ["train", "val", "test"])
    write_cameras(tmp_path / "extra", ["val", "test", "test", "train"])
    splits, _ = load_splits(make_settings(
        data_dir=str(tmp_path / "data"), extra_data=[str(tmp_path / "extra")], model="tiny"))
    assert splits["train"].names == [f"cam{camera}/{day}.jpg" for camera in (0, 3)
                                     for day in range(20210410, 20210414)]
    [extra] = splits["train"].extra_data
    assert extra["photos"] == 4 and extra["skipped"] == {}


def test_bare_numbers_are_flickr_numbers_where_the_pictures_agree(tmp_path):
    """Flickr30k's names are numbers without Flickr's secret. Here two photos have the number of the
    extra photo, and the second of them is the same picture."""
    write(tmp_path / "data", {
        "train": numbered(0, 1),
        "val": {"a/1000092795.jpg": (noise(0), 2)},
        "test": {"b/1000092795.jpg": (jpeg(scene(3)), 3)}})
    write(tmp_path / "extra", {
        "train": {"1000092795.jpg": (jpeg(scene(3), 30), 3), "1000092796.jpg": (noise(1), 4)},
        "val": numbered(5), "test": numbered(6)})
    splits, _ = load_splits(make_settings(
        data_dir=str(tmp_path / "data"), extra_data=[str(tmp_path / "extra")], model="tiny"))
    [extra] = splits["train"].extra_data
    assert extra["skipped"] == {"the Flickr number of a photo in val or test": 1}
    assert splits["train"].names[2:] == ["1000092796.jpg"]
