"""RoG: linear discriminant analysis as a limit, the minimum covariance determinant, and what predicts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import variables
from sklearn.covariance import MinCovDet
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from small_step import CLASSES, make, make_batch

from ieg_jax import inference
from ieg_jax.data.load import load_data
from ieg_jax.methods import rog
from ieg_jax.methods.parts import losses
from ieg_jax.train.loop import train_and_evaluate


def clusters(rng, counts, spread=1.0):
    """Features `[N, 3]` of correlated normal distributions, and labels."""
    mixing = rng.normal(size=(3, 3))
    labels = np.repeat(np.arange(len(counts)), counts)
    return rng.normal(size=(len(labels), 3)) @ mixing + 4 * spread * rng.normal(size=(len(counts), 3))[labels], labels


def test_with_all_examples_it_is_linear_discriminant_analysis():
    features, labels = clusters(np.random.default_rng(0), (30, 50, 20))
    kernel, bias = rog.discriminant(*rog.gaussians(features, labels, 3, support=1.0, steps=1, seed=0))
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels)  # with the classes' shares as priors
    np.testing.assert_allclose(kernel, lda.coef_, rtol=1e-8)
    np.testing.assert_allclose(bias, lda.intercept_ - np.log([0.3, 0.5, 0.2]), rtol=1e-8)


def test_means_and_covariance_by_hand():
    features = np.array([[0.0], [2.0], [100.0], [10.0], [14.0]])
    means, covariance = rog.gaussians(features, np.array([0, 0, 0, 2, 2]), 3, support=0.7, steps=5, seed=0)
    assert means[0, 0] == 1.0, "two of three, without the one that is far"
    assert np.isnan(means[1, 0]) and means[2, 0] in (10.0, 14.0), "one of two"
    assert covariance == pytest.approx(3 / 5 * 1.0 + 2 / 5 * 0.0)
    kernel, bias = rog.discriminant(means, covariance)
    np.testing.assert_allclose(kernel[:, 0], [1 / 0.6, 0, means[2, 0] / 0.6])
    np.testing.assert_allclose(bias, [-0.5 / 0.6, losses.NEVER, -0.5 * means[2, 0] ** 2 / 0.6])


def test_of_one_class_it_is_the_minimum_covariance_determinant():
    """With a tenth far away, against scikit-learn's FastMCD of the same support, without its correction of scale."""
    features, _ = clusters(rng := np.random.default_rng(1), (200,))
    features[:20] += 5 * rng.normal(size=3)
    means, covariance = rog.gaussians(features, np.zeros(200, int), 1, support=0.7, steps=50, seed=3)
    exact = MinCovDet(support_fraction=0.7, random_state=0).fit(features)
    np.testing.assert_allclose(means[0], exact.raw_location_, rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(features[exact.raw_support_].T, bias=True), rtol=1e-9)
    inliers = features[20:].mean(0)
    assert np.abs(means[0] - inliers).max() < 0.2 * np.abs(features.mean(0) - inliers).max()


def test_wrong_labels_do_not_move_the_means():
    """Of 30 % of wrong labels in each class most are left out; the plain means are drawn to the other classes."""
    rng = np.random.default_rng(2)
    features, labels = clusters(rng, (300, 300, 300), spread=3)
    true = np.stack([features[labels == c].mean(0) for c in range(3)])
    given = np.where(rng.random(900) < 0.3, rng.integers(0, 3, 900), labels)
    off = [
        np.abs(rog.gaussians(features, given, 3, support, steps=3, seed=0)[0] - true).max() for support in (0.7, 1.0)
    ]
    assert off[0] < 0.3 < 1 < off[1]


def test_features_that_outnumber_the_examples_of_a_class():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 40)) + 3 * np.repeat(np.eye(3, 40) * 5, 4, 0), np.repeat(np.arange(3), 4)
    kernel, bias = rog.discriminant(*rog.gaussians(features, labels, 3, 0.7, 1, 0))
    assert np.isfinite(kernel).all() and np.isfinite(bias).all()


def test_what_predicts():
    context, method, state, _ = make("rog")
    batch, seen = make_batch(), {"params": state.params, "batch_stats": state.batch_stats}
    by_head = context.probabilities(seen, batch["image"])[0]
    np.testing.assert_allclose(method.predict(seen, state.method, batch["image"]), by_head, rtol=1e-6)
    features = np.asarray(context.features(seen, batch["image"]))
    look = types.SimpleNamespace(labels=batch["label"], seed=0, features=lambda: features)
    memory = method.fit(look)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, state.method)
    means, covariance = rog.gaussians(features[0], batch["label"], CLASSES, 0.7, 1, 0)
    centred = features[0][:, None] - means
    distance = np.einsum("nkd,de,nke->nk", centred, np.linalg.pinv(covariance, hermitian=True), centred)
    expected = jax.nn.softmax(-0.5 * distance)
    np.testing.assert_allclose(method.predict(seen, memory, batch["image"]), expected, atol=1e-3)


def test_a_run_reports_what_its_checkpoint_predicts(tiny_config, tmp_path):
    """The classifier in the checkpoint is that of the averaged weights there, and the head has no part in it."""
    tiny_config.method.name, tiny_config.data.train_size = "rog", 200
    result = train_and_evaluate(tiny_config, str(tmp_path))
    trained = inference.load(tmp_path)
    evaluation, data = load_data(tiny_config).evaluation, load_data(tiny_config)
    found = inference.predict(trained, evaluation)
    assert np.mean(found.argmax(-1) == evaluation.labels) == pytest.approx(result["test_accuracy"])

    def features(images):
        return np.asarray(
            rog.Context.features(
                types.SimpleNamespace(networks=1, network=trained.network),
                {"params": trained.params, "batch_stats": trained.batch_stats},
                jnp.asarray(images / np.float32(127.5) - 1),
            )
        )[0]

    kernel, bias = rog.discriminant(
        *rog.gaussians(features(data.train.images), data.train.labels, 10, 0.7, 1, tiny_config.seed)
    )
    memory = variables(tmp_path, 4)
    np.testing.assert_allclose(memory["[0]['method']['kernel']"], kernel, rtol=2e-2, atol=2e-2)
    expected = jax.nn.softmax(features(evaluation.images) @ kernel.T + bias)
    np.testing.assert_allclose(found, expected, atol=2e-2)
