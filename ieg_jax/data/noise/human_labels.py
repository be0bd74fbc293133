"""Labels that people gave to the training images of CIFAR: CIFAR-10N and CIFAR-100N (Wei et al. 2022).

The files are at http://www.noisylabels.com and are licensed CC BY-NC 4.0, so they are not part of this package:
`noise.file` is the user's own copy of CIFAR-10_human.pt or CIFAR-100_human.pt. Their labels are in the published
order of the images. `sources/cifar.py` brings every form of CIFAR into this order.
"""

import hashlib
import os

import numpy as np
from etils import epath

from ieg_jax import unpickle
from ieg_jax.data.splits import check_labels
from ieg_jax.errors import UserError, check_choice

# noise.label_set -> key in the file
LABEL_SETS = {
    "aggre": "aggre_label",  # what the majority of three people said
    "random1": "random_label1",  # what the first of the three said, and so on
    "random2": "random_label2",
    "random3": "random_label3",
    "worse": "worse_label",  # a wrong label wherever one of the three people was wrong
    "noisy": "noisy_label",  # CIFAR-100N, where each image has the label of one person
}
# sha256 -> name of the published file
PUBLISHED = {
    "873e69c39cb9b5e97fb6bae2d60bb59b38a5cbc31d2b868f7903dcb2b9dd2310": "CIFAR-10_human.pt",
    "bd2d80409754d420292d622e15e25248ba21e37d27429efac49c8da723f44394": "CIFAR-100_human.pt",
}


def load(path: str, label_set: str, true_labels: np.ndarray) -> np.ndarray:
    """Reads one set of human labels, and makes sure that it belongs to these images.

    Args:
      path: `noise.file`.
      label_set: `noise.label_set`, one of LABEL_SETS.
      true_labels: `[N]` integers, of the whole training set in its published order.

    Returns:
      `[N]` int32.

    Raises:
      UserError: for a file that is missing, damaged or lacks the set, and where its `clean_label` differ from
        `true_labels` anywhere.
    """
    if not path:
        raise UserError("noise.kind=human needs noise.file, the path of CIFAR-10_human.pt or CIFAR-100_human.pt")
    check_choice("noise.label_set", label_set, LABEL_SETS)
    content = unpickle.read_torch_zip(path)
    if LABEL_SETS[label_set] not in content:
        there = [name for name, key in LABEL_SETS.items() if key in content]
        raise UserError(f"noise.label_set={label_set!r}: {path} has {', '.join(there) or 'none'} of the known sets")
    clean = _labels(content, "clean_label", path, len(true_labels), num_classes=0)
    different = np.flatnonzero(clean != true_labels)
    if len(different):
        first = different[0]
        raise UserError(
            f"noise.file={path!r}: its clean_label differ from the labels of {len(different)} of {len(clean)} images, "
            f"first at {first}: {clean[first]}, expected {true_labels[first]}; it is another release of the file, or "
            f"one for images in another order or of another data set"
        )
    return _labels(content, LABEL_SETS[label_set], path, len(true_labels), int(clean.max()) + 1)


def describe(path: str) -> dict:
    """Identifies a file of human labels.

    Returns:
      `sha256`; `published`, the name under which a file with this hash was published, None for any other file; and
      `shapes`, key -> shape of what the file holds. All are plain values, for JSON.

    Raises:
      UserError: for a file that cannot be read.
    """
    content = unpickle.read_torch_zip(path)
    digest = sha256(path)
    shapes = {
        str(key): [len(value)] if isinstance(value, list) else list(np.shape(value)) for key, value in content.items()
    }
    return {"sha256": digest, "published": PUBLISHED.get(digest), "shapes": shapes}


def sha256(path: str | os.PathLike) -> str:
    """The hash of a file, in hexadecimal."""
    return hashlib.sha256(epath.Path(path).expanduser().read_bytes()).hexdigest()


def _labels(content: dict, key: str, path: str, length: int, num_classes: int) -> np.ndarray:
    if not isinstance(content.get(key), np.ndarray):
        raise UserError(f"{path}: {key} is no array, expected [{length}] integers")
    check_labels(content[key], length, f"noise.file={path!r}: {key}", num_classes, lowest=0)
    return content[key].astype(np.int32)
