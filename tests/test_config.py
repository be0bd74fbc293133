import ast

import pytest
from runs import ROOT

from configs import default, quickstart
from ieg_jax import config as config_lib
from ieg_jax.errors import UserError
from ieg_jax.train import check


def test_arguments_have_the_type_of_their_default():
    args = config_lib.parse_arguments("rate=0.4, name=x,n=3,flag=true", rate=0.1, name="a", n=1, flag=False, other=2)
    assert vars(args) == {"rate": 0.4, "name": "x", "n": 3, "flag": True, "other": 2}
    assert config_lib.parse_arguments("", a=1).a == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("nois=1", "unknown config argument 'nois'; known arguments: noise"),
        ("noise=high", "noise: got 'high', expected float"),
        ("noise", "expected name=value"),
        ("noise=1,noise=2", "given twice"),
    ],
)
def test_bad_arguments(text, message):
    with pytest.raises(UserError, match=message):
        config_lib.parse_arguments(text, noise=0.1)


def test_reference_sets_every_key_on_which_paper_and_authors_differ():
    plain, authors, paper = (default.get_config(f"reference={r}") for r in ("default", "authors", "paper"))
    get = config_lib.get
    for key, (authors_value, paper_value) in config_lib.REFERENCE.items():
        assert authors_value != paper_value
        assert get(authors, key) == authors_value
        assert get(paper, key) == paper_value
        expected = paper_value if key == "meta.pseudo_label_gradient" else authors_value
        assert get(plain, key) == expected
    with pytest.raises(UserError, match="paper"):
        default.get_config("reference=book")


def test_the_page_on_the_paper_names_every_key_of_the_reference_switch():
    page = (ROOT / "docs" / "paper.md").read_text()
    for key in config_lib.REFERENCE:
        assert f"`{key}`" in page


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("method.name", "l3r", "method.name: got 'l3r', expected one of .*l2r.*Did you mean 'l2r'"),
        ("model.name", "wideresnet", "expected one of wide_resnet"),
        ("data.name", "cifar11", "expected one of digits"),
        ("noise.kind", "salt", "noise.kind: got 'salt', expected one of none, uniform"),
        ("noise.rate", 1.5, "noise.rate: got 1.5"),
        ("noise.rate", -0.1, "noise.rate: got -0.1"),
        ("noise.rate", float("nan"), "noise.rate: got nan"),
        ("trusted.per_class", 0, "trusted.per_class: got 0"),
        ("batch_groups", 7, "batch_size=64 is not a multiple of batch_groups=7"),
        ("num_train_steps", 5, "exactly one of num_train_steps and num_train_epochs"),
        ("num_train_epochs", 0.0, "exactly one of num_train_steps and num_train_epochs"),
        ("schedule.step_boundaries", (50, 40), r"schedule.step_boundaries: got \(50, 40\), expected increasing"),
        ("schedule.step_factor", 1.0, "schedule.step_factor: got 1.0"),
        ("data.train_size", -1, "data.train_size: got -1, expected 0 \\(all\\)"),
        ("schedule.first_cycle_epochs", -1.0, "schedule.first_cycle_epochs: got -1.0"),
        ("augment.strong", "crpo(2)", "Did you mean 'crop'"),
        ("augment.strong", "crop(pad=4", "is no policy"),
        ("augment.standard", "crop(fil=4)", "crop takes numbers for pad, fill"),
        ("augment.standard", "crop(pad='x')", "crop takes numbers"),
        ("augment.num_views", 1, "needs at least 2"),
        ("meta.layers", "(", "expected a regular expression"),
        ("optimizer.momentum", 1.0, "optimizer.momentum"),
        ("class_weight", "balance", "class_weight: got 'balance', expected one of none, balanced"),
    ],
)
def test_impossible_values(key, value, message):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        check.validate(config)


def test_durations():
    config = default.get_config()
    config.num_train_epochs = 2.5
    assert config_lib.duration(config, "num_train", steps_per_epoch=10.2) == 26  # 25.5
    assert config_lib.duration(config, "log_every", steps_per_epoch=10.2) == 50
    config.checkpoint_every_epochs = 0.001
    assert config_lib.duration(config, "checkpoint_every", steps_per_epoch=10) == 1


def test_differences():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5}, "class_weight": "none", "e": 0}
    assert config_lib.differences(old, new) == [
        "b.c: 2 -> 5", "b.d: 3 -> '(no such key)'", "e: '(no such key)' -> 0",
    ]  # fmt: skip
    assert config_lib.differences({}, {"class_weight": "none"}) == [], "what runs did before there was the key"


def test_quickstart_arguments():
    config = quickstart.get_config("method=l2r,noise_rate=0.4,trusted_per_class=3,seed=7")
    assert (config.method.name, config.noise.rate, config.trusted.per_class) == ("l2r", 0.4, 3)
    assert config.seed == config.noise.seed == config.trusted.seed == 7


def chains(tree):
    """Dotted names of the attribute chains in a syntax tree, such as `context.config.method.name`."""
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(parts)])


def test_every_key_is_read_by_the_package():
    """A key that nothing but the validation reads is a dead option."""
    read = set()
    for path in (ROOT / "ieg_jax").rglob("*.py"):
        if path.name != "config.py":
            read |= set(chains(ast.parse(path.read_text())))
    flat = config_lib.flatten(default.get_config().to_dict())
    durations = {f"{name}_{unit}" for name in config_lib.DURATIONS for unit in ("steps", "epochs")}
    for key in flat.keys() - durations:
        # Read as config.group.key, or as group.key where a function is given the group.
        needle = key if "." in key else f"config.{key}"
        assert any(f".{chain}".endswith(f".{needle}") for chain in read), f"nothing reads {key}"
