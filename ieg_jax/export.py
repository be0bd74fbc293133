"""Exports a trained network for serving: its weights alone, or a function that needs no code of this package.

    python -m ieg_jax.export --workdir=runs/quickstart --out=model

This writes `weights.npz`, which numpy reads, and `model.json` (configuration, classes, step). `inference.load` and
`ieg_jax.predict` take this folder like a work folder. With --format=stablehlo the folder gets `model.stablehlo`
instead, a program with its weights for `jax.export.deserialize`; with --format=saved_model it gets a TensorFlow
SavedModel. Both turn images [n,H,W,C], for any n, into probabilities [n,K], and run on CPU, TPU and CUDA.
`signature.json` says which images they take, and names the classes.
"""

import numpy as np
from absl import flags
from etils import epath
from flax.traverse_util import flatten_dict

from ieg_jax import cli

FORMATS = ("weights", "stablehlo", "saved_model")


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_string("workdir", None, "Work folder of the run, local or on a bucket.", required=True)
    flags.DEFINE_string("out", None, "New folder for what is written, local or on a bucket.", required=True)
    flags.DEFINE_string(
        "step",
        None,
        "Which checkpoint: a step, or best (by checkpoint.best_metric); by default that which result.json reports, "
        "of a run that is not finished the newest.",
    )
    flags.DEFINE_enum(
        "format",
        "weights",
        FORMATS,
        "What is written. saved_model needs a TensorFlow about as old as jax: 2.21.0 runs what jax 0.10.2 "
        "makes for it, and not what 0.12.0.1 does, whose operations it does not know.",
    )
    flags.DEFINE_enum(
        "input",
        "uint8",
        ["uint8", "float32"],
        "For stablehlo and saved_model, the pixels that the function takes: uint8 from 0 to 255, or float32 from 0 to "
        "1. Where augment.evaluation resizes images, its results must be rounded for uint8.",
    )


def main(argv: list[str]) -> None:
    """Writes the files, reads them again, compares, and says what they are."""
    del argv
    values = flags.FLAGS
    # This imports jax, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax import inference

    out = epath.Path(values.out)
    cli.check_new_folder("--out", out)
    trained = inference.load(values.workdir, values.step)
    arrays = flatten_dict({"params": trained.params, "batch_stats": trained.batch_stats})
    size = sum(array.nbytes for array in arrays.values())
    what = f"{trained.config.model.name} of step {trained.step}, {trained.num_classes} classes, "
    if values.format == "weights":
        inference.export(trained, out)
        again = inference.load(out)
        for path, array in flatten_dict({"params": again.params, "batch_stats": again.batch_stats}).items():
            np.testing.assert_array_equal(arrays[path], array)
        print(f"{what}{size:,} bytes, in {out}")
        return
    if values.format == "stablehlo":
        inference.export_stablehlo(trained, out, values.input)
        served = inference.load_stablehlo(out)
    else:
        inference.export_saved_model(trained, out, values.input)
        served = inference.load_saved_model(out)
    shape = ", ".join(map(str, served.signature["input"]["shape"]))
    difference = inference.largest_difference(trained, served)
    print(
        f"{what}{values.format} for {values.input} images [{shape}], at most {difference:.1e} from the probabilities "
        f"here, in {out}"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
