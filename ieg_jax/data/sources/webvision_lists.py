"""Reads the published lists of WebVision: the names of the classes, and which image has which label."""

import pathlib
import re

import numpy as np

from ieg_jax.data.images import FileImages
from ieg_jax.data.splits import Split, make_split
from ieg_jax.errors import UserError

PARTS = {"mini": ("google",), "google": ("google",), "full": ("google", "flickr")}
MINI_CLASSES = 50
NUM_CLASSES = 1000
WNID = re.compile(r"n\d{8}")


def read_synsets(file: pathlib.Path) -> tuple[str, ...]:
    """The wnid of each class: line i of `synsets.txt` begins with that of class i.

    Raises:
      UserError: for a file that is missing or has other lines.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected WebVision's info folder")
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    wnids = tuple(line.split()[0] for line in lines)
    for number, wnid in enumerate(wnids, start=1):
        if not WNID.fullmatch(wnid):
            raise UserError(f"{file}, line {number}: begins with {wnid!r}, expected a wnid such as n01440764")
    if len(set(wnids)) != len(wnids) or len(wnids) < 2:
        raise UserError(f"{file}: {len(wnids)} lines, {len(set(wnids))} different wnids; expected one for each class")
    return wnids


def read_list(folder: pathlib.Path, part: str, num_classes: int) -> Split:
    """The images of one part with a label below `num_classes`, from `info/train_filelist_google.txt` and its like.

    Lines are `path label`. Paths are relative to the folder or to the part's own folder, in whichever one of the first
    files of the list is found.

    Args:
      folder: of WebVision.
      part: google, flickr or val; the labels of val are taken to be right.
      num_classes: K.

    Raises:
      UserError: for a list that is missing or has other lines, a path listed with two labels, a label outside
        0 ... 999, and images that are in neither folder.
    """
    file = folder / "info" / ("val_filelist.txt" if part == "val" else f"train_filelist_{part}.txt")
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected WebVision's info folder")
    labels: dict[str, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
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


def read_text(file: pathlib.Path) -> str:
    """The text of a list; raises UserError where it is not UTF-8."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
