"""One training step of any method on a network of two convolutions and images of random numbers."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from configs import default
from ieg_jax import methods, models
from ieg_jax.methods import base
from ieg_jax.methods.parts import optimizers
from ieg_jax.train.durations import Durations
from ieg_jax.train.step import create_state, train_step

BATCH, CLASSES = 16, 4
USUAL = ("supervised", "ieg", "dividemix")  # a plain one, the largest step, and two networks with a memory


def each_method():
    """Parameters of a test of every method; those of other methods than USUAL are slow, as they are many."""
    return [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in methods.REGISTRY]


def make(method_name, groups=1, dtype=jnp.float32, network=None, **overrides):
    config = default.get_config()
    config.update_from_flattened_dict(overrides)
    config.batch_groups, config.method.name, config.model.name = groups, method_name, "tiny"
    network = network or models.create(config.model, CLASSES, groups).clone(dtype=dtype, param_dtype=dtype)
    described = methods.get(method_name)
    context = base.Context(
        FrozenConfigDict(config),
        network,
        optimizers.create(config.optimizer),
        CLASSES,
        networks=described.networks,
        num_examples=50,
        image_shape=(8, 8, 1),
        schedule=optax.constant_schedule(0.1),
    )
    method = described.bind(context)
    method = dataclasses.replace(method, supervise=jax.jit(method.supervise), loss=jax.jit(method.loss))
    state = jax.jit(lambda: create_state(context, method, jax.random.key(0), (8, 8, 1), 50))()
    step = functools.partial(train_step, context=context, method=method, schedule=context.schedule)
    return context, method, state, step


def make_batch(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, BATCH, dtype=np.int32)
    return {
        "image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "views": rng.uniform(-1, 1, (BATCH, 2, 8, 8, 1)).astype(dtype),
        "label": label,
        "clean_label": np.where(rng.random(BATCH) < 0.5, label, (label + 1) % CLASSES).astype(np.int32),
        "id": np.arange(BATCH, dtype=np.int32),
        "row": (3 * np.arange(BATCH) % 50).astype(np.int32),
        "probe_image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "probe_label": np.arange(BATCH, dtype=np.int32) % CLASSES,
        "probe_row": np.arange(BATCH, dtype=np.int32),
        "every_image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "every_views": rng.uniform(-1, 1, (BATCH, 1, 8, 8, 1)).astype(dtype),
        "reward_image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "reward_label": np.arange(BATCH, dtype=np.int32) % CLASSES,
    }


def fixed_durations(num_steps=100, log_every=3, batch_size=32, num_examples=100):
    """Of a program that nobody runs to its end."""
    never = frozenset()
    return Durations(num_steps, log_every, num_steps, num_steps, never, never, never, batch_size, num_examples)


def loss_of_logits(module, logits, labels, supervision=None, **keys):
    """The loss of a method where the parameters are the logits `[n, K]` themselves, without weight decay."""
    config = default.get_config()
    config.update_from_flattened_dict(keys)
    ctx = types.SimpleNamespace(
        config=config,
        forward=lambda params, batch_stats, images: (params, batch_stats),
        one_hot=lambda labels: jax.nn.one_hot(labels, logits.shape[-1]),
        weight_decay=lambda params: jnp.zeros(()),
    )
    state = types.SimpleNamespace(batch_stats=None)
    return module.loss(ctx, logits, state, {"image": None, "label": labels}, supervision, None)[0]
