"""The speed of EfficientNet-Lite0's features, beside eager PyTorch on the same processor, in turns.

    python -m benchmarks.embedding [--sizes=112,224] [--rounds=4]

Needs torch and timm (`pip install torch timm`) besides `ieg_jax[pretrained]`; timm's network has random weights, which
take as long as others. PyTorch has channels last, inference mode and as many threads as there are cores. Printed is the
time of each round and the ratio of the medians of all but the first.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from ieg_jax import cli
from ieg_jax.data.backbone import Backbone

IMAGES = 64


def ours(size: int) -> Callable[[], None]:
    """Features of IMAGES random images by the frozen backbone."""
    group = cli.load_config("configs/default.py").backbone
    group.name, group.image_size = "efficientnet_lite0", size
    backbone = Backbone(group)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3)).astype(np.uint8)
    return lambda: backbone.features(pixels)


def of_torch(size: int) -> Callable[[], None]:
    """The same by timm."""
    import timm
    import torch

    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(IMAGES, 3, size, size).to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            network(pixels)

    return run


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="112,224")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    for size in map(int, arguments.sizes.split(",")):
        functions, times = {"jax": ours(size), "torch": of_torch(size)}, {"jax": [], "torch": []}
        for _ in range(arguments.rounds):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - began)
        ratio = statistics.median(times["jax"][1:]) / statistics.median(times["torch"][1:])
        shown = "; ".join(f"{name} {' '.join(f'{t:.2f}' for t in found)} s" for name, found in times.items())
        print(f"{IMAGES} images of {size} pixels: {shown}; jax takes {ratio:.2f} times as long", flush=True)


if __name__ == "__main__":
    main()
