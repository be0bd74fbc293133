"""Learning rates by layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.methods.parts import optimizers
from ieg_jax.train import finetune, schedules


def group(**changes):
    keys = default.get_config().finetune
    keys.update(changes)
    return keys


def test_the_order_of_layers_follows_from_their_numbers():
    names = ["head", "norm", "stem_conv", "stem_norm", "block10", "block2", "stage1_block0", "stage1_block1"]
    assert finetune.depths(names[:6]) == {
        "stem_conv": 0, "stem_norm": 0, "block2": 1, "block10": 2, "norm": 3, "head": 3,
    }  # fmt: skip
    assert finetune.depths([*names[6:], "stage2_block0", "init_conv", "head"]) == {
        "init_conv": 0, "stage1_block0": 1, "stage1_block1": 2, "stage2_block0": 3, "head": 4,
    }  # fmt: skip


ORDERED = {family: name for name, family in models.REGISTRY.items() if name not in (*finetune.UNORDERED, "mlp")}


@pytest.mark.parametrize("name", ORDERED.values())
def test_the_order_is_that_in_which_layers_are_called(name):
    model = default.get_config().model
    model.name = name
    model.depth = 10 if name == "wide_resnet" else 2
    network, called = models.create(model, 3), []

    def note(call, arguments, keywords, layer):
        if layer.module.path:
            called.append(layer.module.path[0])
        return call(*arguments, **keywords)

    size = 28 if name.endswith("14") else 32
    with nn.intercept_methods(note):
        shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((2, size, size, 3)), train=True))
    place = finetune.depths(shapes["params"])
    order = [place[layer] for layer in dict.fromkeys(called) if layer in place]
    assert order == sorted(order) and order[0] <= 1 and place["head"] == max(order) > 1


def test_networks_whose_order_is_not_known_have_one_rate():
    config = default.get_config()
    config.model.name, config.finetune.layer_decay = "densenet100", 0.9
    with pytest.raises(UserError, match="not tell their order; set it to 1.0"):
        finetune.validate(config)
    with pytest.raises(UserError, match="none named head"):
        finetune.rates({"a": {"k": 0.0}}, group(probe_epochs=1.0), 5, jnp.asarray(0))


def test_rates_by_hand():
    params = {"stem": {"k": 0.0}, "block1": {"k": 0.0}, "block2": {"k": 0.0}, "norm": {"k": 0.0}, "head": {"k": 0.0}}
    keys = group(body_rate=0.1, layer_decay=0.5, probe_epochs=1.0)
    before, after = (
        {name: float(one["k"]) for name, one in finetune.rates(params, keys, 10, jnp.asarray(step)).items()}
        for step in (9, 10)
    )
    assert before == {"head": 1.0, "norm": 0.0, "block2": 0.0, "block1": 0.0, "stem": 0.0}
    expected = {"head": 1.0, "norm": 0.1, "block2": 0.05, "block1": 0.025, "stem": 0.0125}
    assert after == pytest.approx(expected)
    assert finetune.rates(params, group(), 0, jnp.asarray(0)) == 1.0


def test_an_update_with_rates_by_hand():
    params = {"body": {"k": jnp.ones(2)}, "head": {"k": jnp.ones(2)}}
    grads = jax.tree.map(lambda p: 2 * p, params)
    direction = optax.trace(decay=0.9)
    rates = {"body": {"k": 0.01}, "head": {"k": 0.1}}
    new, _, _ = optimizers.apply(direction, grads, direction.init(params), params, rates)
    np.testing.assert_allclose(new["body"]["k"], 1 - 0.02)
    np.testing.assert_allclose(new["head"]["k"], 1 - 0.2)


def test_the_rate_rises_to_that_of_the_schedule():
    keys = default.get_config().schedule
    keys.name, keys.base_lr = "cosine", 0.4
    plain, warm = schedules.create(keys, 1, 100), schedules.create(keys, 1, 100, warmup=10)
    for step in (0, 5, 10, 60):
        assert float(warm(step)) == pytest.approx(float(plain(step)) * min(step / 10, 1))
