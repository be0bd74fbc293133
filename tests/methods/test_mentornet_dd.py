"""The data-driven MentorNet: V by hand, its step by differences, its limits, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import mentornet_dd
from ieg_jax.methods.parts import losses

NOW = {"method.burn_in_epochs": 0.0}
KEY = jax.random.key(4)


def psi_of(hidden, out, embedding=None):
    embedding = np.zeros((CLASSES, 2)) if embedding is None else embedding
    return {
        "embedding": jnp.asarray(embedding),
        "hidden": {"kernel": jnp.asarray(hidden), "bias": jnp.zeros(len(hidden[0]))},
        "out": {"kernel": jnp.asarray(out), "bias": jnp.array([0.3])},
    }


def test_the_network_by_hand():
    hidden = np.array([[1.0, 0.0], [0.0, -2.0], [0.5, 0.0], [0.0, 1.0], [2.0, 0.0]])
    embedding = np.array([[0.1, 0.2], [0.0, -0.3], [0.0, 0.0], [0.0, 0.0]])
    psi = psi_of(hidden, [[2.0], [-1.0]], embedding)
    found = mentornet_dd.judge(psi, jnp.array([0.5, 2.0]), jnp.float32(0.8), jnp.array([1, 0]), jnp.float32(0.6))
    units = np.tanh([[0.5 + 0.3 - 0.6, 0.6 + 0.0], [2.0 + 0.3 + 0.4, -2.4 + 0.1]])
    np.testing.assert_allclose(found, units @ [2.0, -1.0] + 0.3, rtol=1e-6)


def test_a_constant_network_is_the_cross_entropy():
    context, method, state, _ = make("mentornet_dd", **NOW, **{"method.mentor_rate": 1e-12})
    constant = jax.tree.map(jnp.zeros_like, state.method["psi"])
    state, batch = state.replace(method=state.method | {"psi": constant}), make_batch()
    supervision = method.supervise(state, batch, KEY)
    _, aux = method.loss(state.params, state, batch, supervision, None)
    plain = losses.cross_entropy(aux.logits, context.one_hot(batch["label"])).mean()
    assert float(aux.terms["weighted"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(supervision.observed["weight/mean"]) == 0.5
    assert float(supervision.observed["loss/mentor"]) == pytest.approx(np.log(2), rel=1e-6)


def test_the_percentile_is_that_of_the_predefined_one():
    _, method, state, _ = make("mentornet_dd", **NOW)
    _, predefined, other, _ = make("mentornet", **NOW)
    for seed in range(2):
        batch = make_batch(seed=seed)
        memory = method.supervise(state, batch, KEY).memory
        expected = jax.jit(predefined.supervise)(other, batch, KEY).memory
        assert float(memory["pace"]) == float(expected["pace"]) > 0
        state, other = state.replace(method=memory), other.replace(method=expected)


def test_a_step_of_the_network_is_that_of_differences():
    with x64():
        keys = NOW | {"method.mentor_units": 2, "method.wrong_share": 0.3}
        context, method, state, _ = make("mentornet_dd", dtype=jnp.float64, **keys)
        psi = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.method["psi"])
        moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.method["adam"])
        state, batch = state.replace(method=state.method | {"psi": psi, "adam": moments}), make_batch(np.float64)
        supervision = method.supervise(state, batch, KEY)
        logits, _ = context.forward(state.params, state.batch_stats, batch["probe_image"])
        log_p = np.asarray(jax.nn.log_softmax(logits))
        right = batch["probe_label"]
        wrong = (right + np.asarray(jax.random.randint(KEY, (16,), 1, CLASSES))) % CLASSES
        assert (wrong != right).all()

        def value(psi):
            each = [
                mentornet_dd.judge(psi, -log_p[np.arange(16), label], supervision.memory["pace"], label, 1.0)
                for label in (right, wrong)
            ]
            chance = [1 / (1 + np.exp(-np.asarray(one))) for one in each]
            return float(-(0.7 * np.log(chance[0]) + 0.3 * np.log(1 - chance[1])).mean())

        assert float(supervision.observed["loss/mentor"]) == pytest.approx(value(psi), rel=1e-9)
        for name, place in (("hidden", (0, 1)), ("hidden", (4, 0)), ("out", (1, 0))):
            ends = [
                value(psi | {name: psi[name] | {"kernel": psi[name]["kernel"].at[place].add(sign * 1e-5)}})
                for sign in (1, -1)
            ]
            found = supervision.memory["adam"].mu[name]["kernel"][place]
            assert float(found) == pytest.approx(0.1 * (ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_at_first_it_is_the_cross_entropy():
    _, method, state, _ = make("mentornet_dd", **{"method.burn_in_epochs": 2.0, "batch_size": 16})
    batch = make_batch()
    for step, same in ((0, True), (6, True), (7, False)):  # 50 examples, 16 a step: two epochs are 6.25 steps
        weights = method.supervise(state.replace(step=jnp.int32(step)), batch, KEY).example_weights
        assert np.allclose(weights, 1 / 16, atol=1e-7) == same


def test_it_learns_that_small_losses_are_right():
    """From trusted images of which the network is right; it then doubts labels that the network does not predict."""
    context, method, state, _ = make("mentornet_dd", **NOW)
    batch = make_batch()
    sharpened = jax.tree.map(lambda leaf: 8 * leaf, state.params["head"])
    state = state.replace(params=state.params | {"head": sharpened})
    predicted = {
        name: np.asarray(jnp.argmax(context.forward(state.params, state.batch_stats, batch[name])[0], -1), np.int32)
        for name in ("image", "probe_image")
    }
    batch |= {"probe_label": predicted["probe_image"], "label": predicted["image"].copy()}
    batch["label"][::2] = (batch["label"][::2] + 1) % CLASSES
    for step in range(200):
        supervision = method.supervise(state, batch, jax.random.key(step))
        state = state.replace(method=supervision.memory)
    weights = np.asarray(supervision.example_weights)
    assert weights[1::2].mean() > 3 * weights[::2].mean()
