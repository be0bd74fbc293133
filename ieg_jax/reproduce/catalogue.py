"""Every table of experiments by name."""

import fnmatch
import functools

from ieg_jax.errors import UserError
from ieg_jax.reproduce import experiments, leaderboard
from ieg_jax.reproduce.experiments import Experiment, Table


@functools.cache
def tables() -> dict[str, Table]:
    """Returns all tables by name, in the order in which they are listed."""
    return {table.name: table for table in [*experiments.own_tables(), *leaderboard.all_tables()]}


def find(target: str) -> tuple[Table, dict[str, Experiment]]:
    """Finds what `TABLE` or `TABLE.EXPERIMENT` names.

    Args:
      target: the name; in that of the experiment * stands for any characters.

    Returns:
      The table, and those of its experiments that are meant, by name.

    Raises:
      UserError: for a name that does not exist; the message lists those that do.
    """
    # The target cannot be split at a point, for names of tables and experiments can have points (text-3.3, rates).
    names = [name for name in tables() if target == name or target.startswith(f"{name}.")]
    if not names:
        raise UserError(f"{target!r}: no such table, expected one of {', '.join(tables())}, or TABLE.EXPERIMENT")
    table = tables()[max(names, key=len)]
    wanted = target[len(table.name) + 1 :]
    if not wanted:
        return table, table.experiments
    found = {name: experiment for name, experiment in table.experiments.items() if fnmatch.fnmatchcase(name, wanted)}
    if not found:
        raise UserError(f"{target!r}: table {table.name} has no {wanted!r}, but {', '.join(table.experiments)}")
    return table, found
