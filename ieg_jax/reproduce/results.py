"""Finished runs as small JSON files, and what is made of them: mean, spread, curves.

A cell is one experiment with one seed. It is read from its work folder, `<workdir>/<experiment>/<seed>`, or from where
finished cells are kept, `<results>/<experiment>/<seed>.json`; either may be on a bucket.
"""

import dataclasses
import datetime
import json
import statistics
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ieg_jax import cli, files
from ieg_jax import config as config_lib
from ieg_jax.errors import UserError
from ieg_jax.reproduce.experiments import Experiment
from ieg_jax.runtime.workdir import WorkFolder

# Where data are, which says nothing about what they are; their fingerprint is in the work folder.
LOCATIONS = ("data.dir", "data.train", "data.test", "data.trusted", "noise.file")
# What is kept of metrics.jsonl: the beginnings of names, and how many points of each.
CURVES = ("test/accuracy", "validation/accuracy", "trusted/accuracy", "train/accuracy", "trust/", "weight/")
MAX_POINTS = 60


@dataclasses.dataclass(frozen=True)
class Store:
    """Where cells are.

    Attributes:
      workdir: parent of the work folders.
      results: folder of the finished cells that are kept; None = none are.
    """

    workdir: epath.Path
    results: epath.Path | None

    def work_folder(self, experiment: Experiment, seed: int) -> epath.Path:
        """The work folder of a run."""
        return self.workdir / experiment.name / str(seed)

    def kept_file(self, experiment: Experiment, seed: int) -> epath.Path | None:
        """The file of a finished cell."""
        return self.results / experiment.name / f"{seed}.json" if self.results is not None else None

    def find(self, experiment: Experiment, seed: int) -> dict[str, Any] | None:
        """The finished cell, from its work folder or else from where it is kept; None where it is not finished.

        Raises:
          UserError: where there is one with other settings.
        """
        folder = self.work_folder(experiment, seed)
        kept = self.kept_file(experiment, seed)
        cell = None
        if (folder / "result.json").exists():
            cell = from_work_folder(folder, seed)
            where = folder
        elif kept is not None and kept.exists():
            cell = json.loads(kept.read_text())
            where = kept
        if cell is not None:
            changed = config_lib.differences(cell["settings"], settings(load_config(experiment, seed)))
            if changed:
                raise UserError(
                    f"{where} has a run of {experiment.name} with other settings (there -> now):\n  "
                    + "\n  ".join(changed)
                    + "\nmove it away, or use another folder"
                )
        return cell

    def state(self, experiment: Experiment, seed: int) -> str:
        """`done`, `step n of N`, `not run`, or `other settings`."""
        try:
            if self.find(experiment, seed) is not None:
                return "done"
        except UserError:
            return "other settings"
        folder = self.work_folder(experiment, seed)
        if not (folder / "config.json").exists():
            return "not run"
        rows = WorkFolder(folder, writes=False).rows()
        return f"step {rows[-1]['step'] if rows else 0}"

    def keep(self, experiment: Experiment, seed: int) -> dict[str, Any]:
        """Writes the cell of a finished work folder to where cells are kept, and returns it."""
        cell = from_work_folder(self.work_folder(experiment, seed), seed)
        file = self.kept_file(experiment, seed)
        if file is not None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, dumps(cell))
        return cell


def load_config(experiment: Experiment, seed: int) -> ConfigDict:
    """The configuration of a cell, as `main` would run it."""
    config = cli.load_config(experiment.specification(seed))
    with config.unlocked():
        config.update_from_flattened_dict(experiment.keys)
    return config


def settings(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """What a configuration changes of configs/default.py, flat; without what only says where or how it is run."""
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    usual, given = flat(cli.load_config("configs/default.py").to_dict()), flat(config)
    if given["trusted.batch_size"] == given["batch_size"]:
        given["trusted.batch_size"] = 0  # a run writes down the number that 0 stands for
    for flat_config in (usual, given):  # the names of foreign sources say what they are, the folders where
        names = (source.partition(":")[0] for source in flat_config["noise.open_set"].split(","))
        flat_config["noise.open_set"] = ",".join(names)
    skipped = (*LOCATIONS, *config_lib.FREE)
    return {
        key: value
        for key, value in sorted(given.items())
        if value != usual.get(key, ...) and not key.startswith(skipped)
    }


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Flat, and as JSON has it: tuples are lists."""
    return json.loads(json.dumps(flatten_dict(config, sep=".")))


def from_work_folder(folder: epath.Path, seed: int) -> dict[str, Any]:
    """The cell of a finished work folder."""
    config = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    rows = WorkFolder(folder, writes=False).rows()
    modified = (folder / "result.json").stat().mtime
    return {
        "seed": seed,
        "date": datetime.datetime.fromtimestamp(modified, datetime.UTC).date().isoformat(),
        "settings": settings(config),
        "result": result,
        "curves": _curves(rows),
    }


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    names = sorted({name for row in rows for name in row if name.startswith(CURVES) and "/auroc" not in name})
    curves = {}
    for name in names:
        points = [[row["step"], round(row[name], 4)] for row in rows if row.get(name) is not None]
        every = -(-len(points) // MAX_POINTS)
        curves[name] = points[::-1][::every][::-1]  # the last one always
    return curves


def dumps(cell: dict[str, Any]) -> str:
    """JSON with one line for each value, so that a difference between two versions can be read."""
    lines = []
    for name, value in cell.items():
        if name in ("settings", "result", "curves"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f' "{name}": {{\n{inner}\n }}')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds, in percent; the deviation is None for one seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the values."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n − 1), as the paper's is taken to be."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


# What a table shows of a run -> where result.json has it, behind the name of what accuracy was measured on.
MEASURES = {"last": "accuracy", "best on trusted": "accuracy_best_on_trusted", "best on test": "accuracy_best"}


def spread(found: list[dict[str, Any]], measure: str = "last") -> Spread | None:
    """A measure over the seeds of one experiment; None where no seed is finished."""
    values = []
    for cell in found:
        result = cell["result"]
        value = result.get(f"{result['best_chosen_on']}_{MEASURES[measure]}")
        if value is not None:
            values.append(100 * value)
    return Spread(tuple(values)) if values else None
