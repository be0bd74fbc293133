"""Prints docs/methods.md: `python -m ieg_jax.methods`."""

from ieg_jax.methods import describe

if __name__ == "__main__":
    print(describe.page(), end="")
