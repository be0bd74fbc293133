"""How fast the input pipeline is, and what a step waits for it."""

import dataclasses
import itertools
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.bench import measure, programs
from benchmarks.bench.options import Options
from benchmarks.bench.steps import Rows
from ieg_jax import methods
from ieg_jax.data import examination
from ieg_jax.data.batches import train_batches
from ieg_jax.data.load import load_data
from ieg_jax.runtime import mesh

# Augmentation: (name, standard, strong, method). "plain" is what any trainer does.
CIFAR = (
    ("plain", "flip", "", "supervised"),
    ("crop and flip", "crop(pad=2)|flip", "", "supervised"),
    ("AutoAugment, for ieg", "crop(pad=2)|flip", "autoaugment_cifar|crop(pad=4,fill=0)|flip|cutout(0.5)", "ieg"),
)
PHOTOS = (
    ("plain", "resize(256)|center_crop(224)|flip", "", "supervised"),
    ("random-resized crop and flip", "random_resized_crop(224)|flip", "", "supervised"),
    (
        "AutoAugment, for ieg",
        "random_resized_crop(224)|flip",
        "autoaugment_imagenet(translate_pixels=100)|crop(pad=28,fill=0)|flip|cutout(0.5)",
        "ieg",
    ),
)
FEATURES = (
    ("plain", "", "", "supervised"),
    ("gaussian", "gaussian(0.1)", "", "supervised"),
    ("gaussian, for ieg", "gaussian(0.1)", "gaussian(0.3)", "ieg"),
)
SECONDS, STEPS = 3.0, 12  # of one sample; steps that are timed


def measure_pipeline(options: Options) -> tuple[Rows, list[str]]:
    """Images of 32 pixels and features in memory, and JPEG files.

    Returns:
      Rows `pipeline/<data>/<augmentation>`, in images (views and trusted ones too) a second and core; and
      `pipeline/waited, <network>/<augmentation>`, the share of a step that waits for the next batch.
    """
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        small = write_small(folder)
        sets = [
            ("32×32×3 in memory", CIFAR, small, 64),
            ("1,280 features in memory", FEATURES, write_features(folder), 256),
        ]
        if not options.quick:
            sets.append(("JPEG 256×384 to 224×224", PHOTOS, write_photos(folder), 8))
        for title, policies, data, batch in sets:
            for name, standard, strong, method in policies:
                options.say(f"pipeline: {title}, {name}")
                rows[f"pipeline/{title}/{name}"] = speed(
                    configuration(data, standard, strong, method, batch), options
                ) | {"base": f"pipeline/{title}/plain"}
        network = dataclasses.replace(programs.TINY, size=32, batch=64) if options.quick else programs.SMALL
        for name, standard, strong, method in CIFAR[1:]:
            options.say(f"pipeline: a step of {method} waits for it")
            rows[f"pipeline/waited, {network.title}/{name}"] = waited(
                configuration(small, standard, strong, method, network.batch), network, options
            )
    return rows, []


def configuration(data: dict[str, str], standard: str, strong: str, method: str, batch: int) -> Any:
    """The configuration of a run on some data with some augmentation."""
    network = programs.SMALL
    config = programs.config_of(method, network, {})
    config.data.update(data)
    config.trusted.source, config.batch_size, config.trusted.batch_size = "separate", batch, batch
    config.augment.standard, config.augment.strong = standard, strong
    return config


def speed(config: Any, options: Options) -> measure.Row:
    """Images a second and core, of the pipeline alone."""
    data, streams, found = load_data(config), methods.get(config.method.name).streams, []

    def run():
        found.append(examination.throughput(config, data, streams, seconds=1.0 if options.quick else SECONDS))

    taken = [measure.sample(run) for _ in range(options.few)]
    images = found[0]["images_per_example"]
    return {
        "unit": "images/s/core",
        "samples": [one["examples_per_cpu_second"] * images for one in found],
        "others": [one["others"] for one in taken],
        "examples_per_second": statistics.median(one["examples_per_second"] for one in found),
    }


def waited(config: Any, network: programs.Network, options: Options) -> measure.Row:
    """The share of each step of a run, in percent, that waits for the next batch."""
    data = load_data(config)
    step = programs.step_of(config.method.name, network, options.settings, examples=len(data.train))
    step.begin()
    place = mesh.create(config).batch
    shares, steps = [], 4 if options.quick else STEPS
    batches = itertools.islice(train_batches(config, data, step.run.method.streams, 0, 10**6, place), steps + 2)

    def run():
        while True:
            began = time.perf_counter()
            step.batch = next(batches, None)
            if step.batch is None:
                return
            ready = time.perf_counter()
            step()
            shares.append(100 * (ready - began) / (time.perf_counter() - began))

    others = measure.sample(run)["others"]
    return {"unit": "% waited", "samples": shares[2:], "others": [others] * steps}  # the first fill buffers


def write_small(folder: pathlib.Path) -> dict[str, str]:
    """5,000 random images like CIFAR's, as an .npz file."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(5000) % 10
    path = folder / "small.npz"
    np.savez(path, images=images, labels=labels, trusted_images=images[:100], trusted_labels=labels[:100])
    return {"name": "arrays", "train": str(path)}


def write_features(folder: pathlib.Path) -> dict[str, str]:
    """5,000 rows of random numbers, as many as EfficientNet-Lite0 makes of an image, as an .npz file."""
    features = np.random.default_rng(0).normal(size=(5000, 1280)).astype(np.float16)
    labels = np.arange(5000) % 10
    path = folder / "features.npz"
    np.savez(path, features=features, labels=labels, trusted_features=features[:100], trusted_labels=labels[:100])
    return {"name": "features", "train": str(path)}


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
