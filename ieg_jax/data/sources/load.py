"""Loads the source that a configuration names, and checks its images.

A source gives a training set, perhaps a test set, and perhaps a separate trusted set, each a `Split`. All that is read
from files is checked before anything long starts.
"""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.data import images
from ieg_jax.data.sources import cifar, huggingface, image_files, records, webvision
from ieg_jax.data.sources.arrays import arrays, features
from ieg_jax.data.sources.small import digits, fashion_mnist
from ieg_jax.data.splits import Source, Split, in_lines
from ieg_jax.errors import UserError

SIZES_READ = 200  # records that are decoded to find their sizes
LARGEST, SMALLEST, STEP = 64, 8, 4  # pixels of a side, for `fitting_size`


def load(data: ConfigDict) -> Source:
    """Loads the source that `config.data` names; its images are checked and, with `data.image_size`, in memory.

    Args:
      data: the group `data` of the configuration; where `image_size` is AUTO, images are resized to `fitting_size` of
        the training images. `Source.image_size` says what that is.

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
    left_out, size = dict(source.left_out), data.image_size
    for name, split in splits.items():
        if split is not None and not (name == "trusted" and source.trusted_is_pool):
            split, bad = check_images(split, data, source.class_names)
            if size == config_lib.AUTO:  # the first split is that of the training images
                size = fitting_size(split)
            splits[name] = resize(split, size)
            left_out |= bad
    num_classes, num_listed = data.num_classes or source.num_classes, source.num_listed
    if np.array_equal(source.train.ids, np.arange(len(source.train))):
        num_listed = num_listed or len(source.train)
    return dataclasses.replace(
        source, num_classes=num_classes, num_listed=num_listed, left_out=left_out, image_size=size, **splits
    )


def list_source(data: ConfigDict) -> Source:
    """The source that `config.data` names, as its files list it; no image is decoded yet.

    Raises:
      UserError: for a key that is set and that the source does not read, and for lists that cannot be used.
    """
    check_reads(data)
    for key in ("dir", "train", "test", "trusted"):
        path = data[key]
        if path and "://" not in path and not os.path.isabs(os.path.expanduser(path)) and not os.path.exists(path):
            raise UserError(
                f"data.{key}={path!r}: there is nothing in {os.getcwd()}, to which the path is relative; start "
                f"where it is, or give the whole path"
            )
    return dataclasses.replace(REGISTRY[data.name].read(data), skip_unreadable=data.unreadable == "skip")


def check_reads(data: ConfigDict) -> None:
    """Raises UserError for a key that is set and that the source does not read."""
    places = dict.fromkeys(("dir", "variant", "train", "test", "trusted"), "")
    reads = {name: reader.reads for name, reader in REGISTRY.items()}
    config_lib.check_unread(data, places, reads, "name", "data.")


def open_images(
    split: Split, data: ConfigDict, size: int, class_names: tuple[str, ...] = ()
) -> tuple[Split, dict[str, str]]:
    """Checks the images of a split (`check_images`), and resizes those that are left (`resize`)."""
    split, left_out = check_images(split, data, class_names)
    return resize(split, size), left_out


def check_images(split: Split, data: ConfigDict, class_names: tuple[str, ...] = ()) -> tuple[Split, dict[str, str]]:
    """Makes the images of a split readable: those in files are decoded once, and bad ones are left out.

    Args:
      split: of a source.
      data: the group `data` of the configuration.
      class_names: `[K]`, for messages; where they are not known the numbers are shown.

    Returns:
      The split, and name -> what is wrong with it for each image that was left out.

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
    return split, left_out


def fitting_size(split: Split) -> int:
    """A side in pixels for images of various sizes: the median of their shorter sides, 8 to 64, a multiple of 4."""
    side = np.median(image_sizes(split).min(1))
    return max(SMALLEST, min(LARGEST, int(side)) // STEP * STEP)


def image_sizes(split: Split) -> np.ndarray:
    """Heights and widths of the images in pixels, int `[n, 2]`.

    n is 1 for images in memory, which all have one size. In records the sizes are not noted, so `SIZES_READ` images
    are decoded, evenly spread.
    """
    if split.in_memory:
        return np.array([split.images.shape[1:3]])
    sizes = getattr(split.images, "sizes", None)
    if sizes is not None:
        return sizes
    rows = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int))
    read = split.images.reader()
    return np.array([images.readable(lambda r: read(r).whole(), row, split.names[row]).shape[:2] for row in rows])


def check_no_class_is_lost(split: Split, left_out: dict[str, str], class_names: tuple[str, ...]) -> None:
    """Raises UserError for a class all of whose images are in `left_out`; the message has the first of them."""
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


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kind of source.

    Attributes:
      read: the group `data` of the configuration -> Source.
      reads: which of the keys that say where the data are it reads: dir, variant, train, test, trusted. All sources
        heed the rest of the group.
    """

    read: Callable[[ConfigDict], Source]
    reads: tuple[str, ...] = ()


REGISTRY: dict[str, Reader] = {
    "digits": Reader(digits),
    "fashion_mnist": Reader(fashion_mnist, ("dir",)),
    "cifar10": Reader(cifar.cifar10, ("dir",)),
    "cifar100": Reader(cifar.cifar100, ("dir",)),
    "webvision": Reader(webvision.webvision, ("dir", "variant", "test", "trusted")),
    "imagenet": Reader(webvision.imagenet, ("dir",)),
    "food101": Reader(webvision.food101, ("dir",)),
    "controlled_noisy_web_labels": Reader(webvision.controlled_noisy_web_labels, ("dir", "variant")),
    "image_folder": Reader(image_files.image_folder, ("dir", "train", "test", "trusted")),
    "image_csv": Reader(image_files.image_csv, ("dir", "train", "test", "trusted")),
    # The configuration that records were made with may go on saying which variant of the data set they are.
    "records": Reader(records.records, ("dir", "variant")),
    "huggingface": Reader(huggingface.huggingface, ("dir", "variant", "test", "trusted")),
    "arrays": Reader(arrays, ("train",)),
    "features": Reader(features, ("train", "test", "trusted")),
}


def resize(split: Split, size: int) -> Split:
    """The split with square images of `size` pixels a side, in memory; with size 0 nothing is changed."""
    if not size:
        return split
    if not split.in_memory:
        return dataclasses.replace(split, images=images.load_resized(split.images, size, split.names))
    if split.images.shape[1:3] == (size, size):
        return split
    parts = [images.square(split.images[row : row + 4096], size).numpy() for row in range(0, len(split), 4096)]
    resized = np.concatenate(parts)
    if split.images.dtype == np.uint8:
        resized = np.round(resized).astype(np.uint8)
    return dataclasses.replace(split, images=resized)
