"""Finds out which labels of a run are wrong: `python -m ieg_jax.audit`."""

from ieg_jax.audit.files import to_cleanlab

__all__ = ["to_cleanlab"]
