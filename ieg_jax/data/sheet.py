"""Draws the contact sheet: every operation and policy of the augmentation on a photograph."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from ieg_jax.data import augment, autoaugment
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

SIDES = (32, 224)
LEVELS = (0, 2, 4, 6, 8, 10)
SEEDS = range(6)
# Operations whose default parameters change nothing.
SHOWN_WITH = {"affine": "affine(rotate=15,shear=0.1,zoom=0.1,translate=0.1)"}
TILE, GAP, TEXT = 112, 6, 14  # pixels: the side of a tile, the gap between tiles, the height of a line of text


class Row(NamedTuple):
    """A title, and uint8 images `[H, W, 3]`, each with its caption."""

    title: str
    tiles: list[tuple[str, np.ndarray]]


def write(out: pathlib.Path, overwrite: bool, config: ConfigDict | None) -> int:
    """Draws the picture into the file `out`, a .png.

    Args:
      out: the file; folders above it are made.
      overwrite: whether it may exist.
      config: see `rows`.

    Returns:
      How many rows it has.

    Raises:
      UserError: for a file that exists or is no .png.
    """
    if out.suffix != ".png":
        raise UserError(f"--out={out}: expected a name that ends in .png")
    if out.exists() and not overwrite:
        raise UserError(f"--out={out} exists; name another file, or add --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheets = [rows(photograph(side), config) for side in SIDES]
    draw(sheets).save(out)
    return len(sheets[0])


def photograph(side: int) -> np.ndarray:
    """The middle square of a photograph that comes with scikit-learn, `[side, side, 3]` uint8."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = left, top, left + edge, top + edge
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box))


def rows(image: np.ndarray, config: ConfigDict | None) -> list[Row]:
    """All rows of one image.

    Args:
      image: `[H, W, 3]` uint8.
      config: whose `augment.*` policies are shown after all others; or None.
    """
    policies = {name: SHOWN_WITH.get(name, name) for name in augment.OPERATIONS}
    if config is not None:
        keys = ("standard", "strong", "evaluation")
        policies |= {f"augment.{key}": config.augment[key] for key in keys}
    return [
        *(primitive_row(name, image) for name in autoaugment.PRIMITIVES),
        *(policy_row(title, text, image) for title, text in policies.items()),
    ]


def primitive_row(name: str, image: np.ndarray) -> Row:
    """One primitive at each level. The first family that has it says what its levels mean; the sign is always +."""
    height, width = image.shape[:2]
    families = {
        "CIFAR": autoaugment.cifar_parameters,
        "ImageNet": autoaugment.imagenet_parameters,
        "RandAugment": lambda level: autoaugment.randaugment_parameters(level, height, width),
    }
    family = next(family for family, parameters in families.items() if name in parameters(0))
    tiles = []
    for level in LEVELS:
        value = families[family](level)[name].value
        centre = tf.constant([height // 2, width // 2])
        result = autoaugment.PRIMITIVES[name](tf.constant(image), value, centre, autoaugment.GREY)
        tiles.append((f"level {level}: {value:.4g}", result.numpy()))
    return Row(f"{name}\n{family} levels", tiles)


def policy_row(title: str, text: str, image: np.ndarray) -> Row:
    """A policy, applied with several seeds."""
    policy = augment.parse_policy(text, title)
    floats = tf.constant(image / 127.5 - 1.0, tf.float32)
    tiles = []
    for seed in SEEDS:
        result = policy(floats, tf.constant([0, seed], tf.int64)).numpy()
        tiles.append((f"seed {seed}: {result.shape[1]} px", np.round((result + 1.0) * 127.5).astype(np.uint8)))
    return Row(title if text == title else f"{title}\n{text}".replace("|", "|\n").replace(",", ",\n"), tiles)


def draw(sheets: list[list[Row]]) -> Image.Image:
    """Draws sheets with the same titles side by side; small tiles are made larger without smoothing."""
    titles = [row.title for row in sheets[0]]
    font = ImageFont.load_default(TEXT - 2)
    margin = round(max(font.getlength(line) for title in titles for line in title.split("\n"))) + 3 * GAP
    counts = [max(len(row.tiles) for row in sheet) for sheet in sheets]
    step = TILE + TEXT + 2 * GAP
    width = margin + sum(counts) * (TILE + GAP) + len(sheets) * 3 * GAP
    picture = Image.new("RGB", (width, len(titles) * step + GAP), "white")
    pen = ImageDraw.Draw(picture)
    for place, title in enumerate(titles):
        top = place * step + GAP
        pen.text((GAP, top + TEXT), title, "black", font)
        left = margin
        for sheet, count in zip(sheets, counts, strict=True):
            for number, (caption, tile) in enumerate(sheet[place].tiles):
                method = Image.Resampling.NEAREST if tile.shape[0] < TILE else Image.Resampling.BOX
                corner = left + number * (TILE + GAP), top
                pen.text(corner, caption, "black", font)
                picture.paste(Image.fromarray(tile).resize((TILE, TILE), method), (corner[0], top + TEXT + 2))
            left += count * (TILE + GAP) + 3 * GAP
    return picture
