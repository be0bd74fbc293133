import pytest

from ieg_jax.data.load import load_data
from ieg_jax.train import rehearsal


def test_how_long_a_run_will_take(tiny_config):
    tiny_config.num_train_steps, tiny_config.method.name = 1000, "supervised"
    found = rehearsal.rehearse(tiny_config, load_data(tiny_config))
    assert found.num_steps == 1000 and 0 < found.step_seconds < 5 and found.compile_seconds > 0
    assert str(found).startswith("training: 1,000 steps of 0.")


def test_a_step_that_is_too_slow_here_is_not_tried(tiny_config, monkeypatch):
    monkeypatch.setattr(rehearsal, "_operations_per_second", lambda: 1e3)
    found = rehearsal.rehearse(tiny_config, load_data(tiny_config))
    assert found.compile_seconds is None and found.step_seconds > rehearsal.LONGEST_STEP
    assert "4 steps would take more than" in str(found)


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5401, "1.5 h"), (2e5, "2.3 days")]
)
def test_durations(seconds, text):
    assert rehearsal.duration_text(seconds) == text
