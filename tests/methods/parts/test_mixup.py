import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from scipy import stats

from ieg_jax.methods.parts import mixup


def test_by_hand():
    draw = mixup.Draw(
        probe_index=jnp.array([[1, 1]]),
        partner=jnp.array([[2, 1, 0, 3]]),
        coefficient=jnp.array([[0.75, 1.0, 0.5, 0.9]]),
    )
    probe = mixup.resample(draw, jnp.array([[10.0], [20.0]]))
    np.testing.assert_array_equal(probe, [[20], [20]])
    mixed = mixup.mix(draw, [probe, jnp.array([[0.0], [4.0]])])
    np.testing.assert_allclose(mixed, [[0.75 * 20], [20], [10], [4]])
    first, second = mixup.split(mixed, 1, 2)
    np.testing.assert_allclose(first, [[15], [20]])
    np.testing.assert_allclose(second, [[10], [4]])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_nothing_leaves_its_group(groups):
    size, blocks = 8 // groups, 3
    draw = mixup.draw(jax.random.key(0), groups, size, 4 // groups, blocks, "exact")
    assert sorted(draw.partner[0].tolist()) == list(range(blocks * size)), "a permutation"
    owner = jnp.repeat(jnp.arange(groups, dtype=jnp.float32), size)
    probe_owner = jnp.repeat(jnp.arange(groups, dtype=jnp.float32), 4 // groups)
    picked = mixup.resample(draw, probe_owner)
    np.testing.assert_array_equal(picked, owner)
    for block in mixup.split(mixup.mix(draw, [picked, owner, owner]), groups, blocks):
        np.testing.assert_allclose(block, owner, rtol=1e-6)


def test_split_undoes_the_layout():
    groups, blocks = 2, [jnp.arange(4.0), 10 + jnp.arange(4.0), 20 + jnp.arange(4.0)]
    same = mixup.Draw(None, jnp.tile(jnp.arange(6), (2, 1)), jnp.ones((2, 6)))
    for block, expected in zip(mixup.split(mixup.mix(same, blocks), groups, 3), blocks, strict=True):
        np.testing.assert_array_equal(block, expected)


@pytest.mark.parametrize("kind, alpha", [("exact", 0.5), ("exact", 0.75), ("exact", 2.0), ("approximate", 0.5)])
def test_distribution_of_the_coefficient(kind, alpha):
    coefficient = np.ravel(mixup.draw(jax.random.key(0), 1, 5000, 1, 2, kind, alpha).coefficient)
    assert coefficient.min() >= 0.5
    assert coefficient.max() <= 1.0
    if kind == "exact":  # max(β, 1 − β) with β ~ Beta(α, α)
        cdf = lambda x: 1 - 2 * stats.beta(alpha, alpha).cdf(1 - x)  # noqa: E731
    else:  # 1 − U²/2
        cdf = lambda x: 1 - np.sqrt(2 * (1 - np.clip(x, 0.5, 1)))  # noqa: E731
    assert stats.kstest(coefficient, cdf).pvalue > 1e-3


def test_partners_are_drawn_evenly_and_for_each_group():
    """Each element of the pool, the last one too, is the partner of each equally often, whatever the group."""
    partner = np.asarray(mixup.draw(jax.random.key(0), 6000, 2, 1, 2, "exact").partner)
    shares = (partner[..., None] == np.arange(4)).mean(0)
    np.testing.assert_allclose(shares, 1 / 4, atol=0.03)
    together = ((partner[1:, 0] == 0) & (partner[:-1, 0] == 0)).mean()
    assert together == pytest.approx(1 / 16, abs=0.02), "groups that follow each other know nothing of each other"


def test_each_choice_has_a_key_of_its_own():
    with jax.debug_key_reuse(True):
        for kind in ("exact", "approximate"):
            jax.jit(lambda rng, kind=kind: mixup.draw(rng, 2, 2, 2, 3, kind)).lower(jax.random.key(0))


def test_images_in_32_bits_are_mixed_with_64():
    """A check in float64 on other devices would otherwise differ by the rounding of the mixture."""
    with x64():
        draw = mixup.draw(jax.random.key(0), 2, 4, 4, 2, "approximate")
        images = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
        mixed = mixup.mix(draw, list(jnp.asarray(images)))
    assert mixed.dtype == np.float64
    pool = images.reshape(2, 2, 4, 3).swapaxes(0, 1).reshape(2, 8, 3).astype(np.float64)
    partner = np.take_along_axis(pool, np.asarray(draw.partner)[..., None], 1)
    beta = np.asarray(draw.coefficient)[..., None]
    np.testing.assert_allclose(mixed, (beta * pool + (1 - beta) * partner).reshape(-1, 3), rtol=1e-15, atol=1e-15)
