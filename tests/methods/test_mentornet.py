"""The predefined MentorNet: weights by hand, the moving percentile, and epochs in which all count alike."""

import jax
import numpy as np
import pytest
from small_step import make, make_batch

from ieg_jax.methods.parts import losses

KEYS = {"method.burn_in_epochs": 0.0, "method.pace_width": 0.5, "method.pace_decay": 0.8, "method.loss_percentile": 0.6}


def test_weights_by_hand():
    context, method, state, _ = make("mentornet", **KEYS)
    pace = 0.0
    for seed in range(2):
        batch = make_batch(seed=seed)
        supervision = method.supervise(state, batch, None)
        _, aux = method.loss(state.params, state, batch, supervision, None)
        ce = np.asarray(losses.cross_entropy(aux.logits, context.one_hot(batch["label"])), np.float64)
        now = np.quantile(ce, 0.6)
        pace = 0.8 * pace + 0.2 * now if pace else now
        assert float(supervision.memory["pace"]) == pytest.approx(pace, rel=1e-5)
        weights = np.clip(1 - (ce - pace) / (0.5 * pace), 0, 1)
        np.testing.assert_allclose(supervision.example_weights, weights / weights.sum(), rtol=1e-4, atol=1e-6)
        assert float(aux.terms["weighted"]) == pytest.approx((weights * ce).sum() / weights.sum(), rel=1e-5)
        state = state.replace(method=supervision.memory)


def test_at_first_it_is_the_cross_entropy():
    _, method, state, _ = make("mentornet", **KEYS | {"method.burn_in_epochs": 2.0, "batch_size": 16})
    batch = make_batch()
    for step, same in ((0, True), (6, True), (7, False)):  # 50 examples, 16 a step: two epochs are 6.25 steps
        supervision = method.supervise(state.replace(step=step), batch, None)
        assert np.allclose(supervision.example_weights, 1 / 16) == same


def test_of_a_batch_of_large_losses_the_smallest_counts():
    _, method, state, _ = make("mentornet", **KEYS)
    state = state.replace(method={"pace": jax.numpy.float32(1e-6)})
    weights = method.supervise(state, make_batch(), None).example_weights
    assert float(weights.max()) == 1 and float(weights.sum()) == 1
