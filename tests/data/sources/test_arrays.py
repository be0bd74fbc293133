"""Ready-made features: reading them, the network for them, and a problem whose best accuracy is known."""

import jax
import numpy as np
import pytest

from configs import features as features_config
from ieg_jax import inference, models
from ieg_jax.data import augment
from ieg_jax.data.batches import _Reader
from ieg_jax.data.sources import arrays as arrays_lib
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources.arrays import feature_statistics, read_features, standardised
from ieg_jax.errors import UserError
from ieg_jax.train.loop import train_and_evaluate

K, D, SPREAD = 4, 16, 3.5


def blobs(file, n=2000, noise=0.4, seed=0):
    """Gaussian classes about means of length 3.5, 40 % of the labels drawn anew, ten trusted examples of each class.

    Each of the 16 numbers has a unit and an origin of its own. Returns the share of the test set that the nearest
    mean, the best there is, classifies rightly.
    """
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, D))
    means *= SPREAD / np.linalg.norm(means, axis=1, keepdims=True)
    unit, origin = np.exp(rng.normal(size=D)), 10 * rng.normal(size=D)

    def draw(labels):
        return labels, means[labels] + rng.normal(size=(len(labels), D))

    def stored(x):
        return (x * unit + origin).astype(np.float32)

    (y, x), (y_test, x_test) = draw(rng.integers(0, K, n)), draw(rng.integers(0, K, 1000))
    y_trusted, x_trusted = draw(np.repeat(np.arange(K), 10))
    np.savez(
        file,
        features=stored(x),
        labels=np.where(rng.random(n) < noise, rng.integers(0, K, n), y),
        clean_labels=y,
        test_features=stored(x_test),
        test_labels=y_test,
        trusted_features=stored(x_trusted),
        trusted_labels=y_trusted,
    )
    return (np.square(x_test[:, None] - means).sum(-1).argmin(1) == y_test).mean()


def small(file, method="ieg", steps=200):
    config = features_config.get_config(f"method={method}")
    config.data.train, config.batch_size, config.mesh.data = str(file), 128, 1
    config.num_train_epochs, config.num_train_steps = 0.0, steps
    config.eval_every_epochs, config.eval_every_steps = 0.0, steps
    config.checkpoint_every_epochs, config.checkpoint_every_steps = 0.0, steps
    return config


@pytest.mark.slow
def test_near_the_best_accuracy_with_two_labels_in_five_drawn_at_random(tmp_path):
    best = blobs(tmp_path / "own.npz")
    results = {}
    for method in ("ieg", "supervised"):
        results[method] = train_and_evaluate(small(tmp_path / "own.npz", method), str(tmp_path / method))
    ieg, supervised = (results[method]["test_accuracy"] for method in ("ieg", "supervised"))
    print(f"best {best:.3f}, ieg {ieg:.3f}, supervised {supervised:.3f}, AUROC {results['ieg']['weight_auroc']:.3f}")
    assert best > 0.97
    assert ieg > best - 0.03 and ieg > supervised + 0.04
    assert results["ieg"]["weight_auroc"] > 0.7

    # The same numbers read again for prediction, from a file that has others besides.
    with np.load(tmp_path / "own.npz") as own:
        values, labels = own["test_features"], own["test_labels"]
    np.savez(tmp_path / "new.npz", features=np.concatenate([values, 100 + values]))
    trained = inference.load(tmp_path / "ieg")
    split = read_features(trained.config.data, str(tmp_path / "new.npz"))
    assert set(split.labels) == {-1}
    predicted = inference.predict(trained, split)[: len(values)].argmax(1)
    assert (predicted == labels).mean() == pytest.approx(ieg)


def save(tmp_path, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    data = features_config.get_config().data
    data.train = str(path)
    return data


FEATURES = np.array([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0]], np.float16)


def test_features_are_standardised_by_the_training_set(tmp_path):
    data = save(
        tmp_path,
        features=FEATURES,
        labels=np.array([0, 1]),
        trusted_features=np.array([[2.0, 6.0, 10.0]]),
        trusted_labels=np.array([1]),
    )
    source = sources.load(data)
    assert source.train.images.dtype == np.float32 and source.train.images.shape == (2, 1, 1, 3)
    assert source.train.images[:, 0, 0].tolist() == [[-1, 0, -1], [1, 0, 1]]
    assert source.trusted.images[:, 0, 0].tolist() == [[0, 1, 4]], "a number that never varies is not divided"
    image = _Reader(source.trusted).image(0)
    assert image.numpy().tolist() == [[[0, 1, 4]]], "what is not in [-1, 1] passes as it is"


def test_statistics_in_parts(monkeypatch):
    monkeypatch.setattr(arrays_lib, "ROWS_AT_ONCE", 7)
    values = np.random.default_rng(0).normal(1e4, 1.0, (30, 3)).astype(np.float32)
    mean, deviation = feature_statistics(values)
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0))
    np.testing.assert_allclose(deviation, values.astype(np.float64).std(0))
    made = standardised(values, mean, deviation)[:, 0, 0]
    np.testing.assert_allclose(made.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(made.std(0), 1, atol=1e-5)


LABELS = np.array([0, 1])


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"labels": LABELS}, r"has \['labels'\], expected at least the arrays features and labels"),
        ({"features": FEATURES[:0], "labels": LABELS[:0]}, r"shape \(0, 3\), .*at least one row"),
        ({"features": FEATURES[0], "labels": LABELS}, r"shape \(3,\), dtype float16, expected floats \[n, D\]"),
        ({"features": FEATURES.astype(int), "labels": LABELS}, "dtype int64, expected floats"),
        ({"features": FEATURES * [[1.0], [np.nan]], "labels": LABELS}, "row 1 has numbers that are nan or infinite; 1"),
        ({"features": FEATURES, "labels": np.arange(3)}, r"their labels: shape \(3,\), expected \(2,\)"),
        ({"features": FEATURES, "labels": LABELS * 0}, "at least two classes"),
        ({"features": FEATURES, "labels": LABELS, "test_features": FEATURES}, "only one of test_features and test_lab"),
        (
            {"features": FEATURES, "labels": LABELS, "test_features": FEATURES[:, 1:], "test_labels": LABELS},
            "test_features: 2 numbers in a row, expected 3",
        ),
    ],
)
def test_bad_features(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        sources.load(save(tmp_path, **arrays))


def test_other_mistakes(tmp_path):
    data = save(tmp_path, features=FEATURES, labels=LABELS)
    np.savez(tmp_path / "new.npz", features=FEATURES[:, :2])
    with pytest.raises(UserError, match="new.npz: 2 numbers in a row, expected 3 as in"):
        read_features(data, str(tmp_path / "new.npz"))
    data.image_size = 8
    with pytest.raises(UserError, match="data.image_size=8, but features have no pixels"):
        sources.load(data)
    data.name, data.image_size = "arrays", 0
    np.savez(data.train, images=np.zeros((2, 1, 1, 3), np.uint8), labels=LABELS)
    with pytest.raises(UserError, match="images of one pixel; for features set data.name=features"):
        sources.load(data)


def test_gaussian_views():
    policy = augment.parse_policy("gaussian(0.5)", "augment.strong")
    values = np.full((1, 1, 20_000), 3.0, np.float32)
    noise = policy(values, np.array([1, 2])).numpy() - 3.0
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 0.5) < 0.02
    np.testing.assert_array_equal(policy(values, np.array([1, 2])).numpy() - 3.0, noise)
    pixels = policy(np.ones((4, 4, 3), np.float32), np.array([1, 2])).numpy()
    assert pixels.max() == 1.0 and pixels.min() < 1.0
    with pytest.raises(UserError, match="sigma is -1.0, expected at least 0"):
        augment.parse_policy("gaussian(sigma=-1)", "augment.strong")


def test_the_network_against_numpy():
    model = features_config.get_config().model
    model.width = 3 / 256
    network = models.create(model, num_classes=4)
    x = np.random.default_rng(0).normal(size=(5, 1, 1, 6)).astype(np.float32)
    variables = network.init(jax.random.key(0), x, train=False)
    h = x[:, 0, 0]
    for layer in range(2):
        h = h @ variables["params"][f"dense{layer}"]["kernel"]
        h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), 0)
    head = variables["params"]["head"]
    logits, _ = network.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, h @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)
