"""ProMix: selection, guesses, pairs and bias by hand, the loss by hand, and its limits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from small_step import BATCH, CLASSES, make, make_batch

from ieg_jax.methods import promix

KEY = jax.random.key(1)
KEYS = {"batch_size": BATCH, "optimizer.weight_decay": 0.0}


def begun(state, small_loss, bias=None, step=25):
    """After the first selection, with these examples of small loss; 50 examples in batches of 16."""
    whole = jnp.zeros((50, 2), bool).at[:].set(small_loss)
    bias = state.method["bias"] if bias is None else jnp.asarray(bias, state.method["bias"].dtype)
    memory = state.method | {"small_loss": whole, "begun": jnp.int32(1), "bias": bias}
    return state.replace(method=memory, step=jnp.int32(step))


def softmax(logits):
    return np.asarray(jax.nn.softmax(logits), np.float64)


def log_softmax(logits):
    return np.log(softmax(logits))


def test_small_losses_by_hand():
    """Six examples, three classes: ⌈0.6 · 6/3⌉ = 2 of each, of the third class, which has one, that one."""
    loss = np.array([0.3, 0.1, 0.2, 5.0, 0.5, 4.0])
    label = np.array([0, 0, 0, 1, 1, 2])
    assert promix.small_losses(loss, label, 3, 0.6).tolist() == [False, True, True, True, True, True]
    assert promix.small_losses(loss, label, 3, 0.0).tolist() == [False, True, False, False, True, True]
    assert promix.small_losses(loss, label, 3, 1.5).all(), "three of each are all there are"
    assert promix.small_losses(loss, label, 4, 0.1).sum() == 3, "a class that nobody has gives none"


def test_guesses_by_hand():
    """Five examples, two classes; the third is kept by the first network alone, in the fourth they see two classes."""
    sure = [[0.99, 0.96, 0.98, 0.97, 0.99], [0.97, 0.99, 0.96, 0.03, 0.5]]
    p = jnp.stack([jnp.array(sure), 1 - jnp.array(sure)], -1)
    kept = jnp.zeros((2, 5), bool).at[0, 2].set(True)
    found = promix.agreed(p, kept, 0.95, 1.0)
    assert found.tolist() == [[True, True, False, False, False], [True, True, True, False, False]]
    # A share of 0.4 is two of five, one of which the first network keeps already: one more, the surest by both.
    found = promix.agreed(p, kept, 0.95, 0.4)
    assert found.tolist() == [[True, False, False, False, False], [True, True, False, False, False]]
    assert not promix.agreed(p, kept, 0.95, 0.2)[0].any() and not promix.agreed(p, kept, 0.995, 1.0).any()


@pytest.mark.parametrize("groups", [1, 4])
def test_partners_are_of_the_same_kind(groups):
    kept = np.random.default_rng(0).random((2, 64)) < 0.4
    seen = set()
    for seed in range(3):
        pairs = promix.draw_pairs(jax.random.key(seed), jnp.asarray(kept), groups, 4.0)
        assert pairs.partner.shape == (2, groups, 64 // groups) and (pairs.share >= 0.5).all()
        for partner, mine in zip(pairs.partner.reshape(-1, 64 // groups), kept.reshape(2 * groups, -1), strict=True):
            assert sorted(partner.tolist()) == list(range(64 // groups))
            np.testing.assert_array_equal(mine[partner], mine)
        seen.add(tuple(np.asarray(pairs.partner).ravel().tolist()))
    assert len(seen) == 3, "drawn anew"


def test_the_bias_by_hand():
    """Three examples: one of two is kept by the first network, none by the second."""
    p = jnp.array([[[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[0.5, 0.5], [0.3, 0.7], [0.1, 0.9]]])
    kept = jnp.array([[1.0, 0, 0], [0, 0, 0]])
    found = promix.averaged(jnp.full((2, 2, 2), 0.5), p, jnp.stack([kept, 1 - kept]), 0.9)
    expected = [[[0.53, 0.47], [0.5, 0.5]], [[0.475, 0.525], [0.45 + 0.03, 0.45 + 0.07]]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_margin_by_hand():
    """Logits 0, π = (0.7, 0.1, 0.1, 0.1), α = 1: the loss is −log π_y, and a pseudo label is of a rare class."""
    log = np.log([0.7, 0.1, 0.1, 0.1])
    shift = jnp.asarray(np.broadcast_to(log, (2, 2, 4)), jnp.float32)
    label = jnp.eye(4)[jnp.array([[0, 1], [0, 0]])]
    plan = promix.Plan(jnp.ones((2, 2)), label, label, (None, label), shift, None, 1.0, 0.0, 0.0)
    zeros = [jnp.zeros((2, 2, 4))] * 3
    expected = -(log[0] + log[1]) / 2 - log[0]
    assert float(promix.kept_loss(zeros, plan)) == pytest.approx(expected, rel=1e-5)
    assert float(promix.rest_loss(zeros, plan)) == 0, "all are kept"
    more = promix.kept_loss(zeros, plan._replace(strong=0.5))
    assert float(more) == pytest.approx(2 * expected, rel=1e-5), "strong view and mixture at half their weight each"


def test_before_the_selection_both_learn_the_given_labels():
    context, method, state, _ = make("promix", **KEYS)
    *_, decaying = make("promix", **KEYS | {"optimizer.weight_decay": 0.1})
    batch = make_batch()
    supervision = method.supervise(state, batch, KEY)
    value, aux = method.loss(state.params, state, batch, supervision, None)
    logits, _ = jax.jit(context.forward)(state.params, state.batch_stats, batch["image"])
    plain = -log_softmax(logits)[:, np.arange(BATCH), batch["label"]].mean(-1).sum()
    assert float(value) == pytest.approx(plain, rel=1e-5) and aux.logits.shape == (BATCH, CLASSES)
    after, _ = jax.jit(decaying)(state, batch, KEY)
    for a, b in zip(*map(jax.tree.leaves, (after.method, state.method)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg="nothing is remembered yet, and nothing decays")


def test_the_loss_by_hand():
    """Both networks, both heads, from what is kept, guessed and left."""
    own = {
        "method.debias_strength": 0.6, "method.ramp_epochs": 16.0, "method.confidence_threshold": 0.3,
        "method.guess_after_epochs": 5.0, "method.guess_share": 0.75, "method.temperature": 0.5,
    }  # fmt: skip
    context, method, state, _ = make("promix", groups=2, **KEYS, **own)
    batch, rng = make_batch(), np.random.default_rng(0)
    small, bias = rng.random((50, 2)) < 0.3, rng.dirichlet(np.full(CLASSES, 9.0), (2, 2))
    state = begun(state, small, bias)  # epoch 8: w = 1/2, v = 0.1 · 1/4
    alike = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), state.params)  # so that they agree, one less surely
    alike["head"]["kernel"] *= jnp.array([4.0, 3.0])[:, None, None]
    state = state.replace(params=alike)
    supervision = method.supervise(state, batch, KEY)
    plan = supervision.prepared
    forward = jax.jit(context.forward_with_features)
    outputs = [forward(state.params, state.batch_stats, x)[:2] for x in (batch["image"], batch["views"][:, 0])]
    p, label = softmax(outputs[0][0]), np.eye(CLASSES)[batch["label"]]
    as_given = small[batch["row"]].T | ((label * p).sum(-1) > 0.3)
    both = (p.max(-1) > 0.3).all(0) & (p.argmax(-1)[0] == p.argmax(-1)[1])
    kept = as_given.copy()
    for network in (0, 1):
        more = np.flatnonzero(both & ~as_given[network])
        room = max(12 - as_given[network].sum(), 0)
        kept[network, more[np.argsort(-p.max(-1).mean(0)[more], kind="stable")][:room]] = True
    np.testing.assert_array_equal(plan.kept, kept)
    assert (kept & ~as_given).any() and (~kept).any(1).all(), "some are guessed, some are left"
    margin = 0.6 * np.log(bias)
    debiased = np.asarray(outputs[0][0]) - margin[0][:, None]
    target = np.where(as_given[..., None], label, np.eye(CLASSES)[debiased.argmax(-1)])
    guess = softmax(np.asarray(outputs[0][0]) - margin[1][:, None]) ** 2
    guess = guess / guess.sum(-1, keepdims=True)
    expected = {"kept": 0.0, "pseudo_head": 0.0, "rest": 0.0}
    pseudo = jax.tree.map(np.asarray, state.method["heads"].weights)
    mixed_images, mixed_targets = map(np.asarray, plan.mixed)
    for network in (0, 1):
        part = jax.tree.map(lambda leaf, r=network: leaf[r : r + 1], (state.params, state.batch_stats))
        mixture = forward(*jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), part), mixed_images[network])[:2]
        of_mine = [[np.asarray(a[0 if where is mixture else network]) for a in where] for where in (*outputs, mixture)]
        heads = [[z for z, _ in of_mine], [f @ pseudo["kernel"][network] + pseudo["bias"][network] for _, f in of_mine]]
        mine, goal = kept[network], target[network]
        for head, name in zip(heads, ("kept", "pseudo_head"), strict=True):
            terms = [
                -(t * log_softmax(z + margin[0, network])).sum(-1)[mine].mean()
                for z, t in zip(head, (goal, goal, mixed_targets[network]), strict=True)
            ]
            expected[name] += terms[0] + (terms[1] + terms[2]) / 2
        left = [-(guess[network] * log_softmax(z + margin[1, network])).sum(-1)[~mine].mean() for z in heads[1][:2]]
        expected["rest"] += 0.1 / 4 * (left[0] + left[1] / 2)
    value, aux = method.loss(state.params, state, batch, supervision, None)
    for name, number in expected.items():
        assert float(aux.terms[name]) == pytest.approx(number, rel=1e-3), name
    assert float(value) == pytest.approx(sum(expected.values()), rel=1e-3)
    np.testing.assert_allclose(supervision.example_weights, kept.sum(0) / kept.sum(), rtol=1e-5)
    weights = np.stack([kept, ~kept])
    mean = (weights[..., None] * p).sum(2) / weights.sum(-1)[..., None]
    np.testing.assert_allclose(supervision.memory["bias"], 0.9999 * bias + 0.0001 * mean, rtol=1e-5)


def test_mixtures_are_of_kept_images():
    _, method, state, _ = make("promix", **KEYS)
    batch = make_batch()
    small = np.zeros((50, 2), bool)
    small[batch["row"][:6], 0] = small[batch["row"][4:12], 1] = True
    plan = method.supervise(begun(state, small), batch, KEY).prepared
    for network, mine in enumerate((range(6), range(4, 12))):
        images, goals = (np.asarray(mixed[network]) for mixed in plan.mixed)
        # Where a partner has another class, what is left of the own one is δ.
        (share,) = {round(float(goal.max()), 5) for goal in goals[list(mine)] if goal.max() < 1}
        for place in mine:
            pairs = [share * batch["image"][place] + (1 - share) * batch["image"][other] for other in mine]
            assert sum(np.allclose(images[place], pair, atol=1e-4) for pair in pairs) == 1


def test_where_every_label_is_surely_right_all_are_kept():
    _, method, state, _ = make("promix", **KEYS, **{"method.confidence_threshold": 0.0})
    batch = make_batch()
    state = begun(state, False)
    supervision = method.supervise(state, batch, KEY)
    assert supervision.prepared.kept.all()
    np.testing.assert_array_equal(supervision.prepared.target, np.tile(np.eye(CLASSES)[batch["label"]], (2, 1, 1)))
    _, aux = method.loss(state.params, state, batch, supervision, None)
    assert float(aux.terms["rest"]) == 0
    np.testing.assert_array_equal(supervision.memory["bias"][1], state.method["bias"][1])


def test_where_nothing_is_kept_only_the_second_head_learns():
    _, method, state, _ = make("promix", **KEYS, **{"method.confidence_threshold": 1.0})
    batch = make_batch()
    state = begun(state, False)
    supervision = method.supervise(state, batch, KEY)
    loss = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (_, aux), gradient = loss(state.params, state, batch, supervision, None)
    assert float(aux.terms["kept"]) == float(aux.terms["pseudo_head"]) == 0 < float(aux.terms["rest"])
    assert not np.abs(gradient["head"]["kernel"]).any() and np.abs(gradient["conv0"]["kernel"]).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, supervision.memory)))


@pytest.mark.parametrize("step, strong, rest", [(25, 0.16, 0.008), (200, 1.0, 0.064), (313, 1.0, 0.0)])
def test_the_ramps(step, strong, rest):
    """50 examples in batches of 16: epochs 8, 64 and 100.16; v is 0 once it would have reached its end."""
    _, method, state, _ = make("promix", **KEYS)
    plan = jax.eval_shape(method.supervise, state, make_batch(), KEY).prepared
    assert plan.strong.shape == plan.rest.shape == ()
    plan = method.supervise(begun(state, True, step=step), make_batch(), KEY).prepared
    assert (float(plan.strong), float(plan.rest)) == pytest.approx((strong, rest), rel=1e-5)


def test_the_second_head_moves_by_the_gradient_of_the_loss():
    _, method, state, step = make("promix", **KEYS)
    state, batch = begun(state, np.random.default_rng(0).random((50, 2)) < 0.5), make_batch()
    drawn = jax.random.split(jax.random.fold_in(KEY, state.step))[0]
    supervision = method.supervise(state, batch, drawn)

    def loss(pseudo):
        prepared = supervision.prepared._replace(pseudo=pseudo)
        return method.loss(state.params, state, batch, supervision._replace(prepared=prepared), None)[0]

    before = state.method["heads"].weights
    slope = jax.jit(jax.grad(loss))(before)
    assert np.abs(slope["kernel"]).max() > 1e-3
    after, _ = jax.jit(step)(state, batch, KEY)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, before, slope)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), after.method["heads"].weights, expected
    )


@pytest.mark.slow
def test_eight_devices_select_what_one_does():
    """Two steps in float64, with labels kept, guessed and left: losses, both heads, π and all variables."""
    own = {"method.confidence_threshold": 0.3, "method.guess_after_epochs": 1.0, "method.bias_momentum": 0.5}
    with x64():
        results = []
        for devices in (1, 8):
            _, _, state, step = make("promix", 8, jnp.float64, **KEYS, **own)
            state = begun(state, np.random.default_rng(0).random((50, 2)) < 0.3)
            mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
            split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
            run = jax.jit(step, in_shardings=(whole, split, whole), out_shardings=whole)
            for number in range(2):
                state, observed = run(state, make_batch(np.float64, number), KEY)
            results.append(jax.device_get((state, observed)))
    for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-7, atol=1e-12)
    averages = results[0][1].averages
    assert 0 < averages["train/share_kept"].compute() < 1 and averages["train/share_guessed"].compute() > 0


def test_each_network_selects_for_itself():
    _, method, state, _ = make("promix", **{"method.pretrain_epochs": 3.0, "method.select_share": 0.5})
    labels = np.arange(48) % CLASSES
    p = np.full((2, 48, CLASSES), 0.1)
    p[0, np.arange(24), labels[:24]], p[1, np.arange(24, 48), labels[24:]] = 0.9, 0.9
    look = types.SimpleNamespace(epoch=2, labels=labels, probabilities=lambda: p)
    assert method.on_epoch(state, look) == (state, None)
    look.epoch = 3
    changed, rows = method.on_epoch(state, look)
    small = changed.method["small_loss"]
    assert rows is None and changed.method["begun"] == 1
    assert small[:24, 0].all() and not small[24:, 0].any() and small[24:, 1].all() and not small[:24, 1].any()
    assert changed.method["heads"] is state.method["heads"]
