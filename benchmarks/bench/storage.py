"""Checkpoints, and images a second of an audit's predictions and of an embedding."""

import pathlib
import tempfile

import jax
import numpy as np

from benchmarks.bench import measure, programs
from benchmarks.bench.options import Options
from benchmarks.bench.steps import Rows
from ieg_jax import cli
from ieg_jax.data.backbone import Backbone
from ieg_jax.errors import UserError
from ieg_jax.runtime.checkpoints import Checkpoints

PREDICTED, EMBEDDED, PIXELS = 512, 64, 112  # images of a sample; pixels of a side


def measure_storage(options: Options) -> tuple[Rows, list[str]]:
    """Rows `checkpoint/<network>/<phase>`, `predict/<network>`, `embed/<network>`."""
    title = "tiny" if options.quick else "WRN-28-2"
    network = programs.NETWORKS[title]
    run = programs.build(programs.config_of("ieg", network, options.settings), network.size)
    options.say(f"checkpoint, predictions and embedding: {title}")
    state = run.init(jax.random.key(0))
    rows = checkpoint(title, (state, run.empty_window()), options)
    images = jax.device_put(np.zeros((PREDICTED, network.size, network.size, 3), np.float32))

    def predict():
        jax.block_until_ready(run.probabilities(state.params, state.batch_stats, images))

    taken = measure.interleaved({"predict": lambda: measure.sample(predict)}, options.few)["predict"]
    rows[f"predict/audit's predictions, {title}"] = measure.rate(taken, PREDICTED, "images/s")
    embedding, notes = embed(options)
    return rows | embedding, notes


def checkpoint(title: str, tree: object, options: Options) -> Rows:
    """Saves and restores the whole state of a run."""
    samples = {"the run waits": [], "until it is written": [], "restored": []}
    config = programs.config_of("ieg", programs.TINY, {}).checkpoint
    for _ in range(options.few + 1):
        with tempfile.TemporaryDirectory() as folder:
            kept = Checkpoints(pathlib.Path(folder) / "checkpoints", config)
            for phase, call in (
                ("the run waits", lambda: kept.save(1, tree, 0)),  # noqa: B023 (called at once)
                ("until it is written", kept.wait),
                ("restored", lambda: kept.restore_newest(tree, print)),  # noqa: B023
            ):
                samples[phase].append(measure.sample(call))
            kept.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
    return {
        f"checkpoint/{title}/{phase}": measure.row(taken[1:], megabytes=size / 1e6) for phase, taken in samples.items()
    }


def embed(options: Options) -> tuple[Rows, list[str]]:
    """Features of photographs by EfficientNet-Lite0 with its published weights."""
    group = cli.load_config("configs/default.py").backbone
    group.name, group.image_size = "efficientnet_lite0", PIXELS
    pixels = np.random.default_rng(0).integers(0, 256, (EMBEDDED, PIXELS, PIXELS, 3)).astype(np.uint8)
    try:
        backbone = Backbone(group)
        taken = measure.interleaved({"embed": lambda: measure.sample(lambda: backbone.features(pixels))}, options.few)[
            "embed"
        ]
    except UserError as error:
        return {}, [f"skipped: embedding ({error})"]
    return {f"embed/efficientnet_lite0, {PIXELS} pixels": measure.rate(taken, EMBEDDED, "images/s")}, []
