"""A rehearsal: compiles the step of a run and makes a few, to know how long the run will take here."""

import dataclasses
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.data.batches import train_batches
from ieg_jax.data.features import Trial, try_out
from ieg_jax.data.load import Data, uses_backbone
from ieg_jax.data.splits import Split
from ieg_jax.models import convolution
from ieg_jax.runtime import mesh
from ieg_jax.runtime.progress import TIMED, duration_text
from ieg_jax.train import durations, program

LONGEST_STEP = 20.0  # seconds; on a processor, slower steps are judged by their operations alone
SIDE = 1024  # of the matrices by whose product the speed of a processor is judged


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What came out.

    Attributes:
      num_steps: of the whole run.
      step_seconds: of one, without evaluation and checkpoints.
      compile_seconds: None where the step was too slow to be tried; `step_seconds` is then a lower bound.
      features: of a backbone, what they take; None without one.
    """

    num_steps: int
    step_seconds: float
    compile_seconds: float | None
    features: Trial | None = None

    def __str__(self) -> str:
        if self.features is None:
            return self._of_training()
        seconds = duration_text(self.features.seconds)
        return f"features of {self.features.count:,} images: about {seconds} here, once\n{self._of_training()}"

    def _of_training(self) -> str:
        total = duration_text(self.num_steps * self.step_seconds)
        if self.compile_seconds is None:
            return (
                f"training: {self.num_steps:,} steps would take more than {total} here, by the number of their "
                f"operations; a smaller network, smaller images, or an accelerator"
            )
        return (
            f"training: {self.num_steps:,} steps of {self.step_seconds:.2g} s, about {total} here, after "
            f"{duration_text(self.compile_seconds)} of compilation; evaluation and checkpoints come on top"
        )


def rehearse(config: ConfigDict, data: Data) -> Rehearsal:
    """Compiles the training step and times TIMED of them, with batches as in training; nothing is written.

    Args:
      config: of the run.
      data: that it names; of a run on features of a backbone its images (`data.features.without`).

    Raises:
      UserError: for what training would refuse.
    """
    made = None
    if uses_backbone(config) and not data.train.is_features:
        made = try_out(data.splits, config.backbone)
        data = _with_random_features(data, made.width)
    return dataclasses.replace(_of_steps(config, data), features=made)


def _with_random_features(data: Data, width: int) -> Data:
    """The data with numbers in place of the images: what a step takes does not depend on them."""
    rng = np.random.default_rng(0)

    def changed(split: Split | None) -> Split | None:
        if split is None:
            return None
        return dataclasses.replace(split, images=rng.standard_normal((len(split), 1, 1, width), np.float32))

    parts = {name: changed(getattr(data, name)) for name in ("train", "trusted", "held_out", "evaluation")}
    return dataclasses.replace(data, image_size=0, **parts)


def _of_steps(config: ConfigDict, data: Data) -> Rehearsal:
    """What the training takes, see `rehearse`."""
    config = config_lib.resolve(config, data.facts)
    shardings = mesh.create(config)
    steps = durations.in_steps(config, len(data.train))
    built = program.build(config, shardings, program.data_shape(config, data), steps)
    if jax.devices()[0].platform == "cpu":
        fastest = convolution.flops(built.lowered_step) / _operations_per_second()
        if fastest > LONGEST_STEP:
            return Rehearsal(steps.num_steps, fastest, None)
    began = time.monotonic()
    train_step = built.compiled_step()
    compile_seconds = time.monotonic() - began
    rng = jax.device_put(jax.random.key(0), shardings.replicated)
    state, window = built.init(rng), built.empty_window()
    batches = train_batches(config, data, built.method.streams, 0, TIMED + 1, shardings.batch)
    for number in range(TIMED + 1):  # the first one begins slowly
        state, window = train_step(state, window, next(batches), rng)
        if number == 0:
            jax.block_until_ready(window)
            began = time.monotonic()
    jax.block_until_ready(window)
    return Rehearsal(steps.num_steps, (time.monotonic() - began) / TIMED, compile_seconds)


def _operations_per_second() -> float:
    """Of a large product of matrices, about the fastest that this processor does anything."""
    matrix = np.ones((SIDE, SIDE), np.float32)
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best
