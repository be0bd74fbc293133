"""The meta-gradient: one step of the real optimiser ahead, judged on the trusted set (paper, section 2.1).

    Θ′(v) = one optimiser update of Θ on ∇_Θ noisy_loss(Θ, v)
    ∂/∂v  probe_loss(Θ′(v))

v stands for the example weights ω (and the label trust λ). The derivative is exact: `jax.grad` through the
optax update, momentum included. Since noisy_loss is linear in v, reverse mode costs no more than one
directional derivative of the noisy forward pass besides the two ordinary gradients.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ieg_jax.config import Check, Key, above, boolean, one_of
from ieg_jax.errors import UserError
from ieg_jax.methods.parts import optimizers

Params = Any


def _is_pattern(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


KEYS = {
    "meta.learning_rate": Key(0.1, above(0), "Step size of the lookahead, whatever the schedule says."),
    "meta.layers": Key(
        ".*",
        Check(_is_pattern, "a regular expression"),
        "Regular expression: the parameters (paths such as 'head/kernel') that the lookahead moves.",
    ),
    "meta.weight_decay": Key(
        True, boolean, "Whether the trusted loss after the lookahead includes the weight decay term."
    ),
    "meta.weight_decay_on": Key(
        "all",
        one_of("loss", "all"),
        "What decays there: loss = as in the other losses (optimizer.weight_decay_on); all = all parameters, by "
        "½ c ‖Θ′‖² where the other losses have c ‖w‖² of kernels, as with the authors' ResNet29.",
    ),
}


def check_layers(layers: str, params: Any, key: str = "meta.layers") -> None:
    """Raises UserError where the regular expression of a key matches no parameter: nothing would be looked at."""
    paths = sorted("/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    if not any(re.search(layers, path) for path in paths):
        raise UserError(
            f"{key}={layers!r} matches none of the {len(paths)} parameters, such as {paths[0]} and {paths[-1]}"
        )


def lookahead(
    noisy_loss: Callable[[Params], jax.Array],
    params: Params,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float,
    layers: str = ".*",
) -> Params:
    """Returns Θ′: the parameters after one optimiser update on `noisy_loss`.

    Args:
      noisy_loss: parameters -> scalar.
      params: Θ.
      opt_state: state of `optimizer` (the momentum m).
      optimizer: direction without learning rate, see `optimizers`.
      learning_rate: step size of the virtual update.
      layers: regular expression; parameters whose path ('head/kernel') it does not match stay where they are,
        and the work of differentiating through them is saved.
    """
    after, _, _ = optimizers.apply(optimizer, jax.grad(noisy_loss)(params), opt_state, params, learning_rate)

    def select(path, old, new):
        return new if re.search(layers, "/".join(key.key for key in path)) else old

    return jax.tree_util.tree_map_with_path(select, params, after)


def meta_gradient(
    noisy_loss: Callable[[Params, Any], jax.Array],
    probe_loss: Callable[[Params], jax.Array],
    variables: Any,
    params: Params,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float,
    layers: str = ".*",
) -> tuple[jax.Array, Any]:
    """Differentiates the trusted loss after the lookahead with respect to `variables`.

    Args:
      noisy_loss: (parameters, variables) -> scalar.
      probe_loss: parameters -> scalar, the loss on trusted data.
      variables: where to take the derivative: ω⁰, or the pair (ω⁰, λ⁰).
      params: Θ.
      opt_state: state of `optimizer`.
      optimizer: direction without learning rate.
      learning_rate: step size of the lookahead.
      layers: regular expression, see `lookahead`.

    Returns:
      probe_loss(Θ′), and its gradient, shaped like `variables`.
    """

    def loss_after_lookahead(variables):
        return probe_loss(
            lookahead(lambda p: noisy_loss(p, variables), params, opt_state, optimizer, learning_rate, layers)
        )

    return jax.value_and_grad(loss_after_lookahead)(variables)


def example_weights(gradient: jax.Array) -> jax.Array:
    """ω* = max(−∂L_p/∂ω, 0) / (Σ + 1e-5): `[B]` -> `[B]`, summing to 1 (less where all are tiny)."""
    weights = jnp.maximum(-gradient, 0)
    return weights / (jnp.sum(weights) + 1e-5)


def label_trust(gradient: jax.Array) -> jax.Array:
    """λ* = 1 where ∂L_p/∂λ < 0, else 0 (paper, equation 4): `[B]` -> `[B]`."""
    return (gradient < 0).astype(gradient.dtype)
