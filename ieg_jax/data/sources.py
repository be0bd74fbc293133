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

from ieg_jax import config as config_lib
from ieg_jax.data import cifar, huggingface, image_files, images, records, webvision
from ieg_jax.data.splits import UNKNOWN, Source, Split, check_images_and_labels, check_labels, in_lines, make_split
from ieg_jax.errors import UserError

ROWS_AT_ONCE = 65_536  # of features, so that not all of them are in memory as float64
SIZES_READ = 200  # records whose size is looked up
LARGEST, SMALLEST, STEP = 64, 8, 4  # pixels of a side that `fitting_size` chooses


def load(data: ConfigDict) -> Source:
    """Loads the source that `config.data` names, its images checked and, with `data.image_size`, in memory.

    Args:
      data: the group `data` of the configuration; where `image_size` is AUTO it is set to `fitting_size` of the
        training images.

    Raises:
      UserError: for a key that is set and that the source does not read, and for files that are missing, damaged or of
        another shape than they should be.
    """
    source = list_source(data)
    if data.num_classes and data.num_classes < source.num_classes:
        raise UserError(
            f"data.num_classes={data.num_classes}, but the labels of {source.name} go up to "
            f"{source.num_classes - 1}; set it to at least {source.num_classes}, or to 0 to take it from the data"
        )
    splits = {name: getattr(source, name) for name in ("train", "test", "trusted")}
    left_out = dict(source.left_out)
    for name, split in splits.items():
        if split is not None and not (name == "trusted" and source.trusted_is_pool):
            splits[name], bad = open_images(split, data, source.class_names)
            left_out |= bad
    num_classes, num_listed = data.num_classes or source.num_classes, source.num_listed
    if np.array_equal(source.train.ids, np.arange(len(source.train))):
        num_listed = num_listed or len(source.train)
    return dataclasses.replace(source, num_classes=num_classes, num_listed=num_listed, left_out=left_out, **splits)


def list_source(data: ConfigDict) -> Source:
    """The source that `config.data` names as its files list it, before any of these is decoded.

    Raises:
      UserError: for a key that is set and that the source does not read, and for lists that cannot be used.
    """
    reads = READS[data.name]
    for key in ("dir", "variant", "train", "test", "trusted"):
        if key not in reads and data[key]:
            readers = ", ".join(name for name, keys in READS.items() if key in keys)
            raise UserError(
                f"data.{key}={data[key]!r}, but data.name={data.name} does not read it: set it to '', or set data.name "
                f"to one that reads it ({readers})"
            )
    return dataclasses.replace(REGISTRY[data.name](data), skip_unreadable=data.unreadable == "skip")


def open_images(split: Split, data: ConfigDict, class_names: tuple[str, ...] = ()) -> tuple[Split, dict[str, str]]:
    """Makes the images of a split readable: files are decoded once, and kept in memory with `data.image_size`.

    Args:
      split: of a source.
      data: the group `data` of the configuration; an `image_size` that is AUTO is set, see `load`.
      class_names: `[K]`, for messages; where they are not known the numbers are shown.

    Returns:
      The split, and name -> what is wrong with it for the images that it no longer holds.

    Raises:
      UserError: for images that cannot be decoded with `data.unreadable=refuse`, and for a class of which none is left.
    """
    left_out = {}
    if isinstance(split.images, images.FileImages | huggingface.ArrowImages):
        in_files = isinstance(split.images, images.FileImages)
        checked = images.check(split.images.paths) if in_files else huggingface.check(split.images)
        plain = np.array([one.plain for one in checked])
        sizes = np.array([(one.height, one.width) for one in checked], np.int32)
        split = dataclasses.replace(split, images=dataclasses.replace(split.images, plain=plain, sizes=sizes))
        good = np.array([not one.error for one in checked])
        left_out = {str(split.names[row]): checked[row].error for row in np.flatnonzero(~good)}
        if left_out and data.unreadable == "refuse":
            raise UserError(
                f"{len(left_out)} of {len(split)} images cannot be used:\n"
                + in_lines(f"{name}: {error}" for name, error in left_out.items())
                + "\nmend or remove them, or set data.unreadable=skip to train without them"
            )
        check_no_class_is_lost(split, left_out, class_names)
        split = split.take(np.flatnonzero(good))
    if data.image_size == config_lib.AUTO:
        data.image_size = fitting_size(split)
    if data.image_size:
        split = _resize(split, data.image_size)
    return split, left_out


def fitting_size(split: Split) -> int:
    """A size for images of various sizes, in pixels: the median of their shorter sides, at most 64, a multiple of 4."""
    if split.in_memory:
        side = min(split.images.shape[1:3])
    elif (sizes := getattr(split.images, "sizes", None)) is not None:
        side = np.median(sizes.min(1))
    else:  # records: some of them
        rows = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int))
        read = split.images.reader()
        found = [images.readable(lambda row: read(row).whole(), row, split.names[row]).shape[:2] for row in rows]
        side = np.median(np.min(found, 1))
    return max(SMALLEST, min(LARGEST, int(side)) // STEP * STEP)


def check_no_class_is_lost(split: Split, left_out: dict[str, str], class_names: tuple[str, ...]) -> None:
    """Raises UserError, with the first of its images, for a class all of whose images are in `left_out`."""
    if not left_out:
        return
    good = np.array([name not in left_out for name in split.names])
    for label in np.setdiff1d(split.labels, split.labels[good])[:1]:
        names = split.names[split.labels == label]
        raise UserError(
            f"no image of class {class_names[label] if class_names else int(label)!r} can be decoded:\n"
            + in_lines(f"{name}: {left_out[name]}" for name in names)
            + "\na class needs at least one; mend one of these, or take the class out"
        )


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
    everything = make_split(images, bunch.target, bunch.target)
    return Source("digits", 10, everything.take(np.sort(train)), everything.take(np.sort(test)))


FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def fashion_mnist(data: ConfigDict) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey 28×28 images of ten kinds of clothing.

    Read from the four published IDX files in `data.dir`, or through TFDS where it is empty.
    """
    if not data.dir:
        import tensorflow_datasets as tfds  # a catalogue of data sets with checked downloads

        arrays = tfds.as_numpy(tfds.load("fashion_mnist", batch_size=-1))
        splits = {
            name: make_split(arrays[name]["image"], arrays[name]["label"], arrays[name]["label"])
            for name in ("train", "test")
        }
        return Source("fashion_mnist", 10, **splits, class_names=FASHION_MNIST_CLASSES)

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
        check_images_and_labels(images[..., None], labels, str(folder / image_file), 10)
        splits[name] = make_split(images[..., None], labels, labels)
    return Source("fashion_mnist", 10, **splits, class_names=FASHION_MNIST_CLASSES)


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

    def check(pixels: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.shape[1:3] == (1, 1):
            raise UserError(f"{where}: shape {pixels.shape}, images of one pixel; for features set data.name=features")
        check_images_and_labels(pixels, labels, where, data.num_classes)
        return pixels

    return _own_arrays(data, _read_npz(data.train, ("images", "labels"), data.name), "images", check)


def features(data: ConfigDict) -> Source:
    """A user's own features (embeddings) in an .npz file, `data.train`.

    Its arrays: `features` `[n,D]` floats and `labels` `[n]` integers, as given; optional `clean_labels`,
    `test_features` and `test_labels`, `trusted_features` and `trusted_labels`, as for `arrays`. Each of the D numbers
    is standardised: less its mean in `features`, by its standard deviation there. They are held as images of one pixel
    with D channels, float32 `[n,1,1,D]`, which the pipeline takes as they are.
    """
    if data.image_size:
        raise UserError(f"data.image_size={data.image_size}, but features have no pixels; set it to 0")
    content = _read_npz(data.train, ("features", "labels"), data.name)
    statistics = None

    def check(values: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
        nonlocal statistics
        _check_features(values, where)
        check_labels(labels, len(values), f"{where}: their labels", data.num_classes, lowest=0)
        statistics = statistics or feature_statistics(values)  # of the training set, which comes first
        if values.shape[1] != len(statistics[0]):
            raise UserError(
                f"{where}: {values.shape[1]} numbers in a row, expected {len(statistics[0])} as in features"
            )
        return standardised(values, *statistics)

    return _own_arrays(data, content, "features", check)


def read_features(data: ConfigDict, file: str) -> Split:
    """Features to be predicted, standardised as those that a network was trained on.

    Args:
      data: the group `data` of the run's configuration; its `data.train` has to be there still, for its mean and
        deviation.
      file: .npz with the array `features` `[n,D]`, and perhaps `labels` `[n]`.

    Returns:
      The split; labels are UNKNOWN where the file has none.
    """
    trained = _read_npz(data.train, ("features",), data.name)["features"]
    content = _read_npz(file, ("features",), data.name)
    values = content["features"]
    for array, where in ((trained, data.train), (values, file)):
        _check_features(array, f"{where}: features")
    if values.shape[1] != trained.shape[1]:
        raise UserError(f"{file}: {values.shape[1]} numbers in a row, expected {trained.shape[1]} as in {data.train}")
    labels = content.get("labels", np.full(len(values), UNKNOWN))
    check_labels(labels, len(values), f"{file}: labels", data.num_classes, lowest=UNKNOWN)
    return make_split(standardised(values, *feature_statistics(trained)), labels, labels)


def feature_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 `[D]`, of features `[n,D]`; a deviation of 0 is given as 1."""
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(values), ROWS_AT_ONCE)]
    mean = sum(values[part].sum(0, np.float64) for part in parts) / len(values)
    variance = sum(np.square(values[part] - mean).sum(0) for part in parts) / len(values)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def standardised(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Features `[n,D]` as images of one pixel, (x − mean) / deviation: float32 `[n,1,1,D]`."""
    result = np.empty((len(values), 1, 1, values.shape[1]), np.float32)
    for start in range(0, len(values), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        result[part, 0, 0] = (values[part] - mean) / deviation
    return result


def _check_features(values: np.ndarray, where: str) -> None:
    if values.ndim != 2 or values.dtype.kind != "f" or 0 in values.shape:
        raise UserError(
            f"{where}: shape {values.shape}, dtype {values.dtype}, expected floats [n, D], at least one row"
        )
    bad = np.flatnonzero(~np.isfinite(values.sum(1, np.float64)))
    if len(bad):
        raise UserError(f"{where}: row {bad[0]} has numbers that are nan or infinite; {len(bad)} of {len(values)} do")


def _read_npz(file: str, needed: tuple[str, ...], name: str) -> dict[str, np.ndarray]:
    if not file:
        raise UserError(f"data.name={name} needs data.train, the path of an .npz file with {' and '.join(needed)}")
    path = pathlib.Path(file).expanduser()
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
        raise UserError(f"{path}: cannot be read as .npz ({type(error).__name__}: {error})") from None
    if any(array not in content for array in needed):
        raise UserError(f"{path}: has {sorted(content)}, expected at least the arrays {' and '.join(needed)}")
    return content


def _own_arrays(
    data: ConfigDict,
    content: dict[str, np.ndarray],
    what: str,
    check: Callable[[np.ndarray, np.ndarray, str], np.ndarray],
) -> Source:
    """The source in a user's arrays.

    Args:
      data: the group of the configuration.
      content: of `data.train`.
      what: `images` or `features`.
      check: (examples, labels, where for messages) -> the examples as a split has them, training set first.
    """
    path = pathlib.Path(data.train).expanduser()

    def read(prefix: str) -> Split | None:
        examples, labels = content.get(f"{prefix}{what}"), content.get(f"{prefix}labels")
        if (examples is None) != (labels is None):
            raise UserError(f"{path}: has only one of {prefix}{what} and {prefix}labels, expected both or none")
        if examples is None:
            return None
        examples = check(examples, labels, f"{path}: {prefix}{what}")
        clean = content.get("clean_labels") if not prefix else None
        if clean is not None:
            check_labels(clean, len(labels), f"{path}: clean_labels", data.num_classes, lowest=-1)
        names = np.char.add(f"{prefix}{what}/", np.arange(len(labels)).astype(str))
        # What is for testing or trusted is taken at its word.
        return make_split(examples, labels, clean if not prefix else labels, names)

    train, test, trusted = read(""), read("test_"), read("trusted_")
    for name, split in ((f"test_{what}", test), (f"trusted_{what}", trusted)):
        if split is not None and split.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{path}: {name} have shape {split.images.shape[1:]}, expected {train.images.shape[1:]} as {what}"
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
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "webvision": webvision.webvision,
    "imagenet": webvision.imagenet,
    "food101": webvision.food101,
    "controlled_noisy_web_labels": webvision.controlled_noisy_web_labels,
    "image_folder": image_files.image_folder,
    "image_csv": image_files.image_csv,
    "records": records.records,
    "huggingface": huggingface.huggingface,
    "arrays": arrays,
    "features": features,
}
# Which of the keys that say where the data are each source reads; all of them heed the rest of the group.
READS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "fashion_mnist": ("dir",),
    "cifar10": ("dir",),
    "cifar100": ("dir",),
    "webvision": ("dir", "variant", "test", "trusted"),
    "imagenet": ("dir",),
    "food101": ("dir",),
    "controlled_noisy_web_labels": ("dir", "variant"),
    "image_folder": ("dir", "train", "test", "trusted"),
    "image_csv": ("dir", "train", "test", "trusted"),
    "records": ("dir", "variant"),  # the configuration that they were made with may go on saying which variant it is
    "huggingface": ("dir", "variant", "test", "trusted"),
    "arrays": ("train",),
    "features": ("train",),
}


def _resize(split: Split, size: int) -> Split:
    if not split.in_memory:
        return dataclasses.replace(split, images=images.load_resized(split.images, size, split.names))
    if split.images.shape[1:3] == (size, size):
        return split
    parts = [images.square(split.images[row : row + 4096], size).numpy() for row in range(0, len(split), 4096)]
    resized = np.concatenate(parts)
    if split.images.dtype == np.uint8:
        resized = np.round(resized).astype(np.uint8)
    return dataclasses.replace(split, images=resized)
