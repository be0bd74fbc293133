import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm
from ieg_jax.models.resnet29 import ResNet29
from ieg_jax.models.wide_resnet import WideResNet


def count(network):
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=True))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    "network, parameters",
    [
        (WideResNet(28, 10, 10), 36_220_634),
        (WideResNet(28, 10, 100), 36_278_324),
        (WideResNet(28, 1, 10), 366_938),
        (WideResNet(28, 10, 10, authors=False), 36_479_194),  # the usual WRN-28-10
        (ResNet29(10), 840_730),
        (ResNet29(100), 863_860),
        (ResNet29(10, authors=False), 840_730),
    ],
)
def test_parameter_counts(network, parameters):
    assert count(network) == parameters


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
    import flax.linen as nn

    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 5, 5, 3)), jnp.float32)
    ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    y, _ = ours.apply(ours.init(jax.random.key(0), x, train=True), x, train=True, mutable=["batch_stats"])
    variables = theirs.init(jax.random.key(0), x, use_running_average=False)
    expected, _ = theirs.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["authors", "standard"])
@pytest.mark.parametrize("name", ["wide_resnet", "resnet29_v2", "tiny"])
def test_bfloat16_computes_low_and_answers_high(name, variant):
    config = default.get_config().model
    config.name, config.variant, config.width = name, variant, 0.5
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    network = models.create(config, num_classes=7)
    variables = jax.jit(lambda: network.init(jax.random.key(0), images, train=True))()
    logits = jax.jit(lambda v: network.apply(v, images, train=False))(variables)
    assert logits.shape == (4, 7)
    config.dtype = "bfloat16"
    low = models.create(config, num_classes=7)
    low_variables = jax.eval_shape(lambda: low.init(jax.random.key(0), images, train=True))
    assert {leaf.dtype for leaf in jax.tree.leaves(low_variables)} == {jnp.dtype("float32")}
    low_logits = jax.jit(lambda v: low.apply(v, images, train=False))(variables)
    assert low_logits.dtype == jnp.float32
    assert 0 < np.abs(low_logits - logits).max() < 0.1 * np.abs(logits).max() + 0.05


def test_the_authors_block_has_no_relu_before_its_first_convolution():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    authors, standard = ResNet29(3), ResNet29(3, authors=False)
    variables = authors.init(jax.random.key(0), x, train=True)
    assert jax.tree.structure(variables) == jax.tree.structure(standard.init(jax.random.key(0), x, train=True))
    assert np.abs(authors.apply(variables, x, False) - standard.apply(variables, x, False)).max() > 1e-3


def test_shortcut_without_parameters_by_hand():
    from ieg_jax.models.wide_resnet import _pad_and_pool

    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(_pad_and_pool(x, 4, 2), np.array([0, 1.5, 0, 0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(_pad_and_pool(x, 1, 1), x)
    odd = _pad_and_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 2)
    np.testing.assert_array_equal(odd[..., 0], np.array([[[2, 3.5], [6.5, 8]]]), "SAME padding that does not count")


@pytest.mark.parametrize("size", [7, 8, 13, 14, 28, 32])
def test_any_image_size(size):
    for authors in (True, False):
        network = WideResNet(10, 0.5, 3, authors=authors)
        shapes = jax.eval_shape(
            lambda n=network: n.init_with_output(jax.random.key(0), jnp.zeros((2, size, size, 1)), True)
        )
        assert shapes[0].shape == (2, 3)


def test_depth_that_no_wide_resnet_has():
    config = default.get_config().model
    config.depth = 12
    with pytest.raises(UserError, match="6 n"):
        models.create(config, num_classes=2)
