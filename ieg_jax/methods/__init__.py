"""Training methods: one file each, one line in the registry. `base` says what a method is."""

from ieg_jax.methods import eg, ieg, l2r, mixmatch, supervised, trusted_only

# name -> module
REGISTRY = {
    "eg": eg,
    "ieg": ieg,
    "l2r": l2r,
    "mixmatch": mixmatch,
    "supervised": supervised,
    "trusted_only": trusted_only,
}
