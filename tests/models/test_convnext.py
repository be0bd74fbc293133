"""ConvNeXt against that of timm and of transformers, for the same weights; tiny ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_networks
from conftest import x64
from flax.traverse_util import unflatten_dict

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import convnext, pretrained

CLASSES = torch_networks.CLASSES
TINY = {version: convnext.Size((1, 1, 2, 1), (8, 8, 16, 16), second=version == 2) for version in (1, 2)}
NAMES = {1: "convnext_tiny", 2: "convnextv2_tiny"}


def group(path="", **keys):
    model = default.get_config().model
    model.update({"name": "convnext_tiny", "conventions": "torch", "pretrained": str(path), **keys})
    return model


def fit(path, state, version, **keys):
    """The tiny network, in float64 where jax has it, and its weights from a file with the arrays of `state`."""
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    model, dtype = group(path, name=NAMES[version], **keys), jnp.zeros(0).dtype
    network = TINY[version].from_config(model, num_classes=CLASSES, dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True))
    return network, pretrained.fit(pretrained.read(model), model, shapes)


@pytest.mark.parametrize(
    "name, version, title",
    [
        ("convnext", 1, "timm's names"),
        ("convnextv2", 2, "timm's names"),
        ("convnext_transformers", 1, "transformers' names"),
        ("convnextv2_transformers", 2, "transformers' names of V2"),
    ],
)
def test_answers_are_those_of_torch(name, version, title, tmp_path):
    """Images of 70×64 pixels: what does not divide is cut off."""
    state, images, expected = torch_networks.golden(name)
    with x64(True):
        network, weights = fit(tmp_path / "weights.safetensors", state, version)
        assert f"({title}, " in weights.note
        variables, inputs = unflatten_dict(weights.arrays, sep="/"), 2 * images - 1
        got, features = jax.jit(
            lambda v, x: (network.apply(v, x, train=False), inputs_of_head(network, v, x))
        )(variables, inputs)  # fmt: skip
        spread = expected.std(0).mean()  # from image to image
        assert spread > 0.1 * expected.std()
        np.testing.assert_allclose(got, expected, atol=1e-5 * spread, rtol=0)
        head = variables["params"]["head"]
        np.testing.assert_allclose(features @ head["kernel"] + head["bias"], got, atol=1e-9)


def published(state):
    """transformers' names -> those of the authors."""
    names = [
        ("encoder.stages.0", "stages.0"), ("layer_scale_parameter", "gamma"), ("grn.weight", "grn.gamma"),
        ("grn.bias", "grn.beta"), ("embeddings.patch_embeddings", "downsample_layers.0.0"),
        ("embeddings.layernorm", "downsample_layers.0.1"), ("classifier", "head"),
    ]  # fmt: skip
    renamed = {}
    for name, array in state.items():
        name = name.removeprefix("convnextv2.").removeprefix("convnext.")
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        for stage in (1, 2, 3):
            name = name.replace(f"encoder.stages.{stage}.downsampling_layer", f"downsample_layers.{stage}")
            name = name.replace(f"encoder.stages.{stage}", f"stages.{stage}")
        renamed[name.replace(".layers.", ".").replace("layernorm", "norm")] = array
    return renamed


@pytest.mark.parametrize("name, version", [("convnext_transformers", 1), ("convnextv2_transformers", 2)])
def test_the_published_names(name, version, tmp_path):
    state, _, _ = torch_networks.golden(name)
    _, ours = fit(tmp_path / "ours.safetensors", state, version)
    _, theirs = fit(tmp_path / "theirs.safetensors", published(state), version)
    assert "(the published names, " in theirs.note
    for path, array in ours.arrays.items():
        np.testing.assert_array_equal(theirs.arrays[path], array, err_msg=path)
    with pytest.raises(UserError, match="model.conventions: got 'own', expected 'torch'"):
        fit(tmp_path / "theirs.safetensors", state, version, conventions="own")


@pytest.mark.parametrize(
    "name, parameters",
    [  # as in the papers' repositories
        ("convnext_tiny", 28_589_128),
        pytest.param("convnext_small", 50_223_688, marks=pytest.mark.slow),
        pytest.param("convnext_base", 88_591_464, marks=pytest.mark.slow),
        ("convnextv2_nano", 15_623_800),
        pytest.param("convnextv2_tiny", 28_635_496, marks=pytest.mark.slow),
        pytest.param("convnextv2_base", 88_717_800, marks=pytest.mark.slow),
    ],
)
def test_parameter_counts(name, parameters):
    network = models.create(group(name=name), 1000)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_images_that_are_too_small():
    network = TINY[1].from_config(group(), num_classes=2)
    with pytest.raises(UserError, match="got images of 32×31 pixels, expected at least 32 a side"):
        jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 31, 3)), train=True))


def test_global_response_norm_by_hand():
    x = jnp.array([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2)  # norms 5 and 1, of which the mean is 3
    layer = convnext.GlobalResponseNorm()
    params = {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.0, 10.0])}
    expected = [[3 + 2 * 3 * 5 / 3, 10], [4 + 2 * 4 * 5 / 3, 1 + 1 / 3 + 10]]
    np.testing.assert_allclose(layer.apply({"params": params}, x)[0, :, 0], expected, rtol=1e-5)


def test_second_derivatives_of_global_response_norm():
    """Along a direction, against the difference quotient of the gradient, in float64; also with a silent channel."""
    with x64(True):
        layer, rng = convnext.GlobalResponseNorm(jnp.float64, jnp.float64), np.random.default_rng(0)
        x, direction = rng.normal(size=(2, 2, 3, 3, 4))
        params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}

        @jax.jit
        def along(x):
            gradient = jax.grad(lambda x: jnp.sum(layer.apply({"params": params}, x) ** 3))
            return jax.jvp(gradient, (x,), (direction,))

        quotient = (along(x + 1e-5 * direction)[0] - along(x - 1e-5 * direction)[0]) / 2e-5
        np.testing.assert_allclose(along(x)[1], quotient, atol=1e-6 * np.abs(quotient).max())
        x[..., 0] = 0
        assert all(np.isfinite(leaf).all() for leaf in along(x))
