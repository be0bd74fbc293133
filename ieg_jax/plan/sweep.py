"""Makes the variants of a configuration that are compiled beside it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from ieg_jax.plan import report
from ieg_jax.plan.roofline import largest_batch


def variants(config: ConfigDict, num_chips: int, names: list[str]) -> Iterator[ConfigDict]:
    """Yields the variants for remat and batch_groups, each with one key changed.

    Args:
      config: the configuration.
      num_chips: how many chips the mesh has.
      names: which variants are wanted, of remat and batch_groups; other names are ignored.
    """
    if "remat" in names:
        yield changed(config, "model.remat", not config.model.remat)
    if "batch_groups" in names:
        trusted = config.trusted.batch_size or config.batch_size
        for groups in (1, num_chips):
            possible = not (config.batch_size % groups or trusted % groups or groups % config.microbatches)
            if groups != config.batch_groups and possible:
                yield changed(config, "batch_groups", groups)


def sweep_batch(
    config: ConfigDict,
    first: Mapping[str, Any],
    compile_row: Callable[[ConfigDict], dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """Compiles half the batch, and then double the batch again and again as long as it fits.

    A batch that does not fit by the estimate is not tried, because the compiler takes minutes to say the same.

    Args:
      config: the configuration.
      first: the row of this configuration.
      compile_row: compiles a variant, and returns its row after adding it to `rows`.
      rows: the rows of all variants that were compiled.
    """
    unit = first["unit"]
    half = first["batch_size"] // 2
    if half and half % unit == 0:
        compile_row(changed(config, "batch_size", half))
    double = first["batch_size"] * 2
    while 0 < double <= largest(same_but_batch(rows, first)):
        if not compile_row(changed(config, "batch_size", double))["fits"]:
            break
        double *= 2


def same_but_batch(rows: list[dict[str, Any]], first: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows that differ from the first in the batch alone, and whose need of device memory is known."""
    keys = ("batch_groups", "remat", "microbatches", "dtype", "fsdp")
    return [row for row in rows if row["needed"] and all(row[key] == first[key] for key in keys)]


def largest(rows: list[dict[str, Any]]) -> int:
    """Estimates the largest batch that fits (`roofline.largest_batch`) from rows that differ in the batch alone.

    It returns -1 where there is no row.
    """
    if not rows:
        return -1
    needed = {row["batch_size"]: row["needed"] for row in rows}
    return largest_batch(needed, report.fixed_bytes(rows[0]), rows[0]["usable_bytes"], rows[0]["unit"])


def changed(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """Returns a copy of the configuration with one key changed."""
    copy = ConfigDict(config.copy_and_resolve_references())
    copy.update_from_flattened_dict({key: value})
    return copy
