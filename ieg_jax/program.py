"""The compiled functions of a run, and the shapes and shardings of what goes in and out.

`train.py` runs them; `plan.py` compiles them for hardware that is elsewhere. Nothing here touches data or files.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax import methods, metrics, models, optimizers, schedules, sharding, steps
from ieg_jax.errors import UserError, first_line
from ieg_jax.methods import base


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What a program needs to know of the data."""

    image: tuple[int, int, int]  # (H, W, C) of a training image, after augmentation
    evaluation_image: tuple[int, int, int]  # the same of an image whose class is predicted
    num_classes: int  # K
    num_examples: int  # N, of the noisy training set
    num_ids: int  # one more than the largest id in it


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions of global arrays, with the shapes that they are compiled for.

    Attributes:
      method: bound to the network and the optimiser.
      state, window, batch, rng: `jax.ShapeDtypeStruct`s with shardings, the arguments of `train_step`.
      evaluation: `params`, `batch_stats` and a batch of the same kind, the arguments of `eval_step`.
      init: key of the initial weights, `pretrained` = arrays in place of some (`steps.create_state`) -> state.
      train_step: (state, window, batch, base key of the run) -> state, window; the first two are donated.
      eval_step: see `steps.eval_step`.
      empty_window: () -> window.
    """

    method: base.Method
    state: steps.TrainState
    window: metrics.Window
    batch: dict[str, jax.ShapeDtypeStruct]
    rng: jax.ShapeDtypeStruct
    evaluation: tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]
    init: Callable[..., steps.TrainState]
    train_step: Callable[..., tuple[steps.TrainState, metrics.Window]]
    eval_step: Callable[..., dict[str, metrics.WeightedAverage]]
    empty_window: Callable[[], metrics.Window]


class OwnNetwork(nn.Module):
    """A network from outside of the registry, with the attributes that those of `models` have.

    Its parameters keep the paths that they have in `module`.

    Attributes:
      module: called as `module(images, train=...)`: float32 `[n, H, W, C]` -> logits `[n, K]`.
      batch_groups: 1, or what `module` says of itself.
      param_dtype: of the losses.
    """

    module: nn.Module
    batch_groups: int = 1
    param_dtype: Any = jnp.float32

    def setup(self):
        """Takes the place of `module` in the tree of parameters."""
        nn.share_scope(self, self.module)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        logits = self.module(x, train=train)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def adapt(module: nn.Module, num_classes: int, batch_groups: int, image: tuple[int, int, int]) -> OwnNetwork:
    """Any linen module as a network, after a look at what it makes of a batch; nothing is computed.

    Args:
      module: see `OwnNetwork`. Besides its parameters it may have moving averages in the collection `batch_stats`, and
        nothing else that it remembers; and it must not draw random numbers after initialisation (dropout).
      num_classes: K.
      batch_groups: groups of the batch; above 1 the module must have an attribute `batch_groups` of this value, and
        compute its statistics inside each group (`models.layers.BatchNorm`).
      image: (H, W, C).

    Raises:
      UserError: where it is no such module.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"network: got {module!r}, expected an instance of a flax.linen module, such as MyNetwork()")
    own_groups = getattr(module, "batch_groups", 1)
    if own_groups != batch_groups:
        raise UserError(
            f"batch_groups: {type(module).__name__} would see {batch_groups} groups of the batch, and its attribute "
            f"batch_groups is {own_groups}; set both alike, or batch_groups=1 and microbatches=1"
        )
    network = OwnNetwork(module, batch_groups)
    images = jax.ShapeDtypeStruct((2 * batch_groups, *image), jnp.float32)
    try:
        rng = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(functools.partial(network.init, train=True), rng, images)
        given = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
        shapes = [
            jax.eval_shape(functools.partial(network.apply, train=True, mutable=["batch_stats"]), given, images)[0],
            jax.eval_shape(functools.partial(network.apply, train=False), given, images),
        ]
    except Exception as error:  # whatever someone's module raises
        raise UserError(
            f"network {type(module).__name__} cannot be applied to images {images.shape}: {first_line(error)}; "
            f"expected __call__(x, train) without random numbers, parameters, and moving averages in batch_stats alone"
        ) from error
    others = sorted(variables.keys() - given.keys())
    if others or not given["params"]:
        raise UserError(
            f"network {type(module).__name__} has the collections {', '.join(sorted(variables)) or '(none)'}, expected "
            f"params, and perhaps batch_stats"
        )
    if any(logits.shape != (2 * batch_groups, num_classes) for logits in shapes):
        raise UserError(
            f"network {type(module).__name__} makes {shapes[0].shape} of images {images.shape}, expected logits "
            f"{(2 * batch_groups, num_classes)}, one for each of the {num_classes} classes"
        )
    return network


def build(
    config: ConfigDict,
    layout: sharding.Layout,
    data: DataShape,
    first_cycle: int,
    num_steps: int,
    log_every: int,
    network: nn.Module | None = None,
) -> Program:
    """Builds the program of a configuration; nothing is compiled yet.

    Args:
      config: the configuration; `trusted.batch_size` must be resolved.
      layout: of the devices.
      data: shapes.
      first_cycle: steps of the learning rate's first cycle.
      num_steps: steps of the run.
      log_every: steps of a window of metrics.
      network: in place of the one that `config.model` names, see `adapt`.
    """
    groups = config.batch_groups // config.microbatches
    if network is None:
        network = models.create(config.model, data.num_classes, groups)
    else:
        network = adapt(network, data.num_classes, groups, data.image)
    context = base.Context(
        config=FrozenConfigDict(config),
        network=network,
        optimizer=optimizers.create(config.optimizer),
        num_classes=data.num_classes,
    )
    method = base.bind(methods.REGISTRY[config.method.name], context)
    schedule = schedules.create(config.schedule, first_cycle, num_steps)
    remembered = math.ceil(config.audit.epochs * data.num_examples / config.batch_size)
    step_function = functools.partial(
        steps.train_step,
        context=context,
        method=method,
        schedule=schedule,
        remember_from=num_steps - remembered,
        gather=lambda arrays: jax.lax.with_sharding_constraint(arrays, layout.replicated),
    )
    create = functools.partial(
        steps.create_state, context, method, image_shape=data.image, num_examples=data.num_examples
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    batch = batch_shape(config, data)
    state = jax.eval_shape(create, rng)
    observation = jax.eval_shape(step_function, state, batch, rng)[1]
    if remembered and observation.examples is not None:
        create = functools.partial(create, remembered_ids=data.num_ids)
        state = jax.eval_shape(create, rng)
    empty = functools.partial(metrics.empty_window, observation, log_every)
    window = jax.eval_shape(empty)

    state_sharding = jax.tree.map(lambda _: layout.replicated, state).replace(
        params=layout.split(state.params),
        opt_state=layout.split(state.opt_state),
        ema_params=layout.split(state.ema_params),
    )

    def step_and_record(state, window, batch, rng):
        state, observation = step_function(state, batch, rng)
        # Here, and not after it is written into the window: XLA would gather the whole window at each step.
        observation = jax.lax.with_sharding_constraint(observation, layout.replicated)
        return state, metrics.add(window, observation, state.step)

    return Program(
        method=method,
        state=_lay(state, state_sharding),
        window=_lay(window, layout.replicated),
        batch=_lay(batch, layout.batch),
        rng=_lay(rng, layout.replicated),
        evaluation=(
            _lay(state.params, state_sharding.params),
            _lay(state.batch_stats, layout.replicated),
            _lay(evaluation_batch_shape(config, data), layout.batch),
        ),
        init=jax.jit(create, out_shardings=state_sharding),
        train_step=jax.jit(
            step_and_record,
            in_shardings=(state_sharding, layout.replicated, layout.batch, layout.replicated),
            out_shardings=(state_sharding, layout.replicated),
            donate_argnums=(0, 1),
        ),
        eval_step=jax.jit(
            functools.partial(steps.eval_step, context=context),
            in_shardings=(state_sharding.params, layout.replicated, layout.batch),
            out_shardings=layout.replicated,
        ),
        empty_window=jax.jit(empty, out_shardings=layout.replicated),
    )


def batch_shape(config: ConfigDict, data: DataShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch, as `pipeline.train_batches` yields them."""
    needs = methods.REGISTRY[config.method.name].NEEDS
    size, probe_size = config.batch_size, config.trusted.batch_size
    shapes = {"image": _images(size, *data.image)}
    shapes |= dict.fromkeys(("label", "clean_label", "id"), _labels(size))
    if "views" in needs:
        shapes["views"] = _images(size, config.augment.num_views - 1, *data.image)
    if "probe" in needs:
        shapes |= {"probe_image": _images(probe_size, *data.image), "probe_label": _labels(probe_size)}
    return shapes


def evaluation_batch_shape(config: ConfigDict, data: DataShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global evaluation batch, as `pipeline.EvalBatches` yields them."""
    size = config.eval_batch_size
    return {
        "image": _images(size, *data.evaluation_image),
        "label": _labels(size),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }


def _images(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _labels(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _lay(tree: Any, shardings: Any) -> Any:
    """`tree` with shardings: one for all, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda leaf, lay: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lay), tree, shardings)
