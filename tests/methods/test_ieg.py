"""One step of IEG on a linear network, worked out in numpy: what each key does to which number."""

import jax
import numpy as np
import pytest
from conftest import x64
from linear import (
    BLOCKS,
    CLASSES,
    DRAW,
    GROUPS,
    SIZE,
    cross_entropy,
    differences,
    gradient,
    make,
    make_batch,
    normalised,
    pixels,
    pool,
    softmax,
    views,
)  # fmt: skip

from ieg_jax.methods.parts import mixup

# meta.layers -> which rows of the weights the lookahead moves: two rows of the kernel, and the bias.
LAYERS = {".*": (1, 1, 1), "kernel$": (1, 1, 0), "^head/b": (0, 0, 1)}


def by_hand(config, weights, momentum, batch):
    """Algorithm 1 of the paper; the derivatives by ω and λ by differences of the trusted loss after the lookahead."""
    method, meta, optimizer = config.method, config.meta, config.optimizer
    label, inputs = np.eye(CLASSES)[batch["label"]], views(batch)
    probe, probe_label = pixels(batch["probe_image"]), np.eye(CLASSES)[batch["probe_label"]]
    norm = normalised if method.normalize_logits else lambda logits: logits

    def guess(w):
        sharp = (sum(softmax(norm(view @ w)) for view in inputs) / len(inputs)) ** (1 / method.temperature)
        return sharp / sharp.sum(-1, keepdims=True)

    def decay(w):
        return (
            0.5 * optimizer.weight_decay * ((w**2).sum() if optimizer.weight_decay_on == "all" else (w[:2] ** 2).sum())
        )

    def decay_after(w):
        if not meta.weight_decay:
            return 0
        if meta.weight_decay_on == "loss" or optimizer.weight_decay_on == "all":
            return decay(w)
        return 0.25 * optimizer.weight_decay * (w**2).sum()  # the authors' ResNet29: half of what kernels have

    def blend(trust, g):
        return trust[:, None] * label + (1 - trust[:, None]) * g

    g = guess(weights)

    def after(importance, trust):
        def noisy_loss(w):
            through = guess(w) if meta.pseudo_label_gradient else g
            return (importance * cross_entropy(blend(trust, through), inputs[0] @ w)).sum() + decay(w)

        start = momentum if meta.momentum else 0 * momentum
        slope = gradient(noisy_loss, weights)
        direction = optimizer.momentum * start + slope
        if optimizer.nesterov:
            direction = optimizer.momentum * direction + slope
        moved = weights - meta.learning_rate * direction * np.array(LAYERS[meta.layers])[:, None]
        return cross_entropy(probe_label, probe @ moved).mean() + decay_after(moved)

    importance = np.full(SIZE, 1 / SIZE)
    trust = np.full(SIZE, method.label_trust_init if method.relabel else 1.0)
    by_importance = differences(lambda v: after(v, trust), importance)
    by_trust = differences(lambda v: after(importance, v), trust)
    found = {"g": g, "after": after(importance, trust)}
    found["ω"] = np.maximum(-by_importance, 0) / (np.maximum(-by_importance, 0).sum() + 1e-5)
    logits = inputs[0] @ weights
    found["weighted"] = method.supervised_scale * (found["ω"] * cross_entropy(blend(trust, g), logits)).sum()
    if method.relabel:
        found["λ"] = np.where(by_trust < 0, 1.0, 0.0)
        relabelled = cross_entropy(blend(found["λ"], g), logits).mean()
        found["relabelled"] = method.supervised_scale * relabelled
    if method.mixup:
        mixed, target = pool(batch, np.where((found["ω"] < method.threshold)[:, None], g, label))
        losses = [
            cross_entropy(
                target[:, part], norm((mixed[:, part] @ weights).reshape(-1, CLASSES)).reshape(2, -1, CLASSES)
            )
            for part in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
        ]
        found["mixup_trusted"] = losses[0].mean()
        found["mixup_noisy"] = method.unlabeled_weight * np.mean(losses[1:])
    if method.consistency_weight:
        p = softmax(logits)
        each = [(p * (np.log(p) - np.log(softmax(view @ weights)))).sum(-1).mean() for view in inputs[1:]]
        found["consistency"] = method.consistency_weight * np.mean(each)
    return found | {"weight_decay": decay(weights)}


USUAL = {"optimizer.weight_decay": 0.05}
LOSSES = {"weighted", "relabelled", "mixup_trusted", "mixup_noisy"}
META = {"after", "ω", "weighted"}
# Keys -> the numbers that are others with them.
KEYS = [
    ({}, set()),
    ({"method.temperature": 1.0}, {"g", "after", "ω", *LOSSES}),
    ({"method.normalize_logits": False}, {"g", "after", "ω", *LOSSES}),
    ({"method.unlabeled_weight": 2.0}, {"mixup_noisy"}),
    ({"method.consistency_weight": 3.0}, {"consistency"}),
    ({"method.consistency_weight": 0.0}, {"consistency"}),
    ({"method.supervised_scale": 1.0}, {"weighted", "relabelled"}),
    ({"method.threshold": 0.0}, {"mixup_trusted", "mixup_noisy"}),
    ({"method.threshold": 0.3}, {"mixup_trusted", "mixup_noisy"}),
    ({"method.mixup": False}, {"mixup_trusted", "mixup_noisy"}),
    ({"method.label_trust_init": 0.5}, META),
    ({"method.relabel": False}, META | {"λ", "relabelled"}),
    ({"meta.learning_rate": 0.7}, META),
    ({"meta.momentum": False}, META),
    ({"meta.weight_decay": False}, META),
    ({"meta.layers": "kernel$"}, META | {"λ", "relabelled"}),
    ({"meta.layers": "^head/b"}, META | {"λ", "relabelled"}),
    ({"meta.pseudo_label_gradient": True}, META),
    ({"optimizer.weight_decay_on": "kernels"}, META | {"weight_decay"}),
    ({"optimizer.weight_decay_on": "kernels", "meta.weight_decay_on": "loss"}, META | {"weight_decay"}),
    ({"optimizer.weight_decay": 0.0}, META | {"weight_decay"}),
    ({"optimizer.nesterov": True}, META),
    ({"optimizer.momentum": 0.5}, META),
]


def in_words(keys):
    return ",".join(f"{key}={value}" for key, value in keys.items()) or "as usual"


@pytest.mark.parametrize("keys, others", KEYS, ids=[in_words(keys) for keys, _ in KEYS])
def test_what_each_key_does_to_which_number(keys, others, monkeypatch):
    monkeypatch.setattr(mixup, "draw", lambda *args, **arguments: DRAW)
    batch = make_batch()
    with x64():
        usual = make("ieg", **USUAL)[0].config
        context, method, state, weights, momentum = make("ieg", **USUAL | keys)
        supervision = method.supervise(state, batch, None)
        value, aux = method.loss(state.params, state, batch, supervision, None)
    found = {name: float(term) for name, term in aux.terms.items()}
    assert float(value) == pytest.approx(sum(found.values()), rel=1e-12)
    found |= {"g": supervision.pseudo_label, "ω": supervision.example_weights}
    found |= {"after": supervision.observed["loss/trusted_after_lookahead"]}
    if supervision.label_trust is not None:
        found["λ"] = supervision.label_trust
    expected = by_hand(context.config, weights, momentum, batch)
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(found[name], number, rtol=1e-6, atol=1e-9, err_msg=name)

    plain = by_hand(usual, weights, momentum, batch)
    differ = {name for name in plain if name not in expected or not np.allclose(plain[name], expected[name], 1e-6, 0)}
    assert differ == others


def test_eg_has_no_isolation_but_all_else():
    """Every noisy example takes its pseudo label into the pool, and neither ω nor λ are there."""
    batch = make_batch()
    with x64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixup, "draw", lambda *args, **arguments: DRAW)
        context, method, state, weights, momentum = make("eg", **USUAL)
        supervision = method.supervise(state, batch, None)
        _, aux = method.loss(state.params, state, batch, supervision, None)
    expected = by_hand(context.config, weights, momentum, batch)
    np.testing.assert_allclose(supervision.pseudo_label, expected["g"], rtol=1e-9)
    assert aux.terms.keys() == {"mixup_trusted", "mixup_noisy", "consistency", "weight_decay"}
    for name, term in aux.terms.items():
        assert float(term) == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize(
    "name, kind, alpha", [("ieg", "approximate", 0.5), ("eg", "exact", 0.5), ("mixmatch", "exact", 2.0)]
)
def test_the_pool_is_mixed_as_the_keys_say(name, kind, alpha):
    """The images are those of the draw that the keys `mixup_coefficient` and `mixup_alpha` ask for."""
    batch, key = make_batch(), jax.random.key(3)
    with x64():
        _, method, state, *_ = make(name, **{"method.mixup_coefficient": kind, "method.mixup_alpha": alpha})
        found = np.asarray(method.supervise(state, batch, key).prepared[0])
        drawn = mixup.draw(key, GROUPS, 2, 2, BLOCKS, kind, alpha)
        expected, _ = pool(batch, np.zeros((SIZE, CLASSES)), jax.device_get(drawn))
    np.testing.assert_allclose(found.reshape(-1, 2), expected[..., :2].reshape(-1, 2), rtol=1e-6)
