"""--extra_data: more pairs for training, none of which is of a photo in val or test."""
import io
import json

import numpy as np
import pytest
from PIL import Image

from src import report
from src.runs import CONFIG, HISTORY, load_run
from src.settings import make_settings
from src.utils.captions import SPLIT_FILES
from src.utils.splits import load_splits, read_pairs
from tests.conftest import main
from tests.test_duplicates import FLIP, cropped, scene


def jpeg(photo, quality=90):
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(root, photos):
    """photos: {split: {name: (content, number of the scene that its captions tell)}}."""
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, its in photos.items():
        (root / SPLIT_FILES[split]).write_text("".join(f"{name}\n" for name in its))
        for name, (content, number) in its.items():
            (root / "Images" / name).write_bytes(content)
            lines += [f"{name}#{i}\tphoto {number} told in way {i} .\n" for i in range(3)]
    (root / "Flickr8k.token.txt").write_text("".join(lines))
    return root


def numbered(*numbers):
    return {f"{1_000_000 + i}_0123456789.jpg": (jpeg(scene(i)), i) for i in numbers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The whole, its first half, and the rest with photos of val and test slipped in."""
    root = tmp_path_factory.mktemp("extra")
    held_out = {"val": numbered(*range(40, 50)), "test": numbered(*range(50, 60))}
    write(root / "whole", {"train": numbered(*range(40))} | held_out)
    write(root / "half", {"train": numbered(*range(20))} | held_out)
    slipped_in = {
        "same_content.jpg": (jpeg(scene(41)), 41),
        "1000042.jpg": (jpeg(scene(999)), 42),  # by its Flickr number alone
        "compressed.jpg": (jpeg(scene(43), 30), 43),
        "mirrored.png": (jpeg(scene(50).transpose(FLIP)), 50),
        "cropped.jpg": (jpeg(cropped(scene(51))), 51),
        "trained_on.jpg": (jpeg(scene(3)), 3),  # in training already
    }
    write(root / "rest", {"train": slipped_in | numbered(*range(20, 40)),
                          "val": numbered(60, 61), "test": numbered(52, 62)})
    return root


def train(output_dir, *given, epochs=2):
    assert main("--model", "tiny", "--tokenizer", "bpe", "--output_dir", output_dir, "--epochs",
                epochs, "--batch_size", 12, "--device", "cpu", *given) == 0
    history = json.loads((output_dir / HISTORY).read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


LEFT_OUT = {"equal content of a photo in val or test": 1,
            "the Flickr number of a photo in val or test": 1,
            "near-duplicates of a photo in val or test": 3,
            "equal content of a photo in training": 1}


@pytest.mark.parametrize("encoders", [False, True])
def test_a_half_and_the_rest_is_the_whole_and_what_is_held_out_stays_out(
        folders, tmp_path, capsys, own, encoders):
    given = ["--image_encoder", f"{own}:photos", "--text_encoder", f"{own}:texts"] * encoders
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
    [joined] = config["extra_data"]
    assert joined["skipped"] == LEFT_OUT and joined["photos"] == 20 and joined["captions"] == 60
    assert config["data"]["train"]["photos"] == 40


def test_the_tables_say_what_was_trained_on(folders, tmp_path, capsys):
    train(tmp_path / "run", "--data_dir", folders / "half", "--extra_data", folders / "rest",
          epochs=1)
    said = f"20 photos, 60 captions of Flickr8k + 20 photos, 60 captions of {folders / 'rest'} (6"
    assert said in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert said in report.summary(run)
    assert f"| 120 pairs, 60 of {folders / 'rest'} |" in report.comparison([run], "markdown")


def test_photos_that_the_extra_data_lacks_are_said(folders, tmp_path, capsys):
    rest = write(tmp_path / "rest", {split: numbered(*range(first, first + 9)) for split, first in
                                     (("train", 20), ("val", 70), ("test", 90))})
    (rest / "Images" / "1000021_0123456789.jpg").unlink()
    (rest / "Images" / "1000022_0123456789.jpg").write_bytes(b"no photo")
    given = ["--data_dir", folders / "half", "--extra_data", rest]
    assert main(*given, "--output_dir", tmp_path / "run") == 2
    assert f"{rest} is incomplete: 1 of the 9 photos of train are missing" in (
        capsys.readouterr().err)
    train(tmp_path / "run", *given, "--allow_incomplete", epochs=1)
    said = "7 photos with 21 captions join the training split; 2 left out: missing, unreadable or"
    assert said in capsys.readouterr().out
    [joined] = json.loads((tmp_path / "run" / CONFIG).read_text())["extra_data"]
    assert joined["skipped"] == {"missing, unreadable or without captions": 2}


def test_all_pairs_of_the_extra_data(folders, tmp_path):
    train(tmp_path / "run", "--data_dir", folders / "half", "--extra_data", folders / "rest",
          "--extra_all", epochs=1)
    [joined] = json.loads((tmp_path / "run" / CONFIG).read_text())["extra_data"]
    assert joined["split"] == "all" and joined["photos"] == 23  # 60, 61 and 62; 52 is in test
    assert joined["skipped"] == LEFT_OUT | {"equal content of a photo in val or test": 2}


def test_a_run_with_extra_data_goes_on_with_the_same_only(folders, tmp_path, capsys):
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


def test_extra_data_that_is_not_there_or_of_no_use(folders, tmp_path, capsys):
    given = ["--data_dir", folders / "half", "--output_dir", tmp_path / "run"]
    assert main(*given, "--extra_data", tmp_path / "nowhere") == 2
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in capsys.readouterr().err
    assert main(*given, "--extra_all") == 2
    assert "--extra_all needs --extra_data" in capsys.readouterr().err
    assert main(*given, "--extra_data", folders / "half") == 2
    assert f"{folders / 'half'}: no photo of train is usable" in capsys.readouterr().err


def test_copies_across_a_split_by_hash_leave_training(tmp_path, capsys):
    """A folder of one's own holds photos taken one after another."""
    Image.init()
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
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    return jpeg(Image.fromarray(pixels))


def test_a_bare_number_is_a_flickr_number_only_if_the_pictures_agree(tmp_path):
    """Names such as a date are equal in the folders of two cameras."""
    train = {"20210416.jpg": (noise(0), 0), "1000092795.jpg": (jpeg(scene(1)), 1)}
    val = {"20210416.jpg": (noise(1), 2), "1000092795.jpg": (jpeg(scene(1), 40), 1)}
    root = write(tmp_path / "a", {"train": train, "val": numbered(3), "test": numbered(4)})
    other = write(tmp_path / "b", {"train": val, "val": numbered(5), "test": numbered(6)})
    pairs, others = (read_pairs(folder, "train", 32) for folder in (root, other))
    # The second pair of files is the same picture, compressed anew.
    copies = {1: ("1000092795.jpg of train", "the Flickr number")}
    assert pairs.copies_in([others], near=False) == copies


def test_two_cameras_that_name_their_photos_by_date(tmp_path):
    """Neither does a split column stop the run, nor does --extra_data lose a photo."""
    for camera, split in (("cam1", "train"), ("cam2", "val"), ("cam3", "test")):
        (tmp_path / camera).mkdir()
        for day in range(20210410, 20210414):
            (tmp_path / camera / f"{day}.jpg").write_bytes(noise(day + 1000 * len(split) ** 2))
    rows = [f"{camera}/{day}.jpg,photo {day} of {camera},{split}"
            for camera, split in (("cam1", "train"), ("cam2", "val"), ("cam3", "test"))
            for day in range(20210410, 20210414)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    settings = make_settings(data_dir=str(tmp_path), model="tiny")
    splits, _ = load_splits(settings)
    assert [len(split.names) for split in splits.values()] == [4, 4, 4]
