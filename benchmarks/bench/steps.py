"""Seconds, operations and memory of a train step: methods, networks, and the same in other frameworks, in turns."""

import contextlib
import gc
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.bench import measure, peers, programs
from benchmarks.bench.options import IMPORTANT, Options
from benchmarks.bench.programs import Network, Step

MATRIX, CONVOLUTION = 2048, (64, 32, 64)  # rows and columns; images, pixels of a side, channels
LARGE_ROUNDS = 2  # of ResNet-50

Rows = dict[str, measure.Row]


def measure_networks(options: Options) -> tuple[Rows, list[str]]:
    """The important methods on each network, with the peers where these have it.

    Returns:
      Rows `step/<network>/<method>`, `…/matrix product`, `…/convolution` and `…/<method>, <framework>`; and a sentence
      for each peer that is not there.
    """
    titles = options.networks or (("WRN-10-1",) if options.quick else ("WRN-28-2", "ResNet29", "ResNet-50"))
    rows, notes = {}, []
    for title in titles:
        network = programs.NETWORKS[title]
        large = network is programs.RESNET50
        found, absent = measure_network(
            network, options, min(options.rounds, LARGE_ROUNDS) if large else options.rounds
        )
        rows |= found
        notes += [note for note in absent if note not in notes]
        gc.collect()
    return rows, notes


def measure_network(network: Network, options: Options, rounds: int) -> tuple[Rows, list[str]]:
    """The same of one network."""
    names = [name for name in (("supervised", "ieg") if options.quick else IMPORTANT) if name in options.methods]
    has_peers = "peers" in options.parts and peers.has(network)
    if has_peers:
        names = [name for name in names if "steps" in options.parts or name in ("supervised", "ieg")]
    where = f"step/{network.title}"
    with contextlib.ExitStack() as stack:
        steps = {name: _begun(name, network, options) for name in names}
        calls = {f"{where}/{name}": step.sample for name, step in steps.items()}
        others, notes = {}, []
        if has_peers and "ieg" in steps:
            others, notes = peers.start(stack, network, steps["ieg"], peers.interpreters(options.torch_python))
        bases = {}
        for framework, peer in others.items():
            for name in ("supervised", "ieg"):
                if name in steps:
                    bases[f"{where}/{name}, {framework}"] = f"{where}/{name}"
                    calls[f"{where}/{name}, {framework}"] = lambda peer=peer, name=name: peer.step(name)
        ceilings = {f"{where}/{name}": ceiling for name, ceiling in ceilings_here().items()}
        calls |= {name: call for name, (call, _) in ceilings.items()}
        options.say(f"{network.title}: {rounds} rounds of {', '.join(name.split('/')[-1] for name in calls)}")
        taken = measure.interleaved(calls, rounds)
        versions = {framework: peer.version for framework, peer in others.items()}
    rows = {}
    for name, samples in taken.items():
        method = name.split("/")[-1]
        if method in steps:
            facts = steps[method].facts | {"base": f"{where}/supervised"}
        elif name in bases:
            framework = name.split(", ")[-1]
            facts = {"base": bases[name], "version": versions[framework]}
        else:
            facts = {"gflop": ceilings[name][1]}
        rows[name] = measure.row(samples, batch=network.batch, **facts)
    return rows, notes


def _begun(name: str, network: Network, options: Options) -> Step:
    options.say(f"{network.title}, {name}: compiling")
    step = programs.step_of(name, network, options.settings)
    step.begin()
    return step


def measure_methods(options: Options) -> tuple[Rows, list[str]]:
    """Every method on the small network: rows `method/<name>`. Each is compiled, measured and let go by itself."""
    network = programs.TINY if options.quick else programs.SMALL
    names = ("supervised", "l2r") if options.quick else options.methods
    names = sorted(names, key=lambda name: name != "supervised")
    rows = {}
    for name in names:
        step = _begun(name, network, options)
        taken = measure.interleaved({name: step.sample}, options.few)[name]
        facts = {"batch": network.batch, "network": network.title, "base": "method/supervised"} | step.facts
        rows[f"method/{name}"] = measure.row(taken, **facts)
        del step
        gc.collect()
    return rows, []


def ceilings_here() -> dict[str, tuple[Callable[[], dict[str, float | None]], float]]:
    """A matrix product and a convolution in float32: name -> function that takes a sample, GFLOP."""
    matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    images, side, channels = CONVOLUTION
    image = jax.random.normal(jax.random.key(1), (images, side, side, channels))
    kernel = jax.random.normal(jax.random.key(2), (3, 3, channels, channels))

    @jax.jit
    def product(a, b):
        return jnp.dot(a, b, precision="highest")

    @jax.jit
    def convolution(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def sampled(function, *arguments):
        return lambda: measure.sample(lambda: jax.block_until_ready(function(*arguments)))

    return {
        "matrix product": (sampled(product, matrix, matrix), 2 * MATRIX**3 / 1e9),
        # Places at the border have fewer neighbours; XLA does not count those either.
        "convolution": (
            sampled(convolution, image, kernel),
            2 * images * (3 * side - 2) ** 2 * channels**2 / 1e9,
        ),
    }
