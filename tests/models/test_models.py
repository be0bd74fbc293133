import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_networks

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.models import convnext
from ieg_jax.models.densenet import DenseNet
from ieg_jax.models.inception_resnet_v2 import InceptionResNetV2
from ieg_jax.models.layers import BatchNorm
from ieg_jax.models.resnet29 import ResNet29
from ieg_jax.models.resnet50 import Bottleneck, ResNet50
from ieg_jax.models.resnet50_v2 import ResNet50V2
from ieg_jax.models.resnet_cifar import BasicBlock, CifarResNet, PreactivatedBlock
from ieg_jax.models.vgg import VGG13
from ieg_jax.models.wide_resnet import WideResNet, _pad_and_pool


def count(network):
    size = 75 if isinstance(network, InceptionResNetV2) else 32
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=True))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    "network, parameters",
    [
        (WideResNet(num_classes=10, depth=28, width=10), 36_220_634),
        (WideResNet(num_classes=100, depth=28, width=10), 36_278_324),
        (WideResNet(num_classes=10, depth=28, width=1), 366_938),
        (WideResNet(num_classes=10, depth=28, width=10, authors=False), 36_479_194),  # the usual WRN-28-10
        (ResNet29(10), 840_730),
        (ResNet29(100), 863_860),
        (ResNet29(10, authors=False), 840_730),
        (ResNet50(1000), 25_557_032),  # as torchvision's and Keras's table of ResNet-50, without Keras's conv biases
        (CifarResNet(10), 11_173_962),  # what repositories of CIFAR networks print for ResNet-18, and the next
        (CifarResNet(10, blocks=(3, 4, 6, 3)), 21_282_122),
        (CifarResNet(10, preactivated=True), 11_171_146 + 128),  # theirs, and the norm behind the first convolution
        (VGG13(10), 9_416_010),  # what repositories of CIFAR networks print for VGG-13 with batch norm
        (DenseNet(10), 769_162),  # DenseNet-BC, L = 100, k = 12: 0.8 M in the paper, 769,162 in repositories
        (DenseNet(100), 800_032),
        (InceptionResNetV2(1000), 55_843_464),  # as timm's; Keras's 55,813,192 trainable ones and 30,272 scales
    ],
)
def test_parameter_counts(network, parameters):
    assert count(network) == parameters


def test_parameters_of_vgg13_by_hand():
    channels = [3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    kernels = sum(9 * before * after for before, after in itertools.pairwise(channels))
    per_channel = 3 * sum(channels[1:])  # convolution's bias, scale and bias of batch norm
    assert count(VGG13(10)) == kernels + per_channel + 512 * 10 + 10
    assert count(VGG13(100)) == kernels + per_channel + 512 * 100 + 100


def test_parameters_of_densenet_by_hand():
    total, channels = 9 * 3 * 24, 24
    for block in range(3):
        for _ in range(16):
            total += 2 * channels + channels * 48 + 2 * 48 + 9 * 48 * 12
            channels += 12
        if block < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    assert channels == 342
    for num_classes in (10, 100):
        assert count(DenseNet(num_classes)) == total + 2 * channels + channels * num_classes + num_classes


def test_parameters_of_inception_resnet_v2_by_hand():
    def chain(before, *layers):
        """Kernels, scales and biases of convolutions (area of the kernel, channels) with batch norm."""
        total = 0
        for area, channels in layers:
            total += area * before * channels + 2 * channels
            before = channels
        return total

    stem = chain(3, (9, 32), (9, 32), (9, 64), (1, 80), (9, 192))
    mixed_5b = chain(192, (1, 96)) + chain(192, (1, 48), (25, 64)) + chain(192, (1, 64), (9, 96), (9, 96))
    mixed_5b += chain(192, (1, 64))
    block35 = chain(320, (1, 32)) + chain(320, (1, 32), (9, 32)) + chain(320, (1, 32), (9, 48), (9, 64))
    mixed_6a = chain(320, (9, 384)) + chain(320, (1, 256), (9, 256), (9, 384))
    block17 = chain(1088, (1, 192)) + chain(1088, (1, 128), (7, 160), (7, 192))
    mixed_7a = chain(1088, (1, 256), (9, 384)) + chain(1088, (1, 256), (9, 288))
    mixed_7a += chain(1088, (1, 256), (9, 288), (9, 320))
    block8 = chain(2080, (1, 192)) + chain(2080, (1, 192), (3, 224), (3, 256))
    total = stem + mixed_5b + mixed_6a + mixed_7a + chain(2080, (1, 1536))
    for times, block, inside, channels in ((10, block35, 128, 320), (20, block17, 384, 1088), (10, block8, 448, 2080)):
        total += times * (block + inside * channels + channels)  # and the convolution that goes up again, with biases
    assert count(InceptionResNetV2(50)) == total + 1536 * 50 + 50


def test_parameters_of_resnet50_by_hand():
    total, before = 7 * 7 * 3 * 64 + 2 * 64, 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outer = 4 * inner
        total += before * outer + 2 * outer  # one projection of the shortcut
        for _ in range(blocks):
            total += before * inner + 9 * inner * inner + inner * outer + 2 * (inner + inner + outer)
            before = outer
    assert count(ResNet50(10)) == total + 2048 * 10 + 10
    assert count(ResNet50(1000)) == total + 2048 * 1000 + 1000


def test_parameters_of_resnet50_v2_by_hand():
    total, before = 7 * 7 * 3 * 64, 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outer = 4 * inner
        total += before * outer  # the shortcut has no batch norm of its own
        for _ in range(blocks):
            total += before * inner + 9 * inner * inner + inner * outer + 2 * (before + inner + inner)
            before = outer
    assert count(ResNet50V2(1000)) == total + 2 * 2048 + 2048 * 1000 + 1000 == 25_549_352


def shapes_inside(network, size, kind=None):
    """Shapes of the output and of what each direct submodule gives (of one kind), by name, for one image."""
    images = jnp.zeros((1, size, size, 3))

    def run():
        keep = lambda module, _: (  # noqa: E731
            module.path and len(module.path) == 1 and (kind is None or isinstance(module, kind))
        )
        variables = network.init(jax.random.key(0), images, train=True)
        return network.apply(variables, images, train=False, capture_intermediates=keep, mutable="intermediates")

    logits, captured = jax.eval_shape(run)
    return logits.shape, {name: value["__call__"][0].shape for name, value in captured["intermediates"].items()}


@pytest.mark.parametrize("size, sides", [(224, (56, 28, 14, 7)), (64, (16, 8, 4, 2)), (33, (9, 5, 3, 2))])
def test_sizes_inside_resnet50(size, sides):
    logits, blocks = shapes_inside(ResNet50(7), size, Bottleneck)
    assert logits == (1, 7) and len(blocks) == 16
    for stage, (side, channels) in enumerate(zip(sides, (256, 512, 1024, 2048), strict=True), start=1):
        assert {shape for name, shape in blocks.items() if name.startswith(f"stage{stage}_")} == {
            (1, side, side, channels)
        }


@pytest.mark.parametrize("size, sides", [(32, (32, 16, 8, 4)), (13, (13, 7, 4, 2))])
@pytest.mark.parametrize("preactivated", [False, True])
def test_sizes_inside_cifars_resnets(preactivated, size, sides):
    logits, blocks = shapes_inside(CifarResNet(7, (3, 4, 6, 3), preactivated), size, BasicBlock | PreactivatedBlock)
    assert logits == (1, 7) and len(blocks) == 16
    for stage, (side, channels) in enumerate(zip(sides, (64, 128, 256, 512), strict=True), start=1):
        shapes = {shape for name, shape in blocks.items() if name.startswith(f"stage{stage}_")}
        assert shapes == {(1, side, side, channels)}


@pytest.mark.parametrize(
    "size, sides", [(32, (32, 16, 8, 4, 2)), (64, (64, 32, 16, 8, 4)), (33, (33, 17, 9, 5, 3)), (8, (8, 4, 2, 1, 1))]
)
def test_sizes_inside_vgg13(size, sides):
    logits, layers = shapes_inside(VGG13(7), size)
    assert logits == (1, 7)
    assert [layers[f"stage{stage}_conv2"][1] for stage in range(1, 6)] == list(sides)
    assert [layers[f"stage{stage}_conv1"][-1] for stage in range(1, 6)] == [64, 128, 256, 512, 512]


@pytest.mark.parametrize("size, sides", [(32, (32, 16, 8)), (28, (28, 14, 7)), (13, (13, 7, 4)), (1, (1, 1, 1))])
def test_sizes_inside_densenet(size, sides):
    logits, layers = shapes_inside(DenseNet(7), size)
    assert logits == (1, 7)
    for block, (side, before) in enumerate(zip(sides, (24, 108, 150), strict=True), start=1):
        for layer in range(16):
            name = f"block{block}_layer{layer}"
            assert layers[f"{name}_norm1"] == (1, side, side, before + 12 * layer)
            assert layers[f"{name}_conv1"][-1] == 48 and layers[f"{name}_conv2"] == (1, side, side, 12)
    assert layers["final_norm"] == (1, sides[-1], sides[-1], 342)


@pytest.mark.parametrize(
    "size, sides, repeats", [(299, (35, 17, 8), (10, 20, 9)), (224, (25, 12, 5), (1, 1, 1)), (75, (7, 3, 1), (1, 1, 1))]
)
def test_sizes_inside_inception_resnet_v2(size, sides, repeats):
    """Those of 299 pixels gave the blocks their names."""
    logits, layers = shapes_inside(InceptionResNetV2(7, repeats=repeats), size)
    assert logits == (1, 7) and InceptionResNetV2(7).repeats == (10, 20, 9)
    for name, count, side, channels in zip(
        ("block35", "block17", "block8"), repeats, sides, (320, 1088, 2080), strict=True
    ):
        names = [f"{name}_{number}_up" for number in range(count)] + ["block8_last_up"] * (name == "block8")
        assert {layers[up] for up in names} == {(1, side, side, channels)} and f"{name}_{count}_up" not in layers
    assert layers["conv_7b_norm"] == (1, sides[-1], sides[-1], 1536)


def test_images_too_small_for_inception_resnet_v2():
    with pytest.raises(UserError, match="got images of 74×74 pixels, expected at least 75 a side; enlarge"):
        shapes_inside(InceptionResNetV2(7), 74)


def resnet_v2_name(module):
    """timm's name of a layer -> the name here."""
    module = module.replace("stem.conv", "init_conv").replace("head.fc", "head").replace("downsample.conv", "shortcut")
    stage = re.match(r"stages\.(\d)\.blocks\.(\d)\.(\w+)", module)
    if stage:
        return f"stage{int(stage[1]) + 1}_block{stage[2]}_{stage[3]}"
    return {"norm": "final_norm"}.get(module, module)


@pytest.mark.parametrize("name", ["densenet", "inception_resnet_v2", "resnet50_v2"])
def test_logits_are_those_of_torch(name):
    """torchvision's DenseNet and timm's InceptionResnetV2 and ResNetV2, shallow or narrow; also in bfloat16."""
    state, images, expected = torch_networks.golden(name)
    part = 1 / torch_networks.NARROW
    if name == "densenet":
        network, rename = DenseNet(torch_networks.CLASSES, depth=16, growth=3), densenet_name
    elif name == "resnet50_v2":
        network, rename = ResNet50V2(torch_networks.CLASSES, features=4), resnet_v2_name
        state["head.fc.weight"] = state["head.fc.weight"][..., 0, 0]
    else:
        network, rename = InceptionResNetV2(torch_networks.CLASSES, part, (2, 2, 1)), inception_name
    shape = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.float32(images), train=True))
    variables = {"params": {}, "batch_stats": {}}
    for key, array in state.items():
        module, leaf = key.rsplit(".", 1)
        module = rename(module)
        if leaf == "num_batches_tracked":
            continue
        if array.ndim > 1:
            leaf, array = "kernel", array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        collection = "batch_stats" if leaf.startswith("running") else "params"
        leaf = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        variables[collection].setdefault(module, {})[leaf] = jnp.asarray(array)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shape)
    inputs = jnp.float32(2 * images - 1)
    logits = jax.jit(lambda v: network.apply(v, inputs, train=False))(variables)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    low = jax.jit(lambda v: network.clone(dtype=jnp.bfloat16).apply(v, inputs, train=False))(variables)
    assert low.dtype == jnp.float32 and 0 < np.abs(low - expected).max() < 0.05 * np.abs(expected).max()


def densenet_name(module):
    """torchvision's name of a module -> ours."""
    if fixed := {"features.conv0": "init_conv", "features.norm5": "final_norm", "classifier": "head"}.get(module):
        return fixed
    module = re.sub(r"features\.denseblock(\d)\.denselayer(\d)", lambda m: f"block{m[1]}_layer{int(m[2]) - 1}", module)
    return module.replace("features.", "").replace(".", "_")


def inception_name(module):
    """timm's name of a module -> ours."""
    if module == "classif":
        return "head"
    for theirs, ours in (("repeat_1", "block17"), ("repeat_2", "block8"), ("repeat", "block35")):
        module = re.sub(rf"^{theirs}\.", f"{ours}_", module)
    module = re.sub(r"^block8\.", "block8_last.", module).replace("conv2d_", "conv_").replace(".conv2d", ".up")
    module = re.sub(r"(branch\d)\.(conv|bn)$", r"\1.0.\2", module)  # a branch of one convolution has no number
    module = module.replace("branch3.1", "branch3.0")  # the pooling before it is number 0
    return re.sub(r"\bbn$", "norm", module).replace(".", "_")


SHALLOW = {"densenet100": {"depth": 16}, "inception_resnet_v2": {"repeats": (1, 1, 1)}}


def create(config, num_classes, batch_groups=1):
    """A network as from the registry, with fewer layers where it has very many; and a size of images for it."""
    network = models.create(config, num_classes, batch_groups).clone(**SHALLOW.get(config.name, {}))
    sides = {"inception_resnet_v2": 75} | dict.fromkeys(convnext.SIZES, convnext.SMALLEST)
    return network, sides.get(config.name, getattr(network, "patch", 16))


def test_width_scales_the_channels():
    config = default.get_config().model
    firsts = {"resnet50": "init_conv", "vgg13": "stage1_conv1", "inception_resnet_v2": "conv_2b_conv"}
    for name, first in (firsts | {"densenet100": "init_conv"}).items():
        config.name, config.width = name, 1 / 3 if name == "densenet100" else 0.125
        assert shapes_inside(*create(config, 7))[1][first][-1] == 8
        config.width = 0.001
        with pytest.raises(UserError, match="without a channel"):
            models.create(config, 7)


@pytest.mark.slow
def test_every_network_ends_in_a_layer_named_head():
    config = default.get_config().model
    for name in models.REGISTRY:
        config.name = name
        network, size = create(config, num_classes=3)
        images = jnp.zeros((1, size, size, 3))
        params = jax.eval_shape(lambda n=network, x=images: n.init(jax.random.key(0), x, True))["params"]
        assert params["head"]["bias"].shape == (3,)


@pytest.mark.parametrize(
    "network, size, blocks",
    # The layers and transitions of three dense blocks; stem, mixed and residual blocks, one of each and the last.
    [
        (DenseNet(3, depth=16, growth=3), 16, 6 + 2),
        (InceptionResNetV2(3, 1 / 16, (1, 1, 1)), 75, 2 + 1 + 1 + 1 + 1 + 2),
    ],
)
def test_blocks_that_are_computed_anew(network, size, blocks):
    images = jnp.zeros((2, size, size, 3))
    variables = []
    for remat in (False, True):
        same = network.clone(remat=remat)
        variables.append(jax.eval_shape(functools.partial(same.init, train=True), jax.random.key(0), images))
        forward = functools.partial(same.apply, train=False)
        operations = [equation.primitive.name for equation in jax.make_jaxpr(forward)(variables[0], images).eqns]
        assert sum(name in ("checkpoint", "remat", "remat2") for name in operations) == remat * blocks
    assert variables[0] == variables[1], "also in their names"


def test_gradients_of_a_densenet_that_is_computed_anew():
    """Its blocks take several arrays."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    network = DenseNet(3, depth=10, growth=2)
    variables = jax.jit(lambda: network.init(jax.random.key(0), images, train=True))()

    def loss(params, network):
        logits, updated = network.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean(), updated

    def gradient(remat):
        function = functools.partial(loss, network=network.clone(remat=remat))
        return jax.jit(jax.grad(function, has_aux=True))(variables["params"])

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient(False), gradient(True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet50", marks=pytest.mark.slow),
        "preact_resnet18",
        "vgg13",
        pytest.param("densenet100", marks=pytest.mark.slow),
        pytest.param("inception_resnet_v2", marks=pytest.mark.slow),
    ],
)
def test_train_and_evaluation_mode(name):
    """Training uses the statistics of each group of the batch and moves the averages, evaluation uses these."""
    config = default.get_config().model
    config.name, config.width = name, 0.25 if name == "densenet100" else 0.0625
    network, size = create(config, num_classes=3, batch_groups=2)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, size, size, 3)), jnp.float32)
    variables = jax.jit(lambda: network.init(jax.random.key(0), images, train=True))()
    forward = jax.jit(lambda v, x: network.apply(v, x, train=True, mutable=["batch_stats"]))
    evaluate = jax.jit(lambda v, x: network.apply(v, x, train=False))
    swap, mix = np.array([2, 3, 0, 1]), np.array([0, 2, 1, 3])
    logits, updated = forward(variables, images)
    np.testing.assert_allclose(forward(variables, images[swap])[0], logits[swap], atol=1e-4, err_msg="whole groups")
    assert np.abs(forward(variables, images[mix])[0] - logits[mix]).max() > 1e-3, "other groups"
    for before, after in zip(*map(jax.tree.leaves, (variables["batch_stats"], updated["batch_stats"])), strict=True):
        assert before.shape == after.shape and np.abs(before - after).max() > 0
    alone = evaluate(variables, images)
    np.testing.assert_allclose(evaluate(variables, images[mix]), alone[mix], atol=1e-4)
    assert np.abs(evaluate({**variables, **updated}, images) - alone).max() > 1e-3


def convolve(x, kernel, stride, pad):
    """Σ kernel[i, j] · x[stride·p + i − pad, stride·q + j − pad], one output pixel after the other."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    size = kernel.shape[0]
    sides = [(side - size) // stride + 1 for side in x.shape[1:3]]
    y = np.empty((len(x), *sides, kernel.shape[-1]))
    for p, q in np.ndindex(*sides):
        window = x[:, stride * p : stride * p + size, stride * q : stride * q + size]
        y[:, p, q] = np.einsum("nijc,ijcd->nd", window, kernel)
    return y


def assert_is_that_of_numpy(block, x, train, formula):
    """Compares a block with random weights with `formula(kernels by layer, norm(layer, x))` in float64."""
    rng = np.random.default_rng(1)
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=True))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32), variables)
    params, stats = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (variables["params"], variables["batch_stats"])
    )
    params = jax.tree.map(lambda leaf: leaf - 1 if leaf.ndim == 4 else leaf, params)
    variables = {"params": jax.tree.map(jnp.float32, params), "batch_stats": variables["batch_stats"]}

    def norm(name, x):
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats[name]["mean"], stats[name]["var"])
        return (x - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]

    kernels = {name: layer["kernel"] for name, layer in params.items() if "kernel" in layer}
    expected = formula(kernels, norm)
    got = jax.jit(lambda v: block.apply(v, x, train=train, mutable=["batch_stats"])[0])(variables)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("stride, channels, side", [(2, 3, 5), (2, 8, 6), (1, 8, 5)])
def test_a_bottleneck_block_against_numpy(train, stride, channels, side):
    x = np.random.default_rng(0).normal(size=(4, side, side, channels)).astype(np.float32)

    def formula(kernels, norm):
        y = relu(norm("norm1", convolve(x, kernels["conv1"], 1, 0)))
        y = relu(norm("norm2", convolve(y, kernels["conv2"], stride, 1)))
        y = norm("norm3", convolve(y, kernels["conv3"], 1, 0))
        if stride == 1 and channels == 8:
            return relu(x + y)
        return relu(norm("shortcut_norm", convolve(x, kernels["shortcut_conv"], stride, 0)) + y)

    assert_is_that_of_numpy(
        Bottleneck(2, stride, functools.partial(nn.Conv, use_bias=False), BatchNorm), x, train, formula
    )


@pytest.mark.parametrize("kind", [BasicBlock, PreactivatedBlock])
@pytest.mark.parametrize("stride, channels, side", [(2, 3, 5), (2, 4, 6), (1, 4, 5)])
def test_a_block_of_cifars_resnets_against_numpy(kind, stride, channels, side):
    """Without a change of shape the shortcut of the pre-activated block is what its first convolution sees, not x."""
    x = np.random.default_rng(0).normal(size=(4, side, side, channels)).astype(np.float32)

    def basic(kernels, norm):
        y = relu(norm("norm1", convolve(x, kernels["conv1"], stride, 1)))
        y = norm("norm2", convolve(y, kernels["conv2"], 1, 1))
        if stride == 1 and channels == 4:
            return relu(x + y)
        return relu(norm("shortcut_norm", convolve(x, kernels["shortcut_conv"], stride, 0)) + y)

    def preactivated(kernels, norm):
        a = relu(norm("norm1", x))
        y = convolve(relu(norm("norm2", convolve(a, kernels["conv1"], stride, 1))), kernels["conv2"], 1, 1)
        return y + (convolve(a, kernels["shortcut_conv"], stride, 0) if "shortcut_conv" in kernels else a)

    formula = basic if kind is BasicBlock else preactivated
    assert_is_that_of_numpy(kind(4, stride, functools.partial(nn.Conv, use_bias=False), BatchNorm), x, True, formula)


def test_batch_norm_by_hand_in_groups():
    x = jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(4, 1)
    norm = BatchNorm(groups=2, epsilon=0.0)
    variables = norm.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0])
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y[:, 0], [-1, 1, -1, 1], rtol=1e-6)
    # mean of the group means 2 and 20; unbiased variances 2 and 200
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * 11], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9 + 0.1 * 101], rtol=1e-6)
    y = norm.apply({**variables, **updated}, x, train=False)
    np.testing.assert_allclose(y[:, 0], (x[:, 0] - 1.1) / np.sqrt(11), rtol=1e-6)


def test_batch_norm_of_images_agrees_with_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 5, 5, 3)), jnp.float32)
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    y, _ = ours.apply(ours.init(jax.random.key(0), x, train=True), x, train=True, mutable=["batch_stats"])
    variables = theirs.init(jax.random.key(0), x, use_running_average=False)
    expected, _ = theirs.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, variant, width",
    [
        ("wide_resnet", "authors", 0.5),
        ("wide_resnet", "standard", 0.5),
        ("resnet29_v2", "authors", 1),
        pytest.param("resnet29_v2", "standard", 1, marks=pytest.mark.slow),
        ("tiny", "authors", 0.5),
        pytest.param("resnet50", "standard", 0.0625, marks=pytest.mark.slow),
        ("vgg13", "standard", 0.0625),
        ("densenet100", "standard", 0.25),
    ],
)
def test_bfloat16_computes_low_and_answers_high(name, variant, width):
    config = default.get_config().model
    config.name, config.variant, config.width = name, variant, width
    network, size = create(config, num_classes=7)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, size, size, 1)), jnp.float32)
    variables = jax.jit(lambda: network.init(jax.random.key(0), images, train=True))()
    logits = jax.jit(lambda v: network.apply(v, images, train=False))(variables)
    assert logits.shape == (4, 7)
    config.dtype = "bfloat16"
    low, _ = create(config, num_classes=7)
    low_variables = jax.eval_shape(lambda: low.init(jax.random.key(0), images, train=True))
    assert {leaf.dtype for leaf in jax.tree.leaves(low_variables)} == {jnp.dtype("float32")}
    low_logits = jax.jit(lambda v: low.apply(v, images, train=False))(variables)
    assert low_logits.dtype == jnp.float32
    assert 0 < np.abs(low_logits - logits).max() < 0.1 * np.abs(logits).max() + 0.05


def test_the_authors_block_has_no_relu_before_its_first_convolution():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    authors, standard = ResNet29(3), ResNet29(3, authors=False)
    variables = jax.jit(lambda: authors.init(jax.random.key(0), x, train=True))()
    other = jax.eval_shape(lambda: standard.init(jax.random.key(0), x, train=True))
    assert jax.tree.structure(variables) == jax.tree.structure(other)
    difference = jax.jit(lambda v: authors.apply(v, x, False) - standard.apply(v, x, False))(variables)
    assert np.abs(difference).max() > 1e-3


def test_the_last_layer_of_the_authors_begins_uniform():
    kernels = []
    for is_authors in (True, False):
        network = ResNet29(10, authors=is_authors)
        init = jax.jit(lambda network=network: network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True))
        kernels.append(np.asarray(init()["params"]["head"]["kernel"]))
    deviation = np.sqrt(2 / (256 + 10))  # of Glorot and Bengio 2010, in both forms
    np.testing.assert_allclose([kernel.std() for kernel in kernels], deviation, rtol=0.05)
    assert np.abs(kernels[0]).max() <= np.sqrt(3) * deviation < np.abs(kernels[1]).max()


def test_shortcut_without_parameters_by_hand():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(_pad_and_pool(x, 4, 2), np.array([0, 1.5, 0, 0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(_pad_and_pool(x, 1, 1), x)
    odd = _pad_and_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 2)
    np.testing.assert_array_equal(odd[..., 0], np.array([[[2, 3.5], [6.5, 8]]]), "SAME padding that does not count")


@pytest.mark.parametrize("size", [7, 8, 13, 14, 28, 32])
def test_any_image_size(size):
    for authors in (True, False):
        network = WideResNet(num_classes=3, depth=10, width=0.5, authors=authors)
        shapes = jax.eval_shape(
            lambda n=network: n.init_with_output(jax.random.key(0), jnp.zeros((2, size, size, 1)), True)
        )
        assert shapes[0].shape == (2, 3)


def test_depth_that_no_wide_resnet_has():
    config = default.get_config().model
    config.depth = 12
    with pytest.raises(UserError, match="6 n"):
        models.create(config, num_classes=2)
