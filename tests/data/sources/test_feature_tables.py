"""Features in tables: Parquet, and an array with a list beside it."""

import csv
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from configs import features as features_config
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import feature_tables
from ieg_jax.data.sources.arrays import read_features
from ieg_jax.errors import UserError

X = np.arange(32, dtype=np.float32).reshape(8, 4) ** 1.5
ROWS = {
    "id": [f"doc-{number}" for number in range(8)],
    "label": ["owl", "bat", "owl", "bat", "owl", "bat", "bat", "owl"],
    "clean_label": ["owl", "bat", "", "bat", "bat", "", "", ""],
    "given_label": ["", "", "", "", "", "", "owl", "owl"],
    "split": ["train", "train", "train", "train", "train", "train", "trusted", "trusted"],
    "text": ["hoots", "flies", "", "sleeps", "x", "y", "z", "w"],
}


def parquet(folder, rows=ROWS, **columns):
    pq.write_table(pa.table(rows | columns | {"features": list(X)}), folder / "own.parquet")
    return folder / "own.parquet"


def array(folder, rows=ROWS, **columns):
    np.save(folder / "own.npy", X)
    with (folder / "own.csv").open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(rows | columns)
        writer.writerows(zip(*(rows | columns).values(), strict=True))
    return folder / "own.npy"


def config(file, **places):
    found = features_config.get_config()
    found.data.train, found.trusted.holdout = str(file), 0.0
    for name, place in places.items():
        found.data[name] = str(place)
    return found


@pytest.mark.parametrize("write", [parquet, array])
def test_what_a_table_says(tmp_path, write):
    data = load_data(config(write(tmp_path)))
    assert data.class_names == ("bat", "owl")
    np.testing.assert_array_equal(data.train.labels, [1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(data.train.clean_labels, [1, 0, -1, 0, 0, -1])
    assert data.train.names.tolist() == ROWS["id"][:6] and data.train.previews.tolist() == ROWS["text"][:6]
    np.testing.assert_allclose(data.train.images[:, 0, 0], (X[:6] - X[:6].mean(0)) / X[:6].std(0), rtol=1e-5)
    by_name = {name: k for k, name in enumerate(data.trusted.names)}
    assert data.trusted.labels[by_name["doc-6"]] == 0 and data.trusted.given_labels[by_name["doc-6"]] == 1


def test_trusted_examples_of_another_table_are_taken_out_of_training_by_their_ids(tmp_path):
    whole = {name: [cells[k] for k in range(8)] for name, cells in ROWS.items() if name not in ("split", "given_label")}
    file = parquet(tmp_path, whole)
    checked = {"id": ["doc-0", "doc-1"], "label": ["bat", "owl"], "features": list(X[:2])}
    pq.write_table(pa.table(checked), tmp_path / "checked.parquet")
    data = load_data(config(file, trusted=tmp_path / "checked.parquet"))
    assert data.train.names.tolist() == ROWS["id"][2:]
    # What the training list says of them is the label that they were given.
    assert sorted(zip(data.trusted.names, data.trusted.labels, data.trusted.given_labels, strict=True)) == [
        ("doc-0", 0, 1), ("doc-1", 1, 0),
    ]  # fmt: skip


def test_the_path_of_an_image_is_a_preview(tmp_path):
    rows = {name: ROWS[name] for name in ("label", "split")} | {"path": [f"img/{k}.png" for k in range(8)]}
    train = load_data(config(parquet(tmp_path, rows))).train
    assert train.previews[1] == tmp_path / "img/1.png" and train.names[1] == "img/1.png"


@pytest.mark.parametrize("write", [parquet, array])
def test_a_rewritten_table_is_one_to_train_on(tmp_path, write):
    file = write(tmp_path)
    out = tmp_path / f"cleaned{file.suffix}"
    feature_tables.rewrite(file, out, {0: "bat", 1: "bat", 3: "bat", 4: "owl", 5: "bat"}, [2])
    data = load_data(config(out))
    assert data.train.names.tolist() == [f"doc-{k}" for k in (0, 1, 3, 4, 5)]
    np.testing.assert_array_equal(data.train.labels, [0, 0, 0, 1, 0])
    assert len(data.trusted) == 2
    kept = np.delete(X, 2, 0)
    np.testing.assert_array_equal(feature_tables.vectors(out), kept)
    if write is array:
        with (tmp_path / "cleaned.csv").open() as text:
            assert [row["given_label"] for row in csv.DictReader(text)][:2] == ["owl", "bat"]


def test_whole_numbers_stay_numbers(tmp_path):
    file = parquet(tmp_path, label=[0, 1, 0, 1, 0, 1, 1, 0], clean_label=[0, 1, 0, 1, 0, 1, 1, 0], given_label=[0] * 8)
    feature_tables.rewrite(file, tmp_path / "cleaned.parquet", {0: "1"}, [])
    again = pq.read_table(tmp_path / "cleaned.parquet")["label"]
    assert again.to_pylist() == [1, 1, 0, 1, 0, 1, 1, 0] and again.type == pa.int64()


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_features_to_predict(tmp_path, suffix):
    file = parquet(tmp_path) if suffix == ".parquet" else array(tmp_path)
    split = read_features(config(file).data, str(file))
    np.testing.assert_allclose(split.images[:, 0, 0], (X - X[:6].mean(0)) / X[:6].std(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: np.save(folder / "own.npy", X[:5]), "5 vectors, but 8 rows in .*own.csv; expected as many"),
        (lambda folder: np.save(folder / "own.npy", X[:, 0]), r"shape \(6,\), .*expected floats"),
        (lambda folder: (folder / "own.csv").unlink(), "0 lists of its labels beside it, expected one, own.csv or"),
        (lambda folder: (folder / "own.pq").write_text(""), "2 lists of its labels beside it"),
        (lambda folder: (folder / "own.npy").write_bytes(b"no array"), "cannot be read as .npy"),
        (lambda folder: (folder / "own.npy").unlink(), "cannot be read as .npy"),
        (lambda folder: array(folder, id=["a"] * 8), "own.csv, line 3: id 'a' for the second time in train"),
        (lambda folder: array(folder, label=["owl", "bta", *["owl"] * 6], split=["train"] * 8, clean_label=[""] * 8),
         "brings no trusted set"),
        (lambda folder: array(folder, label=["owl"] * 8, clean_label=[""] * 8), "label|expected at least two"),
        (lambda folder: array(folder, split=["test"] * 8), "no row with split 'train'"),
        (lambda folder: array(folder, split=["tarin"] * 8), "line 2: split 'tarin', expected one of"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table(tmp_path, change, message):
    file = array(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load_data(config(file))


def test_what_is_wrong_with_a_column_of_vectors(tmp_path):
    file = parquet(tmp_path)
    for column, message in (
        (X[:, 0], "of type float, expected lists of floats"),
        ([*X[:7], X[7][:2]], "rows of different lengths"),
        ([*X[:7], None], "empty rows"),
        ([["a"]] * 8, "expected lists of floats"),
    ):
        pq.write_table(pa.table(ROWS | {"features": column}), file)
        with pytest.raises(UserError, match=message):
            feature_tables.vectors(file)
    pq.write_table(pa.table(ROWS), file)
    with pytest.raises(UserError, match="no column 'features'"):
        feature_tables.vectors(file)


def test_npz_takes_no_further_files(tmp_path):
    np.savez(tmp_path / "own.npz", features=X, labels=np.arange(8) % 2)
    with pytest.raises(UserError, match="data.trusted are set, but an .npz file"):
        load_data(config(tmp_path / "own.npz", trusted=array(tmp_path)))


def test_class_names_of_an_npz_file(tmp_path):
    arrays = {"features": X, "labels": np.arange(8) % 2, "trusted_features": X[:2], "trusted_labels": np.arange(2)}
    np.savez(tmp_path / "own.npz", **arrays, class_names=np.array(["owl", "bat"]))
    assert load_data(config(tmp_path / "own.npz")).class_names == ("owl", "bat")
    np.savez(tmp_path / "own.npz", **arrays, class_names=np.array(["owl"]))
    with pytest.raises(UserError, match="expected at least 2 texts"):
        load_data(config(pathlib.Path(tmp_path / "own.npz")))
