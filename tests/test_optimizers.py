import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ieg_jax import optimizers


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
