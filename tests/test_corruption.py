import numpy as np
import pytest
from scipy import stats

from configs import default
from ieg_jax.data import corruption
from ieg_jax.data.sources import Split


def clean_split(n, classes):
    labels = (np.arange(n) % classes).astype(np.int32)
    return Split(np.zeros((n, 1, 1, 1), np.uint8), labels, labels, np.arange(n, dtype=np.int64))


def noise_config(rate, seed=0, kind="uniform"):
    config = default.get_config().noise
    config.kind, config.rate, config.seed = kind, rate, seed
    return config


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_effective_rate_and_uniformity(rate):
    n, classes = 50_000, 10
    noisy = corruption.corrupt(clean_split(n, classes), noise_config(rate), classes)
    wrong = int((noisy.labels != noisy.clean_labels).sum())
    expected = rate * (classes - 1) / classes
    if rate == 0:
        assert wrong == 0
        return
    assert stats.binomtest(wrong, n, expected).pvalue > 1e-3
    report = corruption.report(noisy, noise_config(rate), classes)
    assert report["rate_effective"] == pytest.approx(wrong / n)
    confusion = np.array(report["confusion"])
    assert confusion.sum() == n
    off_diagonal = confusion[~np.eye(classes, dtype=bool)]
    assert stats.chisquare(off_diagonal).pvalue > 1e-3, "each wrong label is as likely as another"


def test_a_label_depends_on_seed_and_id_alone():
    split = clean_split(1000, 10)
    labels = corruption.corrupt(split, noise_config(0.5), 10).labels
    rows = np.random.default_rng(0).permutation(1000)[:300]
    np.testing.assert_array_equal(corruption.corrupt(split.take(rows), noise_config(0.5), 10).labels, labels[rows])
    assert (corruption.corrupt(split, noise_config(0.5, seed=1), 10).labels != labels).mean() > 0.2


def test_the_stream_is_the_published_one():
    """Philox with numpy's SeedSequence: numbers worked out from numpy alone, so that noise never changes silently."""
    raw = np.random.Philox(np.random.SeedSequence([3, 1])).random_raw(5)
    np.testing.assert_array_equal(
        corruption.uniforms(3, 1, np.array([4, 0])),
        [(int(raw[4]) >> 11) / 2**53, (int(raw[0]) >> 11) / 2**53],
    )


def test_higher_rates_keep_the_lower_rates_noise():
    """The examples corrupted at 20 % are among those corrupted at 80 %, with the same label."""
    split = clean_split(2000, 10)
    low, high = (corruption.corrupt(split, noise_config(rate), 10).labels for rate in (0.2, 0.8))
    changed = low != split.labels
    assert changed.any()
    np.testing.assert_array_equal(low[changed], high[changed])


def test_none_leaves_labels_and_reports_what_is_known():
    split = clean_split(6, 3)
    split.clean_labels[:3] = [-1, 2, -1]
    same = corruption.corrupt(split, noise_config(0.9, kind="none"), 3)
    assert same is split
    report = corruption.report(same, noise_config(0.9, kind="none"), 3)
    assert report["num_known"] == 4
    split.clean_labels[:] = -1
    assert corruption.report(split, noise_config(0.9, kind="none"), 3)["rate_effective"] is None
