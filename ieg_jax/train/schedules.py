"""Learning-rate schedules, from optax."""

import optax
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import above, at_least, number, one_of
from ieg_jax.errors import UserError

# name -> the keys that it reads besides base_lr; the length of the first cycle is a duration, which must always be set
NAMES = {"sgdr": ("cycle_mult", "peak_mult"), "cosine": (), "step": ("step_boundaries", "step_factor"), "constant": ()}
# Values of configs/default.py.
UNSET = {"cycle_mult": 1.5, "peak_mult": 0.9, "step_boundaries": (40_000, 50_000), "step_factor": 0.1}


def validate(schedule: ConfigDict) -> None:
    """Checks the group `schedule` of the configuration.

    Raises:
      UserError: for a value that is not allowed, and for a key that is set and that the schedule does not read.
    """
    checks = {
        "name": one_of(*NAMES),
        "base_lr": above(0),
        "warmup_epochs": at_least(0),
        "cycle_mult": at_least(1),
        "peak_mult": number(lambda v: 0 < v <= 1, "in (0, 1]"),
        "step_factor": number(lambda v: 0 < v < 1, "in (0, 1)"),
    }
    config_lib.check_values(schedule, checks, "schedule.")
    boundaries = tuple(schedule.step_boundaries)
    if not all(isinstance(b, int) and b > 0 for b in boundaries) or list(boundaries) != sorted(set(boundaries)):
        raise UserError(f"schedule.step_boundaries: got {boundaries}, expected increasing whole numbers above 0")
    config_lib.check_unread(schedule, UNSET, NAMES, "name", "schedule.")


def cycle_ends(first_cycle: int, cycle_mult: float, num_steps: int) -> list[int]:
    """Steps at which the cycles of `sgdr` end, up to and including the first at or after `num_steps`.

    Args:
      first_cycle: steps of the first cycle.
      cycle_mult: each cycle is this many times as long as the one before.
      num_steps: steps of the run.

    Returns:
      Increasing steps. The exact ends first · (1 + mult + mult² + ...) are rounded one by one, so that rounding
      does not add up.
    """
    ends, length, exact = [], float(first_cycle), 0.0
    while not ends or ends[-1] < num_steps:
        exact += length
        length *= cycle_mult
        ends.append(round(exact))
    return ends


def create(schedule: ConfigDict, first_cycle: int, num_steps: int, warmup: int = 0) -> optax.Schedule:
    """Builds the function step -> learning rate that `config.schedule` names.

    Args:
      schedule: the group `schedule` of the configuration.
      first_cycle: steps of the first cycle of `sgdr`.
      num_steps: steps of the run.
      warmup: steps in which the rate rises from 0 to what the schedule says for each of them.

    Returns:
      For `sgdr` a cosine from the peak to 0 in each cycle, peaks falling by `peak_mult` (Loshchilov and Hutter
      2017; paper, section 3.1). For `step` a rate that is multiplied by `step_factor` at each of `step_boundaries`.
    """
    if warmup:
        usual, rise = create(schedule, first_cycle, num_steps), optax.linear_schedule(0.0, 1.0, warmup)
        return lambda step: rise(step) * usual(step)
    if schedule.name == "constant":
        return optax.constant_schedule(schedule.base_lr)
    if schedule.name == "cosine":
        return optax.cosine_decay_schedule(schedule.base_lr, num_steps)
    if schedule.name == "step":
        factors = dict.fromkeys(schedule.step_boundaries, schedule.step_factor)
        return optax.piecewise_constant_schedule(schedule.base_lr, factors)
    ends = cycle_ends(first_cycle, schedule.cycle_mult, num_steps)
    peaks = [schedule.base_lr * schedule.peak_mult**cycle for cycle in range(len(ends))]
    return optax.sgdr_schedule(
        {
            "init_value": peak,
            "peak_value": peak,
            "warmup_steps": 0,
            "decay_steps": end - start,
            "end_value": 0.0,
        }
        for peak, start, end in zip(peaks, [0, *ends[:-1]], ends, strict=True)
    )
