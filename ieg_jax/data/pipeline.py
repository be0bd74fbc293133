"""From a configuration to batches as global arrays.

Which example stands at which place of which batch, and how it is augmented, is a function of (seed, position)
computed with stateless operations: position = step · batch size + place in the batch. So a run that starts at
step s simply begins to count there, and every host can compute its own part. tf.data runs it beside the
training, on the host's processors.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.data import augment, corruption, probe, selection, sources
from ieg_jax.data.images import Encoded, reason, to_float
from ieg_jax.data.splits import UNKNOWN, Split
from ieg_jax.errors import UserError

tf.config.set_visible_devices([], "GPU")  # the accelerators are jax's

# What each random stream of the run's seed is for.
_ORDER, _TRAIN_IMAGE, _PROBE_IMAGE, _PROBE_ORDER, _VIEW = range(5)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run works on.

    Attributes:
      train: the noisy training set, without trusted and validation examples.
      trusted: the trusted set, interleaved by class, without its part that is held out.
      held_out: that part (`trusted.holdout`), or None.
      evaluation: what accuracy is measured on; None where the data have no test set and no trusted image is held out.
      evaluation_name: `test`, `validation` or `held_out`.
      name, num_classes, class_names: of the data set.
      noise_report, trusted_report: contents of noise.json and trusted.json.
      noisy_labels: `[N]` labels of the whole training set after noise, trusted and validation examples included, in
        the order of the ids.
      left_out: name -> what is wrong with it, of images that are listed and not used.
    """

    train: Split
    trusted: Split
    held_out: Split | None
    evaluation: Split | None
    evaluation_name: str
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    noise_report: dict
    trusted_report: dict
    noisy_labels: np.ndarray
    left_out: dict[str, str]

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split: ids, names, labels and the images in memory. By it a resumed run knows its data."""
        splits = {
            "train": self.train,
            "trusted": self.trusted,
            "held_out": self.held_out,
            self.evaluation_name: self.evaluation,
        }
        return {name: _hash(split) for name, split in splits.items() if split is not None}


def load(config: ConfigDict) -> Data:
    """Loads the data, takes the trusted and the validation examples out, and adds the noise.

    Args:
      config: the configuration; its keys that are AUTO are set, see `fit_to_data`.

    Raises:
      UserError: see `sources`, `probe`, and where the validation part or data.train_size asks for more examples than
        there are.
    """
    source = sources.load(config.data)
    if config.noise.kind != "none" and (source.train.clean_labels == UNKNOWN).all():
        # Noise is added to labels that are taken to be right.
        source = dataclasses.replace(source, train=dataclasses.replace(source.train, clean_labels=source.train.labels))
    source = dataclasses.replace(source, train=corruption.corrupt(source, config.noise))
    train, trusted = probe.split_trusted(source, config.trusted)
    num_left, left_out = len(train), dict(source.left_out)
    if source.trusted_is_pool and config.trusted.source == "separate":
        trusted, bad = sources.open_images(trusted, config.data)
        left_out |= bad
    whole_trusted = trusted
    trusted, held_out = probe.hold_out(trusted, config.trusted)
    evaluation, evaluation_name = source.test, "test"
    if evaluation is None and held_out is not None:
        evaluation, evaluation_name = held_out, "held_out"
    if config.data.validation_size:
        train, evaluation = _hold_out(train, config.data.validation_size)
        evaluation_name = "validation"
    if config.data.train_size:
        train = _subset(train, config.data.train_size)
    if config.data.folds:
        train = train.take(np.flatnonzero(fold_of(train.ids, config.data.folds) != config.data.fold))
    fit_to_data(config, train)
    return Data(
        train=train,
        trusted=trusted,
        held_out=held_out,
        evaluation=evaluation,
        evaluation_name=evaluation_name,
        name=source.name,
        num_classes=source.num_classes,
        class_names=source.class_names or tuple(map(str, range(source.num_classes))),
        noise_report=corruption.report(train, config.noise, source.num_classes),
        trusted_report=probe.report(whole_trusted, config.trusted, len(source.train) - num_left, held_out),
        noisy_labels=source.train.labels[np.argsort(source.train.ids)],
        left_out=left_out,
    )


def fold_of(ids: np.ndarray, folds: int) -> np.ndarray:
    """The part that each example is in, `[n]` int, where the examples are divided into `folds` parts at random."""
    return (selection.uniforms(0, selection.FOLD, ids) * folds).astype(int)


USUAL_EPOCHS, FEWEST_STEPS, MOST_STEPS = 40.0, 2_000, 20_000


def fit_to_data(config: ConfigDict, train: Split) -> None:
    """Sets the keys that are AUTO to what suits the training set, `data.image_size` apart (`sources.fitting_size`).

    The training: 40 epochs, but no fewer than 2,000 and no more than 20,000 steps; evaluated 20 times, saved 10
    times. The network: depth 10 and width 1 for images below 24 pixels, depth 16 and width 2 from there on.

    Args:
      config: changed in place, so that config.json in the work folder has the values.
      train: the noisy training set, its images as the configuration reads them.
    """
    steps_per_epoch = len(train) / config.batch_size
    if config.num_train_epochs == config_lib.AUTO:
        steps = min(max(USUAL_EPOCHS * steps_per_epoch, FEWEST_STEPS), MOST_STEPS)
        config.num_train_epochs = steps / steps_per_epoch
    num_steps = config_lib.duration(config, "num_train", steps_per_epoch)
    if config.eval_every_epochs == config_lib.AUTO:
        config.eval_every_epochs = num_steps / steps_per_epoch / 20
    if config.checkpoint_every_epochs == config_lib.AUTO:
        config.checkpoint_every_epochs = num_steps / steps_per_epoch / 10
    small = train.in_memory and min(train.images.shape[1:3]) < 24
    if config.model.depth == config_lib.AUTO:
        config.model.depth = 10 if small else 16
    if config.model.width == config_lib.AUTO:
        config.model.width = 1.0 if small else 2.0


def _hold_out(train: Split, size: int) -> tuple[Split, Split]:
    """The training set without `size` examples whose true label is known, and those with that label."""
    candidates = np.flatnonzero(train.clean_labels >= 0)
    if size > len(candidates) or size >= len(train):
        raise UserError(
            f"data.validation_size={size}, but there are {len(train)} training examples, "
            f"{len(candidates)} of them with a known label; lower it"
        )
    rows = candidates[
        np.argsort(selection.uniforms(0, selection.VALIDATION, train.ids[candidates]), kind="stable")[:size]
    ]
    held_out = train.take(rows)
    held_out = dataclasses.replace(held_out, labels=held_out.clean_labels)
    return train.take(np.setdiff1d(np.arange(len(train)), rows)), held_out


def _subset(train: Split, size: int) -> Split:
    """`size` examples of the training set; those of a smaller size are among those of every larger one."""
    if size > len(train):
        raise UserError(
            f"data.train_size={size}, but without trusted and validation examples {len(train)} are left; lower it"
        )
    order = np.argsort(selection.uniforms(0, selection.SUBSET, train.ids), kind="stable")
    return train.take(np.sort(order[:size]))


def train_batches(
    config: ConfigDict, data: Data, start_step: int, num_steps: int, sharding: jax.sharding.Sharding
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of steps `start_step` ... `num_steps` − 1.

    Args:
      config: the configuration.
      data: from `load`.
      start_step: first step; any, at no cost.
      num_steps: steps of the whole run.
      sharding: of the leading dimension of every array.

    Yields:
      `image [B,H,W,C]` float32 in [-1, 1], or features `[B,1,1,D]`, `label`, `clean_label`, `id` `[B]` int32, and where
      the method needs them `views [B,V-1,H,W,C]`, `probe_image [Bp,H,W,C]` and `probe_label [Bp]`.
    """
    method = methods.REGISTRY[config.method.name]
    split = _Reader(data.trusted if method.TRAINS_ON == "trusted" else data.train)
    num_views = config.augment.num_views if "views" in method.NEEDS else 1
    standard = augment.parse_policy(config.augment.standard, "augment.standard")
    strong = augment.parse_policy(config.augment.strong, "augment.strong")
    row_of = _row_of(config.seed, _ORDER, split.size)

    def noisy_example(position):
        row = row_of(position)
        seed = _seed(config.seed, _TRAIN_IMAGE, position)
        original = split.image(row)
        image = standard(original, _fold(seed, 0))
        example = {"image": image, **split.labels(row)}
        if num_views > 1:
            below = original if config.augment.views_of == "original" else image
            example["views"] = tf.stack([strong(below, _fold(seed, view)) for view in range(1, num_views)])
            if example["views"].shape[1:] != image.shape:
                raise UserError(
                    f"augment.strong makes views of shape {example['views'].shape[1:]}, and the standard view is "
                    f"{image.shape}; with augment.views_of=original let it begin as augment.standard does"
                )
        return example

    parts = [_batched(noisy_example, config.batch_size, start_step, num_steps)]
    if "probe" in method.NEEDS:
        trusted, probe_row_of = _Reader(data.trusted), _probe_row_of(config, data.trusted)

        def probe_example(position):
            row = probe_row_of(position)
            seed = _seed(config.seed, _PROBE_IMAGE, position)
            return {
                "probe_image": standard(trusted.image(row), seed),
                "probe_label": trusted.labels(row)["label"],
            }

        probe_batch_size = config.trusted.batch_size or config.batch_size
        parts.append(_batched(probe_example, probe_batch_size, start_step, num_steps))

    merged = tf.data.Dataset.zip(tuple(parts)).map(lambda *batches: {k: v for b in batches for k, v in b.items()})
    _check_shape(merged, "augment.standard")
    for batch in _read(merged.prefetch(4)):
        yield to_global(batch, sharding)


VIEW_OF = {"standard": ("standard", "strong"), "original": ("strong",)}  # augment.views_of -> what makes a strong view


class EvalBatches:
    """Each example of a split once, the last batch padded and masked; to be iterated as often as one likes.

    Yields `image [n,H,W,C]` float32 in [-1, 1], as `augment.evaluation` makes it, `label [n]` int32, and `mask [n]`
    float32, 1 for real examples; n = `eval_batch_size`, over all devices.
    """

    def __init__(self, config: ConfigDict, split: Split, sharding: jax.sharding.Sharding, view: int | None = None):
        """Builds the tf.data pipeline.

        Args:
          config: the configuration.
          split: the examples.
          sharding: of the leading dimension.
          view: in place of `augment.evaluation`: a strong view as in training (`augment.views_of`), a function of the
            run's seed, this number and the example's id.
        """
        reader = _Reader(split)
        names = ("evaluation",) if view is None else VIEW_OF[config.augment.views_of]
        policies = [augment.parse_policy(config.augment[name], f"augment.{name}") for name in names]

        def example(position):
            row = tf.minimum(position, reader.size - 1)
            labels = reader.labels(row)
            seed = tf.constant([0, 0], tf.int64)
            if view is not None:
                seed = _fold(_seed(config.seed, _VIEW, tf.cast(labels["id"], tf.int64)), view)
            image = reader.image(row)
            for number, policy in enumerate(policies):
                image = policy(image, _fold(seed, number))
            mask = tf.cast(position < reader.size, tf.float32)
            return {"image": image, "label": labels["label"], "mask": mask}

        num_batches = -(-len(split) // config.eval_batch_size)
        batches = _batched(example, config.eval_batch_size, 0, num_batches)
        _check_shape(batches, f"augment.{names[0]}")
        self._batches, self._sharding = batches.prefetch(2), sharding

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        for batch in _read(self._batches):
            yield to_global(batch, self._sharding)


def image_shape(config: ConfigDict, view: str, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(H, W, C) of what an augmentation makes of the images of a data set. No image is read.

    Args:
      config: the configuration.
      view: `standard` or `evaluation`: which policy of the group `augment`.
      size: (H, W, C) of the images before it; None where each has a size of its own.

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
    """Makes global arrays of the parts that each process holds."""
    return {key: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for key, value in batch.items()}


def _batched(example, batch_size: int, start_step: int, num_steps: int) -> tf.data.Dataset:
    """The part of each batch that this process reads, of `example(position)`."""
    local = batch_size // jax.process_count()
    offset = jax.process_index() * local

    def at(count):
        return example((count // local) * batch_size + offset + count % local)

    positions = tf.data.Dataset.range(start_step * local, num_steps * local)
    at = tf.autograph.experimental.do_not_convert(at)  # nothing to convert, and errors keep their type
    examples = positions.map(at, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.batch(local, drop_remainder=True)


def _row_of(seed: int, stream: int, size: int):
    """The row at a position: each epoch shows every row once, in an order of its own."""

    def row_of(position):
        epoch = position // size
        # Two 32-bit words of seed: the run's seed with the stream, and the epoch.
        key = tf.cast(tf.stack([tf.constant(seed * 16 + stream, tf.int64), epoch]) % 2**32, tf.uint32)
        return tf.random.experimental.index_shuffle(position % size, key, size - 1)

    return row_of


def _probe_row_of(config: ConfigDict, trusted: Split):
    """The trusted row at a position: round and round in the interleaved order, or shuffled inside each class."""
    size = len(trusted)
    if not config.trusted.shuffle:
        return lambda position: position % size
    labels = trusted.labels
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    first = np.cumsum(counts) - counts
    rank = np.empty(size, np.int64)  # place of a row among the rows of its class
    rank[by_class] = np.arange(size) - np.repeat(first, counts)

    def row_of(position):
        epoch, row = position // size, position % size
        label = tf.gather(labels, row)
        key = tf.stack(
            [
                tf.constant(config.seed * 16 + _PROBE_ORDER, tf.int64),
                epoch * len(counts) + tf.cast(label, tf.int64),
            ]
        )
        shuffled = tf.random.experimental.index_shuffle(
            tf.gather(rank, row), tf.cast(key % 2**32, tf.uint32), tf.gather(counts, label) - 1
        )
        return tf.gather(by_class, tf.gather(first, label) + shuffled)

    return row_of


def _seed(seed: int, stream: int, position: tf.Tensor) -> tf.Tensor:
    return _fold(tf.constant([seed, stream], tf.int64), position)


_fold = tf.random.experimental.stateless_fold_in


def _hash(split: Split) -> str:
    digest = hashlib.sha256("\n".join(split.names).encode("utf-8", "surrogateescape"))
    for column in (split.ids, split.labels, split.clean_labels, *([split.images] if split.in_memory else [])):
        digest.update(np.ascontiguousarray(column))
    return digest.hexdigest()


class _Reader:
    """A split as TensorFlow tensors, made once: inside a tf.data function an array would become a constant."""

    def __init__(self, split: Split):
        self.size = len(split)
        if split.in_memory:
            pixels = tf.constant(split.images)
            # Floats of one pixel: features, which are what the network is to see (`sources.features`).
            is_features = split.images.shape[1:3] == (1, 1) and split.images.dtype != np.uint8
            convert = tf.identity if is_features else to_float
            self.image = lambda row: convert(pixels[row])
        else:
            self.image = split.images.reader()
        # The ids of a data set fit in 32 bits; jax has no 64-bit integers by default.
        ids = split.ids.astype(np.int32)
        self._labels = {"label": split.labels, "clean_label": split.clean_labels, "id": ids}
        self._labels = {name: tf.constant(values) for name, values in self._labels.items()}

    def labels(self, row: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: values[row] for name, values in self._labels.items()}


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
