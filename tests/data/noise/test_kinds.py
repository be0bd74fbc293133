import dataclasses
import hashlib
import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import special, stats

from configs import default
from ieg_jax.data.noise import class_flips, human_labels, instance, kinds, open_set
from ieg_jax.data.noise.files import write_labels
from ieg_jax.data.sources import cifar
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import NO_CLASS, UNKNOWN, Source, make_split
from ieg_jax.errors import UserError

N = 50_000
CIFAR100_COARSE = [  # the coarse label of each fine one, as the published training set pairs them
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
]  # fmt: skip
CIFAR100_FINE = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
]  # fmt: skip


def clean_source(n=N, classes=10, name="toy", images=None):
    labels = (np.arange(n) % classes).astype(np.int32)
    images = np.zeros((n, 1, 1, 1), np.uint8) if images is None else images
    return Source(name, classes, make_split(images, labels, labels.copy()))


def noise_config(kind, rate=0.0, **keys):
    config = default.get_config().noise
    config.kind, config.rate = kind, rate
    for key, value in keys.items():
        config[key] = value
    return config


def in_rows(source, rows):
    return dataclasses.replace(source, train=source.train.take(rows))


def wrong_by_class(split, classes):
    wrong = split.labels != split.clean_labels
    return [int(wrong[split.clean_labels == label].sum()) for label in range(classes)]


# ---- Selection and the kinds that depend on the class alone.


@pytest.mark.parametrize("kind, name, classes, share_wrong", [
    ("uniform", "toy", 10, [0.9] * 10),
    ("symmetric_flip", "toy", 10, [1] * 10),
    ("asymmetric", "cifar10", 10, [0, 0, 1, 1, 1, 1, 0, 0, 0, 1]),
    ("asymmetric", "fashion_mnist", 10, [1, 0, 1, 0, 1, 0, 1, 1, 0, 1]),
    ("asymmetric", "cifar100", 100, [1] * 100),
    ("asymmetric_contiguous", "cifar100", 100, [1] * 100),
])  # fmt: skip
@pytest.mark.parametrize("selection", kinds.SELECTIONS)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_rates_of_each_selection(kind, name, classes, share_wrong, selection, rate):
    """Over all, and in each class, as many are wrong as the definition says."""
    source, noise = clean_source(classes=classes, name=name), noise_config(kind, rate, selection=selection)
    noisy = kinds.corrupt(source, noise)
    per_class, of_class = wrong_by_class(noisy, classes), N // classes
    bar = 1e-3 / classes  # of so many looks, one in a thousand fails by chance
    for wrong, share in zip(per_class, share_wrong, strict=True):
        if share in (0, 1) and (selection == "exact_per_class" or rate in (0, 1)):
            assert wrong == round(rate * share * of_class)
        else:
            assert stats.binomtest(wrong, of_class, rate * share).pvalue > bar
    total, expected = sum(per_class), rate * np.mean(share_wrong)
    if set(share_wrong) == {1} and selection != "bernoulli":
        assert total == round(rate * N)
    else:
        assert total == 0 if expected == 0 else stats.binomtest(total, N, expected).pvalue > 1e-3
    report = kinds.report(noisy, noise, classes)
    assert report["rate_effective"] == pytest.approx(total / N)
    assert (report["num_known"], report["num_no_class"], report["selection"]) == (N, 0, selection)
    uniform = np.full((classes, classes), 1 / classes)
    flips = uniform if kind == "uniform" else kinds.CLASS_FLIPS[kind](name, classes)
    nominal = (1 - rate) * np.eye(classes) + rate * flips
    np.testing.assert_allclose(1 - np.diag(nominal), rate * np.array(share_wrong), atol=1e-12)
    effective = np.array(report["confusion"]) / of_class
    np.testing.assert_allclose(effective, nominal, atol=5 * (0.25 / of_class) ** 0.5)
    assert not effective[nominal == 0].any()


@pytest.mark.parametrize("kind", ["uniform", "symmetric_flip"])
def test_each_wrong_label_is_as_likely_as_another(kind):
    noise = noise_config(kind, 0.8)
    confusion = np.array(kinds.report(kinds.corrupt(clean_source(), noise), noise, 10)["confusion"])
    assert stats.chisquare(confusion[~np.eye(10, dtype=bool)]).pvalue > 1e-3


def test_the_stream_is_the_published_one():
    """Philox with numpy's SeedSequence: numbers worked out from numpy alone, so that noise never changes silently."""
    raw = np.random.Philox(np.random.SeedSequence([3, 1])).random_raw(5)
    np.testing.assert_array_equal(
        kinds.uniforms(3, 1, np.array([4, 0])),
        [(int(raw[4]) >> 11) / 2**53, (int(raw[0]) >> 11) / 2**53],
    )


def test_uniform_noise_by_hand():
    """Stream 0 selects, stream 1 draws, from numpy alone: the noise behind published numbers."""
    select, drawn = (np.random.Philox(np.random.SeedSequence([7, s])).random_raw(1000) for s in (0, 1))
    expected = [
        int((int(d) >> 11) / 2**53 * 10) if (int(s) >> 11) / 2**53 < 0.3 else row % 10
        for row, (s, d) in enumerate(zip(select, drawn, strict=True))
    ]
    noise = noise_config("uniform", 0.3, seed=7)
    assert kinds.corrupt(clean_source(1000), noise).labels.tolist() == expected


def test_exact_selections_by_hand():
    """Five examples of class 0, four of class 1, one unknown: the smallest numbers are taken, halves go to even."""
    source, u = clean_source(10, 2), kinds.uniforms(0, 0, np.arange(10))
    source.train.labels[:] = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    source.train.clean_labels[:] = [0, 0, 0, 0, 0, 1, 1, 1, 1, UNKNOWN]
    for selection, rate, groups in [
        ("exact", 0.5, [(range(9), 4)]),
        ("exact_per_class", 0.5, [(range(5), 2), (range(5, 9), 2)]),
        ("exact_per_class", 0.9, [(range(5), 4), (range(5, 9), 4)]),
    ]:
        expected = {row for rows, count in groups for row in sorted(rows, key=lambda row: u[row])[:count]}
        labels = kinds.corrupt(source, noise_config("symmetric_flip", rate, selection=selection)).labels
        flipped = set(np.flatnonzero(labels != source.train.labels).tolist())
        assert flipped == expected


def test_higher_rates_keep_the_lower_rates_noise():
    """The examples corrupted at 20 % are among those corrupted at 80 %, with the same label."""
    source = clean_source(2000)
    for kind in ("uniform", "symmetric_flip"):
        for selection in kinds.SELECTIONS:
            low, high = (
                kinds.corrupt(source, noise_config(kind, rate, selection=selection)).labels for rate in (0.2, 0.8)
            )
            changed = low != source.train.labels
            assert changed.any()
            np.testing.assert_array_equal(low[changed], high[changed])


def test_examples_without_a_known_class_keep_their_label(tmp_path):
    matrix = str(tmp_path / "t.npy")
    np.save(matrix, np.full((10, 10), 0.1))
    source = clean_source(1000, images=np.random.default_rng(0).integers(0, 256, (1000, 2, 2, 1), np.uint8))
    source.train.clean_labels[:300], source.train.clean_labels[300:600] = UNKNOWN, NO_CLASS
    source.train.labels[600:] = 9  # what is given before the noise need not be true
    for noise in (
        noise_config("uniform", 1.0),
        noise_config("symmetric_flip", 1.0, selection="exact"),
        noise_config("instance_dependent", 1.0),
        noise_config("transition_matrix", file=matrix),
    ):
        labels = kinds.corrupt(source, noise).labels
        np.testing.assert_array_equal(labels[:600], source.train.labels[:600])
        assert (labels[600:] != source.train.labels[600:]).mean() > 0.7
    assert (kinds.corrupt(source, noise_config("symmetric_flip", 1.0)).labels != source.train.clean_labels).all()


# ---- The tables.


def test_lookalikes_by_name():
    cifar10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    fashion = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    for name, classes, pairs in [
        ("cifar10", cifar10, "truck>automobile bird>airplane deer>horse cat>dog dog>cat"),
        ("fashion_mnist", fashion, "T-shirt/top>Shirt Shirt>T-shirt/top Pullover>Coat Coat>Pullover Sneaker>Ankle_boot "
         "Ankle_boot>Sneaker"),
    ]:  # fmt: skip
        pairs = dict(pair.replace("_", " ").split(">") for pair in pairs.split())
        expected = [classes.index(pairs.get(one, one)) for one in classes]
        assert class_flips.asymmetric(name, 10).argmax(1).tolist() == expected


def test_superclasses_of_cifar100():
    """Twenty groups of five, those of the published coarse labels; each class goes to the next one of its group."""
    assert list(cifar.CIFAR100_CLASSES) == CIFAR100_FINE
    assert [len(members) for members in cifar.CIFAR100_SUPERCLASSES.values()] == [5] * 20
    for coarse, members in enumerate(cifar.CIFAR100_SUPERCLASSES.values()):
        fine = [place for place, label in enumerate(CIFAR100_COARSE) if label == coarse]
        assert [CIFAR100_FINE[place] for place in fine] == list(members)
    matrix = class_flips.asymmetric("cifar100", 100)
    goes_to = dict(zip(CIFAR100_FINE, np.array(CIFAR100_FINE)[matrix.argmax(1)].tolist(), strict=True))
    chain = ["apple", "mushroom", "orange", "pear", "sweet_pepper", "apple"]
    assert [goes_to[one] for one in chain[:5]] == chain[1:]
    assert (goes_to["baby"], goes_to["woman"], goes_to["whale"]) == ("boy", "baby", "beaver")
    assert (matrix.sum(0) == 1).all()


def test_contiguous_classes_of_cifar100():
    target = class_flips.asymmetric_contiguous("cifar100", 100).argmax(1)
    assert target[:11].tolist() == [1, 2, 3, 4, 0, 6, 7, 8, 9, 5, 11]
    assert target[95:].tolist() == [96, 97, 98, 99, 95]


def test_transition_matrix(tmp_path):
    """Its shares come out, with the last class of a row drawn too and impossible ones never."""
    matrix = np.array([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.1, 0, 0, 0.9]])
    (tmp_path / "t.json").write_text(json.dumps(matrix.tolist()))
    np.save(tmp_path / "t.npy", matrix)
    source = clean_source(classes=4)
    noise = noise_config("transition_matrix", file=str(tmp_path / "t.json"))
    noisy = kinds.corrupt(source, noise)
    report = kinds.report(noisy, noise, 4)
    for counts, row in zip(np.array(report["confusion"]), matrix, strict=True):
        assert not counts[row == 0].any()
        for count, share in zip(counts[row > 0], row[row > 0], strict=True):
            assert stats.binomtest(int(count), N // 4, share).pvalue > 1e-3
    noise.file = str(tmp_path / "t.npy")
    np.testing.assert_array_equal(kinds.corrupt(source, noise).labels, noisy.labels)


def test_the_nominal_rate_and_the_file_of_a_report(tmp_path):
    """Of a matrix the share of wrong labels that it means for these classes: 0.3, 0.3, 0.3 and 0."""
    (tmp_path / "t.json").write_text("[[0.7, 0.3], [0, 1]]")
    (tmp_path / "l.json").write_text("[0, 0, 1, 1]")
    source = clean_source(4, 2)
    source.train.clean_labels[:] = [0, 0, 0, 1]
    for kind, name, rate in (("transition_matrix", "t.json", 0.225), ("file", "l.json", None)):
        noise = noise_config(kind, file=str(tmp_path / name))
        report = kinds.report(kinds.corrupt(source, noise), noise, 2)
        assert report["rate"] == (rate and pytest.approx(rate))
        assert report["file_sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    source.train.clean_labels[:] = UNKNOWN
    matrix = noise_config("transition_matrix", file=str(tmp_path / "t.json"))
    assert kinds.report(source.train, matrix, 2)["rate"] is None
    report = kinds.report(source.train, noise_config("uniform", 0.4), 2)
    assert (report["rate"], report["file_sha256"]) == (0.4, None)


# ---- Noise that depends on the image.


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_rates_of_instance_dependent_noise(rate):
    """Without anything to tell images apart, each wrong label is as likely as another."""
    noisy = kinds.corrupt(clean_source(), noise_config("instance_dependent", rate))
    expected = stats.truncnorm.mean(-rate / 0.1, (1 - rate) / 0.1, rate, 0.1) if rate else 0.0
    per_class = wrong_by_class(noisy, 10)
    if not rate:
        assert sum(per_class) == 0
        return
    assert stats.binomtest(sum(per_class), N, expected).pvalue > 1e-3
    for wrong in per_class:
        assert stats.binomtest(wrong, N // 10, expected).pvalue > 1e-4
    confusion = np.array(kinds.report(noisy, noise_config("instance_dependent", rate), 10)["confusion"])
    assert stats.chisquare(confusion[~np.eye(10, dtype=bool)]).pvalue > 1e-3


def test_flip_rates_are_those_of_scipys_truncated_normal():
    u = np.linspace(0, 1, 1001)[:-1]
    for rate in (0.05, 0.4, 1.0):
        expected = stats.truncnorm.ppf(u, -rate / 0.1, (1 - rate) / 0.1, rate, 0.1)
        np.testing.assert_allclose(instance.flip_rates(rate, u), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_instance_dependent_noise_by_hand(dtype, monkeypatch):
    """One example after the other, with plain loops and numpy's Philox alone."""
    n, classes, rate, shape = 60, 3, 0.6, (2, 2, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    images = pixels if dtype == np.uint8 else (pixels / 255).astype(np.float32)

    def numbers(stream, count):
        raw = np.random.Philox(np.random.SeedSequence([5, stream])).random_raw(count)
        return [(int(number) >> 11) / 2**53 for number in raw]

    scaled = pixels.astype(np.float64)
    for channel in range(3):
        values = scaled[..., channel]
        scaled[..., channel] = (values - values.mean()) / values.std()
    projections = [special.ndtri(numbers(16 + label, 12 * classes)).reshape(12, classes) for label in range(classes)]
    expected = []
    for row, (s, d, q) in enumerate(zip(numbers(0, n), numbers(1, n), numbers(4, n), strict=True)):
        label = row % classes
        if s >= stats.truncnorm.ppf(q, -rate / 0.1, (1 - rate) / 0.1, rate, 0.1):
            expected.append(label)
            continue
        others = [c for c in range(classes) if c != label]
        logits = [float(scaled[row].ravel() @ projections[label][:, c]) for c in others]
        first = 1 / (1 + np.exp(logits[1] - logits[0]))
        expected.append(others[0] if d < first else others[1])
    monkeypatch.setattr(instance, "NUMBERS_AT_ONCE", 12 * 7)  # seven images at a time
    noise = noise_config("instance_dependent", rate, seed=5)
    got = kinds.corrupt(clean_source(n, classes, images=images), noise).labels.tolist()
    assert got == expected
    assert len(set(got)) == 3 and 0.4 < np.mean(np.array(got) != np.arange(n) % classes) < 0.8


# ---- Foreign images.


def foreign_file(path, n, side=4, channels=1, dtype=np.uint8):
    """An .npz file whose image i has the value 100 + i everywhere."""
    images = np.broadcast_to(np.arange(100, 100 + n, dtype=np.uint8)[:, None, None, None], (n, side, side, channels))
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    np.savez(path, images=images, labels=np.arange(n) % 2)
    return f"arrays:{path}"


@pytest.mark.parametrize("selection", kinds.SELECTIONS)
def test_open_set_rates(selection, tmp_path):
    source = clean_source()
    place = foreign_file(tmp_path / "a.npz", 50, 2)
    noise = noise_config("open_set", 0.4, selection=selection, open_set=place)
    noisy = kinds.corrupt(source, noise)
    replaced = noisy.clean_labels == NO_CLASS
    if selection == "bernoulli":
        assert stats.binomtest(int(replaced.sum()), N, 0.4).pvalue > 1e-3
    else:
        assert replaced.sum() == 0.4 * N
    for label in range(10):
        count = int(replaced[source.train.labels == label].sum())
        if selection == "exact_per_class":
            assert count == 2000
        else:
            assert stats.binomtest(count, 5000, 0.4).pvalue > 1e-4
    np.testing.assert_array_equal(noisy.labels, source.train.labels)
    np.testing.assert_array_equal(noisy.clean_labels[~replaced], source.train.labels[~replaced])
    assert (noisy.images[replaced] >= 100).all() and not noisy.images[~replaced].any()
    report = kinds.report(noisy, noise, 10)
    assert report["num_no_class"] == replaced.sum() and report["num_known"] == N
    assert report["rate_effective"] == pytest.approx(replaced.mean())
    assert np.sum(report["confusion"]) == N - replaced.sum()


def test_open_set_sources_share_equally_and_repeat_only_when_they_must(tmp_path):
    places = [foreign_file(tmp_path / f"{name}.npz", n) for name, n in (("a", 30), ("b", 20))]
    source = clean_source(100, images=np.zeros((100, 4, 4, 1), np.uint8))
    noise = noise_config("open_set", 0.4, selection="exact", open_set=",".join(places))
    noisy = kinds.corrupt(source, noise)
    replaced = noisy.clean_labels == NO_CLASS
    names = noisy.names[replaced].tolist()
    assert replaced.sum() == 40 and len(set(names)) == 40, "20 of each, none twice"
    np.testing.assert_array_equal(noisy.names[~replaced], source.train.names[~replaced])
    assert [sum(name.startswith(f"{one}:") for name in names) for one in "ab"] == [20, 20]
    values = noisy.images[replaced][:, 0, 0, 0]
    assert [name.split("/")[-1] for name in names] == [str(value - 100) for value in values]
    noise.open_set, noise.rate = places[1], 0.5
    repeated = kinds.corrupt(source, noise)
    counts = np.unique(repeated.names[repeated.clean_labels == NO_CLASS], return_counts=True)[1]
    assert sorted(counts.tolist()) == [2] * 10 + [3] * 10, "50 of 20"
    assert not source.train.images.any() and (source.train.clean_labels >= 0).all(), "the input is left alone"
    noise.rate = 0.2
    fewer = kinds.corrupt(source, noise)
    same = fewer.clean_labels == NO_CLASS
    assert same.sum() == 20
    np.testing.assert_array_equal(fewer.images[same], repeated.images[same])


def test_open_set_images_take_the_size_channels_and_dtype_of_the_own(tmp_path):
    def one(own_channels, own_dtype, channels, dtype, pixels):
        own = np.zeros((2, 2, 2, own_channels), own_dtype)
        images = np.broadcast_to(np.asarray(pixels, dtype), (2, 4, 4, channels))
        np.savez(tmp_path / "f.npz", images=images, labels=[0, 1])
        noise = noise_config("open_set", 1.0, open_set=f"arrays:{tmp_path / 'f.npz'}")
        noisy = kinds.corrupt(clean_source(2, 2, images=own), noise).images
        assert noisy.shape == own.shape and noisy.dtype == own_dtype
        assert np.ptp(noisy, axis=(0, 1, 2)).max() == 0
        return noisy[0, 0, 0].tolist()

    assert one(3, np.uint8, 1, np.uint8, [77]) == [77, 77, 77]
    assert one(1, np.uint8, 3, np.uint8, [200, 100, 50]) == [124]  # 59.8 + 58.7 + 5.7 = 124.2
    assert one(1, np.uint8, 1, np.float32, [0.5]) == [128]  # 127.5, a half to the even number
    assert one(1, np.float32, 1, np.uint8, [51]) == [pytest.approx(0.2)]


def test_foreign_data_have_the_defaults_of_the_configuration():
    expected = default.get_config().data
    expected.name, expected.dir, expected.image_size = "cifar100", "there", 32
    assert open_set.data_config("cifar100", "there", 32) == expected
    expected.name, expected.dir, expected.train = "image_folder", "", "there"
    assert open_set.data_config("image_folder", "there", 32) == expected


def test_open_set_with_digits():
    source = clean_source(50, images=np.zeros((50, 8, 8, 3), np.float32))
    noisy = kinds.corrupt(source, noise_config("open_set", 0.5, selection="exact", open_set="digits"))
    digits = sources.load(default.get_config().data).train
    for row in np.flatnonzero(noisy.clean_labels == NO_CLASS):
        image = digits.images[digits.names == noisy.names[row].removeprefix("digits:")][0]
        np.testing.assert_allclose(noisy.images[row], np.repeat(image / 255, 3, axis=-1), atol=1e-6)


# ---- Labels from files.


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_labels_written_are_labels_read(tmp_path, suffix):
    """Ids with gaps, in any order: the k-th label belongs to the k-th smallest id."""
    source = in_rows(clean_source(2000), np.random.default_rng(0).permutation(2000)[:1500])
    noisy = kinds.corrupt(source, noise_config("symmetric_flip", 0.5))
    path = str(tmp_path / f"labels{suffix}")
    write_labels(path, noisy.labels[np.argsort(noisy.ids)])
    again = kinds.corrupt(source, noise_config("file", file=path))
    np.testing.assert_array_equal(again.labels, noisy.labels)
    assert again.labels.dtype == np.int32
    np.testing.assert_array_equal(again.clean_labels, source.train.clean_labels)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        write_labels(path, noisy.labels)


def test_a_label_file_has_a_label_for_each_listed_image_or_for_each_that_is_used(tmp_path):
    """Six are listed, ids 1 and 4 are left out, and so are two images for testing."""
    source = in_rows(clean_source(6, 3), np.array([5, 0, 2, 3]))
    source = dataclasses.replace(source, num_listed=6, left_out=dict.fromkeys(["b", "e", "t0", "t1"], "zero bytes"))
    for content, expected in (("[0, 0, 0, 1, 0, 2]", [2, 0, 0, 1]), ("[0, 0, 1, 2]", [2, 0, 0, 1])):
        (tmp_path / "x.json").write_text(content)
        noise = noise_config("file", file=str(tmp_path / "x.json"))
        assert kinds.corrupt(source, noise).labels.tolist() == expected
    for count in (3, 5, 7, 8):
        (tmp_path / "x.json").write_text(json.dumps([0] * count))
        with pytest.raises(UserError, match=rf"{count} labels, expected 6, one for each listed .*, or 4, one for each"):
            kinds.corrupt(source, noise)


def test_the_json_file_is_a_plain_list(tmp_path):
    write_labels(tmp_path / "x.json", np.array([3, 0, 1], np.int32))
    assert (tmp_path / "x.json").read_text() == "[3, 0, 1]"
    with pytest.raises(UserError, match=r"ends in .json or .npy"):
        write_labels(tmp_path / "x.txt", np.array([1]))
    with pytest.raises(UserError, match=r"dtype float64, expected \[N\] integers"):
        write_labels(tmp_path / "y.json", np.array([1.0]))


def test_human_labels_are_joined_in_the_order_of_ids(monkeypatch):
    def load(path, label_set, true_labels):
        assert (path, label_set, true_labels.tolist()) == ("x.pt", "worse", [0, 1, 2, 0, 1, 2])
        return np.array([2, 1, 2, 1, 1, 0], np.int32)

    monkeypatch.setattr(human_labels, "load", load)
    monkeypatch.setattr(human_labels, "LABEL_SETS", ("worse",))
    noise = noise_config("human", file="x.pt", label_set="worse")
    kinds.validate(noise)
    source = in_rows(clean_source(6, 3), np.array([5, 3, 0, 1, 2, 4]))
    assert kinds.corrupt(source, noise).labels.tolist() == [0, 1, 2, 1, 2, 1]
    noise.label_set = "wors"
    with pytest.raises(UserError, match="noise.label_set: got 'wors'.*Did you mean 'worse'"):
        kinds.validate(noise)


# ---- Every kind.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    np.save(folder / "labels.npy", np.random.default_rng(0).integers(0, 100, 2000))
    np.save(folder / "matrix.npy", np.full((100, 100), 0.01))
    return {"labels": str(folder / "labels.npy"), "matrix": str(folder / "matrix.npy"),
            "foreign": foreign_file(folder / "foreign.npz", 30, 2)}  # fmt: skip


def every_noise(files, seed=0):
    """Each kind with each selection it has."""
    own = {
        "transition_matrix": {"file": files["matrix"]}, "file": {"file": files["labels"]},
        "open_set": {"open_set": files["foreign"]}, "human": {"file": files["labels"], "label_set": "noisy"},
    }  # fmt: skip
    for kind, described in kinds.KINDS.items():
        rate = 0.4 if "rate" in described.reads else 0.0
        for selection in kinds.SELECTIONS if "selection" in described.reads else ("bernoulli",):
            yield noise_config(kind, rate, selection=selection, seed=seed, **own.get(kind, {}))


def test_every_kind_depends_on_seed_and_id_alone(files, monkeypatch):
    """Rows in another order give each id the same label, clean label and image; another seed gives others."""
    monkeypatch.setattr(human_labels, "load", lambda *_: np.arange(2000) * 7 % 100)
    rng = np.random.default_rng(0)
    source = clean_source(2000, 100, "cifar100", rng.integers(0, 256, (2000, 2, 2, 1), np.uint8))
    rows = rng.permutation(2000)
    for noise, reseeded in zip(every_noise(files), every_noise(files, seed=1), strict=True):
        kinds.validate(noise)
        whole, shuffled = kinds.corrupt(source, noise), kinds.corrupt(in_rows(source, rows), noise)
        for field in ("images", "labels", "clean_labels", "names", "ids"):
            got, expected = getattr(shuffled, field), getattr(whole, field)[rows]
            np.testing.assert_array_equal(got, expected, err_msg=f"{noise.kind}, {noise.selection}: {field}")
        assert whole.labels.dtype == whole.clean_labels.dtype == np.int32
        json.dumps(kinds.report(whole, noise, 100))
        other = kinds.corrupt(source, reseeded)
        same = (other.labels == whole.labels).all() and (other.images == whole.images).all()
        assert same == (noise.kind in ("none", "file", "human"))


def test_parts_of_a_training_set_get_the_labels_of_the_whole(files):
    """Where each example is selected by itself, four hosts that each hold a quarter would agree."""
    source = clean_source(2000, 100, "cifar100")
    for noise in every_noise(files):
        if noise.selection == "bernoulli" and noise.kind not in ("none", "open_set", "file", "human"):
            whole = kinds.corrupt(source, noise).labels
            parts = [kinds.corrupt(in_rows(source, np.arange(h, 2000, 4)), noise).labels for h in range(4)]
            np.testing.assert_array_equal(np.stack(parts, 1).ravel(), whole)


def test_none_leaves_labels_and_reports_what_is_known():
    source, noise = clean_source(6, 3), noise_config("none")
    source.train.clean_labels[:4] = [UNKNOWN, 2, UNKNOWN, NO_CLASS]
    same = kinds.corrupt(source, noise)
    assert same is source.train
    report = kinds.report(same, noise, 3)
    # Given 0 1 2 0 1 2: the second is a 2, the fourth is of no class, the last two are right.
    assert (report["num_known"], report["num_no_class"], report["rate_effective"]) == (4, 1, 0.5)
    assert report["confusion"] == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    source.train.clean_labels[:] = UNKNOWN
    report = kinds.report(source.train, noise, 3)
    assert report["rate_effective"] is report["confusion"] is None


# ---- What cannot work.


@pytest.mark.parametrize("keys, message", [
    ({"kind": "salt"}, "noise.kind: got 'salt', expected one of none, uniform"),
    ({"kind": "uniform", "selection": "all"}, "noise.selection: got 'all'"),
    ({"kind": "none", "rate": 0.4}, "noise.rate=0.4, but noise.kind=none does not read it"),
    ({"kind": "transition_matrix"}, "transition_matrix needs noise.file"),
    ({"kind": "transition_matrix", "file": "t.npy", "rate": 0.2}, "noise.rate=0.2, but noise.kind=transition_matrix"),
    ({"kind": "transition_matrix", "file": "t.npy", "selection": "exact"}, "noise.selection='exact', but"),
    ({"kind": "file"}, "noise.kind=file needs noise.file"),
    ({"kind": "human", "label_set": "worse"}, "noise.kind=human needs noise.file"),
    ({"kind": "human", "file": "x.pt"}, "noise.kind=human needs noise.label_set"),
    ({"kind": "open_set", "rate": 0.4}, "noise.kind=open_set needs noise.open_set"),
    ({"kind": "open_set", "open_set": "digits, cifar101:x"}, "noise.open_set: got 'cifar101'"),
    ({"kind": "instance_dependent", "rate": 0.4, "selection": "exact"}, "does not read it"),
    ({"kind": "uniform", "file": "x.npy"}, r"noise.file='x.npy', .*that reads it \(transition_matrix, file, human\)"),
])  # fmt: skip
def test_settings_that_cannot_work(keys, message):
    with pytest.raises(UserError, match=message):
        kinds.validate(noise_config(**keys))


def test_the_default_and_the_usual_settings_are_valid():
    kinds.validate(default.get_config().noise)
    kinds.validate(noise_config("uniform", 0.8, selection="exact_per_class"))


@pytest.mark.parametrize("noise, name, classes, message", [
    (noise_config("asymmetric", 0.4), "toy", 10, "defined for cifar10, cifar100, fashion_mnist, not for toy.*matrix"),
    (noise_config("asymmetric", 0.4), "cifar10", 12, "cifar10 has 12 classes here, expected 10; set data.num_classes"),
    (noise_config("asymmetric_contiguous", 0.4), "cifar10", 10, "defined for cifar100, not for cifar10"),
])  # fmt: skip
def test_data_sets_without_a_table(noise, name, classes, message):
    with pytest.raises(UserError, match=message):
        kinds.corrupt(clean_source(100, classes, name), noise)


@pytest.mark.parametrize("file, content, message", [
    ("x.json", "[0, 1, 2", "damaged, or not of numbers alone.*complete"),
    ("x.json", "[0, 1, 2]", r"shape \(3,\), expected \(6,\)"),
    ("x.json", "[0, 1, 2, 0, 1, 3]", "3 at place 5, expected 0 to 2"),
    ("x.json", "[0, 1, 2, 0, 1, -1]", "-1 at place 5, expected 0 to 2"),
    ("x.json", "[0, 1, 2, 0, 1, 2.0]", "dtype float64; expected a list of integers"),
    ("x.json", '{"labels": [0]}', "expected a list of integers"),
    ("x.json", '["0", "1"]', "expected a list of integers"),
    ("x.json", "[true, false]", "expected a list of integers"),
    ("x.json", "[]", "expected a list of integers"),
    ("x.json", "[[0, 1], [2]]", "damaged, or not of numbers alone"),
    ("x.npy", np.zeros(6), "dtype float64; expected a list of integers"),
    ("x.npy", np.zeros((6, 1), int), r"shape \(6, 1\)"),
    ("x.npy", np.array([0, None]), "damaged, or not of numbers alone.*pickle"),
    ("x.npy", b"\x93NUMPY\x01", "damaged"),
    ("x.txt", "0", "expected a file that ends in .json or .npy"),
    ("none.npy", None, "cannot be read.*No such file"),
])  # fmt: skip
def test_label_files_that_cannot_be_used(tmp_path, file, content, message):
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        kinds.corrupt(clean_source(6, 3), noise_config("file", file=str(tmp_path / file)))


@pytest.mark.parametrize("content, message", [
    ([[1, 0, 0], [0, 1, 0]], r"shape \(2, 3\).*expected 3×3"),
    ([[1, 0, 0], [0, 1, 0], [0.5, 0.2, 0.2]], "row 2 is .* with sum 0.9, expected probabilities"),
    ([[1, 0, 0], [1.5, -0.5, 0], [0, 0, 1]], "row 1 is"),
    ([[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]], "row 0 is"),
    ([["a", 0, 0], [0, 1, 0], [0, 0, 1]], "expected 3×3 numbers"),
])  # fmt: skip
def test_matrices_that_cannot_be_used(tmp_path, content, message):
    write(tmp_path / "t.json", json.dumps(content))
    with pytest.raises(UserError, match=message):
        kinds.corrupt(clean_source(6, 3), noise_config("transition_matrix", file=str(tmp_path / "t.json")))


def write(path, content):
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_noise_that_needs_pixels_in_memory(tmp_path):
    """Files that are decoded when they are needed, images that are no squares, and the data set's own images."""
    stored = dataclasses.replace(clean_source(6, 3).train, images=types.SimpleNamespace())
    on_disk = Source("photos", 3, stored)
    place = foreign_file(tmp_path / "a.npz", 3)
    for noise in (noise_config("instance_dependent", 0.4), noise_config("open_set", 0.4, open_set=place)):
        with pytest.raises(UserError, match="of photos .*set data.image_size"):
            kinds.corrupt(on_disk, noise)
    oblong = clean_source(6, 3, images=np.zeros((6, 2, 4, 1), np.uint8))
    with pytest.raises(UserError, match="2×4 pixels, expected squares; set data.image_size"):
        kinds.corrupt(oblong, noise_config("open_set", 0.4, open_set=place))
    digits = sources.load(ConfigDict(default.get_config().data))
    with pytest.raises(UserError, match="noise.open_set=digits: these are the images of data.name themselves"):
        kinds.corrupt(digits, noise_config("open_set", 0.4, open_set="digits"))
