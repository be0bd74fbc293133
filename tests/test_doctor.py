import hashlib
import json
import pathlib
import subprocess
import sys

import image_trees
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from configs import default
from ieg_jax.data import doctor
from ieg_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        doctor,
        "throughput",
        lambda config, data: {"images_per_second": 1.0, "images_per_cpu_second": 1.0, "cores": 1},
    )


def examine(config, out, quick=False, width=200):
    console = Console(record=True, width=width)
    problems = doctor.examine(config, out, quick, console)
    return problems, console.export_text(), json.loads((out / "report.json").read_text())


@pytest.fixture
def photos(tmp_path):
    """Two classes of six pictures, two trusted and two test pictures of each, all different."""
    number = 0
    for part, count in (("train", 6), ("trusted", 2), ("test", 2)):
        for label in ("cat", "dog"):
            for k in range(count):
                number += 1
                size = (60, 40 + 10 * k)
                image_trees.save(tmp_path / part / label / f"{k}.jpg", image_trees.picture(number, size))
    config = default.get_config()
    config.data.name = "image_folder"
    for part in ("train", "trusted", "test"):
        config.data[part] = str(tmp_path / part)
    config.trusted.source = "separate"
    config.augment.standard, config.augment.evaluation = "random_resized_crop(16)|flip", "resize(16)|center_crop(16)"
    config.batch_size = 12
    return config


def test_nothing_wrong(photos, tmp_path):
    problems, text, report = examine(photos, tmp_path / "out")
    assert problems == report["problems"] == []
    assert "12 train, 4 trusted, 4 test" in text
    assert "height 40 to 90 (median 65), width 60 to 60 (median 60), files" in text
    assert "true labels are not known" in text
    assert report["splits"]["train"]["images"] == 12
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert sheet.width > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000, "pictures are drawn"


def test_the_same_image_in_two_splits(photos, tmp_path):
    content = (tmp_path / "train" / "cat" / "3.jpg").read_bytes()
    (tmp_path / "test" / "cat" / "copy.jpg").write_bytes(content)
    (tmp_path / "trusted" / "dog" / "copy.jpg").write_bytes((tmp_path / "train" / "dog" / "0.jpg").read_bytes())
    (tmp_path / "train" / "dog" / "again.jpg").write_bytes((tmp_path / "train" / "dog" / "1.jpg").read_bytes())
    problems, text, report = examine(photos, tmp_path / "out")
    assert problems == [
        f"1 images are the same in test and train, e.g. cat/3.jpg = {tmp_path}/test/cat/copy.jpg",
        f"1 images are the same in train and trusted, e.g. dog/0.jpg = {tmp_path}/trusted/dog/copy.jpg",
    ]
    assert "1 images are there more than once within train, e.g. dog/1.jpg = dog/again.jpg" in text
    assert report["duplicates"]["train"] == [["dog/1.jpg", "dog/again.jpg"]]
    assert examine(photos, tmp_path / "quick", quick=True)[0] == []


def test_unreadable_and_missing_images(photos, tmp_path):
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"hello")
    problems, text, report = examine(photos, tmp_path / "out")
    assert problems == ["1 images cannot be decoded; mend them, or set data.unreadable=skip"]
    assert "cat/0.jpg: no image in a known format" in text
    assert list(report["left_out"]) == ["cat/0.jpg"]
    photos.data.unreadable = "skip"
    assert examine(photos, tmp_path / "out2")[0] == []


def test_noise_and_confusion(tmp_path):
    config = default.get_config()
    config.noise.kind, config.noise.rate = "uniform", 0.5
    problems, text, report = examine(config, tmp_path / "out")
    assert problems == []
    labels = json.loads((tmp_path / "out" / "noisy_labels.json").read_text())
    assert len(labels) == 1297
    wrong = report["noise"]["rate_effective"]
    assert 0.4 < wrong < 0.5 and f"{wrong:.2%} of 1,197 labels are wrong" in text
    diagonal = np.trace(np.array(report["noise"]["confusion"]))
    assert diagonal == round((1 - wrong) * 1197)
    # The exported labels make the same noise again.
    config.noise.kind, config.noise.rate = "file", 0.0
    config.noise.file = str(tmp_path / "out" / "noisy_labels.json")
    _, text, again = examine(config, tmp_path / "again")
    assert again["noise"]["confusion"] == report["noise"]["confusion"]
    sha256 = hashlib.sha256((tmp_path / "out" / "noisy_labels.json").read_bytes()).hexdigest()
    assert again["label_file"]["sha256"] == sha256 and sha256 in text
    # And the trusted set is the same when it is named by its file.
    config.trusted.ids = str(tmp_path / "out" / "trusted.json")
    examine(config, tmp_path / "third")
    trusted = [json.loads((tmp_path / name / "trusted.json").read_text())["ids"] for name in ("out", "third")]
    assert trusted[0] == trusted[1]


def test_many_classes_are_summed_up(tmp_path):
    config = default.get_config()
    config.data.name, config.data.train = "arrays", str(tmp_path / "own.npz")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 8, 8), dtype=np.uint8)
    np.savez(config.data.train, images=images, labels=np.arange(400) % 40)
    config.noise.kind, config.noise.rate, config.trusted.per_class = "symmetric_flip", 0.5, 1
    problems, text, _ = examine(config, tmp_path / "out", width=80)
    assert problems == []
    assert "... 15 more" in text and "median" in text
    assert " are called " in text, "the commonest confusions in place of a table of 1,600 cells"


def test_a_class_without_training_images(tmp_path):
    config = default.get_config()
    config.data.name, config.data.train, config.data.num_classes = "arrays", str(tmp_path / "own.npz"), 3
    labels = np.arange(40) % 2
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(
        config.data.train, images=images, labels=labels, trusted_images=255 - images[:3], trusted_labels=np.arange(3)
    )
    config.trusted.source = "separate"
    assert examine(config, tmp_path / "out")[0] == ["class '2' has no train images"]


def test_nothing_is_overwritten(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        examine(photos, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == "mine"
    with pytest.raises(UserError, match="report.json is a file, expected a folder"):
        examine(photos, tmp_path / "out" / "report.json" / "x")


def test_the_command(photos, tmp_path):
    content = (tmp_path / "train" / "cat" / "3.jpg").read_bytes()
    (tmp_path / "test" / "cat" / "copy.jpg").write_bytes(content)
    flags = [f"--config.data.{part}={tmp_path / part}" for part in ("train", "trusted", "test")]
    command = [sys.executable, "-m", "ieg_jax.data.doctor", "--config=configs/default.py", f"--out={tmp_path / 'out'}"]
    command += ["--config.data.name=image_folder", "--config.trusted.source=separate", *flags]
    command += ["--config.augment.standard=random_resized_crop(16)|flip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-2] == "error: 1 things are wrong:"
    assert "Traceback" not in done.stderr
    assert "images/s here" in done.stdout
