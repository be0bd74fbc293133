"""MLC: V by hand, the limit of a V that gives back the label, a step of ψ by differences, and the halves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import x64
from small_step import BATCH, CLASSES, make, make_batch

from ieg_jax import config as config_lib
from ieg_jax.errors import UserError
from ieg_jax.methods import mlc
from ieg_jax.methods.parts import losses
from ieg_jax.train import check

SMALL = {"method.label_units": 2, "method.hidden_units": 3}
ALONE = SMALL | {"method.learn_trusted": False}


def giving_back(psi, num_features):
    """ψ with which V says the label that it sees, with 50 units more than any other."""
    chooses = jnp.eye(CLASSES) * 40  # tanh is 1 there
    return {
        "embedding": chooses,
        "first": {"kernel": jnp.zeros((num_features + CLASSES, CLASSES)).at[num_features:].set(jnp.eye(CLASSES)),
                  "bias": jnp.zeros(CLASSES)},
        "second": {"kernel": chooses, "bias": jnp.zeros(CLASSES)},
        "out": {"kernel": 50 * jnp.eye(CLASSES), "bias": jnp.zeros(CLASSES)},
    }  # fmt: skip


def test_the_network_by_hand():
    psi = {
        "embedding": jnp.array([[1.0, 0.0], [0.0, -2.0]]),
        "first": {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), "bias": jnp.array([0.0, 0.1])},
        "second": {"kernel": jnp.eye(2), "bias": jnp.array([0.2, 0.0])},
        "out": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "bias": jnp.array([0.0, 1.0])},
    }
    found = mlc.correct(psi, jnp.array([[0.3], [-1.0]]), jnp.array([1, 0]))
    first = np.tanh([[0.3 + 0.5 * -2.0, 0.1 + 0.0], [-1.0 + 0.5 * 0.0, 0.1 + 1.0]])
    second = np.tanh(first + np.array([0.2, 0.0]))
    out = np.exp(second * [3.0, 1.0] + [0.0, 1.0])
    np.testing.assert_allclose(found, out / out.sum(1, keepdims=True), rtol=1e-6)


def test_a_network_that_gives_back_the_label_is_the_cross_entropy():
    keys = {**ALONE, "method.label_units": CLASSES, "method.hidden_units": CLASSES}
    _, method, state, step = make("mlc", **keys)
    _, _, plain, plain_step = make("supervised")
    psi = giving_back(state.method["psi"], 8)
    assert jax.tree.map(jnp.shape, psi) == jax.tree.map(jnp.shape, state.method["psi"])
    state, batch = state.replace(method=state.method | {"psi": psi}), make_batch()
    supervision = method.supervise(state, batch, None)
    np.testing.assert_allclose(supervision.pseudo_label, np.eye(CLASSES)[batch["label"]], atol=1e-6)
    np.testing.assert_allclose(supervision.label_trust, 1, atol=1e-6)
    after, _ = jax.jit(step)(state, batch, jax.random.key(0))
    expected, _ = jax.jit(plain_step)(plain.replace(params=state.params), batch, jax.random.key(0))
    for one, other in zip(*map(jax.tree.leaves, (after.params, expected.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learn_trusted", [False, True])
def test_a_step_of_the_network_is_that_of_differences(learn_trusted):
    with x64():
        context, method, state, _ = make(
            "mlc", dtype=jnp.float64, **{**SMALL, "method.learn_trusted": learn_trusted, "method.label_rate": 0.01}
        )
        psi = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.method["psi"])
        state = state.replace(method={"psi": psi, "adam": optax.scale_by_amsgrad().init(psi)})
        batch = make_batch(np.float64)
        count = BATCH // 2 if learn_trusted else 0
        learned, judging = mlc.halves(context, batch, jax.random.key(5)) if count else (None, batch)

        def mean_loss(params, image, label):
            logits, _ = context.forward(params, state.batch_stats, image)
            return losses.cross_entropy(logits, label).mean()

        features = context.forward_with_features(state.params, state.batch_stats, batch["image"])[1]

        def after(psi):
            target = mlc.correct(psi, features, batch["label"])

            def noisy(params):
                value = BATCH * mean_loss(params, batch["image"], target)
                if count:
                    label = np.eye(CLASSES)[learned["probe_label"]]
                    value += count * mean_loss(params, learned["probe_image"], label)
                return value / (BATCH + count) + context.weight_decay(params)

            moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, jax.grad(noisy)(state.params))
            judged = mean_loss(moved, judging["probe_image"], np.eye(CLASSES)[judging["probe_label"]])
            return judged + context.meta_weight_decay(moved)

        value, small = jax.jit(after), 1e-5
        supervision = method.supervise(state, batch, jax.random.key(5))
        observed = supervision.observed["loss/trusted_after_lookahead"]
        assert float(observed) == pytest.approx(float(value(psi)), rel=1e-9)
        for name, place in (("embedding", (1, 0)), ("first", (4, 2)), ("out", (2, 3))):
            ends = []
            for sign in (1, -1):
                moved = jax.tree.map(jnp.array, psi)
                leaf = moved[name] if name == "embedding" else moved[name]["kernel"]
                leaf = leaf.at[place].add(sign * small)
                moved[name] = leaf if name == "embedding" else moved[name] | {"kernel": leaf}
                ends.append(float(value(moved)))
            slope = (ends[0] - ends[1]) / (2 * small)
            mu = supervision.memory["adam"].mu[name]
            found = (mu if name == "embedding" else mu["kernel"])[place]
            assert abs(slope) > 1e-9
            assert float(found) == pytest.approx(0.1 * slope, rel=1e-3), "0.1 of ∇: the first moment"
        before, now = psi["out"]["kernel"], supervision.memory["psi"]["out"]["kernel"]
        np.testing.assert_allclose(abs(now - before), 0.01, rtol=1e-2, err_msg="the first step of Adam is its rate")


def test_the_step_takes_the_labels_of_before_the_step_of_the_network():
    _, method, state, _ = make("mlc", **SMALL, **{"method.label_rate": 10.0})
    batch = make_batch()
    supervision = method.supervise(state, batch, jax.random.key(0))
    again = method.supervise(state.replace(method=supervision.memory), batch, jax.random.key(0))
    assert np.abs(again.pseudo_label - supervision.pseudo_label).max() > 0.1


def test_the_halves_of_each_group():
    context, *_ = make("mlc", groups=2, **SMALL)
    batch = make_batch()
    drawn = set()
    for seed in range(20):
        found = mlc.halves(context, batch, jax.random.key(seed))
        places = [[_place(image, batch) for image in half["probe_image"]] for half in found]
        for half, chosen in zip(found, places, strict=True):
            np.testing.assert_array_equal(half["probe_label"], batch["probe_label"][chosen])
            assert [place < 8 for place in chosen] == [True] * 4 + [False] * 4, "four of each group"
        assert sorted(places[0] + places[1]) == list(range(BATCH))
        drawn.add(tuple(sorted(places[0])))
    assert len(drawn) > 15, "another draw in each step"


def _place(image, batch):
    return int(np.flatnonzero((batch["probe_image"] == image).all((1, 2, 3)))[0])


def test_each_class_is_learned_and_judges():
    """Trusted images come in the order of their classes, here with as many classes as places in a batch."""
    context, *_ = make("mlc", **SMALL)
    batch = make_batch() | {"probe_label": np.arange(BATCH, dtype=np.int32)}
    halves = [mlc.halves(context, batch, jax.random.key(seed)) for seed in range(30)]
    for number in (0, 1):
        assert set(np.concatenate([pair[number]["probe_label"] for pair in halves])) == set(range(BATCH))


def test_copies_of_an_image_are_in_one_half():
    context, *_ = make("mlc", **SMALL)
    batch = make_batch() | {"probe_row": np.arange(BATCH, dtype=np.int32) % 5}
    batch["probe_label"] = batch["probe_row"]
    for seed in range(10):
        first, second = (set(np.asarray(h["probe_label"])) for h in mlc.halves(context, batch, jax.random.key(seed)))
        assert len(first & second) <= 1 and len(first | second) == 5


def test_without_learning_them_all_trusted_images_judge():
    _, method, state, _ = make("mlc", **ALONE)
    batch = make_batch()
    supervision = method.supervise(state, batch, jax.random.key(0))
    assert supervision.prepared is None
    _, aux = method.loss(state.params, state, batch, supervision, None)
    assert set(aux.terms) == {"corrected", "weight_decay"}


def test_halves_that_cannot_be_made(tiny_config):
    tiny_config.method.name, tiny_config.trusted.batch_size = "mlc", 9
    with pytest.raises(UserError, match="method.name=mlc halves the 9 trusted images of each batch in 1 group"):
        check.validate(config_lib.resolve(tiny_config))
    tiny_config.method.learn_trusted = False
    check.validate(config_lib.resolve(tiny_config))
