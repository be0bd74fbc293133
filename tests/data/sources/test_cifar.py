import dataclasses
import pathlib
import pickle
import shutil

import archives
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import default
from ieg_jax.data.sources import cifar
from ieg_jax.errors import UserError

NAMES = ("cifar10", "cifar100")
BINARY = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PYTHON = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FIRST = {"cifar10": "data_batch_1", "cifar100": "train"}


def read(name, folder):
    data = default.get_config().data
    data.name, data.dir = name, str(folder)
    return {"cifar10": cifar.cifar10, "cifar100": cifar.cifar100}[name](data)


def assert_holds(source, name, content):
    assert source.name == name
    assert source.num_classes == archives.CLASSES[name]
    assert source.trusted is None
    for split_name, (images, labels) in content.items():
        split = getattr(source, split_name)
        assert split.images.dtype == np.uint8 and split.labels.dtype == split.clean_labels.dtype == np.int32
        assert np.array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.clean_labels, labels)
        np.testing.assert_array_equal(split.ids, np.arange(len(labels)))
        assert split.names[-1] == f"{split_name}/{len(labels) - 1:05d}"


def assert_same(one, other):
    assert dataclasses.replace(one, train=None, test=None) == dataclasses.replace(other, train=None, test=None)
    for split in ("train", "test"):
        for field in dataclasses.fields(cifar.Split):
            columns = [getattr(getattr(source, split), field.name) for source in (one, other)]
            if field.name in ("previews", "views", "pictures"):
                assert columns == [None, None]
                continue
            assert columns[0].dtype == columns[1].dtype and np.array_equal(*columns), field.name


@pytest.fixture(scope="module", params=NAMES)
def prepared(request, tmp_path_factory):
    """(name, TFDS's data_dir, what is in it)."""
    folder = tmp_path_factory.mktemp(f"{request.param}_tfds")
    return request.param, folder, archives.cifar_tfds(folder, request.param, archives.SMALL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_archives_of_published_size(name, tmp_path):
    content = archives.cifar_binary(tmp_path / BINARY[name], name, archives.PUBLISHED)
    archives.cifar_python(tmp_path / PYTHON[name], name, archives.PUBLISHED)
    binary = read(name, tmp_path / BINARY[name])
    assert_holds(binary, name, content)
    assert_same(binary, read(name, tmp_path / PYTHON[name]))
    shutil.rmtree(tmp_path)  # 370 MB


def test_published_sizes_are_required(tmp_path):
    archives.cifar_binary(tmp_path / "binary", "cifar10", archives.SMALL)
    with pytest.raises(UserError, match=r"data_batch_1.bin: 30730 bytes, expected 30730000 \(10000 images of 3073"):
        read("cifar10", tmp_path / "binary")
    archives.cifar_python(tmp_path / "python", "cifar100", archives.SMALL)
    with pytest.raises(UserError, match=r"python/train: data are uint8 \(50, 3072\), expected uint8 \(50000, 3072\)"):
        read("cifar100", tmp_path / "python")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_archives(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    archives.cifar_binary(tmp_path / "binary", name, archives.SMALL)
    path = tmp_path / "binary" / f"{FIRST[name]}.bin"
    whole = path.read_bytes()
    images, label_bytes = {"cifar10": (10, 1), "cifar100": (50, 2)}[name]
    size = images * (label_bytes + 3072)
    for content in (whole[:-1], whole + b"\0", whole[: size // 2], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: {len(content)} bytes, expected {size} \({images} images"):
            read(name, path.parent)
    outside = bytearray(whole)
    outside[7 * (label_bytes + 3072) + label_bytes - 1] = archives.CLASSES[name]
    path.write_bytes(outside)
    with pytest.raises(UserError, match=rf"{path}: its labels: (10 at place 7, expected 0 to 9|100 .* 7, .* 99)$"):
        read(name, path.parent)
    path.unlink()
    with pytest.raises(UserError, match=f"binary lacks {FIRST[name]}.bin; is the archive unpacked completely"):
        read(name, path.parent)

    archives.cifar_python(tmp_path / "python", name, archives.SMALL)
    path = tmp_path / "python" / FIRST[name]
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: .*damaged.*is the copy complete"):
            read(name, path.parent)
    path.unlink()
    with pytest.raises(UserError, match=f"python lacks {FIRST[name]};"):
        read(name, path.parent)


def test_binary_files_are_preferred_and_sub_folders_found(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    name = prepared[0]
    python = archives.cifar_python(tmp_path / PYTHON[name], name, archives.SMALL, seed=1)
    assert_holds(read(name, tmp_path), name, python)
    assert_holds(read(name, tmp_path / PYTHON[name]), name, python)
    binary = archives.cifar_binary(tmp_path / BINARY[name], name, archives.SMALL, seed=2)
    assert_holds(read(name, tmp_path), name, binary)
    assert_holds(read(name, tmp_path / BINARY[name]), name, binary)
    (tmp_path / BINARY[name] / f"{FIRST[name]}.bin").unlink()
    assert_holds(read(name, tmp_path), name, python)


def test_tfds(prepared, monkeypatch):
    name, folder, content = prepared
    assert_holds(read(name, folder), name, content)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_holds(read(name, f"~/{folder.name}"), name, content)
    stored = tfds.as_numpy(tfds.load(name, data_dir=folder, split="train", batch_size=-1))["label"]
    assert stored.tolist() != content["train"][1].tolist(), "TFDS has shuffled them"


def test_all_three_forms_are_the_same(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    name, folder, _ = prepared
    archives.cifar_binary(tmp_path / "binary", name, archives.SMALL)
    archives.cifar_python(tmp_path / "python", name, archives.SMALL)
    through_tfds = read(name, folder)
    assert_same(through_tfds, read(name, tmp_path / "binary"))
    assert_same(through_tfds, read(name, tmp_path / "python"))


def test_where_the_bytes_of_an_image_go(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", {"train": 5, "test": 1})
    colours = bytes([1] * 1024 + [2] * 1024 + [3] * 1024)
    rows = bytes(number // 32 for number in range(1024)) * 3
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(bytes([number]) + (rows if number == 2 else colours))
    (tmp_path / "test_batch.bin").write_bytes(bytes([0]) + colours)
    train = read("cifar10", tmp_path).train
    assert train.labels.tolist() == [1, 2, 3, 4, 5]
    assert train.images[0, 20, 30].tolist() == [1, 2, 3]
    assert train.images[1, 20, 30].tolist() == [20, 20, 20]
    assert train.images[1, 31, 0].tolist() == [31, 31, 31]


def test_class_names():
    classes = cifar.CIFAR100.class_names
    assert len(set(classes)) == 100
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[57], classes[99]) == ("apple", "pear", "worm")
    assert [cifar.CIFAR10.class_names[i] for i in (0, 1, 2, 9)] == ["airplane", "automobile", "bird", "truck"]


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


GOOD = {b"data": np.zeros((10, 3072), np.uint8), b"labels": [1] * 10}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"data": GOOD[b"data"], "labels": [1] * 10}, r"holds \['data', 'labels'\], expected .* b'data' and b'labels'"),
        ({b"data": GOOD[b"data"], b"fine_labels": [1] * 10}, "holds .*fine_labels.*, expected .* b'labels'"),
        ([GOOD], "holds list, expected a dict"),
        (GOOD | {b"data": np.zeros((9, 3072), np.uint8)}, r"data are uint8 \(9, 3072\), expected uint8 \(10, 3072\)"),
        (GOOD | {b"data": np.zeros((10, 3072))}, "data are float64"),
        (GOOD | {b"data": b"\0" * 30720}, "data are a bytes"),
        (GOOD | {b"labels": [1] * 9}, r"its labels: shape \(9,\), expected \(10,\)"),
        (GOOD | {b"labels": [1] * 9 + [10]}, "its labels: 10 at place 9, expected 0 to 9"),
        (GOOD | {b"labels": [1] * 9 + [-1]}, "its labels: -1 at place 9"),
        (GOOD | {b"labels": [1] * 9 + [2**70]}, "dtype object, expected integers"),
        (GOOD | {b"labels": [1.0] * 10}, "labels are no list of integers"),
        (GOOD | {b"labels": [[1], [2, 3]]}, "labels are no list of integers"),
        (GOOD | {b"labels": "1111111111"}, "labels are no list of integers"),
    ],
)
def test_bad_python_files(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    folder = tmp_path / "cifar"
    archives.cifar_python(folder, "cifar10", archives.SMALL)
    (folder / "data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=rf"data_batch_3: .*{message}"):
        read("cifar10", folder)


def test_code_in_a_python_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    folder, marker = tmp_path / "cifar", tmp_path / "marker"
    archives.cifar_python(folder, "cifar10", archives.SMALL)
    (folder / "data_batch_1").write_bytes(pickle.dumps(GOOD | {b"more": Runs(marker)}))
    with pytest.raises(UserError, match=r"data_batch_1: names .*Nothing of it was run"):
        read("cifar10", folder)
    assert not marker.exists()


def test_folders_that_hold_something_else(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no cifar10; expected data_batch_1.bin .* test_batch.bin or"):
            read("cifar10", folder)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(UserError, match=rf"tar -xzf {tmp_path}/cifar-10-python.tar.gz -C {tmp_path}$"):
        read("cifar10", tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()  # a tree of images
    with pytest.raises(UserError, match="holds no cifar100; expected train.bin"):
        read("cifar100", tmp_path)
    (tmp_path / "train").rmdir()
    (tmp_path / "train").touch()
    with pytest.raises(UserError, match="lacks test; is the archive unpacked completely"):
        read("cifar100", tmp_path)


def test_tfds_that_cannot_provide(tmp_path, monkeypatch):
    def no_network(self, url):
        raise ConnectionError(f"no route to {url}\nand so on")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", no_network)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match=r"(?s)TFDS cannot provide cifar10 .*no route to http.*tfds build cifar10"):
        read("cifar10", tmp_path)


def test_damaged_records_of_tfds(prepared, tmp_path):
    name, folder, _ = prepared
    for damage, message in (
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), "cannot be read.*prepare it again"),
        (lambda file: file.unlink(), "cannot be read.*prepare it again"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damage(next((copy / name).glob("*/*-train.tfrecord-*")))
        with pytest.raises(UserError, match=message):
            read(name, copy)
        shutil.rmtree(copy)


def test_ids_of_tfds_that_are_not_complete(tmp_path, monkeypatch):
    made = tfds.image_classification.cifar.Cifar10._generate_examples

    def generate(self, prefix, paths):
        return ((key, example) for key, example in made(self, prefix, paths) if key != 3)

    monkeypatch.setattr(tfds.image_classification.cifar.Cifar10, "_generate_examples", generate)
    archives.cifar_tfds(tmp_path, "cifar10", archives.SMALL)
    with pytest.raises(UserError, match="image 3 of train in the order of ids has the id train_00004, expected .*3;"):
        read("cifar10", tmp_path)
