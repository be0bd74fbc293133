"""What a user hands to the classifier, checked: examples and labels as arrays, numbers, keys of the configuration.

Every refusal is a UserError, which is a ValueError, that says what was got and what was expected.
"""

import numbers
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from sklearn.utils import check_random_state
from sklearn.utils.validation import column_or_1d

from ieg_jax import config as config_lib
from ieg_jax.data.splits import check_images_and_labels
from ieg_jax.errors import UserError, check_choice


def is_images(X) -> bool:
    """Whether X has the dimensions of images; what is neither is left to scikit-learn's message about features."""
    return (X if hasattr(X, "ndim") else np.asarray(X)).ndim in (3, 4)


def check_kind(y) -> None:
    """Raises UserError for labels of which some are missing, or some are text and others numbers."""
    labels = np.asarray(y)
    if labels.dtype != object or labels.ndim != 1:
        return
    missing = [row for row, label in enumerate(labels) if label is None or label != label]
    if missing:
        raise UserError(f"y: no label at place {missing[0]} ({labels[missing[0]]!r}); expected one for each example")
    texts = np.array([isinstance(label, str) for label in labels])
    if 0 < texts.sum() < len(texts):
        text, other = labels[np.argmax(texts)], labels[np.argmin(texts)]
        raise UserError(
            f"y: the label {text!r} at place {np.argmax(texts)} is text and {other!r} at place {np.argmin(texts)} is "
            f"not; expected all of one kind"
        )


def pixels(X: np.ndarray, where: str) -> np.ndarray:
    """Images `[n, H, W, C]`, uint8 or float32 in [0, 1]."""
    images = X[..., None] if X.ndim == 3 else X
    if images.dtype.kind in "iu" and images.dtype != np.uint8:
        if images.size and not (images.min() >= 0 and images.max() <= 255):
            raise UserError(f"{where}: integers from {images.min()} to {images.max()}, expected 0 to 255")
        images = images.astype(np.uint8)
    check_images_and_labels(images, np.zeros(len(images), np.int32), where, 2)
    if images.shape[1:3] == (1, 1):
        raise UserError(f"{where}: shape {X.shape}, images of one pixel; give features as [n, D]")
    return images if images.dtype == np.uint8 else images.astype(np.float32)


def rows(trusted, length: int) -> np.ndarray:
    """The argument `trusted` of `fit` as a mask `[N]`."""
    mask = np.zeros(length, bool)
    if trusted is None:
        return mask
    rows = np.asarray(trusted)
    is_mask = rows.dtype == bool and rows.shape == (length,)
    is_list = rows.dtype.kind in "iu" and rows.ndim == 1 and ((rows >= 0) & (rows < length)).all()
    if not (is_mask or is_list):
        raise UserError(
            f"trusted: shape {rows.shape}, dtype {rows.dtype}, expected a mask of bool ({length},), or row numbers "
            f"from 0 to {length - 1}"
        )
    mask[rows] = True
    return mask


def as_numbers(y: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Trusted labels as places in `names`, the classes of y."""
    unknown = y[~np.isin(y, names)]
    if len(unknown):
        raise UserError(
            f"y_trusted: label {unknown[0]!r} is none of y, whose classes are {_shown(names)}; write it as y does, or "
            f"leave these examples out"
        )
    absent = names[~np.isin(names, y)]
    if len(absent):
        raise UserError(
            f"no trusted example of {_shown(absent)}, expected at least one of each of the {len(names)} classes of y; "
            f"check a few examples of these"
        )
    return np.searchsorted(names, y.astype(names.dtype))


def given_numbers(given, count: int, names: np.ndarray, separate: bool) -> np.ndarray:
    """The argument `trusted_given` of `fit` as places in `names`."""
    given = column_or_1d(given)
    unknown = given[~np.isin(given, names)]
    if not separate or len(given) != count or len(unknown):
        got = f"label {unknown.tolist()[0]!r}" if len(unknown) else f"{len(given)} labels"
        raise UserError(f"trusted_given: {got}, expected {count} of the labels of y, one for each row of X_trusted")
    return np.searchsorted(names, given.astype(names.dtype))


def _shown(names: np.ndarray) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(repr(name) for name in names[:10].tolist()) + more


def seed(random_state) -> int:
    """A whole number that follows from `random_state`, which is as in scikit-learn."""
    if isinstance(random_state, numbers.Integral) and random_state >= 0:
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def number(name: str, value: Any, default: Any, kind: type) -> Any:
    """The argument `name` as an int or a float; where it is None, `default`, if that is not None."""
    if value is None and default is not None:
        return default
    wanted = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, wanted) or isinstance(value, bool):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name}: got {value!r}, expected {what}{'' if default is None else ' or None'}")
    return kind(value)


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key by its flat name; of a duration in steps and epochs the other one becomes 0."""
    check_choice("config", key, flatten_dict(config.to_dict(), sep="."))
    *groups, last = key.split(".")
    group = config
    for name in groups:
        group = group[name]
    old = group[last]
    if isinstance(old, float) and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = float(value)
    try:
        group[last] = value.item() if isinstance(value, np.generic) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {key}={value!r}, expected {type(old).__name__} ({error})") from None
    name, _, unit = key.rpartition("_")
    if name in config_lib.DURATIONS and value:
        other = f"{last.rpartition('_')[0]}_{'epochs' if unit == 'steps' else 'steps'}"
        group[other] = type(group[other])(0)
