"""The compiled functions of a run, and the shapes and shardings of what goes in and out.

`loop` runs them; `plan.compile` compiles them for hardware that is elsewhere. No image and no file is read here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods, models
from ieg_jax.data import transfer
from ieg_jax.data.batches import batch_size_of, image_shape, split_image_size, views_of
from ieg_jax.data.load import Data
from ieg_jax.methods import base
from ieg_jax.methods.parts import lookahead, optimizers
from ieg_jax.models import own
from ieg_jax.runtime import mesh, watch
from ieg_jax.train import examples, metrics, schedules
from ieg_jax.train.durations import Durations
from ieg_jax.train.step import TrainState, create_state, eval_step, train_step

# The program that draws the 1.5 million weights of WRN-28-2 is compiled in 1.9 s of processor time in place of 7.8, and
# runs for 0.1 s in place of 0.02; that of WRN-28-10, 36 million, in 2.5 in place of 8.7, for 3.2 in place of 0.9.
FEW_WEIGHTS = 50_000_000


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What a program needs to know of the data."""

    image: tuple[int, int, int]  # (H, W, C) of a training image, after augmentation
    evaluation_image: tuple[int, int, int]  # the same of an image whose class is predicted
    num_classes: int  # K
    num_examples: int  # N, of the noisy training set
    num_ids: int  # one more than the largest id in it
    num_trusted: int  # M, trusted examples that are trained with
    transfer: str = "float32"  # the type of training images as they come, see `data.transfer`

    def num_rows(self, source: str) -> int:
        """Examples of a set that streams draw from."""
        return self.num_trusted if source == base.TRUSTED else self.num_examples


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions of global arrays, with the shapes that they are compiled for.

    Attributes:
      method: bound to the network and the optimiser.
      state, window, batch, rng: `jax.ShapeDtypeStruct`s with shardings, the arguments of `train_step`.
      evaluation: `params`, `batch_stats`, the method's memory and a batch of the same kind, which `eval_step` takes.
      init: key of the initial weights, `pretrained` = arrays in place of some (`step.create_state`) -> state.
      train_step: (state, window, batch, base key of the run) -> state, window; the first two are donated.
      eval_step: see `step.eval_step`.
      empty_window: () -> window.
      probabilities, features: (params, batch_stats, images) -> `[R, n, K]`, `[R, n, D]` (`methods.base.Context`).
      schedule: updates made so far -> learning rate of the next one.
      num_rows: rows of a memory by example, N rounded up.
    """

    method: base.Method
    state: TrainState
    window: metrics.Window
    batch: dict[str, jax.ShapeDtypeStruct]
    rng: jax.ShapeDtypeStruct
    evaluation: tuple[Any, Any, Any, dict[str, jax.ShapeDtypeStruct]]
    init: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, metrics.Window]]
    eval_step: Callable[..., dict[str, metrics.WeightedAverage]]
    empty_window: Callable[[], metrics.Window]
    probabilities: Callable[..., jax.Array]
    features: Callable[..., jax.Array]
    schedule: Callable[[jax.Array], jax.Array]
    num_rows: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update that leads to a step, counted from 1."""
        return float(jax.device_get(self.schedule(jax.device_put(np.int32(step - 1)))))

    @functools.cached_property
    def lowered_step(self) -> Any:
        """`train_step`, traced for its shapes and not compiled yet."""
        return self.train_step.lower(self.state, self.window, self.batch, self.rng)

    def compiled_step(self, wait: Callable[[Callable[[], Any]], Any] = lambda compiling: compiling()) -> Any:
        """`train_step`, compiled; takes its time when it is first asked for.

        Args:
          wait: calls the function that it is given, which is in the compiler for seconds or minutes, and returns what
            that returns.
        """
        if "compiled" not in self.__dict__:
            lowered = self.lowered_step  # here, as what is set in this thread alone (x64) counts
            self.__dict__["compiled"] = wait(lambda: watch.compile_step(lowered))
        return self.__dict__["compiled"]

    @property
    def one_network(self) -> dict[str, Any]:
        """Shapes of the parameters and the moving averages of one of the R networks."""
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        if self.method.networks == 1:
            return variables
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)


def build(
    config: ConfigDict,
    shardings: mesh.Shardings,
    data: DataShape,
    durations: Durations,
    network: nn.Module | None = None,
) -> Program:
    """Builds the program of a configuration; nothing is compiled yet.

    The last few are kept: what has been compiled for a configuration serves for the next run that differs in its data
    or seed alone, as in a search or a cross-validation (`config.of_program`).

    Args:
      config: the configuration, resolved.
      shardings: on the devices.
      data: shapes.
      durations: of the run.
      network: in place of the one that `config.model` names, see `models.own.adapt`.
    """
    config = config_lib.of_program(config)
    groups = config.batch_groups // config.microbatches
    if network is None:
        network = models.create(config.model, data.num_classes, groups)
    else:
        network = own.adapt(network, data.num_classes, groups, data.image)
    # With the method, of which there may be another of the same name after a change in a notebook.
    parts = (config, shardings, data, durations, methods.get(config.method.name), network)
    try:
        return _kept(*parts)
    except TypeError:  # someone's network that is not hashable
        return _build(*parts)


def _build(
    config: FrozenConfigDict,
    shardings: mesh.Shardings,
    data: DataShape,
    durations: Durations,
    described: base.Method,
    network: nn.Module,
) -> Program:
    def in_steps(epochs: float) -> int:
        return round(epochs * data.num_examples / config.batch_size)

    warmup = in_steps(config.schedule.warmup_epochs)
    schedule = schedules.create(config.schedule, durations.first_cycle, durations.num_steps, warmup)
    context = base.Context(
        config=config,
        network=network,
        optimizer=optimizers.create(config.optimizer),
        num_classes=data.num_classes,
        networks=described.networks,
        num_examples=data.num_examples,
        image_shape=data.image,
        schedule=schedule,
        gather=lambda arrays: jax.lax.with_sharding_constraint(arrays, shardings.replicated),
    )
    method = described.bind(context)
    averaged = math.ceil(config.audit.epochs * data.num_examples / config.batch_size)
    average_from = durations.num_steps - averaged
    # With inline=True this is no more than a memory: what is traced for the shapes is not traced again for the program.
    update = jax.jit(
        functools.partial(
            train_step,
            context=context,
            method=method,
            schedule=schedule,
            probe_steps=in_steps(config.finetune.probe_epochs),
        ),
        inline=True,
    )
    num_rows = -(-data.num_examples // base.ROWS_UNIT) * base.ROWS_UNIT
    chosen = {}
    if method.on_epoch:
        chosen = {name: data.num_rows(stream.source) for name, stream in method.streams.items()}
    create = functools.partial(
        create_state, context, method, image_shape=data.image, num_rows=num_rows, stream_rows=chosen
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    batch, rng = _place(batch_shape(config, data), shardings.batch), _place(rng, shardings.replicated)
    state = jax.eval_shape(create, rng)
    lookahead.check_layers(config.meta.layers, state.params)
    state_sharding = _state_shardings(state, shardings, num_rows)
    observation = jax.eval_shape(update, _place(state, state_sharding), batch, rng)[1]
    if averaged and observation.examples is not None:
        create = functools.partial(create, averaged_ids=data.num_ids)
        state = jax.eval_shape(create, rng)
        state_sharding = _state_shardings(state, shardings, num_rows)
    empty = functools.partial(metrics.empty_window, observation, durations.log_every)
    window = jax.eval_shape(empty)

    def step_and_record(state, window, batch, rng):
        sums, counts = state.examples, state.step >= average_from
        state, observation = update(state.replace(examples=None), batch, rng)
        # Here, and not after it is written into the window: XLA would gather the whole window at each step.
        observation = jax.lax.with_sharding_constraint(observation, shardings.replicated)
        if sums is not None:
            state = state.replace(examples=examples.add(sums, observation.examples, counts))
        return state, metrics.add(window, observation, state.step)

    of_variables = functools.partial(_of_variables, shardings, state_sharding.params)
    return Program(
        method=method,
        state=_place(state, state_sharding),
        window=_place(window, shardings.replicated),
        batch=batch,
        rng=rng,
        evaluation=(
            _place(state.params, state_sharding.params),
            _place(state.batch_stats, shardings.replicated),
            _place(state.method, state_sharding.method),
            _place(evaluation_batch_shape(config, data), shardings.batch),
        ),
        init=jax.jit(create, out_shardings=state_sharding, compiler_options=_options_of_init(shardings, state)),
        train_step=jax.jit(
            step_and_record,
            in_shardings=(state_sharding, shardings.replicated, shardings.batch, shardings.replicated),
            out_shardings=(state_sharding, shardings.replicated),
            donate_argnums=(0, 1),
        ),
        eval_step=jax.jit(
            functools.partial(eval_step, method=method),
            in_shardings=(state_sharding.params, shardings.replicated, state_sharding.method, shardings.batch),
            out_shardings=shardings.replicated,
        ),
        empty_window=jax.jit(empty, out_shardings=shardings.replicated),
        probabilities=of_variables(context.probabilities),
        features=of_variables(context.features),
        schedule=jax.jit(schedule),
        num_rows=num_rows,
    )


_kept = functools.lru_cache(maxsize=4)(_build)


def _of_variables(shardings: mesh.Shardings, of_params: Any, function: Callable[..., jax.Array]) -> Callable:
    """`function` of the variables of networks and images, as one of the parameters, moving averages and images."""
    return jax.jit(
        lambda params, batch_stats, images: function({"params": params, "batch_stats": batch_stats}, images),
        in_shardings=(of_params, shardings.replicated, shardings.batch),
        out_shardings=shardings.replicated,
    )


def _options_of_init(shardings: mesh.Shardings, state: TrainState) -> dict[str, Any] | None:
    """For a processor XLA takes seconds to optimise a program that draws a few million weights in a tenth of one."""
    on_processor = shardings.mesh.devices.flat[0].platform == "cpu"
    few = sum(leaf.size for leaf in jax.tree.leaves(state.params)) < FEW_WEIGHTS
    return {"xla_backend_optimization_level": 0} if on_processor and few else None


def _state_shardings(state: TrainState, shardings: mesh.Shardings, num_rows: int) -> Any:
    """Where each array of the state lies: what fsdp splits, a method's memory by its rows, all else everywhere."""

    def of_memory(leaf):
        by_row = leaf.ndim and leaf.shape[0] == num_rows and num_rows % shardings.num_devices == 0
        return shardings.batch if by_row else shardings.replicated

    return jax.tree.map(lambda _: shardings.replicated, state).replace(
        params=shardings.split(state.params),
        opt_state=shardings.split(state.opt_state),
        ema_params=shardings.split(state.ema_params),
        method=jax.tree.map(of_memory, state.method),
    )


def batch_shape(config: ConfigDict, data: DataShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch, as `data.batches.train_batches` yields them."""
    shapes = {}
    for name, stream in methods.get(config.method.name).streams.items():
        size, is_main = batch_size_of(config, stream), name == base.MAIN
        labels = ("label", "clean_label", "id", "row") if is_main else ("label", "row")
        part = {"image": _images(size, *data.image, dtype=data.transfer), **dict.fromkeys(labels, _labels(size))}
        views = views_of(config, stream)
        if views > 1:
            part["views"] = _images(size, views - 1, *data.image, dtype=data.transfer)
        shapes |= {key if is_main else f"{name}_{key}": shape for key, shape in part.items()}
    return shapes


def evaluation_batch_shape(config: ConfigDict, data: DataShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global evaluation batch, as `data.batches.EvalBatches` yields them."""
    size = config.eval_batch_size
    return {
        "image": _images(size, *data.evaluation_image),
        "label": _labels(size),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }


def _images(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _labels(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _place(tree: Any, shardings: Any) -> Any:
    """`tree` with shardings: one for all, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def data_shape(config: ConfigDict, data: Data) -> DataShape:
    """The shapes of the data, as augmentation makes them.

    Raises:
      UserError: where they differ from image to image, and where the images cannot be sent as `data.transfer` says.
    """
    size = split_image_size
    evaluated = data.trusted if data.evaluation is None else data.evaluation
    image = image_shape(config, "standard", size(data.train))
    transfer.check(config.data.transfer, image)
    return DataShape(
        image=image,
        evaluation_image=image_shape(config, "evaluation", size(evaluated)),
        num_classes=data.num_classes,
        num_examples=len(data.train),
        num_ids=int(data.train.ids.max()) + 1,
        num_trusted=len(data.trusted),
        transfer=config.data.transfer,
    )
