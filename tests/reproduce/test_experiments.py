"""Every row of the paper has a configuration, which loads and means what the row says."""

import dataclasses

import pytest
from runs import ROOT

from ieg_jax import methods
from ieg_jax.errors import UserError
from ieg_jax.methods import published
from ieg_jax.reproduce import catalogue, experiments, results
from ieg_jax.train import check

PLACES = {"noise.file": "labels.npy"}
# Methods of the paper's tables that have another name here.
RENAMED = {"chen2019": "incv"}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def rows(table, **columns):
    found = [row for row in catalogue.tables()[table].rows if columns.items() <= row.columns.items()]
    assert found, (table, columns)
    return found


def config_of(row):
    return results.load_config(row.experiment, 0)


def test_every_printed_number_has_a_row():
    printed = published.paper_rows()
    assert len(printed) == 148
    tables = catalogue.tables()
    assert {row["table"] for row in printed} <= tables.keys()
    shown = [row for name in {row["table"] for row in printed} for row in tables[name].rows]
    assert sorted(row.paper["top1"] for row in shown) == sorted(row["top1"] for row in printed)
    for row in shown:
        method = row.columns["method"]
        ours = experiments.ABLATION[method][0] if method in experiments.ABLATION else RENAMED.get(method, method)
        assert row.experiment is not None and ours in methods.REGISTRY, row
        assert config_of(row).method.name == ours


def all_experiments():
    found = {}
    for table in catalogue.tables().values():
        for name, experiment in table.experiments.items():
            assert found.setdefault(name, experiment) == experiment, f"{name} names two experiments"
    return found


def test_every_configuration_is_valid():
    for experiment in all_experiments().values():
        places = {key: value for key, value in PLACES.items() if key in experiment.needs}
        config = results.load_config(dataclasses.replace(experiment, keys=experiment.keys | places), 7)
        assert config.seed == config.trusted.seed == 7 + experiment.first_seed
        check.validate(config)


@pytest.mark.parametrize(
    "table, columns, keys",
    [
        (
            "1",
            {"method": "ieg", "network": "resnet29_v2", "rate": 0.8},
            {"data.name": "cifar10", "noise.kind": "uniform", "noise.rate": 0.8, "trusted.per_class": 10,
             "model.name": "resnet29_v2", "num_train_steps": 200_000, "method.consistency_weight": 20.0},
        ),
        ("1", {"method": "l2r", "rate": 0.4}, {"trusted.per_class": 100, "model.width": 10.0}),
        ("2", {"method": "ieg", "trusted": 5, "rate": 0.2}, {"data.name": "cifar100", "trusted.per_class": 5}),
        ("3", {"method": "ieg", "network": "wrn28_10", "rate": 0.8}, {"noise.kind": "asymmetric", "noise.rate": 0.8}),
        ("4", {"method": "l2r", "dataset": "cifar100"}, {"noise.kind": "file", "noise.rate": 0.0}),
        (
            "5",
            {"method": "ieg", "dataset": "webvision_mini"},
            {"model.name": "resnet50_v2", "data.variant": "mini", "model.dtype": "bfloat16"},
        ),
        ("6", {"method": "eg", "network": "wrn28_2", "dataset": "cifar10"}, {"model.width": 2.0, "method.name": "eg"}),
        ("7", {"method": "ieg_4", "rate": 0.8}, {"method.consistency_weight": 0.0, "method.mixup": True}),
        ("7", {"method": "ieg_6", "rate": 0.8}, {"method.consistency_weight": 20.0, "method.mixup": False}),
        ("7", {"method": "ieg_8", "rate": 0.8}, {"method.relabel": False, "method.mixup": True}),
        (
            "A1",
            {"method": "ieg", "noise": "open_set:cifar100+imagenet"},
            {"noise.kind": "open_set", "noise.open_set": "cifar100,imagenet"},
        ),
        ("A2", {"rate": 0.99}, {"noise.rate": 0.99, "trusted.per_class": 10}),
        ("1", {"method": "gce", "rate": 0.8}, {"method.q": 0.7, "model.width": 10.0, "noise.kind": "uniform"}),
        ("3", {"method": "gce", "rate": 0.4}, {"noise.kind": "asymmetric", "noise.rate": 0.4}),
        ("4", {"method": "rog", "dataset": "cifar10"}, {"model.name": "densenet100", "noise.kind": "file"}),
        ("A1", {"method": "rog", "noise": "open_set:cifar100"}, {"model.name": "densenet100", "method.name": "rog"}),
        ("1", {"method": "mentornet_dd", "rate": 0.4}, {"trusted.per_class": 500, "method.name": "mentornet_dd"}),
        ("5", {"method": "chen2019"}, {"model.name": "inception_resnet_v2", "method.name": "incv"}),
    ],
)  # fmt: skip
def test_a_row_means_what_it_says(table, columns, keys):
    for row in rows(table, **columns):
        flat = results.flat(config_of(row).to_dict())
        assert {key: flat[key] for key in keys} == keys


def test_components_of_the_ablation():
    """Each row of Table 7 has what the legible part of the table, and its text, says of it."""
    strong = {row.columns["method"]: config_of(row).augment.strong for row in rows("7", rate=0.4)}
    assert "autoaugment" in strong["ieg_5"] and "autoaugment" not in strong["ieg_7"]
    assert strong["ieg_7"] == "crop(pad=4,fill=0,last=0)|flip|cutout(0.5)", "only flip, random crop and cutout"
    assert "cutout" not in config_of(rows("text-3.5", rate=0.4)[0]).augment.strong
    assert config_of(rows("7", method="ieg_1", rate=0.4)[0]).method.name == "l2r"
    assert rows("7", method="ieg_5", rate=0.8)[0].experiment == rows("A2", rate=0.8)[0].experiment, "run once"


def test_figures_have_their_runs():
    decay = catalogue.tables()["figure-A1"].rows[1]
    assert results.load_config(decay.experiment, 0).schedule.name == "step"
    weights = [config_of(row).method.consistency_weight for row in catalogue.tables()["figure-A2"].rows]
    assert weights == [1, 5, 10, 20]
    assert {config_of(row).noise.rate for row in catalogue.tables()["figure-2"].rows} >= {0.4, 0.99}
    assert {config_of(row).method.name for row in catalogue.tables()["figure-1"].rows} >= {"ieg", "eg", "supervised"}


def test_names_on_the_command_line():
    table, found = catalogue.find("text-3.3")
    assert table.name == "text-3.3" and found == table.experiments
    one = "cifar10-ieg-wrn28_10-uniform-0.8-10"
    table, found = catalogue.find(f"1.{one}")
    assert table.name == "1" and list(found) == [one]
    table, found = catalogue.find("leaderboard-digits.*-emlc-0.*")
    assert [name.removesuffix("-tuned") for name in found] == ["digits-emlc-0.4", "digits-emlc-0.8"]
    with pytest.raises(UserError, match="'9': no such table, expected one of 1, 2, 3"):
        catalogue.find("9")
    with pytest.raises(UserError, match="table 7 has no 'x'"):
        catalogue.find("7.x")
