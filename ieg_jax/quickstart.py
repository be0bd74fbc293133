"""Compares IEG with other methods on digits, where four labels in five are replaced by random ones.

    python -m ieg_jax.quickstart --workdir=runs/quickstart --seeds=0

This trains each method with each seed, except what is finished already, prints one table, and writes quickstart.png and
results.json into the folder.
"""

import pathlib

from absl import flags
from rich.console import Console

from ieg_jax import cli
from ieg_jax.errors import UserError


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/quickstart", "Folder for the runs, the table and the picture.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of noise, trusted set and training, separated by commas.")
    flags.DEFINE_string("config_file", "configs/quickstart.py", "The configuration that is run.")


def main(argv: list[str]) -> None:
    """Trains everything and shows the results."""
    del argv
    values = flags.FLAGS
    try:
        seeds = [int(seed) for seed in values.seeds]
    except ValueError:
        raise UserError(f"--seeds: got {values.seeds}, expected whole numbers separated by commas") from None
    # This imports jax, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax.reproduce import quickstart

    quickstart.run(pathlib.Path(values.workdir), seeds, values.config_file, Console())


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
