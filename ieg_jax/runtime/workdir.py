"""Reads and writes the files of a work folder, and decides whether a run may go on in it.

Checkpoints and the events for TensorBoard, which are in it too, are written elsewhere.
"""

import json
import pathlib
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint.utils import is_checkpoint_finalized

from ieg_jax import config as config_lib
from ieg_jax import files
from ieg_jax.errors import StorageError, UserError, first_line

NETWORK = "network.json"  # the class of a network that is not in the registry, and the shape of the images
BEST = "best"  # stands for the step of the best checkpoint, see `best_step`
SECONDS_BETWEEN_WRITES = 60.0  # of metrics.jsonl on a bucket
RATE = "evaluation/learning_rate"  # of the update before an evaluation


class WorkFolder:
    """A work folder, local or on a bucket: config.json, noise.json, trusted.json, metrics.jsonl, result.json."""

    def __init__(self, path: epath.PathLike, writes: bool = True):
        """Names the folder; nothing is read or written yet.

        Args:
          path: the folder, local or on a bucket.
          writes: False = all methods that write do nothing, as on all processes but the first.
        """
        self.path = epath.Path(path).expanduser()
        self._writes = writes
        # Of metrics.jsonl on a bucket, where nothing can be added to a file: all of it, and since when it waits.
        self._lines: list[str] | None = None
        self._written = time.monotonic()

    def check(self, config: ConfigDict) -> dict[str, Any] | None:
        """Makes the folder where it is missing, and checks that a run with this configuration may go on in it.

        Returns:
          The contents of result.json where the run is finished, else None.

        Raises:
          UserError: where the folder cannot be written, or has a run with another configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("writable.json", {})
            if self._writes:
                (self.path / "writable.json").unlink()
        except (*files.storage_errors(), StorageError) as error:
            raise UserError(f"work folder {self.path} cannot be written: {first_line(error)}") from None
        old = self._read("config.json")
        if old is None:
            if any((self.path / name).exists() for name in ("metrics.jsonl", "result.json", "checkpoints")):
                raise UserError(f"{self.path} holds a run but no config.json; use another work folder")
            return None
        changed = config_lib.differences(old, json.loads(config.to_json()))
        if changed:
            raise UserError(
                f"{self.path} holds a run with another configuration (there -> now):\n  "
                + "\n  ".join(changed)
                + "\nuse another work folder, or the same configuration"
            )
        return self._read("result.json")

    def begin(self, config: ConfigDict, data: dict[str, str]) -> None:
        """Claims the folder for a run by writing config.json and data.json.

        Args:
          config: of the run.
          data: from `data.load.Data.fingerprint`, name of a split -> hash.

        Raises:
          UserError: see `check_data`.
        """
        self.check_data(data)
        self.write("config.json", json.loads(config.to_json()))
        self.write("data.json", data)

    def check_data(self, data: dict[str, str]) -> None:
        """Raises UserError where the folder has a run that was begun with other data, from `Data.fingerprint`."""
        old = self._read("data.json")
        changed = [] if old is None else [name for name in old.keys() | data.keys() if old.get(name) != data.get(name)]
        if changed:
            raise UserError(
                f"{self.path} holds a run that was begun with other data: its {' and '.join(sorted(changed))} examples "
                f"(ids, names, labels or pixels) were not these; restore them, or use another work folder"
            )

    def write_network(
        self, name: str | None, image_shape: tuple[int, int, int], features: Mapping[str, Any] | None = None
    ) -> None:
        """Writes network.json.

        Args:
          name: the class of a network that is not in the registry; None for one of the registry.
          image_shape: (H, W, C) of the images that the network sees.
          features: how these were made of images (`data.features.Features.to_json`); None where they were not.

        Raises:
          UserError: where the folder has a run on features of another backbone.
        """
        about, there = features and features["about"], (self._read(NETWORK) or {}).get("features")
        if there and there["about"] != about:
            raise UserError(
                f"{self.path} holds a run on features of another backbone: there {there['about']}, now {about}; "
                f"restore its weights, or use another work folder"
            )
        content = {"class": name, "image_shape": image_shape}
        self.write(NETWORK, content | ({"features": features} if features else {}))

    def write(self, name: str, content: dict[str, Any] | list[Any]) -> None:
        """Writes a JSON file, whole or not at all."""
        if self._writes:
            files.write_json(self.path / name, content, indent=1 if isinstance(content, dict) else None)

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes an .npz file, whole or not at all."""
        if self._writes:
            files.write_arrays(self.path / name, arrays)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl. A last line that is incomplete, because the run was killed, is left out.

        Raises:
          UserError: where another line is damaged.
        """
        rows, lines = [], (self._read_text("metrics.jsonl") or "").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise UserError(
                        f"{self.path / 'metrics.jsonl'}, line {number}, is damaged ({error}); mend or remove it"
                    ) from None
        return rows

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Removes the rows after `step`, which a run that goes on there writes again, and returns the others."""
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if self._writes:
            lines = [json.dumps(row) + "\n" for row in kept]
            files.write(self.path / "metrics.jsonl", "".join(lines))
            self._lines = lines if files.is_remote(self.path) else None
        return kept

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl; its first key is `step`.

        On a bucket the file is written anew, once a minute at most and where `flush` asks for it.

        Raises:
          StorageError: where it cannot be written.
        """
        if self._lines is not None:
            self._lines.append(json.dumps(row) + "\n")
            if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
                self.flush()
        elif self._writes:
            try:
                with (self.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except files.storage_errors() as error:
                raise StorageError(f"{self.path / 'metrics.jsonl'} cannot be written: {first_line(error)}") from error

    def flush(self) -> None:
        """Writes the rows that wait. A checkpoint covers the rows before it, so this comes before each.

        Raises:
          StorageError: where they cannot be written.
        """
        if self._lines is not None:
            files.write(self.path / "metrics.jsonl", "".join(self._lines))
            self._written = time.monotonic()

    def _read_text(self, name: str) -> str | None:
        """Returns the text of a file; None where it does not exist."""
        path = self.path / name
        return path.read_text() if path.exists() else None

    def _read(self, name: str) -> dict[str, Any] | None:
        """Returns the contents of a JSON file; None where it does not exist. Raises UserError where it is damaged."""
        path = self.path / name
        return files.read_json(path) if path.exists() else None


def provenance() -> dict[str, Any]:
    """Returns the `versions` of packages on which results depend, and the `commit` of this project.

    The version of a package that is not installed is None, and so is the commit outside of a git checkout. The commit
    ends in `+changes` where the package or the configurations differ from it.
    """
    names = ("ieg_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "clu", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None

    def git(*arguments: str) -> str:
        root = pathlib.Path(__file__).parents[2]
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        is_ours = "ieg_jax/__init__.py" in git("ls-files", "ieg_jax/__init__.py")
        changes = git("status", "--porcelain", "--", "ieg_jax", "configs")
        commit = git("rev-parse", "HEAD") + ("+changes" if changes else "") if is_ours else None
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit}


def class_name(network: nn.Module) -> str:
    """Returns how files call a network that is not in the registry: by its class, of Flax NNX by that of its kind."""
    return getattr(getattr(network, "nnx_class", None), "__name__", type(network).__name__)


def check_network(folder: epath.Path, network: nn.Module | None) -> dict[str, Any] | None:
    """Checks that a network is of the class that network.json of a work folder names.

    Args:
      folder: the work folder.
      network: the network that is at hand; None = that of the configuration.

    Returns:
      The contents of network.json: `class`, of a network that is not in the registry, else None; and `image_shape`,
      (H, W, C) of the images that the network sees. None where there is no such file.

    Raises:
      UserError: where the network is of another class.
    """
    if not (folder / NETWORK).exists():
        return None
    about = json.loads((folder / NETWORK).read_text())
    wanted, got = about["class"], None if network is None else class_name(network)
    if wanted != got:
        raise UserError(
            f"{folder} was trained with {f'the network {wanted}' if wanted else 'the network of its configuration'}, "
            f"and here it is {got or 'that of the configuration'}; give network={f'{wanted}(...)' if wanted else None}"
        )
    return about


def rank(row: dict[str, Any], metric: str, sign: int = 1) -> tuple[float, float, int]:
    """How good a row of metrics.jsonl is, as a key to sort by, whose last item is the step.

    First comes `sign` · `metric`; of equal rows that with the lowest learning rate is better, and of these the later: a
    small trusted set is often classified without error from early on, when the network has not learnt much yet.
    """
    return sign * row[metric], -row.get(RATE, 0.0), row["step"]


def saved_steps(folder: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints in `folder`, `checkpoints/` of a work folder, in order.

    On a bucket a checkpoint has its name before it is complete, so Orbax is asked.
    """
    folder = epath.Path(folder)
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return sorted(int(path.name) for path in paths if is_checkpoint_finalized(path))


def reported_step(folder: epath.PathLike) -> int | None:
    """Returns the step whose accuracy result.json reports, where its checkpoint is there; else None."""
    folder = epath.Path(folder)
    if not (folder / "result.json").exists():
        return None
    step = files.read_json(folder / "result.json").get("reported", {}).get("step")
    return step if step in saved_steps(folder / "checkpoints") else None


def best_step(folder: epath.PathLike) -> int:
    """Returns the step of the best checkpoint that a run has kept, by `checkpoint.best_metric`; see `rank`.

    Args:
      folder: the work folder.

    Raises:
      UserError: where metrics.jsonl has this metric for none of the checkpoints.
    """
    folder = epath.Path(folder)
    keys = files.read_json(folder / "config.json")["checkpoint"]
    metric, sign = keys["best_metric"], 1 if keys["best_mode"] == "max" else -1
    kept = saved_steps(folder / "checkpoints")
    rows = WorkFolder(folder, writes=False).rows()
    candidates = [rank(row, metric, sign) for row in rows if metric in row and row["step"] in kept]
    if not candidates:
        raise UserError(
            f"{folder}: {metric} (checkpoint.best_metric) is in metrics.jsonl for none of the checkpoints "
            f"{', '.join(map(str, kept)) or '(there are none)'}; name one by its step"
        )
    return max(candidates)[-1]
