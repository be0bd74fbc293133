"""Co-teaching: who learns from whom, by hand; two networks on a leading axis."""

import jax
import numpy as np
import pytest
from small_step import BATCH, CLASSES, make, make_batch

KEYS = {"method.forget_rate": 0.5, "method.forget_epochs": 2.0, "batch_size": BATCH, "optimizer.weight_decay": 0.0}


def losses_of_both(context, state, batch):
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    assert logits.shape == (2, BATCH, CLASSES)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return -log_p[:, np.arange(BATCH), batch["label"]]


@pytest.mark.parametrize("step, share", [(0, 1.0), (3, 1 - 0.5 * (3 * 16 / 50) / 2), (20, 0.5)])
def test_each_learns_from_what_the_other_finds_easy(step, share):
    """50 examples in batches of 16: the share falls by 0.5 in two epochs, and stays there."""
    context, method, state, _ = make("co_teaching", **KEYS)
    state, batch = state.replace(step=np.int32(step)), make_batch()
    losses = losses_of_both(context, state, batch)
    count = int(np.floor(share * BATCH))
    easy = [np.argsort(one, kind="stable")[:count] for one in losses]
    supervision = method.supervise(state, batch, None)
    for network in (0, 1):
        assert set(np.flatnonzero(supervision.prepared[network])) == set(easy[1 - network].tolist())
    assert float(supervision.observed["train/share_chosen"]) == pytest.approx(share)
    chosen = np.bincount(np.concatenate(easy), minlength=BATCH)
    np.testing.assert_allclose(supervision.example_weights, chosen / chosen.sum(), rtol=1e-6)
    value, aux = method.loss(state.params, state, batch, supervision, None)
    assert float(value) == pytest.approx(losses[0, easy[1]].mean() + losses[1, easy[0]].mean(), rel=1e-5)
    assert aux.logits.shape == (BATCH, CLASSES)


def test_the_networks_are_two_and_learn_apart():
    _, _, state, step = make("co_teaching", **KEYS)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves((state.params, state.batch_stats, state.ema_params)))
    kernel = state.params["conv0"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3, "they start from different weights"
    _, _, alone, _ = make("supervised")
    shapes = jax.tree.map(lambda leaf: leaf.shape, alone.params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape[1:], state.params)
    after, _ = jax.jit(step)(state, make_batch(), jax.random.key(0))
    moved = [np.abs(after.params["head"]["kernel"][r] - state.params["head"]["kernel"][r]).max() for r in (0, 1)]
    assert min(moved) > 1e-4


def test_each_network_follows_its_own_loss():
    """The gradient of a network's loss with respect to the other network is 0."""
    _, method, state, _ = make("co_teaching", **KEYS)
    state, batch = state.replace(step=np.int32(20)), make_batch()
    supervision = method.supervise(state, batch, None)
    gradient = jax.grad(lambda params: method.loss(params, state, batch, supervision, None)[0])(state.params)
    one = supervision._replace(prepared=supervision.prepared.at[1].set(1.0))  # of network 1 everything is chosen
    other = jax.grad(lambda params: method.loss(params, state, batch, one, None)[0])(state.params)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-6)
    assert any(np.abs(a[1] - b[1]).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (gradient, other)), strict=True))


def test_predictions_are_the_mean():
    context, method, state, _ = make("co_teaching")
    batch = make_batch()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    each = []
    for network in (0, 1):
        one = jax.tree.map(lambda leaf, network=network: leaf[network], variables)
        each.append(jax.nn.softmax(context.network.apply(one, batch["image"], train=False)))
    np.testing.assert_allclose(method.predict(variables, {}, batch["image"]), (each[0] + each[1]) / 2, rtol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-3
