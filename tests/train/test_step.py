"""The step as a whole: every method, several devices, the moving average, evaluation."""

import functools
import types

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest
from conftest import x64
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from small_step import BATCH, each_method, make, make_batch

from configs import default
from ieg_jax.methods import base, ieg, l2r
from ieg_jax.methods.parts import mixup
from ieg_jax.train import metrics
from ieg_jax.train.step import eval_step, moving_average, train_step

RNG = jax.random.key(3)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 8])
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


@pytest.mark.parametrize("step, nesterov", [(0, False), (3, False), (3, True)])
def test_a_step_by_hand(step, nesterov):
    """Plain training on a linear network: gradient, momentum, rate, average of the weights, and what is reported."""
    keys = {"optimizer.weight_decay": 0.05, "optimizer.nesterov": nesterov, "ema.decay": 0.3}
    schedule = lambda number: 0.2 / (1 + number)  # noqa: E731
    batch = linear.make_batch()
    with x64():
        context, method, state, weights, momentum = linear.make("supervised", step, **keys)
        average = np.full(weights.shape, 2.0)
        state = state.replace(ema_params=linear.as_params(average))
        new, observed = train_step(state, batch, RNG, context=context, method=method, schedule=schedule)

    label, view = np.eye(linear.CLASSES)[batch["label"]], linear.views(batch)[0]
    slope = linear.gradient(lambda w: linear.cross_entropy(label, view @ w).mean() + 0.025 * (w**2).sum(), weights)
    direction = trace = 0.9 * momentum + slope
    if nesterov:
        direction = 0.9 * trace + slope
    moved = weights - schedule(step) * direction
    decay = min(0.3, (2 + step) / (11 + step))  # of update number step + 1
    assert int(new.step) == step + 1
    np.testing.assert_allclose(linear.as_array(new.params), moved, rtol=1e-9)
    np.testing.assert_allclose(linear.as_array(new.opt_state.trace), trace, rtol=1e-9)
    np.testing.assert_allclose(linear.as_array(new.ema_params), decay * average + (1 - decay) * moved, rtol=1e-6)
    expected = {
        "optimizer/learning_rate": schedule(step),
        "optimizer/gradient_norm": np.sqrt((slope**2).sum()),
        "optimizer/update_norm": schedule(step) * np.sqrt((direction**2).sum()),
    }
    for name, number in expected.items():
        assert observed.averages[name].compute() == pytest.approx(number, rel=1e-6), name


def test_each_step_draws_anew(monkeypatch):
    """By the number of the step and the key of the run alone, so that a resumed run draws what it would have drawn."""
    drawn = []

    def draw(rng, *args, **arguments):
        drawn.append(jax.random.key_data(rng).tolist())
        return linear.DRAW

    monkeypatch.setattr(mixup, "draw", draw)
    with x64():
        for step, seed in ((0, 3), (1, 3), (1, 3), (1, 4)):
            context, method, state, *_ = linear.make("ieg", step)
            arguments = {"context": context, "method": method, "schedule": lambda number: 0.1}
            train_step(state, linear.make_batch(), jax.random.key(seed), **arguments)
    assert drawn[1] == drawn[2] and len({str(key) for key in drawn}) == 3


@pytest.mark.parametrize("name", each_method())
def test_no_key_is_used_twice(name):
    """JAX follows each key through the step, and raises an error where one is used again."""
    _, _, state, step = make(name)
    with jax.debug_key_reuse(True):
        jax.jit(step).lower(state, make_batch(), RNG)


def test_padding_counts_in_neither_accuracy():
    """Of four rows the last two are padding: row 0 is right, row 1 among the first five, both paddings are right."""
    probabilities = jnp.array([[7, 6, 5, 4, 3, 2, 1], [7, 6, 5, 4, 3, 2, 1], *[[7, 6, 5, 4, 3, 2, 1]] * 2]) / 28
    batch = {"image": None, "label": jnp.array([0, 4, 0, 0]), "mask": jnp.array([1.0, 1.0, 0.0, 0.0])}
    method = types.SimpleNamespace(predict=lambda variables, memory, images: probabilities)
    found = eval_step(None, None, None, batch, method=method)
    by_class = found.pop("balanced_accuracy")
    assert by_class.right.tolist() == [1, 0, 0, 0, 0, 0, 0] and by_class.weight.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert by_class.compute() == 0.5
    shown = {name: (float(value.total), float(value.weight)) for name, value in found.items()}
    assert shown == {"accuracy": (1, 2), "top5_accuracy": (2, 2)}
    found = eval_step(None, None, None, batch | {"label": jnp.array([6, 5, 0, 0])}, method=method)
    assert found.pop("balanced_accuracy").compute() == 0
    shown = {name: (float(value.total), float(value.weight)) for name, value in found.items()}
    assert shown == {"accuracy": (0, 2), "top5_accuracy": (0, 2)}


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
    assert averages["weight/all_zero"] == 0
    nothing = base.Supervision(example_weights=jnp.zeros(5))
    empty = metrics.observe(batch, nothing, 1.0, types.SimpleNamespace(terms={}, logits=logits), {}).averages
    both = empty["weight/all_zero"] + observed.averages["weight/all_zero"]
    assert float(both.compute()) == pytest.approx(1 / 2), "one of two batches"


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
