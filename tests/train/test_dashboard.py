"""What TensorBoard gets: read back from event files, and through the HTTP interface of a real TensorBoard."""

import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ieg_jax.data.splits import make_split
from ieg_jax.train import dashboard, metrics
from ieg_jax.train.loop import train_and_evaluate

NAMES = ("zero", "one", "two")


def window(**columns) -> metrics.Window:
    """Two steps of three examples, room for a third step."""
    shape = {name: jnp.zeros(3, value.dtype) for name, value in columns.items()}
    seen = metrics.empty_window(metrics.Observation({}, metrics.Examples(**shape)), steps=3)
    for step in range(2):
        found = metrics.Examples(**{name: value[3 * step : 3 * step + 3] for name, value in columns.items()})
        seen = metrics.add(seen, metrics.Observation({}, found), jnp.asarray(step + 1))
    return jax.device_get(seen)


@pytest.fixture
def drawn(monkeypatch):
    """The tiles that are drawn."""
    tiles = []
    monkeypatch.setattr(dashboard, "draw", lambda each: tiles.extend(each) or np.zeros((1, 1, 3), np.uint8))
    return tiles


def split():
    """Five examples with the ids 7, 3, 9, 1, 5; the image of id i has the value i; 3 and 5 are known to be wrong."""
    ids = np.array([7, 3, 9, 1, 5])
    images = np.broadcast_to(ids.astype(np.uint8)[:, None, None, None], (5, 2, 2, 1))
    made = make_split(images, np.array([0, 1, 2, 0, 1]), np.array([0, 2, -1, 0, -2]))
    return dataclasses.replace(made, ids=ids)


EXAMPLES = {
    "ids": jnp.array([7, 3, 9, 1, 5, 3]),
    "weights": jnp.array([0.1, 0.9, 0.0, 0.2, 0.3, 0.5]),
    "clean": jnp.array([1, 0, -1, 1, 0, 0], jnp.int8),
}


def test_the_most_doubtful_come_first(drawn):
    """Of id 3, which occurs twice, the last counts: 0.3, not 0.0."""
    pseudo = {
        "trust": jnp.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.0]),
        "pseudo_label": jnp.array([0, 0, 1, 0, 2, 2]),
        "label_probability": jnp.array([0.9, 0.0, 0.2, 0.8, 0.1, 0.3]),
    }
    dashboard.suspects(window(**EXAMPLES, **pseudo), split(), NAMES, 3)
    assert [(above, below, colour) for above, below, colour, _ in drawn] == [
        ("one", ["→ two", "λ 0"], dashboard.WRONG),  # id 5: none of the classes
        ("two", ["→ one", "λ 0.5"], dashboard.RIGHT),  # id 9: not known
        ("one", ["→ two", "λ 0"], dashboard.WRONG),  # id 3
    ]
    assert [int(image[0, 0, 0]) for *_, image in drawn] == [5, 9, 3]


def test_without_pseudo_labels_the_weights_decide(drawn):
    dashboard.suspects(window(**EXAMPLES), split(), NAMES, 100)
    assert [(below, int(image[0, 0, 0])) for _, below, _, image in drawn] == [
        (["ω·B 0"], 9), (["ω·B 0.3"], 7), (["ω·B 0.6"], 1), (["ω·B 0.9"], 5), (["ω·B 1.5"], 3),
    ]  # fmt: skip


def test_no_picture(drawn):
    features = dataclasses.replace(split(), images=np.zeros((5, 1, 1, 8), np.float32))
    assert dashboard.suspects(window(**EXAMPLES), split(), NAMES, 0) == {}
    assert dashboard.suspects(window(**EXAMPLES), features, NAMES, 5) == {}
    empty = metrics.empty_window(metrics.Observation({}, metrics.Examples(**EXAMPLES)), steps=3)
    assert dashboard.suspects(jax.device_get(empty), split(), NAMES, 5) == {}
    assert not drawn


def test_a_sheet_of_all_kinds_of_images():
    """Grey, colour, wide and large; names of any length and script."""
    images = [
        np.full(shape, 200, np.uint8) for shape in ((8, 8, 1), (300, 100, 3), (1, 500, 3), (80, 80, 1), (2, 2, 3))
    ]
    names = ["", "Schürze", "x" * 300, "two\nlines <b>", "Ж"]
    tiles = [(name, ["→ é", name], dashboard.WRONG, image) for name, image in zip(names, images, strict=True)]
    sheet = dashboard.draw(tiles)
    wide, high = dashboard.TILE + dashboard.GAP, dashboard.TILE + 3 * dashboard.TEXT + 2 * dashboard.GAP
    assert sheet.shape == (2 * high + dashboard.GAP, 4 * wide + dashboard.GAP, 3) and sheet.dtype == np.uint8
    middle = dashboard.GAP + dashboard.TEXT + 2 + dashboard.TILE // 2, dashboard.GAP + dashboard.TILE // 2
    assert sheet[middle].tolist() == [200, 200, 200], "the first image is where it should be, and not smoothed"
    assert (sheet[-1] == 255).all() and (sheet[:, -1] == 255).all(), "nothing runs over the edge"


def test_long_lines_are_cut():
    font = ImageFont.load_default(11)
    assert dashboard.fit("a  b\nc", font) == "a b c" and dashboard.fit("", font) == ""
    cut = dashboard.fit("W" * 100, font)
    assert cut.endswith("W…") and font.getlength(cut) <= dashboard.TILE


def test_layout_names_what_a_run_has():
    def charts(logged, truth=True):
        return {
            category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
            for category in dashboard.layout(logged, "held_out", truth).category
        }

    plain = charts(["loss/total", "loss/weight_decay", "train/accuracy", "optimizer/learning_rate"])
    assert list(plain) == ["Accuracy", "Loss", "Optimizer", "Speed"], "no weights, no group for them"
    assert plain["Accuracy"]["evaluation: averaged and raw weights"] == [
        "^held_out/accuracy$", "^held_out/accuracy_raw$",
    ]  # fmt: skip
    assert plain["Loss"]["terms"] == ["^loss/"] and "trusted examples, one update ahead" not in plain["Loss"]
    weighted = ["train/accuracy", "train/accuracy_true_label", "weight/clean", "weight/noisy"]
    assert len(charts(weighted)["Wrong labels"]) == 2, "ω and its area, no λ"
    assert "Wrong labels" not in charts(weighted, truth=False)


@pytest.fixture
def run(tiny_config, tmp_path):
    """The work folder of a run that is logged at 2 and 4 and evaluated at 3 and 4."""
    tiny_config.eval_every_steps = 3
    train_and_evaluate(tiny_config, str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.slow
def test_a_real_tensorboard(run):
    """Its server reads the layout, finds the charts' data, and has one row of hyperparameters.

    The picture that is due at step 3 comes with the metrics of step 4.
    """
    check_event_files(run)
    check_server(run.parent)


def check_event_files(run):
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert [event.step for event in events.Tensors("suspects")] == [4]
    width, height, png = events.Tensors("suspects")[0].tensor_proto.string_val[:3]
    assert int(width) == 4 * (dashboard.TILE + dashboard.GAP) + dashboard.GAP and int(height) and png[:4] == b"\x89PNG"
    patterns = [
        tag
        for category in dashboard.layout(tags, "test", True).category
        for chart in category.chart
        for tag in chart.multiline.tag
    ]
    unknown = [p for p in patterns if not any(t.startswith(p.strip("^$")) for t in tags)]
    assert not unknown, "each name in the layout stands for something that is there"


def check_server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        f"--logdir={folder}",
        f"--port={port}",
        "--load_fast=false",
    ]
    address = f"http://127.0.0.1:{port}/data/plugin"

    def ask(path, body=None):
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/{path}", body and json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        layout = {}
        for _ in range(120):  # it takes seconds to start, and then to read
            try:
                layout = ask("custom_scalars/layout")
            except OSError:
                assert server.poll() is None, "TensorBoard ended"
            if layout:
                break
            time.sleep(0.5)
        assert [group["title"] for group in layout["category"]] == list(dashboard.CHARTS)
        (pattern,) = layout["category"][1]["chart"][3]["multiline"]["tag"]
        found = ask(f"custom_scalars/scalars?run=run&tag={pattern}")
        assert found["regex_valid"] and list(found["tag_to_events"]) == ["weight/auroc"]
        assert [step for _, step, _ in found["tag_to_events"]["weight/auroc"]] == [2, 4]
        experiment = ask("hparams/experiment", {"experimentName": ""})
        assert {one["name"] for one in experiment["hparamInfos"]} == set(dashboard.HYPERPARAMETERS)
        assert {one["name"]["tag"] for one in experiment["metricInfos"]} == {"test/accuracy", "weight/auroc"}
        sessions = ask(
            "hparams/session_groups",
            {
                "experimentName": "",
                "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"],
                "colParams": [],
                "startIndex": 0,
                "sliceSize": 10,
            },
        )
        (group,) = sessions["sessionGroups"]
        assert group["hparams"]["noise.rate"] == 0.4 and group["hparams"]["method.name"] == "ieg"
    finally:
        server.kill()
        server.wait()
