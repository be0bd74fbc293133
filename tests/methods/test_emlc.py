"""EMLC: V and its labels by hand, derivatives by differences, the limit of given labels, and who learns what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from small_step import CLASSES, make, make_batch

from ieg_jax import config as config_lib
from ieg_jax.errors import UserError
from ieg_jax.methods import emlc, mlc
from ieg_jax.methods.parts import losses
from ieg_jax.train import check

SMALL = {"method.label_units": 2, "method.enhancer_units": 3}


def test_labels_by_hand():
    psi = {
        "embedding": jnp.array([[1.0], [-1.0]]),
        "hidden": {"kernel": jnp.array([[1.0, -1.0], [2.0, 0.5]]), "bias": jnp.array([0.0, 0.1])},
        "out": {"kernel": jnp.array([[1.0], [-2.0]]), "bias": jnp.array([0.2])},
    }
    logits, features = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]])), jnp.array([[0.5], [-1.0]])
    found = emlc.mixed_labels(psi, logits, features, jnp.array([0, 1]))
    inside = np.maximum([[0.5 + 2.0, -0.5 + 0.5 + 0.1], [-1.0 - 2.0, 1.0 - 0.5 + 0.1]], 0)
    kept = 1 / (1 + np.exp(-(inside @ [1.0, -2.0] + 0.2)))
    expected = [
        [kept[0] + (1 - kept[0]) * 0.25, (1 - kept[0]) * 0.75],
        [(1 - kept[1]) * 0.9, kept[1] + (1 - kept[1]) * 0.1],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_wrong_labels_are_the_likeliest_others():
    """Each trusted image is shown with its own label and with another: 2, as 1 is the true one of the first; and 0."""
    psi = {"embedding": jnp.array([[0.3], [0.7], [-0.4]]), "hidden": {"kernel": jnp.array([[0.0], [1.0]]),
           "bias": jnp.ones(1)}, "out": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}  # fmt: skip
    logits = jnp.array([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    found = emlc.retain_loss(psi, logits, jnp.zeros((2, 1)), jnp.array([1, 2]))
    right, wrong = (1 / (1 + np.exp(-1 - np.array(units))) for units in ([0.7, -0.4], [-0.4, 0.3]))  # 1, 2; 2, 0
    expected = -np.mean([np.log(right), np.log(1 - wrong)])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def mean_loss(context, params, batch_stats, image, label):
    logits, updated = context.network.apply(
        {"params": params, "batch_stats": batch_stats}, image, train=True, mutable=["batch_stats"]
    )
    del updated
    return losses.cross_entropy(logits, label).mean(), logits


def test_derivatives_are_those_of_differences():
    """Of the trusted loss after the student's step, by a weight of the teacher's head and by one of V."""
    with x64():
        context, method, state, _ = make("emlc", dtype=jnp.float64, **SMALL)
        state = state.replace(method=jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.method))
        batch = make_batch(np.float64)
        learned, judging = mlc.halves(context, batch, jax.random.key(5))
        student, stats = emlc.part(state.params, 0), emlc.part(state.batch_stats, 0)
        theirs, their_stats = emlc.part(state.params, 1), emlc.part(state.batch_stats, 1)

        def target_of(kernel, psi):
            params = theirs | {"head": theirs["head"] | {"kernel": kernel}}
            one = dataclasses.replace(context, networks=1)
            logits, features, _ = one.forward_with_features(params, their_stats, batch["image"])
            return emlc.mixed_labels(psi, logits, features, batch["label"])

        def after(kernel, psi):
            target = target_of(kernel, psi)

            def noisy(params):
                corrected, _ = mean_loss(context, params, stats, batch["image"], target)
                label = np.eye(CLASSES)[learned["probe_label"]]
                trusted, _ = mean_loss(context, params, stats, learned["probe_image"], label)
                return corrected + trusted + context.weight_decay(params)

            moved = jax.tree.map(lambda p, g: p - 0.1 * g, student, jax.grad(noisy)(student))
            label = np.eye(CLASSES)[judging["probe_label"]]
            judged, _ = mean_loss(context, moved, stats, judging["probe_image"], label)
            return judged + context.meta_weight_decay(moved)

        kernel, psi = theirs["head"]["kernel"], state.method
        supervision = method.supervise(state, batch, jax.random.key(5))
        assert float(supervision.observed["loss/trusted_after_lookahead"]) == pytest.approx(
            float(jax.jit(after)(kernel, psi)), rel=1e-9
        )
        by_target, *_ = supervision.prepared
        meta = jax.jit(jax.grad(lambda kernel, psi: jnp.sum(by_target * target_of(kernel, psi)), (0, 1)))(kernel, psi)
        value = jax.jit(after)
        ends = [float(value(kernel.at[2, 1].add(sign * 1e-4), psi)) for sign in (1, -1)]
        assert float(meta[0][2, 1]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-10)
        moved = [psi | {"embedding": psi["embedding"].at[1, 0].add(sign * 1e-4)} for sign in (1, -1)]
        ends = [float(value(kernel, one)) for one in moved]
        assert float(meta[1]["embedding"][1, 0]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-10)


def test_what_moves_whom():
    """The student follows its own labels; the teacher what it does for the student, and trusted images."""
    _, method, state, _ = make("emlc", **SMALL)
    batch = make_batch()
    supervision = method.supervise(state, batch, jax.random.key(0))

    def terms(params):
        return method.loss(params, state, batch, supervision, None)[1].terms

    found = jax.jit(jax.jacrev(terms))(state.params)
    for name, network in (("corrected", 0), ("trusted", 0), ("meta", 1), ("teacher", 1), ("retain", 1)):
        size = [max(float(np.abs(leaf[r]).max()) for leaf in jax.tree.leaves(found[name])) for r in (0, 1)]
        assert size[network] > 1e-7 and size[1 - network] == 0, name


def test_labels_that_are_kept_are_the_given_ones():
    context, method, state, _ = make("emlc", **SMALL)
    sure = jax.tree.map(jnp.zeros_like, state.method) | {
        "out": {"kernel": jnp.zeros((3, 1)), "bias": jnp.full(1, 50.0)}
    }
    state, batch = state.replace(method=sure), make_batch()
    supervision = method.supervise(state, batch, jax.random.key(0))
    np.testing.assert_allclose(supervision.pseudo_label, np.eye(CLASSES)[batch["label"]], atol=1e-6)
    _, aux = method.loss(state.params, state, batch, supervision, None)
    label = context.one_hot(batch["label"])
    plain, logits = mean_loss(
        context, emlc.part(state.params, 0), emlc.part(state.batch_stats, 0), batch["image"], label
    )
    assert float(aux.terms["corrected"]) == pytest.approx(float(plain), rel=1e-5)
    np.testing.assert_allclose(aux.logits, logits, rtol=1e-4, atol=1e-5)


def test_the_student_predicts():
    context, method, state, _ = make("emlc", **SMALL)
    seen = {"params": state.params, "batch_stats": state.batch_stats}
    image = make_batch()["image"]
    np.testing.assert_array_equal(method.predict(seen, state.method, image), context.probabilities(seen, image)[0])


def test_halves_that_cannot_be_made(tiny_config):
    tiny_config.method.name, tiny_config.trusted.batch_size = "emlc", 9
    with pytest.raises(UserError, match="method.name=emlc halves the 9 trusted images"):
        check.validate(config_lib.resolve(tiny_config))
