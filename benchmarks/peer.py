"""What the peers in other frameworks share: the networks, the random choices, and how they answer requests.

A peer is a process that waits. A line `{"case": "ieg"}` on its standard input makes it take one step of that case and
answer with one line of JSON: `seconds`, `others` (see `bench.measure.sample`) and `loss`. With `"out": FILE` it writes
besides what the step found and left (`loss`, `weights`, `trust`, `params/…`, `batch_stats/…`) into an .npz file. It
starts from the arrays of a file that the benchmark writes: initial weights by their paths here, one batch, and for a
check the random choices of the mixup (`draw/…`), which it otherwise draws itself. Needs numpy and nothing of ieg_jax.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from benchmarks.bench import measure

# As configs/default.py has them, with the constant learning rate of `bench.programs`.
LEARNING_RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
META_RATE, TRUST = 0.1, 0.9  # of the lookahead; λ⁰
TEMPERATURE, UNLABELED, CONSISTENCY, SUPERVISED_SCALE, THRESHOLD = 0.5, 5.0, 20.0, 0.5, 1.0
EMA, NORM_MOMENTUM, NORM_EPSILON = 0.999, 0.9, 1e-5
CASES = ("supervised", "ieg")


class Layers(Protocol):
    """The layers of a framework, over images as it lays them out; each layer takes the parameters of its name."""

    def conv(self, x: Any, name: str, stride: int = 1) -> Any:
        """A convolution without biases, padded as SAME pads."""

    def norm(self, x: Any, name: str) -> Any:
        """Batch norm with the statistics of the batch."""

    def relu(self, x: Any) -> Any:
        """max(x, 0)."""

    def widened(self, x: Any, channels: int, stride: int) -> Any:
        """The mean over `stride` × `stride` pixels, and zeros on both sides up to so many channels."""

    def head(self, x: Any) -> Any:
        """The mean over all pixels, and the dense layer `head`."""


def wide_resnet(layers: Layers, x: Any, depth: int, width: float) -> Any:
    """WRN-`depth`-`width` in the form of IEG's authors: `ieg_jax.models.wide_resnet`."""

    def shortcut(x: Any, channels: int, last: int, stride: int) -> Any:
        return x if channels == last else layers.widened(x, channels, stride)

    widths = [round(usual * width) for usual in (16, 32, 64)]
    last = start = min(16, widths[0])
    x = first = layers.conv(x, "init_conv")
    for group, (channels, group_stride) in enumerate(zip(widths, (1, 2, 2), strict=True), start=1):
        group_input, group_channels = x, last
        for block in range((depth - 4) // 6):
            name, stride = f"group{group}_block{block}", group_stride if block == 0 else 1
            activated = layers.relu(layers.norm(x, f"{name}_norm1"))
            kept = shortcut(activated if name == "group1_block0" else x, channels, last, stride)
            y = layers.relu(layers.norm(layers.conv(activated, f"{name}_conv1", stride), f"{name}_norm2"))
            x, last = kept + layers.conv(y, f"{name}_conv2"), channels
        x = x + shortcut(group_input, channels, group_channels, group_stride)
    x = x + shortcut(first, last, start, 4)
    return layers.head(layers.relu(layers.norm(x, "final_norm")))


def resnet29(layers: Layers, x: Any) -> Any:
    """ResNet29 in the form of IEG's authors: `ieg_jax.models.resnet29`."""
    x = layers.relu(layers.norm(layers.conv(x, "init_conv"), "init_norm"))
    for stage, stage_stride in enumerate((1, 2, 2), start=1):
        for number in range(3):
            name, stride = f"stage{stage}_block{number}", stage_stride if number == 0 else 1
            y = x if name == "stage1_block0" else layers.norm(x, f"{name}_norm1")
            y = layers.relu(layers.norm(layers.conv(y, f"{name}_conv1", stride), f"{name}_norm2"))
            y = layers.relu(layers.norm(layers.conv(y, f"{name}_conv2"), f"{name}_norm3"))
            y = layers.conv(y, f"{name}_conv3")
            x = y + (layers.conv(x, f"{name}_shortcut", stride) if number == 0 else x)
    return layers.head(layers.relu(layers.norm(x, "final_norm")))


def network(layers: Layers, x: Any, keys: dict[str, Any]) -> Any:
    """The network of a group of keys `model.…`, on images: logits `[n, K]`."""
    if keys["model.name"] == "wide_resnet":
        return wide_resnet(layers, x, keys["model.depth"], keys["model.width"])
    return resnet29(layers, x)


def has(keys: dict[str, Any]) -> bool:
    """Whether the peers have the network of a group of keys."""
    return keys["model.name"] in ("wide_resnet", "resnet29_v2")


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and behind that SAME adds to an axis."""
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def ema_decay(step: int) -> float:
    """The decay of the moving average of the weights after update number `step`."""
    return min(EMA, (1 + step) / (10 + step))


def draws(arrays: dict[str, np.ndarray]) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A function that draws a mixup: places of the trusted images `[B]`, partners and coefficients `[3 B]`."""
    if "draw/partner" in arrays:
        fixed = tuple(arrays[f"draw/{name}"] for name in ("probe_index", "partner", "coefficient"))
        return lambda: fixed
    rng, size, trusted = np.random.default_rng(0), len(arrays["batch/label"]), len(arrays["batch/probe_label"])

    def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        share = np.square(rng.random(3 * size, np.float32)) / 2
        return rng.integers(0, trusted, size), rng.permutation(3 * size), np.maximum(share, 1 - share)

    return draw


def arguments(about: str) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Reads the command line of a peer: the arrays, the keys of the network, and how many cores it may use."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrays", required=True, help=".npz file, see benchmarks.bench.peers")
    parser.add_argument("--network", required=True, help="keys of the group model, as JSON")
    parser.add_argument("--threads", type=int, default=measure.cores())
    values = parser.parse_args()
    with np.load(values.arrays) as file:
        return dict(file), json.loads(values.network), values.threads


def serve(version: str, step: Callable[[str], float], found: Callable[[], dict[str, np.ndarray]]) -> None:
    """Answers requests until the input ends.

    Args:
      version: of the framework.
      step: takes one step of a case and returns its loss.
      found: what the last step found and left, by path.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        request, losses = json.loads(line), []
        answer = measure.sample(lambda: losses.append(step(request["case"])))  # noqa: B023 (called at once)
        if request.get("out"):
            np.savez(request["out"], loss=losses[0], **found())
        print(json.dumps(answer | {"loss": losses[0]}), file=answers, flush=True)
