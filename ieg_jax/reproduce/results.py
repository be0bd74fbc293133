"""Finds finished runs, keeps them as small JSON files, and computes mean and spread over the seeds.

A finished run is one experiment that was trained with one seed. It is a dict with its `seed`, the `date` on which it
was finished, its `settings` (see `settings`), its `result` (the contents of result.json) and its `curves` (the name of
a metric -> a list of [step, value]); where it is kept, `labels` names what it has learnt from (see `_keep_labels`). It
is read from its work folder, `<workdir>/<experiment>/<seed>`, or from the file
`<results>/<experiment>/<seed>.json`, where it was kept; either may be on a bucket.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import statistics
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ieg_jax import cli, files, methods, models
from ieg_jax import config as config_lib
from ieg_jax.errors import UserError
from ieg_jax.reproduce.experiments import Experiment
from ieg_jax.runtime import claim
from ieg_jax.runtime.workdir import WorkFolder

# Keys that say where the data are. The same data may be elsewhere the next time.
LOCATIONS = ("data.dir", "data.train", "data.test", "data.trusted", "noise.file")
# Metrics whose names begin like this are kept, each with at most so many points.
CURVES = ("test/accuracy", "validation/accuracy", "trusted/accuracy", "train/accuracy", "trust/", "weight/")
MAX_POINTS = 60
LABELS = "labels"  # folder beside the runs that are kept


@dataclasses.dataclass(frozen=True)
class Store:
    """The places where runs are.

    Attributes:
      workdir: parent of the work folders.
      results: folder in which finished runs are kept; None = they are not kept.
    """

    workdir: epath.Path
    results: epath.Path | None

    def work_folder(self, experiment: Experiment, seed: int) -> epath.Path:
        """Returns the work folder of a run."""
        return self.workdir / experiment.name / str(seed)

    def kept_file(self, experiment: Experiment, seed: int) -> epath.Path | None:
        """Returns the file in which a finished run is kept; None where runs are not kept."""
        return self.results / experiment.name / f"{seed}.json" if self.results is not None else None

    def find(self, experiment: Experiment, seed: int) -> dict[str, Any] | None:
        """Returns a finished run, from its work folder or else from where it is kept; None where it is not finished.

        Raises:
          UserError: where the run that is there has other settings than the experiment.
        """
        folder = self.work_folder(experiment, seed)
        kept = self.kept_file(experiment, seed)
        if (folder / "result.json").exists():
            finished, where = from_work_folder(folder, seed), folder
        elif kept is not None and kept.exists():
            finished, where = json.loads(kept.read_text()), kept
        else:
            return None
        there, now = without_unread(finished["settings"]), settings(load_config(experiment, seed))
        changed = config_lib.differences(there, now)
        if changed:
            raise UserError(
                f"{where} has a run of {experiment.name} with other settings (there -> now):\n  "
                + "\n  ".join(changed)
                + "\nmove it away, or use another folder"
            )
        return finished

    def stage(self, experiment: Experiment, seed: int) -> str:
        """Says by its files alone what a run is, wherever it takes place.

        Returns:
          `done`, `running`, `queued` (submitted to a cluster, and not begun), `failed`, `stopped` (also of a run that
          died without a word), or `not run`.

        Raises:
          UserError: see `find`.
        """
        if self.find(experiment, seed) is not None:
            return "done"
        folder = self.work_folder(experiment, seed)
        return claim.sign_of_life(folder) or ("stopped" if (folder / "config.json").exists() else "not run")

    def state(self, experiment: Experiment, seed: int) -> str:
        """Says for people how far a run is: its stage with the last logged step, or `other settings`."""
        try:
            stage = self.stage(experiment, seed)
        except UserError:
            return "other settings"
        folder = self.work_folder(experiment, seed)
        if stage in ("done", "queued", "not run"):
            error = claim.last_error(folder) if stage == "queued" else ""
            return f"queued again after {error}" if error else stage
        rows = WorkFolder(folder, writes=False).rows()
        step = f"step {rows[-1]['step'] if rows else 0}"
        if stage == "failed":
            return f"failed at {step} ({claim.last_error(folder)})"
        return step if stage == "stopped" else f"{stage}, {step}"

    def keep(self, experiment: Experiment, seed: int) -> dict[str, Any]:
        """Writes the finished run in a work folder to where runs are kept, unless there is one, and returns it."""
        finished = from_work_folder(self.work_folder(experiment, seed), seed)
        file = self.kept_file(experiment, seed)
        if file is not None and not file.exists():
            finished["labels"] = _keep_labels(self.work_folder(experiment, seed), self.results / LABELS)
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write(file, dumps(finished))
        return finished

    def is_to_be_kept(self, experiment: Experiment, seed: int) -> bool:
        """Whether a work folder has a finished run that is not kept yet, as one has that ran elsewhere."""
        file = self.kept_file(experiment, seed)
        return file is not None and not file.exists() and (self.work_folder(experiment, seed) / "result.json").exists()


def store(workdir: str, kept: str, tiny: bool = False) -> Store:
    """The places that the flags name: `kept` = "" keeps nothing, and nothing of runs that are `tiny` is kept."""
    if tiny:
        return Store(epath.Path(workdir) / "tiny", None)
    return Store(epath.Path(workdir), epath.Path(kept) if kept else None)


def _keep_labels(folder: epath.Path, place: epath.Path) -> str:
    """Keeps what makes another training see the same labels and the same trusted examples; returns how it is named.

    It is named by its contents, so runs with one name have learnt from the same: `NAME/noisy_labels.npy` for
    `noise.file`, `NAME/trusted.json` for `trusted.ids`. Labels that people gave are left to their publishers.
    """
    trusted = (folder / "trusted.json").read_text()
    given, buffer = folder / "noisy_labels.json", io.BytesIO()
    if given.exists():
        labels = np.array(files.read_json(given))
        np.save(buffer, labels.astype(np.min_scalar_type(labels.max())))
    name = hashlib.sha256(buffer.getvalue() + trusted.encode()).hexdigest()[:16]
    if not (place / name / "trusted.json").exists():
        (place / name).mkdir(parents=True, exist_ok=True)
        if given.exists() and files.read_json(folder / "config.json")["noise"]["kind"] != "human":
            files.write(place / name / "noisy_labels.npy", buffer.getvalue())
        files.write(place / name / "trusted.json", trusted)
    return name


def load_config(experiment: Experiment, seed: int) -> ConfigDict:
    """Returns the configuration of an experiment with one seed, as `ieg_jax.main` would run it."""
    config = cli.load_config(experiment.specification(seed))
    with config.unlocked():
        config.update_from_flattened_dict(experiment.keys)
    return config


def settings(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Returns the keys whose values differ from configs/default.py, flat.

    Left out are keys that only say where the data are or how the run is computed, and keys that nothing reads.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    usual, given = flat(cli.load_config("configs/default.py").to_dict()), flat(config)
    if given["trusted.batch_size"] == given["batch_size"]:
        given["trusted.batch_size"] = 0  # a run writes the number for which 0 stands into its config.json
    for flat_config in (usual, given):  # of a source of foreign images, `name` or `name:folder`, only the name counts
        names = (source.partition(":")[0] for source in flat_config["noise.open_set"].split(","))
        flat_config["noise.open_set"] = ",".join(names)
    skipped = (*LOCATIONS, *config_lib.FREE)
    changed = {
        key: value
        for key, value in sorted(given.items())
        if value != usual.get(key, ...) and not key.startswith(skipped)
    }
    return without_unread(changed)


def without_unread(changed: dict[str, Any]) -> dict[str, Any]:
    """Leaves out keys of `method`, `meta` and `model` that the method and the network do not read: they change nothing.

    Configurations once set such keys whatever the method was, and runs that were kept then have them.

    Args:
      changed: settings, flat; `method.name` and `model.name` are missing where they have their defaults.
    """
    usual = flat(cli.load_config("configs/default.py").to_dict())
    method, network = (changed.get(key, usual[key]) for key in ("method.name", "model.name"))
    unread = set()
    if method in methods.REGISTRY:
        reads = {"method.name", *methods.get(method).keys}
        unread |= {key for key in changed if key.startswith(("method.", "meta.")) and key not in reads}
    if network in models.REGISTRY:
        unread |= {f"model.{key}" for key in models.UNSET if key not in models.REGISTRY[network].READS}
    return {key: value for key, value in changed.items() if key not in unread}


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as a flat dict, with lists in place of tuples as in JSON."""
    return json.loads(json.dumps(flatten_dict(config, sep=".")))


def from_work_folder(folder: epath.Path, seed: int) -> dict[str, Any]:
    """Returns the finished run in a work folder."""
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
    """Returns the curves of a run, with at most MAX_POINTS points each.

    Args:
      rows: the rows of metrics.jsonl.
    """
    names = sorted({name for row in rows for name in row if name.startswith(CURVES) and "/auroc" not in name})
    curves = {}
    for name in names:
        points = [[row["step"], round(row[name], 4)] for row in rows if row.get(name) is not None]
        every = -(-len(points) // MAX_POINTS)
        curves[name] = points[::-1][::every][::-1]  # counted from the end, so that the last point is kept
    return curves


def dumps(finished: dict[str, Any]) -> str:
    """Returns a finished run as JSON with one line for each value, so that people can read a diff of two versions."""
    lines = []
    for name, value in finished.items():
        if name in ("settings", "result", "curves"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f' "{name}": {{\n{inner}\n }}')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@dataclasses.dataclass(frozen=True)
class Spread:
    """The values of one measure over the seeds, in percent."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n − 1), which the paper's is assumed to be; None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


# What tables show of a run -> its key in result.json, without the name of the set on which accuracy was measured.
MEASURES = {"last": "accuracy", "best on trusted": "accuracy_best_on_trusted", "best on test": "accuracy_best"}


def spread(found: list[dict[str, Any]], measure: str = "last") -> Spread | None:
    """Collects a measure over the seeds of one experiment.

    Args:
      found: the finished runs of the experiment.
      measure: one of MEASURES.

    Returns:
      None where no run has the measure.
    """
    values = []
    for run in found:
        result = run["result"]
        value = result.get(f"{result['best_chosen_on']}_{MEASURES[measure]}")
        if value is not None:
            values.append(100 * value)
    return Spread(tuple(values)) if values else None
