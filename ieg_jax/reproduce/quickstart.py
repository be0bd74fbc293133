"""Trains the runs of the quickstart, and shows them in a table and a picture."""

import json
import pathlib
import platform
import statistics
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from ieg_jax import cli, files, methods
from ieg_jax.reproduce.figures import color
from ieg_jax.runtime.workdir import WorkFolder
from ieg_jax.train.loop import train_and_evaluate

# name -> (arguments of the configuration, a remark for the table). All but `clean` have the name of their method.
RUNS = {
    "supervised": ("method=supervised", "plain training on the noisy labels"),
    "trusted_only": ("method=trusted_only", "plain training on the trusted images alone"),
    "l2r": ("method=l2r", "learning to reweight"),
    "ieg": ("method=ieg", "this project"),
    "clean": ("method=supervised,noise_rate=0.0", "upper bound: plain training on true labels"),
}


def run(folder: pathlib.Path, seeds: Sequence[int], config_file: str, console: Console) -> None:
    """Trains each of RUNS with each seed, shows the table, and draws the picture of the first seed.

    Args:
      folder: gets a work folder for each run, results.json and quickstart.png; finished runs are not trained again.
      seeds: at least one.
      config_file: the file of the configuration, with the arguments of configs/quickstart.py.
      console: for the table.

    Raises:
      Interrupted: see `train.loop.train_and_evaluate`. The same call goes on from there.
    """
    found = {name: [] for name in RUNS}
    for seed in seeds:
        for name, (arguments, _) in RUNS.items():
            config = cli.load_config(f"{config_file}:{arguments},seed={seed}")
            found[name].append(train_and_evaluate(config, str(folder / f"{name}-{seed}")))
    files.write_json(folder / "results.json", found)
    show_table(found, console)
    picture = folder / "quickstart.png"
    draw_picture(folder, seeds[0], picture)
    print(f"picture: {picture}   runs: {folder}   TensorBoard: tensorboard --logdir {folder}")


def show_table(results: dict[str, list[dict]], console: Console) -> None:
    """Prints the test accuracy of each run, mean ± sample standard deviation over the seeds.

    Args:
      results: name of a run -> the contents of its result.json, one for each seed.
      console: where to print.
    """
    first = results["ieg"][0]
    seeds = ", ".join(str(result["seed"]) for result in results["ieg"])
    table = RichTable(
        title=f"{first['dataset']}: {first['noise_rate']:.0%} {first['noise']} noise "
        f"({first['noise_rate_effective']:.0%} of the labels wrong), trusted images per class: "
        f"{first['trusted_per_class']}",
        caption=f"test accuracy in %, averaged weights at the last step, seeds {seeds}; "
        f"{platform.machine()}, {first['num_devices']} {first['device_kind']} device(s), "
        f"jax {first['versions']['jax']}",
    )
    for heading in ("method", "test accuracy", "seconds", "what it is"):
        table.add_column(heading, justify="left" if heading in ("method", "what it is") else "right")
    table.add_row("chance", f"{100 / 10:.1f}", "", "guessing one of ten classes", style="dim")
    for name, (_, meaning) in RUNS.items():
        accuracies = [100 * result["test_accuracy"] for result in results[name]]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        seconds = statistics.mean(result["wall_seconds"] for result in results[name])
        style = {"ieg": "bold green", "clean": "dim"}.get(name)
        table.add_row(name, f"{statistics.mean(accuracies):.1f}{spread}", f"{seconds:.0f}", meaning, style=style)
    console.print(table)


def draw_picture(folder: pathlib.Path, seed: int, path: pathlib.Path) -> None:
    """Draws the test accuracy of the four methods, and ω of examples with true and with wrong labels, against the step.

    Args:
      folder: the folder of the runs.
      seed: the seed whose runs are drawn.
      path: the PNG file.
    """
    rows = {name: WorkFolder(folder / f"{name}-{seed}", writes=False).rows() for name in RUNS}
    config = json.loads((folder / f"ieg-{seed}" / "config.json").read_text())

    def series(name, key):
        points = [(row["step"], row[key]) for row in rows[name] if key in row]
        return np.array(points).T

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in (name for name in RUNS if name != "clean"):
        steps, accuracy = series(name, "test/accuracy")
        label = f"{methods.get(name).title} ({100 * accuracy[-1]:.0f})"
        left.plot(steps, 100 * accuracy, color=color(name), lw=2.4 if name == "ieg" else 1.6, label=label)
    clean = 100 * series("clean", "test/accuracy")[1][-1]
    left.axhline(clean, color="black", lw=1, ls="--", label=f"trained on true labels ({clean:.0f})")
    left.axhline(10, color="black", lw=1, ls=":", label="chance (10)")
    left.set(xlabel="step", ylabel="test accuracy, %", ylim=(0, 102), title="Test accuracy")
    left.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.1))
    for key, shade, label in (
        ("weight/clean", "tab:green", "label is true"), ("weight/noisy", "tab:red", "label is wrong"),
    ):  # fmt: skip
        for name, style in (("ieg", "-"), ("l2r", "--")):
            steps, weight = series(name, key)
            right.plot(
                steps, weight * config["batch_size"], style, color=shade, label=f"{methods.get(name).title}, {label}"
            )
    right.axhline(1, color="black", lw=1, ls=":", label="uniform")
    right.set(xlabel="step", ylabel="mean ω, relative to uniform", ylim=(0, None), title="Example weights ω")
    right.legend(frameon=False, fontsize=9, loc="lower right", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    rate, trusted = config["noise"]["rate"], config["trusted"]["per_class"]
    figure.suptitle(f"digits, {rate:.0%} uniform label noise, trusted images per class: {trusted}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
