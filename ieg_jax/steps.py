"""The train step and the eval step: pure functions of global arrays.

They are written once, for the whole batch, without axis names or collectives; `jax.jit` with shardings runs
them on one device or on many.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ieg_jax import memory, metrics, optimizers
from ieg_jax.methods.base import Context, Method


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar: updates made so far
    params: Any
    batch_stats: Any  # moving averages of batch norm
    opt_state: Any
    ema_params: Any  # moving average of params; None where ema.decay is 0
    method_state: Any  # whatever the method remembers, {} by default
    memory: Any  # memory.Memory of each example; None where nothing is remembered


def create_state(
    context: Context,
    method: Method,
    rng: jax.Array,
    image_shape: tuple[int, ...],
    num_examples: int,
    pretrained: dict[str, jax.Array] | None = None,
    remembered_ids: int = 0,
) -> TrainState:
    """The initial TrainState.

    Args:
      context: static parts of the run.
      method: the bound method.
      rng: key for the initial weights.
      image_shape: (H, W, C).
      num_examples: N, for methods that remember something per example.
      pretrained: arrays in place of the initial ones, by paths such as `params/head/kernel`.
      remembered_ids: how many examples are remembered, by id; 0 = none.
    """
    images = jnp.zeros((context.network.batch_groups, *image_shape), jnp.float32)
    variables = flatten_dict(context.network.init(rng, images, train=True), sep="/")
    # Copies, because a step reuses the memory of its state.
    variables = unflatten_dict(variables | jax.tree.map(jnp.copy, pretrained or {}), sep="/")
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=context.optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if context.config.ema.decay else None,
        method_state=method.init_state(num_examples),
        memory=memory.empty(remembered_ids) if remembered_ids else None,
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    rng: jax.Array,
    *,
    context: Context,
    method: Method,
    schedule: optax.Schedule,
    remember_from: int = 0,
    gather: Callable[[Any], Any] = lambda arrays: arrays,
) -> tuple[TrainState, metrics.Observation]:
    """One step of any method: supervise, differentiate the loss, update, average.

    Args:
      state: before the step.
      batch: `image [B,H,W,C]`, `label [B]`, `clean_label [B]` (-1 = not known, -2 = no class, so that the label is
        wrong), `id [B]`, and where the method needs them `views [B,V-1,H,W,C]`, `probe_image [Bp,H,W,C]`,
        `probe_label [Bp]`.
      rng: the base key of the run; folded with the step here.
      context: static parts of the run.
      method: the bound method.
      schedule: step -> learning rate.
      remember_from: the first step, counted from 0, whose ω and λ go into the memory.
      gather: brings arrays `[B]` to every device. Without it XLA would rather add up whole memories over the devices.

    Returns:
      The state after the step and what to report.
    """
    supervise_rng, loss_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    supervision = jax.lax.stop_gradient(method.supervise(state, batch, supervise_rng))
    (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(
        state.params, state, batch, supervision, loss_rng
    )
    learning_rate = schedule(state.step)
    params, opt_state, updates = optimizers.apply(
        context.optimizer, grads, state.opt_state, state.params, learning_rate
    )
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=aux.batch_stats,
        opt_state=opt_state,
        ema_params=moving_average(state.ema_params, params, state.step + 1, context.config.ema),
    )
    if state.memory is not None:
        remembered = (batch["id"], supervision.example_weights, supervision.label_trust)
        new_state = new_state.replace(memory=memory.add(state.memory, *gather(remembered), state.step >= remember_from))
    norms = {
        "optimizer/learning_rate": learning_rate,
        "optimizer/gradient_norm": optax.global_norm(grads),
        "optimizer/update_norm": optax.global_norm(updates),
    }
    return new_state, _observe(batch, supervision, loss, aux, norms)


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


def eval_step(params, batch_stats, batch: dict[str, jax.Array], *, context: Context):
    """Sums of top-1 and top-5 hits (top-K where K < 5) over the examples whose mask is 1.

    Args:
      params: weights.
      batch_stats: moving averages of batch norm.
      batch: `image [n,H,W,C]`, `label [n]`, `mask [n]`.
      context: static parts of the run.

    Returns:
      `{"accuracy", "top5_accuracy"}` of WeightedAverage.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    logits = context.network.apply(variables, batch["image"], train=False)
    label, mask = batch["label"], batch["mask"]
    return {
        "accuracy": metrics.accuracy(logits, label, mask),
        "top5_accuracy": metrics.accuracy(logits, label, mask, top=min(5, context.num_classes)),
    }


def _observe(batch, supervision, loss, aux, norms) -> metrics.Observation:
    average = metrics.WeightedAverage.of
    has_class, known = batch["clean_label"] >= 0, batch["clean_label"] != -1
    clean = known & (batch["label"] == batch["clean_label"])
    noisy = known & ~clean
    averages = {"loss/total": average(loss)}
    averages |= {f"loss/{name}": average(value) for name, value in aux.terms.items()}
    averages |= {name: average(value) for name, value in norms.items()}
    averages["train/accuracy"] = metrics.accuracy(aux.logits, batch["label"])
    true_label = jnp.maximum(batch["clean_label"], 0)
    averages["train/accuracy_true_label"] = metrics.accuracy(aux.logits, true_label, has_class)
    if supervision.probe_loss is not None:
        averages["loss/trusted_after_lookahead"] = average(supervision.probe_loss)
    for name, value in (("weight", supervision.example_weights), ("trust", supervision.label_trust)):
        if value is not None:
            averages[f"{name}/clean"] = average(value, clean)
            averages[f"{name}/noisy"] = average(value, noisy)
    examples = None
    if supervision.example_weights is not None:
        flag = jnp.where(known, clean, -1).astype(jnp.int8)
        examples = metrics.Examples(batch["id"], supervision.example_weights, flag, supervision.label_trust)
        if (g := supervision.pseudo_label) is not None:
            examples = examples.replace(
                pseudo_label=jnp.argmax(g, -1).astype(jnp.int32),
                label_probability=jnp.take_along_axis(g, batch["label"][:, None], -1)[:, 0],
            )
    return metrics.Observation(averages, examples)
