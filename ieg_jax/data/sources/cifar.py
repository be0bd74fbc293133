"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32×32 pixels, 10 or 100 classes.

Three forms are read: the published binary files, the published python files (pickles), and what TFDS prepared. The
binary and the python files hold the same images in the same order. TFDS shuffles the images and keeps their places in
the feature `id`, by which they are brought back into that order. So an id means the same image in all three forms, and
label noise, trusted sets and the human labels of CIFAR-N, which go by ids, are the same too.
"""

import dataclasses

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import unpickle
from ieg_jax.data import published
from ieg_jax.data.sources import records
from ieg_jax.data.splits import Source, Split, check_labels, make_split
from ieg_jax.errors import UserError

CIFAR100_SUPERCLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# The fine labels are numbered in alphabetical order.
CIFAR100_CLASSES = tuple(sorted(name for members in CIFAR100_SUPERCLASSES.values() for name in members))

SIZES = {"train": published.SETS["cifar10"].num_train, "test": 10_000}  # images, in both data sets
_PIXELS = 3 * 32 * 32  # bytes of an image: first all red values, then green, then blue, each row by row


@dataclasses.dataclass(frozen=True)
class Archives:
    """How one of the two data sets is published.

    Attributes:
      name: of the data set, here and in TFDS.
      files: split -> its python files, in order; the binary ones are called `<file>.bin`.
      binary_folder, python_folder: the folders that the two archives unpack to.
      label_bytes: how many bytes stand before each image of a binary file; the last of them is the label.
      label_key: the key of the labels in a python file.
      class_names: `[K]`, in the order of the labels.
    """

    name: str
    files: dict[str, tuple[str, ...]]
    binary_folder: str
    python_folder: str
    label_bytes: int
    label_key: bytes
    class_names: tuple[str, ...]


CIFAR10 = Archives(
    name="cifar10",
    files={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    label_bytes=1,
    label_key=b"labels",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = Archives(
    name="cifar100",
    files={"train": ("train",), "test": ("test",)},
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    label_bytes=2,  # superclass and class
    label_key=b"fine_labels",
    class_names=CIFAR100_CLASSES,
)


def cifar10(data: ConfigDict) -> Source:
    """CIFAR-10; `data.dir` as in `load`."""
    return load(CIFAR10, data.dir)


def cifar100(data: ConfigDict) -> Source:
    """CIFAR-100 with its 100 (fine) classes; `data.dir` as in `load`."""
    return load(CIFAR100, data.dir)


def load(archives: Archives, folder: str) -> Source:
    """Reads one of the two data sets into memory.

    Args:
      archives: which of the two.
      folder: holds the published binary or python files, or the folder that their archive unpacks to (binary files are
        preferred, as they need no pickle); or it is TFDS's data_dir. "" = TFDS's default data_dir, to which TFDS
        downloads the data if they are not there.

    Returns:
      The source. Images are uint8 `[n, 32, 32, 3]`, ids are places in the published order, and the labels, which are
      right, are the clean labels too.

    Raises:
      UserError: for a folder with none of these, for files that are missing, damaged or of another size than the
        published ones, and for whatever keeps TFDS from providing the data.
    """
    folder = str(epath.Path(folder).expanduser()) if folder else ""  # TFDS does not know what ~ means
    found = _find(archives, epath.Path(folder)) if folder else None
    if found:
        splits = {split: _from_files(archives, *found, split) for split in SIZES}
    else:
        builder = records.open_tfds(archives.name, folder)
        splits = {split: _from_tfds(builder, split) for split in SIZES}
    return Source(archives.name, class_names=archives.class_names, num_classes=len(archives.class_names), **splits)


def _find(archives: Archives, folder: epath.Path) -> tuple[epath.Path, str] | None:
    """The folder of the published files and their suffix; None where `folder` is TFDS's."""
    files = [file for names in archives.files.values() for file in names]
    incomplete = ""
    for suffix, subfolder in ((".bin", archives.binary_folder), ("", archives.python_folder)):
        for place in (folder, folder / subfolder):
            missing = [file + suffix for file in files if not (place / (file + suffix)).is_file()]
            if not missing:
                return place, suffix
            if len(missing) < len(files):
                incomplete = f"{place} lacks {', '.join(missing)}"
    if incomplete:
        raise UserError(f"data.dir={str(folder)!r}: {incomplete}; is the archive unpacked completely?")
    if (folder / archives.name).is_dir():
        return None
    packed = sorted(folder.glob(f"{archives.name.replace('cifar', 'cifar-')}-*.tar.gz")) if folder.is_dir() else []
    if packed:
        raise UserError(f"data.dir={str(folder)!r}: unpack it first: tar -xzf {packed[0]} -C {folder}")
    raise UserError(
        f"data.dir={str(folder)!r} holds no {archives.name}; expected {files[0]}.bin ... {files[-1]}.bin or "
        f"{files[0]} ... {files[-1]} in it, or in its {archives.binary_folder}/ or {archives.python_folder}/, "
        f"or {archives.name}/ of TFDS; data.dir='' lets TFDS download it"
    )


def _from_files(archives: Archives, place: epath.Path, suffix: str, split: str) -> Split:
    paths = [place / (file + suffix) for file in archives.files[split]]
    expected = SIZES[split] // len(paths)
    images, labels = np.empty((SIZES[split], 32, 32, 3), np.uint8), np.empty(SIZES[split], np.int32)
    for number, path in enumerate(paths):
        if suffix:
            pixels, given = read_binary(path, expected, archives.label_bytes)
        else:
            pixels, given = read_python(path, expected, archives.label_key)
        check_labels(given, expected, f"{path}: its labels", len(archives.class_names), lowest=0)
        rows = slice(number * expected, (number + 1) * expected)
        images[rows] = pixels.reshape(expected, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[rows] = given
    return _split(images, labels, split)


def read_binary(path: epath.Path, expected: int, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a file of the binary version: for each image its label bytes, then its pixels.

    Args:
      path: the file.
      expected: number of images.
      label_bytes: how many bytes stand before each image; the last of them is the label.

    Returns:
      Pixels `[expected, 3072]` uint8 and labels `[expected]` uint8.

    Raises:
      UserError: for another size.
    """
    content = _read(path)
    record = label_bytes + _PIXELS
    if len(content) != expected * record:
        raise UserError(
            f"{path}: {len(content)} bytes, expected {expected * record} ({expected} images of {record} bytes); "
            f"is the copy complete?"
        )
    rows = np.frombuffer(content, np.uint8).reshape(expected, record)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


def read_python(path: epath.Path, expected: int, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Reads a file of the python version: a pickled dict with `data` uint8 `[n, 3072]` and a list of labels.

    Args:
      path: the file.
      expected: number of images.
      label_key: the key of the labels.

    Returns:
      Pixels `[expected, 3072]` uint8 and labels `[expected]` integers.

    Raises:
      UserError: for other keys, shapes or types, and a pickle that holds anything but data.
    """
    content = unpickle.loads(_read(path), str(path))
    if not isinstance(content, dict) or not {b"data", label_key} <= content.keys():
        got = list(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: holds {got}, expected a dict with the keys {b'data'} and {label_key}")
    pixels, labels = content[b"data"], content[label_key]
    got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
    if got != f"uint8 {(expected, _PIXELS)}":
        raise UserError(f"{path}: data are {got}, expected uint8 {(expected, _PIXELS)}; is the copy complete?")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise UserError(f"{path}: {label_key.decode()} are no list of integers")
    return pixels, np.array(labels)


def _from_tfds(builder, split: str) -> Split:
    import tensorflow_datasets as tfds  # takes seconds, so only where it is used

    try:
        table = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
    except Exception as error:  # of the file system, damaged records, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"{builder.info.full_name} in {builder.data_dir} cannot be read ({type(error).__name__}: {reason}); "
            f"prepare it again (tfds build {builder.name} --overwrite --data_dir=...)"
        ) from None
    order = np.argsort(table["id"])  # the order of texts is the published order, as all ids have five digits
    for place, got in enumerate(table["id"][order]):
        if got != f"{split}_{place:05d}".encode():
            raise UserError(
                f"{builder.info.full_name} in {builder.data_dir}: image {place} of {split} in the order of ids has the "
                f"id {got.decode()}, expected {split}_{place:05d}; prepare it again"
            )
    return _split(table["image"][order], table["label"][order], split)


def _split(images: np.ndarray, labels: np.ndarray, split: str) -> Split:
    names = [f"{split}/{place:05d}" for place in range(len(labels))]
    return make_split(images, labels, labels, np.array(names))


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
