"""Sharded records (TFRecord files as TFDS writes them), read by random access.

A TFRecord file can only be read from front to back, unless one knows where each record begins. So beside the
records lies an index, `index-<split>.npz`: for each record its shard, its byte offset, and all its features but
the image. With it any record is one seek away, locally or in a bucket, so the order of an epoch can be a function of
(seed, step), and labels are known without reading images. `ieg_jax.data.prepare` writes the index; for records that
TFDS prepared it is made at the first use, by reading them once.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.progress import track

from ieg_jax.data import images
from ieg_jax.data.splits import UNKNOWN, Source, Split
from ieg_jax.errors import StorageError, UserError
from ieg_jax.files import is_remote, storage_errors, write_arrays
from ieg_jax.lazy import tf

_FRAME = struct.Struct("<QI")  # length of the record and its checksum; the data and their checksum follow


@dataclasses.dataclass(frozen=True)
class RecordImages(images.StoredImages):
    """Encoded images in TFRecord files, as the feature `image` of a tf.train.Example.

    Attributes:
      files: the shards.
      shards: `[n]` int32, which shard a record is in.
      offsets: `[n]` int64, the byte of the shard at which a record begins.
    """

    files: tuple[str, ...]
    shards: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: np.ndarray) -> RecordImages:
        return RecordImages(self.files, self.shards[rows], self.offsets[rows])

    @property
    def is_remote(self) -> bool:
        """Whether the shards are on a bucket."""
        return any(map(is_remote, self.files[:1]))

    def reader(self) -> Callable[[tf.Tensor], images.Encoded]:
        """A function row -> Encoded."""
        files, shards, offsets = tf.constant(self.files), tf.constant(self.shards), tf.constant(self.offsets)

        def read(row):
            # TensorFlow has no reader of single records. So this takes the first one of a tf.data data set that starts
            # at the record's offset.
            records = tf.raw_ops.TFRecordDatasetV2(
                filenames=files[shards[row]][None],
                compression_type="",
                buffer_size=tf.constant(0, tf.int64),
                byte_offsets=offsets[row][None],
            )
            kind = {"output_types": [tf.string], "output_shapes": [[]]}
            first = tf.raw_ops.TakeDataset(input_dataset=records, count=tf.constant(1, tf.int64), **kind)
            (record,) = tf.raw_ops.DatasetToSingleElement(dataset=first, **kind)
            parsed = tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})
            return images.Encoded(parsed["image"], tf.constant(True))

        return read


def records(data: ConfigDict) -> Source:
    """What `ieg_jax.data.prepare` wrote to `data.dir`: the split `train`, and `test` and `trusted` if there are such.

    Raises:
      UserError: for a folder without records, and for damaged ones.
    """
    folder = epath.Path(data.dir).expanduser() if data.dir else None
    if folder is None or not (folder / "dataset_info.json").exists():
        raise UserError(
            f"data.dir={data.dir!r} holds no records (no dataset_info.json); "
            f"make them with python -m ieg_jax.data.prepare, or name their folder"
        )
    import tensorflow_datasets as tfds  # takes seconds, so only where it is used

    builder = tfds.builder_from_directory(str(folder))
    classes = tuple(builder.info.features["label"].names)
    splits = {name: read_split(builder, name) for name in ("train", "test", "trusted") if name in builder.info.splits}
    prepared = folder / "prepared.json"
    num_listed = json.loads(prepared.read_text()).get("num_listed", {}) if prepared.exists() else {}
    return Source(
        builder.name,
        len(classes),
        **splits,
        class_names=classes,
        num_listed=num_listed.get("train", 0),  # records that an older version wrote do not say it
    )


def open_tfds(name: str, folder: str):
    """A TFDS builder whose data are there; they are downloaded and prepared if need be.

    Args:
      name: of the data set, `name` or `name/config`.
      folder: TFDS's `data_dir`; "" = its default.

    Raises:
      UserError: where the data can be neither found nor made, with TFDS's own reason.
    """
    import tensorflow_datasets as tfds  # takes seconds, so only where it is used

    place = epath.Path(folder).expanduser() if folder else None
    if place is not None and not place.is_dir():  # TFDS would make the folder and download the data to it
        raise UserError(f"data.dir={folder!r}: no such folder; expected one of TFDS, or the published files of {name}")
    try:
        builder = tfds.builder(name, data_dir=place and str(place))
        builder.download_and_prepare()
    except Exception as error:  # of the network, the file system, a missing manual download, ...
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"TFDS cannot provide {name} in data.dir={folder!r} ({type(error).__name__}: {reason}); prepare it there "
            f"on a machine with a network (tfds build {name} --data_dir=...), or name a folder with the published files"
        ) from None
    return builder


def read_split(
    builder,
    split: str,
    name: str = "name",
    clean: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
) -> Split:
    """A split of records that TFDS or `ieg_jax.data.prepare` wrote.

    Args:
      builder: the TFDS builder of the data set.
      split: name of the split.
      name: the feature that names an image; without this feature an image is named by its place.
      clean: table of features -> `[n]` clean labels; by default the feature `clean_label`, or UNKNOWN without it.

    Returns:
      The split; its images are read by random access. Ids are the feature `id` where that is a number, else places.

    Raises:
      UserError: for records in another format than TFRecord, and see `load_index`.
    """
    info = builder.info.splits[split]
    if builder.info.file_format.file_suffix != "tfrecord":
        raise UserError(
            f"{builder.info.full_name} in {builder.data_dir} is stored as {builder.info.file_format.value}, expected "
            f"tfrecord; prepare it again with file_format=tfrecord"
        )
    files = tuple(str(path) for path in info.filepaths)
    table = load_index(epath.Path(str(builder.data_dir)), split, files, info.num_examples)
    place = np.arange(len(table["offset"]), dtype=np.int64)
    unknown = np.full(len(place), UNKNOWN)
    return Split(
        RecordImages(files, table["shard"].astype(np.int32), table["offset"]),
        table["label"].astype(np.int32),
        (clean(table) if clean else table.get("clean_label", unknown)).astype(np.int32),
        table["id"] if "id" in table and table["id"].dtype.kind == "i" else place,
        (table[name].astype(str) if name in table else np.char.add(f"{split}/", place.astype(str))).astype(object),
        table.get("given_label", unknown).astype(np.int32),
    )


def labels_of(table: dict[str, np.ndarray]) -> np.ndarray:
    """The given labels; the argument `clean` of `read_split` for data sets whose labels are taken to be right."""
    return table["label"]


def load_index(folder: epath.Path, split: str, files: tuple[str, ...], expected: int) -> dict[str, np.ndarray]:
    """The index of a split; it is made first where it is not there.

    Args:
      folder: of the records. Where it cannot be written to, the index is kept in the user's cache.
      split: name of the split.
      files: the shards, in order.
      expected: how many records there should be.

    Returns:
      `shard`, `offset` and the features, `[n]` each.

    Raises:
      UserError: for a damaged or missing shard, and another number of records than expected.
    """
    cached = epath.Path(images.cache_folder() / "indexes" / f"{str(folder).strip('/').replace('/', '_')}-{split}.npz")
    # An index beside its records is valid as long as the shards have the same sizes: a copy of the folder has other
    # times. One in the cache must match the times too, as other records may have taken the place of those it is of.
    sizes, times = _stats(files).T
    places = ((index_path(folder, split), sizes), (cached, np.concatenate([sizes, times])))
    for path, stamp in places:
        table = read_table(path)
        if np.array_equal(table.pop("stamp", None), stamp):
            return table
    shards = track(files, f"indexing {split}", transient=True, disable=len(files) < 4)
    table = join_indexes([index_shard(file, number) for number, file in enumerate(shards)])
    if len(table["offset"]) != expected:
        raise UserError(f"{folder}: split {split} has {len(table['offset'])} records, expected {expected}")
    for path, stamp in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, table | {"stamp": stamp})
            break
        except (*storage_errors(), StorageError):  # a folder that we may only read
            continue
    return table


def read_table(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; an empty dict where it is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            return dict(archive)
    except (*storage_errors(), ValueError, EOFError, zipfile.BadZipFile):
        return {}


def write_index(folder: epath.Path, split: str, files: tuple[str, ...], table: dict[str, np.ndarray]) -> list[int]:
    """Writes the index of a split beside its records; returns the size of each shard in bytes."""
    sizes = _stats(files)[:, 0].tolist()
    write_arrays(index_path(folder, split), table | {"stamp": np.array(sizes)})
    return sizes


def index_path(folder: epath.Path, split: str) -> epath.Path:
    """The file beside the records that holds the index of a split."""
    return folder / f"index-{split}.npz"


def index_shard(file: str, number: int) -> dict[str, np.ndarray]:
    """Makes the index of one shard by reading it from front to back.

    Returns:
      `shard` (= `number`), `offset`, and one column for each feature that is a single number or text; `[n]`.
    """
    rows = [{"shard": number, "offset": offset} | _features(record, file) for offset, record in read_records(file)]
    if not rows:
        return {"shard": np.zeros(0, np.int64), "offset": np.zeros(0, np.int64)}
    return {key: np.array([row[key] for row in rows]) for key in rows[0] if all(key in row for row in rows)}


def join_indexes(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the indexes of the shards of a split, in order."""
    parts = [part for part in parts if len(part["offset"])] or parts[:1]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def read_records(file: str) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, record) of a TFRecord file.

    Raises:
      UserError: for a file that is missing or ends inside a record.
    """
    offset = 0
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            while header := stream.read(_FRAME.size):
                length = _FRAME.unpack(header)[0] if len(header) == _FRAME.size else 0
                body = stream.read(length + 4)
                if len(header) < _FRAME.size or len(body) < length + 4:
                    raise UserError(f"{file}: ends inside a record at byte {offset}; is the copy complete?")
                yield offset, body[:length]
                offset += _FRAME.size + length + 4
    except tf.errors.OpError as error:
        raise UserError(f"{file}: cannot be read: {error.message}") from None


def _features(record: bytes, file: str) -> dict:
    """The features of a record that are a single number or text; not the image."""
    try:
        example = tf.train.Example.FromString(record)
    except Exception:  # protobuf's error, whose type depends on its implementation
        raise UserError(f"{file}: holds something else than tf.train.Example records") from None
    row = {}
    for name, feature in sorted(example.features.feature.items()):  # they have no order
        if name == "image":
            continue
        if len(feature.int64_list.value) == 1:
            row[name] = feature.int64_list.value[0]
        elif len(feature.bytes_list.value) == 1:
            row[name] = feature.bytes_list.value[0].decode("utf-8", "replace")
    return row


def _stats(files: tuple[str, ...]) -> np.ndarray:
    """What `_stat` says of each file, `[n, 2]` int64; many are asked at once, as on a bucket each is a round trip."""
    with concurrent.futures.ThreadPoolExecutor(images.READS_IN_FLIGHT) as pool:
        return np.array(list(pool.map(_stat, files)), np.int64).reshape(-1, 2)


def _stat(file: str) -> tuple[int, int]:
    """The bytes of a file, and the time of its last change in nanoseconds."""
    try:
        found = tf.io.gfile.stat(file)
    except tf.errors.OpError as error:
        raise UserError(f"{file}: cannot be read: {error.message}") from None
    return found.length, found.mtime_nsec
