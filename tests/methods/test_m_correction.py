"""M-correction: the loss by hand, the limit without suspicion, and w from a mixture of losses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

from ieg_jax.methods.parts import losses, mixup
from ieg_jax.methods.parts.mixtures import large_losses

KEY = jax.random.key(3)


def test_the_loss_by_hand():
    context, method, state, _ = make("m_correction", groups=2, **{"method.bootstrap_balance": 0.7})
    batch = make_batch()
    wrong = np.random.default_rng(1).random(50).astype(np.float32)
    state = state.replace(method={"wrong": jnp.zeros(1024).at[:50].set(wrong), "begun": jnp.ones(())})
    supervision = method.supervise(state, batch, KEY)
    target, pairs = supervision.prepared
    predicted = np.argmax(context.forward(state.params, state.batch_stats, batch["image"])[0], -1)
    w = wrong[batch["row"]][:, None]
    label = (1 - w) * np.eye(CLASSES)[batch["label"]] + w * np.eye(CLASSES)[predicted]
    np.testing.assert_allclose(target, label, rtol=1e-6)
    partner = np.concatenate([np.asarray(pairs.partner[0]), 8 + np.asarray(pairs.partner[1])])
    share = float(pairs.share)
    mixed = share * batch["image"] + (1 - share) * batch["image"][partner]
    logits, _ = context.forward(state.params, state.batch_stats, mixed)
    ce = share * losses.cross_entropy(logits, label) + (1 - share) * losses.cross_entropy(logits, label[partner])
    _, aux = method.loss(state.params, state, batch, supervision, None)
    assert float(aux.terms["mixed"]) == pytest.approx(float(ce.mean()), rel=1e-5)
    mean = np.asarray(jax.nn.softmax(logits)).mean(0)
    balance = 0.7 * (np.log(1 / CLASSES / mean) / CLASSES).sum()
    assert float(aux.terms["balance"]) == pytest.approx(balance, rel=1e-4)


def test_until_the_first_mixture_it_is_mixup():
    _, method, state, _ = make("m_correction")
    batch = make_batch()
    supervision = method.supervise(state, batch, KEY)
    np.testing.assert_array_equal(supervision.prepared[0], np.eye(CLASSES)[batch["label"]])
    _, aux = method.loss(state.params, state, batch, supervision, None)
    assert float(aux.terms["balance"]) == 0 < float(aux.terms["mixed"])


def test_suspicion_comes_from_the_mixture():
    _, method, state, _ = make("m_correction", **{"method.bootstrap_epochs": 3.0})
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, CLASSES, 50), rng.dirichlet(np.ones(CLASSES), (1, 50))
    look = types.SimpleNamespace(epoch=2, labels=labels, probabilities=lambda: p)
    assert method.on_epoch(state, look) == (state, None)
    look.epoch = 3
    changed, rows = method.on_epoch(state, look)
    ce = -np.log(p[0][np.arange(50), labels])
    np.testing.assert_allclose(changed.method["wrong"], large_losses(ce), rtol=1e-5)
    assert changed.method["begun"] == 1
    assert rows is None and np.corrcoef(changed.method["wrong"], ce)[0, 1] > 0.5


def test_pairs_stay_in_their_groups():
    pairs = mixup.draw_pairs(KEY, 4, 32, 0.5)
    assert pairs.partner.shape == (4, 8) and 0 <= float(pairs.share) <= 1
    np.testing.assert_array_equal(np.sort(pairs.partner, -1), np.tile(np.arange(8), (4, 1)))
    halves = mixup.Pairs(jnp.array([[1, 0]]), jnp.array(0.75))
    np.testing.assert_allclose(mixup.mix_pairs(halves, jnp.array([[4.0], [8.0]])), [[5.0], [7.0]])
