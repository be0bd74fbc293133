"""Writes sharded records: a data set in a form that a training reads fast, from a disk or a bucket."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ieg_jax import cli, files
from ieg_jax import config as config_lib
from ieg_jax.data import check, images
from ieg_jax.data import trusted as trusted_set
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources import records
from ieg_jax.data.splits import Split, in_lines
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

INCOMPLETE = ".incomplete"  # ends the name of a shard that is being written


@dataclasses.dataclass(frozen=True)
class Shards:
    """What is to be written, and in which files; the same for every run of one command.

    Attributes:
      name: of the data set.
      splits: name -> split.
      class_names: `[K]`.
      examples_per_shard: listed images in one file; fewer are in it where some cannot be decoded.
      resize: pixels; an image whose shorter side is longer is made that small. 0 = none is.
    """

    name: str
    splits: dict[str, Split]
    class_names: tuple[str, ...]
    examples_per_shard: int
    resize: int

    def files(self) -> list[tuple[str, int, np.ndarray]]:
        """(split, number, rows) of each file."""
        return [
            (name, number, np.arange(start, min(start + self.examples_per_shard, len(split))))
            for name, split in self.splits.items()
            for number, start in enumerate(range(0, len(split), self.examples_per_shard))
        ]

    def file_name(self, split: str, number: int) -> str:
        """The name of a shard's file, as TFDS has it."""
        total = -(-len(self.splits[split]) // self.examples_per_shard)
        return f"{self.name}-{split}.tfrecord-{number:05d}-of-{total:05d}"

    def task(self, split: str, number: int, rows: np.ndarray) -> Task:
        """The work on one of the files."""
        part = self.splits[split].take(rows)
        return Task(
            split,
            number,
            self.file_name(split, number),
            self.resize,
            paths=tuple(map(str, part.images.paths)),
            names=tuple(map(str, part.names)),
            labels=tuple(part.labels.tolist()),
            clean_labels=tuple(part.clean_labels.tolist()),
            given_labels=tuple(part.given_labels.tolist()),
            ids=tuple(part.ids.tolist()),
        )

    def fingerprint(self) -> dict:
        """What plan.json holds: by it a later run knows that it would write the same images with the same labels."""
        digest = hashlib.sha256()
        for split in self.splits.values():
            for column in (split.names, split.labels, split.clean_labels, split.given_labels, split.ids):
                digest.update("\n".join(map(str, column.tolist())).encode())
        sizes = {name: len(split) for name, split in self.splits.items()}
        return {
            "name": self.name,
            "images": sizes,
            "examples_per_shard": self.examples_per_shard,
            "resize": self.resize,
            "sha256_of_lists": digest.hexdigest(),
        }


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard that is to be written: texts and numbers, so that it can be sent to another machine as JSON.

    Attributes:
      split, number: which shard it is.
      file_name: of the shard.
      resize: see `Shards`.
      paths, names: `[n]` texts, of the images.
      labels, clean_labels, given_labels, ids: `[n]` whole numbers, see `Split`.
    """

    split: str
    number: int
    file_name: str
    resize: int
    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    clean_labels: tuple[int, ...]
    given_labels: tuple[int, ...]
    ids: tuple[int, ...]

    def state_of_files(self) -> str:
        """A hash of the sizes and times of the image files: by it a later run knows that none has changed."""
        with concurrent.futures.ThreadPoolExecutor(images.READS_IN_FLIGHT) as pool:
            stats = list(pool.map(images.stat, self.paths))
        return hashlib.sha256(repr(stats).encode()).hexdigest()


# Settles (see `settle`) all tasks of the shards in a folder; it returns when that is done.
Write = Callable[[Shards, epath.Path], None]


def list_shards(config: ConfigDict, examples_per_shard: int, resize: int) -> Shards:
    """Lists the images that `config` names.

    Raises:
      UserError: for images that are no files, and for whatever is wrong with the lists.
    """
    if config.data.image_size:
        raise UserError(f"data.image_size={config.data.image_size} is for images in memory; use --resize here")
    source = sources.list_source(config.data)
    trusted = source.trusted
    if source.trusted_is_pool and trusted is not None:
        trusted = trusted_set.split_trusted(source, config.trusted)[1] if config.trusted.source == "separate" else None
    splits = {"train": source.train, "test": source.test, "trusted": trusted}
    splits = {name: split for name, split in splits.items() if split is not None}
    for name, split in splits.items():
        if not isinstance(split.images, images.FileImages):
            raise UserError(
                f"data.name={config.data.name}: its {name} images are in memory or in records already; this command "
                f"is for image files"
            )
    name = re.sub("[^a-z0-9]+", "_", source.name.lower()).strip("_")
    name = name if name[:1].isalpha() else f"images_{name}".strip("_")
    classes = source.class_names or tuple(map(str, range(source.num_classes)))
    return Shards(name, splits, classes, examples_per_shard, resize)


def prepare(
    config: ConfigDict, out: epath.PathLike, examples_per_shard: int = 1024, resize: int = 0, write: Write | None = None
) -> dict:
    """Writes the records that `config` names, or what is missing of them.

    Args:
      config: its group `data` says what is written, `trusted` which images of a pool are trusted, and
        `data.unreadable` what to do about images that cannot be decoded.
      out: folder, local or on a bucket.
      examples_per_shard: images in one file.
      resize: pixels; images whose shorter side is longer are made that small, 0 = none is.
      write: settles all tasks, wherever it likes; None = `write_here`.

    Returns:
      `{"images": {split: written}, "num_listed": {split: n}, "left_out": {name: error}, "bytes": n}`.

    Raises:
      UserError: where `out` holds other data, and for images that cannot be decoded with `data.unreadable=refuse`,
        after all others have been written.
    """
    check.validate(config)
    shards, out = list_shards(config, examples_per_shard, resize), epath.Path(out).expanduser()
    _claim(out, shards)
    if (out / "dataset_info.json").exists():
        for split, number, rows in shards.files():
            state = shards.task(split, number, rows).state_of_files()
            if _read_note(out, split, number).get("state_of_files") != state:
                raise UserError(f"{out} is finished, and image files have changed since; name another folder")
        return json.loads((out / "prepared.json").read_text())
    (write or write_here)(shards, out)
    left_out: dict[str, str] = {}
    for split, number, _ in shards.files():
        left_out |= _read_note(out, split, number)["left_out"]
    _check_left_out(config, shards, out, left_out)
    return _finish(shards, out, left_out)


def write_here(shards: Shards, out: epath.Path) -> None:
    """Settles all tasks in this process, one after the other."""
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=Console(stderr=True)) as progress:
        shown = progress.add_task("writing records", total=sum(map(len, shards.splits.values())))
        for split, number, rows in shards.files():
            settle(shards.task(split, number, rows), out)
            progress.advance(shown, len(rows))


def _claim(out: epath.Path, shards: Shards) -> None:
    """Makes the folder, or checks that an earlier run with the same shards has begun it."""
    recipe, fingerprint = out / "plan.json", shards.fingerprint()
    if recipe.exists():
        changed = config_lib.differences(json.loads(recipe.read_text()), fingerprint)
        if changed:
            raise UserError(f"{out} holds records of other data (there -> now):\n  " + "\n  ".join(changed))
        return
    cli.check_new_folder("--out", out)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    files.write_json(recipe, fingerprint)


def _part(out: epath.Path, split: str, number: int, suffix: str) -> epath.Path:
    """A file about a finished shard: with the suffix .json a note (see `_read_note`), with .npz its index."""
    return out / "parts" / f"{split}-{number:05d}{suffix}"


def _read_note(out: epath.Path, split: str, number: int) -> dict:
    """What was noted about a shard, `left_out` and `state_of_files`; empty where it is not finished."""
    note = _part(out, split, number, ".json")
    return json.loads(note.read_text()) if note.exists() else {}


def settle(task: Task, out: epath.Path) -> None:
    """Writes a shard, unless it is there, with all images that the system can read, and none has changed since.

    It may be called for the same shard by several processes at once, and again after one was killed: each writes a file
    of its own, which gets the name of the shard when it is complete and verified.

    Args:
      task: the shard.
      out: folder that `prepare` has begun.

    Raises:
      UserError: where a shard reads back differently from what was written.
    """
    state, note = task.state_of_files(), _read_note(out, task.split, task.number)
    unread = any(error.startswith(images.CANNOT_BE_READ) for error in note.get("left_out", {}).values())
    if note.get("state_of_files") != state or unread:
        _write_shard(task, out, state)


def _write_shard(task: Task, out: epath.Path, state: str) -> None:
    """Writes a shard and what belongs to it. The note about it comes last: it says "finished"."""
    temporary = out / "parts" / f"{task.file_name}.{uuid.uuid4().hex}{INCOMPLETE}"
    hashes, left_out = [], {}
    with tf.io.TFRecordWriter(str(temporary)) as writer:
        for row, (content, error) in enumerate(_in_order(task)):
            if error:
                left_out[task.names[row]] = error
                continue
            hashes.append(hashlib.sha256(content).hexdigest())
            writer.write(_example(task, row, content))
    _verify(temporary, hashes)
    index = records.index_shard(str(temporary), task.number)
    files.write_arrays(_part(out, task.split, task.number, ".npz"), index)
    temporary.replace(out / task.file_name)
    note = {"left_out": left_out, "state_of_files": state}
    files.write_json(_part(out, task.split, task.number, ".json"), note)


def _verify(shard: epath.Path, hashes: list[str]) -> None:
    """Reads back what was written: TensorFlow's reader checks the sums, and the hashes are of the bytes handed over.

    Raises:
      UserError: where something else is read.
    """
    parsed = tf.data.TFRecordDataset(str(shard)).map(
        lambda record: tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})["image"]
    )
    found = [hashlib.sha256(content).hexdigest() for content in parsed.as_numpy_iterator()]
    if found != hashes:
        raise UserError(f"{shard}: reads back differently from what was written; is the disk in order?")


def _in_order(task: Task) -> Iterator[tuple[bytes, str]]:
    """Yields (bytes to store, error) for each file, in order; only a few at a time are in memory."""
    at_once, waiting = images.reads_at_once(task.paths), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for path in task.paths:
            waiting.append(pool.submit(_read, path, task.resize))
            if len(waiting) > max(at_once, 4 * (os.cpu_count() or 1)):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(path: str, resize: int) -> tuple[bytes, str]:
    content, error = images.read(path)
    return (content, error) if error else images.storable(content, resize)


def _example(task: Task, row: int, content: bytes) -> bytes:
    def integer(value):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    def text(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image": text(content),
        "label": integer(task.labels[row]),
        "clean_label": integer(task.clean_labels[row]),
        "given_label": integer(task.given_labels[row]),
        "id": integer(task.ids[row]),
        "name": text(task.names[row].encode()),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)  # else the order of the features is another in each process


def _check_left_out(config: ConfigDict, shards: Shards, out: epath.Path, left_out: dict[str, str]) -> None:
    """Raises UserError for images that were left out where `sources.load.check_images` would raise it."""
    if not left_out:
        return
    files.write_json(out / "left_out.json", left_out)
    if config.data.unreadable == "refuse":
        raise UserError(
            f"{len(left_out)} images cannot be decoded, all are in {out / 'left_out.json'}:\n"
            f"{in_lines(f'{name}: {error}' for name, error in left_out.items())}\n"
            f"all others are written; mend these files, or add --config.data.unreadable=skip, and run the same "
            f"command again to finish"
        )
    for split in shards.splits.values():
        sources.check_no_class_is_lost(split, left_out, shards.class_names)


def _finish(shards: Shards, out: epath.Path, left_out: dict[str, str]) -> dict:
    """Writes the indexes and TFDS's description, which makes the folder complete.

    Files that were being written by processes that were killed are removed.
    """
    import tensorflow_datasets as tfds  # takes seconds, so only where it is used

    for file in (out / "parts").glob(f"*{INCOMPLETE}"):
        file.unlink(missing_ok=True)
    infos, result = [], {"images": {}, "num_listed": {}, "left_out": left_out, "bytes": 0}
    for name in shards.splits:
        numbers = [number for split, number, _ in shards.files() if split == name]
        parts = [records.read_table(_part(out, name, number, ".npz")) for number in numbers]
        paths = tuple(str(out / shards.file_name(name, number)) for number in numbers)
        sizes = records.write_index(out, name, paths, records.join_indexes(parts))
        lengths = [len(part["offset"]) for part in parts]
        infos.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=lengths,
                num_bytes=sum(sizes),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=out, dataset_name=shards.name, split=name, filetype_suffix="tfrecord"
                ),
            )
        )
        result["images"][name] = sum(lengths)
        result["num_listed"][name] = len(shards.splits[name])
        result["bytes"] += sum(sizes)
    files.write_json(out / "prepared.json", result)
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(shards.class_names)),
                "clean_label": np.int64,
                "given_label": np.int64,
                "id": np.int64,
                "name": tfds.features.Text(),
            }
        ),
        split_infos=infos,
        description=f"{shards.name}, written by ieg_jax.data.prepare",
        check_data=False,
    )
    return result
