"""A network of one's own: any Flax module in place of one of the registry."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ieg_jax.errors import UserError, first_line
from ieg_jax.models import from_nnx
from ieg_jax.models.layers import DType


class OwnNetwork(nn.Module):
    """Someone's module, with those attributes of `layers.Network` that a run reads.

    Its parameters keep the paths that they have in `module`.

    Attributes:
      module: called as `module(images, train=...)`, with float32 images `[n, H, W, C]`; returns logits `[n, K]`.
      batch_groups: into how many groups `module` divides a training batch for its statistics; 1 if it knows of none.
      param_dtype: the type in which losses are computed.
    """

    module: nn.Module
    batch_groups: int = 1
    param_dtype: DType = jnp.float32

    def setup(self):
        """Lets `module` have its parameters where this module would have its own."""
        nn.share_scope(self, self.module)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        logits = self.module(x, train=train)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def adapt(module: nn.Module, num_classes: int, batch_groups: int, image: tuple[int, int, int]) -> OwnNetwork:
    """Makes a network of a linen module, and checks the shapes of its variables and logits; nothing is computed.

    Args:
      module: see `OwnNetwork`; of Flax NNX as `from_nnx` describes it. Besides parameters it may have moving averages,
        in the collection `batch_stats`, but no other variables; and it must not draw random numbers after its
        initialisation, as dropout does.
      num_classes: K, the number of logits.
      batch_groups: into how many groups the training batch is divided. Above 1, the module must have an attribute
        `batch_groups` of this value and compute its statistics inside each group, as `layers.BatchNorm` does.
      image: the shape of an image, (H, W, C).

    Raises:
      UserError: for a module that does not meet this, or that cannot be applied to such images.
    """
    check_kind(module)
    own_groups = getattr(module, "batch_groups", 1)
    if own_groups != batch_groups:
        raise UserError(
            f"batch_groups: {from_nnx.name_of(module)} would see {batch_groups} groups of the batch, and its attribute "
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
            f"network {from_nnx.name_of(module)} cannot be applied to images {images.shape}: {first_line(error)}; "
            f"expected __call__(x, train) without random numbers, parameters, and moving averages in batch_stats alone"
        ) from error
    others = sorted(variables.keys() - given.keys())
    if others or not given["params"]:
        raise UserError(
            f"network {from_nnx.name_of(module)} has the collections {', '.join(sorted(variables)) or '(none)'}, "
            f"expected params, and perhaps batch_stats"
        )
    if any(logits.shape != (2 * batch_groups, num_classes) for logits in shapes):
        raise UserError(
            f"network {from_nnx.name_of(module)} makes {shapes[0].shape} of images {images.shape}, expected logits "
            f"{(2 * batch_groups, num_classes)}, one for each of the {num_classes} classes"
        )
    return network


def check_kind(network: object) -> None:
    """Raises UserError unless a network is a linen module; for one of Flax NNX it says how it becomes one."""
    from_nnx.check(network)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network: got {network!r}, expected the name of one, or an instance of a flax.linen module, such as "
            f"MyNetwork()"
        )
