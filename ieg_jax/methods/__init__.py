"""Training methods: one file each, one line in the registry. `base` says what a method is."""

from typing import Any

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import Key, one_of
from ieg_jax.methods import (
    co_teaching,
    dividemix,
    eg,
    elr,
    elr_plus,
    emlc,
    forward_correction,
    fsr,
    gce,
    gold_loss_correction,
    ieg,
    incv,
    l2b,
    l2r,
    m_correction,
    mentornet,
    mentornet_dd,
    meta_weight_net,
    mixmatch,
    mlc,
    promix,
    rog,
    sop,
    ssr,
    ssr_plus,
    supervised,
    trusted_only,
)
from ieg_jax.methods.base import ALL_VIEWS, USUAL_VIEWS, Method, read

# name -> module
REGISTRY = {
    "co_teaching": co_teaching,
    "dividemix": dividemix,
    "eg": eg,
    "elr": elr,
    "elr_plus": elr_plus,
    "emlc": emlc,
    "forward_correction": forward_correction,
    "fsr": fsr,
    "gce": gce,
    "gold_loss_correction": gold_loss_correction,
    "ieg": ieg,
    "incv": incv,
    "l2b": l2b,
    "l2r": l2r,
    "m_correction": m_correction,
    "mentornet": mentornet,
    "mentornet_dd": mentornet_dd,
    "meta_weight_net": meta_weight_net,
    "mixmatch": mixmatch,
    "mlc": mlc,
    "promix": promix,
    "rog": rog,
    "sop": sop,
    "ssr": ssr,
    "ssr_plus": ssr_plus,
    "supervised": supervised,
    "trusted_only": trusted_only,
}


def get(name: str) -> Method:
    """The method of a name in the registry."""
    return read(name, REGISTRY[name])


def keys() -> dict[str, Key]:
    """The keys of all methods, flat key -> Key. A key that several methods read is the same for all of them.

    Raises:
      ValueError: where two methods mean different things by one key.
    """
    found: dict[str, Key] = {}
    for name in REGISTRY:
        for key, value in get(name).keys.items():
            if found.setdefault(key, value) is not value:
                raise ValueError(f"{key} of the method {name} is not the key of this name that another method has")
    return found


def defaults() -> dict[str, Any]:
    """Flat key -> its value in configs/default.py, of all keys that methods have."""
    return {key: value.default for key, value in keys().items()}


def tune(config: ConfigDict, group: str = "method", **values: Any) -> None:
    """Sets keys of a group, in a file of configs/, where the method that is configured reads them.

    Args:
      config: is changed; `method.name` must be set.
      group: method or meta.
      **values: by key; those that the method does not read stay as they are.
    """
    reads = get(config.method.name).keys if config.method.name in REGISTRY else {}
    for key, value in values.items():
        if f"{group}.{key}" in reads:
            config[group][key] = value


def choose(config: ConfigDict, name: str) -> None:
    """Gives a configuration another method; what this one does not read takes its default."""
    config.method.name = name
    method = get(name)
    config.update_from_flattened_dict({key: value for key, value in defaults().items() if key not in method.keys})
    if all(stream.views is not ALL_VIEWS for stream in method.streams.values()):
        config.augment.num_views = USUAL_VIEWS
    if all(stream.size == "batch_size" for stream in method.streams.values()):
        config.trusted.batch_size = 0


def validate(config: ConfigDict) -> None:
    """Checks `method.name` and the keys of the methods.

    Raises:
      UserError: for a method that does not exist, for a value that is not allowed, and for a key that is set and that
        the method does not read.
    """
    config_lib.check_values(config, {"method.name": one_of(*REGISTRY)})
    known = keys()
    config_lib.check_values(config, {key: value.check for key, value in known.items()})
    reads = {name: get(name).keys for name in REGISTRY}
    config_lib.check_unread(config, {key: value.default for key, value in known.items()}, reads, "method.name")
    get(config.method.name).check(config)
