import numpy as np
import pytest

from ieg_jax.data.load import load_data
from ieg_jax.errors import UserError


def write(file, rows):
    file.write_text("\n".join(["path,label,given_label,id", *(f"x,{label},0,{number}" for number, label in rows)]))
    return str(file)


def test_labels_and_examples_of_the_list(tiny_config, tmp_path):
    """The noise and the trusted set are those of the run that was audited; the list decides what is left and how."""
    before = load_data(tiny_config)
    kept = before.train.ids[::2]
    tiny_config.data.cleaned = write(tmp_path / "cleaned.csv", [(number, number % 10) for number in kept[::-1]])
    after = load_data(tiny_config)
    np.testing.assert_array_equal(after.train.ids, kept)
    np.testing.assert_array_equal(after.train.labels, kept % 10)
    np.testing.assert_array_equal(after.train.clean_labels, before.train.clean_labels[::2])
    np.testing.assert_array_equal(after.trusted.ids, before.trusted.ids)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([(10**6, 3)], "line 2: id '1000000' is none of the .* training examples"),
        ([("x", 3)], "line 2: id 'x' is none"),
        ([(None, "zebra")], "label 'zebra', expected one of 0, 1"),
        ([(None, 1), (None, 2)], "2 rows with 1 ids, expected each once"),
        ([], "0 rows with 0 ids"),
    ],
)
def test_lists_of_something_else(tiny_config, tmp_path, rows, message):
    known = int(load_data(tiny_config).train.ids[0])
    rows = [(known if number is None else number, label) for number, label in rows]
    tiny_config.data.cleaned = write(tmp_path / "cleaned.csv", rows)
    with pytest.raises(UserError, match=message):
        load_data(tiny_config)


def test_no_list(tiny_config, tmp_path):
    tiny_config.data.cleaned = str(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="no such file; expected cleaned.csv"):
        load_data(tiny_config)
