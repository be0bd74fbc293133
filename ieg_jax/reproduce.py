"""The command that runs experiments and lines the results up against the paper.

    python -m ieg_jax.reproduce list [TABLE]            rows: command, work, state
    python -m ieg_jax.reproduce run TABLE[.EXPERIMENT]  what is not finished yet; again to go on after a stop
    python -m ieg_jax.reproduce table TABLE             mean ± std over the seeds beside the paper's number
    python -m ieg_jax.reproduce figure NAME             PNG and SVG, the paper's curves and points beside ours

Tables: those of the paper, its figures' runs (figure-1, ...), fashion, digits-sweep, digits-ablation, quick. Each run
has a work folder of its own below --workdir; what is finished is kept as a small JSON file below --results as well.
"""

import concurrent.futures
import csv
import dataclasses
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table as RichTable

from ieg_jax import cells, cli, experiments
from ieg_jax.errors import UserError, check_choice
from ieg_jax.experiments import Experiment, Row, Table

FLAGS = flags.FLAGS
INTERRUPTED = "each run saved its state; the same command goes on from there"
COMMANDS = ("list", "run", "table", "figure")
# What --scale=tiny sets. Networks of a depth and a width that can be chosen become small.
TINY = {
    "batch_size": 16,
    "num_train_epochs": 0.0,
    "num_train_steps": 20,
    "schedule.first_cycle_epochs": 0.0,
    "schedule.first_cycle_steps": 20,
    "log_every_epochs": 0.0,
    "log_every_steps": 10,
    "eval_every_epochs": 0.0,
    "eval_every_steps": 20,
    "checkpoint_every_epochs": 0.0,
    "checkpoint_every_steps": 20,
    "model.width": 1 / 16,
}


def define_flags() -> None:
    """Defines the command's flags; not when it is imported, for other commands have flags of the same names."""
    flags.DEFINE_integer("seeds", 3, "How many seeds: 0, 1, ...", lower_bound=1)
    flags.DEFINE_enum(
        "scale", "full", ["full", "tiny"], "tiny: small networks, few steps, to see that all is in place; never kept."
    )
    flags.DEFINE_integer("jobs", 1, "Runs at a time; the processors are divided among them.", lower_bound=1)
    flags.DEFINE_bool("dry-run", False, "Print the commands that would be run, and run nothing.")
    flags.DEFINE_multi_string("set", [], "key=value for every run, such as data.dir=/data/cifar; repeatable.")
    flags.DEFINE_multi_string(
        "foreign", [], "name:folder, where a source of foreign images of open-set noise is; repeatable."
    )
    flags.DEFINE_string("workdir", "runs/reproduce", "Parent of the work folders; local or on a bucket.")
    flags.DEFINE_string("results", "results", 'Where finished runs are kept as JSON files; "" = nowhere.')
    flags.DEFINE_enum("format", "text", ["text", "markdown", "csv", "latex"], "Of the table.")
    flags.DEFINE_bool("wide", False, "Of the table: one line per method, one column per noise.")
    flags.DEFINE_string("out", "figures", "Folder for the figures.")
    flags.DEFINE_string("chip", "", "Of the list: estimate the time on this chip: v5e, A100, H100, ...")
    flags.DEFINE_integer("chips", 1, "Of the list: how many of them.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Does what the first argument says, for the table that the second names."""
    command, target = (*argv[1:], "", "")[:2]
    check_choice("the first argument", command, COMMANDS)
    store = cells.Store(epath.Path(FLAGS.workdir), epath.Path(FLAGS.results) if FLAGS.results else None)
    if FLAGS.scale == "tiny":
        store = cells.Store(store.workdir / "tiny", None)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if command == "list":
        show_list([experiments.find(target)[0]] if target else experiments.tables().values(), store, console)
        return
    if not target:
        raise UserError(f"{command}: the name of a table is missing, one of {', '.join(experiments.tables())}")
    if command == "run":
        run(experiments.find(target)[1], store, console)
    elif command == "table":
        show_table(experiments.find(target)[0], store, console)
    else:
        from ieg_jax import figures

        for path in figures.draw(target, store, FLAGS.seeds, epath.Path(FLAGS.out)):
            console.print(path)


def scaled(experiment: Experiment) -> Experiment:
    """The experiment as --scale, --set and --foreign have it.

    Raises:
      UserError: for a --set that is no key=value, or a key that there is not.
    """
    keys = dict(experiment.keys)
    if "noise.open_set" in keys:
        places = {place.partition(":")[0]: place for place in FLAGS.foreign}
        keys["noise.open_set"] = ",".join(places.get(name, name) for name in keys["noise.open_set"].split(","))
    if FLAGS.scale == "tiny":
        keys |= TINY | ({"model.depth": 10} if "model=wrn" in experiment.config else {})
    known = None
    for pair in FLAGS.set:
        key, separator, value = pair.partition("=")
        known = known or cells.flat(cells.load_config(experiment, 0).to_dict())
        if not separator or key not in known:
            raise UserError(f"--set={pair}: expected key=value with a key of configs/default.py")
        kind = type(known[key])
        if kind not in (str, int, float):
            raise UserError(f"--set={pair}: expected the key of a text or a number")
        try:
            keys[key] = kind(value)
        except ValueError:
            raise UserError(f"--set={pair}: expected {kind.__name__}") from None
    return dataclasses.replace(experiment, keys=keys)


def command_line(experiment: Experiment, seed: int, folder: epath.Path) -> list[str]:
    """The command of one run."""
    keys = [f"--config.{key}={value}" for key, value in experiment.keys.items()]
    config = f"--config={experiment.specification(seed)}"
    return ["python", "-m", "ieg_jax.main", config, *keys, f"--workdir={folder}"]


# ---- run


def run(wanted: dict[str, Experiment], store: cells.Store, console: Console) -> None:
    """Runs every experiment with every seed, `--jobs` at a time, and skips what is finished.

    A run that fails does not stop the others; its last lines are shown.

    Raises:
      UserError: before anything is run, where a configuration, a key or a finished run with other settings is in the
        way; at the end, where runs failed.
    """
    pending, finished = [], 0
    for seed in range(FLAGS.seeds):
        for experiment in map(scaled, wanted.values()):
            if store.find(experiment, seed) is None:
                pending.append((experiment, seed))
            else:
                finished += 1
    console.print(f"{finished + len(pending)} runs, {finished} finished already, {len(pending)} to do")
    if FLAGS["dry-run"].value:
        for experiment, seed in pending:
            line = shlex.join(command_line(experiment, seed, store.work_folder(experiment, seed)))
            console.print(line, soft_wrap=True, highlight=False)
        return
    # As Ctrl-C: a signal to this process alone would leave the runs behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped; {INTERRUPTED}"))
    failed = set()
    jobs = _Jobs(min(FLAGS.jobs, max(1, len(pending))))
    with concurrent.futures.ThreadPoolExecutor(jobs.count) as pool:
        futures = {pool.submit(jobs.run, command_line(e, s, store.work_folder(e, s))): (e, s) for e, s in pending}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                experiment, seed = futures[future]
                code, tail = future.result()
                what = f"[{number}/{len(pending)}] {experiment.name}, seed {seed}"
                if code:
                    failed.add((experiment.name, seed))
                    console.print(f"{what}: failed\n{tail}", highlight=False, markup=False)
                    continue
                cell = store.keep(experiment, seed)
                result = cell["result"]
                accuracy = cells.spread([cell])
                console.print(f"{what}: {accuracy} %, {result['wall_seconds']:.0f} s", highlight=False, markup=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            jobs.stop()  # each run saves its state and ends; the same command goes on from there
            raise
    if failed:
        names = "; ".join(f"{name}, seed {seed}" for name, seed in sorted(failed))
        raise UserError(f"{len(failed)} of {len(pending)} runs failed: {names}")


class _Jobs:
    """Runs commands as processes, each on its share of the processors."""

    def __init__(self, count: int):
        self.count = count
        processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares = [set(processors[i::count]) for i in range(count)] if len(processors) >= count > 1 else []
        self._free = list(range(count))
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, command: list[str]) -> tuple[int, str]:
        """Runs it to its end; returns the exit status and the last lines that it printed (none of a single job)."""
        with self._lock:
            slot = self._free.pop()
        try:
            if self._shares:  # of this thread, from which the new process inherits it
                os.sched_setaffinity(0, self._shares[slot])
            with tempfile.TemporaryFile("w+") as output:
                streams = {} if self.count == 1 else {"stdout": output, "stderr": output}
                process = subprocess.Popen([sys.executable, *command[1:]], **streams)
                with self._lock:
                    self._running.add(process)
                code = process.wait()
                output.seek(0)
                return code, "".join(output.readlines()[-15:])
        finally:
            with self._lock:
                self._free.append(slot)
                self._running.discard(process)

    def stop(self) -> None:
        """Asks every process to save its state and to end."""
        with self._lock:
            for process in self._running:
                process.terminate()


# ---- list


def show_list(tables: Iterable[Table], store: cells.Store, console: Console) -> None:
    """Prints for every row of the tables what it takes and how far it is."""
    from ieg_jax import hardware, work  # imports jax

    chip = None
    if FLAGS.chip:
        known = {chip.name: chip for chip in (*hardware.TPUS.values(), *hardware.GPUS.values())}
        check_choice("--chip", FLAGS.chip, known)
        chip = known[FLAGS.chip]
    for table in tables:
        console.print(f"\n{table.name}: {table.title}", style="bold", highlight=False)
        for row in table.rows:
            paper = f"paper {_paper(row)}" if row.paper else ""
            if row.experiment is None:
                console.print(f"- {_name(row)} · {paper} · no such method here", highlight=False, markup=False)
                continue
            experiment = scaled(row.experiment)
            flops = work.training_flops(cells.load_config(experiment, 0))
            hours = f"{flops / (chip.peak_flops * work.UTILIZATION * FLAGS.chips) / 3600:.1f} h" if chip else ""
            states = [store.state(experiment, seed) for seed in range(FLAGS.seeds)]
            parts = [experiment.name, f"{flops:.1e} FLOPs", hours, paper, _progress(states)]
            console.print(f"- {' · '.join(filter(None, parts))}", highlight=False, markup=False, soft_wrap=True)
            command = shlex.join(command_line(experiment, 0, store.work_folder(experiment, 0)))
            missing = [f"--config.{key}=…" for key in experiment.needs if key not in experiment.keys]
            console.print(" ".join(["   ", command, *missing]), highlight=False, markup=False, soft_wrap=True)
    if chip:
        console.print(
            f"hours: of one seed on {FLAGS.chips} {chip.name} at {work.UTILIZATION:.0%} of the peak; an estimate, "
            f"python -m ieg_jax.plan compiles the step"
        )


# ---- table


def show_table(table: Table, store: cells.Store, console: Console) -> None:
    """Prints the table in the format that --format says."""
    gathered = {
        name: [cell for seed in range(FLAGS.seeds) if (cell := store.find(scaled(experiment), seed)) is not None]
        for name, experiment in table.experiments.items()
    }
    lines = wide(table, gathered, FLAGS.seeds) if FLAGS.wide else long(table, gathered)
    text = {"markdown": markdown, "csv": as_csv, "latex": latex}
    if FLAGS.format in text:
        print(text[FLAGS.format](lines), end="")
        return
    shown = RichTable(title=f"{table.name}: {table.title}", caption=_caption(gathered), title_justify="left")
    for heading in lines[0]:
        shown.add_column(heading)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)


def long(table: Table, gathered: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """One line for each row: what it is, the paper's number, ours, and the difference.

    Args:
      table: the rows.
      gathered: experiment -> its finished cells.

    Returns:
      Lines of equal length, headings first. Accuracies in percent, mean ± standard deviation over the seeds.
    """
    with_paper = any(row.paper for row in table.rows)
    headings = list(table.rows[0].columns)
    lines = [[*headings, *(["paper"] if with_paper else []), "seeds", *cells.MEASURES]]
    lines[0] += ["last − paper"] if with_paper else []
    for row in table.rows:
        line = [str(row.columns.get(heading, "")) for heading in headings]
        line += [_paper(row)] if with_paper else []
        found = gathered[row.experiment.name] if row.experiment else []
        if row.experiment is None:
            line += ["no such method here", "", "", ""]
        elif not found:
            line += ["not run", "", "", ""]
        else:
            line += [str(len(found)), *(str(cells.spread(found, measure) or "") for measure in cells.MEASURES)]
        if with_paper:
            ours = cells.spread(found)
            line.append(f"{ours.mean - row.paper['top1']:+.1f}" if ours and row.paper else "")
        lines.append(line)
    return lines


def wide(table: Table, gathered: dict[str, list[dict[str, Any]]], seeds: int) -> list[list[str]]:
    """One line for each method (and network, ...), one column for each noise; the accuracy at the last step.

    Args:
      table: the rows.
      gathered: experiment -> its finished cells.
      seeds: how many there should be; where there are less, their number is shown.

    Returns:
      As `long`. A row for any noise is repeated in each column.
    """

    def across(row: Row) -> str:
        noise, rate = row.columns.get("noise", ""), row.columns.get("rate", "")
        return " ".join(filter(None, [str(noise), str(rate)]))

    def down(row: Row) -> tuple[str, ...]:
        return tuple(str(value) for key, value in row.columns.items() if key not in ("noise", "rate"))

    any_noise = [row for row in table.rows if "any" in (row.columns.get("noise"), row.columns.get("rate"))]
    columns = list(dict.fromkeys(across(row) for row in table.rows if row not in any_noise))
    headings = [key for key in table.rows[0].columns if key not in ("noise", "rate")]
    content: dict[tuple[str, ...], dict[str, str]] = {}
    for row in table.rows:
        found = gathered[row.experiment.name] if row.experiment else []
        shown = str(cells.spread(found) or ("not run" if row.experiment else "–"))
        shown += f" ({len(found)})" if 0 < len(found) < seeds else ""
        if row.paper:
            shown += f" [{_paper(row)}]"
        for column in columns if row in any_noise else [across(row)]:
            content.setdefault(down(row), {})[column] = shown
    return [[*headings, *columns], *([*name, *(line.get(c, "") for c in columns)] for name, line in content.items())]


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table; headings first."""
    escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
    rows = ["| " + " | ".join(line) + " |" for line in escaped]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]]) + "\n"


def as_csv(lines: list[list[str]]) -> str:
    """Comma-separated values; headings first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def latex(lines: list[list[str]]) -> str:
    """A LaTeX tabular with the rules of booktabs; headings first."""

    def line(values: list[str]) -> str:
        for plain, escaped in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
            values = [value.replace(plain, escaped) for value in values]
        return " & ".join(value.replace("±", r"$\pm$").replace("−", "$-$") for value in values) + r" \\"

    body = [line(values) for values in lines[1:]]
    begin = [rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", line(lines[0]), r"\midrule"]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _progress(states: list[str]) -> str:
    """The states of the seeds of one experiment, in words."""
    if set(states) == {"not run"}:
        return "not run"
    others = [state for state in states if state not in ("done", "not run")]
    return ", ".join([f"{states.count('done')} of {len(states)} seeds", *others])


def _name(row: Row) -> str:
    return " ".join(str(value) for value in row.columns.values() if value != "")


def _paper(row: Row) -> str:
    if not row.paper:
        return ""
    top1, std, top5 = (row.paper.get(key) for key in ("top1", "std", "top5"))
    shown = _digits(top1) + (f" ± {_digits(std)}" if std is not None else "")
    return shown + (f" / {_digits(top5)}" if top5 is not None else "")


def _digits(value: float) -> str:
    """With as many decimals as were printed: one or two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _caption(gathered: dict[str, list[dict[str, Any]]]) -> str:
    found = [cell for cells_of_one in gathered.values() for cell in cells_of_one]
    if not found:
        return "nothing was run yet"
    dates = sorted(cell["date"] for cell in found)
    kinds = sorted({cell["result"]["device_kind"] for cell in found})
    names = sorted({cell["result"]["best_chosen_on"] for cell in found})
    versions = sorted({cell["result"]["versions"]["jax"] for cell in found})
    return (
        f"accuracy in % on the {' and '.join(names)} set, averaged weights, mean ± standard deviation over seeds; "
        f"{dates[0]} to {dates[-1]}, {', '.join(kinds)}, jax {', '.join(versions)}"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted=INTERRUPTED, positional=2)
