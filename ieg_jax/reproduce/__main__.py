"""Runs experiments and shows their results beside the paper's.

    python -m ieg_jax.reproduce list [TABLE]            shows the command, the cost and the state of every row
    python -m ieg_jax.reproduce run TABLE[.EXPERIMENT]  runs what is not finished; a run that was stopped goes on
    python -m ieg_jax.reproduce table TABLE             shows mean ± std over the seeds beside the paper's number
    python -m ieg_jax.reproduce figure NAME             draws our curves beside the paper's, as PNG and SVG
    python -m ieg_jax.reproduce leaderboard [tune-DATA] prints docs/leaderboard.md, or what a search for settings found

The tables are the paper's, those of its figures (figure-1, ...), fashion, fashion-mlp, cifar10-small, cifar10n,
digits-sweep, digits-ablation and quick, and of every method leaderboard-DATA and tune-DATA. Finished runs are also
kept in --results, as small files.
"""

import sys

from absl import flags
from etils import epath
from rich.console import Console

from ieg_jax import cli
from ieg_jax.errors import UserError, check_choice
from ieg_jax.reproduce import submit

INTERRUPTED = "each run saved its state; the same command goes on from there"
COMMANDS = ("list", "run", "table", "figure", "leaderboard")


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    flags.DEFINE_integer("seeds", 3, "How many seeds: 0, 1, ...", lower_bound=1)
    flags.DEFINE_enum(
        "scale", "full", ["full", "tiny"], "tiny: small networks, few steps, to see that all is in place; never kept."
    )
    flags.DEFINE_integer("jobs", 1, "How many runs at a time; 0 = in this process, one after the other.", lower_bound=0)
    flags.DEFINE_bool("keep_memory", False, "Run: as the flag of that name of ieg_jax.main.")
    flags.DEFINE_bool("dry-run", False, "Print the commands of the runs, scripts or manifests; run nothing.")
    submit.define_flags()
    flags.DEFINE_multi_string("set", [], "key=value for every run, such as data.dir=/data/cifar; repeatable.")
    flags.DEFINE_multi_string(
        "foreign", [], "name:folder, where the images of a source of open-set noise are; repeatable."
    )
    flags.DEFINE_string("workdir", "runs/reproduce", "Parent of the work folders; local or on a bucket.")
    flags.DEFINE_string("results", "results", 'Where finished runs are kept as JSON files; "" = nowhere.')
    flags.DEFINE_enum("format", "text", ["text", "markdown", "csv", "latex"], "How the table is printed.")
    flags.DEFINE_bool("wide", False, "Table: one line for each method, one column for each noise.")
    flags.DEFINE_bool("published", False, "Table cifar10n: beside what papers print for networks trained from scratch.")
    flags.DEFINE_string("out", "figures", "Folder for the figures.")
    flags.DEFINE_string("chip", "", "List: estimate the time on this chip: v5e, A100, H100, ...")
    flags.DEFINE_integer("chips", 1, "List: how many of these chips.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Does what the first argument says, for the table that the second names."""
    command, target = (*argv[1:], "", "")[:2]
    check_choice("the first argument", command, COMMANDS)
    cluster = submit.cluster(flags.FLAGS) if command == "run" else None
    # These import jax, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax.reproduce import catalogue, figures, jobs, leaderboard, listing, results, tables

    values = flags.FLAGS
    tiny = values.scale == "tiny"
    changes = jobs.Changes(tiny, values.set, values.foreign)
    store = results.store(values.workdir, values.results, tiny)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if command == "leaderboard":
        print(leaderboard.choose(target, store) if target else leaderboard.page(store, values.seeds), end="")
        return
    if not target and command != "list":
        raise UserError(f"{command}: the name of a table is missing, one of {', '.join(catalogue.tables())}")
    if command == "figure":
        console.print(*figures.draw(target, store, values.seeds, epath.Path(values.out)), sep="\n")
        return
    chosen = [catalogue.find(target)] if target else [(table, {}) for table in catalogue.tables().values()]
    if command == "list":
        wanted = [table for table, _ in chosen]
        listing.show_list(wanted, store, values.seeds, changes, values.chip, values.chips, console)
        return
    ((table, named),) = chosen
    jobs.check_places(changes, named.values())
    if command == "run":
        wanted, dry_run = map(changes.of, named.values()), values["dry-run"].value
        jobs.run(wanted, store, values.seeds, values.jobs, dry_run, console, cluster, values.keep_memory)
    else:
        tables.show_table(table, store, values.seeds, changes, values.wide, values.format, console, values.published)


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted=INTERRUPTED, positional=2)
