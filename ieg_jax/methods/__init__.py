"""Training methods: one file each, one line in the registry. `base` says what a method is."""

from ieg_jax.methods import ieg, l2r, supervised, trusted_only

# name -> module
REGISTRY = {
    "ieg": ieg,
    "l2r": l2r,
    "supervised": supervised,
    "trusted_only": trusted_only,
}
