import numpy as np
import pytest

from ieg_jax.audit import measures


def test_pooled_by_hand():
    pooled = measures.pooled([np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])])
    np.testing.assert_allclose(pooled, [[0.75, 0.25]], rtol=1e-6)  # √0.45 : √0.05 = 3 : 1


def test_bins_by_hand():
    bins = measures.binned(np.array([0.05, 0.07, 0.95, 1.0]), np.array([False, True, True, True]))
    assert bins == [(pytest.approx(0.06), 0.5, 2.0), (pytest.approx(0.975), 1.0, 2.0)]
    assert measures.calibration_error(bins) == pytest.approx((0.44 * 2 + 0.025 * 2) / 4)
    assert measures.binned(np.array([0.5, 0.5]), np.array([True, False]), np.array([3.0, 1.0])) == [(0.5, 0.75, 4.0)]


def test_divergence_by_hand():
    same, opposite = np.array([[0.5, 0.5]]), np.array([[[1.0, 0]], [[0, 1.0]]])
    assert measures.divergence(np.stack([same, same])) == pytest.approx(0)
    assert measures.divergence(opposite) == pytest.approx(1)
    assert measures.divergence(same[None]) == pytest.approx(0)
    three = np.array([[[1.0, 0, 0]], [[0, 1.0, 0]]])  # two views of three classes: over log 2, not over log 3
    assert measures.divergence(three) == pytest.approx(1)
    # H(0.75, 0.25) − (0 + log 2) / 2 over log 2, of (1, 0) and (0.5, 0.5).
    expected = (-0.75 * np.log(0.75) - 0.25 * np.log(0.25)) / np.log(2) - 0.5
    assert measures.divergence(np.stack([opposite[0], same])) == pytest.approx(expected)


def test_judge_by_hand():
    given, true = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    judged = measures.judge(np.array([0.9, 0.2, 0.1, 0.4]), np.array([1, 1, 0, 2]), given, true)
    # Wrong: 1 and 3. Pairs (wrong, right): (1, 0) and (3, 0) in order, (1, 2) and (3, 2) not. Lowest two: 2 and 1.
    assert judged == {"noise_rate": 0.5, "auroc": 0.5, "precision": 0.5, "suggested_right": 0.5}
    assert measures.judge(np.ones(2), given[:2], given[:2], given[:2]) == {"noise_rate": 0.0}
