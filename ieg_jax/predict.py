"""Predicts the classes of images: `python -m ieg_jax.predict --workdir=run images/ more.csv --out=predictions.csv`.

The arguments are image files, folders (all images in them and in their subfolders), lists (.csv or .parquet with a
column `path`, relative to the list) and arrays (.npy, or .npz with `images`), in any number and order. For a network of
features they are files of features, as docs/data.md has them (.npz, .npy, .parquet; no labels are needed). Images are
treated as those on which the run measured its accuracy: data.image_size, then augment.evaluation. The averaged weights
predict.

The table has one row for each image, in the order of the arguments, with these columns:

    path              the file
    index             the place in the array; the column is there where an argument is an array
    class             the name of the most probable class
    probability       the probability of this class
    error             why the image cannot be read; then class and probability are empty
    probability:NAME  the probability of each class, with --probabilities
"""

from absl import flags

from ieg_jax import cli


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_string(
        "workdir", None, "Work folder of the run, or a folder that ieg_jax.export wrote the weights to.", required=True
    )
    flags.DEFINE_string("out", None, "New file for the table, .csv or .parquet; nothing is overwritten.", required=True)
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Which checkpoint: a step, or best (by checkpoint.best_metric); by default that which result.json reports, "
        "of a run that is not finished the newest.",
    )
    flags.DEFINE_string(
        "classifier",
        "",
        "Of features: the file classifier.joblib of an audit of this run, whose classifier predicts in place of the "
        "network. Like every file of joblib it may run code.",
    )
    flags.DEFINE_bool("probabilities", False, "Add a column with the probability of each class.")
    flags.DEFINE_bool(
        "spreadsheet",
        False,
        "Put a ' before cells of a .csv table that a spreadsheet would take for formulas: with =, +, - or @ first.",
    )
    flags.DEFINE_enum(
        "unreadable",
        "skip",
        ["skip", "refuse"],
        "Images that cannot be read: skip = their rows say why in the column error; refuse = every image is decoded "
        "before the first prediction, and if one cannot be, nothing is written.",
    )


def main(argv: list[str]) -> None:
    """Writes the table, and says how many images are in it."""
    # This imports jax, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax.inference.predictions import predict

    values = flags.FLAGS
    print(
        predict(
            values.workdir,
            argv[1:],
            values.out,
            values.checkpoint,
            values.probabilities,
            values.unreadable,
            values.classifier,
            values.spreadsheet,
        )
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=None)
