import hashlib
import itertools
import json
import os
import subprocess
import sys
import types

import archives
import image_trees
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from runs import ROOT

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.data import examination, shards
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import cifar
from ieg_jax.errors import UserError

THROUGHPUT = examination.throughput
SPEED = {
    "examples_per_second": 1.0, "examples_per_cpu_second": 1.0, "images_per_example": 3.0, "cores": 1,
    "assembly_bytes_per_second": 2e9, "read_seconds": 0.05,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        examination,
        "throughput",
        lambda *_: SPEED,
    )


def examine(config, out, quick=False, width=200):
    console = Console(record=True, width=width)
    problems, _ = examination.examine(config, out, quick, console)
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


def test_the_same_image_with_two_labels(photos, tmp_path):
    (tmp_path / "train" / "dog" / "copy.jpg").write_bytes((tmp_path / "train" / "cat" / "1.jpg").read_bytes())
    (tmp_path / "train" / "dog" / "link.jpg").symlink_to(tmp_path / "train" / "cat" / "2.jpg")
    (tmp_path / "train" / "cat" / "again.jpg").write_bytes((tmp_path / "train" / "cat" / "3.jpg").read_bytes())
    problems, text, _ = examine(photos, tmp_path / "out")
    wanted = "2 images are there more than once within train with different labels, e.g. cat/1.jpg = dog/copy.jpg"
    assert problems == [f"{wanted}; keep the right one of each"]
    assert "3 images are there more than once within train, e.g." in text, "those with one label are a note"
    # Noise gives equal images different labels, and is not the fault of the data.
    (tmp_path / "train" / "dog" / "copy.jpg").unlink()
    (tmp_path / "train" / "dog" / "link.jpg").unlink()
    photos.noise.kind, photos.noise.rate = "symmetric_flip", 0.5
    assert examine(photos, tmp_path / "noisy")[0] == []


def test_lists_and_files_that_are_wrong_at_once(photos, tmp_path):
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"")
    lines = ["path,label", "train/cat/0.jpg,a", "train/cat/1.jpg,b", "train/cat/1.jpg,a", "gone.jpg,b"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    photos.data.name, photos.data.train = "image_csv", str(tmp_path / "list.csv")
    photos.data.test = ""
    with pytest.raises(UserError) as raised:
        examination.examine(photos, tmp_path / "out", False, Console(record=True))
    text = str(raised.value)
    assert "line 4: train/cat/1.jpg has label 'a'" in text and "label 'cat' is none of the 2 classes" in text
    assert "and 2 of the images in it cannot be decoded:\n  train/cat/0.jpg: zero bytes\n  gone.jpg: no such" in text


def test_names_are_no_markup(photos, tmp_path):
    """Labels and paths that rich would take for a closing tag, a colour and an emoji."""
    lines = ["path;label;split"]
    for number in range(12):
        name, part = f"set [/final] {number}/:dog: [red]{number}.jpg", "trusted" if number < 2 else "train"
        image_trees.save(tmp_path / name, image_trees.picture(number % 11))
        lines.append(f"{name};{('[/x]', '[red]y')[number % 2]};{part}")
    (tmp_path / "set [/final] 5" / ":dog: [red]5.jpg").write_bytes(b"")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    photos.data.update(name="image_csv", train=str(tmp_path / "list.csv"), trusted="", test="")
    photos.noise.kind, photos.noise.rate = "symmetric_flip", 0.5
    for width in (200, 20):  # with the table of confusions, and without
        problems, text, _ = examine(photos, tmp_path / str(width), width=width)
        text = " ".join(text.split())
        assert "set [/final] 5/:dog: [red]5.jpg: zero bytes" in text
        for name in ("│ [red]y │", "0 [/x]") if width == 200 else ("of [/x] are called [red]y",):
            assert name in text
        assert "set [/final] 0/:dog: [red]0.jpg" in problems[-1]


def test_sizes_before_they_are_made_equal(photos, tmp_path):
    photos.data.image_size, photos.augment.standard, photos.augment.evaluation = 16, "", ""
    _, text, report = examine(photos, tmp_path / "out")
    assert "image sizes, train: 16×16×3, uint8, in memory" in text
    wanted = "height 40 to 90 (median 65), width 60 to 60 (median 60), files"
    assert report["original_sizes"]["train"] == wanted
    assert f"image sizes, train as they come: {wanted}" in text


def test_a_damaged_record_is_named(photos, tmp_path):
    shards.prepare(photos, tmp_path / "records", 6)
    shard = next((tmp_path / "records").glob("*train*-00001-of*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    photos.data.update(name="records", dir=str(tmp_path / "records"), train="", test="", trusted="")
    for size in (0, 16):
        photos.data.image_size = size
        with pytest.raises(UserError, match=r"^image dog/\d.jpg cannot be read: corrupted record at \d+; restore its"):
            examine(photos, tmp_path / "out")


def test_human_labels_from_end_to_end(tmp_path, monkeypatch):
    """Labels joined to the images of an archive, in noise.json with the hash of their file, and described."""
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    content = archives.cifar_binary(tmp_path / "cifar", "cifar10", archives.SMALL)
    file = tmp_path / "CIFAR-10_human.pt"
    given = archives.human_labels(file, "cifar10", content["train"][1])["worse_label"]
    config = default.get_config()
    config.data.name, config.data.dir, config.trusted.per_class = "cifar10", str(tmp_path / "cifar"), 1
    config.noise.kind, config.noise.file, config.noise.label_set = "human", str(file), "worse"
    config.batch_size = 8
    _, text, report = examine(config, tmp_path / "out")
    noise, sha256 = report["noise"], hashlib.sha256(file.read_bytes()).hexdigest()
    assert (noise["kind"], noise["rate"], noise["file_sha256"]) == ("human", None, sha256)
    assert json.loads((tmp_path / "out" / "noisy_labels.json").read_text()) == given.tolist()
    trusted = json.loads((tmp_path / "out" / "trusted.json").read_text())
    assert [int(content["train"][1][id_]) for id_ in trusted["ids"]] == trusted["labels"] == list(range(10))
    left = np.setdiff1d(np.arange(50), trusted["ids"])
    assert noise["rate_effective"] == pytest.approx(np.mean(given[left] != content["train"][1][left]))
    text = text.replace("\n", "")
    assert f"not the published file: sha256 {sha256}, published 873e69c39" in text and "no nominal rate" in text


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
    assert "examples/s here" in done.stdout


def test_grey_images_are_told_from_colours(photos, tmp_path):
    photos.augment.standard, photos.augment.strong = config_lib.AUGMENT_PRESETS["photos"]
    photos.data.image_size = 8
    assert "the images are grey" not in examine(photos, tmp_path / "colours")[1]
    for path in (tmp_path / "train").rglob("*.jpg"):
        Image.open(path).convert("L").convert("RGB").save(path)
    assert "the images are grey" in examine(photos, tmp_path / "grey")[1]
    photos.augment.standard, photos.augment.strong = config_lib.AUGMENT_PRESETS["grey"]
    assert "the images are grey" not in examine(photos, tmp_path / "as they should be")[1]


def test_speeds_of_the_pipeline():
    config = default.get_config()
    data = load_data(config)
    speed = THROUGHPUT(config, data, methods.get("ieg").streams, seconds=0.3)
    assert speed.keys() == SPEED.keys()
    assert (speed["images_per_example"], speed["cores"], speed["read_seconds"]) == (3, os.cpu_count(), None)
    assert speed["examples_per_cpu_second"] > 0 and speed["examples_per_second"] > 0
    assert speed["assembly_bytes_per_second"] > 0


def test_speed_of_assembly_by_hand(monkeypatch):
    """A clock that goes on by a second each time it is read: after 1 and 2 of 3 seconds a batch, at 3 it is over."""
    clock = itertools.count()
    monkeypatch.setattr(examination.time, "perf_counter", lambda: next(clock))
    batch = {"image": np.zeros((4, 2, 2, 1), np.float32), "label": np.zeros(4, np.int32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert examination.assembly(batch, sharding, 3) == 2 * 4 * (2 * 2 * 4 + 4) / 3


def test_seconds_of_a_read_by_hand(monkeypatch):
    ticks = iter([0.0, 0.1, 1.0, 1.3, 2.0, 2.2])
    monkeypatch.setattr(examination.time, "perf_counter", lambda: next(ticks))

    class Split(list):
        is_remote, names = True, ["a", "b", "c"]
        images = types.SimpleNamespace(reader=lambda: lambda row: row)

    assert examination.read_seconds(Split([0, 1, 2])) == pytest.approx(0.2)
    Split.is_remote = False
    assert examination.read_seconds(Split([0, 1, 2])) is None


def test_speeds_are_said_and_written(photos, tmp_path):
    _, text, report = examine(photos, tmp_path / "out")
    assert "pipeline: 1 training examples/s here, 1 per second and core, each of 3 images; batches are" in text
    assert "put together at 2 GB/s; an image is read in 50 ms" in text.replace("\n", " ")
    assert report["throughput"] == SPEED
