import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ieg_jax.methods.parts.pseudo_labels import normalize_logits, pseudo_labels


def test_mean_over_views_then_sharpened():
    views = [jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.8, 0.2]]))]
    # mean 0.7, 0.3; squared and renormalised
    np.testing.assert_allclose(
        pseudo_labels(views, temperature=0.5, normalize=False), [[0.49 / 0.58, 0.09 / 0.58]], rtol=1e-6
    )
    np.testing.assert_allclose(pseudo_labels(views, temperature=1.0, normalize=False), [[0.7, 0.3]], rtol=1e-6)


@pytest.mark.parametrize("temperature, num_classes", [(0.02, 10), (0.05, 200), (0.5, 1000)])
def test_sharp_labels_of_many_classes_are_numbers(temperature, num_classes):
    """As in float64; P^{1/τ} itself is 0 for all classes in float32. The gradient is finite too."""
    views = np.random.default_rng(0).normal(0, 0.01, (2, 3, num_classes))
    mean = np.mean(np.exp(views) / np.exp(views).sum(-1, keepdims=True), 0)
    sharp = np.exp(np.log(mean) / temperature - np.log(mean).max(-1, keepdims=True) / temperature)
    views = list(jnp.asarray(views, jnp.float32))
    found = pseudo_labels(views, temperature, normalize=False)
    np.testing.assert_allclose(found, sharp / sharp.sum(-1, keepdims=True), rtol=1e-3)
    gradient = jax.grad(lambda views: pseudo_labels(views, temperature, normalize=False)[0, 0])(views)
    assert np.isfinite(gradient).all()


def test_normalize_logits_divides_each_group_by_its_root_mean_square():
    logits = jnp.array([[3.0, 4.0], [0.0, 5.0], [1.0, 1.0], [1.0, 1.0]])
    rms = np.sqrt((9 + 16 + 25) / 4)
    expected = np.concatenate([np.array([[3, 4], [0, 5]]) / rms, np.ones((2, 2))])
    np.testing.assert_allclose(normalize_logits(logits, groups=2), expected, rtol=1e-6)
    whole = np.sqrt((50 + 4) / 8)
    np.testing.assert_allclose(normalize_logits(logits), np.asarray(logits) / whole, rtol=1e-6)


def test_normalized_pseudo_labels_ignore_the_scale_of_the_logits():
    logits = jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    np.testing.assert_allclose(
        pseudo_labels([logits], 0.5, normalize=True),
        pseudo_labels([7 * logits], 0.5, normalize=True),
        rtol=1e-5,
    )
