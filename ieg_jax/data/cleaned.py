"""Labels that an audit has cleaned, in place of those that the data have."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from ieg_jax.data import splits
from ieg_jax.data.sources import lists
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError


def apply(train: Split, file: str, class_names: Sequence[str]) -> Split:
    """The training examples that the list keeps, with the labels that it has for them.

    Args:
      train: the training examples.
      file: `data.cleaned`, cleaned.csv of an audit of a run on the same data: the columns `id` and `label`.
      class_names: `[K]`.

    Raises:
      UserError: for a file that cannot be read, an id that is none of the data's, and a label that is no class.
    """
    place = pathlib.Path(file).expanduser()
    if not place.is_file():
        raise UserError(f"data.cleaned={file}: no such file; expected cleaned.csv of an audit")
    numbers = {name: number for number, name in enumerate(splits.distinct(class_names))}
    rows = {int(number): row for row, number in enumerate(train.ids)}
    kept, labels = [], []
    for where, row in lists.list_rows(place, ("id", "label"), ("id", "label")):
        number, label = (row["id"] or "").strip(), (row["label"] or "").strip()
        if not number.isdecimal() or int(number) not in rows:
            raise UserError(
                f"{place}, {where}: id {number!r} is none of the {len(rows)} training examples; is the list of an "
                f"audit of other data, or of another trusted set?"
            )
        if label not in numbers:
            raise UserError(f"{place}, {where}: label {label!r}, expected one of {', '.join(list(numbers)[:10])}")
        kept.append(rows[int(number)])
        labels.append(numbers[label])
    if len(set(kept)) != len(kept) or not kept:
        raise UserError(f"{place}: {len(kept)} rows with {len(set(kept))} ids, expected each once, and at least one")
    order = np.argsort(kept)
    return dataclasses.replace(train.take(np.array(kept)[order]), labels=np.array(labels, train.labels.dtype)[order])
