"""What a data set is made of: splits of images with labels, and the checks that every source makes."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ieg_jax.data.images import JoinedImages, StoredImages, readable
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

UNKNOWN = -1  # as a clean label: the true class is not known
NO_CLASS = -2  # as a clean label: the true class is known to be none of the classes, or only not to be the given one


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
      images: `[n, H, W, C]` in memory, uint8 or float32 in [0, 1]; or `StoredImages`, which are read and decoded
        when they are needed, each of its own size. Both have a length and take an array of rows as index.
      labels: `[n]` int32, as given, possibly wrong.
      clean_labels: `[n]` int32, true labels, or UNKNOWN or NO_CLASS.
      ids: `[n]` int64; an example has the same id in every run.
      names: `[n]` str objects, by which a person finds the image: its path, or its place in an archive.
      given_labels: `[n]` int32, of trusted examples the labels that they were given before somebody checked them;
        UNKNOWN where nobody kept it, and of all other examples.
      previews: `[n]` objects, what a person is shown of an example that is no image: a text, or the path of an image as
        a `pathlib.Path`; "" = nothing. None = nothing of any.
      views: `[n, V-1, 1, 1, D]` float32, of features that were made of images: those of augmented views of each; or
        None.
      pictures: in the form of `images`, the images that features were made of; or None.
    """

    images: np.ndarray | StoredImages
    labels: np.ndarray
    clean_labels: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    given_labels: np.ndarray
    previews: np.ndarray | None = None
    views: np.ndarray | None = None
    pictures: np.ndarray | StoredImages | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        """The examples in these rows, in this order."""
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Split(*(None if column is None else column[rows] for column in columns))

    @property
    def in_memory(self) -> bool:
        """Whether the images are a decoded array."""
        return isinstance(self.images, np.ndarray)

    @property
    def is_features(self) -> bool:
        """Whether these are features: images of one pixel."""
        return self.in_memory and self.images.shape[1:3] == (1, 1)

    @property
    def is_remote(self) -> bool:
        """Whether reading an image takes a request to a bucket."""
        return not self.in_memory and self.images.is_remote

    @property
    def is_visible(self) -> bool:
        """Whether there are images that can be looked at."""
        return self.pictures is not None or not self.is_features

    @functools.cached_property
    def images_tensor(self) -> "tf.Tensor":
        """Images in memory as TensorFlow's, a copy that is made once."""
        return _eager(self.images)

    @functools.cached_property
    def views_tensor(self) -> "tf.Tensor":
        """`views` likewise."""
        return _eager(self.views)

    def originals(self, rows: Iterable[int]) -> Iterator[np.ndarray]:
        """The images in these rows without augmentation, `[H, W, 1 or 3]` uint8, one after the other.

        Raises:
          UserError: naming the image, where it cannot be read or decoded.
        """
        shown = self.images if self.pictures is None else self.pictures
        reader = None if isinstance(shown, np.ndarray) else shown.reader()
        for row in rows:
            if reader is None:
                image = shown[row]
            else:
                image = readable(lambda number: reader(number).whole(), row, self.names[row]).numpy()
            yield image if image.dtype == np.uint8 else np.clip(np.round(image * 255), 0, 255).astype(np.uint8)


def _eager(array: np.ndarray) -> "tf.Tensor":
    with tf.init_scope():  # whoever asks first may be tracing a function, and the tensor outlives that
        return tf.constant(array)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as it comes: without noise, and before trusted and validation examples are taken out.

    Attributes:
      name: of the data set.
      num_classes: K.
      train: the training set.
      test: the test set, or None.
      trusted: a separate trusted set, or None where it is to be taken out of the training set.
      class_names: `[K]`, in the order of the labels; numbers where the classes have no names.
      trusted_is_pool: True where `trusted` is a large set to choose from, False where all of it is to be used.
      left_out: name -> what is wrong with it, for each image that is listed and not used.
      skip_unreadable: whether others are drawn in place of images of a pool that cannot be decoded.
      num_listed: how many training images are listed, with those left out, if ids are places in the list; else 0.
      image_size: pixels of a side to which the images were resized; 0 = they are as they came.
      listed_at: `[K]`, where the first training example of each class is listed, "" = nowhere; () = not in a list.
      notices: what of the files was passed over, and what looks like a mistake, for people.
    """

    name: str
    num_classes: int
    train: Split
    test: Split | None = None
    trusted: Split | None = None
    class_names: tuple[str, ...] = ()
    trusted_is_pool: bool = False
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    skip_unreadable: bool = False
    num_listed: int = 0
    image_size: int = 0
    listed_at: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def joined(first: Split, second: Split) -> Split:
    """The examples of two splits that have neither views nor pictures; their ids must differ.

    Raises:
      UserError: where the images are of different kinds or sizes.
    """
    images = first.images, second.images
    if first.in_memory and second.in_memory and images[0].shape[1:] == images[1].shape[1:]:
        together = np.concatenate(images)
    elif not first.in_memory and not second.in_memory:
        together = JoinedImages.of(*images)
    else:
        kinds = [f"arrays of {one.shape[1:]}" if isinstance(one, np.ndarray) else "files" for one in images]
        raise UserError(
            f"trusted.join: the images of the training set are {kinds[0]} and the trusted ones {kinds[1]}; set "
            f"data.image_size, which makes both arrays of one size"
        )
    columns = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("labels", "clean_labels", "ids", "names", "given_labels")
    }
    previews = None
    if first.previews is not None or second.previews is not None:
        empty = [np.full(len(split), "", object) for split in (first, second)]
        given = (first.previews, second.previews)
        previews = np.concatenate([e if p is None else p for e, p in zip(empty, given, strict=True)])
    return Split(together, **columns, previews=previews)


def in_lines(things: Iterable[str], shown: int = 10) -> str:
    """Lists the first of many things, each in an indented line of its own, and says how many more there are."""
    things = list(things)
    more = [f"... and {len(things) - shown} more"] if len(things) > shown else []
    return "\n".join(f"  {thing}" for thing in things[:shown] + more)


def make_split(
    images: np.ndarray | StoredImages,
    labels: np.ndarray,
    clean_labels: np.ndarray | None = None,
    names: np.ndarray | None = None,
    given_labels: np.ndarray | None = None,
) -> Split:
    """Makes a split with the ids 0, 1, 2, ...; labels that are not told are UNKNOWN, and names are the ids."""
    labels = np.asarray(labels, np.int32)
    clean, given = (
        np.full_like(labels, UNKNOWN) if told is None else np.asarray(told, np.int32)
        for told in (clean_labels, given_labels)
    )
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
        images = np.asarray(images, np.float32)
    ids = np.arange(len(labels), dtype=np.int64)
    # Not `ids.astype(str)`, which would take 84 bytes for each on the way.
    names = np.array(list(map(str, range(len(labels)))), object) if names is None else names
    return Split(images, labels, clean, ids, np.asarray(names, object), given)


def check_images_and_labels(images: np.ndarray, labels: np.ndarray, where: str, num_classes: int) -> None:
    """Checks shapes, dtypes and ranges of images in memory and of their labels.

    Args:
      images: should be `[n, H, W, C]`, C = 1 or 3, uint8 or floats in [0, 1].
      labels: should be `[n]` integers in 0 … `num_classes` − 1.
      where: for the messages.
      num_classes: K, 0 = not known.

    Raises:
      UserError: for the first thing that is not so.
    """
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
    check_labels(labels, len(images), f"{where}: their labels", num_classes, lowest=0)


def narrow_range(images: np.ndarray) -> str:
    """A notice where pixels use less than a tenth of their range, as by a mistake in scaling; "" where they do not.

    Args:
      images: `[n, H, W, C]` uint8, or floats in [0, 1].
    """
    low, high, whole = images.min(), images.max(), 255 if images.dtype == np.uint8 else 1
    if high - low >= 0.1 * whole:
        return ""
    return (
        f"the pixels lie between {low:.3g} and {high:.3g}, in less than a tenth of the range 0 to {whole}: the images "
        f"have hardly any contrast; were they scaled twice, or made whole numbers after scaling?"
    )


def check_labels(labels: np.ndarray, length: int, where: str, num_classes: int, lowest: int) -> None:
    """Checks that `labels` are `length` integers in `lowest` … `num_classes` − 1 (0 = not known).

    Raises:
      UserError: for the first thing that is not so.
    """
    if labels.ndim != 1 or len(labels) != length:
        raise UserError(f"{where}: shape {labels.shape}, expected ({length},), one for each image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: dtype {labels.dtype}, expected integers")
    highest = num_classes - 1 if num_classes else np.iinfo(np.int32).max
    bad = np.flatnonzero((labels < lowest) | (labels > highest))
    if len(bad):
        expected = f"{lowest} to {highest}" + ("" if num_classes else " (set data.num_classes to narrow it)")
        raise UserError(f"{where}: {int(labels[bad[0]])} at place {bad[0]}, expected {expected}")


def distinct(names: Sequence[str]) -> list[str]:
    """Class names for tables: where several classes share a name, each gets its number before it."""
    # Python reads bytes that are no UTF-8, as in the name of a folder, as surrogates, which cannot be written as text.
    shown = [re.sub("[\ud800-\udfff]", "\ufffd", name) for name in names]
    seen: dict[str, int] = {}
    for name in shown:
        seen[name] = seen.get(name, 0) + 1
    return [f"{number} {name}" if seen[name] > 1 else name for number, name in enumerate(shown)]
