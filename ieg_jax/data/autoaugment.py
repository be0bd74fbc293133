"""AutoAugment and RandAugment: the primitive operations, what a level means to each, and how policies draw them.

The primitives work on uint8 `[H, W, C]`, C = 1 or 3, and give the same pixels as Pillow. The three policies at the end
take an image and a seed as `augment.py` describes them. A policy first rounds the image to 256 grey levels, which
changes nothing in an image that came as uint8. It then draws all it needs as one vector of uniform numbers, and looks
up its operations in a table. So its graph has one branch for each primitive, rather than one for each sub-policy, which
would be many more.

    Cubuk et al., AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019.
    Cubuk et al., RandAugment: Practical Automated Data Augmentation with a Reduced Search Space, 2020.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ieg_jax.lazy import tf

GREY = 128

# ---------------------------------------------------------------------------------------------------------------
# Grey levels: each pixel by itself
# ---------------------------------------------------------------------------------------------------------------


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 − v for each grey level v."""
    return 255 - image


def solarize(image: tf.Tensor, threshold: float | tf.Tensor) -> tf.Tensor:
    """255 − v where v >= `threshold` (0 … 256; 256 changes nothing), v elsewhere."""
    return tf.where(tf.cast(image, tf.float32) < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, addition: float | tf.Tensor) -> tf.Tensor:
    """Adds `addition` where v < 128, rounded down and clipped to [0, 255]. Pillow has no such operation."""
    return tf.where(image < 128, _to_uint8(tf.cast(image, tf.float32) + addition), image)


def posterize(image: tf.Tensor, bits: float | tf.Tensor) -> tf.Tensor:
    """Keeps the highest `bits` bits (a whole number, 0 … 8) of v and clears the rest; 0 leaves black."""
    cleared = tf.bitwise.left_shift(1, 8 - tf.cast(bits, tf.int32)) - 1
    return tf.bitwise.bitwise_and(image, tf.cast(255 - cleared, tf.uint8))


def brightness(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Blend of black and the image: factor · v, rounded down and clipped."""
    return _blend(0.0, tf.cast(image, tf.float32), factor)


# ---------------------------------------------------------------------------------------------------------------
# Grey levels: by the histogram of the image
# ---------------------------------------------------------------------------------------------------------------


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel linearly to 0 … 255; a constant channel stays.

    The result is s · v − s · low with s = 255 / (high − low), in float64, rounded down and clipped. Rounding errors may
    turn 255 into 254, as they do in Pillow.
    """
    values = tf.cast(image, tf.float64)
    low, high = tf.reduce_min(values, [0, 1]), tf.reduce_max(values, [0, 1])
    stretches = high > low
    scale = tf.where(stretches, 255.0 / (high - low), 1.0)
    offset = tf.where(stretches, -low * scale, 0.0)
    return _to_uint8(values * scale + offset)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes the histogram of each channel as flat as it can be.

    With n(v) the number of pixels below v, and step = ⌊n(highest v in the channel) / 255⌋:
    v → min(⌊(n(v) + ⌊step / 2⌋) / step⌋, 255). A channel with step = 0 stays.
    """
    channels = image.shape[2]
    place = tf.cast(image, tf.int32) + 256 * np.arange(channels, dtype=np.int32)
    histogram = tf.raw_ops.DenseBincount(
        input=tf.reshape(place, [-1]), size=256 * channels, weights=tf.constant([], tf.int32), binary_output=False
    )
    histogram = tf.reshape(histogram, [channels, 256])
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    step = tf.reduce_max(tf.where(histogram > 0, below, 0), axis=1, keepdims=True) // 255
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, table, np.arange(256, dtype=np.int32))
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), place)


def contrast(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Blend of the image with a constant, which is its mean luminance rounded to a whole number."""
    total = tf.cast(tf.reduce_sum(_luminance(image)), tf.float64)
    mean = tf.floor(total / (image.shape[0] * image.shape[1]) + 0.5)
    return _blend(tf.cast(mean, tf.float32), tf.cast(image, tf.float32), factor)


# ---------------------------------------------------------------------------------------------------------------
# Colours and neighbours
# ---------------------------------------------------------------------------------------------------------------


def color(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Blend of the luminance and the image: 0 makes it grey, 1 leaves it, more makes it colourful."""
    return _blend(tf.cast(_luminance(image), tf.float32), tf.cast(image, tf.float32), factor)


def sharpness(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Blend of the smoothed image and the image: 0 smooths, 1 leaves, more sharpens.

    Smoothing is the mean over 3×3 pixels, in which the middle one counts 5 times, rounded to the nearest; the
    pixels of the border stay.
    """
    values = tf.cast(image, tf.float32)
    rows = values[:-2] + values[1:-1] + values[2:]
    inner = values[1:-1, 1:-1]
    weighted = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4.0 * inner
    smooth = tf.floor(weighted / 13.0 + 0.5)
    return _blend(values + tf.pad(smooth - inner, [[1, 1], [1, 1], [0, 0]]), values, factor)


# ---------------------------------------------------------------------------------------------------------------
# Geometry: pixels that come from outside the image get the value `fill`
# ---------------------------------------------------------------------------------------------------------------


def rotate(image: tf.Tensor, degrees: float | tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Turns the image counterclockwise about its centre."""
    angle = tf.cast(degrees, tf.float64) * (math.pi / 180)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cos = tf.cos(angle) * np.array([[1.0, 0.0, 0.5 - x], [0.0, 1.0, 0.5 - y]])
    sin = tf.sin(angle) * np.array([[0.0, -1.0, y - 0.5], [1.0, 0.0, 0.5 - x]])
    return _nearest(image, cos + sin + np.array([[0.0, 0.0, x], [0.0, 0.0, y]]), fill)


def shear_x(image: tf.Tensor, shear: float | tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Takes each pixel at y below the upper edge from `shear` · y further right."""
    return _nearest(image, _IDENTITY + tf.cast(shear, tf.float64) * np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]), fill)


def shear_y(image: tf.Tensor, shear: float | tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Takes each pixel at x from the left edge from `shear` · x further down."""
    return _nearest(image, _IDENTITY + tf.cast(shear, tf.float64) * np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.5]]), fill)


def translate_x(image: tf.Tensor, pixels: float | tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Moves the image to the left by `pixels`."""
    return _nearest(image, _IDENTITY + tf.cast(pixels, tf.float64) * np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), fill)


def translate_y(image: tf.Tensor, pixels: float | tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Moves the image up by `pixels`."""
    return _nearest(image, _IDENTITY + tf.cast(pixels, tf.float64) * np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), fill)


def cutout(image: tf.Tensor, reach: float | tf.Tensor, centre: tf.Tensor, fill: int = 0) -> tf.Tensor:
    """Fills a square about `centre` = (row, column): from c − `reach` to c + `reach` − 1 in each direction."""
    from_centre = [tf.cast(tf.range(side) - centre[axis], tf.float32) for axis, side in enumerate(image.shape[:2])]
    rows, columns = ((offset >= -reach) & (offset < reach) for offset in from_centre)
    return tf.where((rows[:, None] & columns[None])[..., None], tf.cast(fill, tf.uint8), image)


# The matrix that leaves every pixel where it is: the middle of that in column x and row y is the point (x + ½, y + ½).
_IDENTITY = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])


def _nearest(image: tf.Tensor, matrix: tf.Tensor, fill: int) -> tf.Tensor:
    """Applies an affine map as `PIL.Image.transform` does with the nearest pixel, in its 16.16 fixed-point arithmetic.

    Args:
      image: `[H, W, C]` uint8.
      matrix: `[2, 3]` float64; the output pixel in column x and row y comes from the pixel in which the point
        matrix · (x, y, 1) lies.
      fill: 0 … 255, for points outside the image.
    """
    height, width, channels = image.shape
    grid = np.stack([*np.indices([height, width])[::-1], np.ones([height, width])]).reshape(3, -1)
    # All values are whole numbers far below 2⁵³, divided by 2¹⁶, so that float64 makes no rounding error.
    point = tf.floor(matrix * 65536.0 + 0.5) @ (grid / 65536.0)
    place = tf.cast(tf.floor(point), tf.int32)
    inside = tf.reduce_all((place >= 0) & (place < np.array([[width], [height]], np.int32)), axis=0)
    column, row = tf.unstack(place)
    outside = height * width  # the index of an extra pixel, which has the value `fill`
    pixels = tf.pad(tf.reshape(image, [-1, channels]), [[0, 1], [0, 0]], constant_values=tf.cast(fill, tf.uint8))
    return tf.reshape(tf.gather(pixels, tf.where(inside, row * width + column, outside)), image.shape)


def _blend(low: float | tf.Tensor, high: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Computes low + factor · (high − low) in float32, clipped to [0, 255] and rounded down to uint8."""
    return _to_uint8(low + factor * (high - low))


def _luminance(image: tf.Tensor) -> tf.Tensor:
    """0.299 R + 0.587 G + 0.114 B in 16-bit fixed point, `[H, W, 1]` int32; for a grey image, its values."""
    values = tf.cast(image, tf.int32)
    if image.shape[2] == 1:
        return values
    weighted = tf.reduce_sum(values * np.array([19595, 38470, 7471], np.int32), axis=2, keepdims=True)
    return tf.bitwise.right_shift(weighted + 32768, 16)


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


# ---------------------------------------------------------------------------------------------------------------
# What a level means
# ---------------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """The parameter of one operation at one level.

    Attributes:
      value: in the unit of the operation; 0 for an operation without a parameter.
      signed: whether the sign of the value is drawn, + or − with probability ½ each.
    """

    value: float = 0.0
    signed: bool = False


def cifar_parameters(level: float) -> dict[str, Parameter]:
    """Operation → parameter at `level`, 0 … 10, in the policy for CIFAR that AutoAugment's authors released."""
    return {
        "Invert": Parameter(),
        "AutoContrast": Parameter(),
        "Equalize": Parameter(),
        "Rotate": Parameter(3.0 * level, signed=True),  # degrees
        "ShearX": Parameter(0.03 * level, signed=True),  # pixels per pixel
        "ShearY": Parameter(0.03 * level, signed=True),
        "TranslateX": Parameter(level, signed=True),  # pixels
        "TranslateY": Parameter(level, signed=True),
        "Solarize": Parameter(256 - 256 * level // 10),  # threshold: 256 at level 0, 0 at level 10
        "Posterize": Parameter(4 - 4 * level // 10),  # bits: 4 at level 0, none at level 10
        "Color": Parameter(0.1 + 0.18 * level),  # factor; 1, which changes nothing, is level 5
        "Contrast": Parameter(0.1 + 0.18 * level),
        "Brightness": Parameter(0.1 + 0.18 * level),
        "Sharpness": Parameter(0.1 + 0.18 * level),
        "Cutout": Parameter(level),  # half the side, pixels
    }


def imagenet_parameters(level: float, translate_pixels: float = 250.0) -> dict[str, Parameter]:
    """Operation → parameter at `level`, 0 … 10, in the policy `imagenet_v0`.

    With this policy EfficientNet was trained on TPUs. Solarize and posterize grow weaker with the level here.
    `translate_pixels` is the shift at level 10. EfficientNet's own operations round in other places than Pillow's, and
    its shears also shift the image by half the shear, in pixels.
    """
    return {
        "Invert": Parameter(),
        "AutoContrast": Parameter(),
        "Equalize": Parameter(),
        "Rotate": Parameter(3.0 * level, signed=True),  # degrees
        "ShearX": Parameter(0.03 * level, signed=True),  # pixels per pixel
        "ShearY": Parameter(0.03 * level, signed=True),
        "TranslateY": Parameter(translate_pixels * level / 10, signed=True),  # pixels
        "Solarize": Parameter(256 * level // 10),  # threshold: 0 at level 0, 256 at level 10
        "SolarizeAdd": Parameter(110 * level // 10),  # grey levels
        # The number of bits that are kept. At levels 0 to 2 the formula gives 0, for which EfficientNet shifts the
        # pixels by 8 bits. TensorFlow shifts uint8 by 7 bits at most, so one bit is kept in fact.
        "Posterize": Parameter(max(1, 4 * level // 10)),
        "Color": Parameter(0.1 + 0.18 * level),  # factor
    }


def randaugment_parameters(magnitude: float, height: int, width: int) -> dict[str, Parameter]:
    """Operation → parameter at `magnitude`, 0 … 10: the paper's 14 operations, with the ranges of AutoAugment, Table 6.

    The table does not say at which end of its range an operation is strongest; here solarize and posterize grow
    stronger with the magnitude. Its largest translation is 150 pixels, in images of 331 pixels: 0.45 of the side.
    """
    return {
        "Identity": Parameter(),
        "AutoContrast": Parameter(),
        "Equalize": Parameter(),
        "Rotate": Parameter(3.0 * magnitude, signed=True),  # degrees
        "ShearX": Parameter(0.03 * magnitude, signed=True),  # pixels per pixel
        "ShearY": Parameter(0.03 * magnitude, signed=True),
        "TranslateX": Parameter(round(0.045 * magnitude * width), signed=True),  # pixels
        "TranslateY": Parameter(round(0.045 * magnitude * height), signed=True),
        "Solarize": Parameter(256 - 25.6 * magnitude),  # threshold: 256 at 0, 0 at 10
        "Posterize": Parameter(8 - round(0.4 * magnitude)),  # bits: 8 at 0, 4 at 10
        "Color": Parameter(0.1 + 0.18 * magnitude),  # factor; 1, which changes nothing, is magnitude 5
        "Contrast": Parameter(0.1 + 0.18 * magnitude),
        "Brightness": Parameter(0.1 + 0.18 * magnitude),
        "Sharpness": Parameter(0.1 + 0.18 * magnitude),
    }


# name → function of (image, value, centre, fill); pixels that come from outside the image get the value `fill`.
PRIMITIVES: dict[str, Callable[..., tf.Tensor]] = {
    "Identity": lambda image, value, centre, fill: image,
    "Invert": lambda image, value, centre, fill: invert(image),
    "AutoContrast": lambda image, value, centre, fill: autocontrast(image),
    "Equalize": lambda image, value, centre, fill: equalize(image),
    "Rotate": lambda image, value, centre, fill: rotate(image, value, fill),
    "ShearX": lambda image, value, centre, fill: shear_x(image, value, fill),
    "ShearY": lambda image, value, centre, fill: shear_y(image, value, fill),
    "TranslateX": lambda image, value, centre, fill: translate_x(image, value, fill),
    "TranslateY": lambda image, value, centre, fill: translate_y(image, value, fill),
    "Solarize": lambda image, value, centre, fill: solarize(image, value),
    "SolarizeAdd": lambda image, value, centre, fill: solarize_add(image, value),
    "Posterize": lambda image, value, centre, fill: posterize(image, value),
    "Color": lambda image, value, centre, fill: color(image, value),
    "Contrast": lambda image, value, centre, fill: contrast(image, value),
    "Brightness": lambda image, value, centre, fill: brightness(image, value),
    "Sharpness": lambda image, value, centre, fill: sharpness(image, value),
    "Cutout": lambda image, value, centre, fill: cutout(image, value, centre, GREY),
}

GEOMETRY = ("Identity", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")  # these move whatever a pixel has
OPAQUE = ("Invert", "AutoContrast", "Equalize", "Solarize", "Posterize")  # by Pillow these work on colours alone

# ---------------------------------------------------------------------------------------------------------------
# Policies
# ---------------------------------------------------------------------------------------------------------------

# name → sub-policies, each a list of (operation, probability, level).
SUB_POLICIES = json.loads(pathlib.Path(__file__).with_name("autoaugment_policies.json").read_text())


class Drawn(NamedTuple):
    """What a policy does to one image: L operations, one after the other.

    Attributes:
      operations: `[L]` int32, indices in the policy's list of operations; its length means that nothing is done.
      values: `[L]` float32, the parameters of the operations, with their signs.
      centres: `[L, 2]` float32 in [0, 1): the centre of `Cutout`, as shares of height and width.
    """

    operations: tf.Tensor
    values: tf.Tensor
    centres: tf.Tensor


def autoaugment_cifar(image: tf.Tensor, seed: tf.Tensor, fill: float = -1.0, transparent: int = 0) -> tf.Tensor:
    """Applies one of the 95 sub-policies for CIFAR, drawn anew for each image.

    Pixels that come from outside the image get the value `fill`, by default black. With `transparent=1`, as in the
    code that AutoAugment's authors released, they are black and transparent, until one of OPAQUE makes an opaque image
    of it, and what is still transparent at the end becomes grey: there is some in 12.8 % of the images.
    """
    drawn = draw_sub_policy(seed, SUB_POLICIES["cifar"], cifar_parameters)
    return _apply(image, drawn, list(cifar_parameters(0)), round((fill + 1) * 127.5), bool(transparent))


def autoaugment_imagenet(image: tf.Tensor, seed: tf.Tensor, translate_pixels: float = 250.0) -> tf.Tensor:
    """Applies one of the 25 sub-policies for ImageNet, drawn anew for each image; pixels from outside become grey.

    One sub-policy moves the image by nine tenths of `translate_pixels`. With the 250 pixels of EfficientNet nothing of
    an image of 224 pixels or less is left, so set a lower value for such images.
    """
    parameters = functools.partial(imagenet_parameters, translate_pixels=translate_pixels)
    drawn = draw_sub_policy(seed, SUB_POLICIES["imagenet_v0"], parameters)
    return _apply(image, drawn, list(parameters(0)), GREY)


def randaugment(image: tf.Tensor, seed: tf.Tensor, layers: int = 2, magnitude: float = 10.0) -> tf.Tensor:
    """Applies `layers` operations, each one of 14 with the same probability, all at `magnitude`, 0 … 10.

    Pixels that come from outside the image become grey.
    """
    parameters = randaugment_parameters(magnitude, *image.shape[:2])
    return _apply(image, draw_operations(seed, layers, parameters), list(parameters), GREY)


def draw_sub_policy(seed: tf.Tensor, sub_policies: list, parameters: Callable[[float], dict]) -> Drawn:
    """Draws a sub-policy, then which of its operations are applied, and their signs.

    Args:
      seed: `[2]` int64.
      sub_policies: S lists of L triples (operation, probability, level).
      parameters: level → {operation: Parameter}.
    """
    names = list(parameters(0))
    rows = [[(names.index(n), p, *parameters(level)[n]) for n, p, level in sub_policy] for sub_policy in sub_policies]
    table = np.array(rows, np.float32).swapaxes(1, 2)  # [S, 4, L]: index, probability, value and signed
    which, apply, sign, *centre = tf.unstack(tf.random.stateless_uniform([5, table.shape[2]], seed))
    place, probability, value, signed = tf.unstack(tf.gather(table, tf.cast(which[0] * len(table), tf.int32)))
    operations = tf.cast(tf.where(apply < probability, place, len(names)), tf.int32)
    return Drawn(operations, _with_sign(value, signed, sign), tf.stack(centre, axis=1))


def draw_operations(seed: tf.Tensor, layers: int, parameters: dict[str, Parameter]) -> Drawn:
    """Draws `layers` operations from those in `parameters`, any of them more than once, and their signs."""
    which, sign, *centre = tf.unstack(tf.random.stateless_uniform([4, layers], seed))
    operations = tf.cast(which * len(parameters), tf.int32)
    table = np.array(list(parameters.values()), np.float32)
    value, signed = tf.unstack(tf.gather(table, operations), axis=1)
    return Drawn(operations, _with_sign(value, signed, sign), tf.stack(centre, axis=1))


def _with_sign(value: tf.Tensor, signed: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    return tf.where(u < 0.5 * signed, -value, value)


def _apply(image: tf.Tensor, drawn: Drawn, names: list[str], fill: int, transparent: bool = False) -> tf.Tensor:
    """Applies the drawn operations, out of those in `names`, in 256 grey levels; the result is float32 in [-1, 1].

    With `transparent` one more channel says what is inside: 255, and 0 for pixels that came from outside, black ones.
    """
    pixels = tf.cast(tf.round((image + 1.0) * 127.5), tf.uint8)
    if transparent:
        pixels = tf.concat([pixels, tf.fill([*image.shape[:2], 1], tf.constant(255, tf.uint8))], -1)
    centres = tf.cast(drawn.centres * np.array(image.shape[:2], np.float32), tf.int32)
    branches = [_branch(name, tuple(pixels.shape), fill, transparent) for name in [*names, "Identity"]]
    for operation, *inputs in zip(*map(tf.unstack, (drawn.operations, drawn.values, centres)), strict=True):
        # This is one kernel, which calls one function. With tf.switch_case the executor visits every node of every
        # branch, which takes longer than the operations themselves.
        [pixels] = tf.raw_ops.StatelessCase(
            branch_index=operation, input=[pixels, *inputs], Tout=[tf.uint8], branches=branches
        )
    result = tf.cast(pixels, tf.float32) / 127.5 - 1.0
    if transparent:
        result = tf.where(pixels[..., -1:] > 0, result[..., :-1], 0.0)
    return tf.ensure_shape(result, image.shape)


@functools.lru_cache
def _branch(name: str, shape: tuple[int, ...], fill: int, transparent: bool) -> Callable[..., tf.Tensor]:
    """A primitive as a TensorFlow function of (image, value, centre), traced once for images of one shape."""
    primitive = functools.partial(PRIMITIVES[name], fill=fill)

    def with_inside(image, value, centre):
        if name in GEOMETRY:
            return PRIMITIVES[name](image, value, centre, 0)
        inside = tf.fill([*shape[:2], 1], tf.constant(255, tf.uint8)) if name in OPAQUE else image[..., -1:]
        return tf.concat([primitive(image[..., :-1], value, centre), inside], -1)

    image, value, centre = tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([], tf.float32), tf.TensorSpec([2], tf.int32)
    with tf.init_scope():
        function = tf.function(with_inside if transparent else primitive, autograph=False)
        return function.get_concrete_function(image, value, centre)
