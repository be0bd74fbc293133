"""A checked sample: read, judged by itself, and as pairs of an audit."""

import types

import numpy as np
import pytest
from scipy.stats import binomtest

from ieg_jax.audit import sample
from ieg_jax.audit.quality import estimate
from ieg_jax.errors import UserError
from tests.audit.draws import depends_on_the_image

NAMES = ["ant", "bee, wild", "cat"]
IDS = np.array([7, 3, 12, 5])


def write(folder, *lines, header="id,answer,label,weight"):
    (folder / "sample.csv").write_text("\n".join([header, *lines]), "utf-8-sig")
    return str(folder / "sample.csv")


def test_answers_are_read(tmp_path):
    file = write(tmp_path, "12,right,,1", '3,wrong,"bee, wild",2.5', "5,wrong,,1")
    found = sample.read(file, IDS, NAMES)
    assert found.rows.tolist() == [2, 1, 3] and found.labels.tolist() == [-1, 1, -1]
    assert found.right.tolist() == [True, False, False] and found.weights.tolist() == [1, 2.5, 1]
    labels = np.array([0, 0, 2, 1])
    probabilities = np.eye(3)[[0, 1, 2, 0]]
    predicted, true, given, weights = sample.as_evidence(found, labels, probabilities)
    np.testing.assert_array_equal(predicted, probabilities[[2, 1, 3]])
    assert (true.tolist(), given.tolist(), weights.tolist()) == ([2, 1, -1], [2, 0, 1], [1, 2.5, 1])


def test_what_a_sample_says_by_itself():
    """3 of 10 are wrong; of two of these the true label was told, and one was suggested."""
    answers = sample.Answers(np.arange(10), np.array([1, 2, -1] + [-1] * 7), np.arange(10) > 2, np.ones(10))
    quality = types.SimpleNamespace(suggested=np.array([1, 1, 0] + [0] * 7))
    found = sample.report(answers, quality)
    exact = binomtest(3, 10).proportion_ci(0.95, "exact")
    assert found.pop("noise_interval") == [pytest.approx(exact.low), pytest.approx(exact.high)]
    assert found == {"checked": 10, "noise_rate": pytest.approx(0.3), "relabelled": 2, "suggested_right": 0.5}


@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_a_sample_of_what_was_learnt_calibrates_it(kind):
    """Of a network that has learnt two labels in three by heart; drawn from its own examples, the sample shows that."""
    probabilities, true, given = depends_on_the_image(6_000)
    rng = np.random.default_rng(0)
    learnt = rng.random(6_000) < 0.66
    probabilities[learnt] = 0.2 * probabilities[learnt] + 0.8 * np.eye(4)[given[learnt]]
    before = estimate(probabilities, given)
    if kind == "random":
        rows, weights = rng.permutation(6_000)[:200], np.ones(200)
    else:
        stratum = np.minimum((before.right * 10).astype(int), 9)
        drawn = [rng.permutation(np.flatnonzero(stratum == number))[:20] for number in range(10)]
        weights = np.concatenate(
            [np.full(len(one), (stratum == n).sum() / max(1, len(one))) for n, one in enumerate(drawn)]
        )
        rows = np.concatenate(drawn)
    after = estimate(probabilities, given, probabilities[rows], true[rows], given[rows], weights)
    truth = (given != true).mean()
    assert after.noise_interval[0] < truth < after.noise_interval[1] and after.basis == "pairs"
    assert abs(after.noise_rate - truth) < 0.06 < abs(before.noise_rate - truth) and not after.alarms


@pytest.mark.parametrize(
    "lines, header, message",
    [
        ([], "id,mark,label", "columns .*, expected id, answer, label, weight"),
        (["4,right,,1"], None, "line 2: id '4' is no training example's"),
        (["3,maybe,,1"], None, "answer 'maybe', expected right or wrong"),
        (["3,wrong,dog,1"], None, "label 'dog' is no class"),
        (["3,wrong,,nan"], None, "weight 'nan', expected a number above 0"),
        ([], None, "holds no answers"),
    ],
)
def test_what_cannot_be_used(tmp_path, lines, header, message):
    file = write(tmp_path, *lines, **({"header": header} if header else {}))
    with pytest.raises(UserError, match=message):
        sample.read(file, IDS, NAMES)
    with pytest.raises(UserError, match="cannot be read"):
        sample.read(str(tmp_path / "none.csv"), IDS, NAMES)
