"""The step as a whole: every method, several devices, the moving average, evaluation."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from small_step import BATCH, make, make_batch

from configs import default
from ieg_jax import methods
from ieg_jax.methods import base, ieg, l2r
from ieg_jax.train import metrics
from ieg_jax.train.step import moving_average


@pytest.mark.parametrize("groups", [1, 8])
def test_eight_devices_do_what_one_does(groups):
    """Three IEG steps in float64: losses, ω, λ and all variables."""
    with x64():
        results = []
        for devices in (1, 8):
            _, _, state, step = make("ieg", groups, jnp.float64)
            mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
            split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
            run = jax.jit(step, in_shardings=(whole, split, whole), out_shardings=whole)
            history = []
            for number in range(3):
                state, observed = run(state, make_batch(np.float64, number), jax.random.key(5))
                history.append(jax.device_get(observed))
            results.append((history, jax.device_get(state)))
    for one, eight in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-12)
    weights = results[0][0][0].examples.weights
    assert weights.sum() == pytest.approx(1, abs=1e-3), "normalised over the global batch"
    assert 0 < (weights > 0).sum() < BATCH


@pytest.mark.parametrize("name", methods.REGISTRY)
def test_each_method_lowers_its_loss(name):
    _, _, state, step = make(name, **{"method.consistency_weight": 1.0})
    run, batch, losses = jax.jit(step), make_batch(), []
    for _ in range(12):
        state, observed = run(state, batch, jax.random.key(0))
        losses.append(observed.averages["loss/total"].compute())
    assert int(state.step) == 12
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < losses[0]


def test_terms_add_up_to_the_loss():
    _, _, state, step = make("ieg")
    _, observed = jax.jit(step)(state, make_batch(), jax.random.key(0))
    observed = jax.device_get(observed)
    averages = {name: value.compute() for name, value in observed.averages.items()}
    terms = ["weighted", "relabelled", "mixup_trusted", "mixup_noisy", "consistency", "weight_decay"]
    assert sum(averages[f"loss/{term}"] for term in terms) == pytest.approx(averages["loss/total"], rel=1e-5)
    clean = observed.examples.clean == 1
    assert averages["weight/clean"] == pytest.approx(observed.examples.weights[clean].mean(), rel=1e-5)
    assert averages["weight/noisy"] == pytest.approx(observed.examples.weights[~clean].mean(), rel=1e-5)


@pytest.mark.parametrize("key, value", [
    ("method.normalize_logits", False), ("method.supervised_scale", 1.0), ("method.mixup_coefficient", "exact"),
    ("meta.pseudo_label_gradient", True), ("meta.weight_decay", False), ("meta.momentum", False),
    ("meta.layers", "^head/"), ("method.threshold", 0.0), ("method.temperature", 1.0),
    ("method.label_trust_init", 0.5), ("method.unlabeled_weight", 1.0), ("method.consistency_weight", 1.0),
    ("optimizer.weight_decay_on", "kernels"), ("optimizer.nesterov", True), ("meta.learning_rate", 1.0),
])  # fmt: skip
def test_every_key_of_the_method_changes_the_program(key, value):
    programs = []
    for overrides in ({}, {key: value}):
        _, _, state, step = make("ieg", **overrides)
        programs.append(jax.jit(step).lower(state, make_batch(), jax.random.key(0)).as_text())
    assert programs[0] != programs[1]


def test_threshold_zero_keeps_the_given_labels_in_mixup():
    batch = make_batch()

    def classes_in_targets(threshold):
        context, _, state, _ = make("ieg", **{"method.threshold": threshold})
        supervise = jax.jit(functools.partial(ieg.supervise, context))
        target = np.asarray(supervise(state, batch, jax.random.key(0)).prepared[1])
        np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-5)
        return np.count_nonzero(target, axis=-1)

    # Two mixed one-hot rows have at most two classes, pseudo labels have all four.
    assert classes_in_targets(0.0).max() <= 2
    assert classes_in_targets(1.0).max() == 4


def test_l2r_starts_from_zero_weights():
    """By hand: at ω = 0 and without weight decay Θ′ = Θ, so ω* ∝ max(⟨∇L_p, ∇ℓ_i⟩, 0)."""
    context, _, state, _ = make("l2r", **{"optimizer.weight_decay": 0.0})
    batch = jax.tree.map(jnp.asarray, make_batch())
    weights = l2r.supervise(context, state, batch, None).example_weights

    def example_loss(params, i):
        logits, _ = context.forward(params, state.batch_stats, batch["image"])
        return -jax.nn.log_softmax(logits)[i, batch["label"][i]]

    probe = jax.grad(lambda p: base.trusted_loss(context, p, state, batch))(state.params)
    gradient = jax.jit(jax.grad(example_loss))
    products = [
        sum(map(jnp.vdot, jax.tree.leaves(probe), jax.tree.leaves(gradient(state.params, i)))) for i in range(BATCH)
    ]
    positive = np.maximum(0.1 * np.asarray(products), 0)
    np.testing.assert_allclose(weights, positive / (positive.sum() + 1e-5), rtol=1e-4, atol=1e-6)


def test_labels_of_no_class_count_as_wrong_and_have_no_true_label():
    """Clean labels -1 (not known) stay out of both kinds, -2 (no class) is a wrong label; neither has an accuracy."""
    batch = {"label": jnp.array([0, 1, 2, 0, 1]), "clean_label": jnp.array([-1, -2, 1, 0, 1]), "id": jnp.arange(5)}
    weights = jnp.array([0.1, 0.2, 0.3, 0.15, 0.25])
    supervision = base.Supervision(example_weights=weights)
    logits = jnp.eye(3)[jnp.array([0, 1, 1, 2, 1])]  # the true class of the third and the fifth, not of the fourth
    observed = metrics.observe(batch, supervision, 1.0, types.SimpleNamespace(terms={}, logits=logits), {})
    assert observed.examples.clean.tolist() == [-1, 0, 0, 1, 1]
    assert observed.examples.pseudo_label is None and observed.examples.trust is None
    g = jnp.array([[0.5, 0.2, 0.3]] * 5)
    examples = metrics.observe(
        batch, supervision._replace(pseudo_label=g), 1.0, types.SimpleNamespace(terms={}, logits=logits), {}
    ).examples
    assert examples.pseudo_label.tolist() == [0] * 5 and examples.ids.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(examples.label_probability, [0.5, 0.2, 0.3, 0.5, 0.2])
    averages = {name: float(value.compute()) for name, value in observed.averages.items()}
    assert averages["weight/noisy"] == pytest.approx((0.2 + 0.3) / 2)
    assert averages["weight/clean"] == pytest.approx((0.15 + 0.25) / 2)
    assert averages["train/accuracy_true_label"] == pytest.approx(2 / 3)
    assert averages["train/accuracy"] == pytest.approx(3 / 5)


def test_moving_average_by_hand():
    ema = default.get_config().ema
    average = moving_average({"w": jnp.array(1.0)}, {"w": jnp.array(2.0)}, jnp.asarray(1), ema)
    assert float(average["w"]) == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    ema.warmup = False
    average = moving_average({"w": jnp.array(1.0)}, {"w": jnp.array(2.0)}, jnp.asarray(1), ema)
    assert float(average["w"]) == pytest.approx(1.001)
    assert moving_average(None, {"w": jnp.array(2.0)}, jnp.asarray(1), ema) is None


def test_flops_are_the_least_possible():
    """22 and 10 forward passes against 3: what is more would be a pass done twice."""

    def flops(name):
        _, _, state, step = make(name, **{"model.width": 4.0})
        batch = make_batch()
        batch["views"] = batch["views"][:, :1]
        return jax.jit(step).lower(state, batch, jax.random.key(0)).compile().cost_analysis()["flops"]

    supervised = flops("supervised")
    assert flops("ieg") / supervised < 7.5
    assert flops("l2r") / supervised < 3.5
