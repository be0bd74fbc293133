"""Accuracies on CIFAR that papers print for the methods: published.json, and the tables of IEG's own paper.

No number here was measured with this code. published.json has `sources`, see `Source`, and `rows`, see `Row`. What
IEG's paper prints is in paper_results.json, which `ieg_jax.reproduce` repeats.
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from ieg_jax import methods

# Data set -> the kinds of noise that a row may have. Those of cifar10n are labels that people gave: they have no rate.
NOISE = {
    "cifar10": ("symmetric", "asymmetric"),
    "cifar10n": ("aggre", "random1", "worse"),
    "cifar100": ("symmetric",),
}
EPOCHS = {"best": "b", "held out": "h", "last": "l", None: ""}  # -> its mark in tables


@dataclasses.dataclass(frozen=True)
class Source:
    """Where numbers are printed.

    Attributes:
      text: what it is, for people.
      url: https.
      of: the methods that it proposes itself; those of others it repeats, or ran.
    """

    text: str
    url: str
    of: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A printed accuracy.

    Attributes:
      method: a name in `methods.REGISTRY`.
      dataset, noise: see `NOISE`.
      source: a name in the sources.
      top1: test accuracy in percent.
      rate: nominal share of the labels that are drawn anew; None for human labels.
      std: over repetitions, where it is printed.
      epoch: `best`, the one with the best accuracy on the test images; `held out`, chosen on other images; `last`; None
        where the source does not say.
      flips: what a symmetric label is drawn from, `any` class or the `other` ones; None where the source does not say.
      network: None where the source does not say.
      trusted: number of trusted images, where it is said.
      variant: of the method, where it is not plainly that of this name.
    """

    method: str
    dataset: str
    noise: str
    source: str
    top1: float
    rate: float | None = None
    std: float | None = None
    epoch: str | None = None
    flips: str | None = None
    network: str | None = None
    trusted: int | None = None
    variant: str | None = None

    @property
    def setting(self) -> tuple[str, str, float | None]:
        """Data set, kind of noise, rate."""
        return self.dataset, self.noise, self.rate

    @property
    def accuracy(self) -> str:
        """The accuracy with one decimal, or with two where they are printed."""
        return f"{self.top1:.1f}" if round(self.top1, 1) == self.top1 else f"{self.top1:.2f}"


@functools.cache
def load() -> tuple[dict[str, Source], tuple[Row, ...]]:
    """The sources by name, and all rows, those of a method's own authors before others.

    Raises:
      ValueError: for a row or a source with a field that is missing, unknown or not allowed, and for a row that is
        there twice.
    """
    text = json.loads((importlib.resources.files("ieg_jax.methods") / "published.json").read_text())
    return parse(text["sources"], [*text["rows"], *_of_the_paper()])


def first(method: str, setting: tuple[str, str, float | None]) -> Row | None:
    """The row that stands for a method and a `setting` in tables; None where there is none."""
    return next((row for row in load()[1] if (row.method, row.setting) == (method, setting)), None)


def parse(sources: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> tuple[dict[str, Source], tuple[Row, ...]]:
    """Reads and checks what `load` returns."""
    found = {name: Source(**source | {"of": tuple(source["of"])}) for name, source in sources.items()}
    try:
        read = [Row(**row) for row in rows]
    except TypeError as error:
        raise ValueError(f"published numbers: a row has a wrong field: {error}") from None
    for name, source in found.items():
        if not (source.text and source.url.startswith("https://") and set(source.of) <= methods.REGISTRY.keys()):
            raise ValueError(f"published numbers: source {name}: {source}")
    seen = set()
    for row in read:
        human = row.dataset == "cifar10n"
        holds = (
            row.method in methods.REGISTRY
            and row.noise in NOISE.get(row.dataset, ())
            and row.source in found
            and 0 < row.top1 < 100
            and (row.rate is None if human else row.rate is not None and 0 < row.rate < 1)
            and (row.std is None or 0 < row.std < 50)
            and row.epoch in EPOCHS
            and (row.flips is None or (row.noise == "symmetric" and row.flips in ("any", "other")))
            and (row.trusted is None or row.trusted > 0)
        )
        same = dataclasses.replace(row, top1=0.0, std=None)
        if not holds or same in seen:
            raise ValueError(f"published numbers: {'there twice' if same in seen else 'not allowed'}: {row}")
        seen.add(same)
    return found, tuple(sorted(read, key=lambda row: row.method not in found[row.source].of))


def paper_rows() -> list[dict[str, Any]]:
    """Every number that IEG's paper prints, with what it belongs to: the rows of paper_results.json."""
    return json.loads((importlib.resources.files("ieg_jax.methods") / "paper_results.json").read_text())["rows"]


def _of_the_paper() -> list[dict[str, Any]]:
    """The rows of IEG's paper that fit in here: the larger network and ten trusted images per class first."""
    rows: list[dict[str, Any]] = []
    for printed in paper_rows():
        repeated = printed["table"] == "6" and printed["method"] == "ieg"  # Tables 1 and 2 have it
        if printed["table"] not in ("1", "2", "3", "6") or repeated or not printed["ratio"]:
            continue
        row = {key: printed.get(key) for key in ("method", "dataset", "top1", "std", "network")}
        noise = {"uniform": "symmetric"}.get(printed["noise"], printed["noise"])
        rows.append(row | {"noise": noise, "rate": printed["ratio"], "trusted": printed.get("trusted_total"),
                           "source": "ieg"})  # fmt: skip
    usual = {"cifar10": 100, "cifar100": 1000}
    return sorted(rows, key=lambda row: (row["network"] != "wrn28_10", row["trusted"] != usual[row["dataset"]]))
