import jax
import numpy as np
import pytest

from configs import default
from ieg_jax.data import pipeline, sources
from ieg_jax.data.sources import Split
from ieg_jax.errors import UserError


@pytest.fixture(scope="module")
def config():
    config = default.get_config()
    config.batch_size = 48
    config.trusted.batch_size = 20
    config.trusted.per_class = 2
    config.noise.kind, config.noise.rate = "uniform", 0.5
    return config


@pytest.fixture(scope="module")
def data(config):
    return pipeline.load(config)


SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def batches(config, data, start, stop):
    return [jax.device_get(b) for b in pipeline.train_batches(config, data, start, stop, SHARDING)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_shapes(config, data):
    batch = batches(config, data, 0, 1)[0]
    assert {k: v.shape for k, v in batch.items()} == {
        "image": (48, 8, 8, 1), "views": (48, 1, 8, 8, 1), "label": (48,), "clean_label": (48,), "id": (48,),
        "probe_image": (20, 8, 8, 1), "probe_label": (20,),
    }  # fmt: skip
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1
    assert np.abs(batch["views"][:, 0] - batch["image"]).max() > 0.1


def test_an_epoch_shows_each_example_once_in_an_order_of_its_own(config, data):
    ids = np.concatenate([b["id"] for b in batches(config, data, 0, 60)])
    n = len(data.train)
    first, second = ids[:n], ids[n : 2 * n]
    assert sorted(first) == sorted(second) == sorted(data.train.ids)
    assert (first != second).mean() > 0.9
    assert (first != np.sort(first)).mean() > 0.9


def test_starting_at_a_step_gives_the_same_batches(config, data):
    for a, b in zip(batches(config, data, 0, 30)[27:], batches(config, data, 27, 30), strict=True):
        assert_equal(a, b)


def test_labels_and_images_belong_together(config, data):
    plain = config.copy_and_resolve_references()
    plain.augment.standard = ""
    row = {int(i): r for r, i in enumerate(data.train.ids)}
    for batch in batches(plain, data, 3, 5):
        rows = [row[int(i)] for i in batch["id"]]
        np.testing.assert_array_equal(batch["label"], data.train.labels[rows])
        np.testing.assert_array_equal(batch["clean_label"], data.train.clean_labels[rows])
        np.testing.assert_allclose(batch["image"], data.train.images[rows] / 127.5 - 1, atol=1e-6)


def test_the_same_image_is_augmented_anew_each_time(config, data):
    seen = {}
    for batch in batches(config, data, 0, 54):
        for i, image in zip(batch["id"], batch["views"], strict=True):
            seen.setdefault(int(i), []).append(image)
    twice = [v for v in seen.values() if len(v) > 1]
    assert len(twice) > 100
    assert np.mean([np.array_equal(v[0], v[1]) for v in twice]) < 0.01


def test_seed_changes_order_and_augmentation_but_neither_noise_nor_split(config, data):
    other = config.copy_and_resolve_references()
    other.seed = 1
    assert (batches(other, data, 0, 1)[0]["id"] != batches(config, data, 0, 1)[0]["id"]).mean() > 0.9
    again = pipeline.load(other)
    np.testing.assert_array_equal(again.train.labels, data.train.labels)
    np.testing.assert_array_equal(again.trusted.ids, data.trusted.ids)


@pytest.mark.parametrize("shuffle", [False, True])
def test_probe_batches_are_balanced(config, data, shuffle):
    config = config.copy_and_resolve_references()
    config.trusted.shuffle, config.augment.standard = shuffle, ""
    orders = []
    for batch in batches(config, data, 0, 6):
        np.testing.assert_array_equal(batch["probe_label"], np.tile(np.arange(10), 2))
        rows = [
            int(np.argmin(np.abs(data.trusted.images / 127.5 - 1 - image).sum((1, 2, 3))))
            for image in batch["probe_image"]
        ]
        assert sorted(rows) == list(range(20)), "each pass shows each trusted image once"
        np.testing.assert_array_equal(data.trusted.labels[rows], batch["probe_label"])
        orders.append(tuple(rows))
    assert (len(set(orders)) == 1) is not shuffle


def test_methods_get_what_they_need(config, data):
    for name, keys in (
        ("supervised", {"image", "label", "clean_label", "id"}),
        ("l2r", {"image", "label", "clean_label", "id", "probe_image", "probe_label"}),
        ("trusted_only", {"image", "label", "clean_label", "id", "views"}),
    ):
        config = config.copy_and_resolve_references()
        config.method.name = name
        batch = batches(config, data, 0, 1)[0]
        assert set(batch) == keys
        trusted = set(data.trusted.ids.tolist())
        assert (set(batch["id"].tolist()) <= trusted) == (name == "trusted_only")


def test_several_views(config, data):
    config = config.copy_and_resolve_references()
    config.augment.num_views = 4
    views = batches(config, data, 0, 1)[0]["views"]
    assert views.shape == (48, 3, 8, 8, 1)
    assert np.abs(views[:, 0] - views[:, 1]).max() > 0.1


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_read_the_parts_of_the_same_batch(config, data, monkeypatch, processes):
    whole = batches(config, data, 5, 7)
    monkeypatch.setattr(pipeline, "to_global", lambda batch, sharding: batch)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(list(pipeline.train_batches(config, data, 5, 7, SHARDING)))
    for step in range(2):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_equal(joined, whole[step])


@pytest.mark.parametrize("n, batch_size", [(7, 4), (8, 4), (3, 4)])
def test_evaluation_counts_each_example_once(n, batch_size):
    split = Split(
        np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * 5,
        np.arange(n, dtype=np.int32),
        np.arange(n),
        np.arange(n),
    )
    seen = []
    for batch in pipeline.eval_batches(split, batch_size, SHARDING):
        batch = jax.device_get(batch)
        assert batch["mask"].shape == (batch_size,)
        real = batch["mask"] == 1
        np.testing.assert_allclose(batch["image"][real, 0, 0, 0], batch["label"][real] * 5 / 127.5 - 1, atol=1e-6)
        seen += batch["label"][real].tolist()
    assert seen == list(range(n))


def test_validation_comes_out_of_the_training_set(config):
    config = config.copy_and_resolve_references()
    config.data.validation_size = 100
    data = pipeline.load(config)
    source = sources.load(config.data)
    assert data.evaluation_name == "validation"
    assert len(data.evaluation) == 100
    ids = [set(split.ids.tolist()) for split in (data.train, data.trusted, data.evaluation)]
    assert not ids[0] & ids[1] and not ids[1] & ids[2] and not ids[0] & ids[2]
    assert set.union(*ids) == set(source.train.ids.tolist())
    np.testing.assert_array_equal(data.evaluation.labels, data.evaluation.clean_labels)
    config.data.validation_size = 5000
    with pytest.raises(UserError, match="data.validation_size=5000"):
        pipeline.load(config)


def test_noise_on_data_whose_labels_are_taken_to_be_right(tmp_path):
    config = default.get_config()
    config.data.name, config.data.train = "arrays", str(tmp_path / "own.npz")
    config.trusted.per_class = 1
    np.savez(config.data.train, images=np.zeros((40, 4, 4), np.uint8), labels=np.arange(40) % 4)
    with pytest.raises(UserError, match="no true label"):
        pipeline.load(config)
    config.noise.kind, config.noise.rate = "uniform", 1.0
    data = pipeline.load(config)
    assert data.noise_report["num_known"] == 36
    assert 0.4 < data.noise_report["rate_effective"] < 1.0
    assert data.evaluation is None
