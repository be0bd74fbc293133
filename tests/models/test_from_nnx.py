"""Networks of Flax NNX beside linen modules that compute the same."""

import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from sklearn.base import clone

import ieg_jax
from configs import default
from ieg_jax import inference, methods
from ieg_jax.classifier import IEGClassifier
from ieg_jax.methods.base import Context
from ieg_jax.methods.parts import optimizers
from ieg_jax.models import own
from ieg_jax.models.from_nnx import from_nnx
from ieg_jax.train.step import create_state, train_step

IMAGE = (4, 4, 3)


class Told(nnx.Module):
    """It is told whether it trains, and has a list of layers."""

    def __init__(self, num_classes, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        layers = [nnx.Linear(4, 4, rngs=rngs)]
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers
        self.head = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, x, train):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.head(self.layers[0](x.mean((1, 2))))


class Native(Told):
    """Its mode is set by train() and eval(), as is usual in NNX."""

    def __call__(self, x):
        return self.head(self.layers[0](nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="0")(x)


class Twin(nn.Module):
    """The same as a linen module, with variables of the same paths."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(self.num_classes, name="head")(Layers(name="layers")(nn.relu(x).mean((1, 2))))


class Dropped(nnx.Module):
    def __init__(self, *, rngs):
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x.reshape(len(x), -1)))


def make(network, name="ieg"):
    """A context, a bound method and an initial state."""
    config = default.get_config()
    config.method.name, config.batch_size = name, 6
    network = own.adapt(network, 3, 1, IMAGE)
    context = Context(FrozenConfigDict(config), network, optimizers.create(config.optimizer), 3, num_examples=6)
    method = methods.get(name).bind(context)
    return context, method, create_state(context, method, jax.random.key(0), IMAGE, 6)


def batch():
    rng = np.random.default_rng(0)
    label = jnp.arange(6) % 3
    return {
        "image": jnp.asarray(rng.normal(size=(6, *IMAGE)), jnp.float32),
        "views": jnp.asarray(rng.normal(size=(6, 1, *IMAGE)), jnp.float32),
        "probe_image": jnp.asarray(rng.normal(size=(6, *IMAGE)), jnp.float32),
        "label": label, "clean_label": label, "id": jnp.arange(6), "row": jnp.arange(6), "probe_label": label,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [Told, Native])
def test_a_step_with_meta_gradient_is_that_of_the_linen_module(kind):
    """Weights, averages of batch norm, ω and λ: three steps, each with the gradient through the lookahead."""
    results = []
    _, _, start = make(Twin(3))
    for network in (Twin(3), from_nnx(kind, num_classes=3)):
        context, method, state = make(network)
        assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, start.params)
        state = state.replace(params=start.params, ema_params=start.ema_params, batch_stats=start.batch_stats)
        step = jax.jit(
            lambda state, m=method, c=context: train_step(
                state, batch(), jax.random.key(1), context=c, method=m, schedule=lambda step: 0.1
            )
        )
        for _ in range(3):
            state, observed = step(state)
        images = batch()["image"]
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        results.append((state, observed.examples, context.network.apply(variables, images, train=False)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.ptp(results[1][1].weights) > 0.01 and np.abs(results[1][0].batch_stats["norm"]["mean"]).max() > 1e-3


def test_initial_weights_follow_from_the_seed_and_several_networks_differ():
    network = own.adapt(from_nnx(Told, 3), 3, 1, IMAGE)
    one, same, other = (
        network.init(jax.random.key(seed), jnp.zeros((1, *IMAGE)), train=True)["params"]["conv"]["kernel"]
        for seed in (0, 0, 1)
    )
    assert (one == same).all() and np.abs(one - other).max() > 0.01
    kernels = make(from_nnx(Native, 3), "co_teaching")[2].params["layers"]["0"]["kernel"]
    assert kernels.shape == (2, 4, 4) and np.abs(kernels[0] - kernels[1]).max() > 0.01
    again = own.adapt(from_nnx(Told, 3), 3, 1, IMAGE)
    assert again == network and hash(again) == hash(network), "so that nothing is compiled twice"


def quick(network, **arguments):
    views, config = ("crop(pad=1)", "cutout(0.2)"), {"mesh.data": 1, "eval_every_steps": 10**6}
    usual = {"augment": views, "steps": 2, "batch_size": 8, "verbose": 0, "final": "network", "config": config}
    return IEGClassifier(network=network, **usual | arguments)


@pytest.mark.slow
def test_in_the_classifier(tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8), np.arange(40) % 3
    network = from_nnx(Native, 3)
    assert ieg_jax.from_nnx is from_nnx
    clf = clone(quick(network, workdir=str(tmp_path))).fit(X, y, X[:9], y[:9])
    assert clf.result_["model"] == json.loads((tmp_path / "network.json").read_text())["class"] == "Native"
    probabilities = clf.predict_proba(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clf)).predict_proba(X), probabilities)
    trained = inference.load(tmp_path, network=from_nnx(Native, 3))
    np.testing.assert_allclose(inference.predictor(trained)(clf._split(X)), probabilities, atol=1e-6)
    assert trained.params["layers"]["0"]["kernel"].shape == (4, 4)
    with pytest.raises(ValueError, match="trained with the network Native, and here it is Told"):
        clone(clf).set_params(network=from_nnx(Told, 3)).fit(X, y, X[:9], y[:9])


@pytest.mark.parametrize(
    "network, message",
    [
        (Native(3, rngs=nnx.Rngs(0)), r"Native is a network of Flax NNX.*give network=ieg_jax.from_nnx\(Native"),
        (nnx.bridge.to_linen(Native, 3), r"Native is a network of Flax NNX"),
        (Native, r"Native is a network of Flax NNX.*from_nnx\(Native"),
        (from_nnx(Dropped), r"Dropped keeps random numbers \(nnx.Rngs\) for its calls"),
        (from_nnx(Native, 4), r"Native makes \(2, 4\) of images .*, expected logits \(2, 3\)"),
        (from_nnx(Native), "Native cannot be made: TypeError: .*num_classes"),
    ],
)
def test_what_is_refused(network, message, tmp_path):
    X, y = np.zeros((40, *IMAGE), np.uint8), np.arange(40) % 3
    with pytest.raises(ValueError, match=message):
        quick(network, workdir=str(tmp_path / "run")).fit(X, y, X[:9], y[:9])
    with pytest.raises(ValueError, match=message.replace(r"\(2, 4, 4", r"\(2, 8, 8")):
        own.adapt(network, 3, 1, IMAGE)
