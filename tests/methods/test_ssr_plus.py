"""SSR+: the disagreement of features by hand, where its gradient goes, and SSR as its limit."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import ssr_plus

KEY = jax.random.key(2)


def by_hand(weights, features, groups):
    """f or h in numpy, group by group."""
    parts = []
    for part in np.split(np.asarray(features, np.float64), groups):
        hidden = part @ weights["hidden"]["kernel"]
        normal = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        hidden = np.maximum(normal * weights["hidden"]["scale"] + weights["hidden"]["bias"], 0)
        parts.append(hidden @ weights["out"]["kernel"] + weights["out"]["bias"])
    return np.concatenate(parts)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_disagreement_by_hand(groups):
    """Six examples of three features."""
    _, _, state, _ = make("ssr_plus")
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), state.method["heads"].weights)
    weights["f"]["hidden"]["kernel"] = rng.standard_normal((3, ssr_plus.UNITS), np.float32)
    standard, strong = rng.standard_normal((2, 6, 3), np.float32)
    towards, seen = (by_hand(weights["f"], features, groups) for features in (standard, strong))
    expected = -cosine(by_hand(weights["h"], seen, groups), towards).mean()
    found = ssr_plus.disagreement(weights, standard, strong, groups)
    assert float(found) == pytest.approx(expected, rel=1e-3)
    assert by_hand(weights["f"], standard, groups).shape == (6, ssr_plus.OUTPUTS)


def test_the_term_is_of_the_features_of_all_examples():
    context, method, state, _ = make("ssr_plus", groups=2, **{"method.feature_weight": 3.0})
    batch = make_batch()
    supervision = method.supervise(state, batch, KEY)
    value, aux = method.loss(state.params, state, batch, supervision, None)
    weights = jax.tree.map(np.asarray, state.method["heads"].weights)
    seen = []
    for images in (batch["every_image"], batch["every_views"][:, 0]):
        logits, features, _ = jax.jit(context.forward_with_features)(state.params, state.batch_stats, images)
        head = state.params["head"]
        np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)
        seen.append(by_hand(weights["f"], features, 2))
    expected = -3 * cosine(by_hand(weights["h"], seen[1], 2), seen[0]).mean()
    assert float(aux.terms["features"]) == pytest.approx(expected, rel=1e-3)
    assert float(value) == pytest.approx(sum(map(float, aux.terms.values())), rel=1e-6)


def test_the_gradient_goes_through_the_strong_view_alone():
    _, method, state, _ = make("ssr_plus")
    batch = jax.tree.map(jnp.asarray, make_batch())
    supervision = method.supervise(state, batch, KEY)

    def term(standard, strong):
        images = batch | {"every_image": standard, "every_views": strong}
        return method.loss(state.params, state, images, supervision, None)[1].terms["features"]

    standard, strong = jax.jit(jax.grad(term, (0, 1)))(batch["every_image"], batch["every_views"])
    assert not np.abs(standard).any() and np.abs(strong).max() > 1e-5


def test_with_weight_0_it_is_ssr():
    """Two steps: parameters, averages, moments and remembered labels are the same numbers."""
    states = {}
    for name, keys in (("ssr", {}), ("ssr_plus", {"method.feature_weight": 0.0})):
        _, _, state, step = make(name, **keys)
        run, labels = jax.jit(step), state.method["label"].at[6].set(2)
        state = state.replace(method=state.method | {"label": labels})
        for seed in range(2):
            state, observed = run(state, make_batch(seed=seed), KEY)
        states[name] = (
            state.params, state.batch_stats, state.ema_params, state.opt_state, state.method["label"],
            observed.averages["loss/total"].compute(),
        )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), states["ssr"], states["ssr_plus"])


def test_heads_move_as_the_network_does():
    """By the gradient of the same loss, with momentum, weight decay and the rate of the schedule, 0.1."""
    _, method, state, step = make("ssr_plus", **{"optimizer.momentum": 0.5, "optimizer.weight_decay": 0.01})
    step = jax.jit(step)

    @jax.jit
    @jax.grad
    def gradient(weights, state, batch, supervision):
        prepared = (supervision.prepared[0], weights)
        return method.loss(state.params, state, batch, supervision._replace(prepared=prepared), None)[0]

    momentum = jax.tree.map(lambda leaf: 0.0 * leaf, state.method["heads"].weights)
    for seed in range(2):
        batch, heads = make_batch(seed=seed), state.method["heads"]
        drawn = jax.random.split(jax.random.fold_in(KEY, state.step))[0]
        slope = gradient(heads.weights, state, batch, method.supervise(state, batch, drawn))
        slope = jax.tree.map(lambda g, w: g + 0.01 * w, slope, heads.weights)
        momentum = jax.tree.map(lambda m, g: 0.5 * m + g, momentum, slope)
        expected = jax.tree.map(lambda w, m: w - 0.1 * m, heads.weights, momentum)
        state, _ = step(state, batch, KEY)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.method["heads"].weights, expected
        )


def test_the_end_of_an_epoch_keeps_the_heads_and_chooses_of_main_alone():
    _, method, state, _ = make("ssr_plus", **{"method.neighbours": 2, "method.relabel_threshold": 0.8})
    labels = np.array([0, 0, 1, 1, 1])
    features = np.array([[1, 0], [1, 0.01], [0, 1], [0.01, 1], [1, 0.02]])
    p = np.full((1, 5, CLASSES), 0.25)
    look = types.SimpleNamespace(epoch=1, labels=labels, probabilities=lambda: p, features=lambda: features[None])
    changed, rows = method.on_epoch(state, look)
    assert rows.keys() == {"main"} and 4 not in rows["main"]
    assert changed.method["heads"] is state.method["heads"] and (changed.method["label"] == -1).all()
    look.epoch = 0
    assert method.on_epoch(state, look) == (state, None)
