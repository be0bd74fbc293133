"""The command that shows what augmentation does: `python -m ieg_jax.data.contact_sheet --out=sheet.png`.

The picture has a row for each primitive of `autoaugment.py`, at several levels, and a row for each operation that a
policy can be made of, with several seeds and its default parameters; with --config also a row for each policy of that
configuration. Everything is shown on a photograph of 32 and of 224 pixels.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from ieg_jax import cli


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_string("out", None, "The picture, a .png file.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace the file if it exists.")
    config_flags.DEFINE_config_file("config", None, f"Shows its policies too. {cli.CONFIG_HELP}", lock_config=True)


def main(argv: list[str]) -> None:
    """Draws the picture, and says how many rows it has and where it is."""
    del argv
    from ieg_jax.data import sheet  # imports TensorFlow, which takes seconds: after the flags were checked

    values = flags.FLAGS
    print(f"{sheet.write(pathlib.Path(values.out), values.overwrite, values.config)} rows in {values.out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
