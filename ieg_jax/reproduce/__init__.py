"""Repeats the paper's experiments, and smaller ones: `python -m ieg_jax.reproduce`."""
