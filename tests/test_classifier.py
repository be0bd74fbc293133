"""The scikit-learn estimator, on scikit-learn's digits with labels that this file has made wrong."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile

import flax.linen as nn
import jax
import numpy as np
import pytest
import untrained
from runs import ROOT
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import ieg_jax
from configs import features as features_config
from configs import own_data
from ieg_jax import classifier, inference, models
from ieg_jax import config as config_lib
from ieg_jax.audit import final, measures
from ieg_jax.audit import quality as label_quality
from ieg_jax.classifier import IEGClassifier
from ieg_jax.data.splits import make_split
from ieg_jax.errors import Interrupted

NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
KEYS = {"mesh.data": 1, "eval_every_steps": 10**6}  # one device, as compiling for eight takes longer
VIEWS = ("crop(pad=1)", "affine(rotate=10,shear=0.1,zoom=0.1,translate=0.1)|intensity(0.2)|cutout(0.25)")


def quick(**arguments):
    """A classifier that trains for seconds."""
    config = KEYS | arguments.pop("config", {})
    usual = {"method": "supervised", "network": "mlp", "augment": VIEWS, "steps": 3, "verbose": 0, "batch_size": 32}
    usual["final"] = "network"
    return IEGClassifier(**usual | arguments, config=config)


@dataclasses.dataclass(frozen=True)
class Digits:
    X: np.ndarray  # [n, 8, 8] uint8
    given: np.ndarray  # [n] strings, two in five drawn anew
    true: np.ndarray
    X_trusted: np.ndarray
    y_trusted: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    bunch = load_digits()
    order = rng.permutation(len(bunch.target))
    images, labels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[order], bunch.target[order]
    trusted = np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), trusted)
    test, noisy = rest[:400], rest[400:]
    true = labels[noisy]
    given = np.where(rng.random(len(noisy)) < 0.4, (true + rng.integers(1, 10, len(noisy))) % 10, true)
    return Digits(
        images[noisy], NAMES[given], NAMES[true], images[trusted], NAMES[labels[trusted]], images[test],
        NAMES[labels[test]],
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    """IEG in a work folder of its own."""
    config = {"schedule.base_lr": 0.05, "method.consistency_weight": 5.0}
    folder = str(tmp_path_factory.mktemp("classifier") / "run")
    clf = quick(method="ieg", steps=100, batch_size=64, workdir=folder, config=config)
    arrays = (digits.X, digits.given, digits.X_trusted, digits.y_trusted)
    copies = [array.copy() for array in arrays]
    assert clf.fit(*arrays) is clf
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    return clf


def test_wrong_labels_are_found_and_do_not_harm(fitted, digits):
    wrong = digits.given != digits.true
    accuracy, auroc = fitted.score(digits.X_test, digits.y_test), roc_auc_score(wrong, -fitted.label_quality_)
    print(f"accuracy {accuracy:.3f}, AUROC {auroc:.3f}, rate {fitted.noise_rate_:.3f}, in truth {wrong.mean():.3f}")
    assert (fitted.classes_ == np.sort(NAMES)).all()
    assert accuracy == (fitted.predict(digits.X_test) == digits.y_test).mean() > 0.8, "0.1 is chance"
    # Whoever takes a label for wrong where a classifier of accuracy a predicts another class agrees with right labels
    # with the probability a and with wrong ones, one of nine, with (1 − a) / 9: AUROC (1 + a − (1 − a) / 9) / 2.
    assert auroc > (1 + 0.8 - 0.2 / 9) / 2
    assert fitted.noise_rate_ == pytest.approx(wrong.mean(), abs=0.1)
    low, high = fitted.noise_interval_
    assert 0 <= low < fitted.noise_rate_ < high < 1
    found = fitted.label_quality_ < 0.5
    assert (fitted.suggested_labels_[found & wrong] == digits.true[found & wrong]).mean() > 0.7, "1/9 is chance"
    np.testing.assert_allclose(fitted.transition_matrix_.sum(1), 1)


def test_suspects(fitted, digits):
    found = fitted.suspects()
    assert (found["right"] == np.sort(fitted.label_quality_[fitted.label_quality_ < 0.5])).all()
    assert (found["right"] == fitted.label_quality_[found["row"]]).all()
    assert (found["given"] == digits.given[found["row"]]).all()
    assert (found["suggested"] == fitted.suggested_labels_[found["row"]]).all()
    assert (found["given"] != found["suggested"]).all()
    assert (found["right"] + found["confidence"] < 1 + 1e-6).all()
    assert (digits.given != digits.true)[found["row"]].mean() > 0.9
    assert (fitted.suspects(7) == found[:7]).all() and len(fitted.suspects(0)) == 0
    assert len(fitted.suspects(threshold=1.1)) == len(digits.given)
    with pytest.raises(ValueError, match="n: got -1"):
        fitted.suspects(-1)


def test_probabilities_are_those_of_the_work_folder_and_of_the_network_by_hand(fitted, digits):
    probabilities = fitted.predict_proba(digits.X_test)
    assert (probabilities.shape, probabilities.dtype) == ((400, 10), np.float32)
    trained = inference.load(fitted.workdir)
    split = make_split(digits.X_test[..., None], np.zeros(400))
    np.testing.assert_allclose(probabilities, inference.predict(trained, split), atol=1e-6)

    network = models.create(fitted.config_.model, 10)
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    logits = network.apply(variables, digits.X_test[..., None] / np.float32(127.5) - 1, train=False)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(digits.X_test[:3] / 255), probabilities[:3], atol=1e-5)


def test_label_quality_is_calibrated_on_the_trusted_examples_that_were_held_out(fitted, digits):
    assert fitted.quality_.num_held_out == 20, "0.2 of 10 of each class"
    folder = pathlib.Path(fitted.workdir)
    out = json.loads((folder / "trusted.json").read_text())["held_out_ids"]
    number = {name: place for place, name in enumerate(fitted.classes_)}
    labels, held_out = (np.array([number[name] for name in y]) for y in (digits.given, digits.y_trusted[out]))
    # The geometric mean of the networks of all checkpoints.
    networks = inference.over_training(folder, inference.load(folder))
    assert len(networks) == 10
    on_all, on_held_out = (
        measures.pooled(
            [inference.predict(network, make_split(X[..., None], np.zeros(len(X)))) for network in networks]
        )
        for X in (digits.X, digits.X_trusted[out])
    )
    expected = label_quality.estimate(on_all, labels, on_held_out, held_out)
    np.testing.assert_allclose(fitted.label_quality_, expected.right, atol=1e-4)
    assert fitted.noise_rate_ == pytest.approx(expected.noise_rate, abs=1e-4)
    assert fitted.quality_.temperature == expected.temperature


def test_what_else_is_kept(fitted):
    folder = pathlib.Path(fitted.workdir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert fitted.history_ == rows and rows[-1]["step"] == 100
    assert fitted.result_ == json.loads((folder / "result.json").read_text())
    assert fitted.config_.to_dict() == json.loads((folder / "config.json").read_text())
    assert fitted.config_.method.consistency_weight == 5.0 and fitted.config_.num_train_steps == 100
    assert fitted.image_shape_ == (8, 8, 1) and not hasattr(fitted, "n_features_in_")


def test_pickled_by_an_older_version():
    """When the modules had other names, and a trained network did not know the shape of its images."""
    with (ROOT / "tests" / "fixtures" / "classifier_before_the_move.pkl").open("rb") as file:
        saved = pickle.load(file)
    clf = saved["classifier"]
    np.testing.assert_allclose(clf.predict_proba(saved["X"]), saved["probabilities"], atol=1e-6)
    assert clf.classes_.tolist() == ["a", "b", "c"] and len(clf.suspects(3)) <= 3
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(saved["X"]), clf.predict_proba(saved["X"]))


def test_pickled_without_the_work_folder(fitted, digits, monkeypatch):
    content = pickle.dumps(fitted)
    monkeypatch.setattr(inference, "load", None)
    copy = pickle.loads(content)
    np.testing.assert_array_equal(copy.predict_proba(digits.X_test), fitted.predict_proba(digits.X_test))
    np.testing.assert_array_equal(copy.suspects(), fitted.suspects())
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(copy._trained.params))


def test_a_finished_work_folder_is_read_and_never_overwritten(fitted, digits, tmp_path):
    again = clone(fitted)
    again.fit(digits.X, digits.given, digits.X_trusted, digits.y_trusted)
    assert again.result_ == fitted.result_, "the seconds too: nothing was trained"
    np.testing.assert_array_equal(again.label_quality_, fitted.label_quality_)
    with pytest.raises(ValueError, match="holds a run with other data"):
        again.fit(digits.X, digits.true, digits.X_trusted, digits.y_trusted)
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*method.name: 'ieg' -> 'eg'"):
        again.set_params(method="eg").fit(digits.X, digits.given, digits.X_trusted, digits.y_trusted)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not begun by IEGClassifier"):
        again.set_params(workdir=str(tmp_path)).fit(digits.X, digits.given, digits.X_trusted, digits.y_trusted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


# ---- Features, and trusted rows.


@pytest.fixture(scope="module")
def blobs():
    """X [600, 6] with units of their own, given labels 5, 7 and 20 of which a third is drawn anew, true labels."""
    X, true = make_blobs(600, 6, centers=3, cluster_std=2.0, random_state=0)
    rng = np.random.default_rng(0)
    given = np.where(rng.random(600) < 0.33, rng.integers(0, 3, 600), true)
    labels = np.array([5, 7, 20])
    return X * 10.0 ** np.arange(-3, 3), labels[given], labels[true]


def test_features_with_trusted_rows_among_them(blobs, capsys, tmp_path, monkeypatch):
    X, given, true = blobs
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mask = np.zeros(600, bool)
    for label in (5, 7, 20):
        mask[np.flatnonzero(true == label)[:10]] = True
    y = np.where(mask, true, given)
    clf = quick(method="ieg", network=None, augment="photos", steps=60).fit(X, y, trusted=mask)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("ieg_jax_*")), "the temporary folder is gone"
    assert (clf.config_.data.name, clf.config_.model.name, clf.n_features_in_) == ("features", "mlp", 6)
    assert (clf.config_.augment.standard, clf.config_.augment.strong) == ("gaussian(0.1)", "gaussian(0.3)")
    assert (clf.score(X, true), set(clf.classes_)) == (pytest.approx(1, abs=0.03), {5, 7, 20})
    assert (clf.label_quality_[mask] == 1).all() and not np.isin(np.flatnonzero(mask), clf.suspects()["row"]).any()
    assert (clf.suggested_labels_[mask] == true[mask]).all()
    assert clf.quality_.right.shape == (570,) and clf.quality_.num_held_out == 6
    np.testing.assert_array_equal(clf.label_quality_[~mask], clf.quality_.right)
    wrong = (y != true)[~mask]
    assert roc_auc_score(wrong, -clf.quality_.right) > 0.95, "the blobs hardly overlap"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clf)).predict_proba(X), clf.predict_proba(X))
    few = clf.predict_proba(X[:3])
    np.testing.assert_allclose(few, clf.predict_proba(X)[:3], atol=1e-5, err_msg="whatever is predicted with them")


@pytest.mark.slow
def test_one_seed_one_result_and_row_numbers_are_a_mask(blobs, capsys, tmp_path):
    X, _, true = blobs
    rows = np.array([np.flatnonzero(true == label)[0] for label in (20, 5, 7)])
    mask = np.isin(np.arange(600), rows)
    arguments = {"random_state": 3, "workdir": str(tmp_path), "config": {"checkpoint_every_steps": 2}}
    first = quick(**arguments).fit(X, true, trusted=rows)
    second = quick(random_state=3, config=arguments["config"]).fit(X, true, trusted=mask)
    third = quick(random_state=4).fit(X, true, trusted=rows)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    np.testing.assert_array_equal(first.label_quality_, second.label_quality_)
    assert np.abs(first.predict_proba(X) - third.predict_proba(X)).max() > 1e-3
    assert (first.config_.seed, third.config_.seed) == (3, 4)
    assert isinstance(quick(random_state=np.random.RandomState(0))._configure("features", 2, 0.0).seed, int)

    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    resumed = quick(**arguments, verbose=1).fit(X, true, trusted=rows)
    assert "goes on from the checkpoint at step 2" in capsys.readouterr().out
    np.testing.assert_array_equal(first.predict_proba(X), resumed.predict_proba(X))


def test_ctrl_c(blobs, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped at step 2 of 3")

    monkeypatch.setattr(classifier, "train_and_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2 of 3"):
        quick().fit(*blobs[:2])


@pytest.mark.slow
def test_in_pipelines_and_searches(blobs):
    X, given, true = blobs
    mask = np.zeros(600, bool)
    for label in (5, 7, 20):
        mask[np.flatnonzero(true == label)[::10]] = True
    y = np.where(mask, true, given)
    pipe = make_pipeline(StandardScaler(), quick(steps=30))
    scores = cross_val_score(pipe, X, y, cv=2, params={"iegclassifier__trusted": mask}, error_score="raise")
    assert scores.shape == (2,) and (scores > 0.6).all(), "a third of the labels that it is scored on is wrong"
    folds, params = ieg_jax.TrustedSplit(mask, n_splits=2), {"iegclassifier__trusted": mask}
    by_checked = cross_val_score(pipe, X, y, cv=folds, params=params, error_score="raise")
    assert by_checked.shape == (2,) and (by_checked > 0.6).all()
    search = GridSearchCV(quick(), {"method": ["ieg", "l2r"], "config": [{"schedule.base_lr": 0.1}]})
    assert clone(search).estimator.get_params() == quick().get_params()


# ---- Any network.


class Depthwise(nn.Module):
    """Its kernels do not tell how many colours an image has, and nothing in it is called head."""

    num_classes: int
    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), feature_group_count=3, name="each_colour")(x)
        x = nn.Conv(self.features, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Plain(nn.Module):
    """No batch norm."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x.reshape(len(x), -1))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.Dropout(0.5)(x.reshape(len(x), -1), deterministic=not train))


@pytest.fixture
def colours():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8), np.arange(40) % 3


def test_a_network_of_ones_own(colours, tmp_path):
    X, y = colours
    network = Depthwise(3)
    clf = quick(network=network, workdir=str(tmp_path), batch_size=8).fit(X, y, X[:9], y[:9])
    saved = inference.load(tmp_path, network=network)
    assert set(saved.params) == {"each_colour", "Conv_0", "BatchNorm_0", "Dense_0"}
    assert saved.image_shape == (8, 8, 3)
    variables = {"params": saved.params, "batch_stats": saved.batch_stats}
    logits = network.apply(variables, X / np.float32(127.5) - 1, train=False)
    np.testing.assert_allclose(clf.predict_proba(X), jax.nn.softmax(logits), atol=1e-5)
    initial = network.init(jax.random.key(0), X[:1] / np.float32(255), train=True)["batch_stats"]["BatchNorm_0"]["var"]
    assert np.abs(saved.batch_stats["BatchNorm_0"]["var"] - initial).min() > 1e-3, "its moving averages have moved"
    assert clf.result_["model"] == "Depthwise"
    assert isinstance(clone(clf).network, Depthwise)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clf)).predict_proba(X), clf.predict_proba(X))

    with pytest.raises(ValueError, match=r"was trained with the network Depthwise, and here it is that of the conf"):
        inference.load(tmp_path)
    with pytest.raises(ValueError, match=r"BatchNorm_0/bias is \(4,\) in the checkpoint and \(5,\) in Depthwise"):
        inference.load(tmp_path, network=Depthwise(3, 5))
    with pytest.raises(ValueError, match="was trained with the network Depthwise, and here it is Plain"):
        clone(clf).set_params(network=Plain()).fit(X, y, X[:9], y[:9])
    with pytest.raises(ValueError, match="keep the work folder"):
        inference.export(saved, tmp_path / "exported")
    served = tmp_path / "served"
    inference.export_stablehlo(saved, served)
    np.testing.assert_allclose(inference.load_stablehlo(served)(X), clf.predict_proba(X), atol=1e-5)


def test_a_network_without_batch_norm(colours):
    X, y = colours
    assert quick(method="l2r", network=Plain(), batch_size=8).fit(X, y, X[:9], y[:9]).predict(X).shape == (40,)


@pytest.mark.parametrize(
    "network, config, message",
    [
        (Depthwise(4), {}, r"network Depthwise makes \(2, 4\) of images \(2, 8, 8, 3\), expected logits \(2, 3\)"),
        (Dropped(), {}, "network Dropped cannot be applied to images .* without random numbers"),
        (Depthwise(3), {"batch_groups": 2}, "batch_groups: Depthwise would see 2 groups of the batch.* is 1"),
        (Plain, {}, "network: got .*Plain"),
        ("wide_resnett", {}, "network: got 'wide_resnett', expected one of .* Did you mean 'wide_resnet'"),
    ],
)
def test_networks_that_do_not_fit(network, config, message, colours):
    X, y = colours
    with pytest.raises(ValueError, match=message):
        quick(network=network, config=config).fit(X, y, X[:9], y[:9])


# ---- Bad input.

IMAGES, LABELS = np.zeros((12, 4, 4), np.uint8), np.arange(12) % 3
NAN = np.full((12, 4, 4), np.nan)


@pytest.mark.parametrize(
    "arguments, data, message",
    [
        ({}, (IMAGES, LABELS), "fit needs X_trusted and y_trusted.*trusted=rows of X; .*supervised do without"),
        ({}, (IMAGES, LABELS, IMAGES), "fit needs y_trusted"),
        ({}, (IMAGES, LABELS, np.zeros((3, 4, 5), np.uint8), [0, 1, 2]), r"\(4, 5, 1\), expected \(4, 4, 1\)"),
        ({}, (IMAGES, LABELS, np.zeros((3, 16)), [0, 1, 2]), r"X_trusted: shape \(3, 16\), expected \[M, H, W\]"),
        ({}, (np.zeros((12, 5)), LABELS, IMAGES, LABELS), r"X_trusted: shape \(12, 4, 4\), expected \[M, 5\]"),
        ({}, (np.zeros((12, 5)), LABELS, np.zeros((12, 6)), LABELS), "6 features, but IEGClassifier is expecting 5"),
        ({}, (IMAGES, LABELS, IMAGES[:2], [0, 2]), "no trusted example of 1, expected at least one of each of the 3"),
        ({}, (IMAGES, LABELS, IMAGES[:3], [0, 1, 9]), "y_trusted: label .*9.* is none of y, whose classes are 0, 1, 2"),
        ({}, (IMAGES, LABELS.astype(str), IMAGES, LABELS), "y_trusted: label .* is none of y, whose classes are '0'"),
        ({}, (IMAGES, LABELS, IMAGES, LABELS[:5]), "X_trusted has 12 examples and y_trusted 5 labels"),
        ({}, (IMAGES, LABELS[:5], IMAGES, LABELS), "X has 12 images and y 5 labels"),
        ({}, (IMAGES, np.zeros(12), IMAGES, LABELS), "y has 1 class"),
        ({}, (IMAGES, LABELS + 0.5, IMAGES, LABELS), "Unknown label type"),
        ({}, (NAN, LABELS, IMAGES, LABELS), "X: image 0 has pixels that are nan"),
        ({}, (IMAGES, LABELS, NAN, LABELS), "X_trusted: image 0 has pixels that are nan"),
        ({}, (IMAGES + 16.0, LABELS, IMAGES, LABELS), r"X: floats from 16 to 16, expected \[0, 1\]"),
        ({}, (IMAGES.astype(int) - 1, LABELS, IMAGES, LABELS), "X: integers from -1 to -1, expected 0 to 255"),
        ({}, (np.zeros((12, 4, 4, 2)), LABELS, IMAGES, LABELS), "expected .* C = 1 or 3"),
        ({}, (np.zeros(12), LABELS), "Expected 2D array, got 1D"),
        ({}, (IMAGES, LABELS, IMAGES, LABELS, [0]), "trusted and X_trusted, y_trusted are both given"),
        ({}, (IMAGES, LABELS, None, None, [12]), "trusted: shape .*row numbers from 0 to 11"),
        ({}, (IMAGES, LABELS, None, None, np.ones(12, bool)), "all rows of X are trusted"),
        ({}, (IMAGES, LABELS, None, None, [0, 1]), "no trusted example of 2"),
        ({"method": "IEG"}, (IMAGES, LABELS), "method: got 'IEG', expected one of co_teaching, dividemix, eg"),
        ({"augment": "photo"}, (), "augment: got 'photo', expected one of auto, photos, grey.*Did you mean 'photos'"),
        ({"augment": ("crop(pad=1)",)}, (), "augment: got .*a pair of policies"),
        ({"augment": ("crop(pad=1)", "blurr(1)")}, (), "augment.strong"),
        ({"epochs": 1.0}, (), "epochs=1.0 and steps=3, expected one of them"),
        ({"steps": 0}, (), "steps: got 0, expected None or more than 0"),
        ({"steps": 1.5}, (), "steps: got 1.5, expected a whole number"),
        ({"holdout": 1.0}, (), r"trusted.holdout: got 1.0, expected in \[0, 1\)"),
        ({"batch_size": "big"}, (), "batch_size: got 'big', expected a whole number"),
        ({"config": {"schedule.base_rl": 0.1}}, (), "config: got 'schedule.base_rl'.*Did you mean 'schedule.base_lr'"),
        ({"config": {"schedule.base_lr": "fast"}}, (), "config: schedule.base_lr='fast', expected float"),
        ({"config": {"noise.rate": 0.1}}, (), "config: 'noise.rate' follows from the arguments"),
        ({"class_weight": {0: 1}}, (), "class_weight: got .*, expected None or 'balanced'"),
        ({"config": {"class_weight": "balanced"}}, (), "config: 'class_weight' follows from the arguments"),
        ({"image_size": 8}, (np.zeros((12, 5)), LABELS, np.zeros((12, 5)), LABELS), "image_size=8, but X are features"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_done(arguments, data, message, tmp_path):
    data = data or (IMAGES, LABELS, IMAGES, LABELS)
    clf = quick(**{"method": "ieg"} | arguments, workdir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        clf.fit(*data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(NotFittedError):
        clf.predict(IMAGES)


def test_bad_input_to_predict(fitted):
    for bad in (IMAGES, np.zeros((2, 64)), np.zeros((2, 8, 8, 3))):
        with pytest.raises(ValueError, match=r"X: shape .*, expected images \[n, 8, 8, 1\] as in fit"):
            fitted.predict(bad)


# ---- What comes from elsewhere.


def test_defaults_for_features_are_those_of_their_configuration():
    features = features_config.get_config()
    # Without arguments: configs/own_data.py, and configs/features.py with the batch size of the argument.
    for what, theirs in (("images", own_data.get_config("backbone=none")), ("features", features)):
        ours = IEGClassifier(workdir="run")._configure(what, 10, 0.2)
        theirs.data.name, theirs.data.num_classes = ours.data.name, 10
        if what == "images":
            theirs.batch_size = classifier.BATCH
        assert ours.to_dict() == theirs.to_dict()


def test_the_size_and_the_network_follow_from_the_images():
    config = IEGClassifier()._configure("images", 10, 0.0)
    assert (config.data.image_size, config.model.depth, config.num_train_epochs) == (-1, -1, -1)
    assert IEGClassifier(image_size=0)._configure("images", 10, 0.0).data.image_size == 0
    X = np.random.default_rng(0).integers(0, 256, (12, 10, 14)).astype(np.uint8)
    clf = quick(batch_size=4).fit(X, LABELS, X[:3], LABELS[:3])
    assert (clf.config_.data.image_size, clf.image_shape_) == (8, (10, 14, 1))
    assert clf.predict_proba(X).shape == (12, 3)


@pytest.mark.slow
def test_the_final_classifier_of_features(digits, capsys):
    """Chosen among plain ones, better than the network; it predicts, also when it was pickled, and audits."""
    flat = {name: getattr(digits, name).reshape(-1, 64).astype(float) for name in ("X", "X_trusted", "X_test")}
    clf = quick(method="ieg", final="auto", steps=60, batch_size=256, verbose=1, config={"schedule.base_lr": 0.1})
    clf.fit(flat["X"], digits.given, flat["X_trusted"], digits.y_trusted)
    assert clf.final_ in final.CLASSIFIERS and len(clf.comparison_) == 8
    assert "on held-out trusted examples" in capsys.readouterr().out
    assert clf.score(flat["X_test"], digits.y_test) > 0.9
    wrong = digits.given != digits.true
    by_both = [roc_auc_score(wrong, -right) for right in (clf.network_quality_.right, clf.label_quality_)]
    assert by_both[1] > max(0.98, by_both[0])
    again = pickle.loads(pickle.dumps(clf))
    probabilities = clf.predict_proba(flat["X_test"])
    assert probabilities.shape == (400, 10) and probabilities.dtype == np.float32
    np.testing.assert_array_equal(again.predict_proba(flat["X_test"]), probabilities)
    assert clf.quality_.num_pairs == 0
    forest = clone(clf).set_params(final="forest", method="supervised", verbose=0, steps=3)
    forest.fit(flat["X"], digits.given, flat["X_trusted"], digits.y_trusted)
    assert {one.name for one in forest.comparison_} == {"network", "forest"}
    shuffled = np.random.default_rng(0).permutation(digits.y_trusted)
    paired = clone(forest).set_params(final="network")
    arguments = (flat["X"], digits.given, flat["X_trusted"], digits.y_trusted)
    assert paired.fit(*arguments, trusted_given=shuffled).quality_.num_pairs == 20
    for bad, message in ((shuffled[:5], "5 labels, expected 100"), (["ten"] * 100, "label 'ten'")):
        with pytest.raises(ValueError, match=f"trusted_given: {message}"):
            paired.fit(*arguments, trusted_given=bad)
    with pytest.raises(ValueError, match="final.*trees.*auto, network, logistic"):
        quick(final="trees").fit(flat["X"], digits.given)


def test_images_are_trained_on_anew_where_their_labels_are_cleaned(digits, tmp_path, monkeypatch):
    """As the supervised method on what the audit is sure of, and on the trusted examples; it predicts, also pickled."""
    clf = quick(method="l2r", final="retrained", steps=60, batch_size=64, workdir=str(tmp_path / "run"))
    data = (digits.X, digits.given, digits.X_trusted, digits.y_trusted)
    clf.fit(*data)
    labels, sure = final.cleaned(clf.quality_, np.searchsorted(clf.classes_, digits.given))
    with np.load(tmp_path / "run" / "retrained" / "dataset.npz") as arrays:
        np.testing.assert_array_equal(arrays["labels"], labels[sure])
        np.testing.assert_array_equal(arrays["images"][..., 0], digits.X[sure])
    plain = inference.load(tmp_path / "run" / "retrained")
    assert (plain.config.method.name, plain.config.trusted.join) == ("supervised", True)
    split = make_split(digits.X_test[..., None], np.zeros(400))
    np.testing.assert_array_equal(clf.predict_proba(digits.X_test), inference.predict(plain, split))
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(digits.X_test), clf.predict_proba(digits.X_test))
    assert clf.final_ == "retrained" and clf.config_.method.name == "l2r"
    assert [(one.name, one.labels) for one in clf.comparison_] == [("network", "l2r"), ("retrained", "cleaned")]

    # By itself it is final unless what was there before is clearly better. What is finished is not trained again.
    monkeypatch.setattr(final, "possible", lambda split: False)
    auto = clone(clf).set_params(final="auto").fit(*data)
    assert auto.final_ == ("network" if auto.quality_.alarms else "retrained")
    monkeypatch.setattr(final, "clearly_better", lambda *hits: True)
    assert clone(auto).fit(*data).final_ == "network"


def test_import_is_free_of_jax():
    heavy = {"jax", "tensorflow", "sklearn", "numpy"}
    code = f"import sys, ieg_jax; print({heavy} & set(sys.modules), ieg_jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", ieg_jax.__version__]
    assert ieg_jax.IEGClassifier is IEGClassifier
    with pytest.raises(AttributeError, match="no attribute 'Classifier'"):
        ieg_jax.Classifier  # noqa: B018


@pytest.mark.slow
def test_the_example_of_the_documentation():
    """Its output is what the page shows, as far as it does not depend on the machine."""
    example, _, shown = re.split(r"```(?:python|text)?\n", (ROOT / "docs" / "classifier.md").read_text())[1:4]
    found = {}
    exec(example, found)
    assert found["clf"].score(found["images"][found["test"]], found["true"][found["test"]]) > 0.9
    rate = (found["given"] != found["true"])[found["noisy"]].mean()
    assert found["clf"].noise_rate_ == pytest.approx(rate, abs=0.04)
    assert "accuracy 0.9" in shown


# ---- scikit-learn's own checks.

# Of a classifier that can be fitted with X and y alone, on features; check -> why it cannot pass. There is none.
EXPECTED_FAILURES = {
    "check_class_weight_classifiers": "weights of classes one by one; here there is None or 'balanced'",
}
# The first unless SCIPY_ARRAY_API is set, and arrays of numpy are what the classifier takes; the second without pandas.
SKIPPED = {"check_array_api_input", "check_classifier_data_not_an_array"}
WITHOUT_TRAINING = {
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_estimators_unfitted",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_complex_data",
    "check_estimators_empty_data_messages",
    "check_estimator_sparse_tag",
    "check_estimator_sparse_array",
    "check_estimator_sparse_matrix",
    "check_classifiers_one_label",
    "check_classifiers_regression_target",
    "check_supervised_y_no_nan",
    "check_parameters_default_constructible",
    "check_fit2d_1sample",
    "check_get_params_invariance",
    "check_set_params",
    "check_fit1d",
    "check_requires_y_none",
}


def test_checks_of_scikit_learn_without_training():
    done = set()
    for estimator, check in estimator_checks.estimator_checks_generator(quick(network=None)):
        name = check.func.__name__
        if name in WITHOUT_TRAINING:
            check(estimator)
            done.add(name)
    assert len(done) > 15, "the names are those of this version of scikit-learn"


@pytest.mark.slow
def test_all_checks_of_scikit_learn():
    clf = quick(network=None, augment="photos", steps=40)
    done = estimator_checks.check_estimator(clf, on_fail=None, on_skip=None, expected_failed_checks=EXPECTED_FAILURES)
    by_status = {}
    for check in done:
        by_status.setdefault(check["status"], {})[check["check_name"]] = check["exception"]
    assert not by_status.get("failed")
    assert by_status.get("skipped", {}).keys() <= SKIPPED
    assert by_status.get("xfail", {}).keys() == EXPECTED_FAILURES.keys()
    assert len(by_status["passed"]) > 40


def test_the_import_is_light():
    code = (
        "import sys; from ieg_jax import IEGClassifier; IEGClassifier(); import ieg_jax.main, ieg_jax.train.loop;"
        "sys.exit(str([name for name in ('tensorflow', 'clu', 'tensorflow_datasets', 'wandb') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_the_log_of_tensorflow_is_silent():
    # From several threads at once: each would redirect standard error, the last one for good.
    code = (
        "import concurrent.futures as cf, sys; from ieg_jax.lazy import tf;"
        "list(cf.ThreadPoolExecutor(8).map(lambda i: tf.constant(i), range(8))); print('ours', file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "ours\n")


def test_tensorflow_comes_without_keras_until_somebody_asks_for_it():
    code = (
        "import sys; from ieg_jax.lazy import tf; tf.constant(1); assert 'keras' not in sys.modules;"
        "import tensorflow; assert tensorflow.keras.layers.Dense(2)(tf.ones([1, 3])).shape == (1, 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("channels, preset", [(1, "grey"), (3, "photos")])
def test_the_augmentation_suits_the_channels(channels, preset):
    clf = IEGClassifier()
    clf.image_shape_ = (8, 8, channels)
    assert clf._policies(on_features=False) == config_lib.AUGMENT_PRESETS[preset]


def test_a_second_fit_of_the_same_shapes_compiles_nothing(digits):
    compiled = []

    def note(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    X, y = digits.X[:300], digits.given[:300]
    first, second = (quick(random_state=seed, steps=5, batch_size=28) for seed in (1, 2))
    first.fit(X, y).predict_proba(X)
    assert compiled, "the first one does"
    compiled.clear()
    second.fit(X, y)
    assert second.predict_proba(X).shape == (300, 10) and not compiled
    # It is another run: other weights, other batches.
    assert np.abs(second.predict_proba(X) - first.predict_proba(X)).max() > 1e-3
    quick(random_state=2, steps=5, batch_size=28, config={"ema.decay": 0.5}).fit(X, y)
    assert compiled, "another configuration is compiled"


def test_images_on_a_backbone(tmp_path, monkeypatch):
    """It takes images, and its network and its final classifier see features."""
    inference.export(untrained.trained((24, 24, 3), "ab", data__name="digits"), tmp_path / "weights")
    monkeypatch.setattr(classifier.backbone, "choose", lambda name: "" if name == "none" else "tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    y = np.arange(160) % 2
    X = np.clip(rng.normal(100 + 60 * y[:, None, None, None], 30, (160, 24, 24, 3)), 0, 255).astype(np.uint8)
    keys = {"backbone.pretrained": str(tmp_path / "weights" / "weights.npz"), "backbone.image_size": 24}
    keys["backbone.augment"] = "crop(pad=2)|flip"
    clf = IEGClassifier(method="supervised", steps=20, verbose=0, config=keys)
    clf.fit(X[:120], y[:120], X[120:140], y[120:140])
    assert clf.config_.model.name == "mlp" and clf.config_.backbone.views == config_lib.BACKBONE_VIEWS
    assert np.mean(clf.predict(X[140:]) == y[140:]) > 0.9
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_allclose(again.predict_proba(X[140:]), clf.predict_proba(X[140:]), atol=1e-5)
    assert clf.comparison_, "plain classifiers of the features were compared"
    assert IEGClassifier(backbone="none")._configure("images", 2, 0.0).backbone.name == ""
    assert IEGClassifier(network="tiny")._configure("images", 2, 0.0).backbone.name == ""
    small = IEGClassifier()
    small.image_shape_ = (23, 40, 3)
    assert small._configure("images", 2, 0.0).backbone.name == ""


@pytest.mark.parametrize(
    "bad, message",
    [
        (None, r"no label at place 4 \(None\)"),
        (float("nan"), r"no label at place 4 \(nan\)"),
        (7, "the label 'a' at place 0 is text and 7 at place 4 is not"),
    ],
)
def test_labels_that_are_missing_or_of_two_kinds(bad, message):
    y = np.array(["a", "b", "c"], object)[np.arange(30) % 3]
    given = y.copy()
    given[4] = bad
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        IEGClassifier(steps=2, verbose=0).fit(X, given, X[:6], y[:6])


def test_images_that_are_all_but_black_are_told():
    with pytest.warns(UserWarning, match="the pixels lie between 0 and 0.00392, in less than a tenth"):
        IEGClassifier()._examples(np.linspace(0, 1 / 255, 64).reshape(1, 8, 8), "X")
