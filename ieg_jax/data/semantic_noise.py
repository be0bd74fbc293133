"""`python -m ieg_jax.data.semantic_noise`: an older name of the command `python -m ieg_jax.semantic_noise`.

The command trains networks. It is run here and not imported, so that nothing in ieg_jax.data imports the training.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("ieg_jax.semantic_noise", run_name="__main__")
