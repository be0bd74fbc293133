"""Metrics: weighted averages on the device, and the window over which training metrics are averaged."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score


@flax.struct.dataclass
class WeightedAverage:
    """Σ w·v / Σ w, kept as its two sums so that parts can be added up.

    `clu.metrics.Average` turns a mask into booleans, which gives a wrong mean for real-valued weights.
    """

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | float = 1.0) -> "WeightedAverage":
        """The average of `values` under `weights` (broadcast to the shape of `values`)."""
        values = jnp.asarray(values)
        weights = jnp.broadcast_to(jnp.asarray(weights, values.dtype), values.shape)
        # A value that does not count may be anything, nan included.
        return cls(jnp.sum(jnp.where(weights == 0, 0, values * weights)), jnp.sum(weights))

    def __add__(self, other: "WeightedAverage") -> "WeightedAverage":
        return WeightedAverage(self.total + other.total, self.weight + other.weight)

    def compute(self) -> float | None:
        """The average as a Python float, None where nothing counted."""
        return float(self.total) / float(self.weight) if float(self.weight) else None


@flax.struct.dataclass
class ClassAccuracy:
    """The mean over the classes of the share of their examples that is right, kept as sums that can be added up.

    A class that has no example has no part in it.
    """

    right: jax.Array  # [K], weights of the examples of each class that are right
    weight: jax.Array  # [K], of all examples of each class

    def __add__(self, other: "ClassAccuracy") -> "ClassAccuracy":
        return ClassAccuracy(self.right + other.right, self.weight + other.weight)

    def compute(self) -> float | None:
        """The mean as a Python float, None where nothing counted."""
        right, weight = np.asarray(self.right, float), np.asarray(self.weight, float)
        there = weight > 0
        return float(np.mean(right[there] / weight[there])) if there.any() else None


@flax.struct.dataclass
class Examples:
    """What a step found out about each example of its batch; arrays `[B]`, or `[steps, B]` in a window."""

    ids: jax.Array  # int32
    weights: jax.Array  # ω*
    clean: jax.Array  # int8: 1 = the given label is true, 0 = it is not, -1 = not known
    trust: jax.Array | None = None  # λ*; None where the method has none
    pseudo_label: jax.Array | None = None  # int32: the most probable class of g; likewise
    label_probability: jax.Array | None = None  # g of the given label; likewise


@flax.struct.dataclass
class Observation:
    """What one step reports."""

    averages: dict[str, WeightedAverage]
    examples: Examples | None


@flax.struct.dataclass
class Window:
    """Training metrics since the last logged step. Lives on the device and in the checkpoint.

    That makes a resumed run log exactly what an undisturbed one would have.
    """

    averages: dict[str, WeightedAverage]
    examples: Examples | None  # [steps, B]; only the first `count` rows are filled
    count: jax.Array  # int32 scalar, steps so far
    bad_step: dict[str, jax.Array]  # for each average the first step at which it was not finite, or -1


def empty_window(observation: Observation, steps: int) -> Window:
    """A window for up to `steps` observations of the shapes and dtypes of `observation`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), observation.averages)
    return Window(
        averages=zeros,
        examples=jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), observation.examples),
        count=jnp.zeros((), jnp.int32),
        bad_step={name: jnp.full((), -1, jnp.int32) for name in observation.averages},
    )


def add(window: Window, observation: Observation, step: jax.Array) -> Window:
    """Adds the observation of a step (int32 scalar, counted from 1) to the window."""
    averages = {name: value + observation.averages[name] for name, value in window.averages.items()}
    examples = jax.tree.map(lambda rows, row: rows.at[window.count].set(row), window.examples, observation.examples)
    bad_step = {
        name: jnp.where((seen < 0) & ~jnp.isfinite(observation.averages[name].total), step.astype(jnp.int32), seen)
        for name, seen in window.bad_step.items()
    }
    return Window(averages, examples, window.count + 1, bad_step)


def first_bad(window: Window) -> tuple[int, list[str]] | None:
    """The first step at which a metric was not finite, and the names of those metrics; None if there is none.

    Args:
      window: on the host (`jax.device_get`).
    """
    steps = {name: int(step) for name, step in window.bad_step.items() if int(step) >= 0}
    if not steps:
        return None
    first = min(steps.values())
    return first, [name for name, step in steps.items() if step == first]


def summarize(window: Window) -> dict[str, float]:
    """The averages of a window, and `weight/auroc` where examples of both kinds are known.

    Args:
      window: on the host (`jax.device_get`).

    Returns:
      Name -> float; an average to which nothing contributed is left out.
    """
    averages = {name: value.compute() for name, value in window.averages.items()}
    if window.examples is not None:
        examples = window_examples(window)
        averages["weight/auroc"] = detection_auroc(examples.weights, examples.clean)
    return {name: value for name, value in averages.items() if value is not None}


def window_examples(window: Window) -> Examples:
    """Every example in the window, `[n]`, in the order of the steps."""
    return jax.tree.map(lambda rows: np.ravel(rows[: int(window.count)]), window.examples)


def detection_auroc(scores: np.ndarray, clean: np.ndarray) -> float | None:
    """Area under the ROC curve of a score, such as ω, as a detector of true labels; 1/2 = chance.

    Args:
      scores: `[n]`, large where the label is taken for right.
      clean: `[n]`, 1 = true label, 0 = wrong label, -1 = not known, which does not count.

    Returns:
      None where there are not both kinds.
    """
    known = clean >= 0
    if len(set(clean[known].tolist())) < 2:
        return None
    return float(roc_auc_score(clean[known], scores[known]))


def accuracy(scores: jax.Array, label: jax.Array, weights: jax.Array | float = 1.0, top: int = 1) -> WeightedAverage:
    """Share of examples whose label is among the `top` largest scores.

    Args:
      scores: `[n, K]`, logits or probabilities.
      label: `[n]`; its rank counts ties in favour of the other classes only where they come first.
      weights: `[n]`, 0 for examples that do not count.
      top: at most K.
    """
    return WeightedAverage.of(_hits(scores, label, top), weights)


def balanced_accuracy(scores: jax.Array, label: jax.Array, weights: jax.Array | float = 1.0) -> ClassAccuracy:
    """Accuracy in which every class counts alike: the mean over the classes of the share that is right (recall).

    Args:
      scores: `[n, K]`, logits or probabilities.
      label: `[n]`; ties as in `accuracy`.
      weights: `[n]`, 0 for examples that do not count.
    """
    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), label.shape)
    of_class = jax.nn.one_hot(label, scores.shape[-1], dtype=jnp.float32) * weights[:, None]
    return ClassAccuracy(jnp.sum(of_class * _hits(scores, label, 1)[:, None], axis=0), jnp.sum(of_class, axis=0))


def _hits(scores: jax.Array, label: jax.Array, top: int) -> jax.Array:
    """1 where the label is among the `top` largest scores, else 0: `[n]` float32."""
    own = jnp.take_along_axis(scores, label[:, None], axis=-1)
    earlier = jnp.arange(scores.shape[-1]) < label[:, None]
    rank = jnp.sum((scores > own) | ((scores == own) & earlier), axis=-1)
    return ((rank < top) & jnp.isfinite(own[:, 0])).astype(jnp.float32)  # nan compares as smaller than nothing


def observe(batch, supervision, loss, aux, norms) -> Observation:
    """What a step reports: averages of the loss, its terms and accuracies, and ω and λ of each example."""
    average = WeightedAverage.of
    has_class, known = batch["clean_label"] >= 0, batch["clean_label"] != -1
    clean = known & (batch["label"] == batch["clean_label"])
    noisy = known & ~clean
    averages = {"loss/total": average(loss)}
    averages |= {f"loss/{name}": average(value) for name, value in aux.terms.items()}
    averages |= {name: average(value) for name, value in norms.items()}
    averages["train/accuracy"] = accuracy(aux.logits, batch["label"])
    true_label = jnp.maximum(batch["clean_label"], 0)
    averages["train/accuracy_true_label"] = accuracy(aux.logits, true_label, has_class)
    averages |= {name: average(value) for name, value in supervision.observed.items()}
    for name, value in (("weight", supervision.example_weights), ("trust", supervision.label_trust)):
        if value is not None:
            averages[f"{name}/clean"] = average(value, clean)
            averages[f"{name}/noisy"] = average(value, noisy)
    examples = None
    if supervision.example_weights is not None:
        # The share of the batches of which no example would help the trusted set, so that L_ω is 0.
        averages["weight/all_zero"] = average((supervision.example_weights == 0).all())
        flag = jnp.where(known, clean, -1).astype(jnp.int8)
        examples = Examples(batch["id"], supervision.example_weights, flag, supervision.label_trust)
        if (g := supervision.pseudo_label) is not None:
            examples = examples.replace(
                pseudo_label=jnp.argmax(g, -1).astype(jnp.int32),
                label_probability=jnp.take_along_axis(g, batch["label"][:, None], -1)[:, 0],
            )
    return Observation(averages, examples)
