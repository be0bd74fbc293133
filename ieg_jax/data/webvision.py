"""WebVision 1.0 (Li et al. 2017), ImageNet beside it, and other web-labelled sets that TFDS has.

WebVision: 2.4 million images crawled from Google and Flickr for the 1,000 classes of ILSVRC 2012. `mini` is the Google
part of the first 50 classes (Jiang et al. 2018), 65,944 training and 2,500 validation images as reported;
`google` the Google part of all classes; `full` both parts.
"""

import os
import pathlib
import re

import numpy as np
import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from ieg_jax.data import records
from ieg_jax.data.image_files import SUFFIXES
from ieg_jax.data.images import FileImages
from ieg_jax.data.splits import NO_CLASS, Source, Split, make_split
from ieg_jax.errors import UserError, check_choice

PARTS = {"mini": ("google",), "google": ("google",), "full": ("google", "flickr")}
MINI_CLASSES = 50
NUM_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")


def webvision(data: ConfigDict) -> Source:
    """WebVision from its published folder, or as records of the TFDS builder in `webvision_tfds.py`.

    `data.dir` is the folder with `info/`, `google/`, `flickr/` and `val_images_256/`, or TFDS's data_dir (a bucket,
    say). `data.variant`: mini (the usual one), google or full. `data.test` = "" evaluates on WebVision's own
    validation set; the place of ImageNet (see `imagenet_split`) evaluates on ImageNet's, classes matched by
    wnid. `data.trusted`, the place of ImageNet too, makes its training set the pool of trusted images.
    """
    variant = data.variant or "mini"
    check_choice("data.variant", variant, PARTS)
    folder, test = pathlib.Path(data.dir).expanduser(), None
    if data.dir and "://" not in data.dir and (folder / "info").is_dir():
        ilsvrc, left_out = read_synsets(folder / "info" / "synsets.txt"), {}
        wnids = ilsvrc[:MINI_CLASSES] if variant == "mini" else ilsvrc
        train = join([read_list(folder, part, len(wnids)) for part in PARTS[variant]])
        if not data.test:
            test = read_list(folder, "val", len(wnids))
    else:
        from ieg_jax.data import webvision_tfds  # noqa: F401  registers the builder

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


def read_synsets(file: pathlib.Path) -> tuple[str, ...]:
    """The wnid of each class: line i of `synsets.txt` begins with that of class i."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected WebVision's info folder")
    lines = [line for line in _read_text(file).splitlines() if line.strip()]
    wnids = tuple(line.split()[0] for line in lines)
    for number, wnid in enumerate(wnids, start=1):
        if not _WNID.fullmatch(wnid):
            raise UserError(f"{file}, line {number}: begins with {wnid!r}, expected a wnid such as n01440764")
    if len(set(wnids)) != len(wnids) or len(wnids) < 2:
        raise UserError(f"{file}: {len(wnids)} lines, {len(set(wnids))} different wnids; expected one for each class")
    return wnids


def read_list(folder: pathlib.Path, part: str, num_classes: int) -> Split:
    """The images of one part with a label below `num_classes`, from `info/train_filelist_google.txt` and its like.

    Lines are `path label`. Paths may be relative to the folder or to the part's own folder: whichever has the
    first file of the list.

    Args:
      folder: of WebVision.
      part: google, flickr or val; the labels of val are taken to be right.
      num_classes: K.

    Raises:
      UserError: for a list that is missing or has other lines, a path listed with two labels, a label outside
        0 ... 999, and images that are not where either reading of the paths says.
    """
    file = folder / "info" / ("val_filelist.txt" if part == "val" else f"train_filelist_{part}.txt")
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected WebVision's info folder")
    labels: dict[str, int] = {}
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise UserError(f"{file}, line {number}: {line!r}, expected a path and a label")
        if int(label) >= NUM_CLASSES:
            raise UserError(f"{file}, line {number}: label {label}, expected 0 to {NUM_CLASSES - 1}")
        if labels.setdefault(path, int(label)) != int(label):
            raise UserError(f"{file}, line {number}: {path} has label {label}, but {labels[path]} further up")
    listed = [(path, label) for path, label in labels.items() if label < num_classes]
    if not listed:
        raise UserError(f"{file}: no image with a label below {num_classes}")
    missing = sorted(set(range(num_classes)) - {label for _, label in listed})
    if missing and part == "google":
        raise UserError(f"{file}: class {missing[0]} has no images, expected some of each of {num_classes} classes")
    roots = [folder, folder / ("val_images_256" if part == "val" else part)]
    found = [root for root in roots if any((root / path).is_file() for path, _ in listed[:100])]
    if not found:
        tried = " nor ".join(str(root / listed[0][0]) for root in roots)
        raise UserError(f"{file}: none of its first images is there: neither {tried}; is the download unpacked?")
    below = "" if found[0] == folder else f"{found[0].name}/"
    names = [below + path for path, _ in listed]
    paths = np.array([f"{folder}/{name}" for name in names], object)
    values = np.array([label for _, label in listed])
    return make_split(FileImages(paths), values, values if part == "val" else None, names)


def imagenet(data: ConfigDict) -> Source:
    """ImageNet (ILSVRC 2012), training and validation set, from `data.dir`: see `imagenet_split`.

    Classes are in the order of their wnids, as everywhere.
    """
    if not data.dir:
        raise UserError("data.name=imagenet needs data.dir: the folder with train/<wnid>/ and val/<wnid>/, or of TFDS")
    builder, folder = _imagenet_place(data.dir)
    if builder:
        wnids = tuple(builder.info.features["label"].names)
    else:
        train = folder / "train"
        found = [entry.name for entry in train.iterdir()] if train.is_dir() else []
        wnids = tuple(sorted(filter(_WNID.fullmatch, found)))
    if len(wnids) < 2:
        raise UserError(f"data.dir={data.dir!r}: expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or a TFDS folder")
    train, test = (imagenet_split(data.dir, split, wnids, wnids, "data.dir") for split in ("train", "val"))
    return Source("imagenet", len(wnids), train, test, class_names=wnids)


def imagenet_split(place: str, split: str, wnids: tuple[str, ...], ilsvrc: tuple[str, ...], key: str) -> Split:
    """Those images of ImageNet's training or validation set whose class is among `wnids`, labelled by their order.

    Args:
      place: a folder with `<wnid>/*.JPEG`, or with the class numbers of ILSVRC (places in the alphabetical order
        of all its wnids), perhaps under `train/` or `val/`; or a TFDS data_dir with `imagenet2012`; or `tfds`, its
        default data_dir.
      split: train or val.
      wnids: `[K]`, class i is the i-th.
      ilsvrc: all wnids of the data set, in any order.
      key: config key, for messages.

    Returns:
      The split; its labels are taken to be true.
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
    """Food-101 (Bossard et al. 2014) through TFDS: 75,750 training images with web labels, 25,250 checked ones."""
    builder = records.open_tfds("food101", data.dir)
    classes = tuple(builder.info.features["label"].names)
    train = records.read_split(builder, "train", "id")  # newer versions have it
    test = records.read_split(builder, "validation", "id", records.labels_of)
    return Source("food101", len(classes), train, test, class_names=classes)


def controlled_noisy_web_labels(data: ConfigDict) -> Source:
    """Controlled noisy web labels on Mini-ImageNet (Jiang et al. 2020) through TFDS: 100 classes, 84×84 pixels.

    `data.variant` is the colour of the noise and its rate in percent: `red_80` (the usual one; labels from the web)
    or `blue_40` (labels drawn), with the rates that TFDS has. What is not `is_clean` counts as known to be wrong.
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
    """One split of several whose images are files; the ids go on counting."""
    images = FileImages(np.concatenate([split.images.paths for split in splits]))
    columns = ("labels", "clean_labels", "names")
    return make_split(images, *(np.concatenate([getattr(split, name) for split in splits]) for name in columns))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _imagenet_place(place: str):
    """(TFDS builder, None) or (None, folder)."""
    folder = epath.Path(place).expanduser()
    try:
        prepared = place == "tfds" or (folder / "imagenet2012").exists()
    except tf.errors.OpError as error:
        raise UserError(f"{place} cannot be reached: {error.message.splitlines()[0]}") from None
    if prepared:
        return records.open_tfds("imagenet2012", "" if place == "tfds" else place), None
    return None, folder
