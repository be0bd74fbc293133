"""The estimated cost of a training, against what XLA counts."""

import jax
import pytest
from ml_collections import ConfigDict
from runs import ROOT
from small_step import make, make_batch

from configs import cifar10, cifar10n, default
from ieg_jax import methods
from ieg_jax.methods import ssr_plus
from ieg_jax.reproduce import cost

# The network of a few layers that is counted with is not much larger than V with the usual units.
SMALL_CORRECTION = {"method.label_units": 4, "method.hidden_units": 4}


def flops(name, **keys):
    """The floating-point operations of a compiled step."""
    _, _, state, step = make(name, **{"model.width": 4.0}, **keys)
    batch = make_batch()
    batch["views"] = batch["views"][:, :1]
    return jax.jit(step).lower(state, batch, jax.random.key(0)).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def one_pass():
    """The operations of a forward pass."""
    return flops("supervised") / 3


FAST = ("l2r", "fsr", "dividemix")
PASSES = [
    ("ieg", {}, 22),
    ("l2r", {}, 10),
    ("eg", {}, 13),
    ("mixmatch", {}, 11),
    ("l2b", {}, 10),
    ("meta_weight_net", {}, 10),
    ("mlc", SMALL_CORRECTION, 8),
    ("mlc", SMALL_CORRECTION | {"method.learn_trusted": False}, 8),
    ("emlc", {"method.label_units": 4, "method.enhancer_units": 4}, 14),
    ("gold_loss_correction", {}, 6),
    ("fsr", {}, 4),
    ("fsr", {"method.lookahead_layers": ".*"}, 10),
    ("fsr", {"method.lookahead_layers": ".*", "method.reward_by": "margin"}, 11),
    ("mentornet", {}, 3),
    ("mentornet_dd", {}, 4),
    ("rog", {}, 3),
    ("incv", {}, 6),
    ("sop", {}, 3),
    ("m_correction", {}, 4),
    ("ssr", {}, 3),
    ("ssr_plus", {}, 7),
    ("elr_plus", {}, 8),
    ("promix", {}, 18),
    ("dividemix", {}, 16),
    ("forward_correction", {}, 3),
    ("ieg", {"method.consistency_weight": 0.0}, 20),
    ("ieg", {"method.mixup": False}, 13),
    ("ieg", {"method.relabel": False, "method.mixup": False, "method.consistency_weight": 0.0}, 11),
]


@pytest.mark.parametrize(
    "name, keys, passes",
    [pytest.param(*case, marks=[] if case[0] in FAST and case[1] == {} else [pytest.mark.slow]) for case in PASSES],
)
def test_passes_of_a_step(monkeypatch, one_pass, name, keys, passes):
    # Beside this network f and h are not small.
    monkeypatch.setattr(ssr_plus, "UNITS", 8)
    monkeypatch.setattr(ssr_plus, "OUTPUTS", 4)
    config = default.get_config()
    config.update_from_flattened_dict(keys)
    config.method.name = name
    assert methods.get(name).passes(config) == passes
    assert flops(name, **keys) / one_pass == pytest.approx(passes, rel=0.06)


def test_flops_of_a_training(monkeypatch):
    """WRN-28-10 is commonly reported to take 5.24 billion multiplications, each with an addition, for a 32×32 image.

    XLA does not count those with padding. Of a 3×3 convolution this leaves a share of (1 − 2/(3·32))² at 32×32 pixels,
    and 0.92² at 8×8.
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


def test_flops_of_a_training_on_features(monkeypatch):
    """By hand: 1,500 steps, three passes, a network with two hidden layers of 256 on 1,280 features."""
    monkeypatch.chdir(ROOT)
    config = ConfigDict(cifar10n.get_config("method=supervised").to_dict())
    multiplications = 1280 * 256 + 256 * 256 + 256 * 10
    flops = 3 * 1500 * config.batch_size * 2 * multiplications
    assert flops < cost.training_flops(config) < 1.02 * flops
