"""The command: `python -m ieg_jax.plan --config=configs/cifar100.py --topology=v5e:4x4`.

It compiles the train step for a TPU slice that is not here and prints, for each chip, the memory that a step needs,
its operations, the bytes that it moves, what it sends to other chips, and how fast it can be at best: before
anything is paid for. docs/tpu.md says how to read it. It needs libtpu (`pip install -e '.[plan]'`) and no TPU.
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
        "Compile variants too, any of: batch (half and double the size, as long as it fits), remat (off and on), "
        "batch_groups (1 and the number of chips).",
    )
    flags.DEFINE_string("out", "", "A file for everything as JSON; an older one is replaced.")
    flags.adopt_module_key_flags(cli)


def main(argv: list[str]) -> None:
    """Compiles, prints and writes the report."""
    del argv
    values = flags.FLAGS
    for name in values.sweep:
        check_choice("--sweep", name, SWEEPS)
    prepare_environment()
    from ieg_jax.plan.run import run  # after the environment: it imports jax

    # Tables in a file are not to be squeezed into the 80 columns that are assumed there.
    run(values.config, values.topology, values.sweep, values.out, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
