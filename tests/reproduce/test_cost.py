"""The estimate of work, against what XLA counts."""

import jax
import pytest
from ml_collections import ConfigDict
from runs import ROOT
from small_step import make, make_batch

from configs import cifar10, default
from ieg_jax.reproduce import cost


def counted(name, **keys):
    """Floating-point operations of a compiled step, in thirds of a supervised step."""

    def flops(name, **keys):
        _, _, state, step = make(name, **{"model.width": 4.0}, **keys)
        batch = make_batch()
        batch["views"] = batch["views"][:, :1]
        return jax.jit(step).lower(state, batch, jax.random.key(0)).compile().cost_analysis()["flops"]

    return 3 * flops(name, **keys) / flops("supervised")


@pytest.mark.parametrize(
    "name, keys, passes",
    [
        ("ieg", {}, 22),
        ("l2r", {}, 10),
        ("eg", {}, 13),
        ("mixmatch", {}, 11),
        ("ieg", {"method.consistency_weight": 0.0}, 20),
        ("ieg", {"method.mixup": False}, 13),
        ("ieg", {"method.relabel": False, "method.mixup": False, "method.consistency_weight": 0.0}, 11),
    ],
)
def test_passes_of_a_step(name, keys, passes):
    config = default.get_config()
    config.update_from_flattened_dict(keys)
    config.method.name = name
    assert cost.passes(config) == passes
    assert counted(name, **keys) == pytest.approx(passes, rel=0.06)


def test_flops_of_a_training(monkeypatch):
    """Of WRN-28-10: 5.24 billion multiplications and additions for an image of 32×32, as is commonly reported.

    XLA leaves out those with padding: of 3×3 convolutions a share of (1 − 2/(3·32))² remains at 32×32, 0.92² at 8×8.
    """
    lowest, highest = 0.92**2 * 5.24e9, 5.24e9
    monkeypatch.chdir(ROOT)
    config = ConfigDict(cifar10.get_config("method=supervised").to_dict())
    config.num_train_steps, config.batch_size = 1, 1
    one = cost.training_flops(config)
    assert 3 * 2 * lowest < one < 3 * 2 * highest
    config.num_train_steps, config.batch_size = 0, 100
    config.num_train_epochs = 2.0
    assert cost.training_flops(config) == pytest.approx(one * 100_000)
