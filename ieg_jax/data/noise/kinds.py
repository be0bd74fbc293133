"""Label noise: which labels are wrong, and what they are, is a function of (noise.seed, id).

With `noise.selection` other than bernoulli it is a function of the set of ids too. The noise is made for the whole
training set, so that no choice of trusted examples changes it. Below, c is the true class of an example and K the
number of classes. Examples whose true class is not known, or is none of the classes, keep their image and label, and so
do all that are not selected.

- `none`: labels stay as they come.
- `uniform`: a selected label is drawn from all K classes, the true one included, so that a share rate · (K − 1)/K is
  wrong. This is the noise of the paper and of DivideMix (Li et al. 2020).
- `symmetric_flip`: it is drawn from the K − 1 other classes, so that a share `rate` is wrong (Lee et al. 2019, RoG).
- `asymmetric`: it becomes the one class that looks alike (Patrini et al. 2017). CIFAR-10: bird → airplane, deer →
  horse, truck → automobile, cat ↔ dog. CIFAR-100: the next class of the true superclass, in the order of labels, the
  last → the first. Fashion-MNIST: T-shirt/top ↔ shirt, pullover ↔ coat, sneaker ↔ ankle boot. Examples of the other
  classes may be selected too, without effect. So with the selection bernoulli each example of a class that flips is
  wrong with probability `rate`; with exact_per_class round(rate · n) of the n examples of each such class are wrong;
  with exact those are wrong that belong to such a class among the round(rate · N) that are selected from all classes.
- `asymmetric_contiguous`: it becomes the next of five contiguous labels of CIFAR-100, 0–4, 5–9, ... (Liu et al. 2020,
  ELR).
- `transition_matrix`: every label is drawn from row c of `noise.file`, T[i, j] = P(given = j | true = i).
- `instance_dependent`: depends on the pixels (Xia et al. 2020); see instance.py.
- `open_set`: selected *images* are replaced by foreign ones, and labels stay (Wang et al. 2018); see open_set.py.
- `file`: labels come from `noise.file`, such as the predictions of a network (semantic noise, Lee et al. 2019) or what
  DivideMix or an earlier run wrote: N integers, the k-th for the k-th smallest id (id k, where ids are 0 ... N − 1).
  Where images that cannot be decoded are left out, it may also have a label for each listed image, the k-th for id k.
- `human`: labels that people gave (Wei et al. 2022, CIFAR-10N and CIFAR-100N); see human_labels.py.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, one_of, within
from ieg_jax.data.noise import class_flips, human_labels, instance, open_set
from ieg_jax.data.noise.files import read_labels, read_matrix
from ieg_jax.data.selection import DRAW, SELECTIONS, draw, select, uniforms
from ieg_jax.data.splits import NO_CLASS, UNKNOWN, Source, Split, check_labels
from ieg_jax.errors import UserError, check_choice


def corrupt(source: Source, noise: ConfigDict) -> Split:
    """The source's whole training set with the noise that the group `noise` of the configuration asks for.

    Raises:
      UserError: where the kind of noise does not fit the data, or its file cannot be used.
    """
    return KINDS[noise.kind].corrupt(source, noise)


def validate(noise: ConfigDict) -> None:
    """Checks what can be judged without the data.

    Raises:
      UserError: for an unknown kind, selection, label set or foreign source, for an empty key that the kind needs, and
        for a key that is set and that the kind does not read.
    """
    checks = {
        "kind": one_of(*KINDS),
        "selection": one_of(*SELECTIONS),
        "rate": within(0, 1),
        "seed": at_least(0),
    }
    config_lib.check_values(noise, checks, "noise.")
    for key in KINDS[noise.kind].reads:
        if noise[key] == "":
            raise UserError(f"noise.kind={noise.kind} needs noise.{key}, got ''; configs/default.py says what it is")
    config_lib.check_unread(noise, _UNSET, {name: kind.reads for name, kind in KINDS.items()}, "kind", "noise.")
    if noise.kind == "open_set":
        open_set.parse(noise.open_set)
    if noise.kind == "human":
        check_choice("noise.label_set", noise.label_set, human_labels.LABEL_SETS)


def report(split: Split, noise: ConfigDict, num_classes: int) -> dict:
    """What is known of the noise in a split, as plain numbers for noise.json.

    Args:
      split: the examples, after noise.
      noise: the group `noise` of the configuration.
      num_classes: K.

    Returns:
      `kind`, `selection`, `seed`, `num_examples`;
      `rate`: the nominal share of corrupted examples; for a transition matrix the share of wrong labels that follows
        from it and the true labels, None where no true label is known; None for labels from a file;
      `file_sha256`: hash of `noise.file`, None for kinds without;
      `num_known`: examples of which it is known whether their label is true; `num_no_class`: those among them that
        are of no class, or whose true class is known only not to be the given one: their label counts as wrong;
      `rate_effective`: the share of wrong labels among the known ones, None where none is known;
      `confusion`: K×K list of counts, row = true class, column = given label, without those of no class; None where
        no true class is known.
    """
    has_class = split.clean_labels >= 0
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (split.clean_labels[has_class], split.labels[has_class]), 1)
    num_known = int((split.clean_labels != UNKNOWN).sum())
    return {
        "kind": noise.kind,
        "rate": _nominal_rate(split, noise, num_classes),
        "selection": noise.selection,
        "seed": noise.seed,
        "file_sha256": human_labels.sha256(noise.file) if "file" in KINDS[noise.kind].reads else None,
        "num_examples": len(split),
        "num_known": num_known,
        "num_no_class": int((split.clean_labels == NO_CLASS).sum()),
        "rate_effective": 1 - int(np.trace(confusion)) / num_known if num_known else None,
        "confusion": confusion.tolist() if has_class.any() else None,
    }


def _nominal_rate(split: Split, noise: ConfigDict, num_classes: int) -> float | None:
    if noise.kind == "transition_matrix":
        kept = np.diag(read_matrix(noise.file, num_classes))[split.clean_labels[split.clean_labels >= 0]]
        return 1 - float(kept.mean()) if len(kept) else None
    return None if "file" in KINDS[noise.kind].reads else noise.rate


def _none(source: Source, noise: ConfigDict) -> Split:
    del noise
    return source.train


def _uniform(source: Source, noise: ConfigDict) -> Split:
    train = source.train
    selected = select(noise, train.ids, train.clean_labels)
    drawn = np.floor(uniforms(noise.seed, DRAW, train.ids) * source.num_classes).astype(np.int32)
    return dataclasses.replace(train, labels=np.where(selected, drawn, train.labels))


def _by_class(source: Source, noise: ConfigDict) -> Split:
    """Selected labels go where the row of their true class says."""
    train = source.train
    matrix = CLASS_FLIPS[noise.kind](source.name, source.num_classes)
    return _draw_rows(train, noise.seed, select(noise, train.ids, train.clean_labels), matrix)


def _transition_matrix(source: Source, noise: ConfigDict) -> Split:
    train = source.train
    return _draw_rows(train, noise.seed, train.clean_labels >= 0, read_matrix(noise.file, source.num_classes))


def _draw_rows(train: Split, seed: int, selected: np.ndarray, matrix: np.ndarray) -> Split:
    """Draws each selected label from that row of the matrix which belongs to its true class."""
    drawn, labels = uniforms(seed, DRAW, train.ids), train.labels.copy()
    for label in np.unique(train.clean_labels[selected]):
        rows = np.flatnonzero(selected & (train.clean_labels == label))
        labels[rows] = draw(matrix[[label]], drawn[rows])
    return dataclasses.replace(train, labels=labels)


def _file(source: Source, noise: ConfigDict) -> Split:
    train, labels = source.train, read_labels(noise.file)
    if len(labels) == source.num_listed:
        labels = labels[np.sort(train.ids)]  # the file has a label for each listed image, also for those left out
    elif source.num_listed > len(train) != len(labels):
        raise UserError(
            f"noise.file={noise.file!r}: {len(labels)} labels, expected {source.num_listed}, one for each listed "
            f"training image, or {len(train)}, one for each that is not left out"
        )
    check_labels(labels, len(train), f"noise.file={noise.file!r}", source.num_classes, lowest=0)
    return _in_order_of_ids(train, labels)


def _human(source: Source, noise: ConfigDict) -> Split:
    true_labels = source.train.clean_labels[np.argsort(source.train.ids)]
    return _in_order_of_ids(source.train, human_labels.load(noise.file, noise.label_set, true_labels))


def _in_order_of_ids(train: Split, labels: np.ndarray) -> Split:
    """The training set with these labels, which are in the order of the ids."""
    new = np.empty(len(train), np.int32)
    new[np.argsort(train.ids)] = labels
    return dataclasses.replace(train, labels=new)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of noise.

    Attributes:
      corrupt: (source, the group `noise`) -> the source's training set with the noise.
      reads: keys of the group that it reads besides `kind` and `seed`.
    """

    corrupt: Callable[[Source, ConfigDict], Split]
    reads: tuple[str, ...]


# The keys that not every kind reads, with the values that they have where nobody sets them.
_UNSET = {"rate": 0.0, "selection": "bernoulli", "file": "", "label_set": "", "open_set": ""}

# kind -> function of (name of the data set, K), which returns where selected labels go, by true class.
CLASS_FLIPS: dict[str, Callable[[str, int], np.ndarray]] = {
    "symmetric_flip": class_flips.symmetric,
    "asymmetric": class_flips.asymmetric,
    "asymmetric_contiguous": class_flips.asymmetric_contiguous,
}

KINDS = {
    "none": Kind(_none, ()),
    "uniform": Kind(_uniform, ("rate", "selection")),
    "symmetric_flip": Kind(_by_class, ("rate", "selection")),
    "asymmetric": Kind(_by_class, ("rate", "selection")),
    "asymmetric_contiguous": Kind(_by_class, ("rate", "selection")),
    "transition_matrix": Kind(_transition_matrix, ("file",)),
    "instance_dependent": Kind(instance.corrupt, ("rate",)),
    "open_set": Kind(open_set.corrupt, ("rate", "selection", "open_set")),
    "file": Kind(_file, ("file",)),
    "human": Kind(_human, ("file", "label_set")),
}
