"""Features of images by a pretrained network that stays as it is (`config.backbone`), made once and kept.

A feature is computed for one image at a time and depends on nothing but its bytes, the weights and the size, so it is
kept under a hash of these: the next run on the same images, a fold of an audit, or the same command after it was
stopped finds it there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import random
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich.progress import track

from ieg_jax import config as config_lib
from ieg_jax import files, models
from ieg_jax.config import at_least
from ieg_jax.data import augment, images
from ieg_jax.data.images import to_float
from ieg_jax.data.sources.arrays import feature_statistics, standardised
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError, check_choice
from ieg_jax.lazy import tf
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import pretrained

AT_ONCE = 1024  # images whose features are kept before the next are begun
DTYPE = "float16"  # of features that are kept, unless somebody asks for float32
BATCH = 64  # images that go through the network together, on each device
VIEWED = ("train", "trusted")  # the splits that get views
NUM_CLASSES = 2  # of the head, which is not used
CHECKS = {"image_size": at_least(8), "views": at_least(1)}
# What the group has where no network is named.
UNSET = {
    "pretrained": "imagenet",
    "conventions": "own",
    "image_size": 112,
    "views": 1,
    "augment": "random_resized_crop(112,smallest=0.5)|flip",
    "cache": "",
}


def validate(backbone: ConfigDict) -> None:
    """Checks the group `backbone` of the configuration; the file of the weights need not exist yet.

    Raises:
      UserError: for a network that does not exist, for values that are not allowed, and for keys that are set without a
        network that would read them.
    """
    if not backbone.name:
        for key, usual in UNSET.items():
            if backbone[key] != usual:
                raise UserError(f"backbone.{key}={backbone[key]!r}, but backbone.name is not set, so nothing reads it")
        return
    config_lib.check_values(backbone, CHECKS, "backbone.")
    augment.parse_policy(backbone.augment, "backbone.augment")
    models.validate(_model(backbone))
    if not backbone.pretrained:
        raise UserError(
            "backbone.pretrained is not set: features of random weights say nothing; name a file of weights"
        )


def without(config: ConfigDict) -> ConfigDict:
    """The configuration of a run on features for whoever looks at its images: no backbone, and their augmentation."""
    config, backbone = ConfigDict(config.to_dict()), config.backbone
    config.data.image_size = config.data.image_size or backbone.image_size
    config.augment.standard = config.augment.evaluation = ""
    config.augment.strong = backbone.augment if backbone.views > 1 else ""
    config.backbone.update({"name": "", **UNSET})
    return config


def choose(name: str) -> str:
    """What the argument `backbone` of configurations and of the classifier means, as `backbone.name`.

    Args:
      name: of a network; none; or auto, the one whose weights the package `[pretrained]` brings, where it is installed.

    Raises:
      UserError: for a network that there is no such package for, or whose package is not installed.
    """
    if name == "auto":
        installed = (network for network in pretrained.PACKAGES if pretrained.is_installed(network))
        return next(installed, "")
    check_choice("backbone", name, ("auto", "none", *pretrained.PACKAGES))
    return "" if name == "none" else name


def _model(backbone: ConfigDict) -> ConfigDict:
    """The group `model` of the network that makes the features."""
    return ConfigDict(
        {
            **models.UNSET,
            "name": backbone.name,
            "conventions": backbone.conventions,
            "pretrained": backbone.pretrained,
            "dtype": "float32",
            "remat": False,
        }
    )


class Backbone:
    """A network that turns images into features.

    Attributes:
      about: what decides the features: the names of network and conventions, the hash of the weights, the size.
      size: pixels of a side to which images are resized (bilinear) before they go in.
    """

    def __init__(self, backbone: ConfigDict):
        """Reads the weights; the network is built when it is first needed.

        Args:
          backbone: the group of the configuration.

        Raises:
          UserError: for a network or weights that cannot be used.
        """
        validate(backbone)
        self._model, self.size = _model(backbone), backbone.image_size
        self._file = pretrained.read(self._model)
        self.about: Mapping[str, str | int] = {
            "network": backbone.name,
            "conventions": backbone.conventions,
            "weights": self._file.sha256,
            "size": backbone.image_size,
        }
        self._group = backbone

    def __reduce__(self):
        """A pickle has the configuration alone, and finds the weights where that says."""
        return backbone_of, (ConfigDict(self._group.to_dict()),)

    @functools.cached_property
    def _network(self) -> tuple[Any, Any]:
        """The module and its variables, in the memory of the host."""
        network = models.create(self._model, NUM_CLASSES)
        shape = jax.ShapeDtypeStruct((1, self.size, self.size, 3), np.float32)
        rng = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(functools.partial(network.init, train=True), rng, shape)
        arrays = pretrained.fit(self._file, self._model, shapes).arrays
        head = {
            path: np.zeros(leaf.shape, leaf.dtype)
            for path, leaf in flatten_dict(dict(shapes), sep="/").items()
            if path not in arrays
        }
        return network, unflatten_dict(arrays | head, sep="/")

    @property
    def variables(self) -> Any:
        """Parameters and moving averages, the second argument of `apply`."""
        return self._network[1]

    def apply(self, variables: Any, pixels: jax.Array) -> jax.Array:
        """A pure function: images `[n, H, W, 1 or 3]`, uint8 or floats in [0, 1] -> features `[n, D]` float32."""
        scaled = (pixels / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels * 2 - 1).astype(jnp.float32)
        resized = jax.image.resize(scaled, (scaled.shape[0], self.size, self.size, scaled.shape[-1]), "bilinear")
        if resized.shape[-1] == 1:
            resized = resized.repeat(3, -1)
        return inputs_of_head(self._network[0], variables, resized).astype(jnp.float32)

    @functools.cached_property
    def _compiled(self) -> Callable[[np.ndarray], np.ndarray]:
        mesh = Mesh(np.array(jax.local_devices()), "data")
        everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        variables = jax.device_put(self.variables, everywhere)
        forward, batch = jax.jit(self.apply, in_shardings=(everywhere, split)), BATCH * mesh.size

        def features(pixels: np.ndarray) -> np.ndarray:
            missing = batch - len(pixels)  # one shape, so that it is compiled once
            whole = np.concatenate([pixels, np.repeat(pixels[:1], missing, 0)]) if missing else pixels
            return np.asarray(forward(variables, jax.device_put(whole, split)))[: len(pixels)]

        return lambda pixels: np.concatenate(
            [features(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
        )

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Images `[n, H, W, 1 or 3]`, uint8 or floats in [0, 1] -> features `[n, D]` float32, on all devices here."""
        return self._compiled(pixels)


@functools.lru_cache(maxsize=2)
def _kept(text: str) -> Backbone:
    return Backbone(ConfigDict(json.loads(text)))


def backbone_of(group: ConfigDict) -> Backbone:
    """The backbone that a configuration names; the last two are kept, with what was compiled for them."""
    return _kept(json.dumps(group.to_dict(), sort_keys=True))


class Cache:
    """Features that were computed before, in files of about a thousand. Several processes can use one folder."""

    def __init__(self, folder: epath.Path):
        self._folder, self._places, self._known = folder, {}, set()
        self.refresh()

    def refresh(self) -> None:
        """Looks for files that other processes have written in the meantime."""
        if not self._folder.exists():
            return
        for file in sorted(self._folder.glob("*.npz")):
            if file.name not in self._known:
                self._known.add(file.name)
                # A file that is damaged counts as not there.
                with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
                    with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                        keys = arrays["keys"].tolist()
                    self._places |= {key: (file, row) for row, key in enumerate(keys)}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """The features of these keys, all of which are there, `[n, D]`."""
        by_file: dict[epath.Path, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            file, row = self._places[key]
            by_file.setdefault(file, []).append((place, row))
        found = None
        for file, places in by_file.items():
            with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                values = arrays["features"]
            if found is None:
                found = np.empty((len(keys), values.shape[1]), values.dtype)
            here, rows = np.array(places).T
            found[here] = values[rows]
        return found

    def write(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Keeps features `[n, D]` under their keys."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: others may be writing the same features.
        place = self._folder / f"{uuid.uuid4().hex}.npz"
        files.write_arrays(place, {"keys": np.array(keys), "features": features}, compressed=False)
        self.refresh()


def cache_of(backbone: Backbone, folder: str = "", dtype: str = DTYPE) -> Cache:
    """Where the features of a backbone are kept.

    Args:
      backbone: the network.
      folder: in place of `features` in the user's cache folder.
      dtype: of the numbers, float16 or float32.
    """
    place = epath.Path(folder).expanduser() if folder else epath.Path(images.cache_folder()) / "features"
    about = json.dumps({**backbone.about, "dtype": dtype}, sort_keys=True)
    return Cache(place / hashlib.sha256(about.encode()).hexdigest()[:16])


def features_of(
    splits: Mapping[str, Split],
    backbone: Backbone,
    cache: Cache,
    views: Mapping[str, int] | None = None,
    policy: str = "",
    dtype: str = DTYPE,
) -> dict[str, np.ndarray]:
    """The features of the images of some splits, and of augmented views of them.

    Several processes that want the same features compute each its share, where they see the same cache: each begins at
    a place of its own, and leaves out what another has written in the meantime.

    Args:
      splits: images in memory, or checked ones in files.
      backbone: the network.
      cache: where they are kept.
      views: how many views of each image of a split there are, the image itself being the first; one if not named.
      policy: makes the others (`data.augment`). A view depends on the image and its number alone.
      dtype: of the numbers.

    Returns:
      Features `[n, V, D]` of each split.

    Raises:
      UserError: for an image that cannot be decoded.
      StorageError: where the cache cannot be written.
    """
    views = dict(views or {})
    digests = {name: _digests(split) for name, split in splits.items()}
    keys = {
        name: [[_key(digest, view, policy) for digest in digests[name]] for view in range(views.get(name, 1))]
        for name in splits
    }
    chunks = [
        (name, view, start)
        for name, split in splits.items()
        for view in range(len(keys[name]))
        for start in range(0, len(split), AT_ONCE)
    ]
    missing = [
        chunk for chunk in chunks
        if any(key not in cache for key in keys[chunk[0]][chunk[1]][chunk[2] : chunk[2] + AT_ONCE])
    ]  # fmt: skip
    if jax.process_count() > 1:
        begin = jax.process_index() * len(missing) // jax.process_count()
    else:
        begin = random.randrange(len(missing)) if missing else 0  # the same command may run twice side by side
    count = sum(min(AT_ONCE, len(splits[name]) - start) for name, _, start in missing)
    title, order = f"features of {count:,} images by {backbone.about['network']}", missing[begin:] + missing[:begin]

    def read(chunk: tuple[str, int, int]) -> tuple[list[str], np.ndarray | None]:
        """The keys that are missing still, and their pictures."""
        name, view, start = chunk
        cache.refresh()
        part = keys[name][view][start : start + AT_ONCE]
        places = [place for place, key in enumerate(part) if key not in cache]
        if not places:
            return [], None
        rows = np.array(places) + start
        pixels = _pixels(splits[name], rows, backbone.size, view, policy, [digests[name][row] for row in rows])
        return [part[place] for place in places], pixels

    with ThreadPoolExecutor(1) as reader:  # the next pictures are read while features are computed
        ahead = [reader.submit(read, chunk) for chunk in order[:1]]
        for number in track(range(len(order)), title, disable=len(order) < 2):
            wanted, pixels = ahead.pop().result()
            ahead += [reader.submit(read, chunk) for chunk in order[number + 1 : number + 2]]
            if wanted:
                cache.write(wanted, backbone.features(pixels).astype(dtype))
    return {name: np.stack([cache.read(part) for part in of_view], 1) for name, of_view in keys.items()}


def _digests(split: Split) -> list[str]:
    """A hash of the content of each image."""
    if split.in_memory:
        about = f"{split.images.shape[1:]} {split.images.dtype}".encode()
        return [hashlib.sha256(about + image.tobytes()).hexdigest() for image in split.images]
    read = split.images.reader()

    def digest(row: int) -> str:
        encoded = images.readable(read, row, split.names[row])
        return hashlib.sha256(encoded.content.numpy()).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, range(len(split))))


def _key(digest: str, view: int, policy: str) -> str:
    about = f"{digest} {view} {policy}" if view else digest
    return hashlib.sha256(about.encode()).hexdigest()[:32]


def _pixels(
    split: Split, rows: np.ndarray, size: int, view: int = 0, policy: str = "", digests: Sequence[str] = ()
) -> np.ndarray:
    """Images, or a view of them, `[n, H, W, C]` uint8 or float32 in [0, 1]."""
    if not view:
        if split.in_memory:
            return split.images[rows]
        return images.load_resized(split.images[rows], size, split.names[rows], "bilinear")
    read = split.images.reader() if not split.in_memory else None
    augmented = augment.parse_policy(policy, "backbone.augment")
    seeds = np.array([[int(digest[:15], 16), view] for digest in digests], np.int64)
    if read is None:
        dataset = tf.data.Dataset.from_tensor_slices((split.images[rows], seeds))
        dataset = dataset.map(lambda image, seed: augmented(to_float(image), seed), tf.data.AUTOTUNE)
    else:
        dataset = tf.data.Dataset.from_tensor_slices((rows, seeds))
        dataset = dataset.map(lambda row, seed: augmented(read(row), seed), tf.data.AUTOTUNE)
    return np.clip(np.concatenate([(batch + 1) / 2 for batch in dataset.batch(256).as_numpy_iterator()]), 0, 1)


@dataclasses.dataclass(frozen=True)
class Features:
    """How a run makes features of images: by a backbone, standardised by the training set.

    Attributes:
      backbone: the network.
      mean, deviation: float64 `[D]`, of the features of the training set, see `sources.arrays.features`.
    """

    backbone: Backbone
    mean: np.ndarray
    deviation: np.ndarray

    def of(self, split: Split) -> Split:
        """A split of images with features in their place, which are not kept; one of features stays as it is."""
        if split.is_features:
            return split
        parts = [np.arange(start, min(start + AT_ONCE, len(split))) for start in range(0, len(split), AT_ONCE)]
        values = [self.backbone.features(_pixels(split, rows, self.backbone.size)) for rows in parts]
        return self.put(split, np.concatenate(values).astype(DTYPE)[:, None])

    def put(self, split: Split, values: np.ndarray) -> Split:
        """Features `[n, V, D]` in place of images."""
        first, *others = (standardised(values[:, view], self.mean, self.deviation) for view in range(values.shape[1]))
        views = np.stack(others, 1) if others else None
        return dataclasses.replace(split, images=first, views=views, pictures=split.images)

    def apply(self, variables: Any, pixels: jax.Array) -> jax.Array:
        """A pure function: images, see `Backbone.apply` -> what the head of the run takes, `[n, 1, 1, D]`."""
        values = self.backbone.apply(variables, pixels)
        values = values.astype(DTYPE).astype(jnp.float32)  # as they are kept
        scaled = (values - self.mean.astype(np.float32)) / self.deviation.astype(np.float32)
        return scaled[:, None, None]

    def to_json(self) -> dict[str, Any]:
        """What a run writes down, to find the same features again."""
        return {"about": dict(self.backbone.about), "mean": self.mean.tolist(), "deviation": self.deviation.tolist()}


def of_run(group: ConfigDict, about: Mapping[str, Any]) -> Features:
    """The features of a run.

    Args:
      group: `backbone` of its configuration.
      about: from `Features.to_json`.

    Raises:
      UserError: where the weights are not those of the run.
    """
    backbone = backbone_of(group)
    here, there = backbone.about, about["about"]
    changed = [f"{key} {there.get(key)!r}, here {here[key]!r}" for key in here if here[key] != there.get(key)]
    if changed:
        raise UserError(f"the run was trained on features of another backbone: {'; '.join(changed)}; restore it")
    return Features(backbone, np.array(about["mean"]), np.array(about["deviation"]))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What some of the images of a run say about the features of all.

    Attributes:
      count: images and views whose features there will be.
      seconds: that they will take here, where none is kept yet.
      width: D.
    """

    count: int
    seconds: float
    width: int


def try_out(splits: Mapping[str, Split], backbone: ConfigDict) -> Trial:
    """Times the backbone with some of the images of a run, in memory or in files.

    Args:
      splits: as for `replace_images`.
      backbone: the group of the configuration.
    """
    network, train = Backbone(backbone), splits["train"]
    rows = np.resize(np.arange(len(train)), 2 * BATCH * len(jax.local_devices()))
    network.features(_pixels(train, rows[:1], network.size))  # compiled before the time is taken
    began = time.monotonic()
    found = network.features(_pixels(train, rows, network.size))
    each = (time.monotonic() - began) / len(rows)
    count = sum(len(split) * (backbone.views if name in VIEWED else 1) for name, split in splits.items())
    return Trial(count, each * count, found.shape[1])


def replace_images(splits: Mapping[str, Split], backbone: ConfigDict) -> tuple[dict[str, Split], Features]:
    """The splits of a run with features in place of images.

    Args:
      splits: one of them is `train`, by which features are standardised. It and `trusted` get the views.
      backbone: the group of the configuration.

    Raises:
      UserError: for features, which have no images, and see `features_of`.
    """
    if splits["train"].is_features:
        raise UserError(f"backbone.name={backbone.name}, but the data are features, not images; set it to ''")
    network = backbone_of(backbone)
    cache, views = cache_of(network, backbone.cache), dict.fromkeys(VIEWED, backbone.views)
    values = features_of(splits, network, cache, views, backbone.augment)
    features = Features(network, *feature_statistics(values["train"][:, 0]))
    return {name: features.put(split, values[name]) for name, split in splits.items()}, features
