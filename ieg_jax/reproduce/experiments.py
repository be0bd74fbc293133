"""Names the experiments: the rows of the paper's tables, the curves of its figures, and smaller ones.

An `Experiment` is a configuration without its seed. A `Row` of a `Table` is an experiment beside the number that the
paper prints for it. The same experiment may stand in several tables and figures; it is run only once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from ieg_jax import methods
from ieg_jax.methods import published


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration without its seed.

    Attributes:
      name: is unique, and names the folder of the runs.
      config: the configuration file, with arguments behind a colon.
      keys: further keys of the configuration that are set, with their values.
      needs: keys that only the user can set, such as where the data are, see the flag --set of `reproduce`.
      first_seed: is added to each seed.
    """

    name: str
    config: str
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    first_seed: int = 0

    def specification(self, seed: int) -> str:
        """Returns the value of the flag --config for one seed."""
        return f"{self.config}{',' if ':' in self.config else ':'}seed={self.first_seed + seed}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      columns: what distinguishes it from other rows, such as dataset, method, network, noise, rate and trusted (images
        per class); name of the column -> value.
      experiment: None where the method is not implemented here.
      paper: the paper's numbers, in percent: `top1`, and where they are printed `std` and `top5`; besides `note`, a
        text. Empty where the paper has no such row.
    """

    columns: dict[str, Any]
    experiment: Experiment | None
    paper: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper, or of experiments that belong together.

    Attributes:
      name: on the command line.
      title: for people.
      rows: at least one; the columns that any of them has are shown.
    """

    name: str
    title: str
    rows: tuple[Row, ...]

    @property
    def experiments(self) -> dict[str, Experiment]:
        """The experiments of the rows by name, each once."""
        return {row.experiment.name: row.experiment for row in self.rows if row.experiment is not None}


# The paper's name of a network -> the argument `model` of the configurations.
_MODELS = {
    "wrn28_10": "wrn28_10", "wrn28_2": "wrn28_2", "resnet29_v2": "resnet29", "densenet100": "densenet100",
    "resnet50": "resnet50", "inception_resnet_v2": "inception_resnet_v2",
}  # fmt: skip

# The paper's name of a method -> its name here, where that is another.
_METHODS = {"chen2019": "incv"}

# The components of IEG that Table 7 takes out -> the keys that do so.
COMPONENTS = {
    "no consistency": {"method.consistency_weight": 0.0},
    "no mixup": {"method.mixup": False},
    "no AutoAugment": {"augment.strong": "crop(pad=4,fill=0,last=0)|flip|cutout(0.5)"},
    "no relabelling": {"method.relabel": False},
}
# A row of Table 7 -> the method, and the components that are taken out of it. Not all marks of the printed table are
# legible. Rows 2 and 3 are read so that each row differs from the one before in something that an augmentation or λ can
# change.
ABLATION = {
    "ieg_1": ("l2r", ()),
    "ieg_2": ("ieg", ("no consistency", "no mixup", "no AutoAugment")),
    "ieg_3": ("ieg", ("no consistency", "no mixup")),
    "ieg_4": ("ieg", ("no consistency",)),
    "ieg_5": ("ieg", ()),
    "ieg_6": ("ieg", ("no mixup",)),
    "ieg_7": ("ieg", ("no AutoAugment",)),
    "ieg_8": ("ieg", ("no relabelling",)),
}
WITHOUT_CUTOUT = {"augment.strong": "crop(pad=4,fill=0,last=0)|flip"}

# MixMatch as its authors train it (Berthelot et al. 2019; methods/mixmatch.py). `mixmatch_keys` adds λ_U.
_MIXMATCH = {
    "batch_size": 64,
    "num_train_steps": 1_048_576,
    "augment.standard": "crop(pad=4)|flip",
    "augment.strong": "crop(pad=4)|flip",
    "augment.views_of": "original",
    "method.mixup_coefficient": "exact",
    "method.mixup_alpha": 0.75,
    "method.unlabeled_ramp_steps": 16_384,
    "model.variant": "standard",
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.02,
    "optimizer.weight_decay_on": "kernels",
    "schedule.name": "constant",
    "schedule.base_lr": 0.002,
    "ema.warmup": False,
}

_TITLES = {
    "1": "CIFAR-10, uniform noise",
    "2": "CIFAR-100, uniform noise",
    "3": "CIFAR-10, asymmetric noise",
    "4": "CIFAR, semantic noise (labels predicted by a VGG-13)",
    "5": "WebVision, evaluated on ImageNet's validation set",
    "text-3.3": "WebVision mini with and without AutoAugment (text of section 3.3)",
    "6": "Against semi-supervised training, 80 % uniform noise",
    "7": "Ablation on CIFAR-100, uniform noise",
    "text-3.5": "CIFAR-100 without AutoAugment and cutout (text of section 3.5)",
    "A1": "CIFAR-10, open-set noise",
    "A2": "CIFAR-100, uniform noise of every rate",
}
OPEN_SET_RATE = 0.6  # the paper does not print the rate


def _name(*parts: str) -> str:
    return "-".join(filter(None, parts))


def cifar(dataset: str, method: str, model: str = "wrn28_10", noise: str = "uniform", rate: float = 0.0, **more):
    """Returns an experiment of configs/cifar10.py or configs/cifar100.py.

    Args:
      dataset: cifar10 or cifar100.
      method: a name in `methods.REGISTRY`.
      model: argument of the configuration.
      noise: argument of the configuration.
      rate: nominal share of wrong labels.
      **more: `trusted`, the trusted images per class (10); `keys` and `needs` of the experiment; for its name,
        `noise_name` in place of `noise`, and a `suffix`.
    """
    trusted, keys = more.get("trusted", 10), dict(more.get("keys", {}))
    if method == "mixmatch":
        keys = mixmatch_keys(dataset) | keys
    arguments = f"noise={noise},noise_rate={rate:g},model={model},trusted_per_class={trusted},method={method}"
    name = _name(
        dataset, method, model, more.get("noise_name", noise), f"{rate:g}", f"{trusted}", more.get("suffix", "")
    )
    return Experiment(name, f"configs/{dataset}.py:{arguments}", keys, ("data.dir", *more.get("needs", ())))


def mixmatch_keys(dataset: str) -> dict[str, Any]:
    """Returns the keys that a MixMatch run changes in the configuration of CIFAR-10 or CIFAR-100."""
    return _MIXMATCH | {"method.unlabeled_weight": 75.0 if dataset == "cifar10" else 150.0}


def _paper_experiment(row: dict[str, Any]) -> Experiment | None:
    """Returns the experiment of a row of paper_results.json; None where its method is not implemented here."""
    dataset, table = row["dataset"], row["table"]
    named = _METHODS.get(row["method"], row["method"])
    method, taken_out = ABLATION[named] if table == "7" else (named, ())
    if method not in methods.REGISTRY:
        return None
    if dataset.startswith("webvision"):
        return _webvision(row, method)
    # The paper names no network for numbers of other papers; the experiment has the network of most other rows.
    model = _MODELS[row.get("network", "wrn28_10")]
    classes = 10 if dataset == "cifar10" else 100
    trusted = row.get("trusted_total", 10 * classes) // classes
    more: dict[str, Any] = {"trusted": trusted}
    noise, rate = row["noise"], row["ratio"]
    if noise.startswith("semantic"):
        # The rate cannot be set: it is the share of labels that the network which made the file gets wrong.
        more |= {"noise_name": noise.replace("_", "-"), "needs": ("noise.file",)}
        noise = "file"
    elif noise.startswith("open_set"):
        sources = noise.partition(":")[2].split("+")
        more |= {"noise_name": f"open-set-{'-'.join(sources)}", "keys": {"noise.open_set": ",".join(sources)}}
        noise, rate = "open_set", OPEN_SET_RATE
    if table == "7":
        more |= {
            "keys": functools.reduce(lambda keys, part: keys | COMPONENTS[part], taken_out, {}),
            "suffix": "-".join(part.replace(" ", "-") for part in taken_out),
        }
    if table == "text-3.5":
        more |= {"keys": WITHOUT_CUTOUT, "suffix": "no-AutoAugment-no-cutout"}
    return cifar(dataset, method, model, noise, rate, **more)


def _webvision(row: dict[str, Any], method: str) -> Experiment:
    """Returns the experiment of a row of paper_results.json on WebVision; `method` is its name here."""
    dataset, model = row["dataset"], _MODELS[row["network"]]
    keys, suffix = {}, ""
    # The configuration has AutoAugment in the strong view, which ieg uses. Supervised training uses the standard view
    # alone, so there AutoAugment is put into it where the paper has it (section 3.3: 64.0 with it, 57.2 without).
    if method == "supervised" and dataset == "webvision_mini" and "without" not in row.get("note", ""):
        augmented = "random_resized_crop({size})|flip|autoaugment_imagenet"
        keys["augment.standard"] = augmented.format(size=299 if model == "inception_resnet_v2" else 224)
        suffix = "-autoaugment"
    if method == "supervised":  # in the authors' code it learns from the trusted images too
        keys["trusted.join"] = True
    # The type is named, so that what a run has does not depend on the machine.
    config = f"configs/{dataset}.py:method={method},model={model},dtype=bfloat16"
    name = f"{dataset}-{method}-{model}{suffix}"
    return Experiment(name, config, keys, ("data.dir", "data.test", "data.trusted"))


def _paper_tables() -> list[Table]:
    """Returns the tables of the paper."""
    rows: dict[str, list[Row]] = {}
    for printed in published.paper_rows():
        experiment = _paper_experiment(printed)
        trusted = printed.get("trusted_per_class")
        if trusted is None and "trusted_total" in printed:
            trusted = printed["trusted_total"] // (10 if printed["dataset"] == "cifar10" else 100)
        columns = {
            "dataset": printed["dataset"],
            "method": printed["method"],
            "network": printed.get("network", ""),
            "noise": printed["noise"],
            "rate": "" if printed["ratio"] is None else printed["ratio"],
            "trusted": "" if trusted is None else trusted,
        }
        paper = {key: printed[key] for key in ("top1", "top5", "std", "note") if key in printed}
        rows.setdefault(printed["table"], []).append(Row(columns, experiment, paper))
    return [Table(name, title, tuple(rows[name])) for name, title in _TITLES.items()]


# What the paper's figures show beyond its tables.
EXTREME_RATES = (0.9, 0.93, 0.95, 0.96, 0.98, 0.99)
CONSISTENCY_WEIGHTS = (1, 5, 10, 20)
STEP_DECAY = {"schedule.name": "step"}  # in Figure A1 the rate falls to a tenth at 40,000 and 50,000 steps


def _figure_tables() -> list[Table]:
    """Returns a table of the runs of each of the paper's figures."""

    def rows(*experiments: Experiment, **columns):
        return tuple(Row(columns | {"experiment": experiment.name}, experiment) for experiment in experiments)

    a2 = [row.experiment for row in _paper_tables()[-1].rows]
    figure1 = [*a2, cifar("cifar100", "eg", rate=0.8)]
    figure1 += [cifar("cifar100", method, rate=r) for method in ("supervised", "l2r") for r in (0.0, 0.2, 0.4, 0.8)]
    keys, suffix = COMPONENTS["no relabelling"], "no-relabelling"
    figure2 = [cifar("cifar10", "ieg", rate=0.4)]
    figure2 += [cifar("cifar100", "ieg", rate=r) for r in EXTREME_RATES]
    figure2 += [cifar("cifar100", "ieg", rate=r, keys=keys, suffix=suffix) for r in EXTREME_RATES]
    figure_a1 = [
        cifar("cifar10", "ieg", rate=0.4),
        cifar("cifar10", "ieg", rate=0.4, keys=STEP_DECAY, suffix="step-decay"),
    ]
    figure_a2 = [
        cifar("cifar100", "ieg", rate=0.8)
        if k == 20
        else cifar("cifar100", "ieg", rate=0.8, keys={"method.consistency_weight": float(k)}, suffix=f"k{k}")
        for k in CONSISTENCY_WEIGHTS
    ]
    return [
        Table("figure-1", "Accuracy against the noise rate, CIFAR-100", rows(*figure1)),
        Table("figure-2", "λ during training, and accuracy without it", rows(*figure2)),
        Table("figure-A1", "Warm restarts against step decay, CIFAR-10, 40 % uniform noise", rows(*figure_a1)),
        Table("figure-A2", "Weight k of the consistency, CIFAR-100, 80 % uniform noise", rows(*figure_a2)),
    ]


# Fashion-MNIST at half resolution, and further below digits, are experiments that a laptop can run.
FASHION_NOISE = (("uniform", 0.2), ("uniform", 0.4), ("uniform", 0.8), ("asymmetric", 0.4))
FASHION_MLP_NOISE = (("uniform", 0.4), ("uniform", 0.8))
FASHION_METHODS = ("supervised", "l2r", "ieg")


def fashion(
    method: str,
    noise: str = "uniform",
    rate: float = 0.0,
    keys: dict[str, Any] | None = None,
    suffix: str = "",
    model: str = "wide_resnet",
) -> Experiment:
    """Returns an experiment of configs/fashion_mnist.py."""
    arguments = f"method={method},noise={noise},noise_rate={rate:g}"
    family = "fashion"
    if model != "wide_resnet":
        arguments, family = f"model={model},{arguments}", f"fashion_{model}"
    name = _name(family, method, noise, f"{rate:g}", suffix)
    return Experiment(name, f"configs/fashion_mnist.py:{arguments}", keys or {}, ("data.dir",))


fashion_mlp = functools.partial(fashion, model="mlp")


def _fashion_table() -> Table:
    """Returns the table of the experiments on 10,000 images of Fashion-MNIST."""
    rows = _rows_of_noise(fashion, FASHION_METHODS, FASHION_NOISE)
    # These two methods use no noisy label, so their result is the same for any noise.
    rows += [Row({"method": method, "noise": "any", "rate": ""}, fashion(method)) for method in ("trusted_only", "eg")]
    rows.append(Row({"method": "supervised", "noise": "none", "rate": 0.0}, fashion("supervised")))
    return Table("fashion", "Fashion-MNIST, 14×14, 10 trusted images per class", tuple(rows))


def _fashion_mlp_table() -> Table:
    """Returns the table of the experiments on all images of Fashion-MNIST, with a network that memorises."""
    rows = _rows_of_noise(fashion_mlp, FASHION_METHODS, FASHION_MLP_NOISE)
    rows.append(Row({"method": "trusted_only", "noise": "any", "rate": ""}, fashion_mlp("trusted_only")))
    rows.append(Row({"method": "supervised", "noise": "none", "rate": 0.0}, fashion_mlp("supervised")))
    return Table("fashion-mlp", "Fashion-MNIST, 60,000 images, 10 trusted images per class", tuple(rows))


def _rows_of_noise(
    experiment: Callable[..., Experiment], names: Sequence[str], noises: Sequence[tuple[str, float]]
) -> list[Row]:
    """Returns a row for each method and noise."""
    return [
        Row({"method": method, "noise": noise, "rate": rate}, experiment(method, noise, rate))
        for method in names
        for noise, rate in noises
    ]


def _noisy_cifar10(
    config: str,
    method: str,
    labels: str = "none",
    noise: str = "none",
    rate: float = 0.0,
    keys: dict[str, Any] | None = None,
    suffix: str = "",
) -> Experiment:
    """Returns an experiment of `configs/<config>.py`, with labels of CIFAR-10N or noise that is drawn."""
    arguments, needs = f"method={method},labels={labels}", ("data.dir", "noise.file")
    if labels == "none":
        arguments, needs = f"{arguments},noise={noise},noise_rate={rate:g}", ("data.dir",)
    name = _name(config, method, labels if labels != "none" else f"{noise}-{rate:g}", suffix)
    return Experiment(name, f"configs/{config}.py:{arguments}", keys or {}, needs)


# The paper's first table in small, and what people got wrong.
CIFAR10_SMALL_NOISE = ({"noise": "uniform", "rate": 0.4}, {"noise": "uniform", "rate": 0.8}, {"labels": "worse"})
CIFAR10_SMALL_METHODS = ("supervised", "l2r", "dividemix", "ieg")
cifar10_small = functools.partial(_noisy_cifar10, "cifar10_small")


def _cifar10_small_table() -> Table:
    """Returns the table of the experiments on CIFAR-10 from scratch with a small network."""
    rows = [
        Row(
            {"method": method, "noise": kind.get("labels", kind.get("noise")), "rate": kind.get("rate", "")},
            cifar10_small(method, **kind),
        )
        for method in CIFAR10_SMALL_METHODS
        for kind in CIFAR10_SMALL_NOISE
    ]
    rows.append(Row({"method": "trusted_only", "noise": "any", "rate": ""}, cifar10_small("trusted_only")))
    rows.append(Row({"method": "supervised", "noise": "none", "rate": ""}, cifar10_small("supervised")))
    return Table("cifar10-small", "CIFAR-10, 10,000 images, 10 trusted images per class", tuple(rows))


# Photographs with labels that people got wrong, on features of a pretrained backbone (configs/cifar10n.py).
CIFAR10N_LABELS = ("aggre", "random1", "worse")
CIFAR10N_NOISE = (("uniform", 0.4), ("uniform", 0.8), ("asymmetric", 0.4))
CIFAR10N_METHODS = ("supervised", "gce", "elr", "l2r", "dividemix", "ieg")
cifar10n = functools.partial(_noisy_cifar10, "cifar10n")


def _cifar10n_table() -> Table:
    """Returns the table of the experiments on CIFAR-10N."""
    rows = []
    for method in CIFAR10N_METHODS:
        rows += [
            Row({"method": method, "noise": labels, "rate": ""}, cifar10n(method, labels)) for labels in CIFAR10N_LABELS
        ]
        rows += [
            Row({"method": method, "noise": noise, "rate": rate}, cifar10n(method, noise=noise, rate=rate))
            for noise, rate in CIFAR10N_NOISE
        ]
    rows.append(Row({"method": "trusted_only", "noise": "any", "rate": ""}, cifar10n("trusted_only")))
    rows.append(Row({"method": "supervised", "noise": "none", "rate": ""}, cifar10n("supervised")))
    title = "CIFAR-10 with CIFAR-10N's labels, frozen EfficientNet-Lite0, 10 trusted images per class"
    return Table("cifar10n", title, tuple(rows))


DIGITS_RATES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
DIGITS_METHODS = ("supervised", "l2r", "ieg")
_DIGITS_COMPONENTS = COMPONENTS | {"no AutoAugment": {"augment.strong": "crop(pad=1)|cutout(0.25)"}}


def digits(method: str, rate: float, keys: dict[str, Any] | None = None, suffix: str = "") -> Experiment:
    """Returns an experiment of configs/digits.py."""
    name = _name("digits", method, f"{rate:g}", suffix)
    return Experiment(name, f"configs/digits.py:method={method},noise_rate={rate:g}", keys or {})


def _digits_tables() -> list[Table]:
    """Returns the tables of the experiments on digits."""
    sweep = [
        Row({"method": method, "rate": rate}, digits(method, rate))
        for method in DIGITS_METHODS
        for rate in DIGITS_RATES
    ]
    sweep += [Row({"method": method, "rate": "any"}, digits(method, 0.0)) for method in ("eg", "trusted_only")]
    ablation = []
    for number, (method, taken_out) in ABLATION.items():
        keys = functools.reduce(lambda keys, part: keys | _DIGITS_COMPONENTS[part], taken_out, {})
        suffix = "-".join(part.replace(" ", "-") for part in taken_out)
        what = method if not taken_out else f"ieg, {', '.join(taken_out)}"
        for rate in (0.4, 0.8):
            ablation.append(Row({"row": number, "what": what, "rate": rate}, digits(method, rate, keys, suffix)))
    title = "Digits, 3 trusted images per class"
    return [
        Table("digits-sweep", f"{title}: uniform noise of every rate, as Figure 1", tuple(sweep)),
        Table("digits-ablation", f"{title}: the rows of Table 7", tuple(ablation)),
        Table("quick", f"{title}: digits-sweep and digits-ablation", tuple(sweep + ablation)),
    ]


def own_tables() -> list[Table]:
    """Returns every table here: the paper's, those of its figures, and the smaller ones."""
    smaller = [_fashion_table(), _fashion_mlp_table(), _cifar10_small_table(), _cifar10n_table(), *_digits_tables()]
    return [*_paper_tables(), *_figure_tables(), *smaller]
