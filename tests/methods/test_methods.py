"""What the methods have in common and where they differ: EG against IEG, and the components of the ablation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import make, make_batch

from ieg_jax.methods import ieg
from ieg_jax.methods.base import Supervision
from ieg_jax.methods.parts import losses

RNG = jax.random.key(3)


def supervised_loss(name, batch, rng=RNG, **keys):
    context, method, state, _ = make(name, **keys)
    supervision = method.supervise(state, batch, rng)
    value, aux = method.loss(state.params, state, batch, supervision, rng)
    return context, state, supervision, value, aux


def with_other_labels(batch):
    return batch | {"label": (batch["label"] + 1) % 4}


def test_eg_is_ieg_without_isolation():
    batch = make_batch()
    *_, ieg_supervision, ieg_value, ieg = supervised_loss("ieg", batch)
    *_, eg_supervision, eg_value, eg = supervised_loss("eg", batch)
    for one, other in zip(*((s.pseudo_label, *s.prepared) for s in (eg_supervision, ieg_supervision)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert eg_supervision.example_weights is None and eg_supervision.label_trust is None
    assert ieg.terms.keys() - eg.terms.keys() == {"weighted", "relabelled"}
    assert eg.terms.keys() <= ieg.terms.keys()
    rest = ieg_value - ieg.terms["weighted"] - ieg.terms["relabelled"]
    assert float(eg_value) == pytest.approx(float(rest), rel=1e-5)


@pytest.mark.parametrize("name", ["eg", "mixmatch"])
def test_methods_that_read_no_noisy_label(name):
    _, _, state, step = make(name)
    batch, run = make_batch(), jax.jit(step)
    one, two = (run(state, labelled, RNG)[0] for labelled in (batch, with_other_labels(batch)))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    three, _ = run(state, batch | {"probe_label": batch["probe_label"][::-1]}, RNG)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one.params, three.params)), strict=True))


@pytest.mark.parametrize(
    "keys, terms",
    [
        ({}, {"weighted", "relabelled", "mixup_trusted", "mixup_noisy", "consistency", "weight_decay"}),
        ({"method.relabel": False}, {"weighted", "mixup_trusted", "mixup_noisy", "consistency", "weight_decay"}),
        ({"method.mixup": False}, {"weighted", "relabelled", "consistency", "weight_decay"}),
        (
            {"method.consistency_weight": 0.0},
            {"weighted", "relabelled", "mixup_trusted", "mixup_noisy", "weight_decay"},
        ),
    ],
)
def test_a_component_taken_out_leaves_the_others(keys, terms):
    *_, whole = supervised_loss("ieg", make_batch())
    *_, value, aux = supervised_loss("ieg", make_batch(), **keys)
    assert aux.terms.keys() == terms
    assert float(value) == pytest.approx(sum(map(float, aux.terms.values())), rel=1e-6)
    for name in terms - ({"weighted", "relabelled"} if "method.relabel" in keys else set()):
        assert float(aux.terms[name]) == pytest.approx(float(whole.terms[name]), rel=1e-4), name


def test_without_relabelling_labels_are_only_weighted():
    """λ⁰ = 1: ω* as of a run that starts there, and Σ ω* CE(y) on the labels as given."""
    batch = make_batch()
    context, state, supervision, _, aux = supervised_loss("ieg", batch, **{"method.relabel": False})
    assert supervision.label_trust is None
    *_, from_one, _, _ = supervised_loss("ieg", batch, **{"method.label_trust_init": 1.0})
    np.testing.assert_allclose(supervision.example_weights, from_one.example_weights, rtol=1e-3, atol=1e-6)
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    by_hand = -np.asarray(jax.nn.log_softmax(logits))[np.arange(16), batch["label"]]
    np.testing.assert_allclose(losses.cross_entropy(logits, context.one_hot(batch["label"])), by_hand, rtol=1e-5)
    by_hand = 0.5 * float((supervision.example_weights * by_hand).sum())
    assert float(aux.terms["weighted"]) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("name", ["supervised", "l2r", "ieg", "eg", "trusted_only", "mixmatch"])
def test_which_images_move_the_averages_of_batch_norm(name):
    """The standard view does; where only the trusted set is trained on its strong view, in MixMatch the mixed pool."""
    context, method, state, _ = make(name)
    batch = jax.tree.map(jnp.asarray, make_batch())
    uniform, label = jnp.full(16, 1 / 16), context.one_hot(batch["label"])
    prepared = ieg.mixed_pool(context, batch, label, RNG) if name in ("ieg", "eg", "mixmatch") else None
    supervision = Supervision(label, uniform, uniform, prepared)
    _, aux = method.loss(state.params, state, batch, supervision, RNG)
    images = {"standard": batch["image"], "strong": batch["views"][:, 0], "other": batch["views"][:, 1]}
    if prepared is not None:
        images["pool"] = prepared[0]
    moves = {"trusted_only": "strong", "mixmatch": "pool"}.get(name, "standard")
    for kind, seen in images.items():
        _, expected = context.forward(state.params, state.batch_stats, seen)
        gaps = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (aux.batch_stats, expected)), strict=True)]
        assert max(gaps) < 1e-5 if kind == moves else min(gaps) > 1e-4, kind


def test_without_mixup_nothing_is_random():
    batch, keys = make_batch(), {"method.mixup": False}
    *_, one, _ = supervised_loss("ieg", batch, jax.random.key(1), **keys)
    *_, two, _ = supervised_loss("ieg", batch, jax.random.key(2), **keys)
    assert one == two
    *_, three, _ = supervised_loss("ieg", batch, jax.random.key(1))
    *_, four, _ = supervised_loss("ieg", batch, jax.random.key(2))
    assert three != four
