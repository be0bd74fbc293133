import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import x64
from runs import variables
from small_step import make, make_batch

from configs import default
from ieg_jax.methods.parts import losses, optimizers
from ieg_jax.train.loop import train_and_evaluate


@pytest.mark.parametrize("nesterov, second", [(False, 0.9 * 2 + 1), (True, 1 + 0.9 * (0.9 * 2 + 1))])
def test_momentum_by_hand(nesterov, second):
    config = default.get_config().optimizer
    config.nesterov = nesterov
    optimizer = optimizers.create(config)
    params = {"w": jnp.array([10.0])}
    state = optimizer.init(params)
    params, state, _ = optimizers.apply(optimizer, {"w": jnp.array([2.0])}, state, params, 0.1)
    first = 2 * (1.9 if nesterov else 1)
    np.testing.assert_allclose(params["w"], 10 - 0.1 * first, rtol=1e-6)
    params, _, update = optimizers.apply(optimizer, {"w": jnp.array([1.0])}, state, params, 0.5)
    np.testing.assert_allclose(update["w"], -0.5 * second, rtol=1e-6)


def test_adam_moves_by_the_learning_rate_at_first():
    config = default.get_config().optimizer
    config.name = "adam"
    optimizer = optimizers.create(config)
    params = {"w": jnp.array([1.0, 1.0])}
    _, _, update = optimizers.apply(optimizer, {"w": jnp.array([5.0, -0.01])}, optimizer.init(params), params, 0.1)
    np.testing.assert_allclose(update["w"], [-0.1, 0.1], rtol=1e-3)


def adamw(**keys):
    config = default.get_config().optimizer
    config.update(name="adamw", weight_decay=0.02, **keys)
    return config


def adam_by_hand(gradients, beta=0.9):
    """The last direction of Adam, from the gradients of all steps."""
    first = second = 0.0
    for gradient in gradients:
        first = beta * first + (1 - beta) * gradient
        second = 0.999 * second + 0.001 * gradient**2
    steps = len(gradients)
    return first / (1 - beta**steps) / (np.sqrt(second / (1 - 0.999**steps) + 1e-12) + 1e-8)


@pytest.mark.parametrize("on, decays", [("all", (True, True)), ("kernels", (True, False))])
def test_adamw_by_hand(on, decays):
    """Θ ← Θ − rate · (adam + 0.02 Θ): the decay is neither in the moments nor in the loss."""
    config = adamw(weight_decay_on=on)
    optimizer = optimizers.create(config)
    params = {"conv": {"kernel": jnp.array([10.0]), "bias": jnp.array([10.0])}}
    state = optimizer.init(params)
    expected = np.array([10.0, 10.0])
    for gradients in ([5.0], [5.0, -2.0]):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradients[-1]), params)  # noqa: B023
        params, state, _ = optimizers.apply(optimizer, grads, state, params, 0.1)
        expected = expected - 0.1 * (adam_by_hand(gradients) + 0.02 * expected * decays)
        np.testing.assert_allclose(params["conv"]["kernel"], expected[0], rtol=1e-6)
        np.testing.assert_allclose(params["conv"]["bias"], expected[1], rtol=1e-6)
    assert optimizers.decay_in_loss(config) == 0


@pytest.mark.parametrize("name, share", [("sgd", 1.0), ("adam", 1.0), ("adamw", 0.0)])
def test_weights_decay_once(name, share):
    """By the loss or by the update, by one key."""
    context, _, state, _ = make("supervised", **{"optimizer.name": name, "optimizer.weight_decay": 0.02})
    squares = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(state.params))
    assert float(context.weight_decay(state.params)) == pytest.approx(share * 0.01 * squares, rel=1e-5)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    _, _, update = optimizers.apply(context.optimizer, zero, state.opt_state, state.params, 0.1)
    for moved, weight in zip(jax.tree.leaves(update), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(moved, -0.1 * 0.02 * (1 - share) * np.asarray(weight), rtol=1e-6)


@pytest.mark.slow
def test_meta_gradient_of_ieg_with_adamw():
    """ω* of a step against differences of the trusted loss after an update written out here."""
    decay, rate = 0.02, 0.01
    with x64():
        context, method, state, step = make(
            "ieg", dtype=jnp.float64,
            **{"optimizer.name": "adamw", "optimizer.weight_decay": decay, "meta.learning_rate": rate},
        )  # fmt: skip
        # With moments of its own: after a single gradient Adam's direction is its sign, and no weight moves that.
        for number in range(2):
            state, _ = jax.jit(step)(state, make_batch(np.float64, number), jax.random.key(0))
        batch = make_batch(np.float64, 2)
        supervision = method.supervise(state, batch, jax.random.key(1))
        label, guess = context.one_hot(batch["label"]), supervision.pseudo_label
        first, second = state.opt_state[0].mu, state.opt_state[0].nu

        def trusted_loss_after(weights):
            def noisy_loss(params):
                logits, _ = context.forward(params, state.batch_stats, batch["image"])
                return weights @ losses.cross_entropy(logits, 0.9 * label + 0.1 * guess)

            def after(weight, gradient, m, v):
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                adam = m / (1 - 0.9**3) / (jnp.sqrt(v / (1 - 0.999**3) + 1e-12) + 1e-8)
                return weight - rate * (adam + decay * weight)

            params = jax.tree.map(after, state.params, jax.grad(noisy_loss)(state.params), first, second)
            logits, _ = context.forward(params, state.batch_stats, batch["probe_image"])
            return jnp.mean(losses.cross_entropy(logits, context.one_hot(batch["probe_label"])))

        trusted_loss_after = jax.jit(trusted_loss_after)
        size, h = len(batch["label"]), 1e-6
        start = np.full(size, 1 / size)
        assert float(supervision.observed["loss/trusted_after_lookahead"]) == pytest.approx(
            float(trusted_loss_after(start)), rel=1e-9
        )
        shifts = h * np.eye(size)
        gradient = [float(trusted_loss_after(start + e) - trusted_loss_after(start - e)) / (2 * h) for e in shifts]
    positive = np.maximum(-np.asarray(gradient), 0)
    assert 0 < (positive > 0).sum() < size
    np.testing.assert_allclose(supervision.example_weights, positive / (positive.sum() + 1e-5), rtol=1e-4, atol=1e-7)


def test_a_checkpoint_of_adamw_is_restored(tmp_path, tiny_config):
    """Its state has parts without arrays; the last two steps are made again from the checkpoint before them."""
    tiny_config.optimizer.name, tiny_config.optimizer.weight_decay_on = "adamw", "kernels"
    tiny_config.method.name = "mixmatch"
    train_and_evaluate(tiny_config, str(tmp_path))
    whole = variables(tmp_path, 4)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train_and_evaluate(tiny_config, str(tmp_path))
    again = variables(tmp_path, 4)
    assert any("nu" in path for path in whole) and whole.keys() == again.keys()
    for path in whole:
        np.testing.assert_array_equal(again[path], whole[path], err_msg=path)


@pytest.mark.parametrize("name, nesterov", [("adam", False), ("adam", True), ("adamw", False)])
def test_the_derivative_of_adam_at_first_and_later(name, nesterov):
    """New moments: the denominator is a constant. Later: as of optax, through both moments. The values are optax's."""
    with x64():
        config = default.get_config().optimizer
        config.update(name=name, nesterov=nesterov, weight_decay=0.0)
        optimizer, exact = optimizers.create(config), optax.scale_by_adam(0.9, eps_root=1e-12, nesterov=nesterov)
        params, gradient = jnp.zeros(3), jnp.array([0.5, -1e-3, 0.0])
        ours, theirs = optimizer.init(params), exact.init(params)
        for step in range(3):
            direction = lambda g, s=ours: optimizer.update(g, s, params)[0]  # noqa: E731
            wanted = lambda g, s=theirs: exact.update(g, s, params)[0]  # noqa: E731
            np.testing.assert_array_equal(direction(gradient), wanted(gradient))
            slope = jax.jacobian(direction)(gradient)
            if step == 0:
                factor = 1 + 0.9 / 1.9 if nesterov else 1.0  # of m, which looks one step further
                scale = np.sqrt(np.square(gradient) + 1e-12) + 1e-8 * np.array([1, 1, 0])
                np.testing.assert_allclose(np.diag(slope), [factor, factor, 1] / scale, rtol=1e-6)
            else:
                np.testing.assert_allclose(slope, jax.jacobian(wanted)(gradient), rtol=1e-12)
            _, ours = optimizer.update(gradient, ours, params)
            _, theirs = exact.update(gradient, theirs, params)


@pytest.mark.parametrize("method", ["l2r", "l2b"])
@pytest.mark.parametrize("keys", [{"optimizer.name": "adam"}, {"optimizer.nesterov": True}])
def test_the_step_ahead_of_l2r_is_plain_gradient_descent_whatever_the_optimiser(method, keys):
    batch = make_batch()
    expected, found = (
        bound.supervise(state, batch, None).example_weights
        for _, bound, state, _ in (make(method), make(method, **keys))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("keys", [{"meta.momentum": False}, {}])
def test_adam_weighs_examples_from_the_first_step_on(keys):
    batch = make_batch()
    with x64():
        _, bound, state, _ = make("ieg", **{"optimizer.name": "adam"}, **keys)
        state = state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state), step=0)
        weights = bound.supervise(state, batch, jax.random.key(0)).example_weights
    assert 0.9 < float(jnp.sum(weights)) <= 1, "not all 0, and 1e-5 is nothing beside their sum"
