"""Weights & Biases beside TensorBoard: the same metrics, histograms and pictures, and the whole configuration.

`Tracker` is a writer like those of CLU. Process 0 alone has one, where `wandb.project` is set. The id of the run there
is kept in the work folder, so that a run that goes on goes on there too. Nothing else imports wandb.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files
from ieg_jax.config import Check
from ieg_jax.errors import UserError, first_line
from ieg_jax.runtime.progress import Reporter
from ieg_jax.runtime.workdir import WorkFolder

ID = "wandb.json"  # of the work folder
MODES = ("", "online", "offline")
FORBIDDEN = "\\#?%:"  # in the name of a project
LONGEST_FINISH = 60.0  # seconds that the end of a run waits until everything is uploaded
_CHECKS = {
    "project": Check(
        lambda value: not value or (value.count("/") < 2 and all(value.split("/")) and not set(value) & set(FORBIDDEN)),
        f"a project or team/project, without any of {FORBIDDEN}",
    ),
    "mode": Check(lambda value: value in MODES, "online, offline, or '' (as WANDB_MODE says)", MODES),
}


def validate(config: ConfigDict) -> None:
    """Checks the group `wandb` of a configuration, and that the package is installed where it is asked for.

    Raises:
      UserError: naming the key, the value and what is allowed, or how to install it.
    """
    config_lib.check_values(config.wandb, _CHECKS, "wandb.")
    for name in ("name", "mode"):
        if config.wandb[name] and not config.wandb.project:
            raise UserError(f"wandb.{name}={config.wandb[name]!r}, but wandb.project is '', so that nothing reads it")
    if config.wandb.project and not _is_installed():
        raise UserError(
            f"wandb.project={config.wandb.project!r}, but wandb is not installed: pip install 'ieg_jax[wandb]', or set "
            f"wandb.project to ''"
        )


def check_login(config: ConfigDict) -> None:
    """Raises UserError where a run is to be sent to W&B and nobody is logged in. It asks neither there nor the user."""
    mode = config.wandb.mode or os.environ.get("WANDB_MODE", "online")
    if not config.wandb.project or jax.process_index() or mode not in ("online", "run"):
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            f"wandb.project={config.wandb.project!r}, but nobody is logged in to W&B: run `wandb login`, set "
            f"WANDB_API_KEY, or set wandb.mode to 'offline'"
        )


def start(config: ConfigDict, folder: WorkFolder, goes_on: bool, reporter: Reporter) -> Tracker | None:
    """Begins a run at W&B, or goes on with that whose id is in the work folder.

    Args:
      config: of the run.
      folder: of the run.
      goes_on: whether there is a checkpoint from which it goes on. It is then not stopped by trouble with W&B.
      reporter: is told where the run can be seen, and of trouble.

    Returns:
      None on all processes but the first, and where `wandb.project` is not set.

    Raises:
      UserError: where W&B cannot be reached, or refuses, at the beginning of a run.
    """
    if not config.wandb.project or jax.process_index():
        return None
    import wandb

    team, _, project = config.wandb.project.rpartition("/")
    place = folder.path / ID
    run_id = json.loads(place.read_text())["id"] if place.exists() else secrets.token_hex(4)
    folder.write(ID, {"id": run_id})
    try:
        run = wandb.init(
            entity=team or None,
            project=project,
            name=config.wandb.name or folder.path.name,
            id=run_id,
            resume="allow",
            mode=config.wandb.mode or None,
            dir=None if files.is_remote(folder.path) else str(folder.path),
            # A run of its own, whatever others there are in this process; what is printed here stays here.
            settings=wandb.Settings(reinit="create_new", console="off", silent=True, finish_timeout=LONGEST_FINISH),
        )
        run.config.update(config_lib.flatten(config.to_dict()), allow_val_change=True)
    except Exception as error:  # whatever wandb raises
        if goes_on:
            reporter.warn(f"goes on without W&B: {first_line(error)}")
            return None
        raise UserError(
            f"wandb.project={config.wandb.project!r}: W&B said {first_line(error)}; set wandb.mode to 'offline', or "
            f"wandb.project to ''"
        ) from error
    reporter.say(f"for `wandb sync`: {os.path.dirname(run.dir)}" if run.offline else f"W&B has it at {run.url}")
    return Tracker(run, wandb, reporter.warn)


class Tracker:
    """Writes to a run at W&B what CLU's writers write for TensorBoard.

    The first error that wandb raises ends that, with a warning: the training goes on.
    """

    def __init__(self, run: Any, wandb: Any, warn: Callable[[str], None]):
        """Wraps a run.

        Args:
          run: from `wandb.init`.
          wandb: the package.
          warn: is told of the first error.
        """
        self._run, self._wandb, self._warn = run, wandb, warn
        self._first = run.starting_step  # what comes before it is there already, from before a restart

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics: name -> value."""
        self._log(step, lambda: dict(scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures: name -> `[H, W, 3]` uint8."""
        self._log(step, lambda: {name: self._wandb.Image(image) for name, image in images.items()})

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Any = None) -> None:
        """Writes how numbers are distributed: name -> `[n]`."""
        del num_buckets
        self._log(step, lambda: {name: self._wandb.Histogram(array) for name, array in arrays.items()})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: the configuration is there from the start."""

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None:
        """Does nothing: these are TensorBoard's own."""

    def flush(self) -> None:
        """Does nothing: wandb sends what it has by itself."""

    def close(self) -> None:
        """Ends the run there, or leaves it after a while; what was not uploaded is in its folder."""
        self._attempt(lambda: self._run.finish())
        self._run = None

    def _log(self, step: int, make: Callable[[], dict[str, Any]]) -> None:
        if step >= self._first:
            self._attempt(lambda: self._run.log(make(), step=step))

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # whatever wandb raises
            self._run = None
            self._warn(f"nothing more is written to W&B: {first_line(error)}")


def _is_installed() -> bool:
    """Whether there is the package; a folder of this name, as wandb makes where it runs, is a module without origin."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None
