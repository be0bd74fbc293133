"""Writes archives as they are published, byte for byte, filled with random images; and has TFDS prepare them."""

import functools
import io
import pathlib
import pickle
import struct
import zipfile
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds

CLASSES = {"cifar10": 10, "cifar100": 100}
PUBLISHED = {"train": 50_000, "test": 10_000}
SMALL = {"train": 50, "test": 20}


def cifar_binary(folder: pathlib.Path, name: str, sizes: dict[str, int], seed: int = 0) -> dict:
    """Writes the binary version of cifar10 or cifar100.

    Returns:
      split -> (images `[n, 32, 32, 3]` uint8, labels `[n]`); the same for the same name, sizes and seed.
    """
    folder.mkdir(parents=True)
    content = _draw(name, tuple(sizes.items()), seed)
    for file, images, labels in _batches(name, content):
        head = labels[:, None] if name == "cifar10" else np.stack([labels // 5, labels], 1)
        (folder / f"{file}.bin").write_bytes(np.concatenate([head, _planes(images)], 1).data)
    if name == "cifar10":
        (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n\n")
    else:
        (folder / "coarse_label_names.txt").write_text("".join(f"superclass {i}\n" for i in range(20)))
        (folder / "fine_label_names.txt").write_text("".join(f"class {i}\n" for i in range(100)))
    return content


def cifar_python(folder: pathlib.Path, name: str, sizes: dict[str, int], seed: int = 0) -> dict:
    """Writes the python version, as Python 2 pickled it; returns what `cifar_binary` does."""
    folder.mkdir(parents=True)
    content = _draw(name, tuple(sizes.items()), seed)
    for number, (file, images, labels) in enumerate(_batches(name, content), start=1):
        batch = {
            b"filenames": [b"image_s_%06d.png" % i for i in range(len(labels))],
            b"batch_label": b"batch %d" % number,
        }
        if name == "cifar10":
            batch[b"labels"] = labels.tolist()
        else:
            batch |= {b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        (folder / file).write_bytes(python2_pickle(batch | {b"data": _planes(images)}))
    return content


def cifar_tfds(folder: pathlib.Path, name: str, sizes: dict[str, int], seed: int = 0) -> dict:
    """Has TFDS's own builder prepare the binary version in `folder`, without its download; returns the same."""
    download = folder / "downloads" / "unpacked"
    published = download / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    content = cifar_binary(published, name, sizes, seed)
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", lambda self, url: download):
        tfds.builder(name, data_dir=folder).download_and_prepare()
    return content


def python2_pickle(value) -> bytes:
    """What Python 2 with the numpy of its time writes with protocol 2; strings are bytes."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value) -> bytes:
    match value:
        case bytes():
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
        case int():
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
        case np.ndarray():  # uint8 [n, m]
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            minus_one = _python2(-1)
            dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + minus_one + minus_one + b"K\x00tb"
            shape = _python2(value.shape[0]) + _python2(value.shape[1]) + b"\x86"
            return empty + b"(K\x01" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"
    raise TypeError(value)


def human_labels(path: pathlib.Path, name: str, clean: np.ndarray, seed: int = 0) -> dict:
    """Writes CIFAR-10N (cifar10) or CIFAR-100N for these true labels; returns the dict that is in it."""
    rng = np.random.default_rng(seed)
    clean = clean.astype(np.int64)

    def noisy(rate):
        return np.where(rng.random(len(clean)) < rate, rng.integers(0, CLASSES[name], len(clean)), clean)

    if name == "cifar10":
        three = {f"random_label{i}": noisy(0.2) for i in (1, 2, 3)}
        worse = clean.copy()
        for labels in three.values():
            worse = np.where(labels != clean, labels, worse)
        content = {"clean_label": clean, "worse_label": worse, "aggre_label": noisy(0.1)} | three
    else:
        wrong = noisy(0.4)
        content = {"clean_label": clean, "noisy_label": wrong}
        content |= {"noisy_coarse_label": (wrong // 5).tolist(), "clean_coarse_label": (clean // 5).tolist()}
    path.write_bytes(torch_zip(old_numpy(pickle.dumps(content, protocol=2))))
    return content


def torch_zip(pickled: bytes, name: str = "archive") -> bytes:
    """The file that torch.save makes around a pickle without tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", pickled)
        archive.writestr(f"{name}/byteorder", "little")
        archive.writestr(f"{name}/version", "3\n")
    return file.getvalue()


def old_numpy(pickled: bytes) -> bytes:
    """A pickle of a protocol below 4 with the module names of numpy 1."""
    return pickled.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


@functools.lru_cache(maxsize=1)  # both versions of an archive are mostly written one after the other
def _draw(name, sizes, seed):
    rng = np.random.default_rng(seed)
    return {
        split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, CLASSES[name], n, np.uint8))
        for split, n in sizes
    }


def _batches(name, content):
    """(file name without suffix, images, labels) of each file of an archive."""
    if name == "cifar100":
        return [(split, *content[split]) for split in ("train", "test")]
    train = zip(*(np.split(array, 5) for array in content["train"]), strict=True)
    return [(f"data_batch_{i}", *batch) for i, batch in enumerate(train, start=1)] + [("test_batch", *content["test"])]


def _planes(images):
    """`[n, 3072]`: all red, then all green, then all blue."""
    return np.concatenate([images[..., channel].reshape(len(images), 1024) for channel in range(3)], 1)


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
