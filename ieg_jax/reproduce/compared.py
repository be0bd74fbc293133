"""Sets what was measured here beside what papers print: `reproduce table cifar10n --published`."""

from typing import Any

from ieg_jax.errors import check_choice
from ieg_jax.methods import published
from ieg_jax.reproduce import results
from ieg_jax.reproduce.experiments import Table

TABLES = ("cifar10n",)  # those of CIFAR-10 with noise that papers have too


def beside_published(table: Table, gathered: dict[str, list[dict[str, Any]]], seeds: int) -> list[list[str]]:
    """Makes one line for each method that has a result, with the published accuracy and that of here for each noise.

    Args:
      table: one of TABLES.
      gathered: name of an experiment -> its finished runs.
      seeds: how many there should be; where there are fewer, their number is shown.

    Returns:
      Lines with equally many texts, headings first. A cell is `published · here`, in percent, – where there is none.
      The published number is that of the table in docs/methods.md, with its mark; that of here is of the last step, as
      mean ± standard deviation over the seeds.

    Raises:
      UserError: for another table.
    """
    check_choice("--published is for the table", table.name, TABLES)
    columns = {
        _setting(row.columns): " ".join(filter(None, [row.columns["noise"], str(row.columns["rate"])]))
        for row in table.rows
        if row.columns["noise"] not in ("any", "none")
    }
    here: dict[str, dict[tuple, str]] = {}
    for row in table.rows:
        runs, setting = gathered[row.experiment.name], _setting(row.columns)
        if runs and setting in columns:
            few = f" ({len(runs)})" if len(runs) < seeds else ""
            here.setdefault(row.columns["method"], {})[setting] = f"{results.spread(runs)}{few}"
    lines = [
        [f"`{method}`", *(f"{_printed(method, setting)} · {measured.get(setting, '–')}" for setting in columns)]
        for method, measured in here.items()
    ]
    return [["published · here", *columns.values()], *lines]


def _setting(columns: dict[str, Any]) -> tuple[str, str, float | None]:
    """The setting of a row as `published.Row` has it."""
    noise, rate = columns["noise"], columns["rate"]
    if noise in published.NOISE["cifar10n"]:
        return "cifar10n", noise, None
    return "cifar10", "symmetric" if noise == "uniform" else noise, rate or None


def _printed(method: str, setting: tuple[str, str, float | None]) -> str:
    """The published accuracy with its mark."""
    row = published.first(method, setting)
    return "–" if row is None else f"{row.accuracy} {published.EPOCHS[row.epoch]}".rstrip()
