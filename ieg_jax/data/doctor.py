"""The command that looks at data before they are trained on: `python -m ieg_jax.data.doctor --config=...`.

Loads what a configuration names, just as training would, prints what a careful person would check, and writes a
report and a contact sheet. Ends with status 1 and a list where something is wrong.
"""

import hashlib
import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ieg_jax import cli
from ieg_jax import config as config_lib
from ieg_jax.data import human_labels, image_files, images, pipeline, sources
from ieg_jax.data.splits import Split, in_lines
from ieg_jax.errors import UserError

ROWS_SHOWN = 25  # of a table with a row for each class
SIZES_READ = 500  # records whose size is looked up


def examine(config: ConfigDict, out: epath.PathLike, quick: bool, console: Console) -> list[str]:
    """Prints what there is to know about the data of a configuration.

    Args:
      config: see configs/default.py. Images that cannot be decoded are reported whatever `data.unreadable` says.
      out: new folder for report.json, contact_sheet.png, noisy_labels.json and trusted.json.
      quick: do not read every image in search of duplicates.
      console: where it is printed.

    Returns:
      What is wrong, one line each.

    Raises:
      UserError: for what training would refuse, and where `out` holds files already.
    """
    config_lib.validate(config)
    out = epath.Path(out).expanduser()
    cli.check_new_folder("--out", out)
    config = config.copy_and_resolve_references()
    refuses = config.data.unreadable == "refuse"
    config.data.unreadable = "skip"
    config.trusted.batch_size = config.trusted.batch_size or config.batch_size
    try:
        data = pipeline.load(config)
    except image_files.ListError as error:
        raise UserError(f"{error}{_unreadable_besides(error.paths)}") from None
    splits = {
        "train": data.train,
        "trusted": data.trusted,
        "held_out": data.held_out,
        data.evaluation_name: data.evaluation,
    }
    splits = {name: split for name, split in splits.items() if split is not None}

    problems = []
    console.rule(Text(f"{data.name}: {', '.join(f'{len(split):,} {name}' for name, split in splits.items())}"))
    problems += _classes(data, splits, console)
    sizes = {name: _sizes(split) for name, split in splits.items()}
    original = _original_sizes(config.data) if config.data.image_size else {}
    for name, size in (sizes | {f"{name} as they come": size for name, size in original.items()}).items():
        _say(console, f"image sizes, {name}: {size}")
    if data.left_out:
        shown = in_lines((f"{name}: {error}" for name, error in data.left_out.items()), 20)
        _say(console, f"{len(data.left_out)} listed images cannot be used:\n{shown}")
        if refuses:
            problems.append(f"{len(data.left_out)} images cannot be decoded; mend them, or set data.unreadable=skip")
    label_file = _label_file(config.noise, console)
    _noise(data, console)
    duplicates = {} if quick else _duplicates(splits)
    problems += _overlaps(duplicates, console)
    problems += _two_labels(duplicates.get("train", []), _labels_before_noise(data.train, config.noise))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    first = jax.device_get(next(pipeline.train_batches(config, data, 0, 1, sharding)))
    speed = throughput(config, data)
    _say(
        console,
        f"pipeline: {speed['images_per_second']:,.0f} training images/s here, "
        f"{speed['images_per_cpu_second']:,.0f} per second and core",
    )
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "name": data.name,
        "classes": list(data.class_names),
        "splits": {name: {"images": len(split), "sizes": sizes[name]} for name, split in splits.items()},
        "original_sizes": original,
        "left_out": data.left_out,
        "noise": data.noise_report,
        "label_file": label_file,
        "duplicates": duplicates,
        "throughput": speed,
        "problems": problems,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "trusted.json").write_text(json.dumps(data.trusted_report, indent=1))
    (out / "noisy_labels.json").write_text(json.dumps(data.noisy_labels.tolist()))
    contact_sheet(first, data.class_names, out / "contact_sheet.png")
    _say(console, f"written: report, trusted set, labels and contact sheet in {out}")
    return problems


def throughput(config: ConfigDict, data: pipeline.Data, seconds: float = 3.0) -> dict[str, float]:
    """Runs the training pipeline alone for some seconds.

    Returns:
      `images_per_second`, training examples with all their views, and their trusted companions, on this
      machine; `images_per_cpu_second`, the same by the processor time of all threads.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = pipeline.train_batches(config, data, 0, 2**31 // config.batch_size - 1, sharding)
    for _ in range(5):  # tf.data starts its threads and fills its buffers
        next(batches)
    began, cpu_began, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += config.batch_size
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {"images_per_second": count / wall, "images_per_cpu_second": count / cpu, "cores": os.cpu_count()}


def contact_sheet(batch: dict[str, np.ndarray], class_names: tuple[str, ...], path: epath.Path) -> None:
    """Draws the first 24 examples of a batch as the network sees them, each above its strong view.

    Captions are the given labels, red with the true one below where it is known and another.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = min(24, len(batch["image"]))
    columns, views = 8, 1 + ("views" in batch)
    rows = -(-shown // columns)
    figure, axes = pyplot.subplots(rows * views, columns, figsize=(columns * 1.6, rows * views * 1.8), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place in range(shown):
        row, column = divmod(place, columns)
        given, true = int(batch["label"][place]), int(batch["clean_label"][place])
        wrong = true != -1 and true != given
        truth = class_names[true] if true >= 0 else "none of the classes"
        caption = f"{class_names[given]}\n" + (f"true: {truth}" if wrong else "")
        axes[row * views, column].set_title(caption, fontsize=7, color="red" if wrong else "black", parse_math=False)
        pictures = [batch["image"][place]] + ([batch["views"][place, 0]] if views == 2 else [])
        for offset, picture in enumerate(pictures):
            pixels = np.clip((picture + 1) / 2, 0, 1)
            axes[row * views + offset, column].imshow(np.atleast_2d(pixels.squeeze()), cmap="gray", vmin=0, vmax=1)
    figure.suptitle("given labels (red: known to be wrong); below each image its strong view", fontsize=9)
    figure.tight_layout()
    with path.open("wb") as file:
        figure.savefig(file, dpi=100, format="png")
    pyplot.close(figure)


def _say(console: Console, text: str) -> None:
    """Prints a text with names in it, which are not to be taken for markup."""
    console.print(text, markup=False, emoji=False)


def _unreadable_besides(paths: dict[str, str]) -> str:
    """What is wrong with the files of lists that cannot be used, to be added to the message."""
    checked = zip(paths, images.check(np.array(list(paths.values()), object)), strict=True)
    errors = [f"{name}: {one.error}" for name, one in checked if one.error]
    return f"\nand {len(errors)} of the images in it cannot be decoded:\n{in_lines(errors)}" if errors else ""


def _classes(data: pipeline.Data, splits: dict[str, Split], console: Console) -> list[str]:
    """Prints examples for each class and split; returns classes that lack some."""
    counts = {name: np.bincount(split.labels, minlength=data.num_classes) for name, split in splits.items()}
    true = data.train.clean_labels[data.train.clean_labels >= 0]
    if len(true):
        counts["train, by true label"] = np.bincount(true, minlength=data.num_classes)
    table = Table(title="examples per class (given labels)")
    table.add_column("class")
    for name in counts:
        table.add_column(name, justify="right")
    for number in range(min(data.num_classes, ROWS_SHOWN)):
        table.add_row(Text(data.class_names[number]), *(f"{count[number]:,}" for count in counts.values()))
    if data.num_classes > ROWS_SHOWN:
        table.add_row(f"... {data.num_classes - ROWS_SHOWN} more")
        for label, function in (("least", np.min), ("median", np.median), ("most", np.max)):
            table.add_row(label, *(f"{function(count):,.0f}" for count in counts.values()))
    console.print(table)
    return [
        f"class {data.class_names[number]!r} has no {name} images"
        for name in splits
        for number in np.flatnonzero(counts[name] == 0)
    ]


def _sizes(split: Split) -> str:
    """Heights and widths in words."""
    if split.in_memory:
        height, width, channels = split.images.shape[1:]
        return f"{height}×{width}×{channels}, {split.images.dtype}, in memory"
    if isinstance(split.images, images.FileImages):
        found, which = split.images.sizes, "files"
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int))
        read = split.images.reader()
        found = np.array([images.readable(lambda r: read(r).whole(), row, split.names[row]).shape[:2] for row in rows])
        which = f"records, {len(rows)} looked at"
    low, middle, high = found.min(0), np.median(found, 0).astype(int), found.max(0)
    return (
        f"height {low[0]} to {high[0]} (median {middle[0]}), width {low[1]} to {high[1]} (median {middle[1]}), {which}"
    )


def _original_sizes(data: ConfigDict) -> dict[str, str]:
    """Heights and widths before `data.image_size`, by split; of a pool's images none, for few of these are decoded."""
    source = sources.list_source(data)
    found = {"train": source.train, "test": source.test, "trusted": None if source.trusted_is_pool else source.trusted}
    data = data.copy_and_resolve_references()
    data.image_size = 0
    # Files were decoded a moment ago: their sizes are known.
    return {
        name: _sizes(sources.open_images(split, data)[0])
        for name, split in found.items()
        if split is not None and not split.in_memory
    }


def _label_file(noise: ConfigDict, console: Console) -> dict[str, Any] | None:
    """Says which file the labels come from; that it belongs to the data was checked when they were loaded."""
    if noise.kind not in ("human", "file", "transition_matrix"):
        return None
    if noise.kind == "human":
        about = human_labels.describe(noise.file)
        _say(console, f"{noise.file}: its clean labels equal those of the data, in this order, for every example")
        if about["published"]:
            which = f"the published {about['published']}: sha256 {about['sha256']}"
        else:
            known = ", ".join(f"{digest} ({name})" for digest, name in human_labels.PUBLISHED.items())
            which = f"not the published file: sha256 {about['sha256']}, published {known}"
        _say(console, f"{noise.file}: {which}")
        _say(console, f"{noise.file}: shapes {about['shapes']}")
    else:
        about = {"sha256": human_labels.sha256(noise.file)}
        _say(console, f"{noise.file}: sha256 {about['sha256']}")
    return about


def _noise(data: pipeline.Data, console: Console) -> None:
    report = data.noise_report
    rate = report["rate_effective"]
    known = "true labels are not known" if rate is None else f"{rate:.2%} of {report['num_known']:,} labels are wrong"
    nominal = "no nominal rate" if report["rate"] is None else f"nominal rate {report['rate']:.0%}"
    _say(console, f"noise: {report['kind']}, {nominal}, seed {report['seed']}; {known}")
    if report["confusion"] is None:
        return
    confusion = np.array(report["confusion"])
    width = len(str(confusion.max())) + 1
    if len(confusion) * (width + 1) + 20 <= console.width:
        table = Table("", box=None, padding=(0, 0, 0, 1), title="confusion: true class (row), given label (column)")
        for number in range(len(confusion)):
            table.add_column(str(number), justify="right", min_width=width)
        for number, row in enumerate(confusion):
            table.add_row(Text(f"{number} {data.class_names[number]}"[:18]), *(str(c) if c else "·" for c in row))
        console.print(table)
        return
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:10]:
        true, given = divmod(int(place), len(confusion))
        if wrong[true, given]:
            names = data.class_names[true], data.class_names[given]
            _say(console, f"  {wrong[true, given]:,} of {names[0]} are called {names[1]}")


def _duplicates(splits: dict[str, Split]) -> dict[str, list[list[str]]]:
    """Groups of images with the same bytes: "first and second split" -> lists of their names."""
    places: dict[str, list[tuple[str, str]]] = {}
    for name, split in splits.items():
        read = None if split.in_memory else split.images.reader()
        for row in track(range(len(split)), f"hashing {name}", transient=True, disable=len(split) < 2000):
            if read is None:
                content = split.images[row].tobytes()
            else:
                content = images.readable(read, row, split.names[row]).content.numpy()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            places.setdefault(digest, []).append((name, str(split.names[row])))
    found: dict[str, list[list[str]]] = {}
    for group in places.values():
        if len(group) > 1:
            between = " and ".join(sorted({name for name, _ in group}))
            found.setdefault(between, []).append([name for _, name in group])
    return found


def _overlaps(duplicates: dict[str, list[list[str]]], console: Console) -> list[str]:
    problems = []
    for between, groups in sorted(duplicates.items()):
        example = " = ".join(groups[0][:3])
        if " and " in between:
            problems.append(f"{len(groups)} images are the same in {between}, e.g. {example}")
        else:
            _say(console, f"{len(groups)} images are there more than once within {between}, e.g. {example}")
    return problems


def _labels_before_noise(train: Split, noise: ConfigDict) -> dict[str, int]:
    """Labels of the training images as the data came, by name, without those that are not known any more."""
    labels = train.labels if noise.kind == "none" else train.clean_labels
    return {name: int(label) for name, label in zip(train.names, labels, strict=True) if label >= 0}


def _two_labels(groups: list[list[str]], labels: dict[str, int]) -> list[str]:
    """What to say of images of the training set that are the same and have different labels."""
    differ = [group for group in groups if len({labels[name] for name in group if name in labels}) > 1]
    if not differ:
        return []
    return [
        f"{len(differ)} images are there more than once within train with different labels, e.g. "
        f"{' = '.join(differ[0][:3])}; keep the right one of each"
    ]


def define_flags() -> None:
    """Defines the command's flags; not when it is imported, for other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_string("out", None, "New folder for the report and the contact sheet.", required=True)
    flags.DEFINE_bool("quick", False, "Do not read every image in search of duplicates.")


def main(argv: list[str]) -> None:
    """Prints the examination; the last line says whether something is wrong."""
    del argv
    values = flags.FLAGS
    problems = examine(values.config, values.out, values.quick, Console())
    if problems:
        sys.exit("\n".join([f"error: {len(problems)} things are wrong:", *(f"  {problem}" for problem in problems)]))
    print("nothing wrong found")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
