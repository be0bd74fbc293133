"""The train step and the eval step: pure functions of global arrays.

They are written once, for the whole batch, without axis names or collectives; `jax.jit` with shardings runs
them on one device or on many.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ieg_jax.data import transfer
from ieg_jax.methods.base import Context, Method
from ieg_jax.methods.parts import optimizers
from ieg_jax.train import examples, finetune, metrics


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar: updates made so far
    params: Any
    batch_stats: Any  # moving averages of batch norm
    opt_state: Any
    ema_params: Any  # moving average of params; None where ema.decay is 0
    method: Any  # whatever the method remembers, {} by default
    rows: dict[str, jax.Array]  # stream -> bool [rows]: what the method draws batches from; {} = all, see `train.look`
    examples: Any  # examples.Sums; None where ω and λ are not averaged


def create_state(
    context: Context,
    method: Method,
    rng: jax.Array,
    image_shape: tuple[int, ...],
    num_rows: int = 0,
    pretrained: dict[str, jax.Array] | None = None,
    averaged_ids: int = 0,
    stream_rows: Mapping[str, int] | None = None,
) -> TrainState:
    """The initial TrainState.

    Args:
      context: static parts of the run.
      method: the bound method.
      rng: key for the initial weights.
      image_shape: (H, W, C).
      num_rows: rows of the method's memory.
      pretrained: arrays in place of the initial ones, by paths such as `params/head/kernel`, of one network.
      averaged_ids: examples whose ω and λ are averaged, by id; 0 = none.
      stream_rows: of a method that chooses the rows of its streams: stream -> rows there are.
    """
    images = jnp.zeros((context.network.batch_groups, *image_shape), jnp.float32)

    def variables_of(key):
        made = flatten_dict(context.network.init(key, images, train=True), sep="/")
        # Copies, because a step writes its state over the old one.
        return unflatten_dict(made | jax.tree.map(jnp.copy, pretrained or {}), sep="/")

    networks = method.networks
    variables = variables_of(rng) if networks == 1 else jax.vmap(variables_of)(jax.random.split(rng, networks))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=context.optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if context.config.ema.decay else None,
        method=method.init(jax.random.fold_in(rng, 1), num_rows),
        rows={name: jnp.ones(count, bool) for name, count in (stream_rows or {}).items()},
        examples=examples.empty(averaged_ids) if averaged_ids else None,
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    rng: jax.Array,
    *,
    context: Context,
    method: Method,
    schedule: optax.Schedule,
    probe_steps: int = 0,
) -> tuple[TrainState, metrics.Observation]:
    """One step of any method: supervise, differentiate the loss, update, average.

    Args:
      state: before the step.
      batch: `image [B,H,W,C]`, `label [B]`, `clean_label [B]` (-1 = not known, -2 = no class, so that the label is
        wrong), `id [B]`, `row [B]` (of the training set), and what else the streams of the method give
        (`methods.base.Stream`), such as `views [B,V-1,H,W,C]`, `probe_image [Bp,H,W,C]`, `probe_label [Bp]`. Images
        are float32, or packed by `data.transfer.sent`.
      rng: the base key of the run; folded with the step here.
      context: static parts of the run.
      method: the bound method.
      schedule: step -> learning rate.
      probe_steps: how many steps move the head alone, see `finetune`.

    Returns:
      The state after the step and what to report. `TrainState.examples` is as it was: `program` adds the report to it.
    """
    batch = transfer.received(batch)
    supervise_rng, loss_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    supervision = jax.lax.stop_gradient(method.supervise(state, batch, supervise_rng))
    if supervision.memory is not None:
        state = state.replace(method=supervision.memory)
    (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(
        state.params, state, batch, supervision, loss_rng
    )
    learning_rate = schedule(state.step)
    rates = finetune.rates(state.params, context.config.finetune, probe_steps, state.step)
    params, opt_state, updates = optimizers.apply(
        context.optimizer, grads, state.opt_state, state.params, jax.tree.map(lambda r: learning_rate * r, rates)
    )
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=aux.batch_stats,
        opt_state=opt_state,
        ema_params=moving_average(state.ema_params, params, state.step + 1, context.config.ema),
    )
    norms = {
        "optimizer/learning_rate": learning_rate,
        "optimizer/gradient_norm": optax.global_norm(grads),
        "optimizer/update_norm": optax.global_norm(updates),
    }
    return new_state, metrics.observe(batch, supervision, loss, aux, norms)


def moving_average(average, params, step: jax.Array, ema):
    """The exponential moving average of the weights after update number `step`.

    decay = min(ema.decay, (1 + step) / (10 + step)) with `ema.warmup`, else ema.decay. None stays None.
    """
    if average is None:
        return None
    decay = jnp.asarray(ema.decay, jnp.float32)
    if ema.warmup:
        decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(p.dtype), average, params)


def eval_step(params, batch_stats, memory, batch: dict[str, jax.Array], *, method: Method):
    """Sums of top-1 and top-5 hits (top-K where K < 5), and of those of each class, over examples whose mask is 1.

    Args:
      params: weights.
      batch_stats: moving averages of batch norm.
      memory: of the method.
      batch: `image [n,H,W,C]`, `label [n]`, `mask [n]`.
      method: the bound method.

    Returns:
      `{"accuracy", "top5_accuracy"}` of WeightedAverage and `{"balanced_accuracy"}` of ClassAccuracy.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    probabilities = method.predict(variables, memory, batch["image"])
    label, mask = batch["label"], batch["mask"]
    return {
        "accuracy": metrics.accuracy(probabilities, label, mask),
        "balanced_accuracy": metrics.balanced_accuracy(probabilities, label, mask),
        "top5_accuracy": metrics.accuracy(probabilities, label, mask, top=min(5, probabilities.shape[-1])),
    }
