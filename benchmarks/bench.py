"""What a step of each method costs beside a supervised one, and how fast the data come: `make bench`.

FLOPs are XLA's count of the compiled step and the same everywhere. Times are of this machine; the ratios are
measured side by side in one run, round-robin, and the fastest round of each counts.
"""

import functools
import pathlib
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image

from configs import default
from ieg_jax import methods, models
from ieg_jax.data import examination
from ieg_jax.data.load import load_data
from ieg_jax.methods import base
from ieg_jax.methods.parts import optimizers
from ieg_jax.models import convolution
from ieg_jax.train.step import create_state, train_step

LEAST = {"supervised": 3 / 3, "trusted_only": 3 / 3, "l2r": 10 / 3, "ieg": 22 / 3}
ROUNDS = 5


def compiled_step(method_name: str, size: int, width: float, batch: int = 64, model: str = "wide_resnet"):
    """A compiled train step on colour images (wide_resnet: WRN-10-`width`), its state and a batch of random numbers."""
    config = default.get_config()
    config.method.name, config.batch_size, config.model.width = method_name, batch, width
    config.model.name = model
    network = models.create(config.model, 10)
    context = base.Context(FrozenConfigDict(config), network, optimizers.create(config.optimizer), 10)
    method = methods.get(method_name).bind(context)
    state = create_state(context, method, jax.random.key(0), (size, size, 3), 1)
    rng = np.random.default_rng(0)
    images = {"image": (batch,), "views": (batch, 1), "probe_image": (batch,)}
    data = {k: jnp.asarray(rng.uniform(-1, 1, (*n, size, size, 3)), jnp.float32) for k, n in images.items()}
    labels = ("label", "clean_label", "id", "probe_label")
    data |= {k: jnp.asarray(rng.integers(0, 10, batch), jnp.int32) for k in labels}
    step = functools.partial(train_step, context=context, method=method, schedule=optax.constant_schedule(0.01))
    run = jax.jit(step).lower(state, data, jax.random.key(0)).compile()
    return run, (state, data, jax.random.key(0))


def bench_steps(console: Console) -> None:
    """FLOPs and times of each method's step."""
    table = Table(title="one train step, WRN-10-2, 32×32×3, batch 64, float32")
    for heading in ("method", "GFLOP", "× supervised", "least possible", "ms", "× supervised"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    programs = {name: compiled_step(name, 32, 2.0) for name in LEAST}
    flops = {name: convolution.flops(run) for name, (run, _) in programs.items()}
    seconds = dict.fromkeys(LEAST, float("inf"))
    for round_number in range(ROUNDS + 1):
        for name, (run, arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if round_number:  # the first is for warming up
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    for name in LEAST:
        table.add_row(
            name,
            f"{flops[name] / 1e9:.1f}",
            f"{flops[name] / flops['supervised']:.2f}",
            f"{LEAST[name]:.2f}",
            f"{seconds[name] * 1e3:.0f}",
            f"{seconds[name] / seconds['supervised']:.1f}",
        )
    console.print(table)


# Augmentation of one example for one method: (standard, strong, method). "plain" is what any trainer does.
CIFAR = {
    "decode and flip": ("flip", "", "supervised"),
    "standard view": ("crop(pad=2)|flip", "", "supervised"),
    "AutoAugment, for ieg": (
        "crop(pad=2)|flip",
        "autoaugment_cifar|crop(pad=4,fill=0)|flip|cutout(0.5)",
        "ieg",
    ),
}
PHOTOS = {
    "decode and flip": ("resize(256)|center_crop(224)|flip", "", "supervised"),
    "standard view": ("random_resized_crop(224)|flip", "", "supervised"),
    "AutoAugment, for ieg": (
        "random_resized_crop(224)|flip",
        "autoaugment_imagenet(translate_pixels=100)|crop(pad=28,fill=0)|flip|cutout(0.5)",
        "ieg",
    ),
}


def bench_data(console: Console, folder: pathlib.Path) -> None:
    """Examples a second from the pipeline alone, and how much of a step on this machine that is."""
    photo_step = seconds_of("supervised", 224, 8, "resnet50")
    # To compile ResNet-50's ieg step takes minutes here; by its FLOPs it is this many times the supervised one.
    photo_steps = {"supervised": photo_step, "ieg": photo_step * LEAST["ieg"]}
    small_steps = {name: seconds_of(name, 32, 64, "wide_resnet") for name in ("supervised", "ieg")}
    for title, policies, data, steps_of, batch in (
        ("32×32×3 images in memory, batch 64; step of WRN-10-2", CIFAR, write_small(folder), small_steps, 64),
        (
            "JPEG files of 256×384 pixels, batch 8, 224×224; step of ResNet-50",
            PHOTOS,
            write_photos(folder),
            photo_steps,
            8,
        ),
    ):
        table = Table(title=f"data pipeline: {title}")
        for heading in (
            "augmentation",
            "examples/s",
            "per core",
            "ms per batch",
            "× plain",
            "of a step",
        ):
            table.add_column(heading, justify="left" if heading == "augmentation" else "right")
        plain = None
        for name, (standard, strong, method) in policies.items():
            config = default.get_config()
            config.data.update(data)
            config.trusted.source = "separate"
            config.batch_size, config.method.name = batch, method
            config.augment.standard, config.augment.strong = standard, strong
            speed = examination.throughput(
                config, load_data(config), methods.get(config.method.name).streams, seconds=6.0
            )
            cost = 1 / speed["examples_per_cpu_second"]
            plain = plain or cost
            step = steps_of.get(method)
            table.add_row(
                name,
                f"{speed['examples_per_second']:,.0f}",
                f"{speed['examples_per_cpu_second']:,.0f}",
                f"{1e3 * batch / speed['examples_per_second']:.1f}",
                f"{cost / plain:.1f}",
                f"{batch / speed['examples_per_second'] / step:.1%}" if step else "",
            )
        console.print(table)


def seconds_of(method_name: str, size: int, batch: int, model: str) -> float:
    """The fastest of three steps."""
    run, arguments = compiled_step(method_name, size, 2.0 if model == "wide_resnet" else 1.0, batch, model)
    fastest = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def write_small(folder: pathlib.Path) -> dict[str, str]:
    """5,000 random images like CIFAR's, as an .npz."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(5000) % 10
    path = folder / "small.npz"
    np.savez(path, images=images, labels=labels, trusted_images=images[:100], trusted_labels=labels[:100])
    return {"name": "arrays", "train": str(path)}


def write_photos(folder: pathlib.Path) -> dict[str, str]:
    """400 JPEG files cut from scikit-learn's two photographs, and 20 trusted ones."""
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    for part, count in (("photos", 200), ("checked", 10)):
        for label, photo in enumerate(photos):
            for number in range(count):
                left, top = rng.integers(0, 640 - 384), rng.integers(0, 427 - 256)
                path = folder / part / str(label) / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                photo.crop((left, top, left + 384, top + 256)).save(path, quality=92)
    return {"name": "image_folder", "train": str(folder / "photos"), "trusted": str(folder / "checked")}


if __name__ == "__main__":
    terminal = Console()
    terminal.print(f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    bench_steps(terminal)
    with tempfile.TemporaryDirectory() as temporary:
        bench_data(terminal, pathlib.Path(temporary))
