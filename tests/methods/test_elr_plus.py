"""ELR+: targets and loss by hand, whose predictions are whose targets, and plain training as its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

BETA, STRENGTH = 0.6, 2.5
KEYS = {"method.target_momentum": BETA, "method.early_learning_weight": STRENGTH, "optimizer.weight_decay": 0.0}
KEY = jax.random.key(4)


def softmax(logits):
    return np.asarray(jax.nn.softmax(logits), np.float64)


def test_two_steps_by_hand():
    context, method, state, step = make("elr_plus", groups=2, **KEYS)
    forward, step = jax.jit(context.forward), jax.jit(step)
    target = np.zeros((50, 2, CLASSES))
    for seed in range(2):
        batch = make_batch(seed=seed)
        rows, label = batch["row"], np.eye(CLASSES)[batch["label"]]
        p = softmax(forward(state.ema_params, state.batch_stats, batch["image"])[0])
        for network in (0, 1):
            target[rows, network] = BETA * target[rows, network] + (1 - BETA) * p[1 - network]
        supervision = method.supervise(state, batch, KEY)
        np.testing.assert_allclose(supervision.prepared[0], target[rows].swapaxes(0, 1), rtol=1e-4, atol=1e-7)
        value, _ = method.loss(state.params, state, batch, supervision, None)
        expected, pairs = 0.0, supervision.prepared[2]
        for network in (0, 1):
            share = float(pairs.share[network])
            assert 0.5 <= share <= 1
            partner = np.concatenate([8 * group + np.asarray(pairs.partner[network, group]) for group in (0, 1)])
            assert sorted(partner) == list(range(16))

            def mix(array, share=share, partner=partner):
                return share * array + (1 - share) * array[partner]

            logits, _ = forward(state.params, state.batch_stats, mix(batch["image"]))
            q = softmax(logits[network])
            agreement = (np.clip(q, 1e-4, 1 - 1e-4) * mix(target[rows, network])).sum(-1)
            expected += -(mix(label) * np.log(q)).sum(-1).mean() + STRENGTH * np.log(1 - agreement).mean()
        assert float(value) == pytest.approx(expected, rel=1e-4)
        assert float(pairs.share[0]) != float(pairs.share[1]), "each has a mixture of its own"
        state, _ = step(state, batch, KEY)
        np.testing.assert_allclose(state.method["target"], target, rtol=1e-3, atol=1e-6)


def test_targets_come_from_the_average_of_the_other_network():
    _, method, state, _ = make("elr_plus", **KEYS)
    batch = make_batch()

    def targets(**changed):
        return method.supervise(state.replace(**changed), batch, KEY).prepared[0]

    def second_moved(tree):
        return jax.tree.map(lambda leaf: leaf.at[1].multiply(2), tree)

    np.testing.assert_array_equal(targets(params=second_moved(state.params)), targets())
    one, two = targets(ema_params=second_moved(state.ema_params)), targets()
    np.testing.assert_array_equal(one[1], two[1])
    assert np.abs(one[0] - two[0]).max() > 1e-3
    _, method, state, _ = make("elr_plus", **KEYS, **{"ema.decay": 0.0})
    np.testing.assert_allclose(method.supervise(state, batch, KEY).prepared[0], two, rtol=1e-5)


def test_without_regularisation_and_mixture_it_is_plain_training_of_each():
    keys = {"method.early_learning_weight": 0.0, "method.mixing_alpha": 0.0}
    _, method, state, _ = make("elr_plus", **keys)
    _, plain, one, _ = make("supervised")
    batch = make_batch()
    supervision = method.supervise(state, batch, KEY)
    loss = jax.jit(jax.value_and_grad(lambda params: method.loss(params, state, batch, supervision, None)[0]))
    value, gradient = loss(state.params)
    alone = jax.jit(jax.value_and_grad(lambda params: plain.loss(params, one, batch, None, None)[0]))
    values = []
    for network in (0, 1):
        expected, slope = alone(jax.tree.map(lambda leaf, r=network: leaf[r], state.params))
        values.append(expected)
        found = jax.tree.map(lambda leaf, r=network: leaf[r], gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, slope)
    assert float(value) == pytest.approx(float(sum(values)), rel=1e-5)


def test_it_pulls_towards_the_targets():
    """Three examples by hand, p uniform over four classes: −log p + λ log(1 − ⟨p, t⟩) with t on one class or none."""
    _, method, state, _ = make("elr_plus", **KEYS, **{"method.mixing_alpha": 0.0})
    batch = jax.tree.map(lambda array: array[:3], make_batch())
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    supervision = method.supervise(state, batch, KEY)
    target = jnp.array([[0.0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    prepared = (jnp.stack([target, 0 * target]), *supervision.prepared[1:])
    value, aux = method.loss(nothing, state, batch, supervision._replace(prepared=prepared), None)
    assert float(aux.terms["cross_entropy"]) == pytest.approx(2 * np.log(4), rel=1e-5)
    assert float(aux.terms["early_learning"]) == pytest.approx(STRENGTH * 2 / 3 * np.log(3 / 4), rel=1e-5)
    assert float(value) == pytest.approx(2 * np.log(4) + STRENGTH * 2 / 3 * np.log(3 / 4), rel=1e-5)
