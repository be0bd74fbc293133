"""The command that looks at data before they are trained on: `python -m ieg_jax.data.doctor --config=...`.

It loads what a configuration names, just as training would, prints what a careful person would check, and writes a
report and a contact sheet. If nothing is wrong, it compiles the training step and makes a few, to say how long training
takes on this machine; else it ends with status 1 and a list of what is wrong.
"""

import sys

from absl import flags
from rich.console import Console

from ieg_jax import cli


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_string("out", None, "New folder for the report and the contact sheet.", required=True)
    flags.DEFINE_bool("quick", False, "Do not read every image in search of duplicates.")
    flags.DEFINE_bool("rehearse", True, "Compile the training step and make a few, to say how long training takes.")


def main(argv: list[str]) -> None:
    """Prints the examination; the last line says whether something is wrong."""
    del argv
    from ieg_jax.data import examination  # imports TensorFlow, which takes seconds: after the flags were checked

    values = flags.FLAGS
    problems, data = examination.examine(values.config, values.out, values.quick, Console())
    if problems:
        sys.exit("\n".join([f"error: {len(problems)} things are wrong:", *(f"  {problem}" for problem in problems)]))
    if values.rehearse:
        from ieg_jax.train import rehearsal  # likewise

        print(rehearsal.rehearse(values.config, data))
    print("nothing wrong found")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
