import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.methods.parts import losses


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    target = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    expected = [np.log(2), -0.5 * np.log(0.1) - 0.5 * np.log(0.8)]
    np.testing.assert_allclose(losses.cross_entropy(logits, target), expected, rtol=1e-6)


def test_squared_error_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    target = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    expected = [(0.25 + 2 * 0.0625) / 3, (0.01 + 0.16 + 0.09) / 3]
    np.testing.assert_allclose(losses.squared_error(logits, target), expected, rtol=1e-6)


def test_consistency_by_hand_and_its_gradient():
    p, q = jnp.array([[0.5, 0.5]]), jnp.array([[0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(losses.consistency(jnp.log(p), jnp.log(q)), [expected], rtol=1e-6)
    first, second = jax.grad(lambda a, b: losses.consistency(a, b).sum(), (0, 1))(jnp.log(p), jnp.log(q))
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_allclose(second, q - p, atol=1e-6)  # softmax(b) − softmax(a)


def test_weight_decay_by_hand():
    params = {
        "conv": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])},
        "norm": {"scale": jnp.array([1.0])},
    }
    np.testing.assert_allclose(losses.weight_decay(params, 0.1, "all"), 0.05 * (9 + 16 + 1), rtol=1e-6)
    np.testing.assert_allclose(losses.weight_decay(params, 0.1, "kernels"), 0.05 * 9, rtol=1e-6)
