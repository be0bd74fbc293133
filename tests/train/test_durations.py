"""How long a run is, in steps."""

import pytest

from ieg_jax import cli, methods
from ieg_jax.errors import UserError
from ieg_jax.train import check, durations

STEPS = 440


def config_of(method, **keys):
    config = cli.load_config("configs/default.py")
    config.update_from_flattened_dict(
        {"batch_size": 50, "num_train_epochs": 22.0, "eval_every_epochs": 3.0} | methods.defaults() | keys
    )
    config.method.name = method
    return config


@pytest.mark.parametrize(("method", "steps"), [("supervised", 440), ("ieg", 60), ("l2r", 132), ("co_teaching", 220)])
def test_a_budget_of_forward_passes(method, steps):
    """A plain step costs 3, one of IEG 22, of L2R 10, of Co-teaching 6: 440 · 3 / 22 = 60."""
    found = durations.in_steps(config_of(method, budget="forward_passes"), 1000)
    assert found.num_steps == steps and steps in found.eval_steps
    assert found.ends_epoch(20) and not found.ends_epoch(21), "an epoch is what it was"
    assert durations.in_steps(config_of(method), 1000).num_steps == STEPS


def test_a_budget_of_another_name_is_refused():
    with pytest.raises(UserError, match="budget.*forward_passes"):
        check.validate(config_of("ieg", budget="seconds"))


@pytest.mark.parametrize(("name", "steps"), [("quickstart", 325), ("digits", 488), ("fashion_mnist", 1219)])
def test_a_run_ends_where_a_cycle_of_the_learning_rate_does(name, steps):
    """And so reports its last step: one step less, and it would report the end of the cycle before."""
    config = cli.load_config(f"configs/{name}.py")
    assert durations.in_steps(config, 1000).reported == config.num_train_steps == steps
    config.num_train_steps -= 1
    assert durations.in_steps(config, 1000).reported < 0.7 * steps
