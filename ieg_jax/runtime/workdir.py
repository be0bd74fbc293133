"""The files of a work folder besides checkpoints and TensorBoard events, and the rules for coming back to one."""

import json
import pathlib
import subprocess
from importlib import metadata
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files
from ieg_jax.errors import StorageError, UserError, first_line

NETWORK = "network.json"  # what a run's network is, where it is not of the registry, and what images it sees
BEST = "best"  # in place of a step


class WorkFolder:
    """A work folder, local or on a bucket: config.json, noise.json, trusted.json, metrics.jsonl, result.json."""

    def __init__(self, path: epath.PathLike, writes: bool = True):
        """Names the folder; nothing is written yet.

        Args:
          path: the folder.
          writes: False on all processes but the first: they read only.
        """
        self.path = epath.Path(path)
        self._writes = writes

    def check(self, config: ConfigDict) -> dict[str, Any] | None:
        """Makes the folder where it is missing, and looks at what is in it.

        Returns:
          The contents of result.json where the run is finished, else None.

        Raises:
          UserError: where the folder cannot be written, or holds a run with another configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("writable.json", {})
            if self._writes:
                (self.path / "writable.json").unlink()
        except (OSError, StorageError) as error:
            raise UserError(f"work folder {self.path} cannot be written: {error}") from None
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
          data: `data.load.Data.fingerprint()`.

        Raises:
          UserError: where the run was begun with other data.
        """
        old = self._read("data.json")
        changed = [] if old is None else [name for name in old.keys() | data.keys() if old.get(name) != data.get(name)]
        if changed:
            raise UserError(
                f"{self.path} holds a run that was begun with other data: its {' and '.join(sorted(changed))} examples "
                f"(ids, names, labels or pixels) were not these; restore them, or use another work folder"
            )
        self.write("config.json", json.loads(config.to_json()))
        self.write("data.json", data)

    def write_network(self, name: str | None, image_shape: tuple[int, int, int]) -> None:
        """Writes network.json: the class of a network of one's own, else None, and (H, W, C) of what it sees."""
        self.write(NETWORK, {"class": name, "image_shape": image_shape})

    def write(self, name: str, content: dict[str, Any] | list[Any]) -> None:
        """Writes a JSON file, whole or not at all."""
        if self._writes:
            files.write_json(self.path / name, content, indent=1 if isinstance(content, dict) else None)

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes an .npz file, whole or not at all."""
        if self._writes:
            files.write_arrays(self.path / name, arrays)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a line cut short by a kill is left out."""
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
        """Drops the rows after `step`, which a resumed run writes again, and returns the others."""
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if self._writes:
            files.write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, whose first key is `step`, to metrics.jsonl."""
        if self._writes:
            try:
                with (self.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise StorageError(f"{self.path / 'metrics.jsonl'} cannot be written: {first_line(error)}") from error

    def _read_text(self, name: str) -> str | None:
        path = self.path / name
        return path.read_text() if path.exists() else None

    def _read(self, name: str) -> dict[str, Any] | None:
        text = self._read_text(name)
        try:
            return None if text is None else json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path / name} is damaged ({error}); restore it or use another folder") from None


def provenance() -> dict[str, Any]:
    """Versions of the packages that matter, and the commit of this project (None outside a git checkout)."""
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
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "") if is_ours else None
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit}


def class_name(network: nn.Module) -> str:
    """What a network from outside of the registry is called in files."""
    return type(network).__name__


def check_network(folder: epath.Path, network: nn.Module | None) -> dict[str, Any] | None:
    """What network.json of a work folder says; None where there is none.

    Args:
      folder: the work folder.
      network: the one at hand, None = that of the configuration.

    Returns:
      `class`, of a network of one's own, else None, and `image_shape`, what the network sees.

    Raises:
      UserError: where it is not of the same class.
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


def best_step(folder: epath.PathLike) -> int:
    """Step of the best checkpoint that a run has kept, by its `checkpoint.best_metric`; of equal ones the last.

    Args:
      folder: the work folder.

    Raises:
      UserError: where no checkpoint was evaluated.
    """
    folder = epath.Path(folder)
    keys = json.loads((folder / "config.json").read_text())["checkpoint"]
    metric, sign = keys["best_metric"], 1 if keys["best_mode"] == "max" else -1
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    kept = sorted(int(name) for name in names if name.isdigit())
    values = {row["step"]: sign * row[metric] for row in WorkFolder(folder, writes=False).rows() if metric in row}
    candidates = [step for step in kept if step in values]
    if not candidates:
        raise UserError(
            f"{folder}: {metric} (checkpoint.best_metric) is in metrics.jsonl for none of the checkpoints "
            f"{', '.join(map(str, kept)) or '(there are none)'}; name one by its step"
        )
    return max(candidates, key=lambda step: (values[step], step))
