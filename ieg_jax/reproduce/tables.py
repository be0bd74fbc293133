"""Prints results beside the paper's numbers, as text, Markdown, CSV or LaTeX."""

import csv
import io
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from ieg_jax.reproduce import compared, jobs, results
from ieg_jax.reproduce.experiments import Row, Table

TEXTS = ("markdown", "csv", "latex")


def show_table(
    table: Table,
    store: results.Store,
    seeds: int,
    changes: jobs.Changes,
    across: bool,
    form: str,
    console: Console,
    beside: bool = False,
) -> None:
    """Prints a table.

    Args:
      table: the table.
      store: where the runs are.
      seeds: how many seeds each experiment has.
      changes: what the flags change of the experiments.
      across: True = one line for each method (`wide`); False = one line for each row (`long`).
      form: one of TEXTS, which go to standard output, or text for a table on the console.
      console: for the latter.
      beside: each method beside what papers print for it, in place of these (`compared.beside_published`).
    """
    gathered = {
        name: [run for seed in range(seeds) if (run := store.find(changes.of(experiment), seed)) is not None]
        for name, experiment in table.experiments.items()
    }
    if beside:
        lines = compared.beside_published(table, gathered, seeds)
    else:
        lines = wide(table, gathered, seeds) if across else long(table, gathered)
    if form in TEXTS:
        print({"markdown": markdown, "csv": as_csv, "latex": latex}[form](lines), end="")
        return
    shown = RichTable(title=f"{table.name}: {table.title}", caption=_caption(gathered), title_justify="left")
    for heading in lines[0]:
        shown.add_column(heading)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)


def long(table: Table, gathered: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Makes one line for each row: what it is, the paper's number, ours, and the difference.

    Args:
      table: the table.
      gathered: name of an experiment -> its finished runs.

    Returns:
      Lines with equally many texts, headings first. Accuracies are in percent, mean ± standard deviation over the
      seeds.
    """
    with_paper = any(row.paper for row in table.rows)
    headings = list(dict.fromkeys(heading for row in table.rows for heading in row.columns))
    lines = [[*headings, *(["paper"] if with_paper else []), "seeds", *results.MEASURES]]
    lines[0] += ["last − paper"] if with_paper else []
    for row in table.rows:
        line = [str(row.columns.get(heading, "")) for heading in headings]
        line += [paper(row)] if with_paper else []
        found = gathered[row.experiment.name] if row.experiment else []
        if row.experiment is None:
            line += ["no such method here", "", "", ""]
        elif not found:
            line += ["not run", "", "", ""]
        else:
            line += [str(len(found)), *(str(results.spread(found, measure) or "") for measure in results.MEASURES)]
        if with_paper:
            ours = results.spread(found)
            line.append(f"{ours.mean - row.paper['top1']:+.1f}" if ours and row.paper else "")
        lines.append(line)
    return lines


def wide(table: Table, gathered: dict[str, list[dict[str, Any]]], seeds: int) -> list[list[str]]:
    """Makes one line for each method (and network, ...), with the accuracy at the last step for each noise in a column.

    Args:
      table: the table.
      gathered: name of an experiment -> its finished runs.
      seeds: how many there should be; where there are fewer, their number is shown.

    Returns:
      Lines as those of `long`. A result that holds for any noise is repeated in each column.
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
        shown = str(results.spread(found) or ("not run" if row.experiment else "–"))
        shown += f" ({len(found)})" if 0 < len(found) < seeds else ""
        if row.paper:
            shown += f" [{paper(row)}]"
        for column in columns if row in any_noise else [across(row)]:
            content.setdefault(down(row), {})[column] = shown
    return [[*headings, *columns], *([*name, *(line.get(c, "") for c in columns)] for name, line in content.items())]


def markdown(lines: list[list[str]]) -> str:
    """Returns the lines, headings first, as a Markdown table."""
    escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
    rows = ["| " + " | ".join(line) + " |" for line in escaped]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]]) + "\n"


def as_csv(lines: list[list[str]]) -> str:
    """Returns the lines, headings first, as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def latex(lines: list[list[str]]) -> str:
    """Returns the lines, headings first, as a LaTeX tabular with the rules of booktabs."""

    def line(values: list[str]) -> str:
        for plain, escaped in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
            values = [value.replace(plain, escaped) for value in values]
        return " & ".join(value.replace("±", r"$\pm$").replace("−", "$-$") for value in values) + r" \\"

    body = [line(values) for values in lines[1:]]
    begin = [rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", line(lines[0]), r"\midrule"]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def name(row: Row) -> str:
    """Returns the columns of a row, joined by spaces."""
    return " ".join(str(value) for value in row.columns.values() if value != "")


def paper(row: Row) -> str:
    """Returns the paper's number of a row with as many digits as it prints, "" where it prints none."""
    if not row.paper:
        return ""
    top1, std, top5 = (row.paper.get(key) for key in ("top1", "std", "top5"))
    shown = _digits(top1) + (f" ± {_digits(std)}" if std is not None else "")
    return shown + (f" / {_digits(top5)}" if top5 is not None else "")


def _digits(value: float) -> str:
    """Formats a number with one decimal, or with two where the paper prints two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _caption(gathered: dict[str, list[dict[str, Any]]]) -> str:
    found = [run for runs in gathered.values() for run in runs]
    if not found:
        return "nothing was run yet"
    dates = sorted(run["date"] for run in found)
    kinds = sorted({run["result"]["device_kind"] for run in found})
    names = sorted({run["result"]["best_chosen_on"] for run in found})
    versions = sorted({run["result"]["versions"]["jax"] for run in found})
    return (
        f"accuracy in % on the {' and '.join(names)} set, averaged weights, mean ± standard deviation over seeds; "
        f"{dates[0]} to {dates[-1]}, {', '.join(kinds)}, jax {', '.join(versions)}"
    )
