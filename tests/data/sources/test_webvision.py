import shutil

import image_trees
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import default
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources import webvision, webvision_tfds
from ieg_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("webvision")
    return folder, image_trees.webvision(folder)


@pytest.fixture(scope="module")
def ilsvrc(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("imagenet")
    wnids = tree[1]["wnids"]
    pixels = {
        split: image_trees.imagenet(folder / split, wnids, per_class, seed)
        for split, per_class, seed in (("train", 3, 5000), ("val", 1, 9000))
    }
    return folder, pixels


def config(folder, **more):
    data = default.get_config().data
    data.name, data.dir = "webvision", str(folder)
    data.update(more)
    return data


def assert_holds(split, expected):
    """`expected`: [(name, label, pixels)], pixels equal."""
    assert split.names.tolist() == [name for name, _, _ in expected]
    assert split.labels.tolist() == [label for _, label, _ in expected]
    read = split.images.reader()
    for row, (name, _, pixels) in enumerate(expected):
        np.testing.assert_array_equal(read(row).whole(), pixels, err_msg=name)


def test_mini_is_the_google_part_of_the_first_50_classes(tree):
    folder, content = tree
    source = sources.load(config(folder))
    assert_holds(source.train, [row for row in content["google"] if row[1] < 50])
    assert_holds(source.test, [row for row in content["val"] if row[1] < 50])
    assert source.num_classes == 50 and source.class_names == tuple(content["wnids"][:50])
    assert (source.train.clean_labels == -1).all() and (source.test.clean_labels == source.test.labels).all()


def test_full_has_both_parts_of_all_classes(tree):
    folder, content = tree
    source = sources.load(config(folder, variant="full"))
    assert_holds(source.train, content["google"] + content["flickr"])
    assert source.train.ids.tolist() == list(range(len(source.train)))
    assert len(sources.load(config(folder, variant="google")).train) == len(content["google"])


def test_paths_relative_to_the_part(tree, tmp_path):
    """Some copies of the lists leave out google/."""
    folder, content = tree
    for name in ("google", "flickr", "val_images_256"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "info").mkdir()
    for file in (folder / "info").iterdir():
        (tmp_path / "info" / file.name).write_text(file.read_text().replace("google/", "").replace("flickr/", ""))
    source = sources.load(config(tmp_path, variant="full"))
    assert source.train.names.tolist() == [name for name, _, _ in content["google"] + content["flickr"]]


@pytest.mark.parametrize("numbered", [False, True])
def test_imagenet_is_matched_by_wnid(tree, ilsvrc, tmp_path, numbered):
    folder, content = tree
    place, pixels = ilsvrc
    if numbered:  # folders 0, 1, ... in the alphabetical order of the wnids, which is not that of WebVision's labels
        for split in ("train", "val"):
            (tmp_path / split).mkdir()
            for number, wnid in enumerate(sorted(content["wnids"])):
                (tmp_path / split / str(number)).symlink_to(place / split / wnid)
        place = tmp_path
    source = sources.load(config(folder, test=str(place), trusted=str(place)))
    assert source.trusted_is_pool and len(source.test) == 50 and len(source.trusted) == 150
    read = source.test.images.reader()
    for row, label in enumerate(source.test.labels):
        np.testing.assert_array_equal(read(row).whole(), pixels["val"][content["wnids"][label]][0])
    assert content["wnids"] != sorted(content["wnids"])


def test_imagenet_as_a_data_set_of_its_own(tree, ilsvrc):
    data = default.get_config().data
    data.name, data.dir = "imagenet", str(ilsvrc[0])
    source = sources.load(data)
    assert source.class_names == tuple(sorted(tree[1]["wnids"]))
    assert len(source.train) == 3 * 52 and len(source.test) == 52
    wnids = [name.split("/")[0] for name in source.test.names]
    assert [source.class_names[label] for label in source.test.labels] == wnids


def test_the_tfds_builder_writes_the_same(tree, tmp_path):
    folder, content = tree

    for variant in ("mini", "full"):
        builder = webvision_tfds.Webvision(config=variant, data_dir=tmp_path)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    source = sources.load(config(tmp_path))
    expected = {name: (label, pixels) for name, label, pixels in content["google"] if label < 50}
    assert sorted(source.train.names.tolist()) == sorted(expected)
    assert source.class_names == tuple(content["wnids"][:50])
    read = source.train.images.reader()
    for row, name in enumerate(source.train.names):
        assert source.train.labels[row] == expected[name][0]
        np.testing.assert_array_equal(read(row).whole(), expected[name][1])
    full = sources.load(config(tmp_path, variant="full"))
    assert len(full.train) == len(content["google"]) + len(content["flickr"])
    assert len(full.test) == len(content["val"])


def test_the_tfds_builder_leaves_out_what_cannot_be_decoded(tree, tmp_path):
    """And turns images as they are meant: what TensorFlow alone would read otherwise is stored as PNG."""

    folder, content = tmp_path / "raw", tree[1]
    shutil.copytree(tree[0], folder)
    first, second, third = (name for name, _, _ in content["google"][:3])
    (folder / first).write_bytes((folder / first).read_bytes()[:200])
    (folder / second).unlink()
    exif = image_trees.Image.Exif()
    exif[0x0112] = 6
    image_trees.picture(1, (30, 20)).save(folder / third, exif=exif)
    (tmp_path / "tfds").mkdir()
    builder = webvision_tfds.Webvision(config="mini", data_dir=tmp_path / "tfds")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    source = sources.load(config(tmp_path / "tfds"))
    assert set(source.left_out) == {first, second} and source.left_out[second].startswith("cannot be read")
    assert len(source.train) == 98 and first not in source.train.names
    row = source.train.names.tolist().index(third)
    assert source.train.images.reader()(row).whole().shape == (30, 20, 3)


def edited(tree, tmp_path, file, change):
    folder = tree[0]
    for name in ("google", "flickr", "val_images_256"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "info").mkdir()
    for source in (folder / "info").iterdir():
        text = source.read_text()
        changed = change(text) if source.name == file else text
        (tmp_path / "info" / source.name).write_bytes(changed.encode("utf-8", "surrogateescape"))
    return config(tmp_path)


TRAIN = "train_filelist_google.txt"


@pytest.mark.parametrize(
    "file, change, message",
    [
        (TRAIN, lambda text: text + "google/q0000/x.jpg\n", "expected a path and a label"),
        (TRAIN, lambda text: text + "google/q0000/x.jpg 1000\n", "label 1000, expected 0 to 999"),
        (TRAIN, lambda text: text + text.splitlines()[0][:-1] + "7\n", "has label 7, but 0 further up"),
        (TRAIN, lambda text: text.replace("google/", "elsewhere/"), "none of its first images is there"),
        (TRAIN, lambda text: "\n".join(text.splitlines()[2:]), "class 0 has no images"),
        (TRAIN, lambda text: text + "google/q0000/lost.jpg 0\n", "1 of 101 images cannot be used"),
        (TRAIN, lambda text: text.replace("img", "\udce9", 1), "not UTF-8"),
        ("synsets.txt", lambda text: "tench\n" + text, "begins with 'tench', expected a wnid"),
        ("synsets.txt", lambda text: text + text, "different wnids"),
    ],
)
def test_bad_lists(tree, tmp_path, file, change, message):
    with pytest.raises(UserError, match=message):
        sources.load(edited(tree, tmp_path, file, change))


def test_crlf_and_blank_lines(tree, tmp_path):
    data = edited(tree, tmp_path, TRAIN, lambda text: text.replace("\n", "\r\n\r\n"))
    assert len(sources.load(data).train) == 100


def test_what_is_not_there(tmp_path, tree, ilsvrc):
    (tmp_path / "info").mkdir()
    with pytest.raises(UserError, match=r"synsets.txt: no such file"):
        sources.load(config(tmp_path))
    with pytest.raises(UserError, match="data.variant: got 'maxi', expected one of mini, google, full"):
        sources.load(config(tree[0], variant="maxi"))
    with pytest.raises(UserError, match="data.test=.*no folder for 50 of 50 classes"):
        sources.load(config(tree[0], test=str(tmp_path)))
    with pytest.raises(UserError, match="elsewhere.*no such folder"):
        sources.load(config(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="TFDS cannot provide webvision/mini"):
        sources.load(config(tmp_path / "empty"))
    with pytest.raises(UserError, match="needs data.dir"):
        webvision.imagenet(default.get_config().data)


def test_image_files_in_a_bucket(monkeypatch):
    monkeypatch.setattr(webvision, "_imagenet_place", lambda place: (None, webvision.epath.Path(place)))
    with pytest.raises(UserError, match="data.test='gs://bucket/imagenet'.*local folders only"):
        webvision.imagenet_split("gs://bucket/imagenet", "val", ("n00000001",), ("n00000001",), "data.test")
