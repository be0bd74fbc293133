import csv
import subprocess
import sys

import joblib
import numpy as np
import pyarrow as pa
import pytest
import untrained
from PIL import Image
from pyarrow import parquet
from runs import ROOT, SMALL
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from configs import default
from ieg_jax import inference
from ieg_jax.data import images
from ieg_jax.errors import StorageError, UserError
from ieg_jax.inference.predictions import PredictionFile, Rows, predict
from ieg_jax.runtime.workdir import best_step
from ieg_jax.train.loop import train_and_evaluate

CLASSES = ("Süße, Äpfel", 'a "b"', "c\nd")
ODD_NAMES = ("a, b.png", 'say "x".png', "Übermut/ß.png", "two\nlines.png", "carriage\rreturn.png")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Work folder of 4 steps on digits, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    config = default.get_config()
    every = dict.fromkeys(("num_train", "log_every", "eval_every", "checkpoint_every"), 2) | {"num_train": 4}
    config.update_from_flattened_dict(SMALL | {f"{name}_steps": steps for name, steps in every.items()})
    config.log_every_epochs = 0.0
    config.method.name, config.trusted.per_class, config.mesh.data = "supervised", 2, 1
    train_and_evaluate(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """Exported weights of a network for 8×8 images of colours, whose evaluation takes the middle of an image."""
    folder = tmp_path_factory.mktemp("predict") / "colour"
    trained = untrained.trained((8, 8, 3), CLASSES, data__name="image_folder", augment__evaluation="center_crop(8)")
    inference.export(trained, folder)
    return trained, folder


def digits(count):
    return np.round(load_digits().images[:count] * (255 / 16)).astype(np.uint8)


def to_float(pixels):
    return pixels / np.float32(127.5) - 1


def read(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, prefix="probability:"):
    return np.array([[float(v) for k, v in row.items() if k.startswith(prefix)] for row in rows])


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_files_folders_lists_and_arrays(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ieg_jax.inference.predictions.AT_ONCE", 60)  # several parts, and no multiple of the devices
    pixels = digits(250)
    for name, image in zip(ODD_NAMES, pixels, strict=False):
        save(tmp_path / "in" / "deep" / name, image)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    save(tmp_path / "lists" / "x.png", pixels[5])
    (tmp_path / "lists" / "list.csv").write_text(f'note;path\n1;x.png\n;\n2;"../in/deep/{ODD_NAMES[0]}"\n')
    parquet.write_table(pa.table({"path": ["x.png", None]}), tmp_path / "lists" / "more.parquet")
    np.save(tmp_path / "plain.npy", pixels)
    np.savez(tmp_path / "own.npz", images=pixels[:3, ..., None] / 255, labels=np.zeros(3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    parts = ("lists/x.png", "in", "lists/list.csv", "plain.npy", "own.npz", "lists/more.parquet")
    given = [tmp_path / part for part in parts]
    out = tmp_path / "new" / "table.csv"
    line = predict(str(run), list(map(str, given)), str(out), probabilities=True)
    assert line == f"262 images in {out}; tiny of step 4"
    assert [path for path in before if path.stat().st_mtime_ns != before[path] and path != tmp_path] == []

    rows = read(out)
    listed = sorted(str(tmp_path / "in" / "deep" / name) for name in ODD_NAMES)
    assert sorted(row["path"] for row in rows[1:6]) == listed, "whatever is in a name"
    assert [row["path"] for row in rows[6:8]] == [
        str(tmp_path / "lists" / "x.png"),
        f"{tmp_path}/lists/../in/deep/a, b.png",
    ]
    order = {str(tmp_path / "in" / "deep" / name): number for number, name in enumerate(ODD_NAMES)}
    chosen = [5, *[order[row["path"]] for row in rows[1:6]], 5, 0, *range(250), 0, 1, 2, 5]
    assert [row["index"] for row in rows] == [""] * 8 + [*map(str, range(250)), "0", "1", "2", ""]
    trained = inference.load(run)
    expected = untrained.by_hand(trained, to_float(pixels[..., None]))[chosen]
    np.testing.assert_allclose(numbers(rows), expected, atol=2e-6)
    assert [row["class"] for row in rows] == [str(label) for label in expected.argmax(-1)]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected.max(-1), atol=2e-6)
    assert all(row["error"] == "" for row in rows)


def test_parquet_has_what_csv_has(colour, tmp_path):
    _, folder = colour
    np.savez(tmp_path / "only.npz", whatever=np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8))
    save(tmp_path / "in" / "x.png", np.full((8, 8, 3), 7, np.uint8))
    (tmp_path / "in" / "y.png").write_bytes(b"")
    given = [str(tmp_path / "in"), str(tmp_path / "only.npz")]
    for suffix in ("csv", "parquet"):
        predict(str(folder), given, str(tmp_path / f"out.{suffix}"), probabilities=True)
    rows = read(tmp_path / "out.csv")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(rows[0]) and table.column_names[-3:] == [
        f"probability:{name}" for name in CLASSES
    ]
    for row, other in zip(rows, table.to_pylist(), strict=True):
        for name, cell in row.items():
            value = other[name]
            assert cell == ("" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)), name
    assert rows[0]["class"] in CLASSES and (rows[1]["class"], rows[1]["error"]) == ("", "zero bytes")


def test_grey_for_a_network_of_colours_and_the_evaluation_policy(colour, tmp_path):
    trained, folder = colour
    rng = np.random.default_rng(1)
    grey, colours = rng.integers(0, 256, (12, 12), np.uint8), rng.integers(0, 256, (20, 14, 3), np.uint8)
    save(tmp_path / "0.png", grey)
    save(tmp_path / "1.png", colours)
    np.save(tmp_path / "2.npy", grey[None])
    given = [str(tmp_path / name) for name in ("0.png", "1.png", "2.npy")]
    predict(str(folder), given, str(tmp_path / "out.csv"), probabilities=True)
    middle = np.repeat(grey[2:10, 2:10, None], 3, -1)
    expected = untrained.by_hand(trained, to_float(np.stack([middle, colours[6:14, 3:11], middle])))
    np.testing.assert_allclose(numbers(read(tmp_path / "out.csv")), expected, atol=2e-6)


def test_colours_for_a_network_of_grey(run, tmp_path):
    colours = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), np.uint8)
    luma = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colours])
    for number, image in enumerate(colours):
        save(tmp_path / "in" / f"{number}.png", image)
    np.save(tmp_path / "in.npy", colours)
    predict(str(run), [str(tmp_path / "in"), str(tmp_path / "in.npy")], str(tmp_path / "out.csv"), probabilities=True)
    expected = untrained.by_hand(inference.load(run), to_float(luma[..., None]))
    # Pillow rounds to whole grey values.
    np.testing.assert_allclose(numbers(read(tmp_path / "out.csv")), np.tile(expected, (2, 1)), atol=2e-3)


def test_image_size_is_that_of_the_run(tmp_path):
    trained = untrained.trained((8, 8, 3), "ab", data__name="image_folder", data__image_size=8)
    inference.export(trained, tmp_path / "model")
    blocks = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    large = np.pad(blocks.repeat(3, 0).repeat(3, 1), ((0, 0), (6, 6), (0, 0)))  # the centre square is taken
    save(tmp_path / "0.png", large)
    np.save(tmp_path / "1.npy", large[None])
    given = [str(tmp_path / "0.png"), str(tmp_path / "1.npy")]
    predict(str(tmp_path / "model"), given, str(tmp_path / "out.csv"), probabilities=True)
    expected = untrained.by_hand(trained, to_float(blocks[None]))
    np.testing.assert_allclose(numbers(read(tmp_path / "out.csv")), expected[[0, 0]], atol=2e-6)


def test_features(tmp_path):
    rng = np.random.default_rng(4)
    features, more = rng.normal(3, 2, (50, 6)).astype(np.float32), rng.normal(3, 2, (9, 6)).astype(np.float32)
    np.savez(tmp_path / "own.npz", features=features, labels=np.zeros(50, np.int64))
    np.savez(tmp_path / "more.npz", features=more)
    trained = untrained.trained(
        (1, 1, 6),
        "abc",
        data__name="features",
        data__train=str(tmp_path / "own.npz"),
        model__name="mlp",
        model__depth=2,
    )
    inference.export(trained, tmp_path / "model")
    predict(str(tmp_path / "model"), [str(tmp_path / "more.npz")], str(tmp_path / "out.csv"), probabilities=True)
    expected = untrained.by_hand(trained, ((more - features.mean(0)) / features.std(0))[:, None, None])
    np.testing.assert_allclose(numbers(read(tmp_path / "out.csv")), expected, atol=1e-5)
    with pytest.raises(UserError, match="takes features, expected a file of them"):
        predict(str(tmp_path / "model"), [str(tmp_path)], str(tmp_path / "other.csv"))


def test_the_classifier_of_an_audit_in_place_of_the_network(tmp_path, colour):
    rng = np.random.default_rng(4)
    features, labels = rng.normal(3, 2, (50, 6)).astype(np.float32), np.arange(50) % 2
    np.savez(tmp_path / "own.npz", features=features, labels=labels)
    keys = {"data__name": "features", "data__train": str(tmp_path / "own.npz"), "model__name": "mlp", "model__depth": 2}
    inference.export(untrained.trained((1, 1, 6), "abc", **keys), tmp_path / "model")
    plain = LogisticRegression().fit((features - features.mean(0)) / features.std(0), labels)  # never saw class 2
    joblib.dump({"kind": "logistic", "model": plain, "num_classes": 3}, tmp_path / "classifier.joblib")
    arguments = [str(tmp_path / "model"), [str(tmp_path / "own.npz")]]
    said = predict(
        *arguments, str(tmp_path / "out.csv"), probabilities=True, classifier=str(tmp_path / "classifier.joblib")
    )
    assert said.endswith("; logistic")
    expected = plain.predict_proba((features - features.mean(0)) / features.std(0))
    np.testing.assert_allclose(numbers(read(tmp_path / "out.csv"))[:, :2], expected, atol=1e-5)
    joblib.dump({"kind": "logistic", "model": plain, "num_classes": 2}, tmp_path / "other.joblib")
    for file, message in (("other.joblib", "of 2 classes, the run has 3"), ("own.npz", "cannot be read")):
        with pytest.raises(UserError, match=message):
            predict(*arguments, str(tmp_path / "no.csv"), classifier=str(tmp_path / file))
    with pytest.raises(UserError, match="expected features"):
        predict(
            str(colour[1]), [str(tmp_path)], str(tmp_path / "no.csv"), classifier=str(tmp_path / "classifier.joblib")
        )


def test_classes_of_one_name_have_columns_of_their_own(tmp_path):
    inference.export(untrained.trained((8, 8, 1), ("crane", "x", "crane"), data__name="digits"), tmp_path / "model")
    np.save(tmp_path / "in.npy", digits(1))
    predict(str(tmp_path / "model"), [str(tmp_path / "in.npy")], str(tmp_path / "out.csv"), probabilities=True)
    columns = list(read(tmp_path / "out.csv")[0])
    assert columns[-3:] == ["probability:0 crane", "probability:x", "probability:2 crane"]


def test_unreadable_images(run, tmp_path, monkeypatch, capsys):
    pixels = digits(7)
    for number, image in enumerate(pixels):
        save(tmp_path / "in" / f"{number}.png", image)
    (tmp_path / "in" / "2.png").write_bytes(b"damaged")
    given, out = [str(tmp_path / "in")], tmp_path / "out.csv"
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read:\n.*2\.png: no image.*\nmend or remove"):
        predict(str(run), given, str(out), unreadable="refuse")
    assert not list(tmp_path.glob("out*"))
    line = predict(str(run), given, str(out), probabilities=True)
    assert line.startswith(f"7 images in {out}, 1 of them without a prediction (column error); ")
    assert "1 of 7 images cannot be read:" in capsys.readouterr().err
    rows = read(out)
    assert [bool(row["error"]) for row in rows] == [number == 2 for number in range(7)]
    assert {rows[2][name] for name in rows[2]} == {"", rows[2]["path"], rows[2]["error"]}
    expected = untrained.by_hand(inference.load(run), to_float(pixels[..., None]))
    np.testing.assert_allclose(numbers(rows[:2] + rows[3:]), np.delete(expected, 2, 0), atol=2e-6)

    # A file that is damaged after it was looked at costs its own row alone.
    monkeypatch.setattr(images, "check", lambda paths: [images.Checked(True, 8, 8)] * len(paths))
    predict(str(run), given, str(tmp_path / "later.csv"), probabilities=True)
    later = read(tmp_path / "later.csv")
    assert "cannot be" in later[2].pop("error") and rows[2].pop("error")
    assert later == rows

    (tmp_path / "bad.png").write_bytes(b"x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict(str(run), [str(tmp_path / "bad.png")], str(tmp_path / "none.csv"))
    assert not list(tmp_path.glob("none*"))


def test_which_checkpoint(run, tmp_path):
    np.save(tmp_path / "in.npy", digits(3))
    found = {}
    for checkpoint in ("2", "4", "best"):
        line = predict(str(run), [str(tmp_path / "in.npy")], str(tmp_path / f"{checkpoint}.csv"), checkpoint)
        found[checkpoint] = line.split("step ")[1], (tmp_path / f"{checkpoint}.csv").read_text()
    assert found["2"][0] == "2" and found["4"][0] == "4" and found["2"][1] != found["4"][1]
    assert found["best"] == found[str(best_step(run))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to predict; name image files"),
        (["absent.png"], "absent.png: no such file or folder"),
        (["empty"], r"empty: no images in it \(files ending in"),
        (["wrong.csv"], r"columns \['name'\], expected a first line with path"),
        (["empty.csv"], "no images listed"),
        (["latin.csv"], "not UTF-8 text"),
        (["wrong.parquet"], r"columns \['name'\], expected path among them"),
        (["damaged.parquet"], "cannot be read as Parquet"),
        (["flat.npy"], r"shape \(4, 64\), expected \[n, H, W\]"),
        (["four.npy"], r"shape \(4, 8, 8, 4\), expected .* with C = 1 or 3"),
        (["ints.npy"], "dtype int32, expected uint8 or floats"),
        (["bytes.npy"], r"floats from 0 to 255, expected \[0, 1\]"),
        (["large.npy"], "images of 9×9 pixels, the network was trained on 8×8"),
        (["damaged.npz"], "cannot be read as .npz"),
        (["huge.npy"], "huge.npy: cannot be read as .npy .*Unable to allocate 2.00 PiB"),
        (["two.npz"], r"has \['a', 'b'\], expected the array images"),
    ],
)
def test_what_cannot_be_predicted(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.csv").write_text("name\nx.png\n")
    (tmp_path / "empty.csv").write_text("path\n")
    (tmp_path / "latin.csv").write_bytes("path\nÄ.png\n".encode("latin-1"))
    parquet.write_table(pa.table({"name": ["x.png"]}), tmp_path / "wrong.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    np.save(tmp_path / "flat.npy", np.zeros((4, 64), np.uint8))
    np.save(tmp_path / "four.npy", np.zeros((4, 8, 8, 4), np.uint8))
    np.save(tmp_path / "ints.npy", np.zeros((4, 8, 8), np.int32))
    np.save(tmp_path / "bytes.npy", np.full((1, 8, 8), [0.0, 255, 0, 0, 0, 0, 0, 0]))
    np.save(tmp_path / "large.npy", np.zeros((4, 9, 9), np.uint8))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04")
    with (tmp_path / "huge.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**42, 16, 32, 1)}
        np.lib.format.write_array_header_1_0(file, header)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(UserError, match=message):
        predict(str(run), arguments, "out.csv")
    assert not list(tmp_path.glob("out*"))


def test_where_the_table_goes(run, tmp_path):
    np.save(tmp_path / "in.npy", digits(1))
    given = [str(tmp_path / "in.npy")]
    with pytest.raises(UserError, match="expected a name that ends in .csv or .parquet"):
        predict(str(run), given, str(tmp_path / "out.json"))
    with pytest.raises(UserError, match="cannot be written"):
        predict(str(run), given, str(tmp_path / "in.npy" / "out.csv"))
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(UserError, match="out.csv is there already; name a new file"):
        predict(str(run), given, str(tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_text() == "mine"
    with pytest.raises(UserError, match=r"no config\.json"):
        predict(str(tmp_path), given, str(tmp_path / "other.csv"))


def test_a_full_disk_is_said(run, tmp_path, monkeypatch):

    def write(columns):
        raise OSError(28, "No space left on device")

    original = PredictionFile._open
    monkeypatch.setattr(PredictionFile, "_open", lambda *arguments: (original(*arguments), write)[1])
    np.save(tmp_path / "in.npy", digits(1))
    with pytest.raises(StorageError, match="No space left"):
        predict(str(run), [str(tmp_path / "in.npy")], str(tmp_path / "out.csv"))
    assert not list(tmp_path.glob("out*"))


def test_image_files_for_a_network_of_arrays_that_are_not_square(tmp_path):
    trained = untrained.trained((8, 6, 1), "ab", data__name="arrays", data__train="gone.npz")
    save(tmp_path / "0.png", digits(1)[0])
    inference.export(trained, tmp_path / "model")
    with pytest.raises(UserError, match="arrays of 8×6 pixels"):
        predict(str(tmp_path / "model"), [str(tmp_path / "0.png")], str(tmp_path / "out.csv"))


def test_the_command(run, tmp_path):
    save(tmp_path / "in" / "x.png", digits(1)[0])
    command = [sys.executable, "-m", "ieg_jax.predict"]
    arguments = [f"--workdir={run}", str(tmp_path / "in"), f"--out={tmp_path / 'out.csv'}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"1 images in {tmp_path / 'out.csv'}; tiny of step 4\n"
    assert list(read(tmp_path / "out.csv")[0]) == ["path", "class", "probability", "error"]
    again = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].endswith("is there already; name a new file")
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--unreadable" in shown.stdout


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged \(Expecting property name"):
        inference.load(tmp_path)


@pytest.mark.parametrize("spreadsheet", [False, True])
def test_names_that_a_spreadsheet_would_run(tmp_path, spreadsheet):
    names = ("=1+1", "-cmd", "+a", "@b", "plain", "a=b")
    rows = Rows(tuple(f"={n}.png" for n in names), [None] * 6, np.eye(6, dtype=np.float32), [""] * 6)
    with PredictionFile(tmp_path / "p.csv", names, [], False, spreadsheet) as table:
        table.write(rows)
    with (tmp_path / "p.csv").open(newline="") as file:
        found = [(row["class"], row["path"], row["probability"]) for row in csv.DictReader(file)]
    marks = "''''" if spreadsheet else ""
    wanted = [mark + name for mark, name in zip(marks.ljust(6), names, strict=True)]
    assert [name for name, _, _ in found] == [name.strip() for name in wanted]
    assert all(path.startswith("'=" if spreadsheet else "=") for _, path, _ in found)
    assert {value for _, _, value in found} == {"1"}, "numbers are numbers"
