"""Compiles the train step for hardware that is not here: `python -m ieg_jax.plan`."""
