"""SSR: votes by hand and of all, relabelling and selection at the end of an epoch."""

import types

import jax
import numpy as np
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import ssr


def test_all_neighbours_vote_for_the_majority():
    """And by the size of the classes, all are alike: nobody is left out where k is more than there are examples."""
    rng = np.random.default_rng(0)
    label = np.array([0] * 51 + [1] * 50 + [2] * 49)
    features = rng.standard_normal((150, 5))
    found = ssr.counted(features, label, 3, 150)
    np.testing.assert_array_equal(found, np.tile([51, 50, 49], (150, 1)))
    assert (found.argmax(1) == 0).all()
    np.testing.assert_array_equal(ssr.votes(features, label, 3, 200), 1)


def test_equal_votes_are_equal_numbers():
    """Of 149 neighbours one is missing, which is of the voter's own class or not; 49 · (1/49) is not 1."""
    label = np.array([0] * 51 + [1] * 50 + [2] * 49)
    found = ssr.votes(np.random.default_rng(0).standard_normal((150, 5)), label, 3, 149)
    assert ((found == 1).sum(1) == 2).all(), "the two classes of which all vote"


def test_votes_by_hand():
    """On a line of directions: the two nearest of each are itself and its twin; rare classes count for more."""
    angles = np.array([0.0, 0.01, 1.0, 1.01, 2.0, 2.01])
    features = 3 * np.stack([np.cos(angles), np.sin(angles)], 1)
    label = np.array([0, 0, 0, 1, 1, 1])
    found = ssr.votes(features, label, 2, 2)
    np.testing.assert_allclose(found, [[1, 0], [1, 0], [1, 1], [1, 1], [0, 1], [0, 1]])
    skewed = np.array([0, 0, 0, 1, 0, 0])  # five of 0, one of 1: at the pair in the middle 1/5 against 1
    np.testing.assert_allclose(ssr.votes(features, skewed, 2, 2)[2], [1 / 5, 1])


def test_votes_do_not_depend_on_how_many_are_searched_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    features, label = rng.standard_normal((40, 5)), rng.integers(3, size=40)
    whole = ssr.votes(features, label, 3, 7)
    monkeypatch.setattr(ssr, "PAIRS_AT_ONCE", 9 * 40)  # blocks of nine, and four are left
    np.testing.assert_array_equal(ssr.votes(features, label, 3, 7), whole)
    near = np.argsort(-(features @ features.T) / np.linalg.norm(features, axis=1))[:, :7]
    counts = np.array([np.bincount(each, minlength=3) for each in label[near]]) / np.bincount(label)
    np.testing.assert_allclose(whole, counts / counts.max(1, keepdims=True))


def test_the_end_of_an_epoch():
    _, method, state, _ = make("ssr", **{"method.neighbours": 3, "method.relabel_threshold": 0.8})
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    features = np.eye(2)[np.array([0, 0, 0, 0, 1, 1, 1, 1])] + 0.01 * np.arange(8)[:, None] * [[1, -1]]
    p = np.full((8, CLASSES), 0.1)
    p[np.arange(8), labels] = 0.7  # nobody is sure
    p[3] = np.eye(CLASSES)[0] * 0.9 + 0.025  # but of the fourth, of class 0
    look = types.SimpleNamespace(epoch=0, labels=labels, probabilities=lambda: p[None], features=lambda: features[None])
    assert method.on_epoch(state, look) == (state, None), "the first epoch is plain"
    look.epoch = 1
    changed, rows = method.on_epoch(state, look)
    assert changed.method["label"].tolist() == [-1, -1, -1, 0, -1, -1, -1, -1]
    assert rows["main"].tolist() == [0, 1, 2, 3, 4, 5, 6], "the last one's neighbours are of the other class"


def test_a_changed_label_is_learned():
    _, method, state, _ = make("ssr")
    batch = make_batch()
    changed = np.full(1024, -1, np.int32)
    changed[batch["row"][4]] = 2
    supervision = method.supervise(state.replace(method={"label": changed}), batch, jax.random.key(0))
    wanted = np.eye(CLASSES)[batch["label"]]
    wanted[4] = np.eye(CLASSES)[2]
    np.testing.assert_array_equal(supervision.prepared[0], wanted)
