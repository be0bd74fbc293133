import dataclasses

import image_trees
import jax
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from configs import default
from ieg_jax import methods
from ieg_jax.data import augment, shards
from ieg_jax.data import batches as batches_lib
from ieg_jax.data.batches import EvalBatches, train_batches
from ieg_jax.data.load import LoadOnce, load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import make_split
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
    return load_data(config)


SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def streams(config):
    return methods.get(config.method.name).streams


def batches(config, data, start, stop):
    return [jax.device_get(b) for b in train_batches(config, data, streams(config), start, stop, SHARDING)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_shapes(config, data):
    batch = batches(config, data, 0, 1)[0]
    assert {k: v.shape for k, v in batch.items()} == {
        "image": (48, 8, 8, 1), "views": (48, 1, 8, 8, 1), "label": (48,), "clean_label": (48,), "id": (48,),
        "row": (48,), "probe_image": (20, 8, 8, 1), "probe_label": (20,), "probe_row": (20,),
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
    again = load_data(other)
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


@pytest.mark.parametrize("shuffle", [False, True])
def test_classes_of_unequal_size_take_turns(config, data, shuffle):
    """Of 6, 2 and 1 noisy rows and 3, 1 and 1 trusted ones each class comes equally often, and each of its rows too."""
    config = config.copy_and_resolve_references()
    config.class_weight, config.trusted.shuffle, config.augment.standard = "balanced", shuffle, ""

    def some(split, counts):
        rows = np.concatenate([np.flatnonzero(split.labels == label)[:n] for label, n in counts.items()])
        return split.take(np.random.default_rng(0).permutation(rows))

    unequal = dataclasses.replace(
        data, train=some(data.train, {0: 6, 3: 2, 7: 1}), trusted=some(data.trusted, {1: 2, 4: 1, 8: 1})
    )
    seen = batches(config, unequal, 0, 6)
    label, row = (np.concatenate([batch[name] for batch in seen]) for name in ("label", "row"))
    assert (label == np.tile([0, 3, 7], len(label) // 3 + 1)[: len(label)]).all()
    assert (unequal.train.labels[row] == label).all()
    big = row[label == 0][: len(row) // 18 * 6].reshape(-1, 6)
    assert (np.sort(big) == np.flatnonzero(unequal.train.labels == 0)).all(), "each pass shows each row once"
    assert len({tuple(one) for one in big}) > 1, "in an order of its own"
    later = batches(config, unequal, 3, 6)
    for one, other in zip(seen[3:], later, strict=True):
        np.testing.assert_array_equal(one["row"], other["row"])
    trusted = np.concatenate([batch["probe_row"] for batch in seen])
    assert (unequal.trusted.labels[trusted[:6]] == [1, 4, 8, 1, 4, 8]).all()
    pairs = trusted[::3][: len(trusted) // 6 * 2].reshape(-1, 2)
    assert (np.sort(pairs) == np.flatnonzero(unequal.trusted.labels == 1)).all()
    assert (len({tuple(one) for one in pairs}) == 1) is not shuffle


def test_classes_of_chosen_training_examples_take_turns(config, data):
    """Those of the stream `reward` of FSR, by given labels; from the step of the choice on, each of a class once."""
    chosen = np.sort(np.concatenate([np.flatnonzero(data.train.labels == c)[: 6 + c] for c in range(10)]))
    made = list(train_batches(config, data, methods.get("fsr").streams, 3, 8, SHARDING, {"reward": chosen}, 3))
    labels, rows = (np.concatenate([batch[f"reward_{name}"] for batch in made]) for name in ("label", "row"))
    np.testing.assert_array_equal(labels, np.arange(240) % 10)
    np.testing.assert_array_equal(labels, data.train.labels[rows])
    for c in range(10):
        own = rows[labels == c]
        assert set(own) == set(chosen[data.train.labels[chosen] == c]) == set(own[: 6 + c])


def test_methods_get_what_they_need(config, data):
    for name, keys in (
        ("supervised", {"image", "label", "clean_label", "id", "row"}),
        ("l2r", {"image", "label", "clean_label", "id", "row", "probe_image", "probe_label", "probe_row"}),
        ("trusted_only", {"image", "label", "clean_label", "id", "row", "views"}),
    ):
        config = config.copy_and_resolve_references()
        config.method.name = name
        batch = batches(config, data, 0, 1)[0]
        assert set(batch) == keys
        trusted = set(data.trusted.ids.tolist())
        assert (set(batch["id"].tolist()) <= trusted) == (name == "trusted_only")
        source = data.trusted if name == "trusted_only" else data.train
        np.testing.assert_array_equal(source.ids[batch["row"]], batch["id"])
        if "probe_row" in batch:
            np.testing.assert_array_equal(data.trusted.labels[batch["probe_row"]], batch["probe_label"])


def test_several_views(config, data):
    config = config.copy_and_resolve_references()
    config.augment.num_views = 4
    views = batches(config, data, 0, 1)[0]["views"]
    assert views.shape == (48, 3, 8, 8, 1)
    assert np.abs(views[:, 0] - views[:, 1]).max() > 0.1


def test_what_the_views_are_made_from(config, data):
    """On top of the standard view, or of the image itself: with no operation on top, or none below, they show it."""
    config = config.copy_and_resolve_references()

    def first(standard, strong, views_of):
        config.augment.update(standard=standard, strong=strong, views_of=views_of, num_views=3)
        return batches(config, data, 0, 1)[0]

    plain = first("", "", "standard")["image"]
    moved = first("crop(pad=2)", "", "standard")
    for view in range(2):
        np.testing.assert_array_equal(moved["views"][:, view], moved["image"])
    moved = first("crop(pad=2)", "", "original")
    assert np.abs(moved["image"] - plain).max() > 0.1
    for view in range(2):
        np.testing.assert_array_equal(moved["views"][:, view], plain)
    # The same operation for all views of the image: each by a seed of its own, and none on top of another.
    twice = first("crop(pad=2)", "crop(pad=2)", "original")
    np.testing.assert_array_equal(twice["image"], moved["image"])
    np.testing.assert_array_equal(twice["views"], first("", "crop(pad=2)", "standard")["views"])
    for one, two in ((twice["image"], twice["views"][:, 0]), (twice["views"][:, 0], twice["views"][:, 1])):
        assert np.mean([np.array_equal(a, b) for a, b in zip(one, two, strict=True)]) < 0.2  # 1 of 25 windows is shared


def test_the_next_batch_is_on_its_way_before_it_is_asked_for(config, data, monkeypatch):
    whole, put, to_global = batches(config, data, 5, 9), [], batches_lib.to_global

    def noted(batch, sharding):
        put.append(batch["row"].tolist())
        return to_global(batch, sharding)

    monkeypatch.setattr(batches_lib, "to_global", noted)
    made, counts = train_batches(config, data, streams(config), 5, 9, SHARDING), []
    for expected in whole:
        assert_equal(jax.device_get(next(made)), expected)
        counts.append(len(put))
    assert counts == [2, 3, 4, 4], "one more than was asked for, as long as there is one"
    assert put == [batch["row"].tolist() for batch in whole]
    assert list(made) == []


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_read_the_parts_of_the_same_batch(config, data, monkeypatch, processes):
    whole = batches(config, data, 5, 7)
    monkeypatch.setattr(batches_lib, "to_global", lambda batch, sharding: batch)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(list(train_batches(config, data, streams(config), 5, 7, SHARDING)))
    for step in range(2):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_equal(joined, whole[step])


@pytest.mark.parametrize("n, batch_size", [(7, 4), (8, 4), (3, 4)])
def test_evaluation_counts_each_example_once(config, n, batch_size):
    config = config.copy_and_resolve_references()
    config.eval_batch_size = batch_size
    split = make_split(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * 5, np.arange(n))
    seen = []
    for batch in EvalBatches(config, split, SHARDING):
        batch = jax.device_get(batch)
        assert batch["mask"].shape == (batch_size,)
        real = batch["mask"] == 1
        np.testing.assert_allclose(batch["image"][real, 0, 0, 0], batch["label"][real] * 5 / 127.5 - 1, atol=1e-6)
        seen += batch["label"][real].tolist()
    assert seen == list(range(n))


def test_validation_comes_out_of_the_training_set(config):
    config = config.copy_and_resolve_references()
    config.data.validation_size = 100
    data = load_data(config)
    source = sources.load(config.data)
    assert data.evaluation_name == "validation"
    assert len(data.evaluation) == 100
    ids = [set(split.ids.tolist()) for split in (data.train, data.trusted, data.evaluation)]
    assert not ids[0] & ids[1] and not ids[1] & ids[2] and not ids[0] & ids[2]
    assert set.union(*ids) == set(source.train.ids.tolist())
    np.testing.assert_array_equal(data.evaluation.labels, data.evaluation.clean_labels)
    config.data.validation_size = 5000
    with pytest.raises(UserError, match="data.validation_size=5000"):
        load_data(config)


def test_trusted_images_that_are_held_out(config, tmp_path):
    def load(data=None, **keys):
        part = config.copy_and_resolve_references()
        part.data.update(data or {})
        part.trusted.update(keys)
        return load_data(part)

    whole, data = load(per_class=5), load(per_class=5, holdout=0.4)
    assert data.evaluation_name == "test" and whole.held_out is None
    np.testing.assert_array_equal(np.bincount(data.trusted.labels), [3] * 10)
    np.testing.assert_array_equal(np.bincount(data.held_out.labels), [2] * 10)
    assert data.trusted.labels[:10].tolist() == data.held_out.labels[:10].tolist() == list(range(10)), "interleaved"
    ids = [set(split.ids.tolist()) for split in (data.trusted, data.held_out)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == set(whole.trusted.ids.tolist())
    np.testing.assert_array_equal(data.train.ids, whole.train.ids)
    assert data.trusted_report == whole.trusted_report | {"held_out_ids": data.held_out.ids.tolist()}
    assert data.fingerprint().keys() == {"train", "trusted", "held_out", "test"}
    assert load(per_class=5, holdout=0.1).held_out is None, "rounded down"

    images = np.zeros((8, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(8) % 2, clean_labels=np.arange(8) % 2)
    without_test = {"name": "arrays", "train": str(tmp_path / "own.npz")}
    data = load(without_test, per_class=2, holdout=0.5)
    assert (data.evaluation_name, data.evaluation) == ("held_out", data.held_out)
    assert len(data.evaluation) == 2 and len(data.trusted) == 2


def test_views_of_an_example_do_not_depend_on_where_it_stands(config):
    config = config.copy_and_resolve_references()
    config.augment.standard, config.augment.strong, config.eval_batch_size = "crop(pad=2)", "intensity(0.5)", 8
    split = load_data(config).train.take(np.arange(24))

    def images(split, view):
        return np.concatenate([batch["image"] for batch in EvalBatches(config, split, SHARDING, view)])

    plain, first, second = (images(split, view) for view in (None, 0, 1))
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 0.01 < np.abs(first - plain).max(axis=(1, 2, 3)).min()
    rows = np.array([20, 3, 11, 4, 9, 16, 2, 0])
    np.testing.assert_array_equal(images(split.take(rows), 1), second[rows])
    config.augment.views_of = "original"
    unmoved = images(split, 1)  # no crop any more: what was equally dark is so still
    assert np.abs(unmoved - second).max() > 0.01
    assert all(np.ptp(now[before == -1]) == 0 for now, before in zip(unmoved, plain, strict=True))


def test_training_on_a_part(config):
    def load(**keys):
        part = config.copy_and_resolve_references()
        part.data.update(keys)
        return load_data(part)

    whole, large, small = load(), load(train_size=300), load(train_size=100)
    for part, size in ((large, 300), (small, 100)):
        assert len(part.train) == size
        rows = np.searchsorted(whole.train.ids, part.train.ids)
        for column in ("ids", "labels", "clean_labels", "images"):
            np.testing.assert_array_equal(getattr(part.train, column), getattr(whole.train, column)[rows])
        np.testing.assert_array_equal(part.trusted.ids, whole.trusted.ids)
        np.testing.assert_array_equal(part.noisy_labels, whole.noisy_labels)
        assert part.noise_report["num_examples"] == size
    assert set(small.train.ids.tolist()) < set(large.train.ids.tolist())
    assert len(set((small.train.ids // 50).tolist())) > 20, "not the first ones"
    held_out = load(validation_size=100, train_size=100)
    assert not set(held_out.train.ids.tolist()) & set(held_out.evaluation.ids.tolist())
    with pytest.raises(UserError, match="data.train_size=5000, but without trusted and validation examples"):
        load(train_size=5000)


def test_noise_on_data_whose_labels_are_taken_to_be_right(tmp_path):
    config = default.get_config()
    config.data.name, config.data.train = "arrays", str(tmp_path / "own.npz")
    config.trusted.per_class = 1
    np.savez(config.data.train, images=np.zeros((40, 4, 4), np.uint8), labels=np.arange(40) % 4)
    with pytest.raises(UserError, match="no true label"):
        load_data(config)
    config.noise.kind, config.noise.rate = "uniform", 1.0
    data = load_data(config)
    assert data.noise_report["num_known"] == 36
    assert 0.4 < data.noise_report["rate_effective"] < 1.0
    assert data.evaluation is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same 60 JPEG files as a folder and as records: two configurations."""
    folder = tmp_path_factory.mktemp("stored")
    for label in "abc":
        for k in range(20):
            size = (40 + k, 60 - k)
            image_trees.save(folder / "photos" / label / f"{k:02}.jpg", image_trees.picture(ord(label) * 100 + k, size))
        image_trees.save(folder / "trusted" / label / "x.jpg", image_trees.picture(ord(label) + 7, (50, 50)))
    files = default.get_config()
    files.data.name, files.data.train = "image_folder", str(folder / "photos")
    files.data.trusted, files.trusted.source = str(folder / "trusted"), "separate"
    files.augment.standard, files.augment.evaluation = "random_resized_crop(16)|flip", "resize(18)|center_crop(16)"
    files.augment.strong = "autoaugment_imagenet|cutout(0.5)"
    files.batch_size, files.trusted.batch_size, files.eval_batch_size = 8, 3, 8
    records = files.copy_and_resolve_references()
    shards.prepare(files, folder / "records", examples_per_shard=13)
    records.data.name, records.data.dir, records.data.train, records.data.trusted = (
        "records", str(folder / "records"), "", "",
    )  # fmt: skip
    return files, records


def test_files_and_records_give_the_same_batches(stored):
    files, records = ((config, load_data(config)) for config in stored)
    for a, b in zip(batches(*files, 0, 4), batches(*records, 0, 4), strict=True):
        assert_equal(a, b)
        assert a["image"].shape == (8, 16, 16, 3) and a["views"].shape == (8, 1, 16, 16, 3)
        assert np.abs(a["views"][:, 0] - a["image"]).max() > 0.1


def test_records_resume_anywhere_and_show_each_example_once(stored):
    config, data = stored[1], load_data(stored[1])
    whole = batches(config, data, 0, 15)
    for a, b in zip(whole[11:], batches(config, data, 11, 15), strict=True):
        assert_equal(a, b)
    ids = np.concatenate([batch["id"] for batch in whole])
    assert sorted(ids[:60]) == sorted(ids[60:]) == list(range(60)) and (ids[:60] != ids[60:]).any()


def test_hosts_read_disjoint_parts_of_the_records(stored, monkeypatch):
    config, data = stored[1], load_data(stored[1])
    whole = batches(config, data, 0, 7)
    monkeypatch.setattr(batches_lib, "to_global", lambda batch, sharding: batch)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    config = config.copy_and_resolve_references()
    config.method.name = "supervised"
    parts = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(list(train_batches(config, data, streams(config), 0, 7, SHARDING)))
    ids = [{int(i) for batch in part for i in batch["id"]} for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 56
    for step in range(7):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, whole[step]["image"])


def test_evaluation_of_stored_images(stored):
    config, data = stored[1], load_data(stored[1])
    seen, images = [], []
    for batch in EvalBatches(config, data.train, SHARDING):
        real = np.asarray(batch["mask"]) == 1
        seen += np.asarray(batch["label"])[real].tolist()
        images += [*np.asarray(batch["image"])[real]]
    np.testing.assert_array_equal(seen, data.train.labels)
    first = image_trees.Image.open(f"{stored[0].data.train}/{data.train.names[0]}")
    height, width = first.height, first.width
    short = min(height, width)
    resized = first.resize(
        (round(width * 18 / short), round(height * 18 / short)), image_trees.Image.Resampling.BILINEAR
    )
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    want = np.asarray(resized, np.float32)[top : top + 16, left : left + 16]
    assert np.abs((images[0] + 1) * 127.5 - want).max() <= 1.01


@pytest.mark.parametrize(
    "standard, strong, message",
    [
        ("crop(pad=2)", "", "augment.standard: crop needs images of one size.*random_resized_crop"),
        ("", "", "augment.standard does not make them equal"),
        ("resize(16)", "", "augment.standard does not make them equal"),
        (
            "random_resized_crop(16)",
            "randaugment(magnitude=12)",
            "magnitude is 12.0, expected a level",
        ),
    ],
)
def test_policies_that_do_not_fit_the_images(stored, standard, strong, message):
    config, data = stored[1].copy_and_resolve_references(), load_data(stored[1])
    config.augment.standard, config.augment.strong = standard, strong
    with pytest.raises(UserError, match=message):
        next(train_batches(config, data, streams(config), 0, 1, SHARDING))


def test_views_made_from_the_stored_image(stored):
    """Each view decodes what it needs, and must come out in one shape."""
    config, data = stored[1].copy_and_resolve_references(), load_data(stored[1])
    config.augment.update(views_of="original", strong=config.augment.standard, num_views=3)
    batch = batches(config, data, 0, 1)[0]
    assert batch["views"].shape == (8, 2, 16, 16, 3)
    assert np.abs(batch["views"][:, 0] - batch["views"][:, 1]).max() > 0.1
    for strong in ("", "random_resized_crop(18)"):
        config.augment.strong = strong
        with pytest.raises(UserError, match="augment.strong makes views of shape .*let it begin as augment.standard"):
            next(train_batches(config, data, streams(config), 0, 1, SHARDING))


def test_a_file_that_goes_away(stored):
    config = stored[0].copy_and_resolve_references()
    data = load_data(config)
    images = data.train.images
    gone = dataclasses.replace(images, paths=np.char.add(images.paths, ".gone"))
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, images=gone))
    with pytest.raises(UserError, match="can no longer be read: .*gone"):
        next(train_batches(config, data, streams(config), 0, 1, SHARDING))


def test_data_are_loaded_once_where_only_the_method_differs(config):
    load, config = LoadOnce(), config.copy_and_resolve_references()
    first = load(config)
    config.method.name, config.batch_size = "supervised", 32
    assert load(config) is first
    config.noise.rate = 0.1
    other = load(config)
    assert (other.train.labels != first.train.labels).any()
    groups = ConfigDict({group: config[group].to_dict() for group in LoadOnce.READS})
    assert load_data(groups).fingerprint() == other.fingerprint(), "nothing else is read"


def test_the_fingerprint_changes_with_what_it_is_of(config, data):
    same = load_data(config).fingerprint()
    assert same == data.fingerprint() and set(same) == {"train", "trusted", "test"}
    for column in ("labels", "names", "images", "ids", "clean_labels"):
        changed = getattr(data.evaluation, column).copy()
        changed[3] = changed[4]
        other = dataclasses.replace(data, evaluation=dataclasses.replace(data.evaluation, **{column: changed}))
        if (changed != getattr(data.evaluation, column)).any():
            differs = {name for name, value in other.fingerprint().items() if value != same[name]}
            assert differs == {"test"}, column


def as_features(data, views):
    """The data with five numbers in place of each image, and of each of its views."""

    def made(split, seed):
        rng = np.random.default_rng(seed)
        shapes = {"images": (1, 1, 5)} | ({"views": (views, 1, 1, 5)} if views else {})
        return dataclasses.replace(
            split, **{name: rng.normal(size=(len(split), *s)).astype(np.float32) for name, s in shapes.items()}
        )

    return dataclasses.replace(data, train=made(data.train, 0), trusted=made(data.trusted, 1))


def of_features(config, **augment):
    config = config.copy_and_resolve_references()
    config.augment.update({"standard": "", "strong": "", "evaluation": ""} | augment)
    return config


@pytest.mark.parametrize("views", [0, 3])
@pytest.mark.parametrize("name", ["ieg", "mixmatch", "mlc"])
def test_features_are_made_many_at_once(config, data, monkeypatch, views, name):
    """From any step on, by any number of processes, and with the rows that stand there one at a time."""
    config = of_features(config, standard="gaussian(0.1)", strong="gaussian(0.3)")
    config.method.name = name
    data = as_features(data, views)
    whole = batches(config, data, 3, 6)
    assert_equal(batches(config, data, 5, 6)[0], whole[2])
    with monkeypatch.context() as several:
        several.setattr(batches_lib, "to_global", lambda batch, sharding: batch)
        several.setattr(jax, "process_count", lambda: 2)
        parts = []
        for process in range(2):
            several.setattr(jax, "process_index", lambda process=process: process)
            parts.append(list(train_batches(config, data, streams(config), 3, 6, SHARDING)))
        for step, batch in enumerate(whole):
            assert_equal({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)
    monkeypatch.setattr(augment, "at_once", lambda policy: False)
    for batch, one_by_one in zip(whole, batches(config, data, 3, 6), strict=True):
        assert {key: array.shape for key, array in batch.items()} == {k: v.shape for k, v in one_by_one.items()}
        assert_equal(*({k: v for k, v in b.items() if v.ndim == 1} for b in (batch, one_by_one)))


def test_the_noise_of_features(config, data):
    """Has the deviations that the policies say, in each view another draw, and others with another seed."""
    data = as_features(data, 0)

    def noise(seed, **augment):
        config_ = of_features(config, **augment)
        config_.seed = seed
        made = batches(config_, data, 0, 20)
        standard, strong = [
            [batch[name].reshape(-1, 5) - data.train.images[batch["row"], 0, 0] for batch in made]
            for name in ("image", "views")
        ]
        return np.concatenate(standard), np.concatenate(strong)

    policies = {"standard": "gaussian(0.1)", "strong": "gaussian(0.3)|gaussian(0.4)", "views_of": "original"}
    standard, strong = noise(0, **policies)
    assert abs(standard.std() - 0.1) < 0.005 and abs(strong.std() - 0.5) < 0.025, "variances add"
    assert abs(standard.mean()) < 0.005 and abs(np.corrcoef(standard.ravel(), strong.ravel())[0, 1]) < 0.05
    others, _ = noise(1, **policies)
    assert abs(np.corrcoef(standard.ravel(), others.ravel())[0, 1]) < 0.05
    _, of_standard = noise(0, **policies | {"views_of": "standard"})
    np.testing.assert_allclose(of_standard - standard, strong, atol=1e-5)


def test_images_and_views_are_copied_once(config, data, monkeypatch):
    """By many readers of a split: a copy of 50,000 features of 1,280 numbers took a second each time."""
    features = as_features(data, 3)
    train, (feature, views) = features.train, (features.train.images, features.train.views)
    config = of_features(config)
    copied, constant = [], tf.constant

    def counting(value, *arguments, **keys):
        copied.extend(name for name, array in (("image", feature), ("views", views)) if value is array)
        return constant(value, *arguments, **keys)

    monkeypatch.setattr(tf, "constant", counting)
    drawn = [batches(config, features, start, start + 2) for start in (0, 1)]
    assert_equal(drawn[0][1], drawn[1][0])
    shown = EvalBatches(config, train, SHARDING)
    for _ in range(2):
        seen = np.concatenate([np.asarray(batch["image"]) for batch in shown])
        np.testing.assert_array_equal(seen[: len(train)], feature)
    assert sorted(copied) == ["image", "views"]
