import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from ieg_jax import files
from ieg_jax.audit import noise_model
from ieg_jax.audit import quality as label_quality
from ieg_jax.audit.measures import binned, calibration_error
from ieg_jax.audit.quality import estimate
from tests.audit.draws import BY_CLASS, UNIFORM, depends_on_the_image, draw

CERTAIN = np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


def holds(quality, truth):
    low, high = quality.noise_interval
    return low <= truth <= high


def test_suggestions_are_what_else_it_could_be():
    probabilities, true, given = draw(5_000, UNIFORM)
    found = estimate(probabilities, given)
    assert (found.suggested != given).all()
    wrong = given != true
    assert (found.suggested[wrong] == true[wrong]).mean() > 0.8
    assert (found.right + found.confidence <= 1 + 1e-6).all()
    assert np.abs(found.confidence - (1 - found.right)).max() > 0.1, "with four classes there are others"


def test_the_interval_by_the_triangle_of_labels():
    """The network disagrees with 3 of 10 labels, and is wrong on 1 of 4 held-out examples of each class: of at most
    E by Clopper and Pearson, so the noise rate is 0.3 ± E."""
    labels = CERTAIN.argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    true = np.repeat([0, 1, 2], 40)
    predicted = true.copy()
    predicted[::4] = (predicted[::4] + 1) % 3
    found = estimate(CERTAIN * 0.94 + 0.02, labels, np.eye(3)[predicted] * 0.94 + 0.02, true)
    most = binomtest(30, 120).proportion_ci(0.95, "exact").high
    # The weights of the classes differ a little, as the noise model has it.
    assert found.noise_interval == (pytest.approx(max(0, 0.3 - most), abs=0.02), pytest.approx(0.3 + most, abs=0.02))
    assert (found.basis, found.num_held_out, found.num_pairs) == ("held_out", 120, 0)
    assert found.held_out_accuracy == pytest.approx(0.75, abs=0.01) and found.reliability == ()


def test_a_class_without_held_out_examples_may_always_be_wrong():
    labels = CERTAIN.argmax(1)
    both = np.repeat([0, 1], 200)
    found = estimate(CERTAIN * 0.94 + 0.02, labels, np.eye(3)[both] * 0.94 + 0.02, both)
    assert found.noise_interval[1] > 0.29, "three of ten are of the third class"


def test_without_held_out_examples():
    probabilities, true, given = draw(5_000, UNIFORM)
    found = estimate(probabilities, given)
    disagrees = (probabilities.argmax(1) != given).mean()
    assert found.noise_interval == (0.0, pytest.approx(min(1, 3 * disagrees))) and found.basis == "nothing"
    assert holds(found, (given != true).mean()) and found.held_out_accuracy is None


@pytest.mark.parametrize("share, n", [(0.0, 10), (0.3, 10), (1.0, 7), (0.25, 120)])
def test_clopper_pearson(share, n):
    interval = binomtest(round(share * n), n).proportion_ci(0.95, "exact")
    assert label_quality.clopper_pearson(share, n) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_class_weights_by_hand():
    """Two held out of each class; the first is thrice as common. One is of no class."""
    found = label_quality.class_weights(np.array([0, 0, 1, 1, -1]), np.array([0.75, 0.25]))
    np.testing.assert_allclose(found, [1.5, 1.5, 0.5, 0.5, 1])


def test_noise_that_depends_on_the_image():
    """The noise model alone is far off and its interval holds the truth; with pairs it is right, and narrow."""
    probabilities, true, given = depends_on_the_image(10_000)
    held_out, held_out_true, held_out_given = depends_on_the_image(200, 1)
    truth, wrong = (given != true).mean(), given != true
    alone = estimate(probabilities, given, held_out, held_out_true)
    paired = estimate(probabilities, given, held_out, held_out_true, held_out_given)
    assert (alone.basis, paired.basis, paired.num_pairs) == ("held_out", "pairs", 200)
    assert holds(alone, truth) and holds(paired, truth)
    widths = [np.diff(found.noise_interval)[0] for found in (alone, paired)]
    assert widths[1] < 0.6 * widths[0]
    errors = [calibration_error(binned(found.right, ~wrong)) for found in (alone, paired)]
    assert errors[1] < 0.04 < errors[0]
    assert calibration_error(paired.reliability) < 0.15 and sum(w for *_, w in paired.reliability) > 190
    np.testing.assert_allclose(paired.transition.sum(1), 1)
    assert 1 - paired.right.mean() == pytest.approx(paired.noise_rate, abs=1e-6)


def test_unknown_given_labels_are_no_pairs_and_some_are_of_no_class():
    probabilities, true, given = draw(3_000, UNIFORM)
    held_out, held_out_true, held_out_given = draw(100, UNIFORM, 1)
    nothing = estimate(probabilities, given, held_out, held_out_true, np.full(100, -1))
    np.testing.assert_array_equal(nothing.right, estimate(probabilities, given, held_out, held_out_true).right)
    found = estimate(probabilities, given, held_out, np.where(np.arange(100) < 5, -1, held_out_true), held_out_given)
    assert found.num_pairs == 100 and holds(found, (given != true).mean() + 0.03)


@pytest.mark.parametrize("transition", [UNIFORM, BY_CLASS])
@pytest.mark.parametrize("network", ["honest", "too sure", "not sure", "memorised"])
@pytest.mark.parametrize("known", ["nothing", "held out", "pairs"])
def test_the_interval_holds_the_truth_or_there_is_an_alarm(transition, network, known):
    temperature = {"too sure": 3.0, "not sure": 0.4}.get(network, 1.0)
    missed = 0
    for seed in range(4):
        probabilities, true, given = draw(1_500, transition, seed, temperature)
        held_out = draw(60, transition, 100 + seed, temperature)
        if network == "memorised":
            learnt = np.random.default_rng(seed).random(len(given)) < 0.95
            probabilities[learnt] = 0.04 * probabilities[learnt] + 0.96 * np.eye(4)[given[learnt]]
        evidence = {"nothing": (), "held out": held_out[:2], "pairs": held_out}[known]
        found = estimate(probabilities, given, *evidence)
        missed += not (holds(found, (given != true).mean()) or found.alarms)
        if network == "memorised":
            assert any("learnt" in alarm or "reproduces" in alarm for alarm in found.alarms)
        elif known != "nothing":
            assert not found.alarms, found.alarms
    assert missed <= 1


def test_without_a_wrong_pair_there_may_be_no_wrong_label():
    probabilities, true, _ = draw(2_000, np.eye(4))
    held_out, held_out_true, held_out_given = draw(60, np.eye(4), 1)
    found = estimate(probabilities, true, held_out, held_out_true, held_out_given)
    assert found.noise_interval[0] == 0 and found.noise_rate < 0.03


def test_a_network_that_guesses():
    rng = np.random.default_rng(0)
    guesses, labels = rng.dirichlet(np.ones(4), 400), rng.integers(0, 4, 400)
    found = estimate(guesses[:360], labels[:360], guesses[360:], labels[360:])
    assert "hardly better than guessing" in found.alarms[0] and "guessing would give 25%" in found.alarms[0]


def test_few_held_out_examples_do_not_show_that_a_network_guesses():
    """Two of three right, of three classes: by chance one time in four, but half way to being always right."""
    probabilities, true, _ = draw(300, np.eye(3))
    held_out = np.eye(3)[[0, 1, 1]] * 0.8 + 0.1
    for labels, alarms in (([0, 1, 2], 0), ([0, 2, 2], 1)):
        found = estimate(probabilities, true, held_out, np.array(labels))
        assert sum("guessing" in alarm for alarm in found.alarms) == alarms


def test_a_class_that_another_swallows():
    probabilities, _, given = draw(2_000, UNIFORM)
    probabilities = probabilities + 0
    probabilities[:, 3] += probabilities[:, 1]
    probabilities[:, 1] = 0
    found = estimate(probabilities, given, class_names=["ant", "bee", "cat", "dog"])
    alarm = next(alarm for alarm in found.alarms if "bee" in alarm)
    assert "the class bee is never predicted" in alarm and "dog is predicted in its place" in alarm
    sure = np.eye(4)[[1] * 20] * 0.9 + 0.025  # held-out examples of it are recognised
    assert not any("bee" in alarm for alarm in estimate(probabilities, given, sure, np.ones(20, int)).alarms)


def test_where_no_label_seems_wrong_the_order_is_still_that_of_the_network():
    """The network says what was given, for all but a few with some doubt."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 2_000)
    doubt = rng.permutation(np.linspace(0.02, 0.3, len(labels)))
    probabilities = np.where(np.eye(4, dtype=bool)[labels], 1 - doubt[:, None], doubt[:, None] / 3)
    found = estimate(probabilities, labels)
    assert found.noise_rate < 1e-3 and spearmanr(found.right, doubt)[0] < -0.99


def test_a_class_without_examples_and_one_that_is_certain():
    probabilities = np.array([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0.9, 0.1, 0]])
    found = estimate(probabilities, np.array([0, 1, 0, 0]))
    assert np.isfinite(found.right).all() and (found.right > 0.9).all()
    np.testing.assert_allclose(found.transition.sum(1), 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones((3, 2)) / 2, np.array([0, 1])), r"shape \(3, 2\) and labels \(2,\)"),
        ((np.ones((2, 2)) / 2, np.array([0, 2])), "0 to 2, expected 0 to 1"),
        ((np.ones((0, 2)), np.array([], int)), "n > 0"),
        ((np.array([[2.0, -1.0]]), np.array([0])), "from -1.0 to 2.0, expected probabilities"),
        ((np.ones((2, 2)) / 2, np.array([0, 1]), np.ones((1, 2)) / 2, np.array([2])), "2 to 2, expected -1 to 1"),
        ((np.ones((2, 2)) / 2, np.array([0, 1]), np.ones((1, 2)) / 2, np.array([1]), np.array([0, 1])), "given: shape"),
    ],
)
def test_what_cannot_be_estimated(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(*arguments)


@pytest.mark.parametrize("pairs", [0, 300])
def test_blocks_and_files_say_what_one_block_in_memory_says(pairs, monkeypatch):
    probabilities, true, given = draw(4_000, BY_CLASS, seed=1)
    probabilities = probabilities.astype(np.float32)
    known = (probabilities[:pairs], true[:pairs], given[:pairs]) if pairs else ()
    whole = estimate(probabilities, given, *known)
    monkeypatch.setattr(noise_model, "AT_ONCE", 4 * 333)
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    stored = files.scratch(probabilities.shape, np.float32)
    stored[:] = probabilities
    assert isinstance(stored, np.memmap)
    blocks = estimate(stored, given, *known)
    assert whole.by_class, "so that what is put in order is in a file too"
    for name in ("right", "confidence", "transition", "noise_rate", "noise_interval", "reliability"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(blocks.suggested, whole.suggested)
    assert blocks.alarms == whole.alarms and blocks.basis == whole.basis


def test_memory_does_not_grow_with_examples_times_classes(monkeypatch):
    """Beside the probabilities of 60,000 examples of 300 classes, 69 MiB, there is less than a third of that."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 300, 60_000)
    probabilities = rng.random((60_000, 300), np.float32)
    probabilities[np.arange(60_000), given] += 300
    probabilities /= probabilities.sum(1, keepdims=True)
    monkeypatch.setattr(noise_model, "AT_ONCE", 100_000)
    monkeypatch.setattr(noise_model, "NUMBERS", 100_000)
    tracemalloc.start()
    estimate(probabilities, given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < probabilities.nbytes / 3


def test_counts_by_hand():
    counts = np.zeros((3, 3))
    others = np.array([[0, 0.25, 0.75], [0.5, 0.5, 0], [0, 1.0, 0]])
    label_quality._count(counts, np.array([0, 2, 0]), np.array([0.6, 0.9, 0.5]), others)
    np.testing.assert_allclose(counts, [[1.1, 0, 0.05], [0.1 + 0.5, 0, 0.05], [0.3, 0, 0.9]])
