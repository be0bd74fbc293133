"""A user's own images: a folder for each class, or a list (CSV or Parquet) of paths and labels."""

import collections
import os
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import files
from ieg_jax.data.images import FileImages
from ieg_jax.data.sources.lists import (
    SPLITS,
    Listed,
    ListError,
    described,
    first_of_class,
    labels_as_numbers,
    list_rows,
    number_classes,
    of_role,
)
from ieg_jax.data.splits import Source, Split, make_split
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
# Folders that disks in a network, archives of macOS and file managers put beside what is theirs.
FOREIGN_FOLDERS = {"@eadir", "@tmp", "@recycle", "#recycle", "$recycle.bin", "__macosx", "system volume information"}
FOREIGN_FILES = {"thumbs.db", "desktop.ini"}
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "trusted", "clean", "noisy"}


def image_folder(data: ConfigDict) -> Source:
    """Folders with one folder for each class: `data.train`/class/x.jpg; `data.test` and `data.trusted` likewise.

    The classes are the folders' names, in alphabetical order or, where all are whole numbers, in the order of the
    numbers. Files that do not end in one of SUFFIXES are no images, and are counted in the notices; what begins with a
    dot, or is in FOREIGN_FOLDERS or FOREIGN_FILES, is passed over. `data.test` and `data.trusted` may also be lists,
    see `image_csv`.

    Raises:
      ListError: for everything that is wrong with what is listed, at once.
      UserError: for folders and lists that are missing or empty.
    """
    if not data.train or not files.place(data.train).is_dir():
        raise UserError(f"data.train={data.train!r}: no such folder; data.name=image_folder expects class/x.jpg there")
    return _load(data)


def image_csv(data: ConfigDict) -> Source:
    """Lists with the columns `path` and `label`; optional `split`, `clean_label` and `given_label`.

    A file that ends in `.parquet` or `.pq` is read as Parquet, every other one as CSV with a header.
    Paths are relative to `data.dir`, or to the list's own folder where it is empty. `split` is train, test or trusted.
    `data.test` and `data.trusted` name further lists, or folders as for `image_folder`; of rows that say their split
    those count that `lists.of_role` names. Labels are names of classes, sorted, or whole numbers, see
    `lists.number_classes`. In the training set `label` is what is learned from and `clean_label` is for diagnostics; of
    an image for testing or trusted, whose label has to be true, `clean_label` is the label where it is given.
    `given_label` of a trusted image is the label that it had before somebody checked it, right or wrong, from which an
    audit learns how often labels are wrong.

    Raises:
      ListError: for everything that is wrong with what is listed, at once.
      UserError: for folders and lists that are missing, damaged or empty.
    """
    if not data.train or not files.place(data.train).is_file():
        raise UserError(
            f"data.train={data.train!r}: no such file; data.name=image_csv expects a CSV or Parquet file there"
        )
    return _load(data)


def _load(data: ConfigDict) -> Source:
    """Lists the images of all splits."""
    base, listed, notices = base_folder(data), [], []
    for role in SPLITS:
        if data[role]:
            where = files.place(data[role])
            found, told = of_role(list_images(where, base, role, bool(data.dir)), role, data)
            listed += found
            notices += told
            if where.is_dir():
                notices += [f"data.{role}: {notice}" for notice in _passed_over(where)]
    listed, errors = _without_repeats(listed)
    if not any(image.split == "train" for image in listed):
        raise UserError(f"data.train={data.train!r}: no training images in it")
    classes, numbers = number_classes(listed, data.num_classes, errors)
    parts = {split: _to_split([image for image in listed if image.split == split], numbers) for split in SPLITS}
    return Source(
        name=base.name or "images",
        num_classes=len(classes),
        **parts,
        class_names=classes,
        listed_at=first_of_class(listed, numbers),
        notices=tuple(notices),
    )


def base_folder(data: ConfigDict) -> epath.Path:
    """The folder that names of images are relative to: `data.dir`, or where `data.train` is."""
    base = files.place(data.dir or data.train)
    return base if base.is_dir() else base.parent


def list_images(where: epath.Path, base: epath.Path, split: str, relative_to_base: bool) -> list[Listed]:
    """The images of a folder with a folder for each class, or of a list.

    Args:
      where: the folder or list.
      base: names are relative to it.
      split: the split of images that do not say one themselves.
      relative_to_base: paths in a list are relative to `base` rather than to the list's own folder.

    Raises:
      UserError: for a folder without classes, a class without images, a list without the two columns, a line
        without path or label, or a split of another name.
    """
    if where.is_dir():
        return _list_folder(where, base, split)
    if where.is_file():
        return _read_list(where, base, split, relative_to_base)
    raise UserError(f"data.{split}={str(where)!r}: no such folder or list")


def _list_folder(folder: epath.Path, base: epath.Path, split: str) -> list[Listed]:
    classes = [folder / entry.name for entry in _entries(folder) if entry.is_folder]
    if not classes:
        raise UserError(f"data.{split}={str(folder)!r}: no folders in it; expected one for each class, with its images")
    if all(place.name.lower() in SPLIT_NAMES and not _images_in(place) for place in classes):
        names = " and ".join(place.name for place in classes)
        raise UserError(
            f"data.{split}={str(folder)!r}: {names} in it have folders and no images, so these are one level too high; "
            f"expected a folder for each class, as perhaps in {classes[0]}"
        )
    listed = []
    for place in classes:
        paths = list(images_below(place))
        if not paths:
            raise UserError(
                f"data.{split}: class {place.name!r} has no images in {place} "
                f"(files ending in {', '.join(sorted(SUFFIXES))}); remove the folder or fill it"
            )
        label = unicodedata.normalize("NFC", place.name)
        listed += [Listed(str(p), _name(str(p), str(base)), label, "", "", split, f"{place}: {p.name}") for p in paths]
    return listed


def images_below(folder: epath.Path) -> Iterator[epath.Path]:
    """The image files of a folder and of those in it. Each folder is searched once, however many links lead there."""
    return (file for file in _files_below(folder) if file.suffix.lower() in SUFFIXES)


def _files_below(folder: epath.Path, seen: set[str] | None = None) -> Iterator[epath.Path]:
    seen, real = set() if seen is None else seen, str(folder) if files.is_remote(folder) else os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if entry.is_folder:
            yield from _files_below(folder / entry.name, seen)
        elif entry.is_file:
            yield folder / entry.name


class _Entry(NamedTuple):
    """What is in a folder; neither folder nor file is a pipe or a device, which would never end."""

    name: str
    is_folder: bool
    is_file: bool


def _entries(folder: epath.Path) -> list[_Entry]:
    """What is in a folder, sorted by name, without what is nobody's: FOREIGN_FOLDERS, FOREIGN_FILES, `.name`."""
    foreign = FOREIGN_FOLDERS | FOREIGN_FILES
    try:
        if files.is_remote(folder):  # of a bucket one request says it all: names of folders end in /
            names = tf.io.gfile.listdir(str(folder))
            found = [_Entry(name.rstrip("/"), name.endswith("/"), not name.endswith("/")) for name in names]
        else:
            with os.scandir(folder) as entries:
                found = [_Entry(entry.name, entry.is_dir(), entry.is_file()) for entry in entries]
    except files.storage_errors() as error:
        raise UserError(f"{folder}: cannot be listed ({getattr(error, 'strerror', None) or error})") from None
    return sorted(one for one in found if not one.name.startswith(".") and one.name.lower() not in foreign)


def _images_in(folder: epath.Path) -> bool:
    return any(os.path.splitext(one.name)[1].lower() in SUFFIXES and one.is_file for one in _entries(folder))


def _passed_over(folder: epath.Path) -> list[str]:
    """Notices on the folder of a split: files in it that are no images, and folders within those of classes."""
    endings = collections.Counter(file.suffix.lower() for file in _files_below(folder))
    others = {ending: count for ending, count in endings.items() if ending not in SUFFIXES}
    nested = [f"{entry.name}/{below.name}" for entry in _entries(folder) if entry.is_folder
              for below in _entries(folder / entry.name) if below.is_folder]  # fmt: skip
    notices = []
    if others:
        of_each = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in sorted(others.items()))
        notices.append(f"{sum(others.values()):,} files are passed over, as their ending is of no image ({of_each})")
    if nested:
        more = f" and {len(nested) - 5} more" if len(nested) > 5 else ""
        notices.append(
            f"images in folders within those of classes are of the outer one ({', '.join(nested[:5])}{more}); where "
            f"the inner ones are the classes, name a folder that is one level below"
        )
    return notices


def _read_list(file: epath.Path, base: epath.Path, split: str, relative_to_base: bool) -> list[Listed]:
    root, listed, errors = str(base if relative_to_base else file.parent), [], []
    for where, row in list_rows(file):
        try:
            image = _listed(row, f"{file}, {where}", root, str(base), split)
            listed += [image] if image else []
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise ListError(errors, listed)
    if not listed:
        raise UserError(f"{file}: no images listed")
    return listed


def _listed(row: dict, where: str, root: str, base: str, split: str) -> Listed | None:
    """The image that one row lists; None for a row with nothing in it."""
    values = described(row, where, split, ("path", "label"))
    if values is None:
        return None
    if any(character in values["path"] for character in "\r\n\0"):
        raise UserError(
            f"{where}: path {values['path'][:40]!r}... goes over several lines; is a quotation mark left open?"
        )
    path = _on_disk(os.path.join(root, values["path"]))
    labels = (values[name] for name in ("label", "clean_label", "given_label", "split"))
    return Listed(path, _name(path, base), *labels, where)


def _on_disk(path: str) -> str:
    """The path as the disk has it, where an umlaut in it is composed (é) in the list and not there, or the reverse."""
    if path.isascii() or files.is_remote(path) or os.path.exists(path):
        return path
    others = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.exists(other)), path)


def _name(path: str, base: str) -> str:
    if not files.is_remote(path):
        path, base = os.path.abspath(path), os.path.abspath(base)
    return path.removeprefix(base.rstrip("/") + "/")


def _without_repeats(listed: list[Listed]) -> tuple[list[Listed], list[str]]:
    """Each image once in each split; and an error for each that is listed again with another label."""
    seen: dict[tuple[str, str], Listed] = {}
    errors = []
    for image in listed:
        first = seen.setdefault((image.split, image.name), image)
        for column in ("label", "clean_label", "given_label"):
            got, before = getattr(image, column), getattr(first, column)
            if got != before:
                errors.append(
                    f"{image.where}: {image.name} has {column} {got!r}, but {before!r} in {first.where}; keep one of "
                    f"the two"
                )
    return list(seen.values()), errors


def _to_split(listed: list[Listed], numbers: dict[str, int]) -> Split | None:
    if not listed:
        return None
    labels, clean, given = labels_as_numbers(listed, numbers)
    images = FileImages(np.array([image.path for image in listed], object))
    return make_split(images, labels, clean, [image.name for image in listed], given)
