"""The registry: which keys of the group `model` each network reads, and what is refused."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from conftest import x64

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.models.layers import Network

COMMON = {"name", "dtype", "remat", "convolutions", "pretrained"}  # what all networks read


def group(**keys):
    model = default.get_config().model
    model.update(keys)
    return model


class Recording:
    """The group `model`, which remembers the keys that were read."""

    def __init__(self, model):
        self.model, self.read = model, set()

    def __getattr__(self, key):
        self.read.add(key)
        return self.model[key]

    __getitem__ = __getattr__


@pytest.mark.parametrize("name", models.REGISTRY)
def test_reads_are_what_from_config_reads(name):
    recording = Recording(group(name=name))
    network = models.REGISTRY[name].from_config(recording, num_classes=3)
    assert recording.read == set(models.REGISTRY[name].READS)
    assert isinstance(network, Network) and network.num_classes == 3


@pytest.mark.parametrize("name", models.REGISTRY)
def test_what_is_read_matters(name):
    """Each key of READS makes another network, and no other key does."""
    other = {"depth": 16, "width": 2.0, "variant": "standard", "conventions": "torch"}
    assert other.keys() == models.UNSET.keys()
    usual = models.create(group(name=name), 3)
    changed = {key for key, value in other.items() if models.create(group(name=name, **{key: value}), 3) != usual}
    assert changed == set(models.REGISTRY[name].READS)


def test_every_key_is_known():
    model = group()
    assert {key: model[key] for key in models.UNSET} == models.UNSET
    assert set(model) == COMMON | models.UNSET.keys()
    assert {key for family in models.REGISTRY.values() for key in family.READS} == models.UNSET.keys()


@pytest.mark.parametrize("name", models.REGISTRY)
def test_defaults_are_allowed(name):
    models.validate(group(name=name))
    # The argument `reference` sets the variant of every network, and -1 is resolved only where it is read.
    models.validate(group(name=name, variant="standard", depth=-1, width=-1.0))


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"name": "mlp", "conventions": "torch"},
            r"model\.conventions='torch', but .*=mlp .*'own', .*\(resnet50, efficientnet_lite0, vit_ti16, ",
        ),
        ({"name": "vgg13", "depth": 28}, r"depth=28, but model\.name=vgg13 .* to 10, .*\(wide_resnet, mlp\)$"),
        (
            {"name": "resnet29_v2", "width": 0.5},
            r"width=0\.5, but model\.name=resnet29_v2 does not read it: set it to 1",
        ),
    ],
)
def test_a_key_that_is_set_and_not_read(keys, message):
    with pytest.raises(UserError, match=message):
        models.validate(group(**keys))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("name", "wide_resnets", "got 'wide_resnets', expected one of wide_resnet, .* Did you mean 'wide_resnet'?"),
        ("depth", 0, "got 0, expected at least 1, or -1"),
        ("width", 0.0, "got 0.0, expected above 0, or -1"),
        ("variant", "paper", "got 'paper', expected one of authors, standard"),
        ("conventions", "keras", "got 'keras', expected one of own, torch, flax"),
        ("dtype", "float16", "got 'float16', expected one of float32, bfloat16, float64"),
        ("pretrained", "weights.pkl", "got weights.pkl, a pickle"),
    ],
)
def test_values_that_are_not_allowed(key, value, message):
    with pytest.raises(UserError, match=rf"model\.{key}: {message}"):
        models.validate(group(**{key: value}))


def test_float64_needs_x64():
    with (
        x64(False),
        pytest.raises(UserError, match="model.dtype=float64: set the environment variable JAX_ENABLE_X64=1"),
    ):
        models.validate(group(dtype="float64"))
    with x64(True):
        models.validate(group(dtype="float64"))


@pytest.mark.parametrize("name", models.REGISTRY)
def test_attributes_and_pickles(name):
    """Fitted classifiers are pickled with their network, whose attributes keep their names."""
    network = models.create(group(name=name, dtype="bfloat16", remat=True), 3, batch_groups=2)
    again = pickle.loads(pickle.dumps(network))
    assert again == network and hash(again) == hash(network)
    common = {"batch_groups": 2, "dtype": jnp.bfloat16, "param_dtype": jnp.float32, "remat": True}
    assert {key: getattr(again, key) for key in common} == common


class Blocks(Network):
    """A layer inside a block and one outside of it."""

    @nn.compact
    def __call__(self, x, train):
        def block(x):
            return self.norm("second")(self.conv(2, (3, 3), 2, name="first", use_bias=True)(x), train)

        return self.logits(self.run_block(block, x).mean((1, 2)))


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_the_base_class(remat):
    """A layer of a block belongs to the block, so that it is computed again, and is found under the same path."""
    network, images = Blocks(3, dtype=jnp.bfloat16, remat=remat), jnp.zeros((2, 5, 5, 1))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=True))
    shapes = {
        "params": {
            "first": {"kernel": (3, 3, 1, 2), "bias": (2,)},
            "second": {"scale": (2,), "bias": (2,)},
            "head": {"kernel": (2, 3), "bias": (3,)},
        },
        "batch_stats": {"second": {"mean": (2,), "var": (2,)}},
    }
    assert jax.tree.map(jnp.shape, variables) == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outside = jax.make_jaxpr(lambda v: network.apply(v, images, train=False))(variables).eqns
    names = [equation.primitive.name for equation in outside]
    assert any("remat" in name or name == "checkpoint" for name in names) == remat
    assert ("conv_general_dilated" in names) == (not remat) and "dot_general" in names
    every = network.apply(
        jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables),
        images,
        train=False,
        capture_intermediates=lambda *_: True,
        mutable=["intermediates"],
    )[1]["intermediates"]
    helpers = set(vars(Network)) - {"__call__"}
    assert every.keys() >= {"__call__", "first", "second", "head"} and not every.keys() & helpers
