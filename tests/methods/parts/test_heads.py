"""Features in training, however a batch is divided, and a head of one's own: a step of each optimiser by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import BATCH, make, make_batch

from ieg_jax.errors import UserError
from ieg_jax.methods.parts import heads


@pytest.mark.parametrize("name", ["supervised", "co_teaching"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_features_are_what_the_last_layer_sees(name, microbatches):
    """The logits follow from them; logits and averages are those of `forward`."""
    context, method, state, _ = make(name, groups=4, microbatches=microbatches)
    images = make_batch()["image"]
    logits, features, stats = jax.jit(context.forward_with_features)(state.params, state.batch_stats, images)
    plain, plain_stats = jax.jit(context.forward)(state.params, state.batch_stats, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (logits, stats), (plain, plain_stats))
    head = state.params["head"]
    bias = head["bias"] if method.networks == 1 else head["bias"][:, None]
    np.testing.assert_allclose(features @ head["kernel"] + bias, logits, rtol=1e-4, atol=1e-5)
    assert features.shape == (*logits.shape[:-1], context.num_features) and logits.shape[-2] == BATCH
    assert head["kernel"].shape[-2] == context.num_features


def test_a_network_without_a_last_layer_has_no_features():
    from flax import linen as nn

    class Plain(nn.Module):
        batch_groups: int = 1
        param_dtype = jnp.float32

        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(4, name="last")(x.reshape(len(x), -1))

    context = make("supervised", network=Plain())[0]
    with pytest.raises(UserError, match="network Plain has no layer named head"):
        _ = context.num_features


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_steps_by_hand(optimizer):
    """On ½ ‖w − 1‖², at the rate of the schedule, 0.1; weights decay by the loss or by the optimiser."""
    keys = {"optimizer.name": optimizer, "optimizer.momentum": 0.5, "optimizer.weight_decay": 0.02}
    context, *_ = make("supervised", **keys)
    start = {"kernel": jnp.array([[2.0, -1.0]])}
    found, weights = heads.begin(context, start), np.array([[2.0, -1.0]])
    momentum, square = 0.0, 0.0
    for step in (1, 2):
        found = heads.moved(context, found, lambda w: 0.5 * jnp.sum(jnp.square(w["kernel"] - 1)), jnp.int32(step - 1))
        slope = weights - 1
        if optimizer == "sgd":
            momentum = 0.5 * momentum + slope + 0.02 * weights
            weights = weights - 0.1 * momentum
        else:
            momentum, square = 0.5 * momentum + 0.5 * slope, 0.999 * square + 0.001 * slope**2
            direction = momentum / (1 - 0.5**step) / np.sqrt(square / (1 - 0.999**step))
            weights = weights - 0.1 * (direction + 0.02 * weights)
        np.testing.assert_allclose(found.weights["kernel"], weights, rtol=1e-4)
