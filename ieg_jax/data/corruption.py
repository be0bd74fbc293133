"""Label noise: which labels are wrong, and what they are, is a function of (noise.seed, id).

With `noise.selection` other than bernoulli it is a function of the set of ids too. The noise is made for the whole
training set, so that no choice of trusted examples changes it. True classes are c, K is the number of classes; examples
whose true class is not known, or is none, keep image and label, and so does whoever is not selected.

- `none`: labels as they come.
- `uniform`: a selected label is drawn from all K classes, the true one included, so that a share rate · (K − 1)/K is
  wrong: the noise of the paper and of DivideMix (Li et al. 2020).
- `symmetric_flip`: drawn from the K − 1 other classes, so that a share `rate` is wrong (Lee et al. 2019, RoG).
- `asymmetric`: goes to the one class that looks alike (Patrini et al. 2017). CIFAR-10: bird → airplane, deer → horse,
  truck → automobile, cat ↔ dog. CIFAR-100: the next class of the true superclass, in the order of labels, the last
  → the first. Fashion-MNIST: T-shirt/top ↔ shirt, pullover ↔ coat, sneaker ↔ ankle boot. Examples of the other classes
  may be selected, without effect: each example of a flipping class is wrong with probability `rate` (bernoulli),
  round(rate · n) of each flipping class are (exact_per_class), or so many as are among the round(rate · N) that were
  selected of all classes (exact).
- `asymmetric_contiguous`: CIFAR-100, the next of five contiguous labels: 0–4, 5–9, ... (ELR, Liu et al. 2020).
- `transition_matrix`: drawn from row c of `noise.file`, T[i, j] = P(given = j | true = i), for every example.
- `instance_dependent`: depends on the pixels (Xia et al. 2020); see instance_noise.py.
- `open_set`: selected *images* are replaced by foreign ones, labels stay (Wang et al. 2018); see open_set.py.
- `file`: labels from `noise.file`, such as the predictions of a network (semantic noise, Lee et al. 2019) or what
  DivideMix or an earlier run wrote: N integers, the k-th for the k-th smallest id (id k, where ids are 0 ... N − 1).
  Where images that cannot be decoded are left out, N may also be the number of all that are listed, the k-th for id k.
- `human`: labels that people gave (Wei et al. 2022, CIFAR-10N and CIFAR-100N); see human_labels.py.
"""

import dataclasses
import io
import json
from collections.abc import Callable

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax.data import class_flips, human_labels, instance_noise, open_set
from ieg_jax.data.selection import DRAW, SELECTIONS, draw, select, uniforms
from ieg_jax.data.splits import NO_CLASS, UNKNOWN, Source, Split, check_labels
from ieg_jax.errors import UserError, check_choice


def corrupt(source: Source, noise: ConfigDict) -> Split:
    """The source's whole training set with the noise that the group `noise` of the configuration says.

    Raises:
      UserError: where the kind of noise does not fit the data, or its file cannot be used.
    """
    return KINDS[noise.kind].corrupt(source, noise)


def validate(noise: ConfigDict) -> None:
    """Checks what can be judged without the data.

    Raises:
      UserError: for an unknown kind, selection, label set or foreign source, for a key that the kind needs and that is
        empty, and for one that is set and that the kind does not read.
    """
    check_choice("noise.kind", noise.kind, KINDS)
    check_choice("noise.selection", noise.selection, SELECTIONS)
    reads = KINDS[noise.kind].reads
    for key, unset in _UNSET.items():
        if key in reads and noise[key] == "":
            raise UserError(f"noise.kind={noise.kind} needs noise.{key}, got ''; configs/default.py says what it is")
        if key not in reads and noise[key] != unset:
            readers = ", ".join(name for name, kind in KINDS.items() if key in kind.reads)
            raise UserError(
                f"noise.{key}={noise[key]!r}, but noise.kind={noise.kind} does not read it: set it to {unset!r}, "
                f"or set noise.kind to one that reads it ({readers})"
            )
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
      `rate`: the nominal share of corrupted examples; of a transition matrix the share of wrong labels that it means
        for the true ones, None without any; None where labels come from a file, which has no nominal rate;
      `file_sha256`: hash of `noise.file`, None for kinds without;
      `num_known`: examples of which it is known whether their label is true; `num_no_class`: those among them that
        are of no class, or whose true class is known only not to be the given one: their label counts as wrong;
      `rate_effective`: share of wrong labels among the known, None without any;
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


def write_labels(path: epath.PathLike, labels: np.ndarray) -> None:
    """Writes labels for `noise.kind=file`: .json, a list of integers as DivideMix has it, or .npy.

    Args:
      path: must not exist.
      labels: `[N]` integers, in ascending order of ids.

    Raises:
      UserError: for another suffix, and where the file exists.
    """
    file, labels = epath.Path(path).expanduser(), np.asarray(labels)
    if file.suffix not in (".json", ".npy"):
        raise UserError(f"{path}: expected a name that ends in .json or .npy")
    if file.exists():
        raise UserError(f"{path} exists and is not overwritten; give another name or remove it")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"labels of shape {labels.shape} and dtype {labels.dtype}, expected [N] integers")
    if file.suffix == ".json":
        file.write_text(json.dumps(labels.tolist()))
    else:
        content = io.BytesIO()
        np.save(content, labels)
        file.write_bytes(content.getvalue())


def read_labels(path: epath.PathLike) -> np.ndarray:
    """Labels that `write_labels` or DivideMix wrote: `[N]` integers.

    Raises:
      UserError: for a file that is missing, damaged, or holds anything else.
    """
    labels = _read_array(path)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise UserError(
            f"noise.file={str(path)!r}: shape {labels.shape}, dtype {labels.dtype}; expected a list of integers, "
            f"one label for each training example"
        )
    return labels


def read_matrix(path: epath.PathLike, num_classes: int) -> np.ndarray:
    """A transition matrix, .json (a list of rows) or .npy: `[K, K]` float64, rows of probabilities that sum to 1.

    Raises:
      UserError: for a file that is missing, damaged, or holds anything else.
    """
    matrix, where = _read_array(path), f"noise.file={str(path)!r}"
    if matrix.shape != (num_classes, num_classes) or matrix.dtype.kind not in "iuf":
        raise UserError(
            f"{where}: shape {matrix.shape}, dtype {matrix.dtype}; expected {num_classes}×{num_classes} numbers, "
            f"row = true class, column = given label"
        )
    matrix = matrix.astype(np.float64)
    bad = np.flatnonzero(~((matrix >= 0).all(1) & (np.abs(matrix.sum(1) - 1) < 1e-6)))  # nan is bad too
    if len(bad):
        raise UserError(
            f"{where}: row {bad[0]} is {np.array2string(matrix[bad[0]], threshold=8)} with sum "
            f"{matrix[bad[0]].sum():g}, expected probabilities that sum to 1"
        )
    return matrix


def _read_array(path: epath.PathLike) -> np.ndarray:
    file, where = epath.Path(path).expanduser(), f"noise.file={str(path)!r}"
    if file.suffix not in (".json", ".npy"):
        raise UserError(f"{where}: expected a file that ends in .json or .npy")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    try:
        values = json.loads(content) if file.suffix == ".json" else np.load(io.BytesIO(content), allow_pickle=False)
        array = np.asarray(values)
    except (ValueError, EOFError, OSError) as error:  # rows of various lengths are a ValueError too
        raise UserError(f"{where}: damaged, or not of numbers alone ({error}); is the file complete?") from None
    return array


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
    drawn, labels = uniforms(seed, DRAW, train.ids), train.labels.copy()
    for label in np.unique(train.clean_labels[selected]):
        rows = np.flatnonzero(selected & (train.clean_labels == label))
        labels[rows] = draw(matrix[[label]], drawn[rows])
    return dataclasses.replace(train, labels=labels)


def _file(source: Source, noise: ConfigDict) -> Split:
    train, labels = source.train, read_labels(noise.file)
    if len(labels) == source.num_listed:
        labels = labels[np.sort(train.ids)]  # of all that are listed, also of those that were left out
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
    new = np.empty(len(train), np.int32)
    new[np.argsort(train.ids)] = labels
    return dataclasses.replace(train, labels=new)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of noise.

    Attributes:
      corrupt: (source, the group `noise`) -> its training set with the noise.
      reads: keys of the group that it reads besides `kind` and `seed`.
    """

    corrupt: Callable[[Source, ConfigDict], Split]
    reads: tuple[str, ...]


# Keys that not every kind reads, and their value where they are not set.
_UNSET = {"rate": 0.0, "selection": "bernoulli", "file": "", "label_set": "", "open_set": ""}

# (name of the data set, K) -> where selected labels go, by true class.
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
    "instance_dependent": Kind(instance_noise.corrupt, ("rate",)),
    "open_set": Kind(open_set.corrupt, ("rate", "selection", "open_set")),
    "file": Kind(_file, ("file",)),
    "human": Kind(_human, ("file", "label_set")),
}
