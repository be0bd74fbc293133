"""INCV: a selection by hand, the estimate of the noise, who learns what, and rounds in a run."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from runs import variables
from small_step import BATCH, CLASSES, make, make_batch

from ieg_jax import config as config_lib
from ieg_jax.data.load import load_data
from ieg_jax.errors import UserError
from ieg_jax.methods import incv
from ieg_jax.methods.parts import losses
from ieg_jax.train import check
from ieg_jax.train.loop import train_and_evaluate

D, S = incv.DISCARDED, incv.SELECTED


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5, 0.9])
def test_the_estimate_inverts_its_formula(noise):
    share = (1 - noise) ** 2 + noise**2 / 9
    assert incv.estimated_noise(share, 10) == pytest.approx(noise, abs=1e-6)
    assert incv.estimated_noise(0.0, 10) == 0.9, "less than by chance"


def test_what_is_left_of_the_noise_in_samples():
    """Labels with 30 % of uniform noise, and predictions that have the same: among those that agree, τ are wrong."""
    rng, count = np.random.default_rng(0), 400_000
    true = rng.integers(0, 5, count)
    given, predicted = (np.where(rng.random(count) < 0.3, (true + rng.integers(1, 5, count)) % 5, true) for _ in "12")
    agree = given == predicted
    assert incv.estimated_noise(agree.mean(), 5) == pytest.approx(0.3, abs=0.01)
    assert float(incv.remaining_noise(0.3, 4)) == pytest.approx((given != true)[agree].mean(), abs=0.002)


def test_a_selection_by_hand():
    part = np.array([0, 0, 0, 0, 1, 1, 1, 1, S, D], np.int32)
    labels = np.array([0, 0, 1, 1, 0, 1, 2, 2, 0, 0])
    sure = np.eye(3)[[0, 1, 1, 0, 0, 0, 0, 2, 1, 1]] * 0.7 + 0.1  # of the network that did not see the example
    sure[3] = [0.94, 0.01, 0.05]  # the largest loss of its half
    sure[6] = [0.85, 0.10, 0.05]
    other = np.eye(3)[np.full(10, 2)]
    probabilities = np.where((part == 0)[None, :, None], [other, sure], [sure, other])
    after, noise = incv.selected(probabilities, labels, part, None, discard=False)
    assert after.tolist() == [S, 0, S, 0, S, 1, 1, S, S, D]
    assert (1 - noise) ** 2 + noise**2 / 2 == pytest.approx(0.5), "four of eight"
    after, same = incv.selected(probabilities, labels, part, 0.4, discard=True)
    assert same == 0.4 and after.tolist() == [S, 0, S, D, S, 1, D, S, S, D], "⌊⅔ of 2⌋ of each half"


def test_who_learns_what():
    context, method, state, _ = make("incv", **{"batch_size": BATCH, "method.forget_epochs": 2.0})
    batch = make_batch()
    part = np.full(state.method["part"].shape, D, np.int32)
    part[batch["row"]] = np.arange(BATCH) % 3  # 0, 1 and selected
    state = state.replace(method=state.method | {"part": jnp.asarray(part)})
    chosen = np.asarray(method.supervise(state, batch, None).prepared)
    for network in (0, 1):
        assert chosen[network].tolist() == [float(i % 3 in (network, 2)) for i in range(BATCH)]
    memory = state.method | {"rounds": jnp.int32(4), "noise": jnp.float32(0.5), "began": jnp.float32(1.0)}
    state = state.replace(method=memory, step=jnp.int32(20))  # 50 examples, 16 a step: long after the two epochs
    chosen = np.asarray(method.supervise(state, batch, None).prepared)
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    by_loss = np.argsort(losses.cross_entropy(logits, context.one_hot(batch["label"])), -1)
    count = int(BATCH * (1 - 0.25 / (0.25 + 3 * 0.25)))
    assert count == 12 and CLASSES == 4
    for network in (0, 1):
        assert set(np.flatnonzero(chosen[network])) == set(by_loss[1 - network, :count].tolist())


def test_a_batch_without_examples_for_a_network():
    _, method, state, _ = make("incv")
    batch = make_batch()
    state = state.replace(method=state.method | {"part": jnp.zeros_like(state.method["part"])})
    supervision = method.supervise(state, batch, None)
    assert np.isfinite(method.loss(state.params, state, batch, supervision, None)[0])


def test_rounds():
    keys = {"method.selection_rounds": 2, "method.selection_epochs": 1.5}
    _, method, state, _ = make("incv", **keys)
    labels, part = np.arange(8) % CLASSES, np.arange(8, dtype=np.int32) % 2
    right, wrong = np.eye(CLASSES)[labels], np.eye(CLASSES)[(labels + 1) % CLASSES]
    p = np.where((np.arange(8) < 6)[:, None], right, wrong)
    look = types.SimpleNamespace(labels=labels, probabilities=lambda: np.stack([p, p]))

    def after(epoch, memory):
        look.epoch, look.memory = epoch, lambda: memory
        return method.on_epoch(state.replace(method=memory), look)

    memory = state.method | {"part": part}
    assert after(1, memory)[1] is None
    first, rows = after(2, memory)
    assert first.method["part"].tolist()[:6] == [S] * 6 and first.method["rounds"] == 1
    left = [row for row in (6, 7) if first.method["part"][row] != D]
    assert rows["main"].tolist() == [0, 1, 2, 3, 4, 5, *left]
    assert after(2, first.method)[1] is None
    second, rows = after(3, first.method)
    assert rows["main"].tolist() == [0, 1, 2, 3, 4, 5] and second.method["began"] == 3
    assert second.method["noise"] == first.method["noise"] > 0
    assert after(9, second.method)[1] is None


def test_too_many_rounds(tiny_config):
    tiny_config.method.name, tiny_config.num_train_steps, tiny_config.num_train_epochs = "incv", 0, 200.0
    with pytest.raises(UserError, match=r"selection_rounds=4 of .*=50 take 200 epochs, and num_train_epochs=200"):
        check.validate(config_lib.resolve(tiny_config))


@pytest.mark.slow
@pytest.mark.parametrize("noise, epochs, selected, right", [(0.0, 30.0, 0.9, 1.0), (0.4, 10.0, 0.4, 0.93)])
def test_a_round_selects_right_labels(tiny_config, tmp_path, noise, epochs, selected, right):
    """Of clean labels nearly all; of labels that are wrong in 36 of 100, few of these."""
    config = tiny_config
    steps = round(80 * epochs) + 10  # an epoch is 79.8 steps
    config.method.name, config.noise.rate, config.model.name = "incv", noise, "mlp"
    config.update_from_flattened_dict({
        "method.selection_rounds": 1, "method.selection_epochs": epochs, "num_train_steps": steps, "batch_size": 16,
        "schedule.name": "constant", "schedule.base_lr": 0.05, "checkpoint_every_steps": steps,
        "eval_every_steps": steps, "log_every_steps": steps, "augment.standard": "",
    })  # fmt: skip
    train_and_evaluate(config, str(tmp_path))
    data = load_data(config).train
    part = variables(tmp_path, steps)["[0]['method']['part']"][: len(data)]
    chosen = part == S
    assert chosen.mean() > selected
    assert (data.labels == data.clean_labels)[chosen].mean() >= right


@pytest.mark.parametrize("discard, count", [(True, 13), (False, 11)])
def test_co_teaching_leaves_out_what_is_left_of_the_noise(discard, count):
    """ε = 0.4, K = 4: τ = 0.16 / (0.16 + 3 · 0.36) = 0.13 of 16, and within pairs 0.16 / (0.16 + 0.36) = 0.31."""
    _, method, state, _ = make("incv", **{"method.discard": discard, "method.selection_rounds": 2})
    memory = state.method | {"rounds": jnp.int32(2), "noise": jnp.float32(0.4)}
    state = state.replace(method=memory, step=jnp.int32(10_000))
    chosen = method.supervise(state, make_batch(), None).prepared
    np.testing.assert_array_equal(chosen.sum(1), count)
