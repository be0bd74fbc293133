"""ELR+: early-learning regularisation by two networks, with averaged weights and mixup (Liu et al. 2020).

As `elr` (arXiv 2007.00151), but the targets of a network come from the other one, from the moving average Θ̄ of its
weights, and images are mixed in pairs, x = δ x_a + (1 − δ) x_b with δ = max(β, 1 − β), β ~ Beta(α, α):

    t_i ← β t_i + (1 − β) softmax(Φ(x_i; Θ̄ of the other network))
    L = CE(δ y_a + (1 − δ) y_b, Φ(x)) + λ mean log(1 − ⟨p, δ t_a + (1 − δ) t_b⟩) + weight decay

with p = softmax(Φ(x)) cut to [10⁻⁴, 1 − 10⁻⁴]; the losses of the two are added up. Θ̄ is the average that the run keeps
anyway (`ema.decay`; with 0 the weights themselves), in training mode, so that batch norm sees the batch.

The published code trains the networks in turns, an epoch each, on orders of their own; here both see the same batch,
each with a mixture of its own. There the average has γ = 0.997, times a factor that rises from e⁻⁵ in 40,000 steps;
here `ema.warmup` has that part. Its settings: α = 1; β = 0.7, λ = 3 for CIFAR-10 with uniform noise and WebVision;
0.9 and 1 for CIFAR-10 with asymmetric noise; 0.9 and 7 for CIFAR-100, where it has two things more that are
not done here: λ rises in 40,000 steps, and the mixed labels are multiplied with the targets. With λ = 0 and α = 0 this
is the cross-entropy of each network.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, at_least
from ieg_jax.methods import elr
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses, mixup

TITLE = "ELR+"
NETWORKS = 2
KEYS = {**elr.KEYS, "mixing_alpha": Key(1.0, at_least(0), "α of the mixing of pairs in ELR+; 0 = nothing is mixed.")}


def passes(config) -> float:
    """The averaged networks see the images, and both learn from a mixture."""
    del config
    return 2 * (1 + 3.0)


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The targets t of all examples for each network, 0 at first: `[num_rows, 2, K]`."""
    del rng
    return {"target": jnp.zeros((num_rows, 2, ctx.num_classes))}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The targets t of the batch after this step's predictions `[2, B, K]`, the logits of these, and the pairs."""
    averaged = state.params if state.ema_params is None else state.ema_params
    logits, _ = ctx.forward(averaged, state.batch_stats, batch["image"])
    beta, old, rows = ctx.config.method.target_momentum, state.method["target"], batch["row"]
    target = beta * old[rows] + (1 - beta) * jax.nn.softmax(logits)[::-1].swapaxes(0, 1)
    memory = {"target": ctx.write_rows(old, rows, target)}
    alpha = ctx.config.method.mixing_alpha

    def draw(key):
        pairs = mixup.draw_pairs(key, ctx.config.batch_groups, len(rows), alpha or 1.0)
        return pairs._replace(share=jnp.maximum(pairs.share, 1 - pairs.share) if alpha else jnp.ones(()))

    prepared = (target.swapaxes(0, 1), logits, jax.vmap(draw)(jax.random.split(rng)))
    return Supervision(prepared=prepared, memory=memory)


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """The sum over the networks of mean CE + λ mean log(1 − ⟨p, t⟩), of mixtures, + weight decay."""
    del rng
    target, unmixed, pairs = supervision.prepared

    def mixed(array):  # the same for both networks -> [2, B, ...]
        return jax.vmap(mixup.mix_pairs, in_axes=(0, None))(pairs, array)

    logits, batch_stats = ctx.forward(params, state.batch_stats, mixed(batch["image"]), images_of_each=True)
    agreement = jnp.sum(elr.probabilities(logits) * jax.vmap(mixup.mix_pairs)(pairs, target), -1)
    terms = {
        "cross_entropy": jnp.sum(jnp.mean(losses.cross_entropy(logits, mixed(ctx.one_hot(batch["label"]))), -1)),
        "early_learning": ctx.config.method.early_learning_weight * jnp.sum(jnp.mean(jnp.log(1 - agreement), -1)),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, unmixed.mean(0), batch_stats)
