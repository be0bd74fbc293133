"""How images of a training batch travel from the host to the devices: the key `data.transfer`.

The host makes views as float32 in [-1, 1]. They can be sent with fewer bits than they are computed with: `sent` packs
them on the host, inside tf.data, and `received` unpacks them on the devices, inside the compiled step.

| `data.transfer` | bytes of a number | largest error |
| --- | --- | --- |
| `float32` | 4 | none |
| `bfloat16` | 2 | 2⁻⁹ of the number: it is rounded to 8 binary digits |
| `uint8` | 1 | 1/255: it is rounded to one of 256 grey levels; none for images that still have these |
"""

import jax
import jax.numpy as jnp

from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

TYPES = ("float32", "bfloat16", "uint8")
HALF = 127.5  # of the grey levels 0 to 255, which are -1 to 1


def check(transfer: str, shape: tuple[int, int, int]) -> None:
    """Raises UserError where images of this shape cannot be sent so: features may have any value."""
    if transfer == "uint8" and shape[:2] == (1, 1):
        raise UserError(
            "data.transfer=uint8 is for images in [-1, 1], and these are features, which may have any value: set it to "
            "float32 or bfloat16"
        )


def sent(images: "tf.Tensor", transfer: str) -> "tf.Tensor":
    """Packs float32 images as `transfer` says; uint8 is the nearest grey level of what is clipped to [-1, 1]."""
    if transfer == "uint8":
        return tf.saturate_cast(tf.round((images + 1.0) * HALF), tf.uint8)
    return tf.cast(images, tf.bfloat16) if transfer == "bfloat16" else images


def received(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Unpacks what `sent` packed in a batch: it becomes float32 again; all other arrays stay as they are."""

    def unpacked(array):
        if array.dtype == jnp.uint8:
            return array.astype(jnp.float32) / HALF - 1.0
        return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array

    return {name: unpacked(array) for name, array in batch.items()}
