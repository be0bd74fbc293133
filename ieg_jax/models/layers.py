"""What the networks share: their base class, batch norm over groups of the batch, initial values, scaled widths."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models import convolution

DType = jnp.dtype | type
Initializer = Callable[..., jax.Array]

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2/(k²·out)) for a k×k convolution (He et al. 2015, who count the outputs)."""


def uniform_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: DType = jnp.float32) -> jax.Array:
    """U(±1/√K) for a dense kernel `[n, K]`: the initial value of the output layer in the code of IEG's authors."""
    limit = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


# Of red, green and blue in [0, 1], as torchvision, timm and Flax's ImageNet example have them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def of_imagenet(x: jax.Array) -> jax.Array:
    """Images in [-1, 1], `[n, H, W, 3]`, less ImageNet's mean, by its standard deviation."""
    return standardized(x, IMAGENET_MEAN, IMAGENET_STD)


def standardized(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Images in [-1, 1], `[n, H, W, 3]`, less a mean, by a standard deviation, both of colours in [0, 1].

    The first kernel cannot do this in its place: the zeros that a convolution pads with stand for the mean colour in
    what follows, and for grey in the image as it came.
    """
    mean, std = (jnp.asarray(values, x.dtype) for values in (mean, std))
    return (x - (2 * mean - 1)) / (2 * std)


def check_colours(x: jax.Array, conventions: str) -> None:
    """Raises UserError for images `[n, H, W, C]` without three colours, under other conventions than `own`."""
    if conventions != "own" and x.shape[-1] != 3:
        raise UserError(
            f"model.conventions: got {conventions!r}, for red, green and blue, expected 'own' for images "
            f"with {x.shape[-1]} channel(s)"
        )


def scaled_channels(model: ConfigDict, usual: int) -> int:
    """The number of channels that a layer has at `model.width`.

    Args:
      model: the group `model` of the configuration.
      usual: the channels at width 1.

    Raises:
      UserError: for a width that leaves no channel.
    """
    scaled = round(usual * model.width)
    if scaled < 1:
        raise UserError(f"model.width: got {model.width}, which leaves {model.name} without a channel")
    return scaled


class Network(nn.Module):
    """The base class of the networks: the attributes that all of them have, and the layers that they are made of.

    A network is called as `network(x, train)`. It maps float32 images `[n, H, W, C]` to logits `[n, K]`, which are
    float32 or better. With `train` batch norm uses the statistics of the batch, and updates its moving averages (the
    collection `batch_stats`) where the caller declares them mutable; without `train` it uses the averages.

    Attributes:
      num_classes: K, the number of logits.
      batch_groups: into how many groups batch norm divides a training batch; must divide n. See `BatchNorm`.
      dtype: the type that layers compute in: float32, bfloat16 or float64. The last layer is float32 or better.
      param_dtype: the type of the parameters and the moving averages: float32 or float64.
      remat: whether the backward pass computes each block again, which saves memory and costs time. See `run_block`.
      convolutions: who computes them on a processor, `convolution.FORMS`.
    """

    num_classes: int
    _: dataclasses.KW_ONLY
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False
    convolutions: str = "lax"

    # Flax takes a method for a part of the network, with a scope and outputs of its own, unless it is marked `nowrap`.
    # A layer that a marked method makes belongs to the module that is being called at that moment. Inside a block this
    # is not `self` but the copy that `nn.remat` runs, and only a layer of that copy is computed again.

    @property
    def dtypes(self) -> dict[str, DType]:
        """The arguments `dtype` and `param_dtype` of a layer."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def norm(self, name: str, epsilon: float = 1e-5, momentum: float = 0.9) -> "BatchNorm":
        """A batch norm over the groups of the batch, called as `norm(x, train)`."""
        return BatchNorm(self.batch_groups, momentum, epsilon, name=name, **self.dtypes)

    @nn.nowrap
    def conv(
        self,
        features: int,
        kernel_size: tuple[int, int],
        strides: int = 1,
        *,
        name: str,
        kernel_init: Initializer = he_normal_fan_out,
        use_bias: bool = False,
        padding: Any = "SAME",
    ) -> nn.Conv:
        """A convolution, without biases unless they are asked for: batch norm would subtract them again.

        Args:
          features: the channels of the output.
          kernel_size: (height, width) in pixels.
          strides: the stride along both axes.
          name: of the layer in the tree of parameters.
          kernel_init: draws the initial kernel.
          use_bias: whether there is a bias for each channel; it starts at 0.
          padding: as `nn.Conv` takes it.
        """
        return nn.Conv(
            features,
            kernel_size,
            strides,
            padding=padding,
            use_bias=use_bias,
            kernel_init=kernel_init,
            name=name,
            conv_general_dilated=convolution.of_form(self.convolutions),
            **self.dtypes,
        )

    @nn.nowrap
    def run_block(self, block: Callable[[Any], jax.Array], x: Any) -> jax.Array:
        """Computes `block(x)`. With `remat`, x is all that is kept of the block for the backward pass.

        Args:
          block: makes layers, which it names, and applies them.
          x: the input of the block, an array or a tuple of arrays.
        """

        def recomputed(_, x):
            return block(x)

        return nn.remat(recomputed)(self, x) if self.remat else block(x)

    @nn.nowrap
    def logits(self, x: jax.Array, kernel_init: Initializer = nn.linear.default_kernel_init) -> jax.Array:
        """The last layer: a dense layer named `head`, from `[n, D]` to `[n, K]`.

        It computes in float32 or better even where the network computes in bfloat16, and so do the losses.
        """
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        head = nn.Dense(
            self.num_classes, kernel_init=kernel_init, dtype=dtype, param_dtype=self.param_dtype, name="head"
        )
        return head(x)


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own.

    On a processor it is computed by oneDNN or, where this is not to be had, by `convolution.written_out`.

    Attributes:
      kernel_size: (height, width) in pixels.
      stride: along both axes.
      padding: SAME, as TensorFlow pads, or a number of pixels on each side.
      dtype: the type that it computes in.
      param_dtype: the type of the parameters.
      use_bias: whether there is a bias for each channel; it starts at 0.
      convolutions: see `Network`.
    """

    kernel_size: tuple[int, int]
    stride: int = 1
    padding: int | str = "SAME"
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    use_bias: bool = False
    convolutions: str = "lax"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, C]`; `kernel` is `[h, w, 1, C]`, `bias` `[C]`."""
        shape = (*self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.linear.default_kernel_init, shape, self.param_dtype).astype(self.dtype)
        x, strides = x.astype(self.dtype), (self.stride, self.stride)
        padding = self.padding if self.padding == "SAME" else [(self.padding, self.padding)] * 2
        y = convolution.depthwise(x, kernel, strides, padding, self.convolutions)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the batch (Ioffe and Szegedy 2015).

    In training each of `groups` equal, contiguous parts of the batch is normalised with its own mean and
    (biased) variance. The moving averages follow the mean over the groups, of their means and of their unbiased
    variances, n/(n-1) times the biased ones, as in TensorFlow. Statistics are computed in float32 or better.

    Attributes:
      groups: the number of groups; must divide the batch.
      momentum: the share of the old value that a moving average keeps at each step.
      epsilon: what is added to the variance.
      dtype: the type of the output.
      param_dtype: the type of scale, bias and moving averages.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises `[n, ..., C]` over all axes but the last; returns the same shape, in `dtype`."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), self.param_dtype)
        moving_var = self.variable("batch_stats", "var", jnp.ones, (channels,), self.param_dtype)
        shape, x = x.shape, x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Statistics have the shape [groups, C] all along, without axes of size 1: with such axes XLA simplifies
        # the same forward pass differently with and without a gradient, and no longer shares the two.
        x = x.reshape(self.groups if train else 1, -1, *shape[1:])
        axes = tuple(range(1, x.ndim - 1))

        def spread(statistic):
            return jax.lax.broadcast_in_dim(statistic, x.shape, (0, x.ndim - 1))

        if train:
            mean = x.mean(axes)
            var = jnp.square(x - spread(mean)).mean(axes)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                n = x[0].size // channels
                unbiased = var * (n / max(n - 1, 1))
                for moving, new in ((moving_mean, mean), (moving_var, unbiased)):
                    new = new.mean(0).astype(self.param_dtype)
                    moving.value = self.momentum * moving.value + (1 - self.momentum) * new
        else:
            mean, var = moving_mean.value[None], moving_var.value[None]
        y = (x - spread(mean)) * spread(jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(shape).astype(self.dtype)
