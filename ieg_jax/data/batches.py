"""From a configuration to batches as global arrays.

Which example stands at which place of which batch, and how it is augmented, is a function of (seed, position)
computed with stateless operations: position = step · batch size + place in the batch. So a run that starts at
step s simply begins to count there, and every host can compute its own part. tf.data runs it beside the
training, on the host's processors: for each image on its own, and for features of a batch at once, where an operation
costs less than what TensorFlow does around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.data import augment, draws, order, transfer
from ieg_jax.data.images import READS_IN_FLIGHT, Encoded, reason, to_float
from ieg_jax.data.load import Data
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf
from ieg_jax.methods.base import ALL_VIEWS, MAIN, TRUSTED, Stream

# The random numbers of a run come in numbered streams. A stream of examples uses two: for order and augmentation.
_STREAMS = {MAIN: (0, 1), "probe": (3, 2)}
_VIEW = 4  # for the views of `EvalBatches`
_MORE_STREAMS = 5  # and up: two for each stream of examples with another name


def train_batches(
    config: ConfigDict,
    data: Data,
    streams: Mapping[str, Stream],
    start_step: int,
    num_steps: int,
    sharding: jax.sharding.Sharding,
    rows: Mapping[str, np.ndarray] | None = None,
    epoch_start: int = 0,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of steps `start_step` ... `num_steps` − 1.

    Args:
      config: the configuration.
      data: from `load_data`.
      streams: of the method, name -> `methods.base.Stream`.
      start_step: the first step; any step may be the first, nothing before it is computed.
      num_steps: steps of the whole run.
      sharding: of the leading dimension of every array.
      rows: stream -> the rows that it draws from, `[n]` increasing; a stream that is not named draws from all.
      epoch_start: the step from which passes over `rows` are counted.

    Yields:
      `image [B,H,W,C]` float32 in [-1, 1], or features `[B,1,1,D]`, `label`, `clean_label`, `id` and `row` `[B]` int32,
      and what the other streams give, such as `views [B,V-1,H,W,C]`, `probe_image [Bp,H,W,C]`, `probe_label [Bp]`.
      Images are of another type where `data.transfer` says so, until `transfer.received`.

    Raises:
      UserError: for a stream with no rows to draw from, for images that the augmentation leaves with different sizes,
        and where images can no longer be read.
    """
    parts = []
    for number, (name, stream) in enumerate(streams.items()):
        source = data.trusted if stream.source == TRUSTED else data.train
        chosen = (rows or {}).get(name)
        if chosen is not None and not len(chosen):
            raise UserError(f"step {start_step}: the method has chosen no row for its stream {name}")
        part = _Stream(config, name, number, stream, source, chosen, epoch_start)
        size = batch_size_of(config, stream)
        parts.append(_batched(part.example, size, start_step, num_steps, source.is_remote, part.at_once))
    merged = tf.data.Dataset.zip(tuple(parts)).map(lambda *batches: {k: v for b in batches for k, v in b.items()})
    _check_shape(merged, "augment.standard")
    yield from assembled(merged, sharding)


def assembled(batches: tf.data.Dataset, sharding: jax.sharding.Sharding) -> Iterator[dict[str, jax.Array]]:
    """Yields batches as global arrays; the next ones are made in the meantime, and one is on its way to the devices.

    So a step need not wait for its images where the loop has waited for the devices, as it does for metrics. One batch
    more than the step's own is in device memory.

    Args:
      batches: the parts of them that this process holds.
      sharding: of the leading dimension.
    """
    ahead = None
    for batch in _read(batches.prefetch(4)):
        ready, ahead = ahead, to_global(batch, sharding)  # which does not wait until the devices have it
        if ready is not None:
            yield ready
    if ahead is not None:
        yield ahead


def batch_size_of(config: ConfigDict, stream: Stream) -> int:
    """The number of examples of a stream in a batch, over all devices."""
    return config_lib.get(config, stream.size) or config.batch_size


def views_of(config: ConfigDict, stream: Stream) -> int:
    """The number of views of each example of a stream."""
    return config.augment.num_views if stream.views is ALL_VIEWS else stream.views


def work_of_an_example(config: ConfigDict, streams: Mapping[str, Stream]) -> tuple[float, float]:
    """What the host has to do for one noisy example, the trusted images that go with it included.

    Returns:
      How many views are made, and how many images are read, of which these are views.
    """
    sizes = {name: batch_size_of(config, stream) / config.batch_size for name, stream in streams.items()}
    return sum(size * views_of(config, streams[name]) for name, size in sizes.items()), sum(sizes.values())


class _Stream:
    """The examples of one stream by their position."""

    def __init__(
        self,
        config: ConfigDict,
        name: str,
        number: int,
        stream: Stream,
        source: Split,
        rows: np.ndarray | None,
        epoch_start: int,
    ):
        self._config, self._is_main, self._prefix = config, name == MAIN, "" if name == MAIN else f"{name}_"
        self._reader, self._rows = _Reader(source), None if rows is None else tf.constant(rows, tf.int64)
        self._num_views = views_of(config, stream)
        self._standard = augment.parse_policy(config.augment.standard, "augment.standard")
        self._strong = augment.parse_policy(config.augment.strong, "augment.strong")
        policies = ["standard", "strong"] if self._num_views > 1 else ["standard"]
        self.at_once = _at_once(source, [config.augment[policy] for policy in policies])
        more = _MORE_STREAMS + 2 * number
        order_stream, self._image_stream = _STREAMS.get(name) or (more, more + 1)
        self._begin = epoch_start * batch_size_of(config, stream)
        count = self._reader.size if rows is None else len(rows)
        row_of = order.balanced_rows if stream.balanced else order.shuffled_rows
        if stream.balanced and stream.source != TRUSTED:  # these are not interleaved by class
            row_of = functools.partial(order.rows_by_turns, shuffled=True)
        if config.class_weight == "balanced":
            keeps_order = stream.source == TRUSTED and stream.balanced and not config.trusted.shuffle
            row_of = functools.partial(order.rows_by_turns, shuffled=not keeps_order)
        labels = source.labels if rows is None else source.labels[rows]
        self._place = row_of(config, order_stream, count, labels)

    def _row_of(self, position: tf.Tensor) -> tf.Tensor:
        if self._rows is None:
            return self._place(position)
        # Passes over chosen rows are counted from the step of the choice, so that the first begins there.
        return tf.gather(self._rows, self._place(position - self._begin))

    def example(self, position: tf.Tensor) -> dict[str, tf.Tensor]:
        """What stands at a position of the stream, or with `at_once` at consecutive ones."""
        row = self._row_of(position)
        seed = _seed(self._config.seed, self._image_stream, position)
        original, labels = self._reader.view(row, draws.fold(seed, 0)), self._reader.labels(row)
        if not self._is_main:
            labels = {name: labels[name] for name in ("label", "row")}
        image = self._standard(original, draws.fold(seed, 0) if self._is_main or self._num_views > 1 else seed)
        example = {"image": transfer.sent(image, self._config.data.transfer), **labels}
        if self._num_views > 1:
            base = original if self._config.augment.views_of == "original" else image
            seeds = [draws.fold(seed, view) for view in range(1, self._num_views)]
            if self._reader.has_views:  # each strong view is of another one than the standard view
                views = [self._strong(self._reader.view(row, one), one) for one in seeds]
            else:
                views = [self._strong(base, one) for one in seeds]
            example["views"] = transfer.sent(tf.stack(views, -4), self._config.data.transfer)
            if views[0].shape != image.shape:
                raise UserError(
                    f"augment.strong makes views of shape {views[0].shape}, and the standard view is "
                    f"{image.shape}; with augment.views_of=original let it begin as augment.standard does"
                )
        return {f"{self._prefix}{name}": value for name, value in example.items()}


# augment.views_of -> the policies that make a strong view, one after the other.
VIEW_OF = {"standard": ("standard", "strong"), "original": ("strong",)}


class EvalBatches:
    """Batches that show each example of a split once; the last one is padded and masked.

    They can be iterated any number of times. Each has `image [n,H,W,C]` float32 in [-1, 1], as `augment.evaluation`
    makes it, `label [n]` int32, and `mask [n]` float32, 1 for real examples; n = `eval_batch_size`, over all devices.
    """

    def __init__(self, config: ConfigDict, split: Split, sharding: jax.sharding.Sharding, view: int | None = None):
        """Builds the tf.data pipeline.

        Args:
          config: the configuration.
          split: the examples.
          sharding: of the leading dimension.
          view: None = images as `augment.evaluation` makes them; a number = a strong view as in training
            (`augment.views_of`), which is a function of the run's seed, this number and the example's id.

        Raises:
          UserError: for images that the augmentation leaves with different sizes.
        """
        reader = _Reader(split)
        names = ("evaluation",) if view is None else VIEW_OF[config.augment.views_of]
        policies = [augment.parse_policy(config.augment[name], f"augment.{name}") for name in names]

        def example(position):
            row = tf.minimum(position, reader.size - 1)
            labels = reader.labels(row)
            seed = tf.constant([0, 0], tf.int64)
            if view is not None:
                seed = draws.fold(_seed(config.seed, _VIEW, tf.cast(labels["id"], tf.int64)), view)
            image = reader.image(row)
            for number, policy in enumerate(policies):
                image = policy(image, draws.fold(seed, number))
            mask = tf.cast(position < reader.size, tf.float32)
            return {"image": image, "label": labels["label"], "mask": mask}

        num_batches = -(-len(split) // config.eval_batch_size)
        at_once = split.is_features and view is None and not config.augment.evaluation  # so that nothing is drawn
        batches = _batched(example, config.eval_batch_size, 0, num_batches, split.is_remote, at_once)
        _check_shape(batches, f"augment.{names[0]}")
        self._batches, self._sharding = batches.prefetch(2), sharding

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        for batch in _read(self._batches):
            yield to_global(batch, self._sharding)


def image_shape(config: ConfigDict, view: str, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(H, W, C) of the images of a data set after an augmentation. No image is read.

    Args:
      config: the configuration.
      view: `standard` or `evaluation`: which policy of the group `augment`.
      size: (H, W, C) of the images before the augmentation; None where each has a size of its own.

    Raises:
      UserError: where the result has no fixed size.
    """
    policy = augment.parse_policy(config.augment[view], f"augment.{view}")
    if size is None:
        trace = tf.function(lambda content, plain: policy(Encoded(content, plain), tf.zeros([2], tf.int64)))
        made = trace.get_concrete_function(tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.bool))
    else:
        trace = tf.function(lambda image: policy(image, tf.zeros([2], tf.int64)))
        made = trace.get_concrete_function(tf.TensorSpec(size, tf.float32))
    shape = made.output_shapes
    if not shape.is_fully_defined():
        raise _no_fixed_size(f"augment.{view}", shape)
    return tuple(shape)


def split_image_size(split: Split) -> tuple[int, int, int] | None:
    """(H, W, C) of the images of a split, None where each has its own."""
    return split.images.shape[1:] if split.in_memory else None


def to_global(batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Makes global arrays of the parts that the processes hold."""
    return {key: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for key, value in batch.items()}


def _at_once(source: Split, policies: Sequence[str]) -> bool:
    """Whether examples can be made many at a time: features, and policies that know how."""
    return source.is_features and all(augment.at_once(policy) for policy in policies)


def _batched(
    example: Callable[[tf.Tensor], dict[str, tf.Tensor]],
    batch_size: int,
    start_step: int,
    num_steps: int,
    is_remote: bool,
    at_once: bool,
) -> tf.data.Dataset:
    """The part of each batch that this process reads.

    Args:
      example: maps a position to what stands there, or with `at_once` consecutive positions `[n]`.
      batch_size: over all processes.
      start_step: the first batch.
      num_steps: the one after the last.
      is_remote: whether an example is read from a bucket.
      at_once: see `example`.
    """
    local = batch_size // jax.process_count()
    offset = jax.process_index() * local

    def one(count):
        return example((count // local) * batch_size + offset + count % local)

    def many(step):
        return example(step * batch_size + offset + tf.range(local, dtype=tf.int64))

    # From a bucket most of the time is latency, so many are read at once, each in a thread that waits.
    calls = READS_IN_FLIGHT if is_remote else tf.data.AUTOTUNE
    first, last = (start_step, num_steps) if at_once else (start_step * local, num_steps * local)
    # There is nothing to convert, and a UserError would become an error of another type.
    made = tf.autograph.experimental.do_not_convert(many if at_once else one)
    examples = tf.data.Dataset.range(first, last).map(made, num_parallel_calls=calls, deterministic=True)
    if not at_once:
        examples = examples.batch(local, drop_remainder=True)
    options = tf.data.Options()
    # These write the whole pipeline down each time that it is iterated, with the images that are in memory.
    options.experimental_optimization.apply_default_optimizations = False
    if is_remote:
        options.threading.private_threadpool_size = READS_IN_FLIGHT
    return examples.with_options(options)


def _seed(seed: int, stream: int, position: tf.Tensor) -> draws.Seed:
    """The seed of a position, or of consecutive ones `[n]`."""
    if position.shape.rank:
        return draws.Places(position[0], position.shape[0], (seed, stream))
    return draws.fold(tf.constant([seed, stream], tf.int64), position)


class _Reader:
    """A split as TensorFlow tensors: a tf.data function would copy numpy arrays into its graph."""

    def __init__(self, split: Split):
        self.size = len(split)
        if split.in_memory:
            pixels = split.images_tensor
            # Images of one pixel in floats are features (`sources.arrays.features`), which are not scaled.
            convert = tf.identity if split.is_features and split.images.dtype != np.uint8 else to_float
            self.image = lambda row: convert(tf.gather(pixels, row))
        else:
            self.image = split.images.reader()
        self._split, self.has_views = split, split.views is not None
        # The ids of a data set fit in 32 bits; jax has no 64-bit integers by default.
        ids = split.ids.astype(np.int32)
        self._labels = {"label": split.labels, "clean_label": split.clean_labels, "id": ids}
        self._labels = {name: tf.constant(values) for name, values in self._labels.items()}

    def view(self, row: tf.Tensor, seed: draws.Seed) -> tf.Tensor | Encoded:
        """The image, or of features that have views one of these, the first one among them."""
        if not self.has_views:
            return self.image(row)
        views = self._split.views_tensor
        count = views.shape[1]
        number = draws.integers(seed, count + 1)
        another = tf.gather_nd(views, tf.stack([tf.cast(row, tf.int32), tf.minimum(number, count - 1)], -1))
        is_first = tf.reshape(number == count, [*number.shape, 1, 1, 1])
        return tf.where(is_first, self.image(row), another)

    def labels(self, row: tf.Tensor) -> dict[str, tf.Tensor]:
        labels = {name: tf.gather(values, row) for name, values in self._labels.items()}
        return labels | {"row": tf.cast(row, tf.int32)}


def _read(batches: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    try:
        yield from batches.as_numpy_iterator()
    except tf.errors.OpError as error:
        raise UserError(
            f"the data can no longer be read: {reason(error)}; python -m ieg_jax.data.doctor looks for damaged files"
        ) from None


def _check_shape(batches: tf.data.Dataset, key: str) -> None:
    for name, spec in batches.element_spec.items():
        if None in spec.shape:
            raise _no_fixed_size(key, f"{name}: {spec.shape}")


def _no_fixed_size(key: str, shape: object) -> UserError:
    return UserError(
        f"the images have sizes of their own, and {key} does not make them equal ({shape}); let "
        f"it begin with random_resized_crop(size) or resize(size)|center_crop(size), or set data.image_size"
    )
