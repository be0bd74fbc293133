"""The peers compute what we compute: loss, ω, λ, new weights, moving averages, from the same start and batch."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks import peer
from benchmarks.bench import peers, programs
from ieg_jax.train import metrics

BATCH, SIZE = 8, 16
NETWORKS = {
    "wide_resnet": dataclasses.replace(programs.SMALL, batch=BATCH, size=SIZE),
    "resnet29": dataclasses.replace(programs.RESNET29, batch=BATCH, size=SIZE),
}
INTERPRETERS = peers.interpreters(os.environ.get("TORCH_PYTHON", ""))


def begun(method, network):
    step = programs.step_of(method, network, {})
    step.begin()
    return step


def started(framework, network, arrays):
    try:
        return peers.Peer(framework, INTERPRETERS[framework], network, arrays)
    except peers.Absent as error:
        pytest.skip(str(error))


def left_by(step):
    state = step.state
    tree = {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema_params}
    return flatten_dict(jax.device_get(tree), sep="/")


def test_padding_is_that_of_same():
    for size, kernel, stride in ((32, 3, 2), (32, 3, 1), (32, 1, 2), (7, 3, 2)):
        image = np.ones((1, size, size, 1), np.float32)
        weights = np.arange(kernel * kernel, dtype=np.float32).reshape(kernel, kernel, 1, 1)
        dimensions = ("NHWC", "HWIO", "NHWC")
        pads = [peer.same_padding(size, kernel, stride)] * 2
        found, same = (
            jax.lax.conv_general_dilated(image, weights, (stride, stride), how, dimension_numbers=dimensions)
            for how in (pads, "SAME")
        )
        np.testing.assert_array_equal(found, same)


def test_a_framework_that_is_not_there_is_a_sentence():
    with pytest.raises(peers.Absent, match=r"benchmarks\.peer_nowhere: .*No module named benchmarks\.peer_nowhere"):
        peers.Peer("nowhere", INTERPRETERS["tensorflow"], NETWORKS["wide_resnet"], {})
    with pytest.raises(peers.Absent, match="torch: /nowhere/python cannot be run"):
        peers.Peer("torch", "/nowhere/python", NETWORKS["wide_resnet"], {})


@pytest.mark.slow
@pytest.mark.parametrize("framework", INTERPRETERS)
@pytest.mark.parametrize("title", NETWORKS)
def test_the_same_steps(framework, title, tmp_path):
    network = NETWORKS[title]
    step = begun("ieg", network)
    arrays = programs.arrays_of(step) | peers.draw_of(step)
    with started(framework, network, arrays) as other:
        answer = other.step("ieg", str(tmp_path / "ieg.npz"))
    step()
    window = jax.device_get(step.window)
    seen = metrics.window_examples(window)
    theirs = dict(np.load(tmp_path / "ieg.npz"))
    assert answer["seconds"] > 0
    np.testing.assert_allclose(answer["loss"], window.averages["loss/total"].compute(), rtol=1e-4)
    np.testing.assert_allclose(theirs["weights"], np.ravel(seen.weights), atol=1e-4)
    assert np.ptp(theirs["weights"]) > 0.01, "ω of examples that do not differ would say nothing"
    np.testing.assert_array_equal(theirs["trust"], np.ravel(seen.trust))
    assert 0 < theirs["trust"].sum() < BATCH
    ours = left_by(step)
    moved = [np.abs(ours[name] - arrays[name]).max() for name in ours if name.startswith("params")]
    assert np.median(moved) > 5e-4, "far more than what is let pass below"
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

    supervised = begun("supervised", network)
    with started(framework, network, arrays | programs.arrays_of(supervised)) as other:
        answer = other.step("supervised", str(tmp_path / "supervised.npz"))
    supervised()
    loss = jax.device_get(supervised.window).averages["loss/total"].compute()
    np.testing.assert_allclose(answer["loss"], loss, rtol=1e-4)
    theirs = dict(np.load(tmp_path / "supervised.npz"))
    for name, value in left_by(supervised).items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
