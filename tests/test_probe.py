import dataclasses

import numpy as np
import pytest

from configs import default
from ieg_jax.data import probe, sources
from ieg_jax.data.sources import Source, Split
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


def test_taken_out_of_the_training_set_and_interleaved(digits):
    train, trusted = probe.split_trusted(digits, trusted_config())
    assert trusted.labels.tolist() == list(range(10)) * 3
    assert not set(train.ids) & set(trusted.ids)
    assert set(train.ids) | set(trusted.ids) == set(digits.train.ids)
    by_id = dict(zip(digits.train.ids, digits.train.clean_labels, strict=True))
    assert [by_id[i] for i in trusted.ids] == trusted.labels.tolist()


def test_seed(digits):
    first, again, other = (probe.split_trusted(digits, trusted_config(seed=seed))[1].ids.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_labels_are_true_even_where_the_given_ones_are_not(digits):
    wrong = dataclasses.replace(digits.train, labels=(digits.train.labels + 1) % 10)
    _, trusted = probe.split_trusted(dataclasses.replace(digits, train=wrong), trusted_config())
    np.testing.assert_array_equal(trusted.labels, trusted.clean_labels)
    assert np.bincount(trusted.labels).tolist() == [3] * 10


def small(labels, clean=None, trusted=None):
    def split(labels, clean):
        labels = np.asarray(labels, np.int32)
        return Split(
            np.zeros((len(labels), 2, 2, 1), np.uint8),
            labels,
            np.asarray(clean, np.int32),
            np.arange(len(labels)),
        )

    return Source(
        "small",
        3,
        split(labels, labels if clean is None else clean),
        None,
        trusted and split(trusted, trusted),
    )


def test_examples_of_unknown_label_are_never_trusted():
    _, trusted = probe.split_trusted(
        small([0, 1, 2, 0, 1, 2], clean=[0, -1, 2, -1, 1, -1]), trusted_config(per_class=1)
    )
    assert trusted.ids.tolist() == [0, 4, 2]


def test_a_separate_trusted_set():
    source = small([0, 1, 2], clean=[-1] * 3, trusted=[2, 0, 1, 0])
    train, trusted = probe.split_trusted(source, trusted_config(source="separate"))
    assert train is source.train
    assert trusted.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "source, keys, message",
    [
        (small([0, 1, 1, 2, 2]), {"per_class": 2}, "class 0 of small has only 1 training examples"),
        (small([0, 1, 1]), {"per_class": 1}, "class 2 of small has only 0"),
        (small([0, 1, 2], clean=[-1] * 3), {}, "no true label of small is known"),
        (small([0, 1, 2]), {"source": "separate"}, "brings no trusted set"),
        (small([0, 1, 2], trusted=[0, 2]), {"source": "separate"}, "has no example of class 1"),
        (small([0, 1, 2]), {"per_class": 1}, "leaves no training examples"),
    ],
)
def test_impossible_trusted_sets(source, keys, message):
    with pytest.raises(UserError, match=message):
        probe.split_trusted(source, trusted_config(**keys))
