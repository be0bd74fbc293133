"""DivideMix: plain before the division, the loss by hand after it, and who judges for whom."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import dividemix
from ieg_jax.methods.parts import losses

KEY = jax.random.key(1)


def divided(state, clean, epoch=2):
    whole = jnp.ones((1024, 2)).at[:50].set(clean)
    return state.replace(method={"clean": whole, "divided": jnp.int32(epoch)})


def test_before_the_division_both_learn_the_given_labels():
    context, method, state, _ = make("dividemix")
    batch = make_batch()
    supervision = method.supervise(state, batch, KEY)
    _, aux = method.loss(state.params, state, batch, supervision, None)
    logits, _ = context.forward(state.params, state.batch_stats, np.repeat(batch["image"], 2, 0))
    plain = losses.cross_entropy(logits[:, ::2], context.one_hot(batch["label"])).mean(-1).sum()
    assert float(aux.terms["labelled"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(aux.terms["unlabelled"]) == float(aux.terms["balance"]) == 0
    assert aux.logits.shape == (16, CLASSES)


def test_where_every_label_is_right_all_are_kept():
    _, method, state, _ = make("dividemix")
    batch = make_batch()
    target, labelled, _ = method.supervise(divided(state, np.ones((50, 2))), batch, KEY).prepared
    assert (labelled == 1).all()
    np.testing.assert_allclose(target, np.tile(np.eye(CLASSES)[batch["label"]], (2, 1, 1)), atol=1e-6)


def test_the_loss_by_hand():
    keys = {
        "method.temperature": 0.5,
        "method.unlabelled_strength": 8.0,
        "method.clean_threshold": 0.6,
        "batch_size": 16,
    }
    context, method, state, _ = make("dividemix", groups=2, **keys)
    batch, rng = make_batch(), np.random.default_rng(0)
    clean = rng.random((50, 2)).astype(np.float32)
    state = divided(state, clean).replace(step=jnp.int32(25))  # epoch 8 of 50 examples, 16 a step: six after the first
    supervision = method.supervise(state, batch, KEY)
    pairs = supervision.prepared[2]
    p = [np.asarray(jax.nn.softmax(context.forward(state.params, state.batch_stats, x)[0]))
         for x in (batch["image"], batch["views"][:, 0])]  # fmt: skip
    own, label = (p[0] + p[1]) / 2, np.eye(CLASSES)[batch["label"]]
    w = clean[batch["row"]].T
    has = w > 0.6
    target = np.where(has[..., None], w[..., None] * label + (1 - w[..., None]) * own, own.mean(0))
    target = target**2 / (target**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(supervision.prepared[0], target, rtol=1e-4, atol=1e-6)
    share = float(pairs.share)
    assert share >= 0.5
    pool = np.stack([batch["image"], batch["views"][:, 0]], 1).reshape(32, 8, 8, 1)
    partner = np.concatenate([np.asarray(pairs.partner[0]), 16 + np.asarray(pairs.partner[1])])
    logits, _ = context.forward(state.params, state.batch_stats, share * pool + (1 - share) * pool[partner])
    labelled, unlabelled, balance = 0.0, 0.0, 0.0
    for r in range(2):
        twice, mask = np.repeat(target[r], 2, 0), np.repeat(has[r], 2)
        mixed = share * twice + (1 - share) * twice[partner]
        q = np.asarray(jax.nn.softmax(logits[r]), np.float64)
        labelled += -(mixed * np.log(q)).sum(-1)[mask].mean()
        unlabelled += ((mixed - q) ** 2).mean(-1)[~mask].mean()
        balance += (np.log(1 / CLASSES / q.mean(0)) / CLASSES).sum()
    _, aux = method.loss(state.params, state, batch, supervision, None)
    ramp = (25 * 16 / 50 - 2) / 16
    assert float(aux.terms["labelled"]) == pytest.approx(labelled, rel=1e-4)
    assert float(aux.terms["unlabelled"]) == pytest.approx(8 * ramp * unlabelled, rel=1e-4)
    assert float(aux.terms["balance"]) == pytest.approx(balance, rel=1e-3)


def test_each_network_is_judged_by_the_other():
    _, method, state, _ = make("dividemix", **{"method.divide_epochs": 3.0})
    labels = np.arange(50) % CLASSES
    p = np.full((2, 50, CLASSES), 0.1)
    p[0, np.arange(25), labels[:25]], p[1, np.arange(25, 50), labels[25:]] = 0.9, 0.9
    look = types.SimpleNamespace(epoch=2, labels=labels, probabilities=lambda: p, memory=lambda: state.method)
    assert method.on_epoch(state, look) == (state, None)
    look.epoch = 3
    changed, rows = method.on_epoch(state, look)
    clean = changed.method["clean"]
    assert rows is None and changed.method["divided"] == 3
    assert (clean[:25, 1] > 0.99).all() and (clean[25:, 1] < 0.01).all(), "the second trains by the first one's losses"
    assert (clean[:25, 0] < 0.01).all() and (clean[25:, 0] > 0.99).all()
    look.memory, look.epoch = (lambda: changed.method), 7
    assert method.on_epoch(changed, look)[0].method["divided"] == 3, "the ramp goes on from the first division"


def test_the_mixture_of_known_losses():
    rng = np.random.default_rng(0)
    wrong = rng.random(5000) < 0.3
    cross_entropy = np.where(wrong, rng.normal(4, 0.5, 5000), rng.normal(1, 0.4, 5000))
    found = dividemix.small_loss(cross_entropy)
    assert ((found < 0.5) == wrong).mean() > 0.99
