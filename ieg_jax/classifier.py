"""A scikit-learn classifier: noisy labels and a few checked ones in, predictions and label quality out.

    clf = IEGClassifier(augment="grey").fit(X, y, X_trusted, y_trusted)
    clf.predict(X_new), clf.label_quality_, clf.suspects(20)

`fit` writes the arrays into a work folder, has `train.loop.train_and_evaluate` train there, and reads from it what the
attributes hold. So what it computes is what the commands compute from the same configuration (`config_`).
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from ieg_jax import arguments, cli, inference, methods, models
from ieg_jax import config as config_lib
from ieg_jax.audit import final, measures, retrained
from ieg_jax.audit import quality as label_quality
from ieg_jax.data import backbone
from ieg_jax.data.load import Data, load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources.arrays import feature_statistics, standardised
from ieg_jax.data.splits import UNKNOWN, Split, make_split, narrow_range
from ieg_jax.errors import Interrupted, UserError, check_choice
from ieg_jax.inference import plain
from ieg_jax.models import own
from ieg_jax.runtime.workdir import WorkFolder
from ieg_jax.train import check
from ieg_jax.train.loop import train_and_evaluate

RATE, BATCH = 0.05, 64  # learning rate and batch size of images, as in configs/own_data.py
# Keys of `config` that are refused, or the beginnings of several: the arguments of `fit` say what they would say.
FIXED = ("class_weight", "data.", "noise.", "trusted.source", "trusted.ids", "trusted.per_class", "trusted.fraction")
AUTO = "auto"
DATA_FILE = "dataset.npz"  # of the work folder
# Classifiers that were pickled when these modules had other names can still be loaded.
sys.modules |= {"ieg_jax.label_quality": label_quality, "ieg_jax.program": own}


class IEGClassifier(ClassifierMixin, BaseEstimator):
    """Classifier of images or features that is trained on noisy labels with a small trusted set.

    Args:
      method: a name in `methods.REGISTRY`, such as `ieg` or `supervised`; those that learn from given labels alone
        (docs/methods.md) do without a trusted set.
      network: a name in `models.REGISTRY`, or any flax.linen module, called as `network(x, train=...)` with float32
        `[n, H, W, C]` in [-1, 1], features as `[n, 1, 1, D]`, that returns logits `[n, K]`; one of Flax NNX as
        `from_nnx(MyNetwork, ...)`. None = `mlp` for features and on a backbone, else a wide ResNet, its size from the
        data.
      backbone: of images, a pretrained network that stays as it is, on whose features `network` is trained: a name in
        `models.REGISTRY`, `none`, or `auto`: EfficientNet-Lite0 where the package `[pretrained]` with its weights
        is installed, `network` is None, `augment` is no pair, and images have at least 24 pixels a side.
        Weights of other networks by `config={"backbone.pretrained": ...}`. A pickle finds the weights where they were.
      augment: of images: `photos`, `grey` (no change of colours), `symbols` (neither mirrored nor turned), `auto` (grey
        where images have one channel, else photos); or for anything a pair (standard, strong) of policies of
        `data.augment`. Features have Gaussian noise instead of a name's, and on a backbone there are random crops
        besides, mirrored unless it is `symbols`.
      epochs: length of the training in passes over X; at most one of it and `steps`.
      steps: the same in steps. Both None = 40 epochs, but no fewer than 500 and no more than 20,000 steps; of features
        20 epochs, but no fewer than 300 and no more than 1,500 steps.
      batch_size: noisy examples per step, over all devices; None = 64 images or 256 rows of features.
      image_size: pixels of a side to which images are resized; 0 = as they are; None = the shorter side, at most 64, in
        multiples of 4. On a backbone they are resized for that alone (`backbone.image_size`), and None = 0.
      holdout: share of the trusted examples of each class that is kept out of training, rounded down: label quality is
        calibrated on them. In [0, 1).
      final: the classifier that predicts in the end. auto = the best of the plain ones of `audit.final`, trained on the
        labels that the network's audit has cleaned, or the network where it is better, or, of images without a
        backbone, the network trained anew on cleaned labels (`audit.retrained`); one of their names (logistic, forest,
        kernel) or retrained = that one likewise; network = the network, and an audit by it alone.
      class_weight: balanced = classes of unequal size count alike, in the training of the network by the labels as
        given, in that of the final classifier by the cleaned ones; None = every example counts alike.
      random_state: a whole number, a RandomState, or None for another one at each fit. One number, one result.
      workdir: folder in which the training happens; a fit that was interrupted goes on there when it is called again
        in the same way, and a finished one is read from it. None = a temporary folder.
      verbose: 0 = nothing is shown.
      config: more keys of configs/default.py, such as `{"schedule.base_lr": 0.05}`. They are set last.

    Attributes:
      classes_: `[K]` labels, sorted.
      label_quality_: `[N]` float32, P(given label is right), in the order of X; 1 for rows that are `trusted`.
      suggested_labels_: `[N]` the most probable other class of each; of rows that are `trusted` their label.
      quality_: `audit.quality.Quality` of the rows that are not `trusted`, classes as numbers.
      network_quality_: the same by the network alone, before the final classifier took part.
      final_: what predicts, `network`, `retrained`, or the name of a plain classifier.
      comparison_: `audit.final.Compared`, the accuracy of all that were compared on held-out trusted examples.
      noise_rate_: share of their labels that are wrong.
      noise_interval_: (low, high) around it, 95 %.
      transition_matrix_: `[K, K]`, P(given = classes_[j] | true = classes_[i]).
      history_: rows of metrics.jsonl, dicts.
      result_: result.json, a dict.
      config_: the whole configuration of the run.
      n_features_in_, feature_names_in_: as in scikit-learn; of features alone.
      image_shape_: (H, W, C) of the images as they were given; of images alone.
    """

    def __init__(
        self,
        *,
        method: str = "ieg",
        network: str | nn.Module | None = None,
        backbone: str = "auto",
        augment: str | tuple[str, str] = "auto",
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        image_size: int | None = None,
        holdout: float = 0.2,
        final: str = "auto",
        class_weight: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
        workdir: str | None = None,
        verbose: int = 1,
        config: Mapping[str, Any] | None = None,
    ):
        self.method = method
        self.network = network
        self.backbone = backbone
        self.augment = augment
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.image_size = image_size
        self.holdout = holdout
        self.final = final
        self.class_weight = class_weight
        self.random_state = random_state
        self.workdir = workdir
        self.verbose = verbose
        self.config = config

    def fit(self, X, y, X_trusted=None, y_trusted=None, trusted=None, trusted_given=None) -> "IEGClassifier":
        """Trains, and estimates which labels are right.

        The trusted set comes either as arrays of its own or as rows of X; some methods, such as supervised, do without.

        Args:
          X: images `[N, H, W]` or `[N, H, W, C]`, C 1 or 3, integers 0 to 255 or floats in [0, 1]; or features
            `[N, D]`, any numbers, each of which is standardised.
          y: `[N]` labels as given: numbers or strings.
          X_trusted: `[M, ...]` as X.
          y_trusted: `[M]` their labels, which are right; every class of y occurs.
          trusted: instead of these, which rows of X have a label that is right: a mask `[N]` of bool, or row numbers.
            They are trained with as trusted ones only. In cross-validation a mask is split as y is.
          trusted_given: `[M]` the labels that the examples of X_trusted had before they were checked. From those that
            are held out (`holdout`) the share of wrong labels and P(right) are estimated much better.

        Returns:
          The estimator itself.

        Raises:
          ValueError: for arguments that cannot be used, before anything is compiled.
          StorageError, NonFiniteError: see `train.loop.train_and_evaluate`.
          KeyboardInterrupt: after SIGINT or SIGTERM; with `workdir` the same call goes on from there.
        """
        check_choice("method", self.method, methods.REGISTRY)
        check_choice("final", self.final, (AUTO, final.NETWORK, retrained.NAME, *final.CLASSIFIERS))
        if self.class_weight not in (None, "balanced"):
            raise UserError(f"class_weight: got {self.class_weight!r}, expected None or 'balanced'")
        X, given = self._check_fit(X, y)
        examples = self._examples(X, "X")
        in_x = arguments.rows(trusted, len(given))
        if trusted is not None and not (X_trusted is None and y_trusted is None):
            raise UserError("trusted and X_trusted, y_trusted are both given, expected one of them")
        names, labels = np.unique(given, return_inverse=True)
        if len(names) < 2:
            raise UserError(f"y has 1 class ({names[0]!r}), expected at least two classes")
        needs_trusted = methods.get(self.method).needs_trusted
        stand_in = trusted is None and X_trusted is None and y_trusted is None and not needs_trusted
        if trusted is not None:
            trusted_examples, y_trusted = examples[in_x], given[in_x]
        elif stand_in:
            # Accuracy on a trusted set is part of every run: here on one example of each class, and not reported.
            rows = np.unique(labels, return_index=True)[1]
            trusted_examples, y_trusted = examples[rows], given[rows]
        else:
            trusted_examples, y_trusted = self._check_trusted(X_trusted, y_trusted, examples)
        trusted_labels = arguments.as_numbers(y_trusted, names)
        noisy = ~in_x
        if not noisy.any():
            raise UserError("trusted: all rows of X are trusted, expected some that are not; use any classifier")

        what = "features" if examples.ndim == 2 else "images"
        arrays = {
            what: examples[noisy],
            "labels": labels[noisy],
            f"trusted_{what}": trusted_examples,
            "trusted_labels": trusted_labels,
        }
        if trusted_given is not None:
            arrays["trusted_given_labels"] = arguments.given_numbers(
                trusted_given, len(trusted_labels), names, trusted is None
            )
        config = self._configure(what, len(names), 0.0 if stand_in else self.holdout)
        network = self.network if isinstance(self.network, nn.Module) else None
        with self._folder() as folder:
            trained, result = self._train(config, folder, arrays, network)
            earlier = inference.over_training(folder, trained, network)[1:]
            data = load_data(ConfigDict(trained.config.to_dict()), quiet=True)
            history = WorkFolder(folder, writes=False).rows()
            self._predictor = inference.predictor(trained)
            self._statistics = feature_statistics(arrays[what]) if what == "features" else None
            quality = self._audit(data, names, inference.predictor_of_all([trained, *earlier]))
            again = self._retrain(folder, trained, arrays, network, data, quality)
        self._trained = _on_host(again or trained)
        self._predictor = inference.predictor(self._trained)
        if self.workdir is None:
            trained.config.data.train = self._trained.config.data.train = ""  # it was in the temporary folder
        if self.verbose and self.comparison_:
            print(final.table([dataclasses.asdict(one) for one in self.comparison_]))
        self.classes_ = names
        self.quality_ = quality
        self.noise_rate_, self.noise_interval_ = quality.noise_rate, quality.noise_interval
        self.transition_matrix_ = quality.transition
        self.label_quality_ = np.ones(len(given), np.float32)
        self.label_quality_[noisy] = quality.right
        self._confidence = np.zeros(len(given), np.float32)
        self._confidence[noisy] = quality.confidence
        self.suggested_labels_ = given.astype(names.dtype)
        self.suggested_labels_[noisy] = names[quality.suggested]
        self._given, self._noisy = given, noisy
        self.config_ = trained.config
        hidden = ("trusted/", "trusted_") if stand_in else ()
        self.history_ = [{key: row[key] for key in row if not key.startswith(hidden)} for row in history]
        self.result_ = {key: value for key, value in result.items() if not key.startswith(hidden)}
        return self

    def predict_proba(self, X) -> np.ndarray:
        """The probabilities of the classes, by the final classifier or, where there is none, by the averaged network.

        Args:
          X: `[n, ...]` as in `fit`.

        Returns:
          `[n, K]` float32, in the order of `classes_`.

        Raises:
          NotFittedError: before `fit`.
          ValueError: for examples of another shape than those of `fit`.
        """
        check_is_fitted(self)
        return self._predict(self._split(self._check_examples(X)))

    def predict(self, X) -> np.ndarray:
        """The most probable class of each example, `[n]`; arguments and errors as of `predict_proba`."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def suspects(self, n: int | None = None, threshold: float = 0.5) -> np.ndarray:
        """The rows of X whose label is probably wrong.

        Args:
          n: at most so many, None = all.
          threshold: those with P(given label is right) below this.

        Returns:
          A structured array, the most suspicious row first, with the fields `row` (of X), `given` and `suggested`
          (labels as in y), `right` = P(given label is right), `confidence` = P(suggested label is right).

        Raises:
          NotFittedError: before `fit`.
          ValueError: for a negative n.
        """
        check_is_fitted(self)
        if n is not None and n < 0:
            raise UserError(f"n: got {n!r}, expected None or at least 0")
        rows = np.flatnonzero(self._noisy & (self.label_quality_ < threshold))
        rows = rows[np.argsort(self.label_quality_[rows], kind="stable")][:n]
        label = self.classes_.dtype
        fields = {"row": np.int64, "given": label, "suggested": label, "right": np.float32, "confidence": np.float32}
        found = np.empty(len(rows), list(fields.items()))
        columns = (rows, *(a[rows] for a in (self._given, self.suggested_labels_, self.label_quality_)))
        for name, column in zip(fields, (*columns, self._confidence[rows]), strict=True):
            found[name] = column
        return found

    def __sklearn_tags__(self):
        """Images are allowed besides features."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Whether the last `fit` came to its end."""
        return "_trained" in self.__dict__

    def __getstate__(self):
        """Without the compiled function."""
        return {name: value for name, value in super().__getstate__().items() if name != "_predictor"}

    def __setstate__(self, state):
        """Of a classifier that was pickled before a network knew the shape of its images, it follows from `fit`."""
        super().__setstate__({"class_weight": None, "backbone": "none"} | state)
        trained = self.__dict__.get("_trained")
        if trained is not None and "image_shape" not in vars(trained):
            known = {name: value for name, value in vars(trained).items() if name != "exported_image_shape"}
            shape = self.image_shape_ if self._statistics is None else (1, 1, self.n_features_in_)
            self._trained = inference.Trained(**known, image_shape=shape)

    def _audit(self, data: Data, names: np.ndarray, of_all: Callable[..., np.ndarray]) -> label_quality.Quality:
        """Which labels are right, by the network over its training and, where there is one, by the final classifier."""
        predict, held_out = measures.mean_over(self._predictor, of_all), data.held_out
        probabilities = predict(data.train)
        evidence = () if held_out is None else (predict(held_out), held_out.labels, held_out.given_labels)
        quality = label_quality.estimate(probabilities, data.train.labels, *evidence, class_names=names.astype(str))
        self.network_quality_, self._final, self.comparison_ = quality, None, ()
        if self.final not in (final.NETWORK, retrained.NAME) and final.possible(data.train):
            found = self._fit_final(data, names, probabilities, evidence, quality)
            self.comparison_ = found.comparison
            if found.name != final.NETWORK:
                quality, self._final = found.quality, found
        self.final_ = final.NETWORK if self._final is None else self._final.name
        return quality

    def _retrain(
        self,
        folder: pathlib.Path,
        trained: inference.Trained,
        arrays: Mapping[str, np.ndarray],
        network: nn.Module | None,
        data: Data,
        quality: label_quality.Quality,
    ) -> inference.Trained | None:
        """The network trained anew on the cleaned labels, see `audit.retrained`; None where another one is final."""
        wanted = self.final == retrained.NAME
        possible = self.final == AUTO and not (data.train.is_features or quality.alarms)
        if not (wanted or possible):
            return None
        labels, sure = final.cleaned(quality, data.train.labels)
        what = "features" if "features" in arrays else "images"
        kept = {what: arrays[what][sure], "labels": labels[sure]}
        again, _ = self._train(retrained.plainly(trained.config), folder / retrained.NAME, {**arrays, **kept}, network)
        predictor, held_out = inference.predictor(again), data.held_out
        truth = None if held_out is None else held_out.labels
        found = None if held_out is None else predictor(held_out).argmax(1)
        if not self.comparison_:
            before = None if held_out is None else self._predict(held_out).argmax(1)
            self.comparison_ += (final.compared(final.NETWORK, self.method, None, before, truth),)
        self.comparison_ += (final.compared(retrained.NAME, "cleaned", None, found, truth),)
        if not wanted and held_out is not None:
            before = self._predict(held_out).argmax(1)
            if final.clearly_better(before == truth, found == truth):
                return None
        self.final_, self._final = retrained.NAME, None
        return again

    def _train(
        self, config: ConfigDict, folder: pathlib.Path, arrays: Mapping[str, np.ndarray], network: nn.Module | None
    ) -> tuple[inference.Trained, dict[str, Any]]:
        """A run on these arrays in the folder, as it is afterwards, and its result.json."""
        config.data.train = str(_save(folder, arrays))
        try:
            result = train_and_evaluate(config, str(folder), network, quiet=not self.verbose)
        except Interrupted as error:
            raise KeyboardInterrupt(str(error)) from error
        return inference.load(folder, network=network), result

    def _fit_final(
        self, data: Data, names, probabilities, evidence: tuple, quality: label_quality.Quality
    ) -> final.Final:
        """The final classifier, see `audit.final`."""
        held_out = given = None
        if evidence:
            predicted = self._predictor(data.held_out)
            held_out, given = final.Examples(plain.flat(data.held_out), evidence[1], predicted), evidence[2]
        task = final.Task(
            noisy=final.Examples(plain.flat(data.train), data.train.labels, probabilities),
            trusted=final.Examples(plain.flat(data.trusted), data.trusted.labels, self._predictor(data.trusted)),
            held_out=held_out,
            held_out_given=given,
            seed=arguments.seed(self.random_state),
            class_names=names.astype(str),
            balanced=self.class_weight is not None,
        )
        is_images = not data.train.is_features or data.features is not None
        candidates = tuple(final.CLASSIFIERS) if self.final == AUTO else (self.final,)
        return final.fit(task, quality, self.method, is_images, candidates)

    def _predict(self, split: Split) -> np.ndarray:
        if self.__dict__.get("_final") is not None:
            features = self._trained.features
            return self._final.predict_proba(plain.flat(split if features is None else features.of(split)))
        if "_predictor" not in self.__dict__:  # after unpickling
            self._predictor = inference.predictor(self._trained)
        return self._predictor(split)

    # ---- Checks.

    def _check_fit(self, X, y) -> tuple[np.ndarray, np.ndarray]:
        """X as an array, features in floating point, images as they are, and labels `[N]`."""
        for name in ("_trained", "n_features_in_", "feature_names_in_", "image_shape_"):
            self.__dict__.pop(name, None)
        if y is None:
            raise UserError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        arguments.check_kind(y)
        if arguments.is_images(X):
            X, y = np.asarray(X), column_or_1d(y, warn=True)
            if len(X) != len(y):
                raise UserError(f"X has {len(X)} images and y {len(y)} labels, expected as many")
        else:
            X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        return X, y

    def _examples(self, X: np.ndarray, where: str) -> np.ndarray:
        """Features `[n, D]` as they are, images as `[n, H, W, C]` uint8 or float32 in [0, 1], checked."""
        if X.ndim == 2:
            return X
        images = arguments.pixels(X, where)
        if where == "X":
            self.image_shape_ = images.shape[1:]
            if notice := narrow_range(images):
                warnings.warn(notice, stacklevel=3)
        elif images.shape[1:] != self.image_shape_:
            raise UserError(
                f"{where}: images of shape {images.shape[1:]}, expected {self.image_shape_} (H, W, C) as those of X"
            )
        return images

    def _check_trusted(self, X, y, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Trusted examples that are not rows of X, and their labels."""
        if X is None or y is None:
            lacks = "X_trusted and y_trusted" if X is None and y is None else "X_trusted" if X is None else "y_trusted"
            without = ", ".join(name for name in methods.REGISTRY if not methods.get(name).needs_trusted)
            raise UserError(
                f"fit needs {lacks}: method={self.method!r} learns from a few examples whose labels are right. Give "
                f"X_trusted and y_trusted, or trusted=rows of X; {without} do without"
            )
        if examples.ndim == 4 and not arguments.is_images(X):
            raise UserError(f"X_trusted: shape {np.shape(X)}, expected [M, H, W] or [M, H, W, C], images as X")
        if examples.ndim == 2:
            if arguments.is_images(X):
                raise UserError(f"X_trusted: shape {np.shape(X)}, expected [M, {examples.shape[1]}], features as X")
            X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        X = self._examples(np.asarray(X), "X_trusted")
        y = column_or_1d(y)
        if len(X) != len(y):
            raise UserError(f"X_trusted has {len(X)} examples and y_trusted {len(y)} labels, expected as many")
        return X, y

    def _check_examples(self, X) -> np.ndarray:
        """Examples to be predicted, as `_examples` makes them."""
        if self._statistics is not None:
            return validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        wanted = self.image_shape_
        images = arguments.pixels(np.asarray(X), "X") if arguments.is_images(X) else None
        if images is None or images.shape[1:] != wanted:
            raise UserError(f"X: shape {np.shape(X)}, expected images [n, {', '.join(map(str, wanted))}] as in fit")
        return images

    def _split(self, examples: np.ndarray) -> Split:
        if self._statistics is not None:
            examples = standardised(examples, *self._statistics)
        split = make_split(examples, np.full(len(examples), UNKNOWN))
        return sources.resize(split, self.config_.data.image_size)

    # ---- The run.

    def _configure(self, what: str, num_classes: int, holdout: float) -> ConfigDict:
        """The configuration; `data.train` is missing still."""
        config, is_features = cli.load_config("configs/default.py"), what == "features"
        config.seed = config.trusted.seed = arguments.seed(self.random_state)
        config.method.name = self.method
        config.class_weight = self.class_weight or "none"
        config.data.name, config.data.num_classes = ("features" if is_features else "arrays"), num_classes
        config.trusted.source = "separate"
        if is_features and self.image_size:
            raise UserError(f"image_size={self.image_size!r}, but X are features [N, D]; leave it None")
        name = "" if is_features else self._backbone()
        on_features = is_features or bool(name)
        if name:
            config_lib.follow_backbone(config, name, mirrored=self.augment != "symbols")
        elif is_features:
            config_lib.follow_features(config)
        else:
            config_lib.follow_data(config, RATE)
            config.batch_size = BATCH
        if not is_features:
            usual = 0 if on_features else config_lib.AUTO
            config.data.image_size = arguments.number("image_size", self.image_size, usual, int)
        config.batch_size = arguments.number("batch_size", self.batch_size, config.batch_size, int)
        config.trusted.holdout = arguments.number("holdout", holdout, None, float)

        if isinstance(self.network, nn.Module):
            config.model.depth = 1  # of no use
        else:
            if not (self.network is None or isinstance(self.network, str)):
                own.check_kind(self.network)
            config.model.name = self.network or ("mlp" if on_features else "wide_resnet")
            check_choice("network", config.model.name, models.REGISTRY)
            if config.model.name == "wide_resnet":
                config.model.depth, config.model.width = config_lib.AUTO, float(config_lib.AUTO)
            elif config.model.name == "mlp":
                config.model.depth = config_lib.FEATURES_DEPTH
        config.augment.standard, config.augment.strong = self._policies(on_features)
        methods.tune(config, **config_lib.OWN_DATA)

        if self.epochs is not None and self.steps is not None:
            raise UserError(f"epochs={self.epochs!r} and steps={self.steps!r}, expected one of them")
        for name, value, kind in (("epochs", self.epochs, float), ("steps", self.steps, int)):
            if value is not None:
                if not arguments.number(name, value, None, kind) > 0:
                    raise UserError(f"{name}: got {value!r}, expected None or more than 0")
                arguments.set_key(config, f"num_train_{name}", kind(value))
        for key, value in (self.config or {}).items():
            if str(key).startswith(FIXED):
                raise UserError(f"config: {key!r} follows from the arguments of the classifier and of fit; omit it")
            arguments.set_key(config, key, value)
        # Here already, so that nothing is written for a configuration that is refused; with these resolved.
        check.validate(config_lib.resolve(config))
        return config

    def _backbone(self) -> str:
        """The name of the backbone of images; "" without one."""
        if self.backbone != AUTO:
            return backbone.choose(self.backbone)
        side = min(self.__dict__.get("image_shape_", (0, 0, 0))[:2])
        fits = side >= config_lib.SMALL and self.network is None and isinstance(self.augment, str)
        return backbone.choose(AUTO) if fits else ""

    def _policies(self, on_features: bool) -> tuple[str, str]:
        if isinstance(self.augment, str):
            check_choice("augment", self.augment, (AUTO, *config_lib.AUGMENT_PRESETS))
            if on_features:
                return config_lib.FEATURES_AUGMENT
            fitting = "grey" if self.__dict__.get("image_shape_", (0, 0, 3))[2] == 1 else "photos"
            return config_lib.AUGMENT_PRESETS[fitting if self.augment == AUTO else self.augment]
        pair = tuple(self.augment) if isinstance(self.augment, tuple | list) else ()
        if len(pair) != 2 or not all(isinstance(policy, str) for policy in pair):
            raise UserError(
                f"augment: got {self.augment!r}, expected one of {', '.join(config_lib.AUGMENT_PRESETS)}, or a pair of "
                f"policies (standard, strong) such as {config_lib.AUGMENT_PRESETS['grey']}"
            )
        return pair

    @contextlib.contextmanager
    def _folder(self) -> Iterator[pathlib.Path]:
        if self.workdir is not None:
            yield pathlib.Path(self.workdir).expanduser().resolve()
            return
        with tempfile.TemporaryDirectory(prefix="ieg_jax_", ignore_cleanup_errors=True) as folder:
            yield pathlib.Path(folder)


def _on_host(trained: inference.Trained) -> inference.Trained:
    params, batch_stats, memory = jax.device_get(trained.arrays)
    return dataclasses.replace(trained, params=params, batch_stats=batch_stats, memory=memory)


def _save(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Writes the data into the work folder, or sees that those of a run that has begun there are the same."""
    file = folder / DATA_FILE
    if (folder / "config.json").exists():
        if not file.exists():
            raise UserError(f"workdir={folder} holds a run that was not begun by IEGClassifier; name another folder")
        with np.load(file, allow_pickle=False) as old:
            same = set(old) == set(arrays) and all(np.array_equal(old[name], arrays[name]) for name in arrays)
        if not same:
            raise UserError(
                f"workdir={folder} holds a run with other data; name another folder, or fit with the data that it has"
            )
        return file
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    return file
