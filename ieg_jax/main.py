"""Trains a network: `python -m ieg_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import json

from absl import flags

from ieg_jax import cli
from ieg_jax.errors import Interrupted


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder for checkpoints, metrics and the result; a run that was interrupted goes on there.",
        required=True,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "Several processes: host:port of process 0. Not needed on Cloud TPU, GKE and Slurm, where jax finds out.",
    )
    flags.DEFINE_integer("num_processes", 0, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", -1, "With --coordinator: the number of this process, from 0.")
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "Whether processes are joined: auto = where jax finds several; on = an error if it finds none; off = this "
        "process is alone.",
    )
    flags.DEFINE_string(
        "compilation_cache",
        cli.COMPILATION_CACHE,
        "Folder that keeps compiled programs, local or on a bucket, so that a restart compiles nothing; '' = none.",
    )
    flags.DEFINE_boolean(
        "keep_memory",
        False,
        "On a processor, with glibc: temporary arrays of a step stay with the process, which saves page faults; a step "
        "then runs in the thread that asks for it.",
    )
    flags.adopt_module_key_flags(cli)


def main(argv: list[str]) -> None:
    """Trains, and prints the result as one line of JSON."""
    del argv
    values = flags.FLAGS
    import jax

    # These import TensorFlow, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax.runtime import allocation, processes, watch
    from ieg_jax.train.loop import train_and_evaluate

    if values.keep_memory:
        allocation.prepare()
    watch.enable_compilation_cache(values.compilation_cache)
    processes.initialize(values.coordinator, values.num_processes, values.process_id, values.distributed)
    try:
        result = train_and_evaluate(values.config, values.workdir)
    except Interrupted:
        raise
    except Exception as error:
        if jax.process_count() > 1:
            cli.end_at_once(error)  # an orderly exit would wait for the other processes, and they for this one
        raise
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
