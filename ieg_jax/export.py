"""The weights of a trained network alone, for serving.

    python -m ieg_jax.export --workdir=runs/quickstart --out=model

writes `weights.npz`, which numpy reads, and `model.json` (configuration, classes, step); `inference.load` takes the
folder like a work folder.
"""

import numpy as np
from absl import flags
from etils import epath

from ieg_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of the run, local or on a bucket.", required=True)
_OUT = flags.DEFINE_string("out", None, "New folder for the weights, local or on a bucket.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest that is not damaged.")


def main(argv: list[str]) -> None:
    """Writes the weights, reads them again, and says what they are."""
    del argv
    import jax

    from ieg_jax import inference

    out = epath.Path(_OUT.value)
    cli.check_new_folder("--out", out)
    trained = inference.load(_WORKDIR.value, _STEP.value)
    inference.export(trained, out)
    again = inference.load(out)
    jax.tree.map(
        np.testing.assert_array_equal, (trained.params, trained.batch_stats), (again.params, again.batch_stats)
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((trained.params, trained.batch_stats)))
    print(
        f"{trained.config.model.name} of step {trained.step}, {trained.num_classes} classes, {size:,} bytes, in {out}"
    )


if __name__ == "__main__":
    cli.run(main)
