"""The program of a run: shapes, and that no way of laying it out on devices changes what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from jax.sharding import PartitionSpec
from small_step import each_method, fixed_durations

from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.data.batches import EvalBatches, train_batches
from ieg_jax.data.load import load_data
from ieg_jax.errors import UserError
from ieg_jax.plan import hlo
from ieg_jax.runtime import mesh
from ieg_jax.train import program
from ieg_jax.train.step import train_step

SHAPE = program.DataShape((8, 8, 1), (8, 8, 1), num_classes=4, num_examples=100, num_ids=100, num_trusted=8)
BATCH = 32


def build(config, shape=SHAPE, **overrides):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"batch_size": BATCH, "eval_batch_size": BATCH, "mesh.data": 1, **overrides})
    config = config_lib.resolve(config)
    return program.build(config, mesh.create(config), shape, fixed_durations())


def random_batch(shapes, seed):
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if shape.dtype == np.int32:
            return rng.integers(0, 4, shape.shape, dtype=np.int32)
        values = rng.uniform(-1, 1, shape.shape).astype(shape.dtype)
        return (values > 0).astype(shape.dtype) if name == "mask" else values

    return {name: jax.device_put(draw(name, shape), shape.sharding) for name, shape in shapes.items()}


def three_steps(run):
    """Path -> array of the state and the window after three steps, and the evaluation of a batch."""
    state, window = run.init(jax.random.key(0)), run.empty_window()
    for seed in range(3):
        state, window = run.train_step(state, window, random_batch(run.batch, seed), jax.random.key(5))
    evaluated = run.eval_step(state.params, state.batch_stats, state.method, random_batch(run.evaluation[3], 9))
    leaves = jax.tree_util.tree_leaves_with_path((state, window, evaluated))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_step_is_traced_once(tiny_config, monkeypatch):
    """For its shapes, and not again for the program, though that has sums by example which the step does not see."""
    traced = []

    def step(*args, **kwargs):
        traced.append(None)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(program, "train_step", step)
    run = build(tiny_config, **{"method.name": "l2r", "seed": 4321})
    run.lowered_step.as_text()
    assert run.state.examples is not None and len(traced) == 1


def test_the_program_of_few_weights_is_not_optimised(tiny_config, monkeypatch):
    run = build(tiny_config)
    shardings = mesh.create(config_lib.resolve(tiny_config))
    assert program._options_of_init(shardings, run.state) == {"xla_backend_optimization_level": 0}
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    monkeypatch.setattr(program, "FEW_WEIGHTS", weights)
    assert program._options_of_init(shardings, run.state) is None


@pytest.fixture(scope="module")
def plain():
    """Results of one device and the whole batch at once, by (method, batch_groups)."""
    return {}


@pytest.mark.parametrize(
    "method, overrides",
    [
        ("ieg", {"microbatches": 4}),
        pytest.param("l2r", {"microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("gce", {"mesh.data": 8}, marks=pytest.mark.slow),
        ("elr", {"mesh.data": 8}),
        *(
            pytest.param(name, {"mesh.data": 8}, marks=pytest.mark.slow)
            for name in (
                "dividemix",
                "elr_plus",
                "emlc",
                "forward_correction",
                "fsr",
                "gold_loss_correction",
                "l2b",
                "m_correction",
                "incv",
                "mentornet",
                "mentornet_dd",
                "meta_weight_net",
                "mlc",
                "rog",
                "promix",
                "sop",
                "ssr",
                "ssr_plus",
            )
        ),
        pytest.param("co_teaching", {"mesh.data": 2, "mesh.fsdp": 2, "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("ssr_plus", {"mesh.data": 2, "mesh.fsdp": 2, "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("promix", {"mesh.data": 2, "mesh.fsdp": 2, "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("ieg", {"model.remat": True}, marks=pytest.mark.slow),
        ("ieg", {"mesh.data": 2, "mesh.fsdp": 4}),
        pytest.param(
            "ieg",
            {"mesh.data": 2, "mesh.fsdp": 2, "microbatches": 2, "model.remat": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ieg",
            {"mesh.data": 1, "mesh.fsdp": 4, "batch_groups": 1, "optimizer.name": "adam"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_layout_changes_nothing(tiny_config, plain, method, overrides):
    """In float64: batch norm's statistics, ω, λ, every loss, the optimiser's state and the accuracy."""
    tiny_config.method.name, tiny_config.model.dtype, tiny_config.model.width = method, "float64", 2.0
    groups = {"batch_groups": overrides.get("batch_groups", 8)}
    if "optimizer.name" in overrides:
        groups["optimizer.name"] = overrides["optimizer.name"]
    with x64():
        key = (method, *groups.values())
        if key not in plain:
            plain[key] = three_steps(build(tiny_config, **groups))
        found = three_steps(build(tiny_config, **{**groups, **overrides}))
    assert found.keys() == plain[key].keys()
    for path, expected in plain[key].items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-9, atol=1e-11, err_msg=path)


def test_fsdp_splits_parameters_average_and_momentum(tiny_config):
    tiny_config.model.width = 2.0  # 16 channels
    run = build(tiny_config, **{"mesh.data": 2, "mesh.fsdp": 4})
    state = run.init(jax.random.key(0))
    image = run.batch["image"]
    assert image.sharding.shard_shape(image.shape) == (BATCH // 8, 8, 8, 1), "a batch is split over both axes"
    for tree in (state.params, state.ema_params, state.opt_state.trace):
        kernel = tree["conv1"]["kernel"]
        assert kernel.shape == (3, 3, 16, 16)
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 16, 4)}
    head = state.params["head"]
    assert head["kernel"].sharding.spec == PartitionSpec("fsdp"), "16 features before 4 classes: the longer axis"
    assert {shard.data.shape for shard in head["bias"].addressable_shards} == {(1,)}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.batch_stats, state.step)))


def test_a_memory_is_split_by_rows_and_never_gathered(tiny_config):
    """Of 1,024 rows each of eight devices has 128; what a step sends between them is no larger than a batch."""
    tiny_config.method.name = "elr"
    run = build(tiny_config, **{"mesh.data": 8, "batch_groups": 8})
    state = run.init(jax.random.key(0))
    assert {shard.data.shape for shard in state.method["target"].addressable_shards} == {(128, 4)}
    compiled = run.train_step.lower(run.state, run.window, run.batch, run.rng).compile()
    sent = [array.shape for one in hlo.find_collectives(hlo.parse(compiled.as_text())) for array in one.arrays]
    assert sent and not [shape for shape in sent if 1024 in shape or 128 in shape]


def test_rows_that_devices_do_not_divide_are_on_each(tiny_config):
    tiny_config.method.name = "elr"
    run = build(tiny_config, **{"mesh.data": 3, "batch_size": 33, "eval_batch_size": 33})
    assert run.state.method["target"].sharding.is_fully_replicated


def test_an_array_that_cannot_be_split_is_left_whole(tiny_config):
    tiny_config.mesh.data, tiny_config.mesh.fsdp = 2, 4
    tiny_config.trusted.batch_size = tiny_config.eval_batch_size = 16
    shardings = mesh.create(tiny_config)
    shapes = {"odd": np.zeros((3, 3, 5)), "scalar": np.zeros(()), "tie": np.zeros((8, 8))}
    specs = {name: place.spec for name, place in shardings.split(shapes).items()}
    assert specs == {"odd": PartitionSpec(), "scalar": PartitionSpec(), "tie": PartitionSpec(None, "fsdp")}


@pytest.mark.slow
def test_microbatches_need_less_memory(tiny_config):
    """Of activations: with eight parts, less than a third of them (what is left are images, logits and gradients)."""
    tiny_config.batch_groups = 8

    def temporary(microbatches):
        run = build(tiny_config, batch_size=256, microbatches=microbatches)
        compiled = run.train_step.lower(run.state, run.window, run.batch, run.rng).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


@pytest.mark.parametrize("method", each_method())
def test_shapes_are_those_of_the_pipeline(tiny_config, method):
    check_shapes(tiny_config, method, "float32")


@pytest.mark.parametrize("transfer", ["bfloat16", "uint8"])
def test_shapes_of_packed_images_are_those_of_the_pipeline(tiny_config, transfer):
    check_shapes(tiny_config, "ieg", transfer)


def check_shapes(tiny_config, method, transfer):
    tiny_config.method.name, tiny_config.trusted.batch_size, tiny_config.data.transfer = method, 8, transfer
    data = load_data(tiny_config)
    shardings = mesh.create(tiny_config)
    shape = program.data_shape(tiny_config, data)
    batch = next(train_batches(tiny_config, data, methods.get(method).streams, 0, 1, shardings.batch))
    evaluated = next(iter(EvalBatches(tiny_config, data.evaluation, shardings.batch)))
    for promised, found in (
        (program.batch_shape(tiny_config, shape), batch),
        (program.evaluation_batch_shape(tiny_config, shape), evaluated),
    ):
        assert {k: (v.shape, v.dtype) for k, v in promised.items()} == {k: (v.shape, v.dtype) for k, v in found.items()}


@pytest.mark.parametrize("method, kind", [
    ("supervised", "bfloat16"), ("supervised", "uint8"), pytest.param("ieg", "bfloat16", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_sees_what_was_sent(tiny_config, method, kind):
    """The step on packed images is the step on the float32 images that they stand for, worked out by numpy."""
    tiny_config.method.name = method
    plain, packed = build(tiny_config), build(tiny_config, dataclasses.replace(SHAPE, transfer=kind))
    names = ("image", "views", "probe_image") if method == "ieg" else ("image",)
    images = {name: array.dtype for name, array in packed.batch.items() if array.ndim > 1}
    assert images == dict.fromkeys(names, jnp.dtype(kind))
    batch = random_batch(plain.batch, 0)
    few = {
        name: np.asarray(array, kind) if kind == "bfloat16" else np.round((np.asarray(array) + 1) * 127.5).astype(kind)
        for name, array in batch.items()
        if array.ndim > 1
    }
    many = {
        name: array.astype(np.float32) if kind == "bfloat16" else array / np.float32(127.5) - np.float32(1)
        for name, array in few.items()
    }
    assert all(0 < np.abs(many[name] - batch[name]).max() < 1 / 254 for name in many), "rounded, and no more than that"
    results = []
    for run, images in ((plain, many), (packed, few)):
        one = batch | {name: jax.device_put(value, run.batch[name].sharding) for name, value in images.items()}
        made = run.train_step(run.init(jax.random.key(0)), run.empty_window(), one, jax.random.key(5))
        results.append(jax.tree.leaves(made))
    for here, there in zip(*results, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


def test_features_are_not_sent_as_grey_levels(tiny_config):
    data = load_data(tiny_config)
    features = dataclasses.replace(data.train, images=np.zeros((len(data.train), 1, 1, 5), np.float32))
    tiny_config.augment.standard = "gaussian(0.1)"
    tiny_config.data.transfer = "uint8"
    assert program.data_shape(tiny_config, data).transfer == "uint8"
    with pytest.raises(UserError, match="data.transfer=uint8 is for images in .* set it to float32 or bfloat16"):
        program.data_shape(tiny_config, dataclasses.replace(data, train=features))


def test_a_lookahead_through_no_layer_is_refused(tiny_config):
    tiny_config.meta.layers = "^haed/"
    with pytest.raises(UserError, match=r"meta.layers='\^haed/' matches none of the \d+ parameters, such as "):
        program.build(tiny_config, mesh.create(tiny_config), SHAPE, fixed_durations())
