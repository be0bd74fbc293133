"""Generalised cross-entropy, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, loss_of_logits, make, make_batch

from configs import default
from ieg_jax.errors import UserError
from ieg_jax.methods import gce
from ieg_jax.train import check


def term(logits, labels, q):
    return loss_of_logits(gce, logits, labels, **{"method.q": q})


def test_by_hand():
    """p = (1/4, 3/4): the label with 1/4 costs (1 − (1/4)^0.5) / 0.5 = 1, that with 3/4 2 − √3."""
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
    found = term(logits, jnp.array([0, 1]), 0.5)
    assert float(found) == pytest.approx((1 + 2 - np.sqrt(3)) / 2, rel=1e-6)


def test_between_cross_entropy_and_absolute_error():
    logits, labels = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]), jnp.array([1, 1])
    p = np.asarray(jax.nn.softmax(logits))[np.arange(2), labels]
    assert float(term(logits, labels, 1e-3)) == pytest.approx(-np.log(p).mean(), rel=5e-3)
    assert float(term(logits, labels, 1.0)) == pytest.approx((1 - p).mean(), rel=1e-6)


def test_its_gradient_is_that_of_cross_entropy_times_p_to_the_q():
    """∇ (1 − p^q)/q = p^q ∇(−log p): a label that the network takes to be wrong hardly pulls."""
    logits, labels = jnp.array([[9.0, -9.0]]), jnp.array([1])
    gradient = jax.grad(lambda x: term(x, labels, 0.7))(logits)
    p = np.asarray(jax.nn.softmax(logits))[0, 1]
    plain = jax.grad(lambda x: -jax.nn.log_softmax(x)[0, 1])(logits)
    np.testing.assert_allclose(gradient, p**0.7 * plain, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: term(x, labels, 0.7))(jnp.array([[500.0, -500.0]]))).all()


def test_a_step_takes_q_from_the_configuration():
    losses = {}
    for q in (0.3, 0.9):
        _, method, state, _ = make("gce", **{"method.q": q})
        _, aux = method.loss(state.params, state, make_batch(), method.supervise(state, make_batch(), None), None)
        losses[q] = float(aux.terms["generalized_cross_entropy"])
        p = np.asarray(jax.nn.softmax(aux.logits))[np.arange(16), make_batch()["label"]]
        assert aux.logits.shape == (16, CLASSES) and losses[q] == pytest.approx(((1 - p**q) / q).mean(), rel=1e-5)
    assert losses[0.3] != losses[0.9]


@pytest.mark.parametrize("q", [0.0, 1.5, -1.0])
def test_impossible_q(q):
    config = default.get_config()
    config.method.name, config.method.q = "gce", q
    with pytest.raises(UserError, match=r"method.q: got .*, expected in \(0, 1\]"):
        check.validate(config)
