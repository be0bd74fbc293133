"""Says what a step would cost on a TPU: `python -m ieg_jax.plan --config=configs/cifar100.py --topology=v5e:4x4`.

The command compiles the train step for a TPU slice before anyone pays for one. For each chip it prints the device
memory that a step needs, its operations, the bytes that it moves, what it sends to other chips, and how fast it can be
at best; and whether a host delivers the data for that. docs/tpu.md says how to read this. The command needs libtpu
(`pip install -e '.[plan]'`), but no TPU.
"""

import sys

from absl import flags
from rich.console import Console

from ieg_jax import cli
from ieg_jax.errors import check_choice
from ieg_jax.plan.environment import prepare_environment

SWEEPS = ("batch", "remat", "batch_groups")
# What is measured on a host -> what it means.
MEASURED = {
    "images_per_cpu_second": "Views of images that a host decodes and augments per second of processor time",
    "read_seconds": "Seconds that it takes to read an image from a bucket",
    "assembly_bytes_per_second": "Bytes of ready examples that a host makes into batches per second",
}


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
    flags.DEFINE_string(
        "doctor", "", "report.json that ieg_jax.data.doctor wrote on a host: whether the chips will wait for data."
    )
    flags.DEFINE_integer("cores", None, "Processors of a host, in place of the doctor's.", lower_bound=1)
    for name, text in MEASURED.items():
        flags.DEFINE_float(name, None, f"{text}, in place of the doctor's.", lower_bound=0.0)
    flags.DEFINE_integer(
        "reads_in_flight", None, "Requests to a bucket that wait at the same time, in place of 16 a processor.",
        lower_bound=1,
    )  # fmt: skip
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
    from ieg_jax.plan.supply import read_host

    host = read_host(values.doctor, {name: getattr(values, name) for name in ("cores", "reads_in_flight", *MEASURED)})
    # Where the output is no terminal, rich would squeeze the tables into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    run(values.config, values.topology, values.sweep, values.out, console, host)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
