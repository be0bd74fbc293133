"""EMLC: enhanced meta label correction (Taraday and Baskin 2023, arXiv 2305.12961), by one step.

Two networks: a student, which predicts, and a teacher T, which says what the student learns. The teacher's prediction
and the given label are mixed by the confidence c in the latter, which a small network V has from the teacher's features
h and an embedding of the label:

    c_i = sigmoid(V(h(x_i), y_i; ψ)),   V: D + `label_units` → `enhancer_units` → 1, ReLU inside
    g_i = c_i y_i + (1 − c_i) T(x_i)
    student: mean_i CE(g_i, Φ(x_i)) + mean_q CE(y_q, Φ(x_q)) + weight decay, no gradient through g
    teacher and ψ: trusted loss at Θ′(g) + mean_p CE(y_p, T(x_p)) + mean_p BCE(c_p) + weight decay

q are half of the trusted images of each batch group, drawn anew in each step (`mlc.halves`), Θ′ is one optimiser update
of the student, which is judged on the other half, and p are all. BCE(c_p) is that of V telling the labels of trusted
images from wrong ones: each image is shown with its own and with the class that the teacher thinks likeliest of the
others, of which the published code draws one. The trusted loss
at Θ′ depends on the teacher by g alone; the derivative by g is that of the lookahead, exactly, and the term `meta` of
the loss is its product with g, whose value says nothing and whose gradient is that of the trusted loss.

The published runs begin with networks pretrained without labels (`model.pretrained` gives its weights to both), add up
the derivatives over five steps of the student, and train the teacher by SGD without momentum, where both
networks have the run's optimiser here. V has SGD at `enhancer_rate` in both, there with weight decay and a schedule.
The trusted loss there is without weight decay, as here with `meta.weight_decay=False`, the lookahead has the scheduled
rate, trusted images are augmented like the others, and batch norm sees both kinds together.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above, at_least
from ieg_jax.methods import mlc
from ieg_jax.methods.base import MAIN, PROBE, Aux, Context, Stream, Supervision, total, trusted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "EMLC"
NETWORKS = 2
STUDENT, TEACHER = 0, 1
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = {
    **lookahead.KEYS,
    "label_units": mlc.KEYS["label_units"],
    "enhancer_units": Key(128, at_least(1), "Units of the hidden layer of V."),
    "enhancer_rate": Key(0.02, above(0), "Learning rate of V (SGD)."),
}


def check(config) -> None:
    """Halves of a batch of trusted images have to be there in each group."""
    mlc.check_halves(config)


def passes(config) -> float:
    """8 + 6 r: both networks forward and backward, the student on halves of the trusted images; the derivative 2."""
    return 8 + 6 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def init(ctx: Context, rng, num_rows: int) -> dict:
    """ψ."""
    del num_rows
    units, inside = ctx.config.method.enhancer_units, ctx.num_features + ctx.config.method.label_units
    first, second, third = jax.random.split(rng, 3)
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        "embedding": glorot(first, (ctx.num_classes, ctx.config.method.label_units)),
        "hidden": {"kernel": glorot(second, (inside, units)), "bias": jnp.zeros(units)},
        "out": {"kernel": glorot(third, (units, 1)), "bias": jnp.zeros(1)},
    }


def confidence(psi, features: jax.Array, label: jax.Array) -> jax.Array:
    """V before its sigmoid: features `[n, D]` and labels `[n]` -> `[n]`."""
    hidden = jnp.concatenate([features, psi["embedding"][label]], -1)
    hidden = jax.nn.relu(hidden @ psi["hidden"]["kernel"] + psi["hidden"]["bias"])
    return (hidden @ psi["out"]["kernel"] + psi["out"]["bias"])[:, 0]


def mixed_labels(psi, logits: jax.Array, features: jax.Array, label: jax.Array) -> jax.Array:
    """The labels `[n, K]` of the teacher's `logits` and `features` and the given labels `[n]`."""
    kept = jax.nn.sigmoid(confidence(psi, features, label))[:, None]
    predicted = jax.nn.softmax(logits)
    return kept * jax.nn.one_hot(label, logits.shape[-1], dtype=predicted.dtype) + (1 - kept) * predicted


def retain_loss(psi, logits: jax.Array, features: jax.Array, label: jax.Array) -> jax.Array:
    """BCE of V for trusted labels and as many wrong ones, a scalar."""
    others = jnp.where(jax.nn.one_hot(label, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    of_right, of_wrong = (confidence(psi, features, shown) for shown in (label, jnp.argmax(others, -1)))
    return jnp.mean(jax.nn.softplus(-of_right) + jax.nn.softplus(of_wrong)) / 2


def part(tree, network: int):
    """The arrays of one network."""
    return jax.tree.map(lambda leaf: leaf[network] if jnp.ndim(leaf) else leaf, tree)


def student_terms(one: Context, params, state, batch, learned: dict[str, jax.Array], target: jax.Array):
    """Parts of the student's loss, its logits `[B, K]` and moving averages; all of one network."""
    logits, batch_stats = one.forward(params, state.batch_stats, batch["image"])
    trusted, _ = one.forward(params, state.batch_stats, learned["probe_image"])
    terms = {
        "corrected": jnp.mean(losses.cross_entropy(logits, target)),
        "trusted": jnp.mean(losses.cross_entropy(trusted, one.one_hot(learned["probe_label"]))),
    }
    return terms, logits, batch_stats


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The labels g, the derivative of the trusted loss by them, and a step of ψ."""
    one, psi, label = dataclasses.replace(ctx, networks=1), state.method, batch["label"]
    student, teacher = (
        state.replace(**{name: part(getattr(state, name), network) for name in ("params", "batch_stats", "opt_state")})
        for network in (STUDENT, TEACHER)
    )
    seen = one.forward_with_features(teacher.params, teacher.batch_stats, batch["image"])[:2]
    trusted = one.forward_with_features(teacher.params, teacher.batch_stats, batch["probe_image"])[:2]
    learned, judging = mlc.halves(one, batch, rng)

    def noisy_loss(params, target):
        return total(student_terms(one, params, student, batch, learned, target)[0]) + ctx.weight_decay(params)

    target = mixed_labels(psi, *seen, label)
    trusted_loss_after, by_target = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(one, params, student, judging),
        target,
        student.params,
        student.opt_state,
        ctx.optimizer,
        ctx.config.meta.learning_rate,
        ctx.config.meta.layers,
    )

    def enhancer_loss(psi):
        return jnp.sum(by_target * mixed_labels(psi, *seen, label)) + retain_loss(psi, *trusted, batch["probe_label"])

    gradient = jax.grad(enhancer_loss)(psi)
    kept = jax.nn.sigmoid(confidence(psi, seen[1], label))
    return Supervision(
        pseudo_label=target,
        label_trust=kept,
        prepared=(by_target, psi, learned),
        memory=jax.tree.map(lambda p, g: p - ctx.config.method.enhancer_rate * g, psi, gradient),
        observed={"loss/trusted_after_lookahead": trusted_loss_after, "trust/mean": jnp.mean(kept)},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """The student's and the teacher's losses + weight decay of both."""
    del rng
    one, (by_target, psi, learned) = dataclasses.replace(ctx, networks=1), supervision.prepared
    student, teacher = (state.replace(batch_stats=part(state.batch_stats, network)) for network in (STUDENT, TEACHER))
    target = supervision.pseudo_label
    terms, logits, student_stats = student_terms(one, part(params, STUDENT), student, batch, learned, target)
    theirs = part(params, TEACHER)
    *seen, teacher_stats = one.forward_with_features(theirs, teacher.batch_stats, batch["image"])
    *trusted, _ = one.forward_with_features(theirs, teacher.batch_stats, batch["probe_image"])
    terms |= {
        "meta": jnp.sum(by_target * mixed_labels(psi, *seen, batch["label"])),
        "teacher": jnp.mean(losses.cross_entropy(trusted[0], ctx.one_hot(batch["probe_label"]))),
        "retain": retain_loss(psi, *trusted, batch["probe_label"]),
        "weight_decay": ctx.weight_decay(params),
    }
    stats = jax.tree.map(lambda *both: jnp.stack(both), student_stats, teacher_stats)
    return total(terms), Aux(terms, logits, stats)


def predict(ctx: Context, variables, memory, images: jax.Array) -> jax.Array:
    """The student's: images `[n, H, W, C]` -> `[n, K]`."""
    del memory
    return ctx.probabilities(variables, images)[STUDENT]
