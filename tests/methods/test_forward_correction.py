"""Forward correction and GLC: the corrected loss by hand, T from anchors and from trusted examples."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import gold_loss_correction
from ieg_jax.methods.forward_correction import anchored
from ieg_jax.methods.parts import losses
from ieg_jax.methods.parts.losses import corrected

LOGITS = jnp.array([[2.0, -1.0, 0.5, 0.0], [0.0, 3.0, 1.0, -2.0]])


def test_with_the_identity_it_is_the_cross_entropy():
    label = jnp.eye(4)[jnp.array([1, 2])]
    found = corrected(LOGITS, label, jnp.eye(4))
    np.testing.assert_allclose(found, losses.cross_entropy(LOGITS, label), rtol=1e-6)
    sure = corrected(jnp.array([[500.0, -500.0, 0.0, 0.0]]), label[:1], jnp.eye(4))
    assert float(sure[0]) == pytest.approx(1000.0), "also where a probability is 0 in 32 bits"


def test_by_hand():
    """p = (1/4, 3/4), T = ((1, 0), (1/2, 1/2)): the label 0 has 1/4 + 3/8 = 5/8, the label 1 has 3/8."""
    logits = jnp.log(jnp.array([[0.25, 0.75]]))
    transition = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    for label, p in ((0, 5 / 8), (1, 3 / 8)):
        found = corrected(logits, jnp.eye(2)[jnp.array([label])], transition)
        assert float(found[0]) == pytest.approx(-np.log(p), rel=1e-6)


def test_it_draws_to_the_true_class():
    """All labels of class 0 are given as 1: with the right T the minimum is where Φ says 0."""
    transition = jnp.array([[0.0, 1.0], [0.0, 1.0]]).at[1].set(jnp.array([0.6, 0.4]))
    gradient = jax.grad(lambda z: corrected(z, jnp.eye(2)[jnp.array([1])], transition)[0])(jnp.zeros((1, 2)))
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_anchors():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 101)
    for quantile, place in ((1.0, 100), (0.97, 97), (0.0, 0)):
        found = anchored(probabilities, quantile)
        for c in range(3):
            row = np.argsort(probabilities[:, c])[place]
            np.testing.assert_allclose(found[c], probabilities[row], rtol=1e-6)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_an_anchor_is_of_its_class(count):
    """Eight in ten of the labels of each class are right, and the network knows that."""
    rng = np.random.default_rng(0)
    given = 0.8 * np.eye(count) + 0.2 / count
    probabilities = given[np.arange(2000) % count] + rng.uniform(0, 1e-3, (2000, count))
    found = anchored(probabilities / probabilities.sum(1, keepdims=True), 0.97)
    np.testing.assert_allclose(found, given, atol=0.06)


def look(epoch, probabilities, memory):
    return types.SimpleNamespace(epoch=epoch, probabilities=lambda: probabilities[None], memory=lambda: memory)


def test_the_matrix_is_estimated_once():
    _, method, state, _ = make("forward_correction", **{"method.transition_epochs": 2.0})
    probabilities = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 50)
    same, rows = method.on_epoch(state, look(1, probabilities, state.method))
    assert same is state and rows is None
    changed, _ = method.on_epoch(state, look(2, probabilities, state.method))
    np.testing.assert_allclose(changed.method["transition"], anchored(probabilities, 0.97), rtol=1e-6)
    later, _ = method.on_epoch(changed, look(3, probabilities[::-1], changed.method))
    assert later is changed


def test_the_loss_takes_the_matrix_that_is_remembered():
    context, method, state, _ = make("forward_correction")
    batch = make_batch()
    _, aux = method.loss(state.params, state, batch, method.supervise(state, batch, None), None)
    plain = losses.cross_entropy(aux.logits, context.one_hot(batch["label"])).mean()
    assert float(aux.terms["corrected_cross_entropy"]) == pytest.approx(float(plain), rel=1e-5)
    transition = jnp.full((CLASSES, CLASSES), 1 / CLASSES)
    state = state.replace(method=state.method | {"transition": transition})
    _, aux = method.loss(state.params, state, batch, method.supervise(state, batch, None), None)
    assert float(aux.terms["corrected_cross_entropy"]) == pytest.approx(np.log(CLASSES), rel=1e-5)


def test_gold_by_hand():
    """Twice the trusted batch in the last of the epochs: C is its mean prediction by class; then both sets count."""
    context, method, state, _ = make("gold_loss_correction", **{"method.gold_epochs": 2.0, "batch_size": 16})
    batch = make_batch()  # 50 examples, 16 a step: an epoch is 3.125 steps
    p = np.asarray(jax.nn.softmax(context.forward(state.params, state.batch_stats, batch["probe_image"])[0]))
    wanted = np.stack([p[batch["probe_label"] == c].mean(0) for c in range(CLASSES)])
    before = method.supervise(state.replace(step=jnp.int32(3)), batch, None)
    assert float(before.memory["count"].sum()) == 0, "not in the first epoch"
    for step in (4, 5):
        supervision = method.supervise(state.replace(step=jnp.int32(step)), batch, None)
        state = state.replace(method=supervision.memory)
    np.testing.assert_allclose(gold_loss_correction.matrix(state.method), wanted, rtol=1e-5)
    after = method.supervise(state.replace(step=jnp.int32(7)), batch, None)
    np.testing.assert_allclose(after.memory["sum"], state.method["sum"], err_msg="C is fixed")
    _, aux = method.loss(state.params, state, batch, after, None)
    label = context.one_hot(batch["label"])
    trusted = -np.log(p[np.arange(16), batch["probe_label"]]).sum()
    noisy = float(corrected(aux.logits, label, jnp.asarray(wanted)).sum())
    assert float(aux.terms["trusted"]) == pytest.approx(trusted / 32, rel=1e-4)
    assert float(aux.terms["noisy"]) == pytest.approx(noisy / 32, rel=1e-4)
    _, aux = method.loss(state.params, state, batch, before, None)
    assert float(aux.terms["trusted"]) == 0
    assert float(aux.terms["noisy"]) == pytest.approx(float(losses.cross_entropy(aux.logits, label).mean()), rel=1e-5)


def test_a_class_of_which_nothing_was_seen_stays_as_it_is():
    memory = {"sum": jnp.zeros((2, 2)).at[0].set(jnp.array([1.0, 3.0])), "count": jnp.array([4.0, 0.0])}
    np.testing.assert_allclose(gold_loss_correction.matrix(memory), [[0.25, 0.75], [0, 1]])
