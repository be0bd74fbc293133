"""Features of images by a pretrained network, as a table to train on (`data.sources.feature_tables`)."""

import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict
from pyarrow import parquet

from ieg_jax import files
from ieg_jax.data.backbone import Backbone
from ieg_jax.data.feature_cache import Cache, features_of
from ieg_jax.data.images import FileImages
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import UNKNOWN, Source, Split, make_split


def embed(source: Source, out: pathlib.Path, backbone: Backbone, cache: Cache, dtype: str) -> int:
    """Writes a table of features of all images of a source, with what is known of them. Goes on where it was stopped.

    Args:
      source: its labels are written as they are; of a split without any (all UNKNOWN) there is no column.
      out: new .parquet file. One that has appeared in the meantime, from the same command in another process, stays.
      backbone: makes the features.
      cache: where features are kept until the table is complete, and after that (`data.feature_cache.cache_of`).
      dtype: of the features, float16 or float32.

    Returns:
      How many images there are.

    Raises:
      UserError: for an image that cannot be decoded.
      StorageError: where something cannot be written.
    """
    splits = {name: getattr(source, name) for name in ("train", "test", "trusted")}
    splits = {name: split for name, split in splits.items() if split is not None}
    values = features_of(splits, backbone, cache, dtype=dtype)
    table = pa.concat_tables(
        [_table(name, split, values[name][:, 0], source.class_names) for name, split in splits.items()],
        promote_options="default",
    )
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"ieg_jax": json.dumps(dict(backbone.about))}), buffer)
    if not out.exists():
        files.write(out, buffer.getvalue())
    return table.num_rows


def unlabelled(paths: Sequence[str]) -> Source:
    """Image files of which nothing is known, checked.

    Raises:
      UserError: for files that cannot be decoded.
    """
    names = np.array(paths, object)
    split = make_split(FileImages(names), np.full(len(names), UNKNOWN), names=names)
    data = ConfigDict({"unreadable": "refuse"})
    split, _ = sources.check_images(split, data)
    return Source("images", 0, split)


def _table(name: str, split: Split, features: np.ndarray, class_names: Sequence[str]) -> pa.Table:
    names = [str(text).encode("utf-8", "replace").decode() for text in split.names]
    columns: dict[str, Sequence] = {"id": names, "split": [name] * len(split)}
    if isinstance(split.images, FileImages):
        columns["path"] = [str(pathlib.Path(path).expanduser().absolute()) for path in split.images.paths]
    for column in ("label", "clean_label", "given_label"):
        labels = getattr(split, f"{column}s")
        if (labels >= 0).any():
            names = class_names or tuple(map(str, range(int(labels.max()) + 1)))
            columns[column] = [names[label] if label >= 0 else None for label in labels]
    kind = pa.float16() if features.dtype == np.float16 else pa.float32()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), kind), features.shape[1])
    return pa.table(columns).append_column("features", vectors)
