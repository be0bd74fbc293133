"""What was measured here beside what papers print."""

import re

import pytest
from etils import epath
from rich.console import Console
from runs import ROOT

from ieg_jax.errors import UserError
from ieg_jax.methods import published
from ieg_jax.reproduce import catalogue, compared, results, tables
from ieg_jax.reproduce.jobs import Changes


def finished(*accuracies):
    return [{"result": {"best_chosen_on": "test", "test_accuracy": accuracy}} for accuracy in accuracies]


def test_each_noise_is_beside_that_of_the_papers():
    table = catalogue.tables()["cifar10n"]
    gathered = {name: [] for name in table.experiments} | {
        "cifar10n-elr-worse": finished(0.75, 0.77),
        "cifar10n-elr-uniform-0.8": finished(0.6),
        "cifar10n-ieg-aggre": finished(0.7, 0.7),
        "cifar10n-trusted_only-none-0": finished(0.5, 0.5),
    }
    head, *lines = compared.beside_published(table, gathered, 2)
    assert head == ["published · here", "aggre", "random1", "worse", "uniform 0.4", "uniform 0.8", "asymmetric 0.4"]
    elr, uniform = (published.first("elr", setting) for setting in (("cifar10n", "worse", None),
                                                                    ("cifar10", "symmetric", 0.8)))  # fmt: skip
    assert lines[0][0] == "`elr`" and lines[0][1] == "– · –"
    assert lines[0][3] == f"{elr.accuracy} b · 76.0 ± 1.4" and elr.epoch == "best"
    assert lines[0][5] == f"{uniform.accuracy} · 60.0 (1)"
    assert [line[0] for line in lines] == ["`elr`", "`ieg`"] and lines[1][1] == "– · 70.0 ± 0.0"
    with pytest.raises(UserError, match="--published is for the table: got 'quick'"):
        compared.beside_published(catalogue.tables()["quick"], {}, 2)


def test_the_table_of_the_docs_is_that_of_the_runs_that_are_kept(monkeypatch, tmp_path, capsys):
    """Lines of the docs may be fewer, while runs of a further method come in."""
    monkeypatch.chdir(ROOT)
    store = results.Store(epath.Path(tmp_path), epath.Path(ROOT / "results"))
    table = catalogue.tables()["cifar10n"]
    tables.show_table(table, store, 3, Changes(False, [], []), False, "markdown", Console(), beside=True)
    printed = capsys.readouterr().out.splitlines()
    section = (ROOT / "docs" / "results.md").read_text().partition("### Published beside measured here")[2]
    shown = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    assert len(shown) > 6 and shown[0] == printed[0]
    assert [line for line in shown if line not in printed] == [], "the command below the table makes it anew"
