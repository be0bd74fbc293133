"""The page docs/methods.md, made of what the modules of the methods say about themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax import methods
from ieg_jax.methods import published
from ieg_jax.methods.base import ALL_VIEWS, MAIN, ROWS_UNIT, TRUSTED, Context, Method

HEAD = """# Methods

`method.name` chooses one. This page is made of the modules in `ieg_jax/methods` (`make docs`); a test holds it to them.
Cost is that of a step in forward passes of one network over a batch, a backward pass counting two, with the usual two
views and as many trusted images as noisy ones.

Memory is what a method remembers of each training example, in bytes, with ten classes and float32: how much `init` of
the module grows with each further example (which rows the streams draw from, a byte for each example and stream where a
method chooses them, is not in it, nor is what the audit sums up by example). It stands in device memory, split over the
devices, and in every checkpoint. What does not grow with the training set is not counted.
"""
PUBLISHED = """## Published

What papers print, in percent of test accuracy. **None of it was measured with this code**, and no number can be set
beside another without care: these are networks that were trained from scratch, most of them for hundreds of epochs,
with settings that differ from paper to paper and often from cell to cell, on noise that is not drawn in the same way,
and many report the best of their epochs on the test images. (EMLC's networks begin with self-supervised training.) What
was measured here is in [results.md](results.md), which sets some of it
[beside these numbers](results.md#published-beside-measured-here).

b is the best epoch on the test images, h one that was chosen on other images, l the last one; where there is no letter
the source does not say. The number in brackets is the source, listed below; * = not by the method's own authors. A cell
has one number, of the method's own authors where one was found; its section has them all. No number is from memory:
where none was found in a text, there is none. Some numbers were read in the README of a repository or in the table of a
later paper, which the source then says.
"""
# Heading -> data set, kind of noise and rate of a column of the table of published numbers.
COLUMNS = {
    **{f"CIFAR-10 {rate:.0%}".replace("%", " %"): ("cifar10", "symmetric", rate) for rate in (0.2, 0.4, 0.5, 0.8, 0.9)},
    "asymmetric 40 %": ("cifar10", "asymmetric", 0.4),
    **{f"CIFAR-10N {labels}": ("cifar10n", labels, None) for labels in published.NOISE["cifar10n"]},
    **{f"CIFAR-100 {rate:.0%}".replace("%", " %"): ("cifar100", "symmetric", rate) for rate in (0.2, 0.5, 0.8)},
}
DATASETS = {"cifar10": "CIFAR-10", "cifar10n": "CIFAR-10N", "cifar100": "CIFAR-100"}
CLASSES = 10
USUAL = {"batch_size": 64, "trusted.batch_size": 0, "augment.num_views": 2}


def usual_config() -> ConfigDict:
    """As much of a configuration as the cost of a method depends on."""
    config = ConfigDict({"trusted": {}, "augment": {}, "method": {}, "meta": {}})
    config.update_from_flattened_dict(USUAL | methods.defaults())
    return config


class _Small(nn.Module):
    """A network that is enough for a context: one layer, whose inputs are the features."""

    batch_groups: int = 1
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(CLASSES, name="head")(images.reshape(len(images), -1))


def bytes_per_example(method: Method) -> float:
    """By how many bytes the memory of a method grows with each training example, for ten classes and float32."""
    config = FrozenConfigDict(usual_config())
    method = method.bind(Context(config, _Small(), optax.identity(), CLASSES, image_shape=(2, 2, 1)))

    def size(num_rows: int) -> int:
        memory = jax.eval_shape(lambda: method.init(jax.random.key(0), num_rows))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))

    return (size(2 * ROWS_UNIT) - size(ROWS_UNIT)) / ROWS_UNIT


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def streams(method: Method) -> str:
    """What a batch is drawn from, in words."""
    said = []
    for name, stream in method.streams.items():
        what = "trusted images" if stream.source == TRUSTED else "training images with their given labels"
        views = (
            "with strong views" if stream.views is ALL_VIEWS else "" if stream.views == 1 else f"{stream.views} views"
        )
        said.append(" ".join(filter(None, [what, views, "" if name == MAIN else f"(`{name}_…` in a batch)"])))
    return "; ".join(said)


def section(method: Method) -> str:
    """The description of one method."""
    facts = [
        f"- A batch is drawn from: {streams(method)}.",
        f"- Networks: {method.networks}. Cost: {method.passes(usual_config()):g} forward passes. Memory: "
        f"{bytes_per_example(method):g} bytes per example.",
        *published_lines(method.name),
    ]
    keys = [
        [f"`{key}`", f"`{value.default!r}`", value.check.expected, value.comment]
        for key, value in sorted(method.keys.items())
    ]
    parts = [f"## {method.title}: `{method.name}`", _unwrapped(method.about), "\n".join(facts)]
    if keys:
        parts.append(table(["key", "default", "allowed", "meaning"], keys))
    return "\n\n".join(parts)


def _cited(sources: dict[str, published.Source], source: str, method: str) -> str:
    """The number of a source, with a star where it is not by the method's own authors."""
    return f"[{list(sources).index(source) + 1}]{'' if method in sources[source].of else '*'}"


def published_lines(name: str) -> list[str]:
    """What is published for a method, a line for each source, data set and way in which it was trained."""
    sources, rows = published.load()
    lines: dict[tuple, list[published.Row]] = {}
    for row in rows:
        if row.method == name:
            kind = (row.source, row.dataset, row.variant, row.network, row.trusted, row.epoch)
            lines.setdefault(kind, []).append(row)
    said = []
    for (source, dataset, variant, network, trusted, epoch), found in lines.items():
        drawn = {row.flips for row in found} - {None}
        what = [
            variant, network, trusted and f"{trusted} trusted images", epoch and f"{epoch} epoch",
            *(f"symmetric = from {'any class' if flips == 'any' else 'the other classes'}" for flips in drawn),
        ]  # fmt: skip
        cells = [
            f"{row.noise}{'' if row.rate is None else f' {row.rate:g}'}: {row.accuracy}"
            + ("" if row.std is None else f" ± {row.std:g}")
            for row in found
        ]
        how = "; ".join(filter(None, what))
        where = f"{DATASETS[dataset]} {_cited(sources, source, name)}"
        said.append(f"- Published, {where}: {', '.join(cells)}{how and f' ({how})'}.")
    return said


def published_section() -> str:
    """The table of published numbers and the list of their sources."""
    sources, _ = published.load()

    def cell(name: str, setting: tuple) -> str:
        row = published.first(name, setting)
        if row is None:
            return ""
        parts = [row.accuracy, published.EPOCHS[row.epoch], row.variant, _cited(sources, row.source, name)]
        return " ".join(filter(None, parts))

    lines = [[f"`{name}`", *(cell(name, setting) for setting in COLUMNS.values())] for name in methods.REGISTRY]
    listed = "\n".join(f"{number}. {source.text}: <{source.url}>" for number, source in enumerate(sources.values(), 1))
    found = table(["method", *COLUMNS], [line for line in lines if any(line[1:])])
    without = ", ".join(line[0] for line in lines if not any(line[1:]))
    return "\n\n".join([PUBLISHED.rstrip(), found, f"No number was found for {without}.", listed])


def page() -> str:
    """The whole page."""
    described = [methods.get(name) for name in methods.REGISTRY]
    summary = table(
        ["method", "`method.name`", "trusted images", "networks", "cost", "bytes per example"],
        [
            [one.title, f"`{one.name}`", "yes" if one.needs_trusted else "no", str(one.networks),
             f"{one.passes(usual_config()):g}", f"{bytes_per_example(one):g}"]
            for one in described
        ],
    )  # fmt: skip
    return "\n\n".join([HEAD.rstrip(), summary, published_section(), *map(section, described)]) + "\n"


def _unwrapped(text: str) -> str:
    """A docstring whose indented formulas become blocks of code in Markdown."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines):
            paragraph = "\n".join(["```", *(line[4:] for line in lines), "```"])
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
