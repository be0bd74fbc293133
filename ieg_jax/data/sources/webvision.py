"""WebVision 1.0 (Li et al. 2017), ImageNet beside it, and other web-labelled sets that TFDS has.

WebVision has 2.4 million images crawled from Google and Flickr for the 1,000 classes of ILSVRC 2012. `mini` is the
Google part of the first 50 classes (Jiang et al. 2018), which is reported to have 65,944 training and 2,500 validation
images; `google` is the Google part of all classes, `full` both parts. A wnid is the name of a class in WordNet, such as
n01440764.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax.data.images import FileImages
from ieg_jax.data.sources import records, webvision_lists
from ieg_jax.data.sources.image_files import SUFFIXES
from ieg_jax.data.splits import NO_CLASS, Source, Split, make_split
from ieg_jax.errors import UserError, check_choice
from ieg_jax.lazy import tf


def webvision(data: ConfigDict) -> Source:
    """WebVision from its published folder, or as records of the TFDS builder in `webvision_tfds.py`.

    `data.dir` is the folder with `info/`, `google/`, `flickr/` and `val_images_256/`, or TFDS's data_dir (a bucket,
    say). `data.variant` is mini (also where it is empty), google or full. With `data.test` = "" accuracy is measured on
    WebVision's own validation set; where it is the place of ImageNet (see `imagenet_split`), on ImageNet's, whose
    classes are matched by wnid. `data.trusted` may be the place of ImageNet too: then trusted images are chosen from
    its training set.

    Raises:
      UserError: for an unknown variant, and for lists or images that are missing or not as published.
    """
    variant = data.variant or "mini"
    check_choice("data.variant", variant, webvision_lists.PARTS)
    folder, test = pathlib.Path(data.dir).expanduser(), None
    if data.dir and "://" not in data.dir and (folder / "info").is_dir():
        ilsvrc, left_out = webvision_lists.read_synsets(folder / "info" / "synsets.txt"), {}
        wnids = ilsvrc[: webvision_lists.MINI_CLASSES] if variant == "mini" else ilsvrc
        train = join([webvision_lists.read_list(folder, part, len(wnids)) for part in webvision_lists.PARTS[variant]])
        if not data.test:
            test = webvision_lists.read_list(folder, "val", len(wnids))
    else:
        builder = records.open_tfds(f"webvision/{variant}", data.dir)
        wnids = tuple(builder.info.features["label"].names)
        ilsvrc, left_out = tuple(builder.info.metadata["wnids"]), builder.info.metadata["left_out"]
        train = records.read_split(builder, "train", "file_name")
        if not data.test:
            test = records.read_split(builder, "validation", "file_name", clean=records.labels_of)
    if data.test:
        test = imagenet_split(data.test, "val", wnids, ilsvrc, "data.test")
    trusted = imagenet_split(data.trusted, "train", wnids, ilsvrc, "data.trusted") if data.trusted else None
    name = f"webvision_{variant}"
    return Source(name, len(wnids), train, test, trusted, wnids, trusted_is_pool=True, left_out=left_out)


def imagenet(data: ConfigDict) -> Source:
    """ImageNet (ILSVRC 2012), its training and validation set, from `data.dir`: see `imagenet_split`.

    Classes are in the order of their wnids, as is usual.

    Raises:
      UserError: for a folder without these images.
    """
    if not data.dir:
        raise UserError("data.name=imagenet needs data.dir: the folder with train/<wnid>/ and val/<wnid>/, or of TFDS")
    builder, folder = _imagenet_place(data.dir)
    if builder:
        wnids = tuple(builder.info.features["label"].names)
    else:
        train = folder / "train"
        found = [entry.name for entry in train.iterdir()] if train.is_dir() else []
        wnids = tuple(sorted(filter(webvision_lists.WNID.fullmatch, found)))
    if len(wnids) < 2:
        raise UserError(f"data.dir={data.dir!r}: expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or a TFDS folder")
    train, test = (imagenet_split(data.dir, split, wnids, wnids, "data.dir") for split in ("train", "val"))
    return Source("imagenet", len(wnids), train, test, class_names=wnids)


def imagenet_split(place: str, split: str, wnids: tuple[str, ...], ilsvrc: tuple[str, ...], key: str) -> Split:
    """Those images of ImageNet's training or validation set whose class is among `wnids`, labelled by their order.

    Args:
      place: a folder with `<wnid>/*.JPEG`, or with the class numbers of ILSVRC (places in the alphabetical order
        of all its wnids) in place of the wnids, perhaps under `train/` or `val/`; or a TFDS data_dir with
        `imagenet2012`; or `tfds`, which means TFDS's default data_dir.
      split: train or val.
      wnids: `[K]`, that of class i is the i-th.
      ilsvrc: all wnids of the data set, in any order.
      key: config key, for messages.

    Returns:
      The split; its labels are taken to be true.

    Raises:
      UserError: where images of a class are missing, and for image files in a bucket.
    """
    builder, folder = _imagenet_place(place)
    if builder:
        number = {wnid: label for label, wnid in enumerate(wnids)}
        to_label = np.array([number.get(wnid, -1) for wnid in builder.info.features["label"].names])
        whole = records.read_split(builder, {"val": "validation"}.get(split, split), "file_name")
        part = whole.take(np.flatnonzero(to_label[whole.labels] >= 0))
        return make_split(part.images, to_label[part.labels], to_label[part.labels], part.names)
    if "://" in place:
        raise UserError(
            f"{key}={place!r}: image files are read from local folders only; in a bucket TFDS's imagenet2012 can be "
            f"read, or records that ieg_jax.data.prepare made"
        )
    folder = folder / split if (folder / split).is_dir() else folder
    classes = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    if len(classes) == len(ilsvrc) and all(name.isdecimal() for name in classes):
        classes = {wnid: classes[str(number)] for number, wnid in enumerate(sorted(ilsvrc)) if str(number) in classes}
    missing = [wnid for wnid in wnids if wnid not in classes]
    if missing:
        raise UserError(
            f"{key}={place!r}: no folder for {len(missing)} of {len(wnids)} classes, first {missing[0]}, in {folder}; "
            f"expected <wnid>/*.JPEG for each, or a TFDS folder with imagenet2012"
        )
    paths, labels = [], []
    for label, wnid in enumerate(wnids):
        found = sorted(f"{classes[wnid]}/{file}" for file in os.listdir(classes[wnid]) if _is_image(file))
        if not found:
            raise UserError(f"{key}={place!r}: no images of class {wnid} in {classes[wnid]}")
        paths += found
        labels += [label] * len(found)
    names = [f"{wnids[label]}/{os.path.basename(path)}" for path, label in zip(paths, labels, strict=True)]
    return make_split(FileImages(np.array(paths, object)), np.array(labels), np.array(labels), names)


def food101(data: ConfigDict) -> Source:
    """Food-101 (Bossard et al. 2014) through TFDS: 75,750 training images with web labels, 25,250 checked for testing.

    Raises:
      UserError: where TFDS cannot provide the data.
    """
    builder = records.open_tfds("food101", data.dir)
    classes = tuple(builder.info.features["label"].names)
    train = records.read_split(builder, "train", "id")  # newer versions of the data set have this feature
    test = records.read_split(builder, "validation", "id", records.labels_of)
    return Source("food101", len(classes), train, test, class_names=classes)


def controlled_noisy_web_labels(data: ConfigDict) -> Source:
    """Controlled noisy web labels on Mini-ImageNet (Jiang et al. 2020) through TFDS: 100 classes, 84×84 pixels.

    `data.variant` is the colour of the noise and its rate in percent, such as `red_80` (also where it is empty) or
    `blue_40`, with the rates that TFDS has. Red labels come from the web, blue ones are drawn. The labels of examples
    that are not `is_clean` count as known to be wrong.

    Raises:
      UserError: for an unknown variant, and where TFDS cannot provide the data.
    """
    colour, _, rate = (data.variant or "red_80").partition("_")
    check_choice("data.variant", colour, ("red", "blue"))
    builder = records.open_tfds(f"controlled_noisy_web_labels/mini_imagenet_{colour}", data.dir)
    rates = [name.removeprefix("train_") for name in builder.info.splits if name.startswith("train_")]
    check_choice(f"data.variant, the rate behind {colour}_", rate, rates)

    def clean(table):
        return np.where(table["is_clean"] == 1, table["label"], NO_CLASS)

    train = records.read_split(builder, f"train_{rate}", "id", clean)
    test = records.read_split(builder, "validation", "id", records.labels_of)
    return Source(f"mini_imagenet_{colour}_{rate}", builder.info.features["label"].num_classes, train, test)


def join(splits: list[Split]) -> Split:
    """Joins several splits of image files into one; ids are places in it."""
    images = FileImages(np.concatenate([split.images.paths for split in splits]))
    columns = ("labels", "clean_labels", "names")
    return make_split(images, *(np.concatenate([getattr(split, name) for split in splits]) for name in columns))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _imagenet_place(place: str):
    """Where ImageNet is: (TFDS builder, None) or (None, folder)."""
    folder = epath.Path(place).expanduser()
    try:
        prepared = place == "tfds" or (folder / "imagenet2012").exists()
    except tf.errors.OpError as error:
        raise UserError(f"{place} cannot be reached: {error.message.splitlines()[0]}") from None
    if prepared:
        return records.open_tfds("imagenet2012", "" if place == "tfds" else place), None
    return None, folder
