"""Says what a step would cost on a TPU: `python -m ieg_jax.plan --config=configs/cifar100.py --topology=v5e:4x4`.

The command compiles the train step for a TPU slice before anyone pays for one. For each chip it prints the device
memory that a step needs, its operations, the bytes that it moves, what it sends to other chips, and how fast it can be
at best. docs/tpu.md says how to read this. The command needs libtpu (`pip install -e '.[plan]'`), but no TPU.
"""

import sys

from absl import flags
from rich.console import Console

from ieg_jax import cli
from ieg_jax.errors import check_choice
from ieg_jax.plan.environment import prepare_environment

SWEEPS = ("batch", "remat", "batch_groups")


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_string("topology", None, "The slice: v5e:4x4, v4:2x2x4, v5p:2x2x4, v6e:2x2, ...", required=True)
    flags.DEFINE_list(
        "sweep",
        [],
        "Compile variants too, any of: batch (half the size, and double the size as long as it fits), remat (off and "
        "on), batch_groups (1 and the number of chips).",
    )
    flags.DEFINE_string("out", "", "A file for everything as JSON; an older file is replaced.")
    flags.adopt_module_key_flags(cli)


def main(argv: list[str]) -> None:
    """Compiles the step, prints the report and writes it."""
    del argv
    values = flags.FLAGS
    for name in values.sweep:
        check_choice("--sweep", name, SWEEPS)
    prepare_environment()
    # This imports jax, which reads the environment.
    from ieg_jax.plan.run import run

    # Where the output is no terminal, rich would squeeze the tables into 80 columns.
    run(values.config, values.topology, values.sweep, values.out, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
