"""Augmentation: stateless TensorFlow operations on one image, and policies made of them.

An operation is a function (image, seed, parameters) -> image. An image is float32 `[H, W, C]` in [-1, 1], where black
is -1 and grey 0, or it is a row of features `[1, 1, D]` (`sources.arrays.features`). A seed is int64 `[2]`, and the
same seed gives the same result on every machine; `gaussian` also takes many rows `[n, 1, 1, D]`, with `draws.Places`
for their seeds. A policy is written as operations joined by `|`, such as `crop(pad=4)|flip|cutout(0.5)`. A new
operation is a function with an entry in OPERATIONS.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, one_of
from ieg_jax.data import autoaugment, draws
from ieg_jax.data.images import ChooseWindow, Encoded, to_float
from ieg_jax.errors import UserError, check_choice
from ieg_jax.lazy import tf

BLACK, GREY = -1.0, 0.0
Policy = Callable[["tf.Tensor | Encoded", "tf.Tensor"], "tf.Tensor"]


def crop(image: tf.Tensor, seed: tf.Tensor, pad: int = 4, fill: float = BLACK, last: int = 1) -> tf.Tensor:
    """Pads each side by `pad` pixels of value `fill` and takes a random window of the old size.

    Its offset is one of 0 … 2 · pad; with `last=0` the last one is never drawn, as in AutoAugment's code.
    """
    padded = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]], constant_values=fill)
    offset = tf.random.stateless_uniform([2], seed, 0, 2 * pad + (1 if last or not pad else 0), tf.int32)
    window = tf.slice(padded, [offset[0], offset[1], 0], tf.shape(image))
    return tf.ensure_shape(window, image.shape)


def flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors left and right with probability 1/2. It does not suit digits and letters."""
    return tf.cond(tf.random.stateless_uniform([], seed) < 0.5, lambda: image, lambda: tf.reverse(image, [1]))


def affine(
    image: tf.Tensor,
    seed: tf.Tensor,
    rotate: float = 0.0,
    shear: float = 0.0,
    zoom: float = 0.0,
    translate: float = 0.0,
    fill: float = BLACK,
) -> tf.Tensor:
    """Applies a random affine map about the centre, with bilinear interpolation.

    Args:
      image: `[H, W, C]`.
      seed: `[2]`.
      rotate: the angle is drawn from ±`rotate`, in degrees.
      shear: the horizontal shear is drawn from ±`shear`, in pixels per pixel.
      zoom: the factor is drawn from [1 − zoom, 1 + zoom].
      translate: the shift in each direction is drawn from ±`translate`, as a share of the side.
      fill: value of pixels that come from outside the image.
    """
    height, width = image.shape[0], image.shape[1]
    u = tf.random.stateless_uniform([5], seed, -1.0, 1.0)
    angle, slant, scale = u[0] * math.radians(rotate), u[1] * shear, 1.0 + u[2] * zoom
    cos, sin = tf.cos(angle) / scale, tf.sin(angle) / scale
    # The output pixel p = (x, y) shows the input at M (p − c) + c − shift, with M = [[a, b], [d, e]] and the centre c.
    a, b = cos, slant * cos - sin
    d, e = sin, slant * sin + cos
    cx, cy = (width - 1) / 2, (height - 1) / 2
    tx, ty = u[3] * translate * width, u[4] * translate * height
    transform = tf.stack([a, b, cx - a * cx - b * cy - tx, d, e, cy - d * cx - e * cy - ty, 0.0, 0.0])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=transform[None],
        output_shape=[height, width],
        fill_value=fill,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


def intensity(image: tf.Tensor, seed: tf.Tensor, strength: float = 0.2) -> tf.Tensor:
    """Multiplies by a factor in [1 − strength, 1 + strength], adds a shift in ±strength, and clips to [-1, 1].

    The factor changes the contrast, the shift the brightness.
    """
    u = tf.random.stateless_uniform([2], seed, -strength, strength)
    return tf.clip_by_value(image * (1.0 + u[0]) + u[1], -1.0, 1.0)


def cutout(image: tf.Tensor, seed: tf.Tensor, size: float = 0.5, fill: float = GREY) -> tf.Tensor:
    """Fills a square of `size` times the height, centred on a random pixel and clipped at the border.

    This is Cutout (DeVries and Taylor 2017).
    """
    height, width = image.shape[0], image.shape[1]
    side = max(1, round(size * height))
    u = tf.random.stateless_uniform([2], seed)
    top = tf.cast(u[0] * height, tf.int32) - side // 2
    left = tf.cast(u[1] * width, tf.int32) - side // 2
    rows, columns = tf.range(height), tf.range(width)
    inside = ((rows >= top) & (rows < top + side))[:, None] & ((columns >= left) & (columns < left + side))[None]
    return tf.where(inside[..., None], fill, image)


def gaussian(image: tf.Tensor, seed: draws.Seed, sigma: float = 0.1) -> tf.Tensor:
    """Adds a draw from N(0, sigma²) to each number: it makes views of features, whose standard deviations are 1.

    Images are clipped to [-1, 1].
    """
    noisy = image + sigma * draws.normals(seed, image.shape)
    return noisy if image.shape[-3:-1] == (1, 1) else tf.clip_by_value(noisy, -1.0, 1.0)


def random_resized_crop(
    image: tf.Tensor | Encoded, seed: tf.Tensor, size: int = 224, smallest: float = 0.08, stretch: float = 4 / 3
) -> tf.Tensor:
    """Takes a random window, resized (bilinear, antialiased) to `size` × `size` pixels (Szegedy et al. 2015).

    The area of the window is a share in [smallest, 1] of the image's, and its ratio of width to height is in
    [1/stretch, stretch]. If none of ten draws fits into the image, the whole image is taken. Of a JPEG file only the
    window is decoded.
    """

    def choose(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.concat([shape, [3]], 0),
            tf.zeros([0, 0, 4]),
            seed,
            min_object_covered=0.0,
            aspect_ratio_range=(1 / stretch, stretch),
            area_range=(smallest, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    return _resized(_window(image, choose), [size, size])


def resize(image: tf.Tensor | Encoded, seed: tf.Tensor, size: int = 256) -> tf.Tensor:
    """Resizes (bilinear, antialiased) so that the shorter side has `size` pixels; the ratio of the sides stays."""
    del seed
    image = _window(image, lambda shape: tf.concat([[0, 0], shape], 0))
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    return _resized(image, tf.cast(tf.round(shape * (size / tf.reduce_min(shape))), tf.int32))


def center_crop(image: tf.Tensor | Encoded, seed: tf.Tensor, size: int = 224) -> tf.Tensor:
    """Takes the middle `size` × `size` pixels; of a smaller image, the middle square, enlarged to this size."""
    del seed

    def choose(shape):
        extent = tf.minimum(tf.reduce_min(shape), size)[None] * [1, 1]
        return tf.concat([(shape - extent) // 2, extent], 0)

    image = _window(image, choose)
    return tf.cond(
        tf.reduce_all(tf.shape(image)[:2] == size),
        lambda: tf.ensure_shape(image, [size, size, image.shape[2]]),
        lambda: _resized(image, [size, size]),
    )


def _window(image: tf.Tensor | Encoded, choose: ChooseWindow) -> tf.Tensor:
    if isinstance(image, Encoded):
        return to_float(image.window(choose))
    box = choose(tf.shape(image)[:2])
    window = tf.slice(image, [box[0], box[1], 0], [box[2], box[3], -1])
    return tf.ensure_shape(window, [None, None, image.shape[2]])


def _resized(image: tf.Tensor, shape) -> tf.Tensor:
    return tf.image.resize(image, shape, antialias=True)


# These accept an encoded image too, and decode only what they need of it.
WINDOW_OPERATIONS = (random_resized_crop, resize, center_crop)
OPERATIONS = {
    "crop": crop,
    "flip": flip,
    "affine": affine,
    "intensity": intensity,
    "cutout": cutout,
    "gaussian": gaussian,
    "random_resized_crop": random_resized_crop,
    "resize": resize,
    "center_crop": center_crop,
    "autoaugment_cifar": autoaugment.autoaugment_cifar,
    "autoaugment_imagenet": autoaugment.autoaugment_imagenet,
    "randaugment": autoaugment.randaugment,
}

# The parameters that may not be every finite number: name -> (test, what is expected).
BOUNDS = {
    "pad": (lambda v: v >= 0, "at least 0"),
    "last": (lambda v: v in (0, 1), "0 or 1"),
    "transparent": (lambda v: v in (0, 1), "0 or 1"),
    "size": (lambda v: v > 0, "above 0"),
    "smallest": (lambda v: 0 < v <= 1, "a share in (0, 1]"),
    "stretch": (lambda v: v >= 1, "at least 1"),
    "sigma": (lambda v: v >= 0, "at least 0"),
    "fill": (lambda v: -1 <= v <= 1, "a grey value in [-1, 1]"),
    "layers": (lambda v: v >= 1, "at least 1"),
    "magnitude": (lambda v: 0 <= v <= 10, "a level in [0, 10]"),
}


def validate(augment: ConfigDict) -> None:
    """Checks the group `augment` of the configuration.

    Raises:
      UserError: for a text that is no policy, and for values that are not allowed.
    """
    checks = {"views_of": one_of("standard", "original"), "num_views": at_least(1)}
    config_lib.check_values(augment, checks, "augment.")
    for name in ("standard", "strong", "evaluation"):
        parse_policy(augment[name], f"augment.{name}")


def parse_policy(text: str, key: str) -> Policy:
    """Makes a policy from its text, such as `crop(pad=4)|flip`.

    Args:
      text: operations with numbers as arguments, joined by `|`; empty for none.
      key: config key, for error messages.

    Returns:
      A function (image, seed) -> image; the image may still be encoded. The function raises UserError for an operation
      that needs images of one size where each has its own.

    Raises:
      UserError: for text that is no policy, an unknown operation or an argument that it does not take.
    """
    operations = _parse(text, key)

    def policy(image: tf.Tensor | Encoded, seed: tf.Tensor) -> tf.Tensor:
        for number, operation in enumerate(operations):
            if operation.func not in WINDOW_OPERATIONS:
                image = _decoded(image)
                if None in image.shape:
                    raise UserError(
                        f"{key}: {operation.func.__name__} needs images of one size, and here each has its own; put "
                        f"random_resized_crop(size) or resize(size)|center_crop(size) before it, or set data.image_size"
                    )
            image = operation(image, draws.fold(seed, number))
        return _decoded(image)

    return policy


def names(text: str) -> list[str]:
    """The operations of a policy, in order."""
    return [operation.func.__name__ for operation in _parse(text, "augment")]


def at_once(text: str) -> bool:
    """Whether a policy also takes many images `[n, H, W, C]`, with `draws.Places` as the seed."""
    return set(names(text)) <= {"gaussian"}


def _decoded(image: tf.Tensor | Encoded) -> tf.Tensor:
    return to_float(image.whole()) if isinstance(image, Encoded) else image


def _parse(text: str, key: str) -> list[Policy]:
    if not text.strip():
        return []
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise UserError(f"{key}: {text!r} is no policy, expected something like 'crop(pad=4)|flip'") from None
    nodes = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        nodes.insert(0, node.right)
        node = node.left
    return [_operation(part, text, key) for part in [node, *nodes]]


def _operation(node: ast.expr, text: str, key: str) -> Policy:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise UserError(f"{key}: {ast.unparse(node)!r} in {text!r} is no operation")
    name = call.func.id
    check_choice(key, name, OPERATIONS)
    try:
        values = [float(ast.literal_eval(value)) for value in call.args]
        keywords = {keyword.arg: float(ast.literal_eval(keyword.value)) for keyword in call.keywords}
        signature = inspect.signature(OPERATIONS[name])
        given = signature.bind(None, None, *values, **keywords).arguments
        types = {parameter: type(default.default) for parameter, default in signature.parameters.items()}
        parameters = {p: types[p](v) for p, v in given.items() if p not in ("image", "seed")}
    except (TypeError, ValueError) as error:
        known = [p for p in inspect.signature(OPERATIONS[name]).parameters if p not in ("image", "seed")]
        raise UserError(
            f"{key}: {ast.unparse(node)!r}: {error}; {name} takes numbers for {', '.join(known) or 'nothing'}"
        ) from None
    for parameter, value in parameters.items():
        test, expected = BOUNDS.get(parameter, (math.isfinite, "a number"))
        if not (math.isfinite(value) and test(value)):
            raise UserError(f"{key}: {ast.unparse(node)!r}: {parameter} is {value}, expected {expected}")
    return functools.partial(OPERATIONS[name], **parameters)
