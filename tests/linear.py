"""A linear network on images of two pixels: numpy can work out every number of a step as well.

The weights are an array `[3, K]`: two rows for the pixels, and the bias. Everything is in float64 (`conftest.x64`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from configs import default
from ieg_jax import methods
from ieg_jax.methods import base
from ieg_jax.methods.parts import mixup, optimizers
from ieg_jax.train.step import create_state

SIZE, PROBES, VIEWS, CLASSES, GROUPS = 4, 4, 2, 3, 2
BLOCKS = 2 + VIEWS  # of the pool: trusted images, the standard view, the strong views
ROWS = 9


class Linear(nn.Module):
    """Logits = pixels · W + b."""

    param_dtype: type = jnp.float64
    batch_groups: int = GROUPS

    @nn.compact
    def __call__(self, images, train):
        pixels = images.reshape(-1, 2)
        return nn.Dense(CLASSES, name="head", param_dtype=self.param_dtype, dtype=self.param_dtype)(pixels)


def make(name, step=0, rng=None, **keys):
    """A bound method, its state in its `step`-th step with weights and a momentum of their own, and both as arrays."""
    rng = rng or np.random.default_rng(0)
    config = default.get_config()
    config.update_from_flattened_dict({"method.name": name, "batch_groups": GROUPS, **keys})
    described = methods.get(name)
    context = base.Context(
        FrozenConfigDict(config), Linear(), optimizers.create(config.optimizer), CLASSES,
        networks=described.networks, num_examples=ROWS, image_shape=(1, 2, 1),
    )  # fmt: skip
    method = described.bind(context)
    state = create_state(context, method, jax.random.key(0), (1, 2, 1), ROWS)
    weights, momentum = rng.normal(size=(2, 3, CLASSES))
    if described.networks == 1:
        state = state.replace(params=as_params(weights), opt_state=optax.TraceState(as_params(momentum)))
    return context, method, state.replace(step=jnp.int32(step)), weights, momentum


def as_params(weights):
    return {"head": {"kernel": jnp.asarray(weights[:2]), "bias": jnp.asarray(weights[2])}}


def as_array(params):
    return np.concatenate([params["head"]["kernel"], np.asarray(params["head"]["bias"])[..., None, :]], -2)


def make_batch(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(SIZE, 1, 2, 1)),
        "views": rng.normal(size=(SIZE, VIEWS, 1, 2, 1)),
        "label": np.array([2, 0, 1, 1], np.int32),
        "clean_label": np.array([2, 0, 1, 0], np.int32),
        "id": np.arange(SIZE, dtype=np.int32),
        "row": np.array([8, 3, 5, 1], np.int32),
        "probe_image": rng.normal(size=(PROBES, 1, 2, 1)),
        "probe_label": np.array([0, 1, 2, 0], np.int32),
    }


def pixels(images):
    """Images `[n, 1, 2, 1]` as `[n, 3]`, with the 1 that the bias is multiplied by."""
    return np.concatenate([np.asarray(images).reshape(-1, 2), np.ones((len(images), 1))], 1)


def views(batch):
    """The standard view and the strong ones, each `[B, 3]`."""
    return [pixels(batch["image"]), *(pixels(batch["views"][:, number]) for number in range(VIEWS))]


DRAW = mixup.Draw(
    probe_index=np.array([[1, 0], [1, 1]], np.int32),
    partner=np.array([[3, 5, 7, 2, 0, 6, 1, 4], [0, 3, 7, 1, 2, 5, 4, 6]]),
    coefficient=np.linspace(0.5, 1, GROUPS * 8).reshape(GROUPS, 8),
)


def pool(batch, target, draw=DRAW):
    """The mixed pool, element by element: `[G, 8, 3]` inputs and `[G, 8, K]` targets."""
    inputs, targets = [], []
    for group in range(GROUPS):
        here, trusted = slice(2 * group, 2 * group + 2), 2 * group + draw.probe_index[group]
        elements = np.concatenate([pixels(batch["probe_image"])[trusted], *(view[here] for view in views(batch))])
        wanted = np.concatenate([np.eye(CLASSES)[batch["probe_label"][trusted]], *[target[here]] * (1 + VIEWS)])
        share = draw.coefficient[group][:, None]
        inputs.append(share * elements + (1 - share) * elements[draw.partner[group]])
        targets.append(share * wanted + (1 - share) * wanted[draw.partner[group]])
    return np.array(inputs), np.array(targets)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def cross_entropy(target, logits):
    return -(target * np.log(softmax(logits))).sum(-1)


def normalised(logits):
    """The logits of each group over their root mean square."""
    blocks = logits.reshape(GROUPS, -1, CLASSES)
    return (blocks / np.sqrt((blocks**2).mean((1, 2), keepdims=True) + 1e-8)).reshape(logits.shape)


def gradient(function, weights):
    """∇ of an analytic function by complex steps, which are exact to rounding: Im f(x + ih) / h."""
    found = np.empty(weights.shape)
    for place in np.ndindex(weights.shape):
        moved = weights.astype(complex)
        moved[place] += 1e-40j
        found[place] = function(moved).imag / 1e-40
    return found


def differences(function, point, h=1e-5):
    """∇ by central differences."""
    steps = h * np.eye(len(point))
    return np.array([(function(point + step) - function(point - step)) / (2 * h) for step in steps])
