"""The convolution with three roles against lax, by oneDNN and without it."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from jax import lax
from runs import ROOT
from small_step import make, make_batch

from configs import default
from ieg_jax import models
from ieg_jax.errors import UserError
from ieg_jax.models import convolution, onednn
from ieg_jax.models.layers import DepthwiseConv
from ieg_jax.models.onednn import INPUT_GRADIENT, KERNEL_GRADIENT, OUTPUT, TARGET
from ieg_jax.models.wide_resnet import WideResNet

here = pytest.mark.skipif(bool(onednn.missing()), reason=f"oneDNN: {onednn.missing()}")

CASES = {  # images, kernel, stride, padding, groups
    "3x3": ((3, 8, 8, 4), (3, 3, 4, 16), 1, "SAME", 1),
    "3x3 of an odd size, stride 2": ((2, 9, 7, 8), (3, 3, 8, 16), 2, "SAME", 1),
    "3x3 of an even size, stride 2": ((2, 8, 6, 8), (3, 3, 8, 5), 2, "SAME", 1),
    "3x3 without padding": ((2, 7, 6, 3), (3, 3, 3, 8), 1, "VALID", 1),
    "colours": ((4, 8, 8, 3), (3, 3, 3, 16), 1, "SAME", 1),
    "1x1": ((2, 5, 7, 8), (1, 1, 8, 24), 1, "SAME", 1),
    "1x1, stride 2": ((2, 7, 7, 8), (1, 1, 8, 16), 2, "SAME", 1),
    "7x7, stride 2": ((2, 15, 14, 3), (7, 7, 3, 8), 2, ((3, 3), (3, 3)), 1),
    "asymmetric padding": ((2, 9, 8, 4), (3, 5, 4, 8), 1, ((2, 0), (1, 4)), 1),
    "patches": ((2, 8, 8, 3), (4, 4, 3, 8), 4, "VALID", 1),
    "one channel, one feature": ((2, 6, 6, 1), (3, 3, 1, 1), 1, "SAME", 1),
    "rows without pixels of their own": ((2, 5, 5, 2), (2, 2, 2, 3), 3, "VALID", 1),
    "depthwise": ((2, 7, 8, 6), (3, 3, 1, 6), 1, "SAME", 6),
    "depthwise 5x5, stride 2": ((2, 9, 8, 16), (5, 5, 1, 16), 2, "SAME", 16),
    "depthwise 7x7": ((1, 7, 7, 8), (7, 7, 1, 8), 1, ((3, 3), (3, 3)), 8),
}


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def by_lax(x, w, strides, padding, groups=1):
    """The reference, written with lax alone."""
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def pair(name):
    """Images and kernel; the convolution as one operation, and as lax's."""
    images, kernel, stride, padding, groups = CASES[name]
    forms = (
        functools.partial(form, strides=(stride, stride), padding=padding, groups=groups)
        for form in (convolution.convolve, by_lax)
    )
    return (*draw(images, kernel), *forms)


def gradient(f):
    return jax.grad(lambda x, w: (f(x, w) ** 3).mean(), (0, 1))


def second(f):
    """A gradient through both gradients, as the meta-gradient is."""
    return jax.grad(lambda x, w: sum((part**2).sum() for part in gradient(f)(x, w)), (0, 1))


def assert_close(got, expected, tolerance=3e-6):
    """Every array within a few roundings of its largest number."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(), 1e-6))


def calls(function, *arguments):
    """How often a compiled program calls oneDNN."""
    return jax.jit(function).lower(*arguments).compile().as_text().count(f'custom_call_target="{TARGET}"')


@here
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_two_orders_are_those_of_lax(name):
    x, w, ours, theirs = pair(name)

    def everything(f):
        return jax.jit(lambda x, w: (f(x, w), gradient(f)(x, w), second(f)(x, w)))

    assert calls(ours, x, w) == 1 and calls(theirs, x, w) == 0
    assert_close(everything(ours)(x, w), everything(theirs)(x, w))


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_lax_for_each_role(name):
    """Without oneDNN: the roles, written out for depthwise ones too, against jax's own derivatives of lax."""
    x, w, _, theirs = pair(name)
    y, back = jax.vjp(theirs, x, w)
    (z,) = draw(y.shape, seed=1)
    expected = y, *back(z)
    _, _, stride, padding, groups = CASES[name]
    geometry = {"strides": (stride, stride), "pads": convolution._pads(x, w, (stride, stride), padding)}
    operands = {OUTPUT: (x, w), INPUT_GRADIENT: (z, w), KERNEL_GRADIENT: (x, z)}
    for form in (None, convolution.written_out) if groups > 1 else (None,):
        for role, (a, b) in operands.items():
            shape = expected[role].shape
            got = convolution.definition(a, b, role=role, shape=shape, groups=groups, of=form, **geometry)
            assert_close(got, expected[role])


@here
def test_it_is_counted_as_lax_is():
    """XLA counts lax's form before it optimises; the rest of the two programs is the same."""
    for name in CASES:
        x, w, ours, theirs = pair(name)
        for of in (lambda f: f, gradient, second):
            ours_, theirs_ = (jax.jit(of(form)).lower(x, w) for form in (ours, theirs))
            assert TARGET in ours_.as_text()
            assert convolution.flops(ours_) == pytest.approx(theirs_.cost_analysis()["flops"], abs=0.5), name


@here
def test_it_can_be_transformed():
    x, w, ours, theirs = pair("3x3")
    w = w[..., :4]  # as many channels out as in

    def scanned(f):
        def loss(x, w):
            def block(x, scale):
                return jnp.tanh(f(x, 0.1 * scale * w)), None

            return lax.scan(block, x, jnp.arange(1.0, 4.0))[0].sum()

        return jax.grad(loss, (0, 1))

    def recomputed(f):
        def loss(x, w):
            for _ in range(2):
                x = jax.checkpoint(lambda x: jnp.tanh(f(x, 0.1 * w)))(x)
            return x.sum()

        return jax.grad(loss, (0, 1))

    def linear(f):
        return lambda x, w: jax.jvp(lambda x: f(x, w), (x,), (x**2,))

    for of in (scanned, recomputed, linear):
        assert calls(of(ours), x, w) > 0
        assert_close(jax.jit(of(ours))(x, w), jax.jit(of(theirs))(x, w))
    assert_close(ours(x, w), theirs(x, w))  # without jit


@here
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 3)])
@pytest.mark.parametrize("size", [2, convolution.UNROLLED + 1])
def test_it_can_be_mapped(axes, size):
    """Networks side by side, images of each, and both orders of gradient and map."""
    _, _, ours, theirs = pair("3x3")
    images, kernel = CASES["3x3"][:2]
    shapes = [
        shape if axis is None else (*shape[:axis], size, *shape[axis:])
        for shape, axis in zip((images, kernel), axes, strict=True)
    ]
    x, w = draw(*shapes)
    for of in (
        lambda f: jax.vmap(f, axes),
        lambda f: jax.vmap(gradient(f), axes),
        lambda f: gradient(jax.vmap(f, axes)),
        lambda f: second(jax.vmap(f, axes)),
    ):
        assert calls(of(ours), x, w) > 0
        assert_close(jax.jit(of(ours))(x, w), jax.jit(of(theirs))(x, w))


@here
def test_several_devices_and_exported_programs_have_lax():
    x, w, ours, theirs = pair("3x3")
    x = jnp.concatenate([x] * 2)[:4]
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.device_put(x, split), jax.device_put(w, whole)
    assert calls(gradient(ours), *arguments) == 0
    assert_close(jax.jit(gradient(ours))(*arguments), jax.jit(gradient(theirs))(x, w))
    exported = jax.export.export(jax.jit(gradient(ours)), platforms=("cpu", "tpu", "cuda"))(x, w)
    assert TARGET not in exported.mlir_module()
    assert_close(exported.call(x, w), jax.jit(gradient(theirs))(x, w))


@here
@pytest.mark.parametrize("form", convolution.FORMS)
def test_a_program_for_batches_of_any_size_has_lax(form):
    """As `ieg_jax.export` makes it: its number of images is a symbol, which no threshold can be compared with."""
    network = nn.Conv(16, (3, 3), conv_general_dilated=convolution.of_form(form))
    x = draw((64, 16, 16, 16))[0]
    variables = network.init(jax.random.key(0), x)
    assert (calls(lambda x: network.apply(variables, x), x) == 0) == (form == "lax"), "large enough for oneDNN"
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda x: network.apply(variables, x)))(images)
    for count in (1, 64):
        assert_close(exported.call(x[:count]), network.apply(variables, x[:count]))


@here
def test_each_thread_gets_its_own_numbers():
    """XLA calls from whichever of its threads is free, and so may two programs at once."""
    names = ["7x7, stride 2", "1x1, stride 2", "3x3", "depthwise 5x5, stride 2"]
    programs = [(jax.jit(second(ours)), x, w) for x, w, ours, _ in map(pair, names)]
    expected = [jax.jit(second(theirs))(x, w) for x, w, _, theirs in map(pair, names)]

    def run(number):
        function, x, w = programs[number]
        return jax.block_until_ready(function(x, w))

    with ThreadPoolExecutor(4) as threads:
        order = [number % len(names) for number in range(80)]
        for number, got in zip(order, threads.map(run, order), strict=True):
            assert_close(got, expected[number])


@here
def test_where_there_are_many_cores_one_thread_calls(monkeypatch):
    x, w, ours, theirs = pair("3x3")
    callers = set()

    def spy(convolution, *places):
        callers.add(onednn.threading.current_thread().name)
        return called(convolution, *places)

    called = onednn._Convolution.__call__
    monkeypatch.setattr(onednn._Convolution, "__call__", spy)
    with ThreadPoolExecutor(1, "the one") as caller:
        monkeypatch.setattr(onednn, "_caller", caller)
        assert_close(jax.jit(second(ours))(x, w), jax.jit(second(theirs))(x, w))
    assert callers == {"the one_0"}


@here
def test_an_error_of_onednn_is_an_error_of_the_program(monkeypatch):
    x, w, ours, _ = pair("3x3 without padding")

    def refuse(*_):
        raise RuntimeError("status 3 of oneDNN")

    monkeypatch.setattr(onednn._Convolution, "__call__", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="status 3 of oneDNN"):
        jax.block_until_ready(jax.jit(ours)(x, w))


STEP = """
import hashlib, sys
import jax, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from ieg_jax.models import convolution, onednn
if sys.argv[2] == "absent":
    onednn.missing = lambda: "it is not here"
rng = np.random.default_rng(0)
x, w = rng.standard_normal((8, 16, 16, 16), np.float32), rng.standard_normal((3, 3, 16, 32), np.float32)
loss = lambda x, w: (convolution.of_form("onednn")(
    x, w, (1, 1), "SAME", dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, w.shape, convolution.DIMENSIONS)
) ** 3).mean()
both = jax.jit(jax.grad(loss, (0, 1)))
parts = [np.asarray(part) for _ in range(3) for part in both(x, w)]
assert all((one == other).all() for one, other in zip(parts, parts[2:]))
print(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
print(onednn.TARGET in both.lower(x, w).compile().as_text())
"""


def in_a_process(cache, library="there", threads="2"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "XLA_FLAGS": ""}
    ran = subprocess.run(
        [sys.executable, "-c", STEP, str(cache), library], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


LEAVE = """
import sys
import jax, jax.numpy as jnp
from ieg_jax import cli
from ieg_jax.errors import UserError
from ieg_jax.models import convolution, onednn

def main(argv):
    x, w = jnp.ones((32, 32, 32, 32)), jnp.full((3, 3, 32, 32), 1e-3)

    def program(x):
        for _ in range(40):
            x = convolution.convolve(x, w, (1, 1), "SAME") @ jnp.eye(32)  # with the products it is no quick program
        return x

    program = jax.jit(program)
    program(x).block_until_ready()
    y = program(x)
    print(y.is_ready())
    raise {"error": UserError, "defect": KeyError}[sys.argv[1]]("in between")

assert not onednn.missing()
cli.run(main, positional=None)
"""


@here
@pytest.mark.parametrize("kind, said", [("error", "error: in between"), ("defect", "KeyError: 'in between'")])
def test_a_process_ends_while_a_program_runs(kind, said):
    """XLA waits for its threads at the end, and Python lets none in."""
    ran = subprocess.run(
        [sys.executable, "-c", LEAVE, kind], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.stdout.split(), ran.returncode) == (["False"], 1), ran.stderr
    assert said in ran.stderr


@here
def test_another_process_gives_the_same_bits_and_no_kept_program_needs_what_is_absent(tmp_path):
    first = in_a_process(tmp_path)
    kept = set(tmp_path.rglob("*"))
    assert first[1] == "True" and in_a_process(tmp_path) == first, "from the cache"
    assert set(tmp_path.rglob("*-cache")) <= kept, "nothing was compiled anew"
    without = in_a_process(tmp_path, "absent")
    assert without[1] == "False" and without[0] != first[0]


class File:
    """One of a package's files."""

    def __init__(self, path):
        self.name, self.locate = path.name, lambda: path


class Package:
    def __init__(self, *files):
        self.files = files


def installed(what, folder):
    """What `metadata.distribution` does where the package is damaged, another one, or not there."""
    library = folder / "libdnnl.so.3"
    library.write_bytes(b"\x7fELF, and not much of it")

    def distribution(name):
        assert name == onednn.PACKAGE
        if what == "nothing":
            raise onednn.metadata.PackageNotFoundError(name)
        return Package(File(library)) if what == "a damaged library" else Package()

    return distribution


@pytest.mark.parametrize(
    "what, reason",
    [
        ("nothing", r"^onednn-cpu-gomp is not installed; pip install 'ieg_jax\[cpu\]'$"),
        ("no library", r"^onednn-cpu-gomp has no libdnnl.so.3$"),
        ("a damaged library", r"^onednn-cpu-gomp cannot be used: OSError: .*libdnnl.so.3"),
    ],
)
def test_what_is_missing_is_said_and_lax_computes(what, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn.metadata, "distribution", installed(what, tmp_path))
    monkeypatch.setattr(onednn, "missing", onednn.missing.__wrapped__)  # without what it remembers
    before = os.environ.get("OMP_WAIT_POLICY")
    with pytest.raises(UserError, match="model.convolutions=onednn: " + reason[1:].removesuffix("$")):
        models.validate(group(convolutions="onednn"))
    assert os.environ.get("OMP_WAIT_POLICY") == before
    models.validate(group())
    network, images = models.create(group(), 3), jnp.ones((4, 16, 16, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    assert calls(functools.partial(network.apply, train=False), variables, images) == 0
    x, w, ours, theirs = pair("3x3")  # a program that was traced when it was there
    assert calls(ours, x, w) == 0
    assert_close(jax.jit(ours)(x, w), theirs(x, w))


def group(**keys):
    model = default.get_config().model
    model.update({"width": 4.0, **keys})
    return model


@here
@pytest.mark.parametrize(
    "keys, batch, expected",
    [
        ({}, 4, True),
        ({}, 1, False),  # too small to be worth a call
        ({"convolutions": "onednn"}, 1, True),
        ({"convolutions": "lax"}, 4, False),
        ({"dtype": "bfloat16"}, 4, False),
        ({"name": "mlp", "depth": 1, "width": 0.1, "convolutions": "onednn"}, 4, False),
    ],
)
def test_what_a_configuration_means(keys, batch, expected):
    models.validate(group(**keys))
    network, images = models.create(group(**keys), 3), jnp.ones((batch, 8, 8, 3))
    variables = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)
    program = jax.jit(functools.partial(network.apply, train=False)).lower(variables, images).as_text()
    assert (TARGET in program) == expected


@here
def test_float64_is_lax():
    with x64():
        x, w = jnp.ones((4, 32, 32, 32), jnp.float64), jnp.ones((3, 3, 1, 32), jnp.float64)
        assert not convolution._suits("onednn", x, w, (1, 1), "SAME")
        with pytest.raises(UserError, match="model.convolutions=onednn is for model.dtype=float32, got float64"):
            models.validate(group(dtype="float64", convolutions="onednn"))


def test_the_parameters_are_the_same():
    images = jnp.ones((2, 8, 8, 3))
    trees = [
        WideResNet(num_classes=3, depth=10, width=0.5, convolutions=form).init(jax.random.key(0), images, train=False)
        for form in convolution.FORMS
    ]
    for other in trees[1:]:
        assert jax.tree.structure(other) == jax.tree.structure(trees[0])
        jax.tree.map(np.testing.assert_array_equal, other, trees[0])


@here
def test_a_depthwise_layer_is_the_same_with_it():
    (x,) = draw((2, 9, 8, 6))
    layers = [DepthwiseConv((5, 5), 2, use_bias=True, convolutions=form) for form in ("lax", "onednn")]
    variables = layers[0].init(jax.random.key(0), x)
    assert [calls(layer.apply, variables, x) for layer in layers] == [0, 1]
    assert_close(layers[1].apply(variables, x), layers[0].apply(variables, x))


@here
@pytest.mark.parametrize("method", ["ieg", "co_teaching"])
def test_a_whole_step_is_the_same_but_for_rounding(method):
    """With the meta-gradient, and with networks side by side."""
    after = {}
    for form in ("lax", "onednn"):
        _, _, state, step = make(method, **{"model.convolutions": form})
        compiled = jax.jit(step).lower(state, make_batch(), jax.random.key(1)).compile()
        assert (TARGET in compiled.as_text()) == (form == "onednn")
        after[form], _ = compiled(state, make_batch(), jax.random.key(1))
    change = jax.tree.map(jnp.subtract, after["lax"].params, state.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(change)) > 1e-3
    assert_close(after["onednn"].params, after["lax"].params, 1e-5)
    assert_close(after["onednn"].batch_stats, after["lax"].batch_stats, 1e-5)
