"""Prints the list of experiments, each with its command, its cost and its state."""

import shlex
from collections.abc import Iterable

from rich.console import Console

from ieg_jax import hardware
from ieg_jax.errors import check_choice
from ieg_jax.reproduce import cost, jobs, results, tables
from ieg_jax.reproduce.experiments import Table


def show_list(
    wanted: Iterable[Table],
    store: results.Store,
    seeds: int,
    changes: jobs.Changes,
    chip_name: str,
    chips: int,
    console: Console,
) -> None:
    """Prints for every row of the tables what it costs and how far its runs are.

    Args:
      wanted: tables.
      store: where the runs are.
      seeds: how many seeds each experiment has.
      changes: what the flags change of the experiments.
      chip_name: the chip for which hours are estimated, "" = none.
      chips: how many of these chips.
      console: where to print.

    Raises:
      UserError: for a chip that is not known.
    """
    chip = None
    if chip_name:
        known = {chip.name: chip for chip in (*hardware.TPUS.values(), *hardware.GPUS.values())}
        check_choice("--chip", chip_name, known)
        chip = known[chip_name]
    for table in wanted:
        console.print(f"\n{table.name}: {table.title}", style="bold", highlight=False)
        for row in table.rows:
            paper = f"paper {tables.paper(row)}" if row.paper else ""
            if row.experiment is None:
                console.print(f"- {tables.name(row)} · {paper} · no such method here", highlight=False, markup=False)
                continue
            experiment = changes.of(row.experiment)
            flops = cost.training_flops(results.load_config(experiment, 0))
            hours = f"{flops / (chip.peak_flops * cost.UTILIZATION * chips) / 3600:.1f} h" if chip else ""
            states = [store.state(experiment, seed) for seed in range(seeds)]
            parts = [experiment.name, f"{flops:.1e} FLOPs", hours, paper, _progress(states)]
            console.print(f"- {' · '.join(filter(None, parts))}", highlight=False, markup=False, soft_wrap=True)
            command = shlex.join(jobs.command_line(experiment, 0, store.work_folder(experiment, 0)))
            missing = [f"--config.{key}=…" for key in experiment.needs if key not in experiment.keys]
            console.print(" ".join(["   ", command, *missing]), highlight=False, markup=False, soft_wrap=True)
    if chip:
        console.print(
            f"hours: of one seed on {chips} {chip.name} at {cost.UTILIZATION:.0%} of the peak; an estimate, "
            f"python -m ieg_jax.plan compiles the step"
        )


def _progress(states: list[str]) -> str:
    """Puts the states of one experiment's seeds into words."""
    if set(states) == {"not run"}:
        return "not run"
    others = [state for state in states if state not in ("done", "not run")]
    return ", ".join([f"{states.count('done')} of {len(states)} seeds", *others])
