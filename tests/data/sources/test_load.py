import gzip

import numpy as np
import pytest
from archives import idx

from configs import default, own_data
from ieg_jax import config as config_lib
from ieg_jax.data import images
from ieg_jax.data.sources import arrays
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources.small import FASHION_MNIST_FILES
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError
from ieg_jax.train import check


@pytest.fixture
def fashion_folder(tmp_path):
    """The four published files, with 30 + 20 images."""
    rng = np.random.default_rng(0)
    content = {}
    for name, n in (("train", 30), ("test", 20)):
        content[name] = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        for file, array in zip(FASHION_MNIST_FILES[name], content[name], strict=True):
            (tmp_path / file).write_bytes(gzip.compress(idx(array)))
    return tmp_path, content


def data_config(**keys):
    config = default.get_config().data
    for key, value in keys.items():
        setattr(config, key, value)
    return config


def test_digits():
    source = sources.load(data_config(name="digits"))
    assert (len(source.train), len(source.test), source.num_classes) == (1297, 500, 10)
    assert source.train.images.shape == (1297, 8, 8, 1)
    assert source.train.images.dtype == np.uint8
    assert source.train.images.max() == 255
    assert not set(source.train.ids) & set(source.test.ids)
    np.testing.assert_array_equal(source.train.labels, source.train.clean_labels)
    assert set(np.bincount(source.test.labels)) <= {48, 49, 50, 51, 52}, "stratified"


def test_fashion_mnist_from_idx_files(fashion_folder):
    folder, content = fashion_folder
    source = sources.load(data_config(name="fashion_mnist", dir=str(folder)))
    np.testing.assert_array_equal(source.train.images[..., 0], content["train"][0])
    np.testing.assert_array_equal(source.test.labels, content["test"][1])
    half = sources.load(data_config(name="fashion_mnist", dir=str(folder), image_size=14))
    assert half.train.images.shape == (30, 14, 14, 1)
    means = content["train"][0].reshape(30, 14, 2, 14, 2).mean((2, 4))
    assert np.abs(half.train.images[..., 0] - means).max() <= 0.5


def test_fashion_mnist_through_tfds(monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def load(name, batch_size):
        assert (name, batch_size) == ("fashion_mnist", -1)
        part = {"image": tf.ones((4, 28, 28, 1), tf.uint8), "label": tf.constant([0, 1, 2, 9], tf.int64)}
        return {"train": part, "test": part}

    monkeypatch.setattr(tfds, "load", load)
    source = sources.load(data_config(name="fashion_mnist"))
    assert source.train.images.shape == (4, 28, 28, 1)
    assert source.train.labels.tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: f.unlink(), "lacks train-images"),
        (lambda f: f.write_bytes(f.read_bytes()[:-30]), "is the file complete"),
        (lambda f: f.write_bytes(b"not gzip"), "is the file complete"),
        (lambda f: f.write_bytes(gzip.compress(gzip.decompress(f.read_bytes())[:-5])), "truncated"),
        (lambda f: f.write_bytes(gzip.compress(b"\0\0")), "expected an IDX file"),
        (lambda f: f.write_bytes(gzip.compress(idx(np.zeros(30)) + b"\0" * 10)), "rank 3"),
        (
            lambda f: f.write_bytes(gzip.compress(idx(np.zeros((29, 28, 28))))),
            r"expected \(29,\), one for each",
        ),
    ],
)
def test_bad_idx_files(fashion_folder, damage, message):
    folder, _ = fashion_folder
    damage(folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=message):
        sources.load(data_config(name="fashion_mnist", dir=str(folder)))


def save(tmp_path, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return data_config(name="arrays", train=str(path))


IMAGES, LABELS = np.zeros((4, 5, 5, 3), np.uint8), np.array([0, 1, 2, 1])


def test_arrays(tmp_path):
    source = sources.load(save(tmp_path, images=IMAGES, labels=LABELS))
    assert (source.num_classes, source.test, source.trusted) == (3, None, None)
    assert source.train.clean_labels.tolist() == [-1] * 4
    full = sources.load(
        save(
            tmp_path,
            images=np.full((4, 5, 5), 0.5),
            labels=LABELS,
            clean_labels=np.array([0, -1, 2, 3]),
            test_images=np.ones((2, 5, 5)),
            test_labels=np.array([0, 4]),
            trusted_images=np.ones((5, 5, 5)),
            trusted_labels=np.arange(5),
        )
    )
    assert full.num_classes == 5
    assert full.train.images.shape == (4, 5, 5, 1)
    assert full.train.images.dtype == np.float32
    assert full.train.clean_labels.tolist() == [0, -1, 2, 3]
    assert full.test.clean_labels.tolist() == [0, 4]
    assert full.trusted.labels.tolist() == [0, 1, 2, 3, 4]
    from_one = {"labels": LABELS + 1, "trusted_images": IMAGES[:2], "trusted_labels": np.array([3, 1])}
    counted = sources.load(save(tmp_path, images=IMAGES, clean_labels=np.array([-1, 3, 2, 1]), **from_one))
    assert counted.num_classes == 3 and counted.class_names == ("1", "2", "3")
    assert counted.train.labels.tolist() == LABELS.tolist() and counted.train.clean_labels.tolist() == [-1, 2, 1, 0]
    assert counted.trusted.labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"labels": LABELS}, "expected at least the arrays images and labels"),
        ({"images": IMAGES[..., 0, 0], "labels": LABELS}, r"shape \(4, 5\), expected"),
        ({"images": np.zeros((4, 5, 5, 2), np.uint8), "labels": LABELS}, "C = 1 or 3"),
        ({"images": IMAGES.astype(np.int32), "labels": LABELS}, "dtype int32, expected uint8 or floats"),
        ({"images": np.full((4, 5, 5), np.nan), "labels": LABELS}, "image 0 has pixels that are nan"),
        (
            {"images": np.full((4, 5, 5), 255.0), "labels": LABELS},
            r"floats from 255 to 255, expected \[0, 1\]",
        ),
        ({"images": IMAGES, "labels": LABELS[:3]}, r"shape \(3,\), expected \(4,\)"),
        ({"images": IMAGES, "labels": LABELS * 1.0}, "dtype float64, expected integers"),
        ({"images": IMAGES, "labels": LABELS - 1}, "-1 at place 0, expected 0"),
        ({"images": IMAGES, "labels": LABELS * 0}, "at least two classes"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
        (
            {"images": IMAGES, "labels": LABELS, "test_images": IMAGES},
            "only one of test_images and test_labels",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[:, 1:], "test_labels": LABELS},
            "test_images have shape",
        ),
        ({"images": IMAGES, "labels": LABELS, "clean_labels": LABELS - 2}, "-2 at place 0, expected -1"),
        ({"images": np.array([{}], object), "labels": LABELS}, "cannot be read as .npz"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        sources.load(save(tmp_path, **arrays))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"name": "digits", "dir": "x"}, r"data.dir='x', but data.name=digits does not read it: .*\(fashion_mnist,"),
        (
            {"name": "records", "dir": "x", "test": "y"},
            r"data.test='y', but .*\(webvision, image_folder, image_csv, huggingface, features\)",
        ),
        ({"name": "arrays", "train": "x", "variant": "mini"}, "data.variant='mini', but data.name=arrays"),
        ({"name": "cifar10", "trusted": "x"}, "data.trusted='x', but data.name=cifar10"),
    ],
)
def test_keys_that_the_source_does_not_read(keys, message):
    with pytest.raises(UserError, match=message):
        sources.load(data_config(**keys))


def split_of(images):
    return make_split(images, np.zeros(len(images), np.int32))


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([(500, 375), (40, 90), (333, 500)], 64),  # shorter sides 375, 40, 333
        ([(30, 90), (47, 31), (500, 500)], 28),  # 31 is no multiple of 4
        ([(6, 9), (5, 5), (7, 7)], 8),
    ],
)
def test_the_size_that_fits(sizes, expected):
    paths = np.array(["x"] * len(sizes), object)
    files = images.FileImages(paths, np.ones(len(sizes), bool), np.array(sizes))
    assert sources.fitting_size(split_of(files)) == expected


def test_automatic_size(tmp_path):
    config = save(tmp_path, images=np.zeros((4, 30, 41, 3), np.uint8), labels=LABELS)
    config.image_size = -1
    source = sources.load(config)
    assert source.train.images.shape == (4, 28, 28, 3)
    assert source.image_size == 28, "which config.json will say"
    assert config.image_size == -1


def automatic(num_examples, side, **keys):
    config = own_data.get_config("backbone=none")
    config.data.image_size = 0
    config.update_from_flattened_dict(keys)
    config = config_lib.resolve(config, config_lib.Facts(num_examples, 0, side))
    durations = ("num_train", "eval_every", "checkpoint_every")
    return config, [config_lib.duration(config, name, num_examples / config.batch_size) for name in durations]


def test_keys_from_the_data():
    """64 examples in a step: 40 epochs of 6,400 are 4,000 steps."""
    config, steps = automatic(6400, 24)
    assert steps == [4000, 200, 400] and config.num_train_epochs == 40.0
    assert (config.model.depth, config.model.width) == (16, 2.0)
    assert automatic(500, 20)[1] == [500, 25, 50]
    assert automatic(6400, 1)[1] == [1500, 75, 150] and automatic(500, 1)[1] == [300, 15, 30], "features"
    assert automatic(40_000, 20)[1] == [20_000, 1000, 2000]
    config, steps = automatic(500, 20, **{"num_train_epochs": 0.0, "num_train_steps": 60, "model.depth": 22})
    assert steps == [60, 3, 6] and (config.model.depth, config.model.width) == (22, 1.0)


def test_automatic_keys_before_and_after_the_data_are_known():
    config = own_data.get_config("backbone=none")
    check.validate(config)
    with pytest.raises(UserError, match="num_train_epochs=-1 is for data that are loaded first"):
        config_lib.duration(config, "num_train", 10.0)
    for key, value in {"batch_size": -1, "num_train_epochs": -2.0, "data.image_size": -2}.items():
        bad = default.get_config()
        bad.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=f"{key}: got {value}"):
            check.validate(bad)
    begun = own_data.get_config("backbone=none")
    begun.data.image_size, begun.model.depth, begun.model.width, begun.num_train_epochs = 28, 16, 2.0, 40.0
    assert config_lib.differences(begun.to_dict(), config.to_dict()) == []
    assert config_lib.differences(config.to_dict(), begun.to_dict()), "but a value that is given is not from the data"
    begun.seed = 1
    assert config_lib.differences(begun.to_dict(), config.to_dict()) == ["seed: 1 -> 0"]


@pytest.mark.parametrize("name", sources.REGISTRY)
def test_every_source_refuses_what_it_does_not_read(name):
    for key in ("dir", "variant", "train", "test", "trusted"):
        config = data_config(name=name, **{key: "somewhere"})
        if key in sources.REGISTRY[name].reads:
            sources.check_reads(config)
            continue
        readers = ", ".join(other for other, reader in sources.REGISTRY.items() if key in reader.reads)
        with pytest.raises(UserError, match=rf"data.{key}='somewhere', but data.name={name} does not .*\({readers}\)"):
            sources.check_reads(config)


def test_labels_beyond_num_classes(tmp_path):
    config = save(tmp_path, images=IMAGES, labels=LABELS)
    config.num_classes = 2
    with pytest.raises(
        UserError, match=r"own.npz: label 2, expected 0 to 1 \(data.num_classes=2\); with data.num_classes=0 the 3 num"
    ):
        sources.load(config)
    config.num_classes = 7
    assert sources.load(config).num_classes == 7
    with pytest.raises(UserError, match=r"data.num_classes=3, but the labels of digits go up to 9"):
        sources.load(data_config(num_classes=3))


def test_npz_that_is_missing_truncated_or_something_else(tmp_path):
    config = save(tmp_path, images=IMAGES, labels=LABELS)
    path = tmp_path / "own.npz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:100] + b"\xff" * 40 + whole[140:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            sources.load(config)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        sources.load(config)
    with pytest.raises(UserError, match="needs data.train"):
        sources.load(data_config(name="arrays"))


def test_one_number_that_flattens_a_column_is_told():
    values = np.random.default_rng(0).normal(size=(50, 3))
    values[:, 2] = np.arange(50) == 7  # as of a rare word: no mistake
    assert arrays.outliers(values, "x") == ()
    values[4, 1] = -1e12
    (notice,) = arrays.outliers(values, "x")
    assert notice.startswith("x: row 4 has -1e+12 in column 1, over 1,000 times any other number there")
