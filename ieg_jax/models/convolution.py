"""Convolutions of images, which oneDNN computes on a processor, in about half the time that XLA takes.

A convolution y = x ∗ w is bilinear, and with any number ⟨z, x ∗ w⟩ made of it come two more operations: the gradient
with respect to x, of z and w, and the gradient with respect to w, of x and z. The derivative of each of the three with
respect to either operand is one of them again. So they are one operation with three roles, closed under
differentiation, and the meta-gradient, a gradient through a gradient, needs no fourth.

`lax` defines the operation, and computes it wherever oneDNN does not: on other platforms, in programs for several
devices, which XLA could not divide, and in exported ones.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ieg_jax.models import onednn
from ieg_jax.models.onednn import INPUT_GRADIENT, KERNEL_GRADIENT, OUTPUT

FORMS = ("auto", "lax", "onednn")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# With `auto` one of fewer operations is XLA's: to call oneDNN takes 0.03 to 0.2 ms, about as long as these. One with a
# kernel for each channel takes XLA longer for its operations.
SMALLEST, SMALLEST_DEPTHWISE = 8e6, 2e6
UNROLLED = 8  # at most so many convolutions stand side by side in a program for one that `vmap` maps

Pads = tuple[tuple[int, int], tuple[int, int]]


def of_form(form: str) -> Callable[..., jax.Array] | None:
    """What `nn.Conv` takes as its `conv_general_dilated`.

    Args:
      form: one of FORMS. lax: lax's; auto: oneDNN's where it can be had and where it is faster; onednn: where it can be
        had. It can in programs for one processor, for float32.
    """
    return None if form == "lax" else functools.partial(_conv_general_dilated, form)


def _conv_general_dilated(
    form: str, x, w, window_strides, padding, *, dimension_numbers, feature_group_count=1, **others
):
    """`lax.conv_general_dilated` as `nn.Conv` calls it.

    Args:
      form: one of FORMS.
      x: images `[n, H, W, C]`.
      w: kernel `[h, w, C / feature_group_count, D]`.
      window_strides: along both axes.
      padding: a name or a pair for each axis, as lax takes it.
      dimension_numbers: `DIMENSIONS`, else it is lax's.
      feature_group_count: 1 or C, else it is lax's.
      **others: lax's other arguments.

    Returns:
      `[n, H', W', D]`.
    """
    dilations = [others.get(name) or (1, 1) for name in ("lhs_dilation", "rhs_dilation")]
    plain = (
        x.ndim == 4
        and x.dtype == w.dtype
        and dimension_numbers == lax.conv_dimension_numbers(x.shape, w.shape, DIMENSIONS)
        and all(tuple(dilation) == (1, 1) for dilation in dilations)
        and feature_group_count in (1, x.shape[-1])
    )
    if plain and _suits(form, x, w, window_strides, padding):
        return convolve(x, w, window_strides, padding, feature_group_count)
    return lax.conv_general_dilated(
        x, w, window_strides, padding,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, **others,
    )  # fmt: skip


def convolve(x: jax.Array, w: jax.Array, strides: Sequence[int], padding, groups: int = 1) -> jax.Array:
    """The convolution y = x ∗ w, as the operation with three roles.

    Args:
      x: images `[n, H, W, C]`.
      w: kernel `[h, w, C / groups, D]`, of the same type.
      strides: along both axes.
      padding: a name or a pair for each axis, as lax takes it.
      groups: 1, or C for a kernel for each channel.

    Returns:
      `[n, H', W', D]`.
    """
    strides, pads = tuple(map(int, strides)), _pads(x, w, strides, padding)
    shape = _shape(x, w, strides, pads)
    return _p.bind(x, w, role=OUTPUT, shape=shape, strides=strides, pads=pads, groups=groups)


def depthwise(x: jax.Array, w: jax.Array, strides: Sequence[int], padding, form: str) -> jax.Array:
    """The convolution of each channel with a kernel of its own.

    Args:
      x: images `[n, H, W, C]`.
      w: kernel `[h, w, 1, C]`, of the same type.
      strides: along both axes.
      padding: a name or a pair for each axis, as lax takes it.
      form: one of FORMS.

    Returns:
      `[n, H', W', C]`.
    """
    if _suits(form, x, w, strides, padding):
        return convolve(x, w, strides, padding, x.shape[-1])
    geometry = {"strides": tuple(strides), "pads": _pads(x, w, strides, padding), "groups": x.shape[-1]}
    by_sum, by_lax = (functools.partial(function, **geometry) for function in (written_out, _by_lax))
    return lax.platform_dependent(x, w, cpu=by_sum, default=by_lax)


def _suits(form: str, x: jax.Array, w: jax.Array, strides: Sequence[int], padding) -> bool:
    """Whether a convolution is left to oneDNN, should its program be for one processor."""
    if form == "lax" or x.dtype != jnp.float32 or jax.default_backend() != "cpu" or onednn.missing():
        return False
    if not all(isinstance(side, int) for side in (*x.shape, *w.shape)):  # exported for batches of any size
        return False
    if form == "onednn":
        return True
    pads = _pads(x, w, strides, padding)
    y = _shape(x, w, strides, pads)
    smallest = SMALLEST if w.shape[2] == x.shape[-1] else SMALLEST_DEPTHWISE
    return _flops(x.shape, w.shape, y, strides, [low for low, _ in pads]) >= smallest


def _pads(x: jax.Array, w: jax.Array, strides: Sequence[int], padding) -> Pads:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, padding)
    return tuple((int(low), int(high)) for low, high in padding)


def _shape(x: jax.Array, w: jax.Array, strides: Sequence[int], pads: Pads) -> tuple[int, ...]:
    sides = [
        (side + low + high - k) // stride + 1
        for side, k, stride, (low, high) in zip(x.shape[1:3], w.shape[:2], strides, pads, strict=True)
    ]
    return (x.shape[0], *sides, w.shape[-1])


def definition(a: jax.Array, b: jax.Array, *, role: int, shape, strides, pads: Pads, groups: int, of=None) -> jax.Array:
    """What the operation computes, in terms of lax.

    Args:
      a: x `[n, H, W, C]`; as INPUT_GRADIENT y `[n, H', W', D]`.
      b: the kernel `[h, w, C / groups, D]`; as KERNEL_GRADIENT y.
      role: OUTPUT, INPUT_GRADIENT or KERNEL_GRADIENT.
      shape: of the result.
      strides: along both axes.
      pads: zeros before and after the images, along both axes.
      groups: of the channels.
      of: the function for OUTPUT, of x and the kernel and these arguments; by default lax's convolution.

    Returns:
      y, the gradient with respect to x, or that with respect to the kernel; in the type of a.
    """
    output = functools.partial(of or _by_lax, strides=strides, pads=pads, groups=groups)
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    if role == OUTPUT:
        return output(a, b)
    if role == INPUT_GRADIENT:
        return jax.linear_transpose(lambda x: output(x, b), result)(a)[0]
    return jax.linear_transpose(lambda w: output(a, w), result)(b)[0]


def _by_lax(x, w, *, strides, pads, groups):
    return lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=DIMENSIONS, feature_group_count=groups)


def written_out(x: jax.Array, w: jax.Array, *, strides, pads: Pads, groups: int = 0) -> jax.Array:
    """The convolution of each channel with a kernel of its own, as a sum over the places of the kernel.

    XLA's convolution for processors takes up to a hundred times as long for these as for others of the same work. The
    sum, h·w shifted images times as many numbers per channel, becomes one loop: 2 to 40 times faster, and the same but
    for rounding.

    Args:
      x: images `[n, H, W, C]`.
      w: kernel `[h, w, 1, C]`.
      strides: along both axes.
      pads: zeros before and after the images, along both axes.
      groups: C, and is not read.

    Returns:
      `[n, H', W', C]`.
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    last = [(side - k) // step * step for side, k, step in zip(x.shape[1:3], w.shape[:2], strides, strict=True)]
    return sum(
        lax.slice(
            x, (0, i, j, 0), (x.shape[0], i + last[0] + 1, j + last[1] + 1, x.shape[3]), (1, *strides, 1)
        )
        * w[i, j, 0]
        for i in range(w.shape[0])
        for j in range(w.shape[1])
    )  # fmt: skip


def flops(program: jax.stages.Lowered | jax.stages.Compiled) -> float:
    """The operations of a program, as XLA counts them; 0 where it does not.

    XLA counts nothing for what it only calls. oneDNN's convolutions are counted here as it counts its own: a product
    and its addition are two, and products with the zeros of the padding none. What is in a loop counts once.
    """
    counted = (program.cost_analysis() or {}).get("flops", 0.0)
    if not counted or jax.default_backend() != "cpu" or onednn.missing():
        return counted
    for line in program.as_text().splitlines():
        if onednn.TARGET in line and (found := re.search(r'convolution = "(\[.*?\])"', line)):
            counted += 1 + _flops(*json.loads(found[1])[1:6])  # XLA's count of a call is -1
    return counted


def _flops(x, w, y, strides, low) -> int:
    """Those of the three roles alike, by the shapes of images, kernel and output."""
    pairs = [  # of a pixel and a place of the kernel that meet
        sum(
            0 <= out * strides[axis] + k - low[axis] < x[1 + axis] for out in range(y[1 + axis]) for k in range(w[axis])
        )
        for axis in (0, 1)
    ]
    return 2 * x[0] * pairs[0] * pairs[1] * w[2] * w[3]


# ---- The operation. Its operands by role, and its result last:
_NAMES = {OUTPUT: ("x", "w", "y"), INPUT_GRADIENT: ("y", "w", "x"), KERNEL_GRADIENT: ("x", "y", "w")}
_p = Primitive("image_convolution")
_p.def_abstract_eval(lambda a, b, *, shape, **_: ShapedArray(shape, a.dtype))
_p.def_impl(jax.jit(_p.bind, static_argnames=("role", "shape", "strides", "pads", "groups")))


def _derivative(which: int, ct, a, b, *, role, shape, **geometry):
    """Of ⟨ct, result⟩ with respect to operand `which`: the role whose result this is, of the other operand and ct."""
    *names, result = _NAMES[role]
    values = {names[1 - which]: (a, b)[1 - which], result: ct}
    wanted, unknown = names[which], (a, b)[which]
    new = next(number for number, roles in _NAMES.items() if roles[2] == wanted)
    first, second = (values[name] for name in _NAMES[new][:2])
    return _p.bind(first, second, role=new, shape=unknown.aval.shape, **geometry)


ad.defbilinear(_p, functools.partial(_derivative, 0), functools.partial(_derivative, 1))


def _mapped(operands, axes, *, role, shape, **geometry):
    """`vmap`: over images alone it is a larger batch; networks side by side have a convolution each."""
    mapped = [axis is not None for axis in axes]
    a, b = (
        jnp.moveaxis(operand, axis, 0) if is_mapped else operand
        for operand, axis, is_mapped in zip(operands, axes, mapped, strict=True)
    )
    size = a.shape[0] if mapped[0] else b.shape[0]
    if role != KERNEL_GRADIENT and mapped == [True, False]:
        images = a.reshape(-1, *a.shape[2:])
        result = _p.bind(images, b, role=role, shape=(size * shape[0], *shape[1:]), **geometry)
        return result.reshape(size, *shape), 0

    def one(i):
        parts = (whole[i] if is_mapped else whole for whole, is_mapped in zip((a, b), mapped, strict=True))
        return _p.bind(*parts, role=role, shape=shape, **geometry)

    return (lax.map(one, jnp.arange(size)) if size > UNROLLED else jnp.stack([one(i) for i in range(size)])), 0


batching.primitive_batchers[_p] = _mapped


def _by_xla(a, b, **params):
    """The definition, as it is fast on a processor."""
    return definition(a, b, **params, of=written_out if params["groups"] > 1 else None)


def _lowered_for_cpu(context, a, b, **params):
    module = context.module_context
    axes = module.axis_context
    devices = axes.mesh.size if hasattr(axes, "mesh") else getattr(axes, "num_devices", 0)
    if devices != 1 or module.lowering_parameters.for_export or onednn.missing():
        return mlir.lower_fun(_by_xla, multiple_results=False)(context, a, b, **params)
    role, shape = params["role"], params["shape"]
    shapes = dict(zip(_NAMES[role], (*(aval.shape for aval in context.avals_in), shape), strict=True))
    attribute = onednn.attribute(
        role, *(shapes[name] for name in "xwy"), params["strides"], params["pads"], params["groups"]
    )
    return jax.ffi.ffi_lowering(onednn.TARGET)(context, a, b, convolution=attribute)


mlir.register_lowering(_p, mlir.lower_fun(definition, multiple_results=False))
mlir.register_lowering(_p, _lowered_for_cpu, platform="cpu")
