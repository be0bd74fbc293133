"""Folders of Hugging Face `datasets`. `data/huggingface` was written by `write_golden` with datasets 5.2.0, and
`data/huggingface_expected.npz` is what that package read back; the other tests write the format with pyarrow."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from runs import ROOT

from configs import default
from ieg_jax import methods
from ieg_jax.data import images
from ieg_jax.data.batches import train_batches
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import huggingface
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError

GOLDEN = ROOT / "tests" / "fixtures" / "huggingface"
NAMES = ("zebra", "apple", "Müller")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(seed, kind="PNG", size=(6, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8) // 32 * 32
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_golden(folder, expected):
    """Needs the package datasets."""
    import datasets

    names = datasets.ClassLabel(names=list(NAMES))
    columns = {"image": datasets.Image(), "label": names, "clean_label": names, "id": datasets.Value("string")}

    def split(n, start):
        kinds = ["PNG", "JPEG"]
        return datasets.Dataset.from_dict(
            {
                "image": [
                    {"bytes": encoded(start + k, kinds[k % 2], (5 + k % 3, 8)), "path": f"{k}.{kinds[k % 2].lower()}"}
                    for k in range(n)
                ],
                "label": [2 * k % 3 for k in range(n)],
                "clean_label": [k % 3 if k % 4 else -1 for k in range(n)],
                "id": [str(k) for k in range(n)],
            },
            features=datasets.Features(columns),
        )

    parts = {"train": split(9, 0), "test": split(4, 100), "trusted": split(3, 200)}
    datasets.DatasetDict(parts).save_to_disk(folder, num_shards={"train": 2, "test": 1, "trusted": 1})
    arrays = {}
    for name, part in datasets.load_from_disk(folder).items():
        arrays |= {f"{name}_labels": np.array(part["label"]), f"{name}_clean": np.array(part["clean_label"])}
        arrays |= {f"{name}_{row}": np.asarray(image.convert("RGB")) for row, image in enumerate(part["image"])}
    np.savez_compressed(expected, **arrays)


def config(folder, **keys):
    data = default.get_config().data
    data.name, data.dir = "huggingface", str(folder)
    data.update(keys)
    return data


def write(folder, label, kind=None, contents=None, names=NAMES, features=True, image="image", **columns):
    """A `Dataset` of one file, written with pyarrow."""
    folder.mkdir(parents=True)
    contents = [encoded(k) for k in range(len(label))] if contents is None else contents
    rows = [content if isinstance(content, dict) else {"bytes": content, "path": None} for content in contents]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    about = {image: {"_type": "Image"}, "label": {"_type": "Value", "dtype": "?"} if kind else {"_type": "ClassLabel"}}
    if not kind:
        about["label"]["names"] = list(names)
    arrays = {image: pa.array(rows, struct), "label": pa.array(label, kind or pa.int64())}
    for name, values in columns.items():
        arrays[name] = pa.array(values)
        about[name] = {"_type": "ClassLabel", "names": list(names)} if arrays[name].type == pa.int64() else {}
    table = pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": about if features else None}))
    return folder


def test_what_the_package_wrote_is_read_as_it_reads_it():
    source = sources.load(config(GOLDEN))
    assert source.class_names == NAMES and source.num_classes == 3
    with np.load(GOLDEN.parent / "huggingface_expected.npz") as expected:
        for name in ("train", "test", "trusted"):
            split, labels, clean = getattr(source, name), expected[f"{name}_labels"], expected[f"{name}_clean"]
            if name != "train":
                labels = clean = np.where(clean < 0, labels, clean)
            np.testing.assert_array_equal(split.labels, labels)
            np.testing.assert_array_equal(split.clean_labels, clean)
            read = split.images.reader()
            for row in range(len(split)):
                want = expected[f"{name}_{row}"]
                np.testing.assert_array_equal(read(row).whole(), want)
                assert split.images.sizes[row].tolist() == list(want.shape[:2])
            last = split.take(np.array([len(split) - 1]))
            np.testing.assert_array_equal(last.images.reader()(0).whole(), expected[f"{name}_{len(split) - 1}"])
    assert source.train.names[8] == "train/8"


def test_the_package_reads_the_same_today(tmp_path):
    pytest.importorskip("datasets")
    write_golden(tmp_path / "hf", tmp_path / "expected.npz")
    with np.load(tmp_path / "expected.npz") as new, np.load(GOLDEN.parent / "huggingface_expected.npz") as old:
        assert new.keys() == old.keys() and all(np.array_equal(new[key], old[key]) for key in new)


def test_batches():
    own = default.get_config()
    own.data = config(GOLDEN, image_size=4)
    own.trusted.source, own.batch_size, own.trusted.batch_size = "separate", 4, 2
    data = load_data(own)
    import jax

    batch = next(
        train_batches(
            own, data, methods.get(own.method.name).streams, 0, 1, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    )
    assert batch["image"].shape == (4, 4, 4, 3) and batch["probe_image"].shape == (2, 4, 4, 3)


def test_one_dataset_with_others_beside_it(tmp_path):
    """Classes in another order, an image in a file of its own, features that only the Arrow file has."""
    (tmp_path / "x.png").write_bytes(encoded(7))
    contents = [encoded(0), {"bytes": None, "path": str(tmp_path / "x.png")}, encoded(2)]
    write(tmp_path / "train", [0, 1, 2], contents=contents, features=False)
    write(tmp_path / "test", [0, 2], names=("Müller", "apple", "zebra"))
    write(tmp_path / "trusted", ["zebra", "Müller", "apple"], pa.string())
    data = config(tmp_path / "train", test=str(tmp_path / "test"), trusted=str(tmp_path / "trusted"))
    source = sources.load(data)
    assert source.test.labels.tolist() == [2, 0] and source.trusted.labels.tolist() == [0, 2, 1]
    expected = np.asarray(Image.open(io.BytesIO(encoded(7))))
    np.testing.assert_array_equal(source.train.images.reader()(1).whole(), expected)


def test_strings_numbers_and_a_named_column(tmp_path):
    source = sources.load(config(write(tmp_path / "a", ["b", "a", "b"], pa.large_string())))
    assert source.class_names == ("a", "b") and source.train.labels.tolist() == [1, 0, 1]
    source = sources.load(config(write(tmp_path / "b", [0, 3, 1], pa.int32())))
    assert source.class_names == ("0", "1", "3") and source.train.labels.tolist() == [0, 2, 1]
    folder = write(tmp_path / "c", [0, 1, 2], coarse=[1, 1, 0])
    assert sources.load(config(folder, variant="coarse")).train.labels.tolist() == [1, 1, 0]
    assert sources.load(config(folder)).train.labels.tolist() == [0, 1, 2]


def test_the_images_are_decoded_once(tmp_path, monkeypatch):
    data = config(write(tmp_path / "hf", [0, 1]))
    sources.load(data)
    monkeypatch.setattr(images, "check_image", None)
    assert sources.load(data).train.images.plain.all()


def test_bytes_are_kept_to_the_last():
    column = pa.chunked_array([pa.array([{"bytes": b"ab\0\0", "path": None}])])
    stored = huggingface.ArrowImages(column, (), np.array([0]), np.array([True]))
    assert stored.reader()(0).content.numpy() == b"ab\0\0"


@pytest.mark.parametrize(
    "make, keys, message",
    [
        (lambda f: f.mkdir(), {}, "neither dataset_dict.json nor state.json"),
        (lambda f: write(f, [0, 1], image="photo", label2=[1, 1]), {"variant": "lable"}, r"photo \(Image\).*'lable'"),
        (lambda f: write(f, [0.5, 1.0], pa.float64()), {}, "'label' is of type double, expected a ClassLabel"),
        (lambda f: write(f, []), {}, "no rows"),
        (lambda f: write(f, [0, None]), {}, "1 of 2 examples have no label, or one below 0, the first in row 1"),
        (lambda f: write(f, [0, 0], pa.int64()), {}, "at least two classes"),
        (
            lambda f: write(f, [0, 1], contents=[encoded(0), b"GIF?"]),
            {},
            "1 of 2 images cannot be used:\n  train/1: no",
        ),
        (lambda f: write(f, [0, 1], contents=[encoded(0), None]), {}, "train/1: zero bytes"),
        (lambda f: write(f, [0, 1]), {"num_classes": 2}, "num_classes=2, but the labels of hf go up to 2"),
    ],
)
def test_what_cannot_be_used(tmp_path, make, keys, message):
    make(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        sources.load(config(tmp_path / "hf", **keys))


def test_damaged_and_foreign_folders(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "hf")
    (tmp_path / "hf" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(UserError, match=r"a DatasetDict with \['test'\], expected a split train"):
        sources.load(config(tmp_path / "hf"))
    file = tmp_path / "hf" / "train" / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(UserError, match="its data files cannot be read"):
        sources.load(config(tmp_path / "hf" / "train"))
    (tmp_path / "hf" / "test" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="dataset_info.json: cannot be read"):
        sources.load(config(tmp_path / "hf" / "test"))
    write(tmp_path / "other", [0], names=("unicorn",))
    write(tmp_path / "own", [0, 1])
    with pytest.raises(UserError, match="other: label 'unicorn' is none of the classes of the training set .zebra,"):
        sources.load(config(tmp_path / "own", trusted=str(tmp_path / "other")))
