"""The command: `python -m ieg_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import json
import sys

from absl import flags

from ieg_jax import cli

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and the result; a run that was interrupted goes on there.",
    required=True,
)
flags.adopt_module_key_flags(cli)


def main(argv: list[str]) -> None:
    """Trains, and prints the result as one line of JSON."""
    del argv
    from ieg_jax import train  # after the flags have been checked: it takes seconds

    try:
        print(json.dumps(train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)))
    except train.NonFiniteError as error:
        sys.exit(f"error: {error}")
    except train.Interrupted as interrupted:
        sys.exit(f"{interrupted}; the same command goes on from there")


if __name__ == "__main__":
    cli.run(main)
