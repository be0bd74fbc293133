"""The predictions of a training set in parts."""

import numpy as np
import pytest

from ieg_jax.audit import predicted
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError

SPLIT = make_split(np.arange(1_050, dtype=np.float32).reshape(1_050, 1, 1, 1), np.zeros(1_050))


def predict(split, view=None):
    """Of two classes; each view is a little surer."""
    first = (split.images[:, 0, 0, 0] % 7 + (view or 0) / 10) / 8
    return np.stack([first, 1 - first], 1).astype(np.float32)


@pytest.fixture(autouse=True)
def pieces_of_a_hundred(monkeypatch):
    monkeypatch.setattr(predicted, "AT_ONCE", 100)


@pytest.mark.parametrize("total", [1, 2, 3, 11, 16])
def test_each_piece_is_in_one_part(total):
    starts = [start for number in range(1, total + 1) for start in predicted.rows_of(1_050, (number, total))]
    assert starts == list(range(0, 1_050, 100))


def test_parts_are_what_one_process_makes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "several").mkdir()
    one = predicted.training_set(tmp_path / "one", predict, SPLIT, 2, 2)
    rows = [predicted.share(tmp_path / "several", predict, SPLIT, 2, (number, 3)) for number in (3, 1)]
    assert rows == [slice(700, 1_050), slice(0, 300)]
    made = []

    def counted(split, view=None):
        made.append(split.ids[0])
        return predict(split, view)

    several = predicted.training_set(tmp_path / "several", counted, SPLIT, 2, 2)
    assert sorted(set(made)) == [300, 400, 500, 600], "what no part has made"
    for mine, other in zip(several, one, strict=True):
        np.testing.assert_array_equal(mine, other)
    for file in sorted((tmp_path / "one" / "parts").iterdir()):
        assert file.read_bytes() == (tmp_path / "several" / "parts" / file.name).read_bytes()
    np.testing.assert_array_equal(one[0], predict(SPLIT))


def test_a_damaged_piece_is_made_anew(tmp_path):
    first = predicted.training_set(tmp_path, predict, SPLIT, 0, 2)
    (tmp_path / "parts" / "000000100.npz").write_bytes(b"PK")
    (tmp_path / "parts" / "000000200.npz").write_bytes((tmp_path / "parts" / "000001000.npz").read_bytes())
    again = predicted.training_set(tmp_path, predict, SPLIT, 0, 2)
    np.testing.assert_array_equal(first[0], again[0])
    assert len(predicted._read(tmp_path, 200, (100, 2))["probabilities"]) == 100


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3/5"])
def test_what_is_no_part(text):
    with pytest.raises(UserError, match=f"--part={text}: expected i/n"):
        predicted.parse_part(text)
    assert predicted.parse_part("3/16") == (3, 16)
