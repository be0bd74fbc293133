"""The command: what it runs, what it skips, and what it shows of what is there."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from compilation import FAST_COMPILATION
from etils import epath
from finished_runs import write_run
from PIL import Image
from rich.console import Console
from runs import CACHE, ROOT, assert_same_run

from ieg_jax import methods
from ieg_jax.errors import UserError
from ieg_jax.reproduce import catalogue, experiments, figures, jobs, results, tables
from ieg_jax.reproduce.experiments import Experiment, Row, Table
from ieg_jax.reproduce.jobs import Changes, check_places


def command(*arguments, code=0):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    }
    arguments = [sys.executable, "-m", "ieg_jax.reproduce", *map(str, arguments)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_run_skips_what_is_done(tmp_path):
    one = "digits-ablation.digits-supervised-0.4"
    target = ("digits-sweep.digits-supervised-0.4", f"--workdir={tmp_path / 'work'}", f"--results={tmp_path / 'kept'}")
    text = command("run", *target, "--scale=tiny", "--seeds=2", "--jobs=2")
    assert "2 runs, 0 finished already, 2 to do" in text and "[2/2] digits-supervised-0.4, seed " in text
    for seed in range(2):
        result = json.loads(
            (tmp_path / "work" / "tiny" / "digits-supervised-0.4" / str(seed) / "result.json").read_text()
        )
        assert (result["steps"], result["seed"], result["noise_rate"]) == (20, seed, 0.4)
    assert not (tmp_path / "kept").exists(), "a tiny run is no result"
    text = command("run", *target, "--scale=tiny", "--seeds=3", "--dry-run")
    assert "3 runs, 2 finished already, 1 to do" in text
    (line,) = [line for line in text.splitlines() if line.startswith("python -m ieg_jax.main")]
    assert "--config=configs/digits.py:method=supervised,noise_rate=0.4,seed=2" in line
    assert f"--workdir={tmp_path / 'work' / 'tiny' / 'digits-supervised-0.4' / '2'}" in line
    assert "--config.num_train_steps=20" in line
    assert "not run" in command("table", "digits-sweep", *target[1:], "--format=markdown")
    assert "table digits-ablation has no" in command("run", one, code=1)


def test_runs_in_one_process_are_those_of_processes_of_their_own(tmp_path, monkeypatch):
    """One after the other, each as if it were alone; one that fails does not stop the others."""
    monkeypatch.setattr("ieg_jax.cli.COMPILATION_CACHE", "")
    names = ("fashion.fashion-l2r-uniform-0.4", "digits-sweep.digits-supervised-0.4")
    fails, runs = (next(iter(catalogue.find(name)[1].values())) for name in names)
    fails, runs = (
        Changes(tiny=True, keys=["mesh.data=1", *keys]).of(one)
        for one, keys in ((fails, ["data.dir=/nowhere"]), (runs, []))
    )
    console = Console(file=io.StringIO(), width=200)
    both, alone = (
        results.Store(epath.Path(tmp_path / name), epath.Path(tmp_path / f"{name}-kept")) for name in ("both", "alone")
    )
    with pytest.raises(UserError, match="1 of 2 runs failed: fashion-l2r-uniform-0.4, seed 0$"):
        jobs.run([fails, runs], both, 1, 0, False, console)
    jobs.run([runs], alone, 1, 0, False, console)
    text = console.file.getvalue()
    assert "2 runs, 0 finished already, 2 to do" in text and "/nowhere" in text
    assert "[2/2] digits-supervised-0.4, seed 0: " in text and "[1/1] digits-supervised-0.4, seed 0: " in text
    assert_same_run(*(store.work_folder(runs, 0) for store in (both, alone)), 20)
    assert (tmp_path / "both-kept" / "digits-supervised-0.4" / "0.json").exists()


@pytest.mark.parametrize("afterwards, fails", [("running", False), ("failed", True)])
def test_a_run_that_another_command_took_at_the_same_moment_has_not_failed(afterwards, fails, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("another process trains here")

    monkeypatch.setattr("ieg_jax.cli.COMPILATION_CACHE", "")
    monkeypatch.setattr("ieg_jax.train.loop.train_and_evaluate", refuse)
    stages = iter(("not run", "not run", afterwards))
    monkeypatch.setattr(results.Store, "stage", lambda *_: next(stages))
    (one,) = catalogue.find("digits-sweep.digits-supervised-0.4")[1].values()
    store, console = results.Store(epath.Path(tmp_path), None), Console(file=io.StringIO())
    with pytest.raises(UserError, match="1 of 1 runs failed") if fails else contextlib.nullcontext():
        jobs.run([one], store, 1, 0, False, console)


@pytest.mark.parametrize("keep_memory", [True, False])
def test_runs_keep_their_memory_where_it_is_asked_for(keep_memory, tmp_path, monkeypatch):
    """As a flag of each command, and in one process before any of the runs."""
    monkeypatch.setattr("ieg_jax.cli.COMPILATION_CACHE", "")
    happened = []
    monkeypatch.setattr("ieg_jax.runtime.allocation.prepare", lambda: happened.append("prepared"))
    monkeypatch.setattr("ieg_jax.train.loop.train_and_evaluate", lambda *_, **__: happened.append("trained"))
    result = {"test_accuracy": 0.5, "best_chosen_on": "test", "wall_seconds": 1.0}
    monkeypatch.setattr(results.Store, "keep", lambda *_: {"result": result})
    (one,) = catalogue.find("digits-sweep.digits-supervised-0.4")[1].values()
    store, console = results.Store(epath.Path(tmp_path), None), Console(file=io.StringIO(), width=400)
    jobs.run([one], store, 1, 1, True, console, keep_memory=keep_memory)
    assert ("--keep_memory" in console.file.getvalue()) == keep_memory
    jobs.run([one], store, 1, 0, False, console, keep_memory=keep_memory)
    assert happened == ["prepared"] * keep_memory + ["trained"]


@pytest.mark.slow
def test_a_run_that_fails_is_shown(tmp_path):
    arguments = ("fashion.fashion-supervised-uniform-0.4", f"--workdir={tmp_path / 'work'}", "--scale=tiny")
    for count in (1, 2):  # as many seeds: each takes its time to start
        text = command("run", *arguments, f"--seeds={count}", f"--jobs={count}", "--set=data.dir=/nowhere", code=1)
        assert f"error: {count} of {count} runs failed: fashion-supervised-uniform-0.4, seed 0" in text
        assert "/nowhere" in text


@pytest.mark.slow
def test_sigterm_stops_the_runs_too(tmp_path):
    target = ("digits-sweep.digits-supervised-0.4", "--seeds=2", "--jobs=2", "--results=", f"--workdir={tmp_path}")
    arguments = [sys.executable, "-m", "ieg_jax.reproduce", "run", *target]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILATION}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    folders = [tmp_path / "digits-supervised-0.4" / str(seed) for seed in range(2)]
    deadline = time.monotonic() + 120
    while not all((folder / "config.json").exists() for folder in folders):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(120) == 1
    assert "each run saved its state" in (tmp_path / "log.txt").read_text()
    with pytest.raises(ProcessLookupError):  # no process of the session is left
        os.killpg(process.pid, 0)
    assert not any((folder / "result.json").exists() for folder in folders), "stopped before their end"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "the first argument: got '', expected one of list, run, table, figure"),
        (("train",), "the first argument: got 'train', expected one of list"),
        (("run",), "run: the name of a table is missing, one of 1, 2"),
        (("table", "1", "2"), "unexpected arguments ['2']"),
        (("figure", "7"), "figure: got '7', expected one of 1, 2, A1"),
        (("run", "1", "--dry-run", "--set=data.dri=x"), "--set=data.dri=x: expected key=value with a key of"),
        (("run", "1", "--dry-run", "--set=seed=x"), "--set=seed=x: expected int"),
        (("list", "1", "--chip=v9"), "--chip: got 'v9', expected one of v2"),
    ],
)
def test_what_cannot_be_done(arguments, message):
    assert f"error: {message}" in command(*arguments, code=1)


def test_foreign_images_of_each_row():
    arguments = ("run", "A1", "--seeds=1", "--dry-run", "--foreign=imagenet:/data/imagenet")
    lines = [line for line in command(*arguments).splitlines() if "ieg-wrn28_10-open-set" in line]
    found = [re.search(r"--config.noise.open_set=(\S*)", line)[1] for line in lines]
    assert found == ["cifar100", "cifar100,imagenet:/data/imagenet", "imagenet:/data/imagenet"]


@pytest.mark.slow
def test_list_with_hours():
    text = command("list", "7", "--chip=v5e", "--chips=4")
    assert "- cifar100-ieg-wrn28_10-uniform-0.8-10 · 4.2e+18 FLOPs · 3.7 h · paper 75.42 · not run" in text
    # 22 passes, 2 · 4.77e9 operations, 100 images, 200,000 steps; 4 chips of 197e12 at 40 %.
    hours = 22 * 2 * 4.77e9 * 100 * 200_000 / (4 * 197e12 * 0.4) / 3600
    assert hours == pytest.approx(3.7, abs=0.05)
    assert "--config=configs/cifar100.py:noise=uniform,noise_rate=0.8,model=wrn28_10" in text


def test_list():
    text = command("list", "1")
    # 4 passes where gce has 3.
    assert "- cifar10-mentornet_dd-wrn28_10-uniform-0.2-500 · 7.6e+17 FLOPs · paper 92.0 · not run" in text
    assert "- cifar10-gce-wrn28_10-uniform-0.2-10 · 5.7e+17 FLOPs · paper 89.9 ± 0.2 · not run" in text


ONE = Experiment("one", "configs/digits.py:method=ieg,noise_rate=0.4")
TWO = Experiment("two", "configs/digits.py:method=l2r,noise_rate=0.4")
TABLE = Table(
    "t",
    "Title",
    (
        Row({"method": "ieg", "rate": 0.4}, ONE, {"top1": 85.5, "std": 0.2}),
        Row({"method": "l2r", "rate": 0.4}, TWO, {"top1": 70.0}),
        Row({"method": "another", "rate": 0.4}, None, {"top1": 60.0}),
    ),
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    store = results.Store(epath.Path(tmp_path / "work"), epath.Path(tmp_path / "kept"))
    for seed, accuracy in enumerate((0.8, 0.9, 0.7)):
        write_run(store, ONE, seed, accuracy)
    return store


def gather(store, table):
    return {e.name: [run for s in range(3) if (run := store.find(e, s))] for e in table.experiments.values()}


def test_long_table(store):
    lines = tables.long(TABLE, gather(store, TABLE))
    assert lines == [
        ["method", "rate", "paper", "seeds", "last", "best on trusted", "best on test", "last − paper"],
        ["ieg", "0.4", "85.5 ± 0.2", "3", "80.0 ± 10.0", "50.0 ± 0.0", "82.0 ± 10.0", "-5.5"],
        ["l2r", "0.4", "70.0", "not run", "", "", "", ""],
        ["another", "0.4", "60.0", "no such method here", "", "", "", ""],
    ]


def test_wide_table(store):
    table = Table(
        "t",
        "Title",
        (
            Row({"method": "ieg", "noise": "uniform", "rate": 0.4}, ONE),
            Row({"method": "l2r", "noise": "asymmetric", "rate": 0.2}, TWO),
            Row({"method": "eg", "noise": "any", "rate": ""}, ONE),
        ),
    )
    assert tables.wide(table, gather(store, table), 3) == [
        ["method", "uniform 0.4", "asymmetric 0.2"],
        ["ieg", "80.0 ± 10.0", ""],
        ["l2r", "", "not run"],
        ["eg", "80.0 ± 10.0", "80.0 ± 10.0"],
    ]
    assert tables.wide(table, gather(store, table), 5)[1][1] == "80.0 ± 10.0 (3)"


def test_formats():
    lines = [["a_b", "last"], ["x|y & 5%", "80.0 ± 1.0"], ["z", "−5"]]
    assert tables.markdown(lines) == "| a_b | last |\n| --- | --- |\n| x\\|y & 5% | 80.0 ± 1.0 |\n| z | −5 |\n"
    assert tables.as_csv([["a", "b"], ["x,y", 'q"']]) == 'a,b\n"x,y","q"""\n'
    assert tables.latex(lines).splitlines() == [
        r"\begin{tabular}{ll}",
        r"\toprule",
        r"a\_b & last \\",
        r"\midrule",
        r"x|y \& 5\% & 80.0 $\pm$ 1.0 \\",
        r"z & $-$5 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_colours_of_methods():
    colours = {name: figures.color(name) for name in methods.REGISTRY}
    assert colours["ieg"] == "tab:green" and len(set(colours.values())) == len(colours)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_without_runs_say_so(name, store, tmp_path):
    png, svg = figures.draw(name, store, 3, epath.Path(tmp_path / "figures"))
    assert np.asarray(Image.open(png)).shape[1] > 600
    assert "<!-- not run yet -->" in svg.read_text()


def test_figures_show_the_paper_and_ours(store, tmp_path):
    written = [experiments.digits(method, rate) for method in ("ieg", "l2r") for rate in (0.0, 0.8)]
    written += [row.experiment for row in catalogue.tables()["digits-ablation"].rows]
    for experiment in written:
        for seed in range(2):
            write_run(store, experiment, seed)
    _, svg = figures.draw("digits", store, 3, epath.Path(tmp_path))
    text = svg.read_text()
    assert "<!-- IEG -->" in text and "<!-- ieg, no mixup -->" in text and "<!-- supervised -->" not in text
    assert "not run yet" not in text
    ours = experiments.cifar("cifar100", "ieg", rate=0.8)
    write_run(store, ours)
    _, svg = figures.draw("1", store, 3, epath.Path(tmp_path))
    text = svg.read_text()
    assert "<!-- IEG -->" in text and "<!-- IEG, paper -->" in text and "not run yet" not in text


def test_panels_show_the_curves_of_their_noise(store, tmp_path):
    """IEG on human labels stands in the third panel alone, training on trusted images in each."""
    for experiment in (experiments.cifar10_small("ieg", labels="worse"), experiments.cifar10_small("trusted_only")):
        write_run(store, experiment)
    _, svg = figures.draw("cifar10-small", store, 3, epath.Path(tmp_path))
    labels = re.findall(r"<!-- (IEG|trusted only|L2R|true labels) \(", svg.read_text())
    assert sorted(labels) == ["IEG", "trusted only", "trusted only", "trusted only"]


def test_a_place_is_set_where_an_experiment_needs_it():
    human, drawn = experiments.cifar10n("ieg", "worse"), experiments.cifar10n("ieg", noise="uniform", rate=0.4)
    changes = Changes(keys=("data.dir=/data", "noise.file=/human.pt", "batch_size=32"))
    assert changes.of(human).keys == {"data.dir": "/data", "noise.file": "/human.pt", "batch_size": 32}
    assert changes.of(drawn).keys == {"data.dir": "/data", "batch_size": 32}
    check_places(changes, [human, drawn])
    with pytest.raises(UserError, match=r"--set=noise.file=/human.pt: nothing here reads it; .* need data.dir"):
        check_places(changes, [drawn])
