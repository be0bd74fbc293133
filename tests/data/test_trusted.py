import dataclasses
import json

import image_trees
import numpy as np
import pytest

from configs import default
from ieg_jax.data import trusted as trusted_set
from ieg_jax.data.images import FileImages
from ieg_jax.data.load import load_data
from ieg_jax.data.noise import kinds
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import NO_CLASS, UNKNOWN, Source, joined, make_split
from ieg_jax.errors import UserError


def trusted_config(**keys):
    config = default.get_config().trusted
    config.per_class = 3
    for key, value in keys.items():
        setattr(config, key, value)
    return config


@pytest.fixture(scope="module")
def digits():
    return sources.load(default.get_config().data)


def small(labels, clean=None, trusted=None, pool=False, names="train", trusted_names="trusted"):
    def split(labels, clean, prefix):
        labels, names = np.asarray(labels), [f"{prefix}/{row}" for row in range(len(labels))]
        return make_split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels, np.array(clean), np.array(names))

    return Source(
        "small",
        3,
        split(labels, labels if clean is None else clean, names),
        None,
        trusted and split(trusted, trusted, trusted_names),
        trusted_is_pool=pool,
    )


def shuffled(source, seed=0):
    """The same data with the rows of training and trusted set in another order."""
    rng = np.random.default_rng(seed)
    splits = {
        name: split.take(rng.permutation(len(split)))
        for name in ("train", "trusted")
        if (split := getattr(source, name)) is not None
    }
    return dataclasses.replace(source, **splits)


# ---- Drawn from the training set.


def test_taken_out_of_the_training_set_and_interleaved(digits):
    train, trusted = trusted_set.split_trusted(digits, trusted_config())
    assert trusted.labels.tolist() == list(range(10)) * 3
    assert not set(train.ids) & set(trusted.ids)
    assert set(train.ids) | set(trusted.ids) == set(digits.train.ids)
    by_id = dict(zip(digits.train.ids, digits.train.clean_labels, strict=True))
    assert [by_id[i] for i in trusted.ids] == trusted.labels.tolist()


def test_the_smallest_numbers_of_stream_2_are_trusted(digits):
    """From numpy alone, so that published trusted sets stay what they are."""
    raw = np.random.Philox(np.random.SeedSequence([5, 2])).random_raw(int(digits.train.ids.max()) + 1)
    by_class = [
        sorted(digits.train.ids[digits.train.labels == label].tolist(), key=lambda id_: raw[id_])[:3]
        for label in range(10)
    ]
    _, trusted = trusted_set.split_trusted(digits, trusted_config(seed=5))
    assert trusted.ids.tolist() == [ids[place] for place in range(3) for ids in by_class]


def test_seed(digits):
    first, again, other = (
        trusted_set.split_trusted(digits, trusted_config(seed=seed))[1].ids.tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_labels_are_true_even_where_the_given_ones_are_not(digits):
    wrong = dataclasses.replace(digits.train, labels=(digits.train.labels + 1) % 10)
    _, trusted = trusted_set.split_trusted(dataclasses.replace(digits, train=wrong), trusted_config())
    np.testing.assert_array_equal(trusted.labels, trusted.clean_labels)
    assert np.bincount(trusted.labels).tolist() == [3] * 10


@pytest.mark.parametrize("unknown", [UNKNOWN, NO_CLASS])
def test_examples_of_unknown_label_are_never_drawn(unknown):
    source = small([0, 1, 2, 0, 1, 2], clean=[0, unknown, 2, unknown, 1, unknown])
    _, trusted = trusted_set.split_trusted(source, trusted_config(per_class=1))
    assert trusted.ids.tolist() == [0, 4, 2]


@pytest.mark.parametrize("fraction, counts", [(0.5, [1, 2, 4]), (0.1, [1, 1, 1]), (0.8, [1, 4, 6])])
def test_a_share_of_each_class(fraction, counts):
    """Of 1, 5 and 8 examples: 2.5 is rounded to the even number; at least one; the larger share has the smaller one."""
    source = small([0] + [1] * 5 + [2] * 8)
    train, trusted = trusted_set.split_trusted(source, trusted_config(fraction=fraction))
    assert np.bincount(trusted.labels).tolist() == counts
    assert len(train) == 14 - sum(counts)
    assert trusted.labels[:3].tolist() == [0, 1, 2], "interleaved as far as there are any"
    _, more = trusted_set.split_trusted(source, trusted_config(fraction=0.9))
    assert set(trusted.ids) <= set(more.ids)


def test_the_noise_of_an_example_does_not_depend_on_who_is_trusted(digits):
    noise = default.get_config().noise
    noise.kind, noise.rate = "uniform", 0.5
    noisy = dataclasses.replace(digits, train=kinds.corrupt(digits, noise))
    given = dict(zip(noisy.train.ids, noisy.train.labels, strict=True))
    for keys in ({"per_class": 1}, {"per_class": 5, "seed": 3}, {"fraction": 0.3}):
        train, trusted = trusted_set.split_trusted(noisy, trusted_config(**keys))
        assert [given[id_] for id_ in train.ids] == train.labels.tolist()
        np.testing.assert_array_equal(trusted.labels, trusted.clean_labels)
        assert len(train) + len(trusted) == len(digits.train)


# ---- Listed in a file.


def listed(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path / name)


@pytest.mark.parametrize("name, content", [
    ("x.json", "[5, 0, 1, 2]"),
    ("x.json", '{"seed": 3, "ids": [5, 0, 1, 2], "labels": [2, 0, 1, 2]}'),
    ("x.json", '["train/5", "train/0", "train/1", "train/2"]'),
    ("x.txt", "5\n0\n1\n2\n"),
    ("x.txt", "\r\n5\r\n\r\n0\r\n  1 \r\n2"),
    ("x.txt", "\ufefftrain/5\ntrain/0\ntrain/1\ntrain/2\n"),
    ("ids", "5\n0\n1\n2"),
    ("x.csv", "5\r\n0\r\n\r\n1\r\n2\r\n"),
    ("x.csv", 'path,label\n"train/5",2\ntrain/0,0\ntrain/1,1\ntrain/2,2\n'),
])  # fmt: skip
def test_listed_examples(tmp_path, name, content):
    """Classes 2 0 1 2 are listed: 0 1 2, then the second of class 2, whichever way the file says it."""
    path = listed(tmp_path, name, content)
    for source in (small([0, 1, 2] * 3), shuffled(small([0, 1, 2] * 3))):
        train, trusted = trusted_set.split_trusted(source, trusted_config(ids=path))
        assert trusted.ids.tolist() == [0, 1, 5, 2]
        assert trusted.labels.tolist() == [0, 1, 2, 2]
        assert sorted(train.ids.tolist()) == [3, 4, 6, 7, 8]


def test_names_may_hold_commas_in_a_text_file(tmp_path):
    source = small([0, 1, 2, 0])
    source.train.names[:] = ["a,1", "b 2", "ü3", "4"]
    path = listed(tmp_path, "x.txt", "a,1\nb 2\nü3\n")
    assert trusted_set.split_trusted(source, trusted_config(ids=path))[1].ids.tolist() == [0, 1, 2]


def test_the_label_of_a_listed_example_is_the_true_one_where_known_else_the_given_one(tmp_path):
    source = small([1, 1, 1, 2], clean=[0, UNKNOWN, 2, 1])
    _, trusted = trusted_set.split_trusted(source, trusted_config(ids=listed(tmp_path, "x.json", "[0, 1, 2]")))
    assert trusted.labels.tolist() == [0, 1, 2]


def test_trusted_json_of_a_run_gives_the_same_trusted_set(tmp_path, digits):
    config = trusted_config(seed=4)
    train, trusted = trusted_set.split_trusted(digits, config)
    report = trusted_set.report(trusted, config, len(digits.train) - len(train))
    assert report["per_class"] == [3] * 10 and report["num_removed"] == 30
    assert report["names"] == trusted.names.tolist() and report["labels"] == trusted.labels.tolist()
    path = listed(tmp_path, "trusted.json", json.dumps(report))
    for source in (digits, shuffled(digits)):
        _, again = trusted_set.split_trusted(source, trusted_config(ids=path))
        assert again.ids.tolist() == trusted.ids.tolist()
        np.testing.assert_array_equal(again.images, trusted.images)


def test_trusted_json_does_not_fit_data_that_have_changed(tmp_path):
    """A line more at the top of a list shifts the ids; and a separate set has other images under the same ids."""
    source = small([0, 1, 2] * 3, trusted=[0, 1, 2] * 2, pool=True)
    config = trusted_config(per_class=1)
    path = listed(
        tmp_path, "trusted.json", json.dumps(trusted_set.report(trusted_set.split_trusted(source, config)[1], config))
    )
    first = int(trusted_set.split_trusted(source, config)[1].ids[0])
    shifted = small([2] + [0, 1, 2] * 3)
    shifted.train.names[:] = ["new", *source.train.names]
    with pytest.raises(
        UserError, match=rf"3 of 3 ids .*first id {first}: .*, expected 'train/{first}'; .*one name in a"
    ):
        trusted_set.split_trusted(shifted, trusted_config(ids=path))
    with pytest.raises(
        UserError, match="a run with trusted.source=train, but here it is separate.*set trusted.source=t"
    ):
        trusted_set.split_trusted(source, trusted_config(ids=path, source="separate"))
    names = listed(tmp_path, "names.txt", "\n".join(json.loads((tmp_path / "trusted.json").read_text())["names"]))
    assert (trusted_set.split_trusted(shifted, trusted_config(ids=names))[1].ids == first + 1).any(), "by name it does"
    broken = listed(tmp_path, "broken.json", '{"ids": [0, 1, 2], "names": ["train/0"]}')
    with pytest.raises(UserError, match="expected as many names as ids, 3"):
        trusted_set.split_trusted(source, trusted_config(ids=broken))


# ---- A separate set.


def test_a_separate_trusted_set_is_trusted_whole():
    source = small([0, 1, 2], clean=[-1] * 3, trusted=[2, 0, 1, 0])
    train, trusted = trusted_set.split_trusted(source, trusted_config(source="separate"))
    assert train.ids.tolist() == [0, 1, 2]
    assert trusted.labels.tolist() == [0, 1, 2, 0]
    assert trusted.ids.tolist() == [1, 2, 0, 3]


def test_training_images_of_the_same_name_are_removed():
    """The trusted set lists the first four of six training images under the names they have there."""
    source = small([0, 1, 2, 0, 1, 2], clean=[-1] * 6, trusted=[0, 1, 2, 1], names="img", trusted_names="img")
    config = trusted_config(source="separate")
    train, trusted = trusted_set.split_trusted(source, config)
    assert train.names.tolist() == ["img/4", "img/5"]
    assert trusted.labels.tolist() == [0, 1, 2, 1], "their labels are the trusted ones"
    assert trusted_set.report(trusted, config, len(source.train) - len(train))["num_removed"] == 4


def test_a_pool_to_choose_from(tmp_path):
    """By number, by share, and by a list of its names; what is not chosen stays in the training set."""
    source = small([0, 1, 2], clean=[-1] * 3, trusted=[0, 1, 2] * 4, pool=True)
    raw = np.random.Philox(np.random.SeedSequence([1, 2])).random_raw(12)
    by_class = [sorted(range(label, 12, 3), key=lambda row: raw[row]) for label in range(3)]
    for keys in ({"per_class": 2}, {"fraction": 0.5}):
        train, trusted = trusted_set.split_trusted(source, trusted_config(source="separate", seed=1, **keys))
        assert trusted.ids.tolist() == [ids[place] for place in range(2) for ids in by_class]
        assert len(train) == 3
    path = listed(tmp_path, "x.txt", "trusted/10\ntrusted/9\ntrusted/2")
    _, trusted = trusted_set.split_trusted(source, trusted_config(source="separate", ids=path))
    assert trusted.ids.tolist() == [9, 10, 2]
    report = trusted_set.report(trusted, trusted_config(source="separate"))
    path = listed(tmp_path, "trusted.json", json.dumps(report))
    assert trusted_set.split_trusted(source, trusted_config(source="separate", ids=path))[1].ids.tolist() == [9, 10, 2]


def test_only_chosen_images_of_a_pool_are_removed_from_the_training_set():
    source = small([0, 1, 2] * 2, trusted=[0, 1, 2] * 2, pool=True, names="img", trusted_names="img")
    train, trusted = trusted_set.split_trusted(source, trusted_config(source="separate", per_class=1))
    assert set(train.names) == set(source.train.names) - set(trusted.names) and len(train) == 3


def test_others_are_drawn_for_images_of_a_pool_that_cannot_be_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for row in range(12):
        image_trees.save(tmp_path / f"{row}.jpg", image_trees.picture(row))
    files = FileImages(np.array([str(tmp_path / f"{row}.jpg") for row in range(12)], object))
    source = small([0, 1, 2], trusted=[0, 1, 2] * 4, pool=True)
    source = dataclasses.replace(source, trusted=dataclasses.replace(source.trusted, images=files))
    config, data = trusted_config(source="separate", per_class=2), default.get_config().data
    drawn = trusted_set.split_trusted(source, config)[1]
    order = trusted_set.split_trusted(source, trusted_config(source="separate", per_class=4))[1].ids.tolist()
    bad = int(drawn.ids[0])  # of class 0, as is every third
    (tmp_path / f"{bad}.jpg").write_bytes(b"")
    assert trusted_set.split_trusted(source, config)[1].ids.tolist() == drawn.ids.tolist(), "to be refused, by name"
    source, data.unreadable = dataclasses.replace(source, skip_unreadable=True), "skip"
    trusted, left_out = sources.open_images(trusted_set.split_trusted(source, config)[1], data, data.image_size)
    assert sorted(trusted.ids) == sorted({*drawn.ids, order[6]} - {bad}) and list(left_out) == [f"trusted/{bad}"]
    for row in range(0, 9, 3):
        (tmp_path / f"{row}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="per_class=2, but of 4 examples of class 0 .* only . can be decoded"):
        trusted_set.split_trusted(source, config)


@pytest.mark.parametrize("keys", [
    {}, {"fraction": 0.5}, {"seed": 7}, {"source": "separate", "per_class": 1}, {"source": "separate", "fraction": 0.5},
])  # fmt: skip
def test_any_order_of_rows_gives_the_same_trusted_set(keys):
    source = small([0, 1, 2] * 6, trusted=[0, 1, 2] * 4, pool=True)
    for pool in (True, False):
        if not pool and "fraction" in keys and "source" in keys:
            continue  # a set that is trusted whole has no share
        plain = dataclasses.replace(source, trusted_is_pool=pool)
        train, trusted = trusted_set.split_trusted(plain, trusted_config(**keys))
        for seed in range(3):
            other_train, other = trusted_set.split_trusted(shuffled(plain, seed), trusted_config(**keys))
            assert other.ids.tolist() == trusted.ids.tolist()
            assert sorted(other_train.ids) == sorted(train.ids)


# ---- What cannot work.


@pytest.mark.parametrize(
    "source, keys, message",
    [
        (small([0, 1, 1, 2, 2]), {"per_class": 2}, "per_class=2, but class 0 of small has only 1 examples"),
        (small([0, 1, 1]), {"per_class": 1}, "class 2 of small has only 0"),
        (
            small([0, 1, 1]),
            {"fraction": 0.5},
            "trusted.fraction=0.5, but class 2 of small has only 0.*each class needs",
        ),
        (small([0, 1, 2], clean=[-1] * 3), {}, "no true label of small is known.*trusted.ids"),
        (small([0, 1, 2], clean=[-1, -2, -2]), {}, "no true label of small is known"),
        (small([0, 1, 2]), {"source": "separate"}, "brings no trusted set"),
        (small([0, 1, 2], trusted=[0, 2]), {"source": "separate"}, "trusted set of small has no example of class 1"),
        (
            small([0, 1, 2], trusted=[0, 1, 2], pool=True),
            {"source": "separate", "per_class": 2},
            "trusted set of small",
        ),
        (
            small([0, 1, 2], trusted=[0, 1, 2]),
            {"source": "separate", "fraction": 0.5},
            "trusted.fraction=0.5, but the trusted set of small is trusted whole",
        ),
        (
            small([0, 1, 2], trusted=[0, 1, 2]),
            {"source": "separate", "ids": "x.txt"},
            "trusted.ids='x.txt', but the trusted set of small is trusted whole",
        ),
        (small([0, 1, 2]), {"per_class": 1}, "leaves no training examples of small"),
        (small([0, 1, 2]), {"fraction": 1.0}, "leaves no training examples of small"),
    ],
)
def test_impossible_trusted_sets(source, keys, message):
    with pytest.raises(UserError, match=message):
        trusted_set.split_trusted(source, trusted_config(**keys))


@pytest.mark.parametrize("name, content, message", [
    ("none.txt", None, "cannot be read.*No such file"),
    ("x.txt", "\n \r\n", "lists nothing"),
    ("x.json", "[]", "lists nothing"),
    ("x.csv", "id\n", "lists nothing"),
    ("x.json", "[0, 1", "no valid JSON.*complete"),
    ("x.json", "[0.5, 1]", "expected a list of ids or of names"),
    ("x.json", "[true, 1]", "expected a list of ids or of names"),
    ("x.json", '{"names": ["a"]}', "expected a list of ids or of names"),
    ("x.txt", b"\xff\xd8\xff\xe0", "no text in UTF-8"),
    ("x.txt", "0\n1\n2\n9\n10", "2 of 5 are no ids of small, first 9; expected ids such as 0"),
    ("x.txt", "train/0\ntrain/7", "1 of 2 are no names of small, first 'train/7'; expected names such as 'train/0'"),
    ("x.txt", "0\ntrain/1", "1 of 2 are no names of small, first '0'"),
    ("x.txt", "0\n1\n2\n1", "1 is listed more than once"),
    ("x.txt", "0\n1\n2\n01", "1 is listed more than once"),
    ("x.txt", "train/0\ntrain/0", "'train/0' is listed more than once"),
    ("x.txt", "0\n1\n3", "has no example of class 2; expected at least one of each of the 3"),
    ("x.txt", "0\n1\n2\n5", "the label of 1 of 4 is known to be wrong.*first id 5"),
])  # fmt: skip
def test_lists_that_cannot_be_used(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is None else listed(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        trusted_set.split_trusted(small([0, 1, 2] * 2, clean=[0, 1, 2, 0, 1, NO_CLASS]), trusted_config(ids=path))


@pytest.mark.parametrize("keys, message", [
    ({"fraction": 1.5}, r"trusted.fraction: got 1.5, expected a share in \(0, 1\]"),
    ({"fraction": -0.1}, "trusted.fraction: got -0.1"),
    ({"fraction": float("nan")}, "trusted.fraction: got nan"),
    ({"fraction": 0.1, "ids": "x.txt"}, "lists the trusted examples and trusted.fraction=0.1 has"),
])  # fmt: skip
def test_settings_that_cannot_work(keys, message):
    with pytest.raises(UserError, match=message):
        trusted_set.validate(trusted_config(**keys))
    trusted_set.validate(trusted_config())


# ---- Given labels of trusted examples.


def test_given_labels_of_what_is_taken_out_of_the_training_set():
    """Those that the noise has left them; where no true label is known, nobody checked the given one."""
    source = small(labels=[1, 2, 0, 1, 0, 2], clean=[0, 1, 2, UNKNOWN, 0, 2])
    _, trusted = trusted_set.split_trusted(source, trusted_config(per_class=1))
    by_id = dict(zip(source.train.ids.tolist(), source.train.labels.tolist(), strict=True))
    assert trusted.given_labels.tolist() == [by_id[i] for i in trusted.ids] and (trusted.given_labels >= 0).all()


def test_given_labels_of_a_list_and_of_what_is_in_both_lists(tmp_path):
    """Of b.png the training list has a label of its own; a.png has one in the trusted list, which counts first."""
    for number, name in enumerate(("a", "b", "c", "d", "e", "f")):
        image_trees.save(tmp_path / f"{name}.png", image_trees.picture(number))
    (tmp_path / "train.csv").write_text("path,label\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n")
    (tmp_path / "trusted.csv").write_text(
        "path,label,given_label\na.png,dog,dog\nb.png,cat,\ne.png,cat,dog\nf.png,dog,\n"
    )
    config = default.get_config()
    config.data.name, config.trusted.source = "image_csv", "separate"
    config.data.train, config.data.trusted = str(tmp_path / "train.csv"), str(tmp_path / "trusted.csv")
    train, trusted = trusted_set.split_trusted(sources.load(config.data), config.trusted)
    given = dict(zip(trusted.names.tolist(), trusted.given_labels.tolist(), strict=True))
    assert given == {"a.png": 1, "b.png": 1, "e.png": 1, "f.png": UNKNOWN} and len(train) == 2
    (tmp_path / "trusted.csv").write_text("path,label,given_label\ne.png,cat,bird\nf.png,dog,\n")
    with pytest.raises(UserError, match="label 'bird' is none of the 2 classes"):
        sources.load(config.data)


def test_given_labels_in_arrays(tmp_path):
    config = default.get_config().data
    config.name, config.train = "features", str(tmp_path / "own.npz")
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    arrays = {
        "features": rows,
        "labels": np.arange(6) % 2,
        "trusted_features": rows[:2],
        "trusted_labels": np.arange(2),
    }
    np.savez(config.train, **arrays, trusted_given_labels=np.array([1, -1]))
    assert sources.load(config).trusted.given_labels.tolist() == [1, UNKNOWN]
    np.savez(config.train, **arrays, trusted_given_labels=np.array([1]))
    with pytest.raises(UserError, match="trusted_given_labels: shape"):
        sources.load(config)


def test_a_class_that_is_not_trusted_is_named():
    """A mistyped label has a class of its own: where it is listed and what may have been meant."""
    names = ("Owl", "cat", "owl")
    source = small([0, 1, 1, 2, 2], trusted=[1, 2])
    source = dataclasses.replace(source, class_names=names, listed_at=("a.csv, line 7", "a.csv, line 2", ""))
    message = (
        r"has no example of class 'Owl' \(1 training example, the first in a.csv, line 7\), which is perhaps to be "
        "'owl'; expected at least one of each of the 3 classes"
    )
    with pytest.raises(UserError, match=message):
        trusted_set.split_trusted(source, trusted_config(source="separate"))


# ---- Trusted examples that are training examples too.


def joined_config(**keys):
    config = default.get_config()
    config.noise.kind, config.noise.rate = "uniform", 0.5
    config.update_from_flattened_dict({"trusted.per_class": 5, "trusted.holdout": 0.4, **keys})
    return config


def test_joined_examples_are_trained_on_with_their_true_labels():
    apart, together = (load_data(joined_config(**{"trusted.join": join})) for join in (False, True))
    n = len(apart.train)
    assert len(together.train) == n + 30, "three of five of each class; two are held out"
    added = together.train.take(np.arange(n, n + 30))
    np.testing.assert_array_equal(together.train.take(np.arange(n)).ids, apart.train.ids)
    np.testing.assert_array_equal(added.ids, together.trusted.ids)
    np.testing.assert_array_equal(added.images, together.trusted.images)
    np.testing.assert_array_equal(added.labels, added.clean_labels)
    assert not set(together.train.ids) & set(together.held_out.ids)
    assert len(set(together.train.ids)) == len(together.train)
    assert together.noise_report == apart.noise_report, "which is of the noisy ones"
    part = load_data(joined_config(**{"trusted.join": True, "data.train_size": 100}))
    assert len(part.train) == 100 + 30


def test_joined_files_are_read_from_both_places(tmp_path):
    for name, count in (("train", 12), ("trusted", 6)):
        for number in range(count):
            label = "ab"[number % 2]
            image_trees.save(tmp_path / name / label / f"{number}.png", image_trees.picture(number + 50 * (count == 6)))
    config = joined_config(**{"trusted.join": True, "trusted.holdout": 0.0, "noise.kind": "none"})
    config.data.name, config.data.train = "image_folder", str(tmp_path / "train")
    config.data.trusted, config.trusted.source = str(tmp_path / "trusted"), "separate"
    data = load_data(config)
    assert len(data.train) == 18 and len(set(data.train.ids)) == 18
    assert (data.train.clean_labels == UNKNOWN).all(), "as those of the others"
    for rows in (np.arange(18), np.array([17, 0, 12, 11])):
        shown = list(data.train.take(rows).originals(range(len(rows))))
        wanted = [next(one.originals([row])) for row in rows for one, row in [of_either(data, row)]]
        for image, other in zip(shown, wanted, strict=True):
            np.testing.assert_array_equal(image, other)


def of_either(data, row):
    """The split with the image, and its row there."""
    if row >= 12:
        return data.trusted, row - 12
    return dataclasses.replace(data.train, images=data.train.images.parts[0]), row


def test_arrays_and_files_cannot_be_joined():
    files = make_split(FileImages(np.array(["a"], object)), [0])
    array = make_split(np.zeros((1, 8, 8, 3), np.uint8), [0])
    with pytest.raises(UserError, match=r"trusted.join: the images of the training set are arrays of \(8, 8, 3\) and"):
        joined(array, files)
