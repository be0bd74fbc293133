import numpy as np
import pytest

from configs import default
from ieg_jax.train import schedules


def test_cycle_ends_are_those_of_the_published_runs():
    ends = schedules.cycle_ends(500, 1.5, 200_000)
    exact = [
        500,
        1250,
        2375,
        4062.5,
        6593.75,
        10390.6,
        16085.9,
        24628.9,
        37443.4,
        56665,
        85497.6,
        128746,
        193620,
    ]
    assert len(ends) == 14
    np.testing.assert_allclose(ends[:13], exact, atol=0.6)


def test_sgdr_by_hand():
    config = default.get_config().schedule
    rate = schedules.create(config, first_cycle=10, num_steps=40)
    assert float(rate(0)) == pytest.approx(0.1)
    assert float(rate(5)) == pytest.approx(0.05)  # half way down the first cosine
    assert float(rate(9)) == pytest.approx(0.05 * (1 + np.cos(0.9 * np.pi)), rel=1e-4)
    assert float(rate(10)) == pytest.approx(0.09)  # restarts at 0.9 of the peak
    assert float(rate(10 + 5)) == pytest.approx(0.045 * (1 + np.cos(np.pi / 3)), rel=1e-4)  # 15 steps long
    assert float(rate(25)) == pytest.approx(0.081)


def test_cosine_and_constant():
    config = default.get_config().schedule
    config.name = "cosine"
    rate = schedules.create(config, first_cycle=1, num_steps=20)
    assert [float(rate(step)) for step in (0, 10, 20)] == pytest.approx([0.1, 0.05, 0.0])
    config.name = "constant"
    assert float(schedules.create(config, 1, 20)(19)) == pytest.approx(0.1)


def test_step_decay():
    """Figure A1 of the paper: times 0.1 at 40,000 and at 50,000 steps."""
    config = default.get_config().schedule
    config.name = "step"
    rate = schedules.create(config, first_cycle=1, num_steps=60_000)
    steps = (0, 39_999, 40_000, 49_999, 50_000, 59_999)
    assert [float(rate(step)) for step in steps] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
