"""Open-set noise (Wang et al. 2018; Appendix A of the paper): images of no class under labels that are kept."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data.selection import SELECT, TABLES, select, uniforms
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import NO_CLASS, Source, Split
from ieg_jax.errors import UserError, check_choice

# The sources that are found at data.train; all others are found at data.dir.
_PLACED_BY_TRAIN = ("arrays", "image_folder", "image_csv")
_GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


def corrupt(source: Source, noise: ConfigDict) -> Split:
    """The training set with a share of its images replaced by training images of the sources in `noise.open_set`.

    The selected examples, in the order of their random numbers (see `selection.select`), take turns at the sources, so
    that each source gives equally many. The images of a source are taken in an order drawn from (seed, foreign id),
    none twice before all were used. Labels are kept, clean labels become NO_CLASS, names those of the foreign images.

    Raises:
      UserError: for own images that are not squares in memory, and for foreign ones that cannot be loaded.
    """
    train = source.train
    if not train.in_memory:
        raise UserError(
            f"noise.kind=open_set replaces images in memory, and those of {source.name} are decoded when they are "
            f"needed; set data.image_size to decode and resize them while loading"
        )
    height, width = train.images.shape[1:3]
    if height != width:
        raise UserError(
            f"noise.kind=open_set: the images of {source.name} have {height}×{width} pixels, expected squares; "
            f"set data.image_size"
        )
    rows = np.flatnonzero(select(noise, train.ids, train.clean_labels))
    rows = rows[np.argsort(uniforms(noise.seed, SELECT, train.ids)[rows], kind="stable")]
    images, clean_labels, names = train.images.copy(), train.clean_labels.copy(), train.names.astype(object)
    clean_labels[rows] = NO_CLASS
    places = parse(noise.open_set)
    for number, (name, place) in enumerate(places):
        own_rows = rows[number :: len(places)]
        if len(own_rows):
            foreign = _draw_foreign(source, name, place, noise.seed, TABLES + number, len(own_rows), height)
            images[own_rows] = _as(foreign.images, images)
            names[own_rows] = foreign.names
    return dataclasses.replace(train, images=images, clean_labels=clean_labels, names=names.astype(str))


def parse(text: str) -> list[tuple[str, str]]:
    """Splits `noise.open_set`, entries `name` or `name:place` with commas between, into (name, place); "" = no place.

    Raises:
      UserError: for a name that is no source.
    """
    places = [tuple(part.strip() for part in entry.partition(":")[::2]) for entry in text.split(",")]
    for name, _ in places:
        check_choice("noise.open_set", name, sources.REGISTRY)
    return places


def data_config(name: str, place: str, image_size: int) -> ConfigDict:
    """The group `data` of the default configuration for one foreign source.

    Args:
      name: a key of `sources.REGISTRY`.
      place: its folder or file, "" for a source that needs none.
      image_size: pixels of a side, 0 = as they come.
    """
    by_train = name in _PLACED_BY_TRAIN
    return ConfigDict(
        {
            "name": name,
            "dir": "" if by_train else place,
            "variant": "",
            "train": place if by_train else "",
            "test": "",
            "trusted": "",
            "image_size": image_size,
            "num_classes": 0,
            "unreadable": "refuse",
            "validation_size": 0,
            "train_size": 0,
            "folds": 0,
            "fold": 0,
            "transfer": "float32",
            "cleaned": "",
        }
    )


def _draw_foreign(own: Source, name: str, place: str, seed: int, stream: int, count: int, size: int) -> Split:
    """`count` foreign images of `size` pixels a side; of a large set only those that are used are decoded."""
    foreign = sources.REGISTRY[name].read(data_config(name, place, 0))
    # A source in _PLACED_BY_TRAIN has the name of a file or folder, and two of them may be called alike.
    if foreign.name == own.name and name not in _PLACED_BY_TRAIN:
        raise UserError(f"noise.open_set={name}: these are the images of data.name themselves; name another source")
    order = np.argsort(uniforms(seed, stream, foreign.train.ids), kind="stable")
    drawn = foreign.train.take(order[np.arange(count) % len(order)])
    drawn = dataclasses.replace(drawn, names=np.char.add(f"{foreign.name}:", drawn.names.astype(str)))
    return sources.open_images(drawn, data_config(name, place, size), size)[0]


def _as(images: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Images `[n, H, W, C]` with the channels and the dtype of `own`."""
    pixels = images / np.float32(255) if images.dtype == np.uint8 else images
    if pixels.shape[-1] > own.shape[-1]:
        pixels = pixels @ _GREY[:, None]
    pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], own.shape[-1]))
    return np.round(pixels * 255).astype(np.uint8) if own.dtype == np.uint8 else pixels.astype(np.float32)
