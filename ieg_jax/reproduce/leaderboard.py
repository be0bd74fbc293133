"""Every method under one protocol (docs/protocol.md), settings of each searched equally long, and what came of it.

The search is a table of experiments as any other: TRIALS settings of each method, what it comes with among them, judged
by their accuracy on examples that are taken out of the training set, with seeds that are not those of the leaderboard.
`choose` prints what was found; the leaderboard trains with the best settings in `tuning/DATA.json`.

    python -m ieg_jax.reproduce run tune-digits --seeds=1 --results= --workdir=runs/tune
    python -m ieg_jax.reproduce leaderboard tune-digits --workdir=runs/tune > found.json
    mv found.json ieg_jax/reproduce/tuning/digits.json
    python -m ieg_jax.reproduce run leaderboard-digits
    python -m ieg_jax.reproduce leaderboard > docs/leaderboard.md
"""

import dataclasses
import functools
import importlib.resources
import json
import statistics
from collections.abc import Callable
from typing import Any

from ieg_jax import methods
from ieg_jax.errors import UserError
from ieg_jax.methods.describe import usual_config
from ieg_jax.reproduce import results, tables
from ieg_jax.reproduce.experiments import Experiment, Row, Table, cifar10n, digits, fashion

TRIALS = 4
PLAIN = "supervised"
FIRST_SEED = 100  # of the search
FOLDER = importlib.resources.files("ieg_jax.reproduce") / "tuning"


def _keys(group: str, **values: Any) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()}


_method, _meta = functools.partial(_keys, "method"), functools.partial(_keys, "meta")
_PLAIN = (
    {"schedule.base_lr": 0.02},
    {"schedule.base_lr": 0.2},
    {"optimizer.weight_decay": 1e-3},
)
_STEPS_AHEAD = (_meta(learning_rate=0.02), _meta(learning_rate=0.5), _meta(weight_decay=False))
_ELR = (_method(early_learning_weight=1.0), _method(early_learning_weight=7.0), _method(target_momentum=0.9))
_SSR = (_method(relabel_threshold=0.8), _method(neighbours=50), _method(warmup_epochs=3.0))

# What is tried of a method besides the settings that it comes with. Phases that are counted in epochs are published for
# hundreds of them; these are for the 25 of digits, and `Data.pace` suits them to others.
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "co_teaching": tuple(_method(forget_rate=rate, forget_epochs=4.0) for rate in (0.4, 0.5, 0.7)),
    "dividemix": (
        _method(divide_epochs=4.0),
        _method(divide_epochs=4.0, unlabelled_strength=0.0),
        _method(unlabelled_strength=50.0),
    ),
    "eg": (
        _method(unlabeled_weight=2.0, consistency_weight=5.0),
        _method(consistency_weight=20.0),
        _method(temperature=1.0),
    ),
    "elr": _ELR,
    "elr_plus": _ELR,
    "emlc": (_method(enhancer_rate=0.002), _method(enhancer_rate=0.1), _meta(learning_rate=0.5)),
    "forward_correction": (
        _method(transition_epochs=4.0),
        _method(transition_epochs=4.0, anchor_quantile=1.0),
        _method(anchor_quantile=0.9),
    ),
    "fsr": (
        _method(reweight_epochs=5.0),
        _method(reweight_epochs=5.0, reward_size=200),
        _method(reweight_epochs=5.0, reward_by="margin"),
    ),
    "gce": tuple(_method(q=q) for q in (0.3, 0.5, 0.9)),
    "gold_loss_correction": tuple(_method(gold_epochs=epochs) for epochs in (4.0, 6.0, 16.0)),
    "ieg": (
        _method(unlabeled_weight=2.0, consistency_weight=5.0),
        _method(consistency_weight=10.0),
        _meta(learning_rate=0.02),
    ),
    "incv": (_method(selection_rounds=2), _method(discard=False), _method(forget_epochs=2.0)),
    "l2b": _STEPS_AHEAD,
    "l2r": _STEPS_AHEAD,
    "m_correction": (_method(bootstrap_epochs=4.0), _method(bootstrap_epochs=20.0), _method(bootstrap_alpha=4.0)),
    "mentornet": (_method(loss_percentile=0.4), _method(loss_percentile=0.9), _method(burn_in_epochs=5.0)),
    "mentornet_dd": (_method(mentor_rate=0.001), _method(wrong_share=0.7), _method(burn_in_epochs=5.0)),
    "meta_weight_net": (_method(weight_rate=0.01), _meta(learning_rate=0.02), _meta(learning_rate=0.5)),
    "mixmatch": (
        _method(unlabeled_weight=2.0),
        _method(unlabeled_weight=25.0),
        _method(unlabeled_ramp_steps=200),
    ),
    "mlc": (_method(label_rate=0.01), _method(label_rate=0.001), _method(learn_trusted=False)),
    "promix": (
        _method(guess_after_epochs=8.0),
        _method(pretrain_epochs=4.0),
        _method(pretrain_epochs=4.0, guess_after_epochs=8.0),
    ),
    "rog": (_method(support=0.5), _method(support=0.9), _method(c_steps=5)),
    # The published rates, 10, are of trainings of hundreds of epochs; here each example's vectors move 8 or 25 times.
    "sop": tuple(_method(u_rate=rate, v_rate=rate) for rate in (30.0, 100.0, 300.0)),
    "ssr": _SSR,
    "ssr_plus": _SSR,
    "supervised": _PLAIN,
    "trusted_only": _PLAIN,
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set of the leaderboard.

    Attributes:
      title: for people.
      make: makes an experiment of a method, the arguments of a kind of noise, `keys` and `suffix`.
      noises: name of a kind of label noise -> its arguments.
      methods: which take part.
      tuned_by: the noises that settings are chosen by; () = they are those of `settings_of`.
      validation: examples that the search takes out of the training set.
      settings_of: another data set, whose settings are taken over.
      pace: what the epochs in GRID, or in the settings that are taken over, are multiplied by.
    """

    title: str
    make: Callable[..., Experiment]
    noises: dict[str, dict[str, Any]]
    methods: tuple[str, ...] = tuple(methods.REGISTRY)
    tuned_by: tuple[str, ...] = ()
    validation: int = 0
    settings_of: str = ""
    pace: float = 1.0


# On Fashion-MNIST, whose runs take longest: the strongest on digits at 80 %, and plain training.
_STRONGEST = (
    *("supervised", "ieg", "eg", "mixmatch", "l2r", "l2b", "emlc", "gold_loss_correction"),
    *("ssr", "ssr_plus", "promix", "dividemix", "mentornet_dd"),
)
DATA = {
    "digits": Data(
        "Digits, 1,267 images, three trusted ones per class",
        digits,
        {"uniform 0.4": {"rate": 0.4}, "uniform 0.8": {"rate": 0.8}},
        tuned_by=("uniform 0.4", "uniform 0.8"),
        validation=400,
    ),
    "cifar10n": Data(
        "CIFAR-10 on features of EfficientNet-Lite0 (ImageNet), ten trusted images per class",
        cifar10n,
        {"aggre": {"labels": "aggre"}, "worse": {"labels": "worse"}, "uniform 0.8": {"noise": "uniform", "rate": 0.8}},
        tuned_by=("worse",),
        validation=5_000,
        pace=0.25,  # eight epochs
    ),
    "fashion": Data(
        "Fashion-MNIST, 10,000 images at 14×14, ten trusted ones per class",
        fashion,
        {"uniform 0.8": {"rate": 0.8}},
        methods=_STRONGEST,
        settings_of="digits",
        pace=0.5,  # twelve epochs
    ),
}


def settings(data: str, method: str) -> tuple[dict[str, Any], ...]:
    """The TRIALS settings of a method, those that it comes with first: keys of the configuration."""
    return ({}, *(_paced(keys, DATA[data].pace) for keys in GRID[method]))


def _paced(keys: dict[str, Any], pace: float) -> dict[str, Any]:
    return {key: pace * value if key.endswith("_epochs") else value for key, value in keys.items()}


@functools.cache
def searched(data: str) -> dict[str, list[dict[str, Any]]]:
    """What `choose` printed: method -> its trials, each with `settings` and `accuracy`, one for each noise."""
    file = FOLDER / f"{data}.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())["trials"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: not what `reproduce leaderboard tune-{data}` prints ({error}); restore it") from None


def chosen(data: str, method: str) -> dict[str, Any]:
    """The best settings of a method, by the mean of their accuracies, of equal ones the first; {} without a search.

    Of another data set they are taken over with the lengths of all phases of the method in proportion.
    """
    if source := DATA[data].settings_of:
        phases = {name: key.default for name, key in methods.get(method).keys.items() if name.endswith("_epochs")}
        return _paced(phases | chosen(source, method), DATA[data].pace)
    trials = searched(data).get(method, [])
    return max(trials, key=lambda trial: statistics.mean(trial["accuracy"]))["settings"] if trials else {}


def entry(data: str, method: str, noise: str) -> Experiment:
    """The experiment of a method with its chosen settings."""
    keys = chosen(data, method)
    return DATA[data].make(method, **DATA[data].noises[noise], keys=keys, suffix="tuned" if keys else "")


def lines_of(data: str, noise: str) -> list[tuple[str, str, Experiment]]:
    """What the table of a noise compares: method, what is said of its settings, and the experiment.

    Plain training is there as it comes, too, for whatever is below it only after a search.
    """
    found = [(name, " *" if chosen(data, name) else "", entry(data, name, noise)) for name in DATA[data].methods]
    if chosen(data, PLAIN):
        found.append((PLAIN, ", as it comes", DATA[data].make(PLAIN, **DATA[data].noises[noise])))
    return found


def trial(data: str, method: str, number: int, noise: str) -> Experiment:
    """The experiment of the search with the settings of that number."""
    keys = settings(data, method)[number] | {"data.validation_size": DATA[data].validation}
    one = DATA[data].make(method, **DATA[data].noises[noise], keys=keys, suffix=str(number))
    return dataclasses.replace(one, name=f"tune-{one.name}", first_seed=FIRST_SEED)


def all_tables() -> list[Table]:
    """`leaderboard-DATA` of each data set, and `tune-DATA` of those with a search of their own."""
    found = []
    for name, data in DATA.items():
        rows = [
            Row({"method": f"{method}{about}", "noise": noise}, experiment)
            for noise in data.noises
            for method, about, experiment in lines_of(name, noise)
        ]
        found.append(Table(f"leaderboard-{name}", data.title, tuple(rows)))
        rows = [
            Row(
                {"method": m, "settings": _in_words(settings(name, m)[number]), "noise": noise},
                trial(name, m, number, noise),
            )
            for m in data.methods
            for number in range(TRIALS)
            for noise in data.tuned_by
        ]
        if rows:
            found.append(Table(f"tune-{name}", f"{data.title}: the search for settings", tuple(rows)))
    return found


def choose(target: str, store: results.Store) -> str:
    """What a search found, as JSON: `seed`, `validation`, `noises`, and `trials` (see `searched`).

    Methods with runs that are missing are left out.

    Args:
      target: `tune-DATA`.
      store: where the runs are.

    Raises:
      UserError: for another name, and where nothing is finished.
    """
    data = target.removeprefix("tune-")
    if target == data or not DATA.get(data) or not DATA[data].tuned_by:
        known = ", ".join(f"tune-{name}" for name in DATA if DATA[name].tuned_by)
        raise UserError(f"leaderboard {target}: expected one of {known}")
    trials = {}
    for method in DATA[data].methods:
        found = [
            [store.find(trial(data, method, number, noise), 0) for noise in DATA[data].tuned_by]
            for number in range(TRIALS)
        ]
        if all(run for runs in found for run in runs):
            trials[method] = [
                {"settings": tried, "accuracy": [run["result"]["validation_accuracy"] for run in runs]}
                for tried, runs in zip(settings(data, method), found, strict=True)
            ]
    if not trials:
        raise UserError(f"leaderboard {target}: no method has finished runs of all of its settings in {store.workdir}")
    of_methods = [  # a line for each trial
        f"  {json.dumps(method)}: [\n" + ",\n".join(f"   {json.dumps(one)}" for one in tried) + "\n  ]"
        for method, tried in trials.items()
    ]
    head = {"seed": FIRST_SEED, "validation": DATA[data].validation, "noises": DATA[data].tuned_by}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    return "{\n" + ",\n".join([*lines, ' "trials": {\n' + ",\n".join(of_methods) + "\n }"]) + "\n}\n"


# ---- The page.

HEAD = """# Leaderboard

Every method on the same data, wrong labels, trusted examples, network and number of steps
([protocol.md](protocol.md)). Three accuracies on the test set, in percent, of the averaged weights, mean ± standard
deviation over the seeds: at the last step, which is what counts; at the step that the trusted examples would have
chosen, of methods that do not learn from them; and at the best step on the test set. AUROC tells how well right and
wrong labels of the training set are told apart: by P(given label) in the end, and by the method's own weights in the
last steps where it weighs examples. Cost is that of a step in forward passes; seconds are the median of the runs, which
had other work beside them. `python -m ieg_jax.reproduce leaderboard` makes this page of `results/`; the runs of a table
are `python -m ieg_jax.reproduce run leaderboard-DATA`.

Where a search is shown below, {trials} settings of each method were compared by accuracy on examples that are taken out
of the training set and have their true labels: those that it comes with, which are what the configuration of the data
sets and not always the defaults of [methods.md](methods.md), and {others} more. A star says that others were better
than those; plain training is shown as it comes, too. What to know of it:

- "Trusted: no" says that the training sees no true label; the search did, that of all methods alike.
- There was one run for each setting and noise (seed {seed}). An accuracy on 400 examples has a standard error of 1 to 2
  points, so that many a choice is within the error, and a method that was searched can be worse than as it comes.
- It is not the whole effort. On digits the network, the augmentation, the learning rate and k of `ieg` had been chosen
  before by runs of `ieg` on validation examples ([quickstart.md](quickstart.md)), and nothing for the others. The
  settings to try of `incv`, `mlc` and `sop` were changed once after a look at validation numbers, those of `sop` on
  CIFAR-10N also after seed 0 of the test set.
- Learning rate and weight decay were searched for the two plain methods alone, which have few other settings."""


def page(store: results.Store, seeds: int) -> str:
    """docs/leaderboard.md, of the runs that are kept."""
    parts = [HEAD.format(trials=TRIALS, others=TRIALS - 1, seed=FIRST_SEED)]
    for name, data in DATA.items():
        shown = {noise: _lines(name, noise, store, seeds) for noise in data.noises}
        shown = {noise: lines for noise, lines in shown.items() if len(lines) > 1}
        if shown or searched(name):
            parts.append(f"## {data.title}")
        if shown and not searched(data.settings_of or name):
            parts.append(
                "No search has been run: each method has the settings that it comes with in this configuration."
            )
        if shown and data.settings_of:
            parts.append(
                f"No search of its own: a star stands for settings that were found on {data.settings_of}, or phases of "
                f"{data.pace:g} times as many epochs as there."
            )
        parts += [f"### {noise}\n\n{tables.markdown(lines)}".rstrip() for noise, lines in shown.items()]
        if searched(name):
            parts.append(
                f"### Settings: accuracy on {data.validation:,} validation examples\n\n{_search(name)}".rstrip()
            )
    return "\n\n".join(parts) + "\n"


def _lines(data: str, noise: str, store: results.Store, seeds: int) -> list[list[str]]:
    """A line for each method that has runs, the best first."""
    heads = ["method", "trusted", *results.MEASURES, "AUROC: P(given label)", "weights", "cost", "seconds", "seeds"]
    found = []
    for name, about, experiment in lines_of(data, noise):
        runs = [run for seed in range(seeds) if (run := store.find(experiment, seed)) is not None]
        if not runs:
            continue
        method = methods.get(name)
        measures = {measure: results.spread(runs, measure) for measure in results.MEASURES}
        line = [f"`{name}`{about}", "yes" if method.needs_trusted else "no"]
        line += [
            "–" if method.needs_trusted and measure == "best on trusted" else str(value or "")
            for measure, value in measures.items()
        ]
        line += [_mean(runs, "label_auroc"), _mean(runs, "weight_auroc")]
        line += [f"{method.passes(usual_config()):g}", _seconds(runs), str(len(runs))]
        found.append((measures["last"].mean, line))
    return [heads, *(line for _, line in sorted(found, key=lambda pair: -pair[0]))]


def _mean(runs: list[dict[str, Any]], key: str) -> str:
    values = [run["result"][key] for run in runs if run["result"].get(key) is not None]
    return f"{statistics.mean(values):.3f}" if values else ""


def _seconds(runs: list[dict[str, Any]]) -> str:
    values = [seconds for run in runs if (seconds := run["result"].get("wall_seconds")) is not None]
    return f"{statistics.median(values):.0f}" if values else ""


def _search(data: str) -> str:
    """The trials of each method, the chosen one in bold."""
    lines = [["method", *DATA[data].tuned_by, "settings"]]
    for method, trials in searched(data).items():
        for one in trials:
            accuracies = [f"{100 * accuracy:.1f}" for accuracy in one["accuracy"]]
            line = [f"`{method}`", *accuracies, _in_words(one["settings"])]
            lines.append([f"**{text}**" for text in line] if one["settings"] == chosen(data, method) else line)
    return tables.markdown(lines)


def _in_words(keys: dict[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('method.')}={value}" for key, value in keys.items()) or "as it comes"
