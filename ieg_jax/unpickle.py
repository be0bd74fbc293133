"""Reads pickles, here and nowhere else: numbers, text, plain containers, arrays and tensors of numbers, nothing else.

A pickle is a program that may call whatever it can name. Here it can name nothing real: each of the few names
that arrays need stands for a recipe, which only notes what it is called with. When the program has ended, arrays
are made from these notes, after a check that they describe bytes of a numeric dtype.
"""

import dataclasses
import io
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable

import numpy as np
from etils import epath

from ieg_jax.errors import UserError

MAX_TENSORS = 1 << 34  # bytes of weights, unpacked
MAX_UNPACKED = 1 << 28  # bytes in a torch file, unpacked; the published label files have a few million
_NUMERIC = re.compile(rb"[biufc]\d{1,2}")  # booleans, integers, floats and complex numbers, with their size in bytes


def loads(content: bytes, where: str, encoding: str = "bytes"):
    """Reads a pickle that holds data only.

    Args:
      content: of the file.
      where: its name, for messages.
      encoding: of the strings that Python 2 wrote; "bytes" leaves them as bytes.

    Returns:
      Dicts, lists, tuples and sets of numbers, strings, bytes, None and arrays of numbers (which are read-only).

    Raises:
      UserError: for a pickle that is damaged or names, or holds, anything else; nothing of it has been run.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding=encoding).load(), {})
    except _Refused as error:
        raise UserError(
            f"{where}: {error}, which could run code or hide data; expected plain containers and arrays of numbers. "
            f"Nothing of it was run; get the file from its publisher"
        ) from None
    except Exception as error:  # whatever a damaged stream provokes
        raise UserError(
            f"{where}: not a pickle of arrays, or damaged ({type(error).__name__}: {error}); is the copy complete?"
        ) from None


def read_torch_zip(path: str | os.PathLike) -> dict:
    """Reads the dict that `torch.save` wrote, as long as it holds no tensors; torch is not needed.

    Such a file is a zip with one pickle, `<name>/data.pkl`. It is read in place: nothing is unpacked to disk.

    Raises:
      UserError: for a file that is missing, damaged, encrypted, no such zip, or unpacks to more than MAX_UNPACKED
        bytes; for names in it that lead elsewhere; for a pickle that `loads` refuses.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(epath.Path(path).expanduser().read_bytes())) as archive:
            name = _find_pickle(archive.infolist(), str(path), MAX_UNPACKED)
            content = archive.read(name)
    except UserError:
        raise
    except Exception as error:  # of the file system, zipfile, and what decompresses
        raise UserError(
            f"{path}: cannot be read as a file of torch.save ({type(error).__name__}: {error}); is the copy complete?"
        ) from None
    found = loads(content, f"{path}: {name}")
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} holds a {type(found).__name__}, expected a dict")
    return found


def read_tensors(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict that `torch.save` wrote; torch is not needed, and nothing in it is run.

    Both forms are read: the zip, and the stream of pickles and bytes from before 2020.

    Args:
      content: of the file.
      where: its name, for messages.

    Returns:
      Name -> array. bfloat16 becomes float32.

    Raises:
      UserError: for a file that is damaged, and for one that holds or names anything but tensors in dicts.
    """
    try:
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                pickled = _find_pickle(archive.infolist(), where, MAX_TENSORS)
                folder = pickled.removesuffix("data.pkl")
                found = _TensorUnpickler(io.BytesIO(archive.read(pickled))).load()
                tensors = _tensors(found, lambda key: archive.read(f"{folder}data/{key}"))
        else:
            tensors = _tensors_of_stream(io.BytesIO(content))
    except UserError:
        raise
    except _Refused as error:
        raise UserError(f"{where}: {error}; expected a state dict, tensors by name. Nothing of it was run") from None
    except Exception as error:  # whatever a damaged file provokes
        raise UserError(
            f"{where}: not a file of torch.save, or damaged ({type(error).__name__}: {error}); is the copy complete?"
        ) from None
    if not tensors:
        raise UserError(f"{where}: no tensors in it, expected a state dict, tensors by name")
    return tensors


def _tensors_of_stream(stream: io.BytesIO) -> dict[str, np.ndarray]:
    """The form before the zip: magic number, version and machine, the state dict, and then the bytes by key."""
    magic, version, _ = (_TensorUnpickler(stream).load() for _ in range(3))
    if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
        raise _Refused(f"begins with {magic!r:.40}, version {version!r:.40}")
    found = _TensorUnpickler(stream)
    state, keys = found.load(), _TensorUnpickler(stream).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("has no list of the keys of its tensors")
    widths, stored = {storage.key: storage.dtype.itemsize for storage in found.storages}, {}
    for key in keys:
        (count,) = np.frombuffer(stream.read(8), "<i8")
        stored[key] = stream.read(int(count) * widths[key])
    return _tensors(state, stored.__getitem__)


def _tensors(found: object, read: Callable[[str], bytes], prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors in nested dicts, by their names joined with dots; other values, such as the epoch, are left out."""
    if not isinstance(found, dict):
        raise _Refused(f"holds a {type(found).__name__}")
    arrays = {}
    for name, value in found.items():
        if isinstance(value, dict):
            # A checkpoint of a training: the weights are in one of its dicts.
            arrays |= _tensors(
                value, read, "" if name in ("state_dict", "model", "model_state") else f"{prefix}{name}."
            )
        elif isinstance(value, _Tensor):
            arrays[f"{prefix}{name}"] = value.made(read)
    return arrays


def _find_pickle(entries: list[zipfile.ZipInfo], where: str, largest: int) -> str:
    """The name of the one pickle in a file of torch.save; raises UserError for whatever else is in it."""
    for entry in entries:
        parts = pathlib.PureWindowsPath(entry.filename)  # splits at both / and \, and knows drives
        if parts.anchor or ".." in parts.parts:
            raise UserError(f"{where}: has an entry {entry.filename!r} that leads out of it; expected <name>/data.pkl")
        if entry.flag_bits & 1:
            raise UserError(f"{where}: {entry.filename} is encrypted, expected a file as torch.save writes it")
    size = sum(entry.file_size for entry in entries)
    if size > largest:
        raise UserError(f"{where}: {size} bytes unpacked, expected at most {largest}")
    pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{where}: {len(pickles)} entries called <name>/data.pkl, expected one; is it of torch.save?")
    return pickles[0]


class _Refused(Exception):
    """The stream names or holds what it must not."""


class _Recipe:
    """What the stream calls in place of numpy: it notes the arguments, and the state that follows.

    Without `__setstate__` pickle would write a state into the attributes of the object, whatever their names.
    """

    def __init__(self, *args):
        self.args, self.state = args, ()

    def __setstate__(self, state):
        self.state = state

    def make(self):
        raise NotImplementedError


class _Dtype(_Recipe):
    def make(self) -> np.dtype:
        code, *_ = self.args
        _, order, *rest = self.state
        # The rest are fields, shape and metadata, in which a dtype can hide that it holds objects.
        if not _NUMERIC.fullmatch(_bytes(code)) or any(part not in (None, -1, 0) for part in rest):
            raise _Refused(f"has an array of dtype {code!r} with {rest}")
        return np.dtype(_bytes(code).decode()).newbyteorder(_bytes(order).decode())


class _Array(_Recipe):
    def make(self) -> np.ndarray:
        _, shape, dtype, is_fortran, data = self.state
        return np.frombuffer(_bytes(data), dtype.make()).reshape(shape, order="F" if is_fortran else "C")


class _Scalar(_Recipe):
    def make(self) -> np.generic:
        dtype, data = self.args
        return np.frombuffer(_bytes(data), dtype.make()).reshape(())[()]


class _Encode(_Recipe):
    """Stands for `codecs.encode`, by which Python 3 writes bytes that Python 2 can read."""

    def __new__(cls, text, encoding):
        if encoding != "latin1":
            raise _Refused(f"calls codecs.encode with {encoding!r}")
        return text.encode("latin1")


_RECIPES = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,  # is not called: it is the argument that tells _reconstruct what to make
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray._reconstruct": _Array,  # since numpy 2
    "numpy._core.multiarray.scalar": _Scalar,
    "_codecs.encode": _Encode,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The bytes of a tensor, which lie outside of the pickle."""

    key: str
    dtype: np.dtype


class _Tensor(_Recipe):
    """Stands for `torch._utils._rebuild_tensor_v2`."""

    def made(self, read: Callable[[str], bytes]) -> np.ndarray:
        storage, offset, size, stride = self.args[:4]
        if not isinstance(storage, _Storage):
            raise _Refused(f"has a tensor of a {type(storage).__name__}")
        flat = np.frombuffer(read(storage.key), storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (all(size) and last >= len(flat)):
            raise _Refused(f"has a tensor of shape {size} that leads out of its {len(flat)} numbers")
        width = storage.dtype.itemsize
        array = np.lib.stride_tricks.as_strided(flat[offset:], size, [width * step for step in stride], writeable=False)
        if storage.dtype == np.uint16:  # bfloat16, the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.copy()


class _Parameter(_Recipe):
    """Stands for `torch._utils._rebuild_parameter`: a tensor, and whether it is trained."""

    def __new__(cls, tensor, *_):
        return tensor


class _Dict(dict):
    """Stands for `OrderedDict`, whose attributes, such as versions of modules, are left out."""

    def __setstate__(self, state):
        pass


_STORAGES = {
    "FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
_OF_TENSORS = {
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "collections.OrderedDict": _Dict,
} | {f"torch.{name}": kind for name, kind in _STORAGES.items()}


class _TensorUnpickler(pickle.Unpickler):
    """Reads tensors in dicts; notes the storages that they refer to."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")
        self.storages: list[_Storage] = []

    def find_class(self, module, name):
        if f"{module}.{name}" not in _OF_TENSORS:
            raise _Refused(f"names {module}.{name}, which could run code")
        return _OF_TENSORS[f"{module}.{name}"]

    def persistent_load(self, pid):
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str) or "/" in key or ".." in key:
            raise _Refused(f"refers to {pid!r:.80}")
        self.storages.append(_Storage(key, np.dtype(dtype)))
        return self.storages[-1]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in _RECIPES:
            raise _Refused(f"names {module}.{name}")
        return _RECIPES[f"{module}.{name}"]

    def persistent_load(self, pid):
        raise _Refused("refers to data outside of the pickle, such as a tensor")


def _plain(value, done: dict):
    """Replaces the recipes in `value` by what they make; `done`, by id, is for objects that occur several times."""
    if id(value) not in done:
        if isinstance(value, _Recipe):
            done[id(value)] = value.make()
        elif isinstance(value, dict):
            done[id(value)] = {_plain(key, done): _plain(item, done) for key, item in value.items()}
        elif isinstance(value, list | tuple | set | frozenset):
            done[id(value)] = type(value)(_plain(item, done) for item in value)
        elif value is None or isinstance(value, int | float | str | bytes):
            done[id(value)] = value
        else:
            raise _Refused(f"holds a {type(value).__name__}")
    return done[id(value)]


def _bytes(text: str | bytes) -> bytes:
    """A string of Python 2 as bytes; the unpickler gives bytes or text, as its `encoding` says."""
    return text.encode("latin1") if isinstance(text, str) else text
