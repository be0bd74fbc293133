"""Vision Transformers (Dosovitskiy et al. 2021, arXiv 2010.11929), in the forms in which their weights are published.

An image is cut into square patches; each becomes a vector, a token, to which an embedding of its place is added. Blocks
of attention and of a perceptron, each behind a layer norm and beside a shortcut, work on the tokens. One vector of the
result is what the head reads: the class token, which goes along with the patches, or what attention pools.

`model.name` says how large the network is, `model.conventions` which of the forms (`FORMS`) it has:

- own: as the weights of Steiner et al. (2021, augreg), for images in [-1, 1];
- torch: the same, for images less ImageNet's mean, by its deviation: DeiT (Touvron et al. 2021), torchvision;
- dinov2: DINOv2 with four registers (Oquab et al. 2023, Darcet et al. 2023);
- dinov2_plain: without registers;
- clip: the image tower of CLIP (Radford et al. 2021), with its approximation of GELU;
- open_clip: the same with GELU, as OpenCLIP trains it (Cherti et al. 2022);
- siglip: the image tower of SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025).

The features of the towers are what they project into the space of texts; the projection itself is no part of the
network. The embeddings of places belong to one size of images. Those of a file for another size are resampled as timm
and DINOv2 do it: bicubic (Keys, a = -1/2), with antialiasing. Nothing is dropped at random in training.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD, Network, check_colours, standardized
from ieg_jax.models.naming import Naming, by_table, turned

# Of red, green and blue in [0, 1], in the data that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

normal = nn.initializers.truncated_normal(0.02)
LAYER_SCALE = 1e-5  # its initial value


gelu = functools.partial(nn.gelu, approximate=False)
gelu_tanh = functools.partial(nn.gelu, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The approximation of GELU in CLIP, x · sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


@dataclasses.dataclass(frozen=True)
class Form:
    """In what published Vision Transformers differ, their size apart.

    Attributes:
      mean: of the images that the network expects, for each colour in [0, 1].
      std: likewise.
      epsilon: of layer norm, added to the variance.
      activation: of the perceptrons.
      class_token: whether there is one, which the head reads; else the head reads what attention pools.
      registers: further tokens without a place.
      layer_scale: whether each branch of a block is multiplied by a number for each channel.
      pre_norm: whether there is a layer norm before the first block; then the patches have no bias.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    epsilon: float = 1e-6
    activation: Callable[[jax.Array], jax.Array] = gelu
    class_token: bool = True
    registers: int = 0
    layer_scale: bool = False
    pre_norm: bool = False


_CLIP = Form(mean=CLIP_MEAN, std=CLIP_STD, epsilon=1e-5, pre_norm=True)
FORMS = {
    "own": Form(),
    "torch": Form(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "dinov2": Form(mean=IMAGENET_MEAN, std=IMAGENET_STD, registers=4, layer_scale=True),
    "dinov2_plain": Form(mean=IMAGENET_MEAN, std=IMAGENET_STD, layer_scale=True),
    "clip": dataclasses.replace(_CLIP, activation=quick_gelu),
    "open_clip": _CLIP,
    "siglip": Form(activation=gelu_tanh, class_token=False),
}


class VisionTransformer(Network):
    """ViT-S/16, unless other sizes are set: 22,050,280 parameters for 1000 classes and images of 224 pixels.

    Attributes, besides those of `Network`:
      patch: pixels of a side of a patch.
      features: D, the numbers of a token.
      depth: blocks.
      heads: of attention; must divide D.
      hidden: units of a perceptron.
      conventions: one of FORMS.
    """

    patch: int = 16
    features: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    conventions: str = "own"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        The embeddings of places, `params/position`, are `[H / patch, W / patch, D]`.

        Raises:
          UserError: for images whose sides are no multiples of the patch, and for images without three colours under
            other conventions than `own`.
        """
        del train
        form = FORMS[self.conventions]
        check_colours(x, self.conventions)
        _check_sides(x, self.patch)
        if form.mean != (0.5, 0.5, 0.5):
            x = standardized(x, form.mean, form.std)
        sides = (self.patch, self.patch)
        x = self.conv(
            self.features, sides, self.patch, padding="VALID", use_bias=not form.pre_norm, kernel_init=normal,
            name="patch",
        )(x)  # fmt: skip
        x += self._parameter("position", x.shape[1:])
        x = x.reshape(len(x), -1, self.features)
        if form.registers:
            x = _prepend(self._parameter("registers", (form.registers, self.features)), x)
        if form.class_token:  # that of a file includes the embedding of its place
            x = _prepend(self._parameter("class_token", (1, self.features)), x)
        common = {"features": self.features, "heads": self.heads, "hidden": self.hidden, "form": form}
        if form.pre_norm:
            x = _norm(form, "pre_norm", self.dtypes)(x)
        for number in range(self.depth):
            make = functools.partial(Block, **common, dtypes=self.dtypes, name=f"block{number}")
            x = self.run_block(lambda x, make=make: make()(x), x)
        norm = _norm(form, "norm", self.dtypes)
        if form.class_token:
            return self.logits(norm(x[:, 0]))
        return self.logits(AttentionPool(**common, dtypes=self.dtypes, name="pool")(norm(x)))

    def _parameter(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, normal, shape, self.param_dtype).astype(self.dtype)


def _check_sides(x: jax.Array, patch: int) -> None:
    height, width = x.shape[1:3]
    if height % patch or width % patch:
        near = " or ".join(str(patch * k) for k in (height // patch, height // patch + 1) if k)
        raise UserError(
            f"images of {height}×{width} pixels cannot be cut into patches of {patch}×{patch}; expected sides that are "
            f"multiples of {patch}, such as {near}: data.image_size or augment.standard, or --size of ieg_jax.embed"
        )


def _prepend(tokens: jax.Array, x: jax.Array) -> jax.Array:
    """`[m, D]` before the tokens of each image, `[n, t, D]` -> `[n, m + t, D]`."""
    return jnp.concatenate([jnp.broadcast_to(tokens, (len(x), *tokens.shape)), x], axis=1)


def _norm(form: Form, name: str, dtypes: dict) -> nn.LayerNorm:
    # The fast variance, E[x²] - E[x]², loses digits.
    return nn.LayerNorm(epsilon=form.epsilon, use_fast_variance=False, name=name, **dtypes)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query · keyᵀ / √d) · value, for each head (Vaswani et al. 2017, equation 1).

    The softmax is computed in float32 or better.

    Args:
      query: `[n, s, heads, d]`.
      key: `[n, t, heads, d]`.
      value: `[n, t, heads, d]`.

    Returns:
      `[n, s, heads · d]`, in the type of `value`.
    """
    scores = jnp.einsum("nshd,nthd->nhst", query * query.shape[-1] ** -0.5, key)
    shares = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(value.dtype)
    mixed = jnp.einsum("nhst,nthd->nshd", shares, value)
    return mixed.reshape(*mixed.shape[:2], -1)


class _Layers(nn.Module):
    """What the parts of a Vision Transformer share.

    Attributes:
      features: D, the numbers of a token.
      heads: of attention.
      hidden: units of the perceptron.
      form: of the network.
      dtypes: `dtype` and `param_dtype` of a layer.
    """

    features: int
    heads: int
    hidden: int
    form: Form
    dtypes: dict

    @nn.nowrap
    def dense(self, name: str, units: int) -> nn.Dense:
        """A dense layer with biases."""
        return nn.Dense(units, kernel_init=normal, name=name, **self.dtypes)

    @nn.nowrap
    def split(self, x: jax.Array, count: int) -> list[jax.Array]:
        """`[n, t, count · D]` -> count arrays `[n, t, heads, D / heads]`."""
        return [part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(x, count, axis=-1)]

    @nn.nowrap
    def perceptron(self, x: jax.Array) -> jax.Array:
        """Two dense layers."""
        return self.dense("dense2", self.features)(self.form.activation(self.dense("dense1", self.hidden)(x)))


class Block(_Layers):
    """x + s₁ · attention(norm(x)), then x + s₂ · perceptron(norm(x)); s₁ and s₂ are 1 without layer scale."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens `[n, t, D]` -> the same shape."""
        y = _norm(self.form, "norm1", self.dtypes)(x)
        y = attention(*self.split(self.dense("qkv", 3 * self.features)(y), 3))
        x = x + self._scaled("scale1", self.dense("out", self.features)(y))
        y = _norm(self.form, "norm2", self.dtypes)(x)
        return x + self._scaled("scale2", self.perceptron(y))

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.form.layer_scale:
            return x
        initial = nn.initializers.constant(LAYER_SCALE)
        return x * self.param(name, initial, (self.features,), self.dtypes["param_dtype"]).astype(x.dtype)


class AttentionPool(_Layers):
    """A vector that attends to all tokens, and a perceptron with a shortcut (the MAP head of Zhai et al. 2022)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens `[n, t, D]` -> `[n, D]`."""
        probe = self.param("probe", normal, (1, self.features), self.dtypes["param_dtype"])
        probe = jnp.broadcast_to(probe.astype(x.dtype), (len(x), *probe.shape))
        query = self.split(self.dense("query", self.features)(probe), 1)
        y = attention(*query, *self.split(self.dense("key_value", 2 * self.features)(x), 2))
        y = self.dense("out", self.features)(y)
        return (y + self.perceptron(_norm(self.form, "norm", self.dtypes)(y)))[:, 0]


# ---- The names of its arrays in published files.

# Layer or array here -> its name in the file, or the names of those that it is made of. {0} is the number of
# a block. The class token is made of two: that of the file and the embedding of its place.
_TIMM = {
    "patch": "patch_embed.proj", "class_token": ("cls_token", "pos_embed"), "registers": "reg_token",
    "position": "pos_embed", "pre_norm": "norm_pre", "norm": "norm", "head": "head",
    "block/norm1": "blocks.{0}.norm1", "block/qkv": "blocks.{0}.attn.qkv",
    "block/out": "blocks.{0}.attn.proj",
    "block/scale1": "blocks.{0}.ls1.gamma", "block/scale2": "blocks.{0}.ls2.gamma",
    "block/norm2": "blocks.{0}.norm2", "block/dense1": "blocks.{0}.mlp.fc1",
    "block/dense2": "blocks.{0}.mlp.fc2", "pool/probe": "attn_pool.latent", "pool/query": "attn_pool.q",
    "pool/key_value": "attn_pool.kv", "pool/out": "attn_pool.proj", "pool/norm": "attn_pool.norm",
    "pool/dense1": "attn_pool.mlp.fc1", "pool/dense2": "attn_pool.mlp.fc2",
}  # fmt: skip
_DINOV2 = _TIMM | {"registers": "register_tokens"}
_TORCHVISION = {
    "patch": "conv_proj", "class_token": ("class_token", "encoder.pos_embedding"), "position": "encoder.pos_embedding",
    "norm": "encoder.ln", "head": "heads.head",
    "block/norm1": "encoder.layers.encoder_layer_{0}.ln_1",
    "block/qkv": "encoder.layers.encoder_layer_{0}.self_attention.in_proj",
    "block/out": "encoder.layers.encoder_layer_{0}.self_attention.out_proj",
    "block/norm2": "encoder.layers.encoder_layer_{0}.ln_2",
    "block/dense1": "encoder.layers.encoder_layer_{0}.mlp.0",
    "block/dense2": "encoder.layers.encoder_layer_{0}.mlp.3",
}  # fmt: skip
_SEPARATE = tuple(f"encoder.layer.{{0}}.attention.attention.{part}" for part in ("query", "key", "value"))
_TRANSFORMERS_DINOV2 = {
    "patch": "embeddings.patch_embeddings.projection",
    "class_token": ("embeddings.cls_token", "embeddings.position_embeddings"),
    "registers": "embeddings.register_tokens", "position": "embeddings.position_embeddings", "norm": "layernorm",
    "block/norm1": "encoder.layer.{0}.norm1", "block/qkv": _SEPARATE,
    "block/out": "encoder.layer.{0}.attention.output.dense",
    "block/scale1": "encoder.layer.{0}.layer_scale1.lambda1",
    "block/scale2": "encoder.layer.{0}.layer_scale2.lambda1", "block/norm2": "encoder.layer.{0}.norm2",
    "block/dense1": "encoder.layer.{0}.mlp.fc1", "block/dense2": "encoder.layer.{0}.mlp.fc2",
}  # fmt: skip
_TRANSFORMERS_VIT = {
    "patch": "vit.embeddings.patch_embeddings.projection",
    "class_token": ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"),
    "position": "vit.embeddings.position_embeddings", "norm": "vit.layernorm", "head": "classifier",
    "block/norm1": "vit.encoder.layer.{0}.layernorm_before", "block/qkv": tuple(f"vit.{x}" for x in _SEPARATE),
    "block/out": "vit.encoder.layer.{0}.attention.output.dense",
    "block/norm2": "vit.encoder.layer.{0}.layernorm_after",
    "block/dense1": "vit.encoder.layer.{0}.intermediate.dense",
    "block/dense2": "vit.encoder.layer.{0}.output.dense",
}  # fmt: skip
_TRANSFORMERS_TOWER = {
    "patch": "embeddings.patch_embedding",
    "class_token": ("embeddings.class_embedding", "embeddings.position_embedding.weight"),
    "position": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm", "norm": "post_layernorm",
    "block/norm1": "encoder.layers.{0}.layer_norm1",
    "block/qkv": tuple(f"encoder.layers.{{0}}.self_attn.{part}_proj" for part in "qkv"),
    "block/out": "encoder.layers.{0}.self_attn.out_proj", "block/norm2": "encoder.layers.{0}.layer_norm2",
    "block/dense1": "encoder.layers.{0}.mlp.fc1", "block/dense2": "encoder.layers.{0}.mlp.fc2",
    "pool/probe": "head.probe", "pool/query": "head.attention.in_proj", "pool/key_value": "head.attention.in_proj",
    "pool/out": "head.attention.out_proj", "pool/norm": "head.layernorm", "pool/dense1": "head.mlp.fc1",
    "pool/dense2": "head.mlp.fc2",
}  # fmt: skip
_OPENAI = {
    "patch": "conv1", "class_token": ("class_embedding", "positional_embedding"), "position": "positional_embedding",
    "pre_norm": "ln_pre", "norm": "ln_post", "block/norm1": "transformer.resblocks.{0}.ln_1",
    "block/qkv": "transformer.resblocks.{0}.attn.in_proj",
    "block/out": "transformer.resblocks.{0}.attn.out_proj",
    "block/norm2": "transformer.resblocks.{0}.ln_2", "block/dense1": "transformer.resblocks.{0}.mlp.c_fc",
    "block/dense2": "transformer.resblocks.{0}.mlp.c_proj",
}  # fmt: skip


def _made(path: str, arrays: list[np.ndarray], joined: bool = False) -> np.ndarray:
    """The function `Naming.make`, for arrays in PyTorch's order.

    Args:
      path: in the network.
      arrays: of the file.
      joined: whether query, key and value of the pool are one array in the file.
    """
    arrays = [array.astype(np.float32) if array.dtype == np.float16 else array for array in arrays]
    array, layer = arrays[0], path.split("/")[-2]
    if path == "params/class_token":
        places = _rows(arrays[1])
        return _rows(array) + (places[:1] if _with_class(places) else 0)
    if path == "params/position":
        places = _rows(array)
        places = places[1:] if _with_class(places) else places
        side = math.isqrt(len(places))
        return places.reshape(side, side, -1) if side**2 == len(places) else places
    if path in ("params/registers", "params/pool/probe"):
        return _rows(array)
    if layer in ("query", "key_value") and joined:
        query, key, value = np.split(array, 3)
        array = query if layer == "query" else np.concatenate([key, value])
    return turned(np.concatenate(arrays) if len(arrays) > 1 else array)


def _rows(array: np.ndarray) -> np.ndarray:
    """`[..., D]` -> `[m, D]`."""
    return array.reshape(-1, array.shape[-1])


def _with_class(places: np.ndarray) -> bool:
    """Whether the first of `[m, D]` is of the class token: those of patches are as many as a square has."""
    return len(places) > 1 and math.isqrt(len(places) - 1) ** 2 == len(places) - 1


def fitted(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The embeddings of places for images of another size, resampled; every other array as it is.

    Args:
      path: in the network.
      array: as it was read; `[h, w, D]` are resampled.
      shape: that the network has.
    """
    if path != "params/position" or array.ndim != 3 or array.shape[-1] != shape[-1] or array.dtype.kind != "f":
        return array
    return array if array.shape == shape else np.asarray(jax.image.resize(array, shape, "cubic", antialias=True))


_TOWERS = ("clip", "open_clip")
_OF_TIMM = {
    "conventions": ("own", "torch"),
    "torch": True,
    "make": _made,
    "others": "mask_token",
    "marks": (
        ("norm_pre.weight", _TOWERS),
        ("attn_pool.latent", ("siglip",)),
        ("reg_token", ("dinov2",)),
        ("blocks.0.ls1.gamma", ("dinov2_plain",)),
    ),
}


def _towers(title: str, prefix: str) -> Naming:
    """The names that transformers has for the image towers of CLIP and SigLIP."""
    return Naming(
        title,
        by_table(_TRANSFORMERS_TOWER, prefix),
        ("siglip",),
        torch=True,
        others=r"(text_model|text_projection|visual_projection|classifier)\..*|logit_(scale|bias)|.*\.position_ids",
        marks=((f"{prefix}pre_layrnorm.weight", _TOWERS),),
        make=functools.partial(_made, joined=True),
    )


# Of namings that fit equally the first counts.
NAMINGS = (
    Naming("timm's names", by_table(_TIMM), **_OF_TIMM),
    Naming(
        "timm's names in OpenCLIP",
        by_table(_TIMM, "visual.trunk."),
        ("siglip",),
        torch=True,
        others=r"text\..*|logit_(scale|bias)",
        make=_made,
    ),
    Naming(
        "the published names of DINOv2", by_table(_DINOV2), ("dinov2",), torch=True, others="mask_token", make=_made
    ),
    Naming("torchvision's names", by_table(_TORCHVISION), ("torch",), torch=True, make=_made),
    Naming(
        "transformers' names of ViT",
        by_table(_TRANSFORMERS_VIT),
        ("own", "torch"),
        torch=True,
        others=r"vit\.pooler\..*",
        make=_made,
    ),
    Naming(
        "transformers' names of DINOv2",
        by_table(_TRANSFORMERS_DINOV2),
        ("dinov2_plain",),
        torch=True,
        others=r"embeddings\.mask_token",
        marks=(("embeddings.register_tokens", ("dinov2",)),),
        make=_made,
    ),
    _towers("transformers' names", "vision_model."),
    _towers("transformers' names of an image tower", ""),
    Naming(
        "the published names of CLIP",
        by_table(_OPENAI, "visual."),
        _TOWERS,
        torch=True,
        others=r"visual\.proj|(text|token_embedding|transformer|ln_final)\..*|positional_embedding|text_projection|"
        r"logit_(scale|bias)|attn_mask",
        make=_made,
    ),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """An entry of the registry: a Vision Transformer of one size, in any form."""

    patch: int
    features: int
    depth: int
    heads: int
    hidden: int

    READS = ("conventions",)
    CONVENTIONS = tuple(FORMS)
    NAMINGS = NAMINGS
    fitted = staticmethod(fitted)

    def from_config(self, model: ConfigDict, **common) -> nn.Module:
        """Builds the network under `model.conventions`; `common` are the attributes of `Network`."""
        return VisionTransformer(conventions=model.conventions, **vars(self), **common)


SIZES = {
    "vit_ti16": Size(16, 192, 12, 3, 768),
    "vit_s16": Size(16, 384, 12, 6, 1536),
    "vit_b16": Size(16, 768, 12, 12, 3072),
    "vit_b32": Size(32, 768, 12, 12, 3072),
    "vit_l16": Size(16, 1024, 24, 16, 4096),
    "vit_s14": Size(14, 384, 12, 6, 1536),
    "vit_b14": Size(14, 768, 12, 12, 3072),
    "vit_l14": Size(14, 1024, 24, 16, 4096),
    "vit_so14": Size(14, 1152, 27, 16, 4304),
    "vit_so16": Size(16, 1152, 27, 16, 4304),
}
