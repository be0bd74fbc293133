"""Makes a list to train on from an audit: `python -m ieg_jax.clean --audit=audit --marks=marks.csv --out=cleaned.csv`.

Labels with P(right) below --threshold are relabelled or dropped, and the others are kept. A mark that was set in the
page of the audit decides for its example, whatever P(right) is. The list has the columns path (absolute, where images
are files), label, given_label and id. A run trains on it as on any other list: --config=configs/own_data.py
--config.data.train=cleaned.csv.
"""

from typing import Any

from absl import flags
from etils import epath

from ieg_jax import cli
from ieg_jax.audit import cleaned
from ieg_jax.data.sources.feature_tables import ENDINGS
from ieg_jax.errors import UserError


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_string("audit", None, "Folder that ieg_jax.audit wrote.", required=True)
    flags.DEFINE_string(
        "out", None, "New .csv file, or a name with the ending of data.train; nothing is overwritten.", required=True
    )
    flags.DEFINE_float("threshold", 0.5, "Labels with P(right) below this are not kept.", lower_bound=0, upper_bound=1)
    flags.DEFINE_enum("below", "relabel", ["relabel", "drop"], "What becomes of these labels.")
    flags.DEFINE_string("marks", "", "The file marks.csv that the page of the audit exported.")
    flags.DEFINE_bool("force", False, "Whether to write it even if the audit raised alarms.")


def main(argv: list[str]) -> None:
    """Writes the list, and says how many labels it changes."""
    del argv
    values: Any = flags.FLAGS
    out = epath.Path(values.out).expanduser()
    endings = (".csv", ".npz", *ENDINGS)
    if out.suffix.lower() not in endings:
        raise UserError(
            f"--out={values.out}: expected a name that ends in .csv, or as the data do ({', '.join(endings[1:])})"
        )
    if out.exists():
        raise UserError(f"--out={out} is there already; name a new file")
    audit = epath.Path(values.audit).expanduser()
    if not values.force:
        cleaned.refuse_alarms(audit)
    counts = cleaned.write(audit, out, values.threshold, values.below, values.marks)
    print(f"{out}: {counts['keep']:,} labels kept, {counts['relabel']:,} changed, {counts['drop']:,} examples dropped")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
