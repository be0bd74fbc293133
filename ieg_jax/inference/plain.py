"""Plain classifiers of scikit-learn, as an audit trains them, in place of a network."""

import io
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
from etils import epath

from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError, first_line


def flat(split: Split) -> np.ndarray:
    """The examples of a split in memory as `[n, D]` float32; pixels in [0, 1]."""
    found = split.images.reshape(len(split), -1)
    return found.astype(np.float32) / 255 if found.dtype == np.uint8 else found


def probabilities(model: Any, examples: np.ndarray, num_classes: int) -> np.ndarray:
    """`[n, K]` float32; classes that the classifier was not trained with have probability 0.

    Args:
      model: a fitted classifier of classes as numbers.
      examples: `[n, D]`.
      num_classes: K.
    """
    found = np.zeros((len(examples), num_classes), np.float32)
    found[:, model.classes_] = model.predict_proba(examples)
    return found


def load(file: str, num_classes: int) -> tuple[str, Callable[[Split], np.ndarray]]:
    """Loads the final classifier of an audit.

    Args:
      file: classifier.joblib. Like everything that joblib loads, it may run code: load none of a stranger.
      num_classes: K, of the run.

    Returns:
      Its name, and split -> probabilities `[n, K]` float32.

    Raises:
      UserError: for a file that cannot be read, or is of other classes.
    """
    place = epath.Path(file).expanduser()
    try:
        content = joblib.load(io.BytesIO(place.read_bytes()))
        name, model, count = content["kind"], content["model"], content["num_classes"]
    except Exception as error:  # whatever unpickling raises
        raise UserError(
            f"--classifier={file}: cannot be read ({first_line(error)}); expected classifier.joblib of an audit"
        ) from None
    if count != num_classes:
        raise UserError(f"--classifier={file}: of {count} classes, the run has {num_classes}")
    return name, lambda split: probabilities(model, flat(split), num_classes)
