"""Where images come from.

A source gives a training set, perhaps a test set, perhaps a separate trusted set, each a `Split`. What is read
from a file is checked here, before anything long starts.
"""

import dataclasses
import gzip
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images in memory with their labels.

    Attributes:
      images: `[n, H, W, C]`, uint8 or float32 in [0, 1].
      labels: `[n]` int32, as given, possibly wrong.
      clean_labels: `[n]` int32, true labels, -1 where not known.
      ids: `[n]` int64, the same for an example in every run.
    """

    images: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        """The examples in these rows, in this order."""
        return Split(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as it comes: before noise, the trusted split and a validation split."""

    name: str
    num_classes: int
    train: Split
    test: Split | None
    trusted: Split | None  # only where it comes with the data


def load(data: ConfigDict) -> Source:
    """Loads the source that `config.data` names and resizes its images to `data.image_size`.

    Raises:
      UserError: for files that are missing, damaged or of another shape than they should be.
    """
    source = REGISTRY[data.name](data)
    if data.num_classes and data.num_classes < source.num_classes:
        raise UserError(
            f"data.num_classes={data.num_classes}, but the labels of {source.name} go up to "
            f"{source.num_classes - 1}; set it to at least {source.num_classes}, or to 0 to take it from the data"
        )
    splits = {name: getattr(source, name) for name in ("train", "test", "trusted")}
    if data.image_size:
        splits = {name: split and _resize(split, data.image_size) for name, split in splits.items()}
    return dataclasses.replace(source, num_classes=data.num_classes or source.num_classes, **splits)


def digits(data: ConfigDict) -> Source:
    """The 1,797 grey 8×8 digits that come with scikit-learn, 500 of them as the test set.

    scikit-learn has no test set of its own; this one is stratified and always the same.
    """
    del data
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = np.arange(len(images))
    train, test = train_test_split(rows, test_size=500, random_state=0, stratify=bunch.target)
    everything = _split(images, bunch.target, bunch.target)
    return Source("digits", 10, everything.take(np.sort(train)), everything.take(np.sort(test)), None)


FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def fashion_mnist(data: ConfigDict) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey 28×28 images of ten kinds of clothing.

    Read from the four published IDX files in `data.dir`, or through TFDS where it is empty.
    """
    if not data.dir:
        import tensorflow_datasets as tfds  # a catalogue of data sets with checked downloads

        arrays = tfds.as_numpy(tfds.load("fashion_mnist", batch_size=-1))
        splits = {
            name: _split(arrays[name]["image"], arrays[name]["label"], arrays[name]["label"])
            for name in ("train", "test")
        }
        return Source("fashion_mnist", 10, splits["train"], splits["test"], None)

    folder = pathlib.Path(data.dir).expanduser()
    missing = [name for names in FASHION_MNIST_FILES.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"data.dir={data.dir!r} lacks {', '.join(missing)}; expected the four Fashion-MNIST IDX files there "
            f"(Debian: package dataset-fashion-mnist), or data.dir='' to load through TFDS"
        )
    splits = {}
    for name, (image_file, label_file) in FASHION_MNIST_FILES.items():
        images, labels = read_idx(folder / image_file, 3), read_idx(folder / label_file, 1)
        _check_images_and_labels(images[..., None], labels, str(folder / image_file), 10)
        splits[name] = _split(images[..., None], labels, labels)
    return Source("fashion_mnist", 10, splits["train"], splits["test"], None)


def read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads a (gzipped) IDX file of unsigned bytes.

    Format: two zero bytes, the type (8 = unsigned byte), the rank, one big-endian uint32 for each dimension,
    then the data, the last dimension fastest.

    Raises:
      UserError: for a file that is truncated, damaged, too long, or of another type or rank.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file complete?") from None
    header = 4 + 4 * rank
    if len(content) < header:
        raise UserError(f"{path}: {len(content)} bytes, expected an IDX file with a header of {header} bytes")
    zero, kind, got_rank = struct.unpack(">HBB", content[:4])
    if (zero, kind, got_rank) != (0, 8, rank):
        raise UserError(
            f"{path}: starts with bytes {content[:4].hex()}, expected {bytes([0, 0, 8, rank]).hex()} "
            f"(IDX, unsigned bytes, rank {rank})"
        )
    shape = struct.unpack(f">{rank}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise UserError(f"{path}: {len(content)} bytes, expected {expected} for shape {shape}; is it truncated?")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def arrays(data: ConfigDict) -> Source:
    """A user's own .npz file, `data.train`.

    Its arrays: `images` `[n,H,W]` or `[n,H,W,C]`, uint8 or floats in [0, 1], and `labels` `[n]` integers, as
    given; optional `clean_labels` `[n]` (true labels, -1 where not known), `test_images` and `test_labels`,
    `trusted_images` and `trusted_labels`.
    """
    if not data.train:
        raise UserError("data.name=arrays needs data.train, the path of an .npz file with images and labels")
    path = pathlib.Path(data.train).expanduser()
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = dict(archive)
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:
        raise UserError(
            f"data.train={data.train!r}: cannot be read as .npz ({type(error).__name__}: {error})"
        ) from None
    for name in ("images", "labels"):
        if name not in content:
            raise UserError(f"{path}: has {sorted(content)}, expected at least the arrays images and labels")

    def read(prefix: str) -> Split | None:
        images, labels = content.get(f"{prefix}images"), content.get(f"{prefix}labels")
        if (images is None) != (labels is None):
            raise UserError(f"{path}: has only one of {prefix}images and {prefix}labels, expected both or none")
        if images is None:
            return None
        images = images[..., None] if images.ndim == 3 else images
        _check_images_and_labels(images, labels, f"{path}: {prefix}images", data.num_classes)
        clean = content.get("clean_labels") if not prefix else None
        if clean is not None:
            _check_labels(clean, len(labels), f"{path}: clean_labels", data.num_classes, lowest=-1)
        # What is for testing or trusted is taken at its word.
        return _split(images, labels, clean if not prefix else labels)

    train, test, trusted = read(""), read("test_"), read("trusted_")
    for name, split in (("test_images", test), ("trusted_images", trusted)):
        if split is not None and split.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{path}: {name} have shape {split.images.shape[1:]}, expected {train.images.shape[1:]} as images"
            )
    splits = [split for split in (train, test, trusted) if split is not None]
    highest = max(int(max(split.labels.max(), split.clean_labels.max())) for split in splits)
    if highest < 1:
        raise UserError(f"{path}: all labels are 0, expected at least two classes")
    return Source(path.stem, highest + 1, train, test, trusted)


# name -> function(data config) -> Source
REGISTRY: dict[str, Callable[[ConfigDict], Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "arrays": arrays,
}


def _split(images: np.ndarray, labels: np.ndarray, clean_labels: np.ndarray | None = None) -> Split:
    labels = np.asarray(labels, np.int32)
    clean = np.full_like(labels, -1) if clean_labels is None else np.asarray(clean_labels, np.int32)
    images = images if images.dtype == np.uint8 else np.asarray(images, np.float32)
    return Split(images, labels, clean, np.arange(len(labels), dtype=np.int64))


def _check_images_and_labels(images: np.ndarray, labels: np.ndarray, where: str, num_classes: int) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"{where}: shape {images.shape}, expected [n, H, W] or [n, H, W, C] with C = 1 or 3")
    if not len(images):
        raise UserError(f"{where}: no images")
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            bad = int(np.argwhere(~np.isfinite(images))[0][0])
            raise UserError(f"{where}: image {bad} has pixels that are nan or infinite, expected floats in [0, 1]")
        if images.min() < 0 or images.max() > 1:
            raise UserError(
                f"{where}: floats from {images.min():g} to {images.max():g}, expected [0, 1] (or uint8 from 0 to 255)"
            )
    elif images.dtype != np.uint8:
        raise UserError(f"{where}: dtype {images.dtype}, expected uint8 or floats in [0, 1]")
    _check_labels(labels, len(images), f"{where}: their labels", num_classes, lowest=0)


def _check_labels(labels: np.ndarray, length: int, where: str, num_classes: int, lowest: int) -> None:
    if labels.ndim != 1 or len(labels) != length:
        raise UserError(f"{where}: shape {labels.shape}, expected ({length},), one for each image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: dtype {labels.dtype}, expected integers")
    highest = num_classes - 1 if num_classes else np.iinfo(np.int32).max
    bad = np.flatnonzero((labels < lowest) | (labels > highest))
    if len(bad):
        expected = f"{lowest} to {highest}" + ("" if num_classes else " (set data.num_classes to narrow it)")
        raise UserError(f"{where}: {int(labels[bad[0]])} at place {bad[0]}, expected {expected}")


def _resize(split: Split, size: int) -> Split:
    import tensorflow as tf

    if split.images.shape[1:3] == (size, size):
        return split
    parts = [
        tf.image.resize(split.images[start : start + 4096], (size, size), method="area").numpy()
        for start in range(0, len(split), 4096)
    ]
    images = np.concatenate(parts)
    if split.images.dtype == np.uint8:
        images = np.round(images).astype(np.uint8)
    return dataclasses.replace(split, images=images)
