"""The options of an audit, in a module that imports nothing slow."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """How an audit is made.

    Attributes:
      checkpoint: a step, or best, whose network alone predicts; None = the reported one, and for the probabilities
        those of all checkpoints up to it.
      views: augmented views of each image that are compared; 0 = none, and disagreement is 0.
      threshold: labels with P(right) below it are not kept in cleaned.csv.
      below: what becomes of these: relabel or drop.
      thumbnails: images in the page, of the most suspicious examples; those to be checked come on top. 0 = none.
      folds: how many more networks are trained for out-of-fold probabilities, which count for P(right) too; 0 = none.
      fold_method: method.name of these networks; "" = the run's.
      marks: sample.csv, the answers about examples drawn at random, as the page exports them; "" = none.
      force: whether cleaned.csv is written even if there are alarms.
      retrain: of images, whether the network is trained anew as `supervised`, on the cleaned labels and, to compare, on
        those given.
      spreadsheet: whether cells of labels.csv that a spreadsheet would take for formulas get a ' in front.
    """

    checkpoint: str | None = None
    views: int = 4
    threshold: float = 0.5
    below: str = "relabel"
    thumbnails: int = 1000
    folds: int = 0
    fold_method: str = ""
    marks: str = ""
    force: bool = False
    retrain: bool = False
    spreadsheet: bool = False
