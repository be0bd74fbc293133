"""What a method is, and what methods are made of.

A method is a module. Only `loss` is required:

    TITLE = "ELR"                  what tables and figures call it; by default the name of the module
    KEYS = {"strength": Key(...)}  the keys of the configuration that it reads, `method.strength` here; a name with a
                                   point, such as `meta.learning_rate`, is of another group
    STREAMS = {"main": Stream()}   the sets that a batch is drawn from, see `Stream`
    NETWORKS = 1                   R: copies of the network; above 1 every parameter has them on a leading axis

    check(config)                                             raises UserError for keys that do not fit together
    init(ctx, rng, num_rows) -> memory                        what it remembers, a tree of arrays: `state.method`
    supervise(ctx, state, batch, rng) -> Supervision          nothing that a gradient flows through
    loss(ctx, params, state, batch, supervision, rng) -> (scalar, Aux)
    on_epoch(ctx, state, look) -> (state, rows)               on the host at the end of each epoch, see `train.look`
    fit(ctx, look) -> memory                                  on the host before each evaluation, for the weights that
                                                              are evaluated: what predictions of them need
    predict(ctx, variables, memory, images) -> [n, K]         probabilities; by default the mean over the networks
    passes(config) -> float                                   the cost of a step in forward passes of one network over a
                                                              batch, of which a backward pass costs two

`ctx` is a `Context`, `state` a `train.step.TrainState`. A step is: supervise, the gradient of the loss, the optimiser's
update (`train.step.train_step`).

Memory by example has leaves `[num_rows, ...]`, which are read and written at `batch["row"]` (`write_rows`). They are
split over the devices, and they are part of the checkpoint. `num_rows` is the number of training examples rounded up,
so that it can be divided among devices; no `row` points behind the last example.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax.config import Key
from ieg_jax.errors import UserError
from ieg_jax.methods.parts import losses, optimizers

NOISY, TRUSTED = "noisy", "trusted"
MAIN = "main"
USUAL_VIEWS = 2  # augment.num_views in configs/default.py
ALL_VIEWS = None
# Rows of a memory are a multiple of this, whatever the number of devices: a checkpoint can move between them.
ROWS_UNIT = 1024


@dataclasses.dataclass(frozen=True)
class Stream:
    """A set that a part of each batch is drawn from.

    The stream `main` gives the arrays `image`, `label`, `clean_label`, `id` and `row` of a batch, and `views` where
    there are any; another stream `x` gives `x_image`, `x_label` and `x_row`, and `x_views`.

    Attributes:
      source: NOISY, the training set with its given labels, or TRUSTED, the trusted set.
      views: how many views of each example: 1 = the standard one; ALL_VIEWS = the standard one and
        `augment.num_views` − 1 strong ones.
      balanced: False: each epoch shows every example once, in an order of its own. True: the classes take turns, those
        of trusted examples as long as there are as many of each, those of the others (by their given labels) whatever
        their sizes. With `class_weight=balanced` they take turns either way, whatever their sizes.
      size: the key with the number of examples in a batch, `batch_size` or `trusted.batch_size`.
    """

    source: str = NOISY
    views: int | None = 1
    balanced: bool = False
    size: str = "batch_size"


# Trusted images beside a noisy batch: in a batch they are called probes.
PROBE = {"probe": Stream(TRUSTED, balanced=True, size="trusted.batch_size")}


class Supervision(NamedTuple):
    """What a step trains on: computed before the loss, without gradient. What a method lacks is None."""

    pseudo_label: jax.Array | None = None  # g, [B, K]
    example_weights: jax.Array | None = None  # ω*, [B]
    label_trust: jax.Array | None = None  # λ*, [B]
    prepared: Any = None  # whatever else the loss takes from here, such as a mixed pool
    memory: Any = None  # what the method remembers from here on; None = what it did before
    observed: Mapping[str, jax.Array] = {}  # name -> scalar, to be logged


class Aux(NamedTuple):
    """What the loss hands on besides its value."""

    terms: dict[str, jax.Array]  # the parts of the loss as they enter it, scalars
    logits: jax.Array  # [B, K] of the standard view; with R networks their mean
    batch_stats: Any  # new moving averages


@contextlib.contextmanager
def _seen_by_head(network: nn.Module) -> Iterator[list[jax.Array]]:
    """A list of what goes into the layer `head` while the network is applied; raises UserError where nothing does."""
    found = []

    def keep(call, arguments, keywords, layer):
        if layer.module.name == "head" and layer.method_name == "__call__":
            found.append(arguments[0])
        return call(*arguments, **keywords)

    with nn.intercept_methods(keep):
        yield found
    if not found:
        raise UserError(
            f"network {type(network).__name__} has no layer named head, whose inputs are its features: name its last "
            f"layer so, or choose a method.name that needs no features"
        )


def inputs_of_head(network: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """What goes into the layer `head` of a network in evaluation mode: `[n, H, W, C]` -> `[n, D]`.

    Raises:
      UserError: for a network without a layer of this name.
    """
    with _seen_by_head(network) as found:
        network.apply(variables, images, train=False)
    return found[0]


@dataclasses.dataclass(frozen=True)
class Context:
    """The static parts of a run that a method works with.

    Attributes:
      config: of the run.
      network: one copy of it.
      optimizer: direction without learning rate.
      num_classes: K.
      networks: R, copies of the network.
      num_examples: N, of the noisy training set.
      image_shape: (H, W, C) of a training image.
      schedule: updates made so far -> learning rate of the next one.
      gather: brings arrays `[B, ...]` to every device; by default it does nothing.
    """

    config: FrozenConfigDict
    network: nn.Module
    optimizer: optax.GradientTransformation
    num_classes: int
    networks: int = 1
    num_examples: int = 0
    image_shape: tuple[int, ...] = ()
    schedule: optax.Schedule | None = None
    gather: Callable[[Any], Any] = lambda arrays: arrays

    @property
    def steps_per_epoch(self) -> float:
        """Steps that show each noisy training example once."""
        return self.num_examples / self.config.batch_size

    def forward(
        self, params: Any, batch_stats: Any, images: jax.Array, images_of_each: bool = False
    ) -> tuple[jax.Array, Any]:
        """Training-mode forward pass: images `[n, H, W, C]` -> logits `[n, K]`, new moving averages.

        With R networks the logits are `[R, n, K]`; with `images_of_each` each network has images of its own,
        `[R, n, H, W, C]`.

        With `microbatches` m above 1 the images go through the network in m parts, one after the other, and only the
        activations of one part are in the device's memory: the backward pass computes them anew, part by part, and
        adds up the gradients. A part is a whole number of batch groups, and everything that mixes examples does so
        inside a group. So the logits, and with them every loss, ω, λ and the meta-gradient, are those of m = 1.
        """
        (logits, _), batch_stats = self._forward(params, batch_stats, images, images_of_each, False)
        return logits, batch_stats

    def forward_with_features(
        self, params: Any, batch_stats: Any, images: jax.Array, images_of_each: bool = False
    ) -> tuple[jax.Array, jax.Array, Any]:
        """As `forward`: logits, what goes into the layer `head`, `[n, D]` or `[R, n, D]`, and new moving averages.

        Raises:
          UserError: for a network without a layer of this name.
        """
        (logits, features), batch_stats = self._forward(params, batch_stats, images, images_of_each, True)
        return logits, features, batch_stats

    def _forward(self, params: Any, batch_stats: Any, images: jax.Array, images_of_each: bool, features: bool):
        """Logits and features, of which the latter are None unless they are asked for; and new moving averages."""
        one = functools.partial(self._forward_of_one, features)
        if self.networks == 1:
            return one(params, batch_stats, images)
        return jax.vmap(one, in_axes=(0, 0, 0 if images_of_each else None))(params, batch_stats, images)

    def _forward_of_one(self, features: bool, params: Any, batch_stats: Any, images: jax.Array):
        def apply(part):
            variables = {"params": params, "batch_stats": batch_stats}
            with _seen_by_head(self.network) if features else contextlib.nullcontext([None]) as seen:
                logits, updated = self.network.apply(variables, part, train=True, mutable=["batch_stats"])
            return (logits, seen[0]), updated["batch_stats"]

        count = self.config.microbatches
        if count == 1:
            return apply(images)
        # Each part takes every count-th group: with a multiple of count groups on each device it lies on all of them.
        groups = self.config.batch_groups // count
        parts = images.reshape(groups, count, -1, *images.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(count, -1, *images.shape[1:])
        outputs, stats = jax.lax.map(jax.checkpoint(apply, prevent_cse=False), parts)

        def joined(output):
            grouped = output.reshape(count, groups, -1, output.shape[-1]).swapaxes(0, 1)
            return grouped.reshape(images.shape[0], -1)

        # The moving averages take the mean over the groups; that of the parts' means is the same.
        return jax.tree.map(joined, outputs), jax.tree.map(lambda stat: stat.mean(0), stats)

    @property
    def num_features(self) -> int:
        """D, the numbers that go into the layer `head`; raises UserError for a network without one."""

        def features(rng, images):
            return inputs_of_head(self.network, self.network.init(rng, images, train=True), images)

        images = jax.ShapeDtypeStruct((self.network.batch_groups, *self.image_shape), jnp.float32)
        return jax.eval_shape(features, jax.eval_shape(lambda: jax.random.key(0)), images).shape[-1]

    @property
    def float_type(self) -> Any:
        """The type of labels and losses: that of the parameters, or float32 where it is better."""
        return jnp.promote_types(jnp.float32, self.network.param_dtype)

    def probabilities(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Evaluation mode, softmax(Φ(x)) of each network: images `[n, H, W, C]` -> `[R, n, K]`."""

        def one(variables):
            return jax.nn.softmax(self.network.apply(variables, images, train=False))

        return one(variables)[None] if self.networks == 1 else jax.vmap(one)(dict(variables))

    def features(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Evaluation mode, what goes into the layer `head` of each network: `[n, H, W, C]` -> `[R, n, D]`.

        Raises:
          UserError: for a network without a layer of this name.
        """

        def one(variables):
            return inputs_of_head(self.network, variables, images)

        return one(variables)[None] if self.networks == 1 else jax.vmap(one)(dict(variables))

    def one_hot(self, labels: jax.Array) -> jax.Array:
        """Labels `[B]` -> `[B, K]` of floats."""
        return jax.nn.one_hot(labels, self.num_classes, dtype=self.float_type)

    def weight_decay(self, params: Any) -> jax.Array:
        """The weight decay term of a loss, a scalar; 0 where the optimiser decays the weights (`adamw`)."""
        optimizer = self.config.optimizer
        return losses.weight_decay(params, optimizers.decay_in_loss(optimizer), optimizer.weight_decay_on)

    def meta_weight_decay(self, params: Any) -> jax.Array:
        """The weight decay term of the trusted loss after the lookahead, a scalar; 0 without `meta.weight_decay`.

        With `meta.weight_decay_on=all` it is ½ c ‖Θ′‖² of all parameters, where c ‖w‖² of the kernels, which is
        ½ · `optimizer.weight_decay` · ‖w‖², is that of the other losses; so it is in the authors' code.
        """
        meta, optimizer = self.config.meta, self.config.optimizer
        if not meta.weight_decay:
            return jnp.zeros(())
        if meta.weight_decay_on == "loss":
            return self.weight_decay(params)
        share = 0.5 if optimizer.weight_decay_on == "kernels" else 1.0
        return losses.weight_decay(params, share * optimizers.decay_in_loss(optimizer), "all")

    def write_rows(self, memory: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
        """A memory with new values in some rows.

        Args:
          memory: `[num_rows, ...]`.
          rows: `[B]`; where a row occurs twice, as when an epoch ends inside a batch, its last value counts.
          values: `[B, ...]`.
        """
        # On every device: else XLA would rather add up whole memories over the devices.
        rows, values = self.gather((rows, values))
        place = jnp.arange(rows.size)
        repeated_later = jnp.any((rows[:, None] == rows[None]) & (place[:, None] < place[None]), axis=1)
        rows = jnp.where(repeated_later, memory.shape[0], rows)  # behind the end, where mode="drop" leaves it out
        return memory.at[rows].set(values.astype(memory.dtype), mode="drop")


def trusted_loss(ctx: Context, params: Any, state: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """L_p: mean CE(y_p, Φ(x_p)) over the probe batch, a scalar; with the weight decay term where `meta` says so."""
    logits, _ = ctx.forward(params, state.batch_stats, batch["probe_image"])
    loss = jnp.mean(losses.cross_entropy(logits, ctx.one_hot(batch["probe_label"])))
    return loss + ctx.meta_weight_decay(params)


def weighted_loss(ctx: Context, params: Any, state: Any, batch: dict[str, jax.Array], weights: jax.Array):
    """Σ_i w_i CE(y_i, Φ(x_i)) + weight decay, of weights `[B]`: what `loss` returns."""
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    terms = {"weighted": jnp.sum(weights * cross_entropy), "weight_decay": ctx.weight_decay(params)}
    return total(terms), Aux(terms, logits, batch_stats)


def total(terms: dict[str, jax.Array]) -> jax.Array:
    """The sum of the terms of a loss."""
    return sum(terms.values())


# ---- What a module leaves out.


def nothing_remembered(ctx: Context, rng: jax.Array, num_rows: int) -> dict[str, jax.Array]:
    """The memory of a method that has none."""
    del ctx, rng, num_rows
    return {}


def labels_as_given(ctx: Context, state: Any, batch: Any, rng: jax.Array) -> Supervision:
    """The supervision of a method whose loss needs nothing but the batch."""
    del ctx, state, batch, rng
    return Supervision()


def mean_of_networks(ctx: Context, variables: Mapping[str, Any], memory: Any, images: jax.Array) -> jax.Array:
    """Mean over the networks of softmax(Φ(x)): images `[n, H, W, C]` -> `[n, K]`."""
    del memory
    each = ctx.probabilities(variables, images)
    return each[0] if ctx.networks == 1 else each.mean(0)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as its module describes it, with everything that the module leaves out.

    Attributes:
      name: in the registry, the value of `method.name`.
      title: for tables and figures.
      about: the docstring of the module.
      keys: flat key -> Key.
      streams: name -> Stream.
      networks: R.
      check, init, supervise, loss, on_epoch, fit, predict, passes: the functions of the module; `on_epoch` and `fit`
        are None where the module has none.
    """

    name: str
    title: str
    about: str
    keys: dict[str, Key]
    streams: dict[str, Stream]
    networks: int
    check: Callable[[ConfigDict], None]
    init: Callable[..., Any]
    supervise: Callable[..., Supervision]
    loss: Callable[..., tuple[jax.Array, Aux]]
    on_epoch: Callable[..., Any] | None
    fit: Callable[..., Any] | None
    predict: Callable[..., jax.Array]
    passes: Callable[[ConfigDict], float]

    def __hash__(self) -> int:
        """Methods are equal where all that they consist of is; dicts among these have no hash."""
        return hash(self.name)

    @property
    def needs_trusted(self) -> bool:
        """Whether it learns from trusted examples."""
        return any(stream.source == TRUSTED for stream in self.streams.values())

    @property
    def predicts_by_memory(self) -> bool:
        """Whether what it remembers has a part in its predictions."""
        return self.predict is not mean_of_networks

    def bind(self, ctx: Context) -> "Method":
        """The same with all functions bound to a context."""
        ctx = dataclasses.replace(ctx, networks=self.networks)
        names = ("init", "supervise", "loss", "predict", *(name for name in ("on_epoch", "fit") if getattr(self, name)))
        return dataclasses.replace(self, **{name: functools.partial(getattr(self, name), ctx) for name in names})


def nothing_to_check(config: ConfigDict) -> None:
    """`check` of a method whose keys do not depend on each other."""


@functools.cache
def _three_of_each(networks: int) -> Callable[[ConfigDict], float]:
    """`passes` of a step that is one forward and one backward pass of R networks."""
    return lambda config: 3.0 * networks


def read(name: str, module: ModuleType) -> Method:
    """Reads the module of a method."""
    keys = {key if "." in key else f"method.{key}": value for key, value in getattr(module, "KEYS", {}).items()}
    networks = getattr(module, "NETWORKS", 1)
    return Method(
        name=name,
        title=getattr(module, "TITLE", name),
        about=inspect.cleandoc(module.__doc__ or ""),
        keys=keys,
        streams=getattr(module, "STREAMS", {MAIN: Stream()}),
        networks=networks,
        check=getattr(module, "check", nothing_to_check),
        init=getattr(module, "init", nothing_remembered),
        supervise=getattr(module, "supervise", labels_as_given),
        loss=module.loss,
        on_epoch=getattr(module, "on_epoch", None),
        fit=getattr(module, "fit", None),
        predict=getattr(module, "predict", mean_of_networks),
        passes=getattr(module, "passes", _three_of_each(networks)),
    )
