"""The durations of a run in steps: how long it is, and when it logs, evaluates and saves."""

import dataclasses

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.train import schedules


@dataclasses.dataclass(frozen=True)
class Durations:
    """The durations of a run, in steps."""

    num_steps: int
    log_every: int
    checkpoint_every: int
    first_cycle: int
    cycle_ends: frozenset[int]  # of the learning rate; empty unless it restarts
    eval_steps: frozenset[int]
    picture_steps: frozenset[int]  # the first logged ones from each regular evaluation on
    batch_size: int
    num_examples: int

    def epoch(self, step: int) -> int:
        """Epochs that are over after so many steps. An epoch may end inside a batch."""
        return step * self.batch_size // self.num_examples

    def ends_epoch(self, step: int) -> bool:
        """Whether the last example of an epoch is in the batch of a step, counted from 1."""
        return self.epoch(step) > self.epoch(step - 1)

    def epoch_start(self, step: int) -> int:
        """The last step up to this one that ends an epoch; 0 = none does."""
        return -(-self.epoch(step) * self.num_examples // self.batch_size)

    def logs(self, step: int) -> bool:
        """Whether metrics are logged after a step."""
        return step % self.log_every == 0 or step == self.num_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is saved after a step."""
        return step % self.checkpoint_every == 0 or step in (self.num_steps, self.reported)

    @property
    def reported(self) -> int:
        """The step whose accuracy is the run's: where the last whole cycle of the learning rate ends, else the last.

        In the middle of a cycle the rate is high and the weights are far from where it leads (paper, section 3.1:
        "we directly select models at the lowest learning rate before 200 epochs").
        """
        return max(self.cycle_ends, default=self.num_steps)


def validate(config: ConfigDict) -> None:
    """Raises UserError for a duration that is given neither in steps nor in epochs, or in both."""
    for name in config_lib.DURATIONS:
        config_lib.check_duration(config, name)


def share_of_steps(config: ConfigDict) -> float:
    """How many of the steps of `num_train` the method has: all, or as many as cost what these do in plain training."""
    if config.budget == "steps":
        return 1.0
    return methods.get("supervised").passes(config) / methods.get(config.method.name).passes(config)


def in_steps(config: ConfigDict, num_examples: int) -> Durations:
    """Turns the durations of the configuration into steps.

    Args:
      config: the configuration, resolved.
      num_examples: N; one epoch is N / batch_size steps.
    """
    steps_per_epoch = num_examples / config.batch_size
    in_steps = {name: config_lib.duration(config, name, steps_per_epoch) for name in config_lib.DURATIONS}
    num_steps = max(1, round(in_steps["num_train"] * share_of_steps(config)))
    first_cycle = in_steps["schedule.first_cycle"]
    log_every = in_steps["log_every"]
    ends = set()
    if config.schedule.name == "sgdr":
        cycle_ends = schedules.cycle_ends(first_cycle, config.schedule.cycle_mult, num_steps)
        ends = {end for end in cycle_ends if end <= num_steps}
    regular = set(range(in_steps["eval_every"], num_steps + 1, in_steps["eval_every"]))
    return Durations(
        num_steps=num_steps,
        log_every=log_every,
        checkpoint_every=in_steps["checkpoint_every"],
        first_cycle=first_cycle,
        cycle_ends=frozenset(ends),
        eval_steps=frozenset(regular | ends | {num_steps}),
        picture_steps=frozenset(min(-(-step // log_every) * log_every, num_steps) for step in regular | {num_steps}),
        batch_size=config.batch_size,
        num_examples=num_examples,
    )
