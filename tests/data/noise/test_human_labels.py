import hashlib
import pickle

import archives
import numpy as np
import pytest

from ieg_jax.data.noise import human_labels
from ieg_jax.errors import UserError

N = 2000


def clean_labels(classes):
    return np.random.default_rng(0).integers(0, classes, N).astype(np.int32)


@pytest.fixture(scope="module")
def cifar10n(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar10n") / "CIFAR-10_human.pt"
    return str(path), archives.human_labels(path, "cifar10", clean_labels(10))


@pytest.fixture(scope="module")
def cifar100n(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar100n") / "CIFAR-100_human.pt"
    return str(path), archives.human_labels(path, "cifar100", clean_labels(100))


@pytest.mark.parametrize(
    "label_set, key",
    [
        ("aggre", "aggre_label"),
        ("random1", "random_label1"),
        ("random2", "random_label2"),
        ("random3", "random_label3"),
        ("worse", "worse_label"),
    ],
)
def test_cifar10n(cifar10n, label_set, key):
    path, content = cifar10n
    labels = human_labels.load(path, label_set, clean_labels(10))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, content[key])
    assert (labels != clean_labels(10)).any()


def test_cifar100n(cifar100n):
    path, content = cifar100n
    np.testing.assert_array_equal(human_labels.load(path, "noisy", clean_labels(100)), content["noisy_label"])


def test_describe(cifar100n, monkeypatch):
    path, _ = cifar100n
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    want = {
        "sha256": digest,
        "published": None,
        "shapes": {key: [N] for key in ("clean_label", "noisy_label", "noisy_coarse_label", "clean_coarse_label")},
    }
    assert human_labels.describe(path) == want
    monkeypatch.setitem(human_labels.PUBLISHED, digest, "CIFAR-100_human.pt")
    assert human_labels.describe(path) == want | {"published": "CIFAR-100_human.pt"}


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # the example of FIPS 180-2
    assert human_labels.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_labels_of_other_images(cifar10n, cifar100n):
    path, _ = cifar10n
    true = clean_labels(10)
    other = true.copy()
    other[[40, 700]] = (other[[40, 700]] + 1) % 10
    got, expected = true[40], other[40]
    with pytest.raises(
        UserError, match=rf"labels of 2 of {N} images, first at 40: {got}, expected {expected}; .*order"
    ):
        human_labels.load(path, "worse", other)
    with pytest.raises(UserError, match="first at 0: .* images in another order"):
        human_labels.load(path, "worse", np.roll(true, 1) if true[0] != true[-1] else np.roll(true, 2))
    with pytest.raises(UserError, match=rf"clean_label: shape \({N},\), expected \({N - 1},\)"):
        human_labels.load(path, "worse", true[:-1])
    with pytest.raises(UserError, match="of another data set"):
        human_labels.load(cifar100n[0], "noisy", true)


def test_label_sets_that_are_not_there(cifar10n, cifar100n):
    with pytest.raises(UserError, match=r"'worst', expected one of aggre, random1, .* Did you mean 'worse'"):
        human_labels.load(cifar10n[0], "worst", clean_labels(10))
    with pytest.raises(UserError, match=r"noise.label_set='noisy': .* has aggre, random1, random2, random3, worse of"):
        human_labels.load(cifar10n[0], "noisy", clean_labels(10))
    with pytest.raises(UserError, match=r"noise.label_set='worse': .* has noisy of"):
        human_labels.load(cifar100n[0], "worse", clean_labels(100))
    with pytest.raises(UserError, match=r"needs noise.file"):
        human_labels.load("", "worse", clean_labels(10))


CLEAN = np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    "content, message",
    [
        ({"noisy_label": CLEAN}, "clean_label is no array"),
        ({"clean_label": CLEAN, "noisy_label": [0, 1, 2, 1]}, "noisy_label is no array"),
        ({"clean_label": CLEAN, "noisy_label": CLEAN[:3]}, r"noisy_label: shape \(3,\), expected \(4,\)"),
        ({"clean_label": CLEAN, "noisy_label": CLEAN + 1}, "noisy_label: 3 at place 2, expected 0 to 2"),
        ({"clean_label": CLEAN, "noisy_label": CLEAN - 1}, "noisy_label: -1 at place 0"),
        ({"clean_label": CLEAN, "noisy_label": CLEAN * 1.0}, "noisy_label: dtype float64, expected integers"),
        ({"clean_label": CLEAN[:, None], "noisy_label": CLEAN}, r"clean_label: shape \(4, 1\)"),
        ({"state_dict": {}}, "has none of the known sets"),
        ({"noisy_label": print}, "names .*print"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "labels.pt"
    path.write_bytes(archives.torch_zip(pickle.dumps(content, 2)))
    with pytest.raises(UserError, match=message):
        human_labels.load(str(path), "noisy", CLEAN)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.pt: cannot be read .*FileNotFoundError"):
        human_labels.load(str(tmp_path / "nowhere.pt"), "noisy", CLEAN)
    with pytest.raises(UserError, match=r"nowhere.pt: cannot be read"):
        human_labels.describe(str(tmp_path / "nowhere.pt"))
