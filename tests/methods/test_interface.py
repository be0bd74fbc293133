"""What a module may leave out, whose keys are whose, what is drawn and remembered, and a method made up on the spot."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import ROOT, assert_same_run, variables
from small_step import CLASSES, each_method, make, make_batch

from configs import default
from ieg_jax import methods
from ieg_jax.config import Key, above
from ieg_jax.errors import UserError
from ieg_jax.methods import describe, supervised
from ieg_jax.methods.base import ALL_VIEWS, NOISY, TRUSTED, Aux, Context, Stream, Supervision, read, total
from ieg_jax.methods.parts import losses
from ieg_jax.reproduce import cost, experiments, jobs
from ieg_jax.reproduce import results as finished
from ieg_jax.train import check
from ieg_jax.train.loop import train_and_evaluate

KEY = jax.random.key(1)


def toy():
    """A method with everything: a key, three streams, two networks, memory by row, epochs, a prediction of its own."""

    def init(ctx, rng, num_rows):
        return {"seen": jnp.zeros((num_rows, 2)), "bias": jax.random.normal(rng, (ctx.num_classes,))}

    def supervise(ctx, state, batch, rng):
        seen = state.method["seen"]
        values = seen[batch["row"]] + jnp.array([1.0, 0.0])
        memory = {**state.method, "seen": ctx.write_rows(seen, batch["row"], values)}
        return Supervision(memory=memory, observed={"toy/seen": jnp.sum(memory["seen"][:, 0])})

    def loss(ctx, params, state, batch, supervision, rng):
        logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
        second, _ = ctx.forward(params, batch_stats, batch["second_image"])
        terms = {
            "main": jnp.mean(losses.cross_entropy(logits, ctx.one_hot(batch["label"])[None])),
            "second": ctx.config.method.toy_weight
            * jnp.mean(losses.cross_entropy(second, ctx.one_hot(batch["second_label"])[None])),
            "weight_decay": ctx.weight_decay(params),
        }
        return total(terms), Aux(terms, logits.mean(0), batch_stats)

    def on_epoch(ctx, state, look):
        p = look.probabilities()
        memory, count = look.memory(), len(look.labels)
        assert p.shape == (2, count, ctx.num_classes) and memory["seen"].shape == (count, 2)
        memory["seen"][:, 1] = p.mean(0)[np.arange(count), look.labels]
        likely = np.argsort(memory["seen"][:, 1], kind="stable")
        state = state.replace(method={**state.method, "seen": memory["seen"]})
        return state, {"main": likely[count // 2 :], "second": likely[: 1 + look.epoch]}

    def predict(ctx, variables, memory, images):
        return jax.nn.softmax(jnp.log(ctx.probabilities(variables, images).mean(0)) + memory["bias"])

    module = types.ModuleType("toy", "Toy: a method of the tests.")
    module.TITLE, module.NETWORKS = "Toy", 2
    module.KEYS = {"toy_weight": Key(0.5, above(0), "Weight of the second stream.")}
    module.STREAMS = {
        "main": Stream(),
        "second": Stream(NOISY, views=ALL_VIEWS),
        "probe": Stream(TRUSTED, balanced=True),
    }
    for function in (init, supervise, loss, on_epoch, predict):
        setattr(module, function.__name__, function)
    return module


@pytest.fixture
def with_toy(monkeypatch):
    """One line in the registry."""
    monkeypatch.setitem(methods.REGISTRY, "toy", toy())


@pytest.fixture
def toy_config(with_toy, tiny_config):
    fresh = default.get_config()  # with the key of the toy
    fresh.update(ConfigDict(tiny_config.to_dict() | {"method": fresh.method}))
    fresh.method.name, fresh.num_train_steps, fresh.batch_size = "toy", 200, 64
    fresh.checkpoint_every_steps, fresh.log_every_steps, fresh.eval_every_steps = 30, 10, 100
    fresh.num_train_steps, fresh.data.train_size = 14, 200
    fresh.checkpoint_every_steps, fresh.log_every_steps, fresh.eval_every_steps = 5, 2, 7
    return fresh


def test_a_method_is_one_file_and_one_line(with_toy):
    """It shows up in configuration, errors, docs, costs and experiments."""
    config = default.get_config()
    assert config.method.toy_weight == 0.5
    config.method.toy_weight = 0.7
    with pytest.raises(UserError, match=r"method.toy_weight=0.7, but method.name=ieg does not read it: .*\(toy\)"):
        check.validate(config)
    config.method.name = "toy"
    check.validate(config)
    config.method.toy_weight = 0.0
    with pytest.raises(UserError, match="method.toy_weight: got 0.0, expected above 0"):
        check.validate(config)
    config.method.name = "toi"
    with pytest.raises(UserError, match="Did you mean 'toy'"):
        check.validate(config)
    page = describe.page()
    assert "## Toy: `toy`" in page and "`method.toy_weight`" in page and "Weight of the second stream." in page
    digits = experiments.digits("toy", 0.4)
    supervised_digits = experiments.digits("supervised", 0.4)
    flops = [cost.training_flops(finished.load_config(one, 0)) for one in (digits, supervised_digits)]
    assert flops[0] == pytest.approx(2 * flops[1]), "two networks, three passes each"
    assert "--config=configs/digits.py:method=toy,noise_rate=0.4,seed=0" in jobs.command_line(digits, 0, "run")


def test_the_page_is_that_of_the_modules():
    assert (ROOT / "docs" / "methods.md").read_text() == describe.page(), "make docs writes it anew"


def test_only_the_loss_is_required():
    module = types.ModuleType("bare", "Nothing but a loss.")
    module.loss = supervised.loss
    method = read("bare", module)
    assert (method.title, method.networks, method.keys, method.on_epoch) == ("bare", 1, {}, None)
    assert method.streams == {"main": Stream()} and not method.needs_trusted and not method.predicts_by_memory
    assert method.passes(None) == 3 and method.init(None, None, 7) == {}
    assert method.supervise(None, None, None, None) == Supervision()


def test_who_needs_trusted_images():
    without = {name for name in methods.REGISTRY if not methods.get(name).needs_trusted}
    assert without == {
        "supervised", "gce", "elr", "elr_plus", "co_teaching", "dividemix", "forward_correction", "fsr", "incv",
        "m_correction", "mentornet", "promix", "rog", "sop", "ssr", "ssr_plus",
    }  # fmt: skip


def test_a_key_is_one_key_for_all(monkeypatch):
    other = types.ModuleType("other", "Means something else by τ.")
    other.KEYS, other.loss = {"temperature": Key(2.0, above(0), "Another temperature.")}, supervised.loss
    monkeypatch.setitem(methods.REGISTRY, "other", other)
    with pytest.raises(ValueError, match="method.temperature of the method other"):
        methods.keys()


class Recorder:
    """A configuration that notes which of its values are read."""

    def __init__(self, group, seen, prefix=""):
        self._group, self._seen, self._prefix = group, seen, prefix

    def __getattr__(self, name):
        value, key = getattr(self._group, name), f"{self._prefix}{name}"
        if isinstance(value, ConfigDict):
            return Recorder(value, self._seen, f"{key}.")
        self._seen.add(key)
        return value


@pytest.mark.parametrize("name", methods.REGISTRY)
def test_each_method_reads_the_keys_that_it_has(name):
    """No more and no less: what the module lists is what its functions ask for."""
    context, _, state, _ = make(name)
    seen, described = set(), methods.get(name)
    config = default.get_config()
    config.method.name, config.model.name, config.batch_size = name, "tiny", 16
    method = described.bind(dataclasses.replace(context, config=Recorder(config, seen)))
    jax.eval_shape(
        lambda: method.loss(state.params, state, make_batch(), method.supervise(state, make_batch(), KEY), KEY)
    )
    jax.eval_shape(lambda: method.init(KEY, 50))
    seen_of_all = np.random.default_rng(0).dirichlet(np.ones(CLASSES), (method.networks, 50))
    look = types.SimpleNamespace(
        epoch=1000, is_last=False, seed=0, labels=np.arange(50) % CLASSES, probabilities=lambda: seen_of_all,
        features=lambda: seen_of_all, memory=lambda: jax.tree.map(lambda leaf: np.array(leaf[:50]) if leaf.ndim and
            len(leaf) >= 50 else np.array(leaf), state.method),
    )  # fmt: skip
    if method.on_epoch:
        method.on_epoch(state, look)
    if method.fit:
        method.fit(look)
    assert {key for key in seen if key.startswith(("method.", "meta."))} == set(described.keys)


@pytest.mark.parametrize(
    "method, key, value, readers",
    [
        ("supervised", "method.temperature", 0.7, "dividemix, eg, ieg, mixmatch, promix"),
        ("supervised", "meta.learning_rate", 0.2, "emlc, fsr, ieg, l2b, l2r, meta_weight_net, mlc"),
        ("l2r", "meta.momentum", False, None),
        ("l2r", "meta.pseudo_label_gradient", True, None),
        ("gce", "method.forget_rate", 0.5, "co_teaching"),
        ("ieg", "method.q", 0.5, "gce"),
        ("elr", "method.mixing_alpha", 0.5, "elr_plus"),
        ("ssr", "method.feature_weight", 0.5, "ssr_plus"),
        ("ssr_plus", "method.select_share", 0.4, "promix"),
    ],
)
def test_a_key_that_is_set_and_not_read(method, key, value, readers):
    config = default.get_config()
    config.method.name = method
    config.update_from_flattened_dict({key: value})
    if readers is None:  # the argument `reference` sets it for every method, or only the usual value is allowed
        readers = "ieg"
    if key == "meta.pseudo_label_gradient":
        check.validate(config)
        return
    with pytest.raises(UserError, match=rf"{key}={value}, but method.name={method} does not read it: .*\({readers}\)"):
        check.validate(config)


def test_configurations_set_what_the_method_reads():
    config = default.get_config()
    config.method.name = "l2r"
    methods.tune(config, consistency_weight=3.0)
    assert config.method.consistency_weight == 20.0
    config.method.name = "eg"
    methods.tune(config, consistency_weight=3.0)
    assert config.method.consistency_weight == 3.0
    methods.choose(config, "gce")
    assert (config.method.name, config.method.consistency_weight) == ("gce", 20.0)
    check.validate(config)


def test_a_row_that_occurs_twice_keeps_its_last_value():
    ctx = Context(None, None, None, 3)
    memory = jnp.zeros((6, 2))
    rows, values = jnp.array([4, 1, 4, 0]), jnp.arange(8.0).reshape(4, 2)
    expected = np.zeros((6, 2))
    for row, value in zip(rows, values, strict=True):
        expected[row] = value
    np.testing.assert_array_equal(jax.jit(ctx.write_rows)(memory, rows, values), expected)
    np.testing.assert_array_equal(ctx.write_rows(memory, jnp.array([5]), jnp.ones((1, 2)))[5], 1.0)


def test_memory_is_by_row_and_not_by_id(with_toy, tiny_config, tmp_path):
    """Ids of digits run to 1,796 in fewer rows; every example of an epoch is written once."""
    tiny_config.method.name, tiny_config.mesh.data, tiny_config.eval_batch_size = "elr", 8, 96
    tiny_config.data.train_size = 160
    tiny_config.num_train_steps = 10  # 160 examples, 16 a step: one epoch
    train_and_evaluate(tiny_config, str(tmp_path))
    target = variables(tmp_path, 10)["[0]['method']['target']"]
    assert target.shape == (1024, 10)
    np.testing.assert_allclose(target[:160].sum(-1), 0.3, rtol=1e-3, err_msg="each was seen once: (1 − β) of 1")
    assert not target[160:].any()


def test_everything_at_once_and_again_after_a_stop(toy_config, tmp_path, monkeypatch):
    """Memory, chosen rows and both networks are what an undisturbed run has, and on 8 devices what they are on 1."""
    from ieg_jax.errors import Interrupted
    from ieg_jax.runtime import processes

    train_and_evaluate(toy_config, str(tmp_path / "whole"))
    for stop in (3, 5, 9):
        monkeypatch.setattr(processes.StopRequest, "requested", lambda self, step, stop=stop: step == stop)
        with pytest.raises(Interrupted):
            train_and_evaluate(toy_config, str(tmp_path / "parts"))
    monkeypatch.setattr(processes.StopRequest, "requested", lambda self, step: False)
    train_and_evaluate(toy_config, str(tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 14)
    state = variables(tmp_path / "whole", 14)
    main, second = (state[f"[0]['rows']['{name}']"] for name in ("main", "second"))
    assert (main.sum(), second.sum(), len(main)) == (100, 1 + 14 * 64 // 200, 200)
    assert state["[0]['params']['head']['kernel']"].shape[0] == 2


# Every phase of a method begins in a training of a few short epochs.
EARLY = {"confidence_threshold": 0.3, "neighbours": 5, "selection_rounds": 1, "reward_size": 20} | dict.fromkeys(
    (
        "pretrain_epochs", "guess_after_epochs", "divide_epochs", "warmup_epochs", "bootstrap_epochs", "gold_epochs",
        "transition_epochs", "reweight_epochs", "forget_epochs", "selection_epochs", "burn_in_epochs",
    ),
    1.0,
)  # fmt: skip


@pytest.mark.parametrize("name", each_method())
def test_each_method_goes_on_after_a_stop_and_can_be_taken_along(tiny_config, tmp_path, monkeypatch, name):
    """Stopped within an epoch and at the end of one; then predicted with, and exported as weights and as a function."""
    from ieg_jax import inference
    from ieg_jax.data.load import load_data
    from ieg_jax.errors import Interrupted
    from ieg_jax.runtime import processes

    tiny_config.method.name, tiny_config.data.train_size, tiny_config.num_train_steps = name, 64, 10
    tiny_config.checkpoint_every_steps, tiny_config.eval_every_steps = 10, 5
    methods.tune(tiny_config, **EARLY)
    result = train_and_evaluate(tiny_config, str(tmp_path / "whole"))
    for stop in (4, 7):
        monkeypatch.setattr(processes.StopRequest, "requested", lambda self, step, stop=stop: step == stop)
        with pytest.raises(Interrupted):
            train_and_evaluate(tiny_config, str(tmp_path / "parts"))
    monkeypatch.setattr(processes.StopRequest, "requested", lambda self, step: False)
    train_and_evaluate(tiny_config, str(tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 10)
    for path, array in variables(tmp_path / "whole", 10).items():
        if array.dtype.kind == "f":  # an infinite memory may stand for what has not been seen
            assert not np.isnan(array).any() and (np.isfinite(array).all() or "['method']" in path), path

    trained, evaluation = inference.load(tmp_path / "whole"), load_data(tiny_config).evaluation
    found = inference.predict(trained, evaluation)
    assert np.mean(found.argmax(-1) == evaluation.labels) == pytest.approx(result["test_accuracy_last"])
    inference.export(trained, tmp_path / "weights")
    np.testing.assert_allclose(inference.predict(inference.load(tmp_path / "weights"), evaluation), found, atol=1e-6)
    inference.export_stablehlo(trained, tmp_path / "function")
    served = inference.load_stablehlo(tmp_path / "function")
    # The logits of rog are differences of large numbers, whose rounding depends on the program.
    np.testing.assert_allclose(served(evaluation.images[:20]), found[:20], atol=5e-5)


def test_the_prediction_of_a_method_is_used_everywhere(toy_config, tmp_path):
    """In evaluation, `inference.predict`, exported weights and functions."""
    from ieg_jax import inference
    from ieg_jax.data.load import load_data

    result = train_and_evaluate(toy_config, str(tmp_path / "run"))
    trained = inference.load(tmp_path / "run")
    evaluation = load_data(toy_config).evaluation
    found = inference.predict(trained, evaluation)
    assert np.mean(found.argmax(-1) == evaluation.labels) == pytest.approx(result["test_accuracy"])
    state = variables(tmp_path / "run", 14)
    images = jnp.asarray(evaluation.images[:20] / np.float32(127.5) - 1)
    each = []
    for network in (0, 1):
        one = jax.tree.map(lambda leaf, network=network: leaf[network], trained.params)
        stats = jax.tree.map(lambda leaf, network=network: leaf[network], trained.batch_stats)
        each.append(jax.nn.softmax(trained.network.apply({"params": one, "batch_stats": stats}, images, train=False)))
    expected = jax.nn.softmax(jnp.log((each[0] + each[1]) / 2) + state["[0]['method']['bias']"])
    np.testing.assert_allclose(found[:20], expected, atol=1e-5)
    inference.export(trained, tmp_path / "weights")
    np.testing.assert_allclose(inference.predict(inference.load(tmp_path / "weights"), evaluation), found, atol=1e-6)
    inference.export_stablehlo(trained, tmp_path / "function")
    served = inference.load_stablehlo(tmp_path / "function")
    np.testing.assert_allclose(served(evaluation.images[:20]), expected, atol=1e-5)


def test_rows_that_do_not_exist_are_an_error(toy_config, tmp_path, monkeypatch):
    def on_epoch(ctx, state, look):
        return state, {"main": [0, 200]}

    monkeypatch.setattr(methods.REGISTRY["toy"], "on_epoch", on_epoch)
    with pytest.raises(UserError, match="chose rows of main outside 0 to 199"):
        train_and_evaluate(toy_config, str(tmp_path))


def test_no_module_of_the_tests_is_left_in_the_registry():
    assert "toy" not in methods.REGISTRY and "toy" not in sys.modules
