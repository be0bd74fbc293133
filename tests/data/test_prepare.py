import json
import shutil
import threading

import image_trees
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from configs import default
from ieg_jax.data import shards
from ieg_jax.data.noise import kinds
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources import records
from ieg_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """A configuration of 2 × 15 odd images in folders, some for testing, some trusted; and their pixels."""
    want = {}
    for label in ("cat", "dog"):
        pixels = image_trees.odd_images(tmp_path / "photos" / label)
        want |= {f"{label}/{name}": value for name, value in pixels.items()}
        for part in ("test", "trusted"):
            image_trees.save(tmp_path / part / label / "x.png", image_trees.picture(3))
    config = default.get_config()
    config.data.name, config.data.train = "image_folder", str(tmp_path / "photos")
    config.data.test, config.data.trusted = str(tmp_path / "test"), str(tmp_path / "trusted")
    return config, want


def records_config(folder):
    config = default.get_config()
    config.data.name, config.data.dir = "records", str(folder)
    return config


def assert_same(got, want, pixels):
    for column in ("labels", "clean_labels", "ids", "names"):
        np.testing.assert_array_equal(getattr(got, column), getattr(want, column), err_msg=column)
    read = got.images.reader()
    for row, name in enumerate(got.names):
        np.testing.assert_array_equal(read(row).whole(), pixels[name], err_msg=name)


def test_records_hold_what_the_folder_held(photos, tmp_path):
    config, pixels = photos
    out = tmp_path / "records"
    written = shards.prepare(config, out, examples_per_shard=7)
    assert written["images"] == {"train": 30, "test": 2, "trusted": 2} and written["left_out"] == {}
    assert len(list(out.glob("photos-train.tfrecord-*-of-00005"))) == 5
    want, got = sources.load(config.data), sources.load(records_config(out).data)
    assert got.class_names == want.class_names == ("cat", "dog") and not got.trusted_is_pool
    assert_same(got.train, want.train, pixels)
    # In any order, inside tf.data, and beginning anywhere.
    rows = np.random.default_rng(0).permutation(30)[:11]
    read = got.train.take(rows).images.reader()
    images = tf.data.Dataset.range(11).map(lambda row: read(row).whole(), tf.data.AUTOTUNE, deterministic=True)
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(image, pixels[got.train.names[row]])


def test_tfds_reads_them_too(photos, tmp_path):
    config, pixels = photos
    shards.prepare(config, tmp_path / "records", examples_per_shard=11)
    dataset = tfds.builder_from_directory(str(tmp_path / "records")).as_dataset(split="train")
    for example in dataset.as_numpy_iterator():
        # TFDS lets TensorFlow decode JPEGs by its fast and less exact method.
        assert np.abs(example["image"].astype(int) - pixels[example["name"].decode()]).max() <= 3
        assert ["cat", "dog"][example["label"]] == example["name"].decode().split("/")[0]


def test_an_interrupted_run_goes_on(photos, tmp_path, monkeypatch):
    config, _ = photos
    whole, out = tmp_path / "whole", tmp_path / "records"
    shards.prepare(config, whole, examples_per_shard=7)
    calls = []
    write = shards._write_shard

    def write_or_die(task, folder, state):
        calls.append((task.split, task.number))
        if len(calls) == 3:
            (folder / "parts" / "half.incomplete").write_text("half a shard")
            raise KeyboardInterrupt
        write(task, folder, state)

    monkeypatch.setattr(shards, "_write_shard", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(config, out, examples_per_shard=7)
    with pytest.raises(UserError, match="holds no records"):
        sources.load(records_config(out).data)
    shards.prepare(config, out, examples_per_shard=7)
    assert calls[3:] == [("train", 2), ("train", 3), ("train", 4), ("test", 0), ("trusted", 0)]
    image_trees.assert_same_files(out, whole)
    calls.clear()
    shards.prepare(config, out, examples_per_shard=7)
    assert calls == [], "a finished folder is reported"


def test_no_order_of_a_process_is_in_the_files(photos, tmp_path):
    """Protobuf's maps have another order in each process, unless one asks for theirs by name."""
    shards.prepare(photos[0], tmp_path / "records", examples_per_shard=7)
    names = ["clean_label", "given_label", "id", "image", "label", "name"]
    for file in (tmp_path / "records").glob("*.tfrecord*"):
        for _, record in records.read_records(str(file)):
            places = [record.index(b"\n" + bytes([len(name)]) + name.encode() + b"\x12") for name in names]
            assert places == sorted(places)
    index = np.load(tmp_path / "records" / "index-train.npz").files
    assert index == ["shard", "offset", "clean_label", "given_label", "id", "label", "name", "stamp"]


def test_an_image_that_the_system_could_not_read_is_tried_again(photos, tmp_path, monkeypatch):
    config, _ = photos
    whole, out = tmp_path / "whole", tmp_path / "records"
    shards.prepare(config, whole, examples_per_shard=7)
    read = shards.images.read

    def read_or_fail(path):
        return (b"", "cannot be read: Input/output error") if path.endswith("dog/plain.png") else read(path)

    monkeypatch.setattr(shards.images, "read", read_or_fail)
    with pytest.raises(UserError, match="dog/plain.png: cannot be read: Input/output error"):
        shards.prepare(config, out, examples_per_shard=7)
    monkeypatch.setattr(shards.images, "read", read)
    (out / "left_out.json").unlink()
    shards.prepare(config, out, examples_per_shard=7)
    image_trees.assert_same_files(out, whole)


def test_other_data_in_the_folder(photos, tmp_path):
    config, _ = photos
    shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    with pytest.raises(UserError, match=r"other data(?s:.*)resize: 0 -> 12"):
        shards.prepare(config, tmp_path / "records", examples_per_shard=7, resize=12)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not to be lost")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        shards.prepare(config, tmp_path / "mine")
    with pytest.raises(UserError, match="in memory or in records already"):
        shards.prepare(default.get_config(), tmp_path / "digits")


def test_unreadable_images(photos, tmp_path):
    config, _ = photos
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"hello")
    (tmp_path / "photos" / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 images cannot be decoded(?s:.*)cat/broken.jpg: no image"):
        shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    config.data.unreadable = "skip"
    written = shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    assert written["images"]["train"] == 30 and sorted(written["left_out"]) == ["cat/broken.jpg", "dog/empty.png"]
    got = sources.load(records_config(tmp_path / "records").data)
    want = sources.load(config.data)
    np.testing.assert_array_equal(got.train.ids, want.train.ids)
    np.testing.assert_array_equal(got.train.names, want.train.names)


def test_a_label_file_for_all_listed_images_fits_folder_and_records(photos, tmp_path):
    config, _ = photos
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"hello")
    (tmp_path / "test" / "cat" / "broken.jpg").write_bytes(b"hello")
    config.data.unreadable = "skip"
    written = shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    assert written["num_listed"] == {"train": 31, "test": 3, "trusted": 2}
    stored = records_config(tmp_path / "records")
    for one in (config, stored):
        one.noise.kind, one.noise.file = "file", str(tmp_path / "labels.json")
    (tmp_path / "labels.json").write_text(json.dumps([k % 2 for k in range(31)]))
    for one in (config, stored):
        train = kinds.corrupt(sources.load(one.data), one.noise)
        np.testing.assert_array_equal(train.labels, train.ids % 2)
    (tmp_path / "labels.json").write_text(json.dumps([0] * 32))
    for one in (config, stored):
        with pytest.raises(UserError, match="32 labels, expected 31, .* or 30, one for each that is not left out"):
            kinds.corrupt(sources.load(one.data), one.noise)
    about = json.loads((tmp_path / "records" / "prepared.json").read_text())
    (tmp_path / "records" / "prepared.json").write_text(json.dumps({"images": about["images"]}))
    assert sources.load(stored.data).num_listed == 0, "of records that an older version wrote"


def test_a_mended_image_is_taken_in(photos, tmp_path):
    config, _ = photos
    broken = tmp_path / "photos" / "cat" / "broken.jpg"
    broken.write_bytes(b"hello")
    with pytest.raises(UserError, match="mend these files"):
        shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    pixels = image_trees.save(broken, image_trees.picture(5))
    written = shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    assert written["images"]["train"] == 31 and not written["left_out"]
    source = sources.load(records_config(tmp_path / "records").data)
    row = source.train.names.tolist().index("cat/broken.jpg")
    np.testing.assert_array_equal(source.train.images.reader()(row).whole(), pixels)
    broken.write_bytes(b"changed again")
    with pytest.raises(UserError, match="is finished, and image files have changed since"):
        shards.prepare(config, tmp_path / "records", examples_per_shard=7)


def test_a_class_or_split_of_which_nothing_is_left(photos, tmp_path):
    config, _ = photos
    config.data.unreadable = "skip"
    (tmp_path / "test" / "cat" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image of class 'cat' can be decoded:\n  .*test/cat/x.png: zero bytes"):
        shards.prepare(config, tmp_path / "records")


@pytest.mark.parametrize("name, want", [("Äpfel 2", "pfel_2"), ("123", "images_123"), ("Äß", "images")])
def test_names_that_tfds_takes(photos, tmp_path, name, want):
    config, _ = photos
    (tmp_path / "photos").rename(tmp_path / name)
    config.data.train = str(tmp_path / name)
    shards.prepare(config, tmp_path / "records")
    assert list((tmp_path / "records").glob(f"{want}-train.tfrecord-*"))
    assert len(sources.load(records_config(tmp_path / "records").data).train) == 30


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("name", "webvison", "Did you mean 'webvision'"),
        ("unreadable", "ignore", "refuse"),
        ("image_size", 8, "--resize"),
    ],
)
def test_settings_that_cannot_work(photos, tmp_path, key, value, message):
    config, _ = photos
    config.data[key] = value
    with pytest.raises(UserError, match=message):
        shards.prepare(config, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_resize(photos, tmp_path):
    config, _ = photos
    image_trees.save(tmp_path / "photos" / "cat" / "large.png", image_trees.picture(1, (90, 60)))
    shards.prepare(config, tmp_path / "records", resize=30)
    source = sources.load(records_config(tmp_path / "records").data)
    read = source.train.images.reader()
    row = source.train.names.tolist().index("cat/large.png")
    image = read(row).whole().numpy().astype(float)
    want = image_trees.picture(1, (90, 60)).resize((45, 30), Image.Resampling.BICUBIC)
    assert image.shape == (30, 45, 3)
    assert np.abs(image - np.asarray(want, float)).mean() < 4, "JPEG of quality 95"
    small = source.train.names.tolist().index("cat/plain.png")
    assert read(small).whole().shape == (16, 24, 3), "not made larger"


def test_webvision_with_trusted_images_of_imagenet(tmp_path):
    content = image_trees.webvision(tmp_path / "webvision", flickr=False)
    image_trees.imagenet(tmp_path / "imagenet" / "train", content["wnids"], 3, 500)
    config = default.get_config()
    config.data.name, config.data.dir = "webvision", str(tmp_path / "webvision")
    config.data.trusted, config.trusted.source = str(tmp_path / "imagenet"), "separate"
    config.trusted.per_class = 2
    written = shards.prepare(config, tmp_path / "records")
    assert written["images"] == {"train": 100, "test": 100, "trusted": 100}
    source = sources.load(records_config(tmp_path / "records").data)
    assert source.class_names == tuple(content["wnids"][:50])
    wnids = [name.split("/")[0] for name in source.trusted.names]
    assert [source.class_names[label] for label in source.trusted.labels] == wnids


@pytest.mark.parametrize("damage, message", [("cut", "ends inside a record"), ("lost", "cannot be read")])
def test_damaged_records(photos, tmp_path, damage, message):
    out = tmp_path / "records"
    shards.prepare(photos[0], out, examples_per_shard=7)
    shard = out / "photos-train.tfrecord-00001-of-00005"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(UserError, match=message):
        sources.load(records_config(out).data)


def test_an_index_is_made_where_there_is_none(photos, tmp_path, monkeypatch):
    out = tmp_path / "records"
    shards.prepare(photos[0], out, examples_per_shard=7)
    want = sources.load(records_config(out).data).train
    index = out / "index-train.npz"
    first = index.read_bytes()
    index.unlink()
    got = sources.load(records_config(out).data).train
    np.testing.assert_array_equal(got.images.offsets, want.images.offsets)
    assert index.exists()
    index.write_bytes(first[:50])
    got = sources.load(records_config(out).data).train
    np.testing.assert_array_equal(got.images.offsets, want.images.offsets, "a damaged one is made again")
    # Where the records may only be read it is kept in the cache.
    index.unlink()
    write = records.write_arrays

    def write_elsewhere(path, table):
        if out in path.parents:
            raise PermissionError("read only")
        write(path, table)

    monkeypatch.setattr(records, "write_arrays", write_elsewhere)
    sources.load(records_config(out).data)
    assert list((tmp_path / "cache").rglob("*-train.npz")) and not index.exists()


def test_offsets_are_those_of_the_file(tmp_path):
    """Records of known lengths: a frame is 12 bytes before and 4 after the data."""
    with tf.io.TFRecordWriter(str(tmp_path / "x")) as writer:
        for length in (5, 0, 300):
            writer.write(b"x" * length)
    found = list(records.read_records(str(tmp_path / "x")))
    assert [(offset, len(record)) for offset, record in found] == [(0, 5), (21, 0), (37, 300)]


def test_something_else_than_records(photos, tmp_path):
    out = tmp_path / "records"
    shards.prepare(photos[0], out, examples_per_shard=7)
    with tf.io.TFRecordWriter(str(out / "photos-train.tfrecord-00001-of-00005")) as writer:
        writer.write(b"\xff\xff\xff no example")
    with pytest.raises(UserError, match="something else than tf.train.Example"):
        sources.load(records_config(out).data)
    info = json.loads((out / "dataset_info.json").read_text())
    assert {split["name"] for split in info["splits"]} == {"train", "test", "trusted"}
    shutil.rmtree(out)


def test_files_are_asked_for_their_sizes_at_once(monkeypatch):
    """Eight of sixteen must have been asked before any answers; the answers come in the order of the files."""
    together = threading.Barrier(8)

    def slow(file):
        together.wait(timeout=60)
        return int(file), 10**18 + int(file)

    monkeypatch.setattr(records, "_stat", slow)
    stats = records._stats(tuple(map(str, range(16))))
    assert stats.tolist() == [[number, 10**18 + number] for number in range(16)]
    monkeypatch.undo()
    with pytest.raises(UserError, match="^gone1: cannot be read"):
        records._stats(("gone1", "gone2"))


def test_image_files_are_asked_for_their_sizes_at_once(photos, monkeypatch):
    config, _ = photos
    plan = shards.list_shards(config, 1024, 0)
    before = plan.task("train", 0, np.arange(30)).state_of_files()
    together, stat = threading.Barrier(10), shards.images.stat

    def slow(path):
        together.wait(timeout=60)
        return stat(path)

    monkeypatch.setattr(shards.images, "stat", slow)
    assert plan.task("train", 0, np.arange(30)).state_of_files() == before
