"""Wide ResNet (Zagoruyko and Komodakis 2016), standard and as the authors of IEG built it.

`standard`: pre-activation blocks; where the shape changes the shortcut is a 1×1 convolution of the block's
activated input.

`authors`: the shortcut has no parameters (average pooling for the stride, zero channels on both sides for the
width); only the first block of the network feeds its shortcut with the activated input; and there are further
skips, from the input of each group to its output and from the first convolution to the end.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm, DType, he_normal_fan_out, run_block, uniform_fan_out


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds WRN-`depth`-`width`; raises UserError where the depth is not 6 n + 4."""
    if model.depth < 10 or (model.depth - 4) % 6:
        raise UserError(f"model.depth: got {model.depth}, expected 6 n + 4 (10, 16, 22, 28, ...) for wide_resnet")
    if round(16 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves wide_resnet without a channel")
    return WideResNet(depth=model.depth, width=model.width, authors=model.variant == "authors", **common)


class WideResNet(nn.Module):
    """WRN-`depth`-`width` for small images: groups of 16w, 32w and 64w channels, the last two with stride 2."""

    depth: int
    width: float
    num_classes: int
    authors: bool = True
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, groups=self.batch_groups, **dtypes)
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal_fan_out, **dtypes)

        def normalized(name, x):
            return nn.relu(norm(name=name)(x, train))

        channels = [round(base * self.width) for base in (16, 32, 64)]
        x = conv(min(16, channels[0]), (3, 3), name="init_conv")(x)
        network_input = x
        for group, (features, stride) in enumerate(zip(channels, (1, 2, 2), strict=True), start=1):
            group_input = x
            for block in range((self.depth - 4) // 6):
                name = f"group{group}_block{block}"
                strides = (stride, stride) if block == 0 else (1, 1)

                def pre_activation(_, x, name=name, features=features, strides=strides):
                    activated = normalized(f"{name}_norm1", x)
                    if self.authors:
                        shortcut = activated if name == "group1_block0" else x
                        shortcut = _pad_and_pool(shortcut, features, strides[0])
                    elif x.shape[-1] != features or strides != (1, 1):
                        shortcut = conv(features, (1, 1), strides, name=f"{name}_shortcut")(activated)
                    else:
                        shortcut = x
                    y = conv(features, (3, 3), strides, name=f"{name}_conv1")(activated)
                    return shortcut + conv(features, (3, 3), name=f"{name}_conv2")(normalized(f"{name}_norm2", y))

                x = run_block(self, pre_activation, x)
            if self.authors:
                x = x + _pad_and_pool(group_input, features, stride)
        if self.authors:
            x = x + _pad_and_pool(network_input, channels[-1], 4)
        x = normalized("final_norm", x).mean((1, 2))
        init = uniform_fan_out if self.authors else nn.linear.default_kernel_init
        # The logits and all that follows are float32 even where the network computes in bfloat16.
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(
            self.num_classes, kernel_init=init, dtype=head_dtype, param_dtype=self.param_dtype, name="head"
        )(x)


def _pad_and_pool(x: jax.Array, features: int, stride: int) -> jax.Array:
    """The parameter-free shortcut: average pooling by `stride`, zero channels on both sides up to `features`."""
    if x.shape[-1] == features:
        return x
    if stride > 1:
        # Like the strided convolution beside it, an odd size is padded; what is padded does not count.
        x = nn.avg_pool(x, (stride, stride), (stride, stride), padding="SAME", count_include_pad=False)
    before = (features - x.shape[-1]) // 2
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, features - x.shape[-1] - before)))
