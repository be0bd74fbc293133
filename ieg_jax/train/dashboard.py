"""What TensorBoard shows of a run besides its scalars: charts in groups, hyperparameters, and suspicious examples.

The tab Custom Scalars has the charts of `layout`; HParams the columns of HYPERPARAMETERS beside the measures, one row
for each run; Images what `suspects` draws. All of it goes through CLU's writer into the same event files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars

from ieg_jax.data.splits import UNKNOWN, Split
from ieg_jax.lazy import hparams, metric_writers
from ieg_jax.train import metrics

# The columns of HParams: the keys in which experiments usually differ. config.json has all.
HYPERPARAMETERS = (
    "method.name", "model.name", "data.name", "noise.kind", "noise.rate", "trusted.per_class", "seed", "batch_size",
    "schedule.base_lr", "method.unlabeled_weight", "method.consistency_weight", "method.threshold",
)  # fmt: skip
# Group -> chart -> the metrics in it, each a name or the beginning of names (…/). EVALUATION is test or held_out.
EVALUATION = "EVALUATION"
CHARTS = {
    "Accuracy": {
        "evaluation: averaged and raw weights": (f"{EVALUATION}/accuracy", f"{EVALUATION}/accuracy_raw"),
        "evaluation: mean over the classes": (f"{EVALUATION}/balanced_accuracy", f"{EVALUATION}/balanced_accuracy_raw"),
        "training batches: given and true labels": ("train/accuracy", "train/accuracy_true_label"),
        "trusted examples": ("trusted/accuracy", "trusted/accuracy_raw"),
    },
    "Wrong labels": {
        "ω of examples with right and wrong labels": ("weight/clean", "weight/noisy"),
        "batches whose ω are all 0": ("weight/all_zero",),
        "λ of examples with right and wrong labels": ("trust/clean", "trust/noisy"),
        "ω as a detector of right labels: area under the ROC curve": ("weight/auroc",),
    },
    "Loss": {
        "total": ("loss/total",),
        "terms": ("loss/",),
        "trusted examples, one update ahead": ("loss/trusted_after_lookahead",),
    },
    "Optimizer": {
        "learning rate": ("optimizer/learning_rate",),
        "norms": ("optimizer/gradient_norm", "optimizer/update_norm"),
    },
    "Speed": {"images per second": ("speed/images_per_second",), "seconds of a step": ("time/",)},
}
# Only where true labels are known.
OF_TRUE_LABELS = (
    "weight/clean", "weight/noisy", "weight/auroc", "trust/clean", "trust/noisy", "train/accuracy_true_label",
)  # fmt: skip
COLUMNS = 4  # examples side by side; four of these tiles are as wide as TensorBoard shows an image
TILE, GAP, TEXT = 80, 6, 13  # pixels of a tile's side, between tiles, of a line of text
RIGHT, WRONG, PAPER = (0, 0, 0), (190, 0, 0), (255, 255, 255)


def begin(
    writer: metric_writers.MetricWriter, config: ConfigDict, logged: Iterable[str], evaluation: str, truth: bool
) -> None:
    """Writes hyperparameters and layout, at the start of a run.

    Args:
      writer: of CLU.
      config: of the run.
      logged: names of the metrics that are averaged over steps (`metrics.Window`).
      evaluation: what accuracy is measured on, test or held_out.
      truth: whether there are training examples whose true label is known.
    """
    writer.write_hparams(flatten_dict(config.to_dict(), sep="."))
    columns = hparams.hparams_config_pb(
        hparams=[hparams.HParam(name) for name in HYPERPARAMETERS],
        metrics=[hparams.Metric(f"{evaluation}/accuracy"), hparams.Metric("weight/auroc")],
    )
    for value in columns.value:
        writer.write_summaries(0, {value.tag: np.array(b"")}, {value.tag: value.metadata})
    described = SummaryMetadata.FromString(custom_scalars.create_summary_metadata().SerializeToString())
    groups = layout(logged, evaluation, truth).SerializeToString()
    tag = custom_scalars.CONFIG_SUMMARY_TAG
    writer.write_summaries(0, {tag: np.array(groups, object)}, {tag: described})


def layout(logged: Iterable[str], evaluation: str, truth: bool) -> layout_pb2.Layout:
    """The charts of the tab Custom Scalars: those of CHARTS for which a run has metrics. Arguments as of `begin`."""
    logged = set(logged)
    kinds = ("accuracy", "accuracy_raw", "balanced_accuracy", "balanced_accuracy_raw")
    logged |= {f"{name}/{kind}" for name in (evaluation, "trusted") for kind in kinds}
    logged |= {"speed/images_per_second", "time/compute"}
    if "weight/clean" in logged:
        logged.add("weight/auroc")
    if not truth:
        logged -= set(OF_TRUE_LABELS)
    categories = []
    for group, charts in CHARTS.items():
        shown = []
        for title, names in charts.items():
            names = [name.replace(EVALUATION, evaluation) for name in names]
            found = [name for name in names if any(one.startswith(name) for one in logged)]
            patterns = [f"^{name}" if name.endswith("/") else f"^{name}$" for name in found]
            if found:
                shown.append(layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=patterns)))
        if shown:
            categories.append(layout_pb2.Category(title=group, chart=shown))
    return layout_pb2.Layout(category=categories)


def suspects(window: metrics.Window, train: Split, class_names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """A picture of the examples of the last steps whose labels are the most doubtful.

    These are the ones to whose given label the pseudo label g gives the least probability; where a method has no pseudo
    labels, those with the least ω. Above each its given label, red where it is known to be wrong; below it the class
    that g gives the most probability and λ, or ω · B. The pixels are those of the data, without augmentation.

    Args:
      window: on the host (`jax.device_get`), with examples.
      train: the training set.
      class_names: `[K]`.
      count: examples, at most; one that occurred several times counts with its last.

    Returns:
      "suspects" -> `[H, W, 3]` uint8, for CLU's `write_images`; nothing for a count of 0, or for features.
    """
    examples = metrics.window_examples(window)
    if not count or not len(examples.ids) or not train.is_visible:
        return {}
    by_pseudo_label = examples.label_probability is not None
    score = examples.label_probability if by_pseudo_label else examples.weights
    last = len(score) - 1 - np.unique(examples.ids[::-1], return_index=True)[1]
    chosen = last[np.argsort(score[last], kind="stable")][:count]
    order = np.argsort(train.ids, kind="stable")
    rows = order[np.searchsorted(train.ids, examples.ids[chosen], sorter=order)]
    batch_size = window.examples.weights.shape[-1]
    tiles = []
    for place, row, image in zip(chosen, rows, train.originals(rows), strict=True):
        given, true = int(train.labels[row]), int(train.clean_labels[row])
        below = []
        if by_pseudo_label:
            below.append(f"→ {class_names[examples.pseudo_label[place]]}")
        if examples.trust is not None:
            below.append(f"λ {examples.trust[place]:.2g}")
        else:
            below.append(f"ω·B {examples.weights[place] * batch_size:.2g}")
        tiles.append((class_names[given], below, WRONG if true not in (UNKNOWN, given) else RIGHT, image))
    return {"suspects": draw(tiles)}


def draw(tiles: list[tuple[str, list[str], tuple[int, int, int], np.ndarray]]) -> np.ndarray:
    """A sheet of images with a line above and lines below each, `[H, W, 3]` uint8.

    Args:
      tiles: line above, lines below, colour of all of them, image `[h, w, 1 or 3]` uint8. Lines that are too long are
        cut.
    """
    import matplotlib  # here, for it takes 0.3 s, and most commands draw nothing

    font = ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), TEXT - 2)
    lines = 1 + max(len(below) for _, below, _, _ in tiles)
    wide, high = TILE + GAP, TILE + lines * TEXT + 2 * GAP
    sheet = Image.new("RGB", (min(COLUMNS, len(tiles)) * wide + GAP, -(-len(tiles) // COLUMNS) * high + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (above, below, colour, image) in enumerate(tiles):
        top, left = GAP + number // COLUMNS * high, GAP + number % COLUMNS * wide
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
        scale = TILE / max(picture.size)
        size = [max(1, round(scale * side)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
        sheet.paste(picture, (left, top + TEXT + 2))
        pen.text((left, top), fit(above, font), colour, font)
        for line, text in enumerate(below):
            pen.text((left, top + TILE + 2 + (1 + line) * TEXT), fit(text, font), colour, font)
    return np.asarray(sheet)


def fit(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text on one line, cut to the width of a tile."""
    text = " ".join(text.split())
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength(f"{text}…") > TILE:
        text = text[:-1]
    return f"{text}…"
