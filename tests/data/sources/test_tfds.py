"""The sources that TFDS provides: records that its own builders write, from examples in place of their downloads."""

from unittest import mock

import image_trees
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import default
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources import webvision
from ieg_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, name, splits):
    """Has TFDS's builder `name` write {split: {key: example}}."""
    builder = tfds.builder(name, data_dir=folder)
    generators = {split: iter(examples.items()) for split, examples in splits.items()}
    with mock.patch.object(type(builder), "_split_generators", lambda self, manager: generators):
        builder.download_and_prepare()
    return builder


def pictures(folder, count, first=0):
    """Paths and pixels of JPEG files."""
    paths = [folder / f"{first + k}.jpg" for k in range(count)]
    return paths, [image_trees.save(path, image_trees.picture(first + k, (50, 60))) for k, path in enumerate(paths)]


def data_config(name, folder, **more):
    data = default.get_config().data
    data.name, data.dir = name, str(folder)
    data.update(more)
    return data


def assert_images(split, pixels_by_name):
    read = split.images.reader()
    assert set(split.names) == set(pixels_by_name)
    for row, name in enumerate(split.names):
        np.testing.assert_array_equal(read(row).whole(), pixels_by_name[name])


def test_food101(tmp_path):
    paths, pixels = pictures(tmp_path / "raw", 6)
    rows = [(f"apple_pie/{k}", {"image": str(path), "label": k % 3}) for k, path in enumerate(paths)]
    write(tmp_path, "food101", {"train": dict(rows[:4]), "validation": dict(rows[4:])})
    source = sources.load(data_config("food101", tmp_path))
    assert source.num_classes == 101 and source.class_names[0] == "apple_pie"
    assert source.train.names.tolist() == [f"train/{place}" for place in range(4)]
    read, found = source.train.images.reader(), {}
    for row, label in enumerate(source.train.labels):
        image = read(row).whole().numpy()
        found[next(k for k in range(4) if np.array_equal(pixels[k], image))] = int(label)
    assert found == {0: 0, 1: 1, 2: 2, 3: 0}
    assert (source.train.clean_labels == -1).all(), "labels from the web"
    assert (source.test.clean_labels == source.test.labels).all() and len(source.test) == 2


def test_controlled_noisy_web_labels(tmp_path):
    paths, pixels = pictures(tmp_path / "raw", 8)
    rows = {
        f"img{k}": {"image": str(path), "label": k, "is_clean": k % 2 == 0, "id": f"img{k}"}
        for k, path in enumerate(paths)
    }
    items = list(rows.items())
    builder = "controlled_noisy_web_labels/mini_imagenet_red"
    write(tmp_path, builder, {"train_40": dict(items[:3]), "train_80": dict(items[2:6]), "validation": dict(items[6:])})
    source = sources.load(data_config("controlled_noisy_web_labels", tmp_path))
    assert_images(source.train, {f"img{k}": pixels[k] for k in range(2, 6)})
    labels = {
        name: (int(g), int(c))
        for name, g, c in zip(source.train.names, source.train.labels, source.train.clean_labels, strict=True)
    }
    assert labels == {"img2": (2, 2), "img3": (3, -2), "img4": (4, 4), "img5": (5, -2)}
    assert source.num_classes == 100 and len(source.test) == 2
    weaker = sources.load(data_config("controlled_noisy_web_labels", tmp_path, variant="red_40"))
    assert set(weaker.train.names) == {"img0", "img1", "img2"}
    with pytest.raises(UserError, match="the rate behind red_: got '50', expected one of 40, 80"):
        sources.load(data_config("controlled_noisy_web_labels", tmp_path, variant="red_50"))
    with pytest.raises(UserError, match="data.variant: got 'green', expected one of red, blue"):
        sources.load(data_config("controlled_noisy_web_labels", tmp_path, variant="green_40"))


@pytest.fixture
def imagenet(tmp_path):
    """TFDS's imagenet2012 with three training and one validation image of five classes; wnids and pixels by name."""
    builder = tfds.builder("imagenet2012", data_dir=tmp_path)
    wnids = builder.info.features["label"].names
    chosen = [wnids[k] for k in (900, 3, 500, 41, 77)]  # not in the order of TFDS
    splits, pixels = {"train": {}, "validation": {}}, {}
    for number, wnid in enumerate(chosen):
        for split, count, first in (("train", 3, 0), ("validation", 1, 500)):
            paths, shown = pictures(tmp_path / "raw" / wnid, count, first + number * 10)
            for path, array in zip(paths, shown, strict=True):
                name = f"{wnid}_{path.stem}.JPEG"
                splits[split][name] = {"image": str(path), "label": wnid, "file_name": name}
                pixels[name] = array
    write(tmp_path, "imagenet2012", splits)
    return tmp_path, chosen, pixels


def test_imagenet_by_wnids(imagenet):
    folder, chosen, pixels = imagenet
    wanted = tuple(chosen[:3])
    for split, count in (("train", 9), ("val", 3)):
        part = webvision.imagenet_split(str(folder), split, wanted, wanted, "data.test")
        assert len(part) == count
        assert_images(part, {name: pixels[name] for name in part.names})
        assert all(name.startswith(wanted[label]) for name, label in zip(part.names, part.labels, strict=True))


def test_webvision_with_imagenet_of_tfds(imagenet, tmp_path):
    """Trusted images and evaluation from TFDS's records, through the whole loading of a run."""
    folder, chosen, pixels = imagenet
    image_trees.webvision(tmp_path / "webvision", classes=5, flickr=False)
    (tmp_path / "webvision" / "info" / "synsets.txt").write_text("".join(f"{wnid} x\n" for wnid in chosen))
    config = default.get_config()
    config.data = data_config("webvision", tmp_path / "webvision", test=str(folder), trusted=str(folder))
    config.trusted.source, config.trusted.per_class = "separate", 2
    data = load_data(config)
    assert data.trusted_report["per_class"] == [2] * 5
    for split in (data.trusted, data.evaluation):
        assert_images(split, {name: pixels[name] for name in split.names})
        assert all(name.startswith(chosen[label]) for name, label in zip(split.names, split.labels, strict=True))
    again = load_data(config)
    assert again.trusted.names.tolist() == data.trusted.names.tolist()
