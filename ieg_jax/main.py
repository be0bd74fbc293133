"""The command: `python -m ieg_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import json
import sys

from absl import app, flags
from ml_collections import config_flags

from ieg_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with arguments behind a colon: configs/quickstart.py:method=l2r,noise_rate=0.4. "
    "Any key is set with --config.group.key=value; configs/default.py lists them.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and the result; a run that was interrupted goes on there."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Trains, and prints the result as one line of JSON."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; options begin with --")
    from ieg_jax import train  # after the flags have been checked: it takes seconds

    try:
        print(json.dumps(train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)))
    except (UserError, train.NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except train.Interrupted as interrupted:
        sys.exit(f"{interrupted}; the same command goes on from there")


def run() -> None:
    """Parses the flags and calls `main`; a bad configuration is one line and exit status 1."""
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
