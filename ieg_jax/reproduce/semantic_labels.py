"""Makes semantic label noise: the mistakes of a network that was trained on few clean labels."""

import dataclasses
import json
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import inference, methods, models
from ieg_jax.data.noise import files as label_files
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError
from ieg_jax.train import schedules
from ieg_jax.train.loop import train_and_evaluate


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels that the network predicts for a training set, in ascending order of ids.

    Attributes:
      predicted: `[N]` int32, the predicted labels.
      true: `[N]` int32, the true labels; negative where they are not known.
      trained_on: `[N]` bool, whether the example is in the clean share on which the network was trained.
      class_names: `[K]`.
    """

    predicted: np.ndarray
    true: np.ndarray
    trained_on: np.ndarray
    class_names: tuple[str, ...]


def training_config(config: ConfigDict, fraction: float, model: str, overridden: Iterable[str] = ()) -> ConfigDict:
    """Returns the configuration of the training on the clean share.

    Data, batch size, standard augmentation and seeds are those of `config`. The user cannot change the method
    (`trusted_only`), the network, the trusted set (this share of each class) and that there is no noise. The rest suits
    a small training set, where the user has not set it: no strong augmentation, SGD with momentum 0.9 and weight decay
    5e-4, one cosine from 0.05, 200 passes over the share, no average of the weights, and the network at its own width.

    Args:
      config: any configuration; it is not changed.
      fraction: share of each class, in (0, 1).
      model: one of `model.name`.
      overridden: keys that the user has set, such as `schedule.base_lr`.

    Raises:
      UserError: for a fraction outside (0, 1), and for an overridden key that cannot be changed.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--fraction: got {fraction}, expected a share of the training set between 0 and 1")
    fixed = {
        "method.name": "trusted_only",
        "model.name": model,
        "trusted.source": "train",
        "trusted.fraction": fraction,
        "trusted.ids": "",
        "noise.kind": "none",
        "noise.rate": 0.0,
        "noise.selection": "bernoulli",
        "noise.file": "",
        "noise.label_set": "",
        "noise.open_set": "",
    }
    overridden = set(overridden)
    clash = sorted(fixed.keys() & overridden)
    if clash:
        raise UserError(
            f"--config.{clash[0]} cannot be set here: semantic noise comes from a network, --model, that is trained "
            f"on a clean share, --fraction; leave it out"
        )
    defaults = {
        "augment.strong": "",
        "augment.num_views": 2,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
        "optimizer.weight_decay_on": "all",
        "schedule.name": "cosine",
        **{f"schedule.{key}": value for key, value in schedules.UNSET.items()},
        "schedule.base_lr": 0.05,
        "ema.decay": 0.0,
    }
    if not {"num_train_steps", "num_train_epochs"} & overridden:
        # An epoch is one pass over the examples outside the clean share.
        defaults |= {"num_train_steps": 0, "num_train_epochs": 200 * fraction / (1 - fraction)}
    if model != config.model.name:
        # The configuration's values are meant for another network.
        defaults |= {f"model.{key}": value for key, value in models.UNSET.items()}
    config = ConfigDict(config.copy_and_resolve_references())
    methods.choose(config, "trusted_only")
    config.update_from_flattened_dict({key: value for key, value in defaults.items() if key not in overridden} | fixed)
    return config


def check_out(path: str) -> epath.Path:
    """Returns the path of the file that is to be written.

    Raises:
      UserError: where the file exists, where its folder does not, or where its suffix is neither .npy nor .json.
    """
    out = epath.Path(path).expanduser()
    if out.suffix not in (".npy", ".json"):
        raise UserError(f"--out={path}: expected a name that ends in .npy or .json")
    if out.exists():
        raise UserError(f"--out={path} exists and is not overwritten; give another name or remove it")
    if not out.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {out.parent}; make it first")
    return out


def write_labels(config: ConfigDict, workdir: str, out: str) -> str:
    """Trains the network, predicts, and writes the labels.

    Args:
      config: from `training_config`.
      workdir: folder for the training.
      out: new file, .npy or .json.

    Returns:
      A text that says what was written and how many of the labels are wrong; "" on all processes but the first.

    Raises:
      UserError: where `out` cannot be used, before anything is trained. Whatever `train.loop.train_and_evaluate` raises
        is passed on.
    """
    path = check_out(out)
    labels = make_labels(config, workdir)
    if jax.process_index():
        return ""
    label_files.write_labels(path, labels.predicted)
    return f"{path}: {summary(labels)}"


def make_labels(config: ConfigDict, workdir: str) -> Labels:
    """Trains the network, unless the work folder has it already, and predicts the labels of the training set.

    Whatever `train.loop.train_and_evaluate` raises is passed on.

    Args:
      config: from `training_config`.
      workdir: folder for the training.
    """
    train_and_evaluate(config, workdir)
    source = sources.load(config.data)
    probabilities = inference.predict(inference.load(workdir), source.train)
    clean_share = json.loads((epath.Path(workdir) / "trusted.json").read_text())["ids"]
    order = np.argsort(source.train.ids)
    return Labels(
        predicted=probabilities.argmax(-1).astype(np.int32)[order],
        true=source.train.clean_labels[order],
        trained_on=np.isin(source.train.ids, clean_share)[order],
        class_names=source.class_names or tuple(map(str, range(source.num_classes))),
    )


def summary(labels: Labels) -> str:
    """Says how many of the labels are wrong: in all, outside the clean share, and in each class."""
    known = labels.true >= 0
    wrong, unseen = labels.predicted != labels.true, known & ~labels.trained_on
    width = max(map(len, labels.class_names))
    lines = [
        f"{wrong[known].sum():,} of {known.sum():,} labels are wrong, {_share(wrong[known])}; of the {unseen.sum():,} "
        f"examples that the network was not trained on {_share(wrong[unseen])}"
    ]
    for label, name in enumerate(labels.class_names):
        lines.append(f"  {name:{width}}  {_share(wrong[labels.true == label]):>7}")
    return "\n".join(lines)


def _share(wrong: np.ndarray) -> str:
    """Formats the share of true values in percent."""
    return f"{100 * wrong.mean():.1f} %" if len(wrong) else "– %"
