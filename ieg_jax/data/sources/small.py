"""Small published data sets: scikit-learn's digits and Fashion-MNIST."""

import gzip
import pathlib
import struct
import zlib

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data.splits import Source, check_images_and_labels, make_split
from ieg_jax.errors import UserError

FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def digits(data: ConfigDict) -> Source:
    """The 1,797 grey 8×8 digits that come with scikit-learn, 500 of them as the test set.

    scikit-learn does not say which are for testing; here they are drawn, stratified by class and always the same.
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


def fashion_mnist(data: ConfigDict) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey 28×28 images of ten kinds of clothing.

    They are read from the four published IDX files in `data.dir`, or through TFDS where that is empty.

    Raises:
      UserError: for files that are missing or damaged.
    """
    if not data.dir:
        import tensorflow_datasets as tfds  # takes seconds, so only where it is used

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

    The format is: two zero bytes, the type (8 = unsigned byte), the rank, one big-endian uint32 for each dimension,
    then the data, in which the last dimension changes fastest.

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
