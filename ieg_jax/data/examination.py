"""What the doctor looks at: classes, image sizes, noise, duplicates, and the speed of the pipeline."""

import hashlib
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ieg_jax import cli, files, methods
from ieg_jax import config as config_lib
from ieg_jax.data import backbone, check, images, transfer
from ieg_jax.data.batches import assembled, train_batches, work_of_an_example
from ieg_jax.data.load import Data, load_data, uses_backbone
from ieg_jax.data.noise import human_labels
from ieg_jax.data.sources import lists
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import Split, in_lines, narrow_range
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf
from ieg_jax.methods.base import Stream

LOOKED_AT = 50  # images that are looked at to know whether all are grey, or dark
ROWS_SHOWN = 25  # in a table with a row for each class


def examine(config: ConfigDict, out: epath.PathLike, quick: bool, console: Console) -> tuple[list[str], Data]:
    """Prints what there is to know about the data of a configuration, and writes a report.

    Args:
      config: see configs/default.py. Images that cannot be decoded are reported whatever `data.unreadable` says.
      out: new folder for report.json, contact_sheet.png, noisy_labels.json and trusted.json.
      quick: do not read every image in search of duplicates.
      console: prints it.

    Returns:
      What is wrong, one line for each problem; and the data.

    Raises:
      UserError: for what training would refuse, and where `out` holds files already.
    """
    check.validate(config)
    out = epath.Path(out).expanduser()
    cli.check_new_folder("--out", out)
    config = config_lib.resolve(backbone.without(config) if uses_backbone(config) else config)
    refuses = config.data.unreadable == "refuse"
    config.data.unreadable = "skip"
    try:
        data = load_data(config)
    except lists.ListError as error:
        raise UserError(f"{error}{_unreadable_besides(error.paths)}") from None
    splits, problems = data.splits, []
    console.rule(Text(f"{data.name}: {', '.join(f'{len(split):,} {name}' for name, split in splits.items())}"))
    problems += _classes(data, splits, console)
    sizes = {name: _sizes(split) for name, split in splits.items()}
    original = _original_sizes(config.data) if config.data.image_size else {}
    for name, size in (sizes | {f"{name} as they come": size for name, size in original.items()}).items():
        _say(console, f"image sizes, {name}: {size}")
    problems += _left_out(data.left_out, refuses, console)
    notices = [*data.notices, *_contrast(data.train)]
    for notice in notices:
        _say(console, f"note: {notice}")
    if _changes_colours(config.augment) and _is_grey(data.train):
        _say(console, "the images are grey, and the augmentation changes colours: use augment=grey (docs/data.md)")
    label_file = _label_file(config.noise, console)
    _noise(data, console)
    duplicates = {} if quick else _duplicates(splits)
    problems += _overlaps(duplicates, console)
    problems += _two_labels(duplicates.get("train", []), _labels_before_noise(data.train, config.noise))
    streams = methods.get(config.method.name).streams
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    first = jax.device_get(transfer.received(next(train_batches(config, data, streams, 0, 1, sharding))))
    speed = throughput(config, data, streams)
    _say(
        console,
        f"pipeline: {speed['examples_per_second']:,.0f} training examples/s here, "
        f"{speed['examples_per_cpu_second']:,.0f} per second and core, each of {speed['images_per_example']:g} images; "
        f"batches are put together at {speed['assembly_bytes_per_second'] / 1e9:.2g} GB/s"
        + (f"; an image is read in {speed['read_seconds'] * 1e3:.3g} ms" if speed["read_seconds"] else ""),
    )
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "name": data.name,
        "classes": list(data.class_names),
        "splits": {name: {"images": len(split), "sizes": sizes[name]} for name, split in splits.items()},
        "original_sizes": original,
        "left_out": data.left_out,
        "notices": notices,
        "noise": data.noise_report,
        "label_file": label_file,
        "duplicates": duplicates,
        "throughput": speed,
        "problems": problems,
    }
    files.write_json(out / "report.json", report)
    files.write_json(out / "trusted.json", data.trusted_report)
    files.write_json(out / "noisy_labels.json", data.noisy_labels.tolist(), indent=None)
    draw_batch(first, data.class_names, out / "contact_sheet.png")
    _say(console, f"written: report, trusted set, labels and contact sheet in {out}")
    return problems, data


def throughput(config: ConfigDict, data: Data, streams: Mapping[str, Stream], seconds: float = 3.0) -> dict[str, Any]:
    """Runs the input pipeline of training alone for some seconds, and then parts of it.

    Returns:
      `examples_per_second`, training examples per second on this machine, each with all its views and with the trusted
      images that go with it; `examples_per_cpu_second`, the same per second of processor time, summed over the threads;
      `images_per_example`, of how many views such an example consists; `cores`, how many processors the machine has;
      `assembly_bytes_per_second`, see `assembly`; and of images on a bucket `read_seconds`, see `read_seconds`, else
      None. `ieg_jax.plan` reads these.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = train_batches(config, data, streams, 0, 2**31 // config.batch_size - 1, sharding)
    for _ in range(5):  # in the meantime tf.data starts its threads and fills its buffers
        batch = next(batches)
    began, cpu_began, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += config.batch_size
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    batches.close()
    return {
        "examples_per_second": count / wall,
        "examples_per_cpu_second": count / cpu,
        "images_per_example": work_of_an_example(config, streams)[0],
        "cores": os.cpu_count(),
        "assembly_bytes_per_second": assembly(jax.device_get(batch), sharding, seconds / 3),
        "read_seconds": read_seconds(data.train),
    }


def assembly(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, seconds: float) -> float:
    """Bytes per second that one process makes into batches and hands to its devices, of examples that are ready.

    Args:
      batch: what it is to make.
      sharding: of the leading dimension.
      seconds: for how long it is tried.
    """
    size = len(batch["image"])
    ready = {name: tf.constant(value) for name, value in batch.items()}

    def example(position):  # a copy of its own, as augmentation leaves it: one that is in the cache is too fast
        return {name: value[position % len(value)] for name, value in ready.items()}

    examples = tf.data.Dataset.range(2**62).map(example, tf.data.AUTOTUNE, deterministic=True)
    batches = assembled(examples.batch(size, drop_remainder=True), sharding)
    for _ in range(5):
        made = next(batches)
    began, count = time.perf_counter(), 0
    while (wall := time.perf_counter() - began) < seconds:
        made = jax.block_until_ready(next(batches))
        count += sum(array.nbytes for array in made.values())
    return count / wall


def read_seconds(split: Split) -> float | None:
    """The median time to read an image by itself, of a split on a bucket; None for one in memory or on a disk."""
    if not split.is_remote:
        return None
    read, times = split.images.reader(), []
    for row in np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(int):
        began = time.perf_counter()
        images.readable(read, row, split.names[row])
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def draw_batch(batch: dict[str, np.ndarray], class_names: tuple[str, ...], path: epath.Path) -> None:
    """Draws the first 24 examples of a batch as the network sees them, each above its strong view.

    The captions are the given labels. A label that is known to be wrong is red, with the true one below it.
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
    """Prints a text as it is; names in it might look like markup of rich."""
    console.print(text, markup=False, emoji=False)


def _unreadable_besides(paths: dict[str, str]) -> str:
    """What is wrong with the image files in lists that cannot be used, to be added to the message about the lists."""
    checked = zip(paths, images.check(np.array(list(paths.values()), object)), strict=True)
    errors = [f"{name}: {one.error}" for name, one in checked if one.error]
    return f"\nand {len(errors)} of the images in it cannot be decoded:\n{in_lines(errors)}" if errors else ""


def _contrast(split: Split) -> list[str]:
    """A notice where some images that are still in their files have hardly any contrast; others are looked at whole."""
    if split.in_memory:
        return []
    rows = np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(int)
    return list(filter(None, [narrow_range(np.concatenate([image.ravel() for image in split.originals(rows)]))]))


def _left_out(left_out: dict[str, str], refuses: bool, console: Console) -> list[str]:
    """Prints the images that cannot be used; returns a problem if training would refuse them."""
    if not left_out:
        return []
    shown = in_lines((f"{name}: {error}" for name, error in left_out.items()), 20)
    _say(console, f"{len(left_out)} listed images cannot be used:\n{shown}")
    if not refuses:
        return []
    return [f"{len(left_out)} images cannot be decoded; mend them, or set data.unreadable=skip"]


def _classes(data: Data, splits: dict[str, Split], console: Console) -> list[str]:
    """Prints how many examples each class has in each split; returns a problem for each class without images."""
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
    """The heights and widths of the images, in words."""
    if split.in_memory:
        height, width, channels = split.images.shape[1:]
        return f"{height}×{width}×{channels}, {split.images.dtype}, in memory"
    found = sources.image_sizes(split)
    which = "files" if isinstance(split.images, images.FileImages) else f"records, {len(found)} looked at"
    low, middle, high = found.min(0), np.median(found, 0).astype(int), found.max(0)
    return (
        f"height {low[0]} to {high[0]} (median {middle[0]}), width {low[1]} to {high[1]} (median {middle[1]}), {which}"
    )


def _changes_colours(augment: ConfigDict) -> bool:
    return config_lib.AUGMENT_PRESETS["photos"] == (augment.standard, augment.strong)


def _is_grey(split: Split) -> bool:
    """Whether images that are evenly spread over the set, LOOKED_AT of them, are grey."""
    if not split.is_visible:
        return False
    rows = np.unique(np.linspace(0, len(split) - 1, LOOKED_AT).astype(int))
    return all((image == image[..., :1]).all() for image in split.originals(rows))


def _original_sizes(data: ConfigDict) -> dict[str, str]:
    """Heights and widths before `data.image_size`, by split; not of a trusted pool, of which few images are decoded."""
    source = sources.list_source(data)
    found = {"train": source.train, "test": source.test, "trusted": None if source.trusted_is_pool else source.trusted}
    data = data.copy_and_resolve_references()
    data.image_size = 0
    # Files were decoded a moment ago, so their sizes come from the cache.
    return {
        name: _sizes(sources.check_images(split, data)[0])
        for name, split in found.items()
        if split is not None and not split.in_memory
    }


def _label_file(noise: ConfigDict, console: Console) -> dict[str, Any] | None:
    """Prints which file the labels come from; loading has checked that it belongs to the data."""
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


def _noise(data: Data, console: Console) -> None:
    """Prints kind and rate of the noise, and the confusion matrix, or its ten largest entries where it is too wide."""
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
    """Groups of images with the same bytes: the split they are in, or "one and another" -> groups of names."""
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
    """Returns a problem for images that are in more than one split; prints a note for repeats within one."""
    problems = []
    for between, groups in sorted(duplicates.items()):
        example = " = ".join(groups[0][:3])
        if " and " in between:
            problems.append(f"{len(groups)} images are the same in {between}, e.g. {example}")
        else:
            _say(console, f"{len(groups)} images are there more than once within {between}, e.g. {example}")
    return problems


def _labels_before_noise(train: Split, noise: ConfigDict) -> dict[str, int]:
    """The labels of the training images before noise, by name, without those that are not known any more."""
    labels = train.labels if noise.kind == "none" else train.clean_labels
    return {name: int(label) for name, label in zip(train.names, labels, strict=True) if label >= 0}


def _two_labels(groups: list[list[str]], labels: dict[str, int]) -> list[str]:
    """Returns a problem if images of the training set are the same and have different labels."""
    differ = [group for group in groups if len({labels[name] for name in group if name in labels}) > 1]
    if not differ:
        return []
    return [
        f"{len(differ)} images are there more than once within train with different labels, e.g. "
        f"{' = '.join(differ[0][:3])}; keep the right one of each"
    ]
