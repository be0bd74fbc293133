"""Finds out which labels are wrong: `python -m ieg_jax.audit --workdir=run --out=audit`, after training.

It predicts the training set of the run once, and writes to the folder

    labels.parquet, labels.csv  a row for each training example (docs/audit.md has the columns); labels.parquet also has
                                the probability of each class
    audit.html                  a page that shows how many labels are wrong, of which classes, and the most suspicious
                                examples, to be marked keep, relabel or drop; opened as a file, it needs no network
    cleaned.csv                 path and label of each example, to train on; labels with P(right) below --threshold are
                                changed, or their examples left out
    cleanlab.npz                labels and probabilities for cleanlab, see `ieg_jax.audit.to_cleanlab`
    summary.json                the estimates in numbers

What the run was trained on is read again, and must still be the same; it is never written to. An audit that was
interrupted goes on with the same command. `python -m ieg_jax.clean` makes another cleaned.csv, with another threshold
or with the marks that were set in the page. docs/audit.md says how P(right) comes about.
"""

import dataclasses

from absl import flags

from ieg_jax import cli
from ieg_jax.audit.options import Options


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    usual = Options()
    flags.DEFINE_string("workdir", None, "Work folder of the run.", required=True)
    flags.DEFINE_string("out", None, "New folder, or that of an audit to go on with.", required=True)
    flags.DEFINE_string(
        "checkpoint",
        usual.checkpoint,
        "A step, or best (by checkpoint.best_metric), whose network alone predicts; by default the networks of all "
        "checkpoints that the run keeps.",
    )
    flags.DEFINE_integer("views", usual.views, "Augmented views of each image that are compared.", lower_bound=0)
    flags.DEFINE_float("threshold", usual.threshold, "Labels with P(right) below it are not kept in cleaned.csv.")
    flags.DEFINE_enum("below", usual.below, ["relabel", "drop"], "What becomes of these in cleaned.csv.")
    flags.DEFINE_integer(
        "thumbnails", usual.thumbnails, "Most suspicious images in the page; 0 = no images.", lower_bound=0
    )
    flags.DEFINE_integer(
        "folds",
        usual.folds,
        "Out-of-fold probabilities by so many more trainings, which count for P(right), and are there for cleanlab; "
        "0 = none.",
        lower_bound=0,
    )
    flags.DEFINE_string("marks", usual.marks, "sample.csv of the page, by which everything is estimated anew.")
    flags.DEFINE_bool("force", usual.force, "Whether to write cleaned.csv even if there are alarms.")
    flags.DEFINE_bool(
        "retrain",
        usual.retrain,
        "Of images: train the network anew in a plain way, on the cleaned labels and, to compare, on those given.",
    )
    flags.DEFINE_bool(
        "spreadsheet",
        usual.spreadsheet,
        "Put a ' before cells of labels.csv that a spreadsheet would take for formulas: with =, +, - or @ first.",
    )
    flags.DEFINE_string(
        "part",
        "",
        "i/n: make the i-th of n parts of the predictions and nothing else, as one of several processes; the command "
        "without --part then finds them.",
    )
    flags.DEFINE_string("fold_method", usual.fold_method, "method.name of these, e.g. supervised; '' = the run's.")


def main(argv: list[str]) -> None:
    """Makes the audit, and says what came out."""
    del argv
    # These import jax, which takes seconds: after the flags were checked.
    from ieg_jax.audit.run import audit, in_words, predict_part

    values = flags.FLAGS
    options = Options(**{field.name: values[field.name].value for field in dataclasses.fields(Options)})
    if values.part:
        print(predict_part(values.workdir, values.out, values.part, options))
        return
    print(in_words(audit(values.workdir, values.out, options), values.out))


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
