"""A network trained anew, plainly, on labels that an audit has cleaned.

The network that found the wrong labels was trained among them. A plain training on what is then right costs a seventh
of a step of IEG's, and is how cleaned labels are used in the end.
"""

from ml_collections import ConfigDict

from ieg_jax import methods, models

METHOD = "supervised"
NAME = "retrained"  # of the network, and of the folder beside what it comes from


def other_run(config: ConfigDict, method: str) -> ConfigDict:
    """The configuration, as a run has written it down, of another training like it, by a method."""
    config = ConfigDict(config.to_dict())
    config.audit.epochs = 0.0
    config.wandb = ConfigDict({"project": "", "name": "", "mode": ""})  # a part of the audit, and no run of its own
    methods.choose(config, method)
    models.forget_unread(config.model)
    return config


def plainly(config: ConfigDict) -> ConfigDict:
    """The configuration, as a run has written it down, of a plain training as long; the trusted examples take part."""
    config = other_run(config, METHOD)
    config.trusted.join = True
    return config
