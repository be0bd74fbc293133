"""The trusted set: a few examples of each class whose labels are right, in an order that makes balanced batches."""

import collections
import csv
import dataclasses
import difflib
import json
import math

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, boolean, number, one_of, within
from ieg_jax.data.images import FileImages, check
from ieg_jax.data.selection import HOLDOUT, TRUSTED, uniforms
from ieg_jax.data.splits import NO_CLASS, UNKNOWN, Source, Split
from ieg_jax.errors import UserError

_HEADERS = ("id", "name", "path")  # of the first column of a CSV file


@dataclasses.dataclass(frozen=True)
class Listing:
    """The examples that a file lists.

    Attributes:
      entries: ids or names, in the order of the file.
      names: where the file is trusted.json of a run, the names of the examples with these ids; else empty.
      source: where it is, `trusted.source` of that run; else "".
    """

    entries: list[str]
    names: list[str] = dataclasses.field(default_factory=list)
    source: str = ""


def split_trusted(source: Source, trusted: ConfigDict) -> tuple[Split, Split]:
    """Chooses the trusted set, and takes it out of the training set.

    It is chosen from the training set, or from the data's separate trusted set where that is a pool; a separate set
    that is no pool is trusted whole. Where `ids` names a file, the examples that it lists are trusted. Otherwise the
    examples of each class are put in an order drawn from (trusted.seed, id), and the first ones are trusted:
    `per_class` of them, or the share `fraction`, rounded, but at least 1. Where `data.unreadable` is skip, the next one
    of its class is drawn for each image of a pool that cannot be decoded; then both are returned.

    Args:
      source: the data, with or without noise.
      trusted: the group `trusted` of the configuration.

    Returns:
      The training set without the trusted examples, or without those that have the name of an example in the separate
      trusted set. And the trusted set: its labels are true, and its classes take turns (0, 1, ..., K-1, 0, 1, ...), so
      that any batch of a multiple of K consecutive examples is balanced. Where such an example is in the training set
      too, with a label of its own there, that is its given label.

    Raises:
      UserError: where a class has too few examples with a known label, or is absent from the trusted set; for a
        list of examples that cannot be read or does not fit; where no training examples are left.
    """
    separate = trusted.source == "separate"
    if separate and source.trusted is None:
        raise UserError(
            f"trusted.source=separate, but {source.name} brings no trusted set (arrays: trusted_images and "
            f"trusted_labels; image_folder, image_csv, webvision: data.trusted); add one, or set trusted.source=train"
        )
    pool, where = (source.trusted, f"the trusted set of {source.name}") if separate else (source.train, source.name)
    if separate and not source.trusted_is_pool:
        if trusted.ids or trusted.fraction:
            key = "ids" if trusted.ids else "fraction"
            raise UserError(
                f"trusted.{key}={trusted[key]!r}, but {where} is trusted whole; leave trusted.{key} unset, "
                f"or set trusted.source=train"
            )
        rows = np.argsort(pool.ids, kind="stable")
    elif trusted.ids:
        rows = _listed_rows(pool, read_ids(trusted.ids), trusted, where)
    else:
        replaces = source.skip_unreadable and separate and isinstance(pool.images, FileImages)
        rows = _drawn_rows(pool, trusted, source, where, replaces)
    chosen = pool.take(rows)
    chosen = dataclasses.replace(
        chosen,
        labels=np.where(chosen.clean_labels >= 0, chosen.clean_labels, chosen.labels),
        given_labels=_given_labels(chosen, source.train if separate else None),
    )
    counts = np.bincount(chosen.labels, minlength=source.num_classes)
    if (counts == 0).any():
        lacks = _class_in_words(source, int(np.argmin(counts)))
        raise UserError(
            f"{f'trusted.ids={trusted.ids!r}' if trusted.ids else where} has no example of {lacks}; expected at least "
            f"one of each of the {source.num_classes} classes"
        )
    if separate:
        trusted_names = set(chosen.names)
        same = np.array([name in trusted_names for name in source.train.names])
    else:
        same = np.isin(source.train.ids, chosen.ids)
    if same.all():
        raise UserError(
            f"the trusted set leaves no training examples of {source.name}; trust fewer (trusted.per_class, "
            f"trusted.fraction, trusted.ids or data.trusted)"
        )
    return source.train.take(np.flatnonzero(~same)), chosen.take(_interleave(chosen.labels))


def _class_in_words(source: Source, number: int) -> str:
    """A class as a person knows it: by its name, where it is listed, and a name like it, which may have been meant."""
    if not source.class_names:
        return f"class {number}"
    name, text = source.class_names[number], f"class {source.class_names[number]!r}"
    if source.listed_at and source.listed_at[number]:
        count = int(np.sum(source.train.labels == number))
        text += f" ({count:,} training example{'s' * (count != 1)}, the first in {source.listed_at[number]})"
    others = {other.casefold(): other for other in source.class_names if other != name}
    alike = difflib.get_close_matches(name.casefold(), others, 1)
    return f"{text}, which is perhaps to be {others[alike[0]]!r}" if alike and not name.isdecimal() else text


def _given_labels(chosen: Split, train: Split | None) -> np.ndarray:
    """The labels `[n]` that trusted examples were given; `train`: the training set where they are not from there."""
    if train is None:
        # Where no true label is known, the given one is taken to be true: nobody checked it.
        return np.where(chosen.clean_labels >= 0, chosen.labels, UNKNOWN)
    wanted = set(chosen.names)  # a dictionary of all names would be the largest thing in memory
    labels = zip(train.names, train.labels.tolist(), strict=True)
    given = {name: label for name, label in labels if name in wanted}
    elsewhere = np.array([given.get(name, UNKNOWN) for name in chosen.names], np.int32)
    return np.where(chosen.given_labels != UNKNOWN, chosen.given_labels, elsewhere)


def hold_out(trusted_set: Split, trusted: ConfigDict) -> tuple[Split, Split | None]:
    """Keeps a share of the trusted set out of training: `holdout` of each class, rounded down.

    Args:
      trusted_set: interleaved by class.
      trusted: the group `trusted` of the configuration.

    Returns:
      What is trained with and what is held out, both interleaved by class; None where nothing is held out.
    """
    numbers = uniforms(trusted.seed, HOLDOUT, trusted_set.ids)
    held = np.zeros(len(trusted_set), bool)
    for label in np.unique(trusted_set.labels):
        rows = np.flatnonzero(trusted_set.labels == label)
        # 1e-9: where rounding leaves a product such as 0.3 · 10 just below a whole number, that number counts.
        count = math.floor(trusted.holdout * len(rows) + 1e-9)
        held[rows[np.argsort(numbers[rows], kind="stable")[:count]]] = True
    if not held.any():
        return trusted_set, None
    kept, out = trusted_set.take(np.flatnonzero(~held)), trusted_set.take(np.flatnonzero(held))
    return kept.take(_interleave(kept.labels)), out.take(_interleave(out.labels))


def validate(trusted: ConfigDict) -> None:
    """Checks what can be judged without the data.

    Raises:
      UserError: for a value that is not allowed, and where both a fraction and a list are given.
    """
    checks = {
        "source": one_of("train", "separate"),
        "per_class": at_least(1, "at least 1: every method is judged with a trusted set"),
        "fraction": number(lambda v: 0 <= v <= 1, "a share in (0, 1], or 0 to take trusted.per_class"),
        "holdout": within(0, 1, open_end=True),
        "join": boolean,
        "seed": at_least(0),
        "batch_size": at_least(0, "0 (as batch_size) or a number of images"),
    }
    config_lib.check_values(trusted, checks, "trusted.")
    if trusted.ids and trusted.fraction:
        raise UserError(
            f"trusted.ids={trusted.ids!r} lists the trusted examples and trusted.fraction={trusted.fraction!r} has "
            f"them drawn; unset one of them"
        )


def read_ids(path: epath.PathLike) -> Listing:
    """Reads the ids or names that a file lists.

    Args:
      path: a file that ends in .json is trusted.json of a run, or a list of ids or names; of one that ends in .csv the
        first column is read, with or without the header id, name or path; any other is a text with one id or name in a
        line. Empty lines do not count.

    Raises:
      UserError: for a file that is missing, damaged or empty.
    """
    file, where = epath.Path(path).expanduser(), f"trusted.ids={str(path)!r}"
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no text in UTF-8 ({error}); expected one id or image name per line") from None
    if file.suffix == ".json":
        listing = _read_json(text, where)
    else:
        lines = csv.reader(text.splitlines()) if file.suffix == ".csv" else ([line] for line in text.splitlines())
        entries = [line[0].strip() for line in lines if line and line[0].strip()]
        has_header = file.suffix == ".csv" and entries and entries[0].lower() in _HEADERS
        listing = Listing(entries[1:] if has_header else entries)
    if not listing.entries:
        raise UserError(f"{where}: lists nothing; expected one id or image name per line")
    return listing


def report(trusted_set: Split, trusted: ConfigDict, num_removed: int = 0, held_out: Split | None = None) -> dict:
    """The contents of trusted.json, which `trusted.ids` of another run can name.

    Args:
      trusted_set: the whole of it, with the part that is held out.
      trusted: the group `trusted` of the configuration.
      num_removed: how many training examples were taken out because they, or images of their names, are trusted.
      held_out: the part that is not trained with, see `hold_out`.
    """
    return {
        "source": trusted.source,
        "seed": trusted.seed,
        "per_class": np.bincount(trusted_set.labels).tolist(),
        "num_removed": num_removed,
        "ids": trusted_set.ids.tolist(),
        "labels": trusted_set.labels.tolist(),
        "names": trusted_set.names.tolist(),
        "held_out_ids": [] if held_out is None else held_out.ids.tolist(),
    }


def _read_json(text: str, where: str) -> Listing:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON ({error}); is the file complete?") from None
    entries = content.get("ids") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(type(entry) in (int, str) for entry in entries):
        raise UserError(f'{where}: expected a list of ids or of names, or {{"ids": [...]}} as in trusted.json of a run')
    about = content if isinstance(content, dict) else {}
    names, source = about.get("names") or [], about.get("source") or ""
    if not isinstance(names, list) or len(names) not in (0, len(entries)):
        raise UserError(
            f"{where}: expected as many names as ids, {len(entries)}; is it trusted.json as a run wrote it?"
        )
    return Listing([str(entry) for entry in entries], [str(name) for name in names], str(source))


def _listed_rows(pool: Split, listing: Listing, trusted: ConfigDict, where: str) -> np.ndarray:
    """The rows of the listed examples, in the order of the list. Its entries are ids if all are whole numbers."""
    path, entries = trusted.ids, listing.entries
    if listing.source not in ("", trusted.source):
        raise UserError(
            f"trusted.ids={path!r} is of a run with trusted.source={listing.source}, but here it is {trusted.source}, "
            f"whose images are others; set trusted.source={listing.source}"
        )
    if all(entry.isdecimal() for entry in entries):
        kind, keys, wanted = "ids", pool.ids.tolist(), [int(entry) for entry in entries]
    else:
        kind, keys, wanted = "names", pool.names.tolist(), entries
    row_of = {key: row for row, key in enumerate(keys)}
    unknown = [key for key in wanted if key not in row_of]
    if unknown:
        raise UserError(
            f"trusted.ids={path!r}: {len(unknown)} of {len(wanted)} are no {kind} of {where}, first {unknown[0]!r}; "
            f"expected {kind} such as {keys[0]!r}"
        )
    repeated = [key for key, count in collections.Counter(wanted).items() if count > 1]
    if repeated:
        raise UserError(f"trusted.ids={path!r}: {repeated[0]!r} is listed more than once; list each example once")
    rows = np.array([row_of[key] for key in wanted])
    other = [place for place, name in enumerate(listing.names) if name != pool.names[rows[place]]]
    if other:
        raise UserError(
            f"trusted.ids={path!r}: {len(other)} of {len(rows)} ids mean other images of {where} than in the run that "
            f"wrote it, first id {wanted[other[0]]}: {pool.names[rows[other[0]]]!r}, expected "
            f"{listing.names[other[0]]!r}; restore the list of the data as it was, or give a file with one name in a "
            f"line to trust the same images, or one with one id in a line to trust these"
        )
    wrong = rows[pool.clean_labels[rows] == NO_CLASS]
    if len(wrong):
        raise UserError(
            f"trusted.ids={path!r}: the label of {len(wrong)} of {len(rows)} is known to be wrong and no true one is "
            f"known (open-set noise, or the data say so), first id {pool.ids[wrong[0]]}; list others"
        )
    return rows


def _drawn_rows(pool: Split, trusted: ConfigDict, source: Source, where: str, replaces: bool) -> np.ndarray:
    """Draws examples and returns their rows; with `replaces`, from files, so many that enough can be decoded."""
    true_labels = pool.clean_labels
    if (true_labels < 0).all():
        raise UserError(
            f"trusted.source={trusted.source}, but no true label of {where} is known; give the data clean_labels, "
            f"list examples in trusted.ids, or give a trusted set of its own with trusted.source=separate"
        )
    counts = np.bincount(true_labels[true_labels >= 0], minlength=source.num_classes)
    if trusted.fraction:
        key, advice, wanted = "fraction", "each class needs one", np.maximum(np.round(trusted.fraction * counts), 1)
    else:
        key, advice, wanted = "per_class", "lower it", np.full(source.num_classes, trusted.per_class)
    short = np.flatnonzero(counts < wanted)
    if len(short):
        raise UserError(
            f"trusted.{key}={trusted[key]!r}, but {_class_in_words(source, short[0])} of {where} has only "
            f"{counts[short[0]]} examples to choose from, those with a known label; {advice}"
        )
    # The examples of each class in random order; the first of each are trusted.
    order = np.argsort(uniforms(trusted.seed, TRUSTED, pool.ids), kind="stable")
    by_class = [order[true_labels[order] == label] for label in range(source.num_classes)]
    taken = wanted = wanted.astype(int)
    while True:
        rows = np.concatenate([ordered[:count] for ordered, count in zip(by_class, taken, strict=True)])
        if not replaces:
            return rows
        # Damaged images stay in the list, so that `sources.load.open_images` leaves them out and names them; others are
        # drawn in addition.
        good = true_labels[rows[_decodable(pool, rows)]]
        lacking = wanted - np.bincount(good, minlength=source.num_classes)
        if not lacking.any():
            return rows
        short = np.flatnonzero((lacking > 0) & (taken == counts))
        if len(short):
            raise UserError(
                f"trusted.{key}={trusted[key]!r}, but of {counts[short[0]]} examples of "
                f"{_class_in_words(source, short[0])} of {where} "
                f"only {(good == short[0]).sum()} can be decoded; {advice}, or mend the others"
            )
        taken = np.minimum(taken + lacking, counts)


def _decodable(pool: Split, rows: np.ndarray) -> np.ndarray:
    """Whether the files of these rows can be decoded, `[n]` bool."""
    # They are checked in the order in which they will be opened: then the outcome is in the cache of `images.check`.
    order, good = _interleave(pool.clean_labels[rows]), np.empty(len(rows), bool)
    good[order] = [not checked.error for checked in check(pool.images.paths[rows[order]])]
    return good


def _interleave(labels: np.ndarray) -> np.ndarray:
    """Rows in the order: the first of each class, the second of each class, ..."""
    rank = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        rank[rows] = np.arange(len(rows))
    return np.lexsort((labels, rank))
