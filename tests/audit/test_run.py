"""The audit of a run on image files whose wrong labels are known: what it writes, and that it goes on after a stop."""

import csv
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import joblib
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from pyarrow import parquet
from runs import ROOT
from sklearn.datasets import load_digits

from configs import own_data
from ieg_jax import cli, inference
from ieg_jax import config as config_lib
from ieg_jax.audit import cleaned, measures, predicted
from ieg_jax.audit import page as audit_page
from ieg_jax.audit import quality as label_quality
from ieg_jax.audit import run as audit_run
from ieg_jax.audit.files import CLEANED, CLEANLAB, COLUMNS, PAGE, SUMMARY, TABLE, TABLE_CSV, to_cleanlab
from ieg_jax.audit.run import Options, audit, predict_part
from ieg_jax.data.load import fold_of, load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError
from ieg_jax.train import check
from ieg_jax.train.loop import train_and_evaluate

# As people name them; one that a page must not take for markup.
NAMES = ("Null", "eins", "zwei Stück", "drei", "vier", "fünf", "<b>sechs</b>", 'sie"ben', "acht", "neun")
OPTIONS = Options(views=2, thumbnails=20)


@dataclasses.dataclass
class Case:
    """A finished run on a list of files, and what is known of it."""

    folder: object
    workdir: str
    given: dict  # path in the list -> label in it
    true: dict


def write_lists(folder):
    digits = load_digits()
    rng = np.random.default_rng(0)
    rows = {
        "train": np.arange(400),
        "trusted": np.concatenate([np.flatnonzero(digits.target == c)[-6:] for c in range(10)]),
    }
    given, true = {}, {}
    for part, numbers in rows.items():
        (folder / "bilder" / part).mkdir(parents=True)
        lines = []
        for number in numbers:
            path = f"bilder/{part}/Bild {number}.png"
            Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(folder / path)
            label = int(digits.target[number])
            if part == "train":
                true[path] = NAMES[label]
                label = (label + rng.integers(1, 10)) % 10 if rng.random() < 0.3 else label
                given[path] = NAMES[label]
            lines.append([path, NAMES[label]])
        if part == "train":
            for name in ("leer.png", "halb.png", "kein Bild.jpg"):
                content = (folder / "bilder/train/Bild 3.png").read_bytes()
                (folder / "bilder/train" / name).write_bytes(
                    {"leer.png": b"", "halb.png": content[:40]}.get(name, b"text")
                )
                lines.append([f"bilder/train/{name}", NAMES[0]])
        with open(folder / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], *lines])
    return given, true


def configuration(folder, **keys):
    config = cli.load_config(str(ROOT / "configs/own_data.py:backbone=none,augment=symbols"))
    config.data.train, config.data.trusted = str(folder / "train.csv"), str(folder / "trusted.csv")
    config.update_from_flattened_dict(
        {
            "data.unreadable": "skip",
            "trusted.holdout": 0.5,
            "model.name": "tiny",
            "model.width": 4.0,
            "method.unlabeled_weight": 1.0,
            "method.consistency_weight": 2.0,
            "batch_size": 32,
            "eval_batch_size": 64,
            "num_train_epochs": 0.0,
            "num_train_steps": 300,
            "eval_every_epochs": 0.0,
            "eval_every_steps": 300,
            "checkpoint_every_epochs": 0.0,
            "checkpoint_every_steps": 300,
            "mesh.data": 1,
        }
        | keys
    )
    return config


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    given, true = write_lists(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(ROOT)
        patch.setattr(predicted, "AT_ONCE", 128)
        train_and_evaluate(configuration(folder), str(folder / "run"))
        yield Case(folder, str(folder / "run"), given, true)


@pytest.fixture(scope="module")
def finished(case):
    """An audit, and a hash of each file that was there before it."""
    before = hashes(case.folder)
    summary = audit(case.workdir, str(case.folder / "audit"), OPTIONS)
    return case.folder / "audit", summary, before


def hashes(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(folder):
    return parquet.read_table(folder / TABLE).to_pydict()


def test_the_table(case, finished):
    folder, _, _ = finished
    columns = table(folder)
    assert list(columns)[:9] == [name for name in COLUMNS if name != "self_confidence"]
    assert dict(zip(columns["path"], columns["given_label"], strict=True)) == case.given
    # Its numbers are those of the network and of label_quality.
    trained = inference.load(case.workdir)
    data = load_data(trained.config)
    probabilities = inference.predict(trained, data.train)
    assert data.train.ids.tolist() == columns["id"] and len(data.held_out) == 30
    expected = label_quality.estimate(
        probabilities, data.train.labels, inference.predict(trained, data.held_out), data.held_out.labels
    )
    np.testing.assert_allclose(columns["p_right"], expected.right, atol=1e-5)
    each = np.stack([columns[f"probability:{name}"] for name in data.class_names], 1)
    np.testing.assert_allclose(each, probabilities, atol=1e-6)
    memory = np.load(case.folder / "run" / "examples.npz")
    np.testing.assert_allclose(columns["mean_trust"], memory["trust"][data.train.ids])
    assert 0 < np.mean(columns["disagreement"]) < 1
    with open(folder / TABLE_CSV, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == columns["path"] and lines[0].keys() == set(list(columns)[:9])
    assert [float(line["p_right"]) for line in lines] == pytest.approx(columns["p_right"])


def test_wrong_labels_are_found(case, finished):
    folder, summary, _ = finished
    columns = table(folder)
    names = list(summary["class_names"])
    true = np.array([names.index(case.true[path]) for path in columns["path"]])
    given, suggested = (
        np.array([names.index(name) for name in columns[c]]) for c in ("given_label", "suggested_label")
    )
    judged = measures.judge(np.array(columns["p_right"]), suggested, given, true)
    assert judged["auroc"] > 0.95 and judged["precision"] > 0.8 and judged["suggested_right"] > 0.75
    low, high = summary["noise_interval"]
    assert low - 0.05 < judged["noise_rate"] < high + 0.05 and high - low < 0.4
    assert "known" not in summary, "the run itself does not know"
    assert "30 trusted examples that were held out" in audit_page.calibration_text(summary)


def test_inputs_are_as_they_were(case, finished):
    _, _, before = finished
    after = hashes(case.folder)
    assert all(after[path] == value for path, value in before.items())


def test_the_cleaned_list_can_be_trained_on(case, finished):
    folder, summary, _ = finished
    columns = table(folder)
    config = configuration(case.folder)
    config.data.train = str(folder / CLEANED)
    source = sources.load(config.data)
    assert len(source.train) == 400 == sum(summary["cleaned"].values())
    changed = 0
    for path, label in zip(source.train.names, source.train.labels, strict=True):
        row = columns["path"].index(path[path.index("bilder/") :])
        kept = columns["p_right"][row] >= 0.5
        changed += not kept
        assert source.class_names[label] == columns["given_label" if kept else "suggested_label"][row]
    assert 0 < changed == summary["cleaned"]["relabel"]
    # Better than before, which is what it is for.
    true = [case.true[path[path.index("bilder/") :]] for path in source.train.names]
    wrong = np.mean([source.class_names[label] != name for label, name in zip(source.train.labels, true, strict=True)])
    assert wrong < 0.6 * np.mean([case.given[path] != name for path, name in case.true.items()])


def test_the_page_is_there(finished):
    folder, _, _ = finished
    page = (folder / PAGE).read_text("utf-8")
    assert "zwei Stück" in page and "<b>sechs" not in page
    pictures = page.count("data:image/png;base64,")
    most = OPTIONS.thumbnails + 2 * audit_page.SAMPLE
    assert audit_page.SAMPLE < pictures <= most, "of the most suspicious, and of the samples to check"


def test_an_interrupted_audit_goes_on(case, finished, monkeypatch):
    folder = case.folder / "interrupted"
    calls = []

    def broken(real):
        def make(networks):
            predict = real(networks)

            def stops(split, view=None):
                calls.append(split)
                if len(calls) == 8:  # three views of each part: in the middle of the third
                    raise KeyboardInterrupt
                return predict(split, view)

            return stops

        return make

    for name in ("predictor", "predictor_of_all"):
        monkeypatch.setattr(inference, name, broken(getattr(inference, name)))
    with pytest.raises(KeyboardInterrupt):
        audit(case.workdir, str(folder), OPTIONS)
    parts = sorted(path.name for path in (folder / "parts").iterdir())
    assert parts == ["000000000.npz", "000000128.npz"] and not (folder / SUMMARY).exists()
    calls.clear()
    calls += [None] * 100  # from here on it does not stop
    summary = audit(case.workdir, str(folder), OPTIONS)
    assert len(calls) == 100 + 2 * 3 + 3, "two parts; the held-out images, and for an alarm these and the trusted ones"
    assert summary == finished[1]
    for name in (TABLE, CLEANED, CLEANLAB):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes(), name
    calls.clear()
    assert audit(case.workdir, str(folder), OPTIONS) == summary and not calls, "finished: nothing to do"
    with pytest.raises(UserError, match=r"holds another audit[^$]*'threshold': 0.5[^$]*ieg_jax.clean"):
        audit(case.workdir, str(folder), dataclasses.replace(OPTIONS, threshold=0.3))


def test_parts_by_several_processes(case, finished, monkeypatch):
    """The files are those of one process, byte by byte, whoever began the audit and whatever is missing."""
    folder = case.folder / "parts"
    with pytest.raises(UserError, match="--part=3/2: expected i/n"):
        predict_part(case.workdir, str(folder), "3/2", OPTIONS)
    assert not folder.exists()
    assert "200 of 400" not in predict_part(case.workdir, str(folder), "2/2", OPTIONS)
    assert {path.name for path in (folder / "parts").iterdir()} == {"000000256.npz", "000000384.npz"}
    text = predict_part(case.workdir, str(folder), "1/4", OPTIONS)
    assert text.startswith("part 1/4: 128 of 400 examples are predicted")
    with pytest.raises(UserError, match="holds another audit"):
        predict_part(case.workdir, str(folder), "1/4", dataclasses.replace(OPTIONS, views=1))
    assert audit(case.workdir, str(folder), OPTIONS) == finished[1]
    for name in (TABLE, TABLE_CSV, CLEANED, CLEANLAB):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes(), name
    assert "finished audit" in predict_part(case.workdir, str(folder), "1/4", OPTIONS)


def test_one_audit_that_two_processes_begin(tmp_path, monkeypatch):
    """The second one finds a file that has no name yet; then the first has named it, as the same audit or another."""
    (tmp_path / "audit.json.17.partial").write_text("{")
    monkeypatch.setattr(audit_run.time, "sleep", lambda _: (tmp_path / "audit.json").write_text('{"a": 1}'))
    assert audit_run._begin(tmp_path, {"a": 1}, several=True) is None
    with pytest.raises(UserError, match="a: 1 -> 2"):
        audit_run._begin(tmp_path, {"a": 2}, several=True)
    (tmp_path / "audit.json").unlink()
    with pytest.raises(UserError, match="not empty"):
        audit_run._begin(tmp_path, {"a": 1}, several=False)


def test_plain_classifiers_of_so_many_examples_and_classes_are_not_made():
    split = make_split(np.zeros((200, 1, 1, 3), np.float32), np.arange(200) % 4)
    assert audit_run.final.possible(split)
    many = dataclasses.replace(split, labels=np.full(200, audit_run.final.MOST_NUMBERS // 200, np.int32))
    assert not audit_run.final.possible(many), "K is one more"


def test_what_cannot_be_audited(case, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        audit(case.workdir, str(tmp_path / "taken"), OPTIONS)
    with pytest.raises(UserError, match="expected a probability"):
        audit(case.workdir, str(tmp_path / "new"), Options(threshold=1.5))
    with pytest.raises(UserError, match="--folds=1: expected 0"):
        audit(case.workdir, str(tmp_path / "new"), Options(folds=1))
    with pytest.raises(UserError, match="--fold_method: got 'superised'.*Did you mean 'supervised'"):
        audit(case.workdir, str(tmp_path / "new"), Options(folds=2, fold_method="superised"))
    with pytest.raises(UserError, match=r"has no config.json"):
        audit(str(tmp_path), str(tmp_path / "new"), OPTIONS)
    moved = tmp_path / "moved"
    shutil.copytree(case.workdir, moved)
    changed = json.loads((moved / "data.json").read_text()) | {"train": "of other labels"}
    (moved / "data.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="the train examples are not those"):
        audit(str(moved), str(tmp_path / "new"), OPTIONS)
    assert not (tmp_path / "new").exists()


def test_marks_decide(case, finished, tmp_path):
    folder, _, _ = finished
    columns = table(folder)
    first, second, third = (columns["id"][row] for row in (0, 1, 2))
    marks = tmp_path / "marks.csv"
    lines = [["id", "path", "given_label", "mark", "label"], [first, "", "", "relabel", NAMES[7]],
             [second, "", "", "drop", ""], [third, "", "", "keep", columns["given_label"][2]]]  # fmt: skip
    with open(marks, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    counts = cleaned.write(folder, tmp_path / "cleaned.csv", 1.0, "drop", str(marks))  # P = 1 is kept, all else dropped
    with open(tmp_path / "cleaned.csv", newline="", encoding="utf-8") as file:
        rows = {int(row["id"]): row for row in csv.DictReader(file)}
    assert rows[first]["label"] == NAMES[7] and rows[third]["label"] == rows[third]["given_label"]
    assert second not in rows and counts["relabel"] == 1 and counts["keep"] == len(rows) - 1
    assert rows[first]["path"] == str(case.folder / columns["path"][0])
    for line, message in (
        (["99999", "", "", "keep", ""], "line 2: id '99999'"),
        ([str(first), "", "", "maybe", ""], "mark 'maybe', expected one of keep"),
        ([str(first), "", "", "relabel", "Zebra"], "label 'Zebra' is no class"),
    ):
        with open(marks, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([lines[0], line])
        with pytest.raises(UserError, match=message):
            cleaned.write(folder, tmp_path / "no.csv", marks=str(marks))
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.slow
def test_retraining_on_the_cleaned_labels(case, tmp_path):
    """Asked for when the audit was finished already, it makes the two trainings and nothing else."""
    options = dataclasses.replace(OPTIONS, views=0, thumbnails=0)
    before = audit(case.workdir, str(tmp_path / "audit"), options)
    assert "retrained" not in before
    summary = audit(case.workdir, str(tmp_path / "audit"), dataclasses.replace(options, retrain=True))
    lines = [(one["name"], one["labels"]) for one in summary["retrained"]["comparison"]]
    assert lines == [("ieg", "given"), ("supervised", "given"), ("supervised", "cleaned")]
    on_given, on_cleaned = (inference.load(tmp_path / "audit/retrained" / name) for name in ("given", "cleaned"))
    labels = {name: load_data(one.config).train.labels for name, one in (("g", on_given), ("c", on_cleaned))}
    assert (labels["g"] != labels["c"]).sum() == before["cleaned"]["relabel"] > 0
    held_out = load_data(on_cleaned.config).held_out
    accuracy = (inference.predict(on_cleaned, held_out).argmax(1) == held_out.labels).mean()
    assert summary["retrained"]["comparison"][2]["held_out"] == pytest.approx(accuracy)
    best = pathlib.Path(summary["retrained"]["best"])
    assert best in (tmp_path / "audit/retrained/cleaned", pathlib.Path(case.workdir))
    again = audit(case.workdir, str(tmp_path / "audit"), dataclasses.replace(options, retrain=True))
    assert again == json.loads(json.dumps(summary))


@pytest.mark.slow
def test_out_of_fold_probabilities(case):
    """Two more trainings; each example is predicted by the one that did without it."""
    options = dataclasses.replace(OPTIONS, views=0, thumbnails=0, folds=2, fold_method="supervised")
    folder = case.folder / "folds"
    audit(case.workdir, str(folder), options)
    columns, content = table(folder), to_cleanlab(str(folder))
    assert content["pred_probs"].shape == (400, 10)
    np.testing.assert_allclose(content["pred_probs"].sum(1), 1)
    own = content["pred_probs"][np.arange(400), content["labels"]]
    np.testing.assert_allclose(columns["self_confidence"], own, atol=1e-6)
    whole = inference.load(case.workdir)
    data = load_data(whole.config)
    np.testing.assert_array_equal(content["labels"], data.train.labels)
    # P(right) comes of both: the run's network, and these, which also look at the held-out images, each at its share.
    held_out = np.empty((len(data.held_out), 10), np.float32)
    folds = fold_of(data.train.ids, 2)
    for fold in (0, 1):
        trained = inference.load(folder / "folds" / str(fold))
        assert trained.config.method.name == "supervised"
        seen = load_data(trained.config).train.ids
        np.testing.assert_array_equal(seen, data.train.ids[folds != fold])
        rows = np.flatnonzero(folds == fold)
        expected = inference.predict(trained, data.train.take(rows))
        np.testing.assert_allclose(content["pred_probs"][rows], expected, atol=1e-5)
        held_out[fold::2] = inference.predict(trained, data.held_out)[fold::2]
    quality = label_quality.estimate(
        measures.pooled([inference.predict(whole, data.train), content["pred_probs"]]),
        data.train.labels,
        measures.pooled([inference.predict(whole, data.held_out), held_out]),
        data.held_out.labels,
    )
    np.testing.assert_allclose(columns["p_right"], quality.right, atol=1e-4)


@pytest.mark.parametrize("network", ["vgg13", "mlp", "resnet29_v2", "wide_resnet"])
@pytest.mark.parametrize("method", ["", "supervised", "co_teaching"])
def test_folds_can_be_trained_as_a_run_of_ones_own_data_was(network, method):
    """config.json has numbers where own_data.py has -1, also for keys that the network does not read."""
    config = own_data.get_config("backbone=none")
    config.model.name, config.data.train, config.data.trusted = network, "labels.csv", "trusted.csv"
    check.validate(config)
    written = config_lib.resolve(config, config_lib.Facts(1000, 32, 32))
    assert written.model.depth == 16
    stored = ConfigDict(json.loads(written.to_json()))
    found = audit_run._fold_config(stored, dataclasses.replace(OPTIONS, folds=3, fold_method=method), 2)
    check.validate(found)
    assert (found.data.folds, found.data.fold, found.method.name) == (3, 2, method or "ieg")
    assert found.model.depth == (16 if network in ("wide_resnet", "mlp") else 10)
    assert stored.data.folds == 0, "that of the run is not changed"


def test_averages_are_found_by_id(tmp_path):
    """In the order of the training set, whose ids have gaps; without the file there are none."""
    np.savez(tmp_path / "examples.npz", weight=np.arange(6.0), trust=10 + np.arange(6.0), visits=np.ones(6, int))
    found = audit_run._averages(str(tmp_path), np.array([5, 0, 3]))
    assert {name: values.tolist() for name, values in found.items()} == {"weight": [5, 0, 3], "trust": [15, 10, 13]}
    assert audit_run._averages(str(tmp_path / "nowhere"), np.array([0])) == {}


def test_the_most_suspicious_examples_get_thumbnails():
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    split = types.SimpleNamespace(is_visible=True, originals=lambda rows: pictures[rows])
    right, nothing = np.array([0.9, 0.2, 0.6, 0.1]), {"random": []}
    assert set(audit_page._previews(split, right, 2, nothing)[0]) == {3, 1}
    assert set(audit_page._previews(split, right, 2, {"random": [(0, 1.0), (1, 1.0)]})[0]) == {0, 1, 3}
    assert audit_page._previews(split, right, 0, {"random": [(0, 1.0)]}) == ({}, {})


def test_features_have_texts_and_pictures_for_previews(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    previews = np.array(["a text", tmp_path / "a.png", tmp_path / "b.png", tmp_path / "gone.png", ""], object)
    split = types.SimpleNamespace(is_visible=False, previews=previews)
    pictures, texts = audit_page._previews(split, np.linspace(0, 1, 5), 5, {"random": []})
    assert texts == {0: "a text"} and set(pictures) == {1} and pictures[1].startswith("data:image/png")
    nothing = types.SimpleNamespace(is_visible=False, previews=None)
    assert audit_page._previews(nothing, np.linspace(0, 1, 5), 5, {"random": []}) == ({}, {})


@pytest.mark.parametrize("side, kind", [(8, "png"), (200, "jpeg")])
def test_thumbnails(side, kind):
    import base64
    import io

    image = np.zeros((side, side // 2, 3), np.uint8)
    image[: side // 2] = 255
    head, _, content = audit_page.thumbnail(image).partition(",")
    assert head == f"data:image/{kind};base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.size == (min(side, 96) // 2, min(side, 96))
    assert picture.getpixel((1, 1))[0] > 250 and picture.getpixel((1, picture.size[1] - 2))[0] < 5


def test_the_commands(case, finished, tmp_path):
    out = finished[0]
    arguments = [f"--workdir={case.workdir}", f"--out={out}", "--views=2", "--thumbnails=20"]
    environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(case.folder / "cache")}
    import os

    def command(module, *flags):
        done = subprocess.run(
            [sys.executable, "-m", f"ieg_jax.{module}", *flags],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    code, text = command("audit", *arguments)  # finished already
    assert (
        code == 0
        and "400 labels, " in text
        and "audit.html" in text
        and "30 trusted examples that were held out" in text
    )
    code, text = command("audit", *arguments, "--part=1/2")
    assert code == 0 and "finished audit: there is nothing left to predict" in text
    code, text = command("clean", f"--audit={out}", f"--out={tmp_path / 'c.csv'}", "--threshold=0.2")
    assert code == 0 and "labels kept" in text and (tmp_path / "c.csv").exists()
    code, text = command("clean", f"--audit={out}", f"--out={tmp_path / 'c.csv'}")
    assert code == 1 and "is there already; name a new file" in text
    assert jax.process_count() == 1


# ---- Features, a checked sample, and alarms.


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A short run on the digits as rows of numbers, one label in three the next digit."""
    folder = tmp_path_factory.mktemp("features")
    digits, rng = load_digits(), np.random.default_rng(3)
    true = digits.target[:900]
    given = np.where(rng.random(900) < 0.33, (true + 1) % 10, true)
    trusted = np.concatenate([np.flatnonzero(digits.target[900:] == c)[:10] + 900 for c in range(10)])
    np.savez(
        folder / "own.npz",
        features=digits.data[:900],
        labels=given,
        clean_labels=true,
        trusted_features=digits.data[trusted],
        trusted_labels=digits.target[trusted],
    )
    config = cli.load_config(str(ROOT / "configs/features.py"))
    config.data.train, config.mesh.data, config.num_train_epochs, config.num_train_steps = (
        str(folder / "own.npz"),
        1,
        0.0,
        80,
    )
    config.eval_every_epochs, config.eval_every_steps, config.checkpoint.keep = 0.0, 80, 2
    train_and_evaluate(config, str(folder / "run"))
    summary = audit(str(folder / "run"), str(folder / "audit"), dataclasses.replace(OPTIONS, views=0))
    return folder, true, given, summary


def test_features_are_audited_by_the_final_classifier(features):
    folder, true, given, summary = features
    assert summary["final"]["classifier"] in ("logistic", "forest", "kernel")
    assert summary["known"]["auroc"] > 0.97 and summary["alarms"] == []
    low, high = summary["noise_interval"]
    assert low < (given != true).mean() < high and summary["noise_interval_rests_on"] == "held_out"
    columns = table(folder / "audit")
    assert len(columns["self_confidence"]) == 900
    stored = joblib.load(folder / "audit" / "classifier.joblib")
    assert stored["kind"] == summary["final"]["classifier"] and stored["num_classes"] == 10


def test_cleaned_arrays_can_be_trained_on_again(features):
    """labels.csv decides; the other arrays are as they were, and dropped rows are gone from each."""
    folder, true, given, summary = features
    before, after = (dict(np.load(folder / name)) for name in ("own.npz", "audit/cleaned.npz"))
    assert set(before) == set(after)
    for name in set(before) - {"labels"}:
        np.testing.assert_array_equal(after[name], before[name])
    assert (after["labels"] != true).mean() < 0.4 * (given != true).mean()
    assert (after["labels"] != given).sum() == summary["cleaned"]["relabel"]
    counts = cleaned.write(folder / "audit", folder / "dropped.npz", below="drop")
    dropped = dict(np.load(folder / "dropped.npz"))
    kept = np.array(table(folder / "audit")["p_right"]) >= 0.5
    assert counts["drop"] == (~kept).sum() > 0
    for name in ("features", "labels", "clean_labels"):
        np.testing.assert_array_equal(dropped[name], before[name][kept])


def test_a_checked_sample_takes_part(features, tmp_path):
    folder, true, given, before = features
    rows = np.random.default_rng(0).permutation(900)[:80]
    lines = [f"{row},{'right' if given[row] == true[row] else 'wrong'},{true[row]},1" for row in rows]
    (tmp_path / "sample.csv").write_text("\n".join(["id,answer,label,weight", *lines]))
    options = dataclasses.replace(OPTIONS, views=0, marks=str(tmp_path / "sample.csv"))
    summary = audit(str(folder / "run"), str(tmp_path / "audit"), options)
    assert (summary["pairs"], summary["noise_interval_rests_on"]) == (80, "pairs")
    low, high = summary["noise_interval"]
    assert low < (given != true).mean() < high and high - low < np.diff(before["noise_interval"])[0]
    assert summary["sample"]["checked"] == 80 and summary["calibration_error"] is not None
    with pytest.raises(UserError, match="holds another audit"):
        audit(str(folder / "run"), str(tmp_path / "audit"), dataclasses.replace(options, marks=""))


def test_after_an_alarm_nothing_is_cleaned_unasked(features, tmp_path, monkeypatch):
    folder = features[0]
    monkeypatch.setattr(audit_run, "_alarm_trusted", lambda *_: ["everything is known by heart"])
    monkeypatch.setattr(audit_run.final, "possible", lambda _: False)
    summary = audit(str(folder / "run"), str(tmp_path / "audit"), dataclasses.replace(OPTIONS, views=0))
    assert summary["alarms"] == ["everything is known by heart"] and summary["cleaned"] is None
    assert not (tmp_path / "audit" / CLEANED).exists() and "known by heart" in (tmp_path / "audit" / PAGE).read_text()
    with pytest.raises(UserError, match="raised alarms:.*\\n.*known by heart.*\\n.*--force"):
        cleaned.refuse_alarms(tmp_path / "audit")
    cleaned.refuse_alarms(folder / "audit")
    options = dataclasses.replace(OPTIONS, views=0, force=True)
    forced = audit(str(folder / "run"), str(tmp_path / "forced"), options)
    assert forced["cleaned"]["keep"] > 0 and (tmp_path / "forced" / CLEANED).exists()


def test_trusted_examples_that_are_known_by_heart():
    """All of those trained with are right and 6 of 20 of the others; with 18 of 20 that may be chance."""
    trusted, held_out = (types.SimpleNamespace(labels=np.zeros(n, int)) for n in (80, 20))
    data = types.SimpleNamespace(trusted=trusted, held_out=held_out)
    sure = np.eye(2)[np.zeros(80, int)]
    for right, alarms in ((6, 1), (18, 0)):
        unseen = np.eye(2)[(np.arange(20) >= right).astype(int)]
        found = audit_run._alarm_trusted(data, lambda split, unseen=unseen: sure if split is trusted else unseen)
        assert len(found) == alarms
    assert audit_run._alarm_trusted(types.SimpleNamespace(held_out=None), None) == []
