"""Draws the paper's figures with our runs in them, and figures of the smaller experiments.

Filled marks and lines are runs of this code: the mean over the seeds, with a bar of one standard deviation. Open marks
are what the paper prints. A figure without any runs says so.
"""

from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from ieg_jax import methods
from ieg_jax.errors import check_choice
from ieg_jax.methods import published
from ieg_jax.reproduce import catalogue, experiments, results
from ieg_jax.reproduce.experiments import Experiment

matplotlib.use("Agg")

# The colours of methods in all figures. Methods that are not named here share the other colours, see `color`.
COLORS = {
    "ieg": "tab:green", "supervised": "tab:gray", "l2r": "tab:blue", "eg": "tab:purple", "trusted_only": "tab:orange",
}  # fmt: skip
OTHER_COLORS = (
    "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:red", "navy", "gold", "teal", "indigo", "coral", "black",
    "crimson", "skyblue", "peru", "darkgreen", "plum", "orchid", "steelblue", "yellowgreen", "sienna", "slategray",
    "slateblue",
)  # fmt: skip


def color(method: str) -> str:
    """Returns the colour in which all figures draw a method of the registry."""
    others = [name for name in methods.REGISTRY if name not in COLORS]
    return COLORS[method] if method in COLORS else OTHER_COLORS[others.index(method) % len(OTHER_COLORS)]


class Finished:
    """Reads the finished runs that a figure shows."""

    def __init__(self, store: results.Store, seeds: int):
        """Takes the runs with the seeds 0 ... `seeds` − 1 from `store`."""
        self._store, self._seeds = store, seeds

    def runs(self, experiment: Experiment) -> list[dict[str, Any]]:
        """Returns the finished runs of an experiment, at most one for each seed.

        Raises:
          UserError: where a run has other settings than the experiment.
        """
        found = (self._store.find(experiment, seed) for seed in range(self._seeds))
        return [run for run in found if run is not None]

    def points(self, rated: dict[float, Experiment]) -> np.ndarray:
        """Returns the accuracy at the last step, in percent, for each noise rate that has been run.

        Args:
          rated: noise rate -> experiment.

        Returns:
          `[n, 3]`: noise rate, mean over the seeds, standard deviation (0 for a single seed).
        """
        found = {rate: results.spread(self.runs(experiment)) for rate, experiment in rated.items()}
        points = [(rate, spread.mean, spread.std or 0.0) for rate, spread in found.items() if spread]
        return np.array(points).reshape(-1, 3)

    def curve(self, experiment: Experiment, name: str) -> np.ndarray | None:
        """Returns `[n, 2]`: step, mean of the metric `name` over the seeds; None where no run has the metric."""
        curves = [np.array(run["curves"][name]) for run in self.runs(experiment) if name in run["curves"]]
        return np.mean(curves, axis=0) if curves else None


def draw(name: str, store: results.Store, seeds: int, folder: epath.Path) -> list[epath.Path]:
    """Draws a figure as PNG and SVG.

    Args:
      name: one of FIGURES.
      store: where the runs are.
      seeds: the runs with the seeds 0 ... `seeds` − 1 are drawn.
      folder: the folder for the files; it is made where it is missing.

    Returns:
      The two files.

    Raises:
      UserError: for another name, and where a run has other settings than its experiment.
    """
    check_choice("figure", name, FIGURES)
    figure = FIGURES[name](Finished(store, seeds))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"figure-{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with path.open("wb") as file:
            figure.savefig(
                file, format=path.suffix[1:], dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {}
            )
    plt.close(figure)
    return paths


def _figure_1(finished: Finished) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    printed = [row for row in published.paper_rows() if row["dataset"] == "cifar100" and row["noise"] == "uniform"]

    def paper(table, method, **more):
        rows = [r for r in printed if (r["table"], r["method"]) == (table, method)]
        rows = [r for r in rows if all(r.get(key) == value for key, value in more.items())]
        return np.array([(r["ratio"], r["top1"], r.get("std", 0)) for r in rows])

    tables = catalogue.tables()
    _rates(axes, "ieg", finished.points(_rated(tables["A2"])), paper("A2", "ieg"))
    for method in ("supervised", "l2r"):
        rated = {rate: experiments.cifar("cifar100", method, rate=rate) for rate in (0.0, 0.2, 0.4, 0.8)}
        of_paper = paper("2", method, network="wrn28_10")
        _rates(axes, method, finished.points(rated), of_paper)
    semi = [row for row in printed if row["table"] == "6" and row["method"] == "eg" and row["network"] == "wrn28_10"]
    axes.axhline(semi[0]["top1"], color=color("eg"), ls=":", lw=1, label="EG*, paper")
    _level(axes, "eg", finished.runs(experiments.cifar("cifar100", "eg", rate=0.8)))
    axes.set(xlabel="noise rate (uniform)", ylabel="test accuracy, %", title="CIFAR-100", ylim=(0, 100))
    _legend(axes)
    return figure


def _figure_2(finished: Finished) -> plt.Figure:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 7), layout="constrained")
    _trust(top, finished, experiments.cifar("cifar10", "ieg", rate=0.4))
    top.set_title("CIFAR-10, 40 % uniform noise")
    keys, suffix = experiments.COMPONENTS["no relabelling"], "no-relabelling"
    for label, style, more in (("with λ", "-", {}), ("without λ", "--", {"keys": keys, "suffix": suffix})):
        rated = {rate: experiments.cifar("cifar100", "ieg", rate=rate, **more) for rate in experiments.EXTREME_RATES}
        points = finished.points(rated)
        if len(points):
            bottom.errorbar(*points.T, fmt=f"o{style}", color=color("ieg"), label=label)
    paper = [(r["ratio"], r["top1"]) for r in published.paper_rows() if r["table"] == "A2"]
    extreme = np.array([point for point in paper if point[0] in experiments.EXTREME_RATES])
    bottom.plot(*extreme.T, "o", mfc="none", color=color("ieg"), label="with λ, paper (Table A2)")
    bottom.set(xlabel="noise rate (uniform)", ylabel="test accuracy, %", title="CIFAR-100, extreme noise")
    _legend(bottom)
    return figure


def _figure_a1(finished: Finished) -> plt.Figure:
    runs = {"cosine with restarts": {}, "step decay": {"keys": experiments.STEP_DECAY, "suffix": "step-decay"}}
    curves = {label: experiments.cifar("cifar10", "ieg", rate=0.4, **more) for label, more in runs.items()}
    return _training_curves(finished, curves, "CIFAR-10, 40 % uniform noise")


def _figure_a2(finished: Finished) -> plt.Figure:
    by_name = catalogue.tables()["figure-A2"].experiments.values()
    curves = {f"k = {k}": e for k, e in zip(experiments.CONSISTENCY_WEIGHTS, by_name, strict=True)}
    return _training_curves(finished, curves, "CIFAR-100, 80 % uniform noise")


def _digits(finished: Finished) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for method in experiments.DIGITS_METHODS:
        rated = {rate: experiments.digits(method, rate) for rate in experiments.DIGITS_RATES}
        _rates(left, method, finished.points(rated), np.zeros((0, 3)))
    for method in ("eg", "trusted_only"):
        _level(left, method, finished.runs(experiments.digits(method, 0.0)))
    left.set(xlabel="noise rate (uniform)", ylabel="test accuracy, %", title="Digits: noise", ylim=(0, 102))
    _legend(left)
    rows = catalogue.tables()["digits-ablation"].rows
    names = list(dict.fromkeys(row.columns["what"] for row in rows))
    for rate, shade in ((0.4, "tab:olive"), (0.8, "tab:green")):
        of_rate = [results.spread(finished.runs(row.experiment)) for row in rows if row.columns["rate"] == rate]
        places = [place for place, spread in enumerate(of_rate) if spread]
        means = [of_rate[place].mean for place in places]
        errors = [of_rate[place].std or 0.0 for place in places]
        right.errorbar(means, places, xerr=errors, fmt="o", ms=8, color=shade, capsize=2, label=f"{rate:.0%} noise")
    right.set(xlabel="test accuracy, %", title="Digits: components", yticks=range(len(names)), yticklabels=names)
    right.invert_yaxis()
    right.grid(axis="y", color="0.9")
    _legend(right, loc="lower left")
    return figure


WITHOUT_LABELS = ("trusted_only", "eg")  # their result is the same for any noise


def _fashion(finished: Finished) -> plt.Figure:
    panels = {
        f"{rate:.0%} {noise} noise": {
            method: experiments.fashion(method, *(() if method in WITHOUT_LABELS else (noise, rate)))
            for method in ("supervised", "trusted_only", "l2r", "eg", "ieg")
        }
        for noise, rate in (("uniform", 0.8), ("asymmetric", 0.4))
    }
    truth = experiments.fashion("supervised")
    return _panels_of_curves(finished, panels, truth, "Fashion-MNIST, 14×14, 10 trusted images per class", (50, 92))


def _fashion_mlp(finished: Finished) -> plt.Figure:
    of_method = {
        method: experiments.fashion_mlp(method, *(() if method in WITHOUT_LABELS else ("uniform", 0.8)))
        for method in ("supervised", "trusted_only", "l2r", "ieg")
    }
    truth = experiments.fashion_mlp("supervised")
    title = "Fashion-MNIST, 60,000 images,\n10 trusted images per class"
    return _panels_of_curves(finished, {"80% uniform noise": of_method}, truth, title, (5, 95))


def _cifar10_small(finished: Finished) -> plt.Figure:
    names = ("40 % uniform noise", "80 % uniform noise", "CIFAR-10N, worse (40 %)")
    panels = {
        name: {
            method: experiments.cifar10_small(method, **({} if method in WITHOUT_LABELS else noise))
            for method in ("supervised", "trusted_only", "l2r", "dividemix", "ieg")
        }
        for name, noise in zip(names, experiments.CIFAR10_SMALL_NOISE, strict=True)
    }
    truth = experiments.cifar10_small("supervised")
    return _panels_of_curves(finished, panels, truth, "CIFAR-10, 10,000 images, 10 trusted images per class", (0, 72))


def _panels_of_curves(
    finished: Finished,
    panels: dict[str, dict[str, Experiment]],
    truth: Experiment,
    title: str,
    limits: tuple[float, float],
) -> plt.Figure:
    """Draws the test accuracy over the steps, a panel for each kind of noise, with a line for training on true labels.

    Args:
      finished: the runs.
      panels: what stands above a panel -> method -> its experiment.
      truth: the experiment with true labels.
      title: of the figure.
      limits: of the accuracy, percent.
    """
    size = (5.5 * len(panels), 4.4)
    figure, drawn = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    clean = results.spread(finished.runs(truth))
    for axes, (name, of_method) in zip(drawn[0], panels.items(), strict=True):
        for method, experiment in of_method.items():
            curve = finished.curve(experiment, "test/accuracy")
            if curve is not None:
                label = f"{methods.get(method).title} ({100 * curve[-1, 1]:.1f})"
                axes.plot(curve[:, 0], 100 * curve[:, 1], color=color(method), label=label)
        if clean:
            axes.axhline(clean.mean, color="black", ls="--", lw=1, label=f"true labels ({clean.mean:.1f})")
        axes.set(xlabel="step", ylabel="test accuracy, %", ylim=limits, title=name)
        _legend(axes, loc="lower right")
    figure.suptitle(title)
    return figure


# name on the command line -> the function that draws it
FIGURES: dict[str, Callable[[Finished], plt.Figure]] = {
    "1": _figure_1,
    "2": _figure_2,
    "A1": _figure_a1,
    "A2": _figure_a2,
    "digits": _digits,
    "fashion": _fashion,
    "fashion-mlp": _fashion_mlp,
    "cifar10-small": _cifar10_small,
}


def _rated(table: experiments.Table) -> dict[float, Experiment]:
    """Returns noise rate -> experiment of a table."""
    return {row.columns["rate"]: row.experiment for row in table.rows}


def _rates(axes: plt.Axes, method: str, ours: np.ndarray, paper: np.ndarray) -> None:
    """Draws the accuracy against the noise rate: ours as a line, the paper's as open marks.

    Args:
      axes: where to draw.
      method: a name in `methods.REGISTRY`.
      ours: `[n, 3]`: rate, mean, standard deviation; n may be 0.
      paper: the same for the paper.
    """
    label = methods.get(method).title
    if len(ours):
        axes.errorbar(*ours.T, fmt="o-", color=color(method), capsize=2, label=label)
    if len(paper):
        axes.errorbar(*paper.T, fmt="o", mfc="none", color=color(method), capsize=2, label=f"{label}, paper")


def _level(axes: plt.Axes, method: str, found: list[dict[str, Any]]) -> None:
    """Draws a horizontal line at the mean accuracy of the finished runs of a method, if there are any."""
    spread = results.spread(found)
    if spread:
        axes.axhline(spread.mean, color=color(method), ls="--", lw=1.4, label=methods.get(method).title)


def _trust(axes: plt.Axes, finished: Finished, experiment: Experiment) -> None:
    """Draws the mean λ of examples with true and with wrong labels against the step."""
    for which, shade in (("clean", "tab:green"), ("noisy", "tab:red")):
        curve = finished.curve(experiment, f"trust/{which}")
        if curve is not None:
            axes.plot(*curve.T, color=shade, label=f"label is {'true' if which == 'clean' else 'wrong'}")
    axes.set(xlabel="step", ylabel="mean λ", ylim=(0, 1))
    _legend(axes)


def _training_curves(finished: Finished, curves: dict[str, Experiment], title: str) -> plt.Figure:
    """Draws the accuracy on the test set and on the training labels against the step.

    Args:
      finished: the runs.
      curves: label -> experiment.
      title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for number, (label, experiment) in enumerate(curves.items()):
        for name, style in (("test/accuracy", "-"), ("train/accuracy", ":")):
            curve = finished.curve(experiment, name)
            if curve is not None:
                shown = label if name == "test/accuracy" else None
                axes.plot(curve[:, 0], 100 * curve[:, 1], style, color=f"C{number}", label=shown)
    axes.set(xlabel="step", ylabel="accuracy, %: test (solid), training labels (dotted)", title=title, ylim=(0, 100))
    _legend(axes)
    return figure


def _legend(axes: plt.Axes, **more: Any) -> None:
    """Adds the legend, and where no run of ours is drawn a text that says so."""
    ours = [label for label in axes.get_legend_handles_labels()[1] if "paper" not in label]
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, **more)
    if not ours:
        axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center", color="tab:red", fontsize=14)
