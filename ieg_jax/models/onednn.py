"""oneDNN's convolutions for processors, as a call that XLA makes from inside a program.

oneDNN comes with the package onednn-cpu-gomp (the extra `cpu`), a library without Python. It is called through its C
interface by ctypes, and XLA calls it through its foreign-function interface, for which a function of ctypes stands too:
there is nothing to compile. What is called here, and what the structures look like, is in oneDNN's `dnnl.h` (3.2) and
in `xla/ffi/api/c_api.h` of jaxlib (0.1 and later ones, which only add to it).

Results are the same bits at each call, and in another process, as long as the number of threads is the same.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import mmap
import os
import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from importlib import metadata

import jax

from ieg_jax.errors import first_line

PACKAGE, MAJOR = "onednn-cpu-gomp", 3
PACKAGED = sys.platform == "linux" and platform.machine() == "x86_64"  # elsewhere there is no such package
TARGET = "ieg_jax_onednn_convolution_1"  # how XLA calls it; to be changed with the meaning of its attribute
OUTPUT, INPUT_GRADIENT, KERNEL_GRADIENT = range(3)  # what is computed

# Of dnnl_types.h.
_FORWARD_TRAINING, _DIRECT, _FLOAT32, _ANY, _AVX2 = 64, 1, 3, 1, 7
_SRC, _DST, _WEIGHTS, _SCRATCHPAD, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 1, 17, 33, 80, 129, 145, 161
_QUERY_WEIGHTS, _QUERY_DIFF_WEIGHTS, _QUERY_SCRATCHPAD = 131, 132, 136
_USER = 1  # who has the scratchpad
_ALLOCATE = c_void_p(-1)
_INTERNAL = 13  # of XLA's error codes


@functools.cache
def missing() -> str:
    """Why oneDNN cannot be called in this process, in one line; "" where it can.

    The library is loaded, and made known to XLA, when this is asked for the first time.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        advice = "pip install 'ieg_jax[cpu]'" if PACKAGED else "there is a package for x86-64 Linux alone"
        return f"{PACKAGE} is not installed; {advice}"
    paths = [str(file.locate()) for file in files if file.name == f"libdnnl.so.{MAJOR}"]
    if not paths:
        return f"{PACKAGE} has no libdnnl.so.{MAJOR}"
    # libgomp reads this while it is loaded. Else its threads keep the cores busy after each convolution, for what comes
    # next, and those of XLA, which does, wait.
    policy = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = policy or "passive"
    try:
        _Library.loaded = _Library(paths[0])
    except (OSError, AttributeError, RuntimeError) as error:  # another machine's, another glibc, no libgomp
        return f"{PACKAGE} cannot be used: {first_line(error)}"
    finally:
        if policy is None:
            del os.environ["OMP_WAIT_POLICY"]
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu")
    atexit.register(finish)
    return ""


def finish() -> None:
    """Waits for the programs that are running, as far as there are arrays that they write.

    A process that ends while a program computes a convolution would never end: Python is what XLA calls, Python lets no
    thread in at its end, and XLA waits for that thread.
    """
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # of the program, which nobody waits for any more
            array.block_until_ready()


class _Argument(Structure):
    _fields_ = [("name", c_int), ("memory", c_void_p)]


class _Version(Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class _Library:
    """The functions of libdnnl, an engine for the processor, and its stream."""

    loaded: "_Library"

    def __init__(self, path: str):
        # Calls that take no time keep Python's lock: to get it back takes up to 5 ms where another thread is busy.
        self._quick, self._long = ctypes.PyDLL(path), ctypes.CDLL(path)
        self._quick.dnnl_version.restype = POINTER(_Version)
        version = self._quick.dnnl_version().contents
        if version.major != MAJOR:
            raise RuntimeError(f"it is oneDNN {version.major}.{version.minor}, expected {MAJOR}")
        if self._quick.dnnl_get_effective_cpu_isa() & _AVX2 != _AVX2:
            raise RuntimeError("the processor has no AVX2")
        self._quick.dnnl_primitive_desc_query_md.restype = c_void_p
        self._quick.dnnl_memory_desc_equal.argtypes = [c_void_p, c_void_p]
        self._quick.dnnl_memory_desc_get_size.argtypes = [c_void_p]
        self._quick.dnnl_memory_desc_get_size.restype = c_size_t
        self._quick.dnnl_memory_set_data_handle.argtypes = [c_void_p, c_void_p]
        self._long.dnnl_primitive_execute.argtypes = [c_void_p, c_void_p, c_int, c_void_p]
        self.engine = self.make("engine", c_int(1), c_size_t(0))
        self.stream = self.make("stream", self.engine, c_int(1))
        # oneDNN's own scratchpad belongs to the thread that made a primitive, and XLA calls from any of its threads.
        self.attributes = self.make("primitive_attr")
        _check(self._quick.dnnl_primitive_attr_set_scratchpad_mode(self.attributes, c_int(_USER)), "scratchpad_mode")
        self._scratchpad, self._scratchpad_place = mmap.mmap(-1, mmap.PAGESIZE), 0

    def make(self, kind: str, *arguments, name: str = "") -> c_void_p:
        """Calls dnnl_`kind`_create, or the function `name`, and returns what it makes."""
        made = c_void_p()
        name = name or f"dnnl_{kind}_create"
        _check(self._quick[name](byref(made), *arguments), name)
        return made

    def description(self, sizes, strides=None) -> c_void_p:
        """Describes a float32 array; without strides oneDNN chooses its layout."""
        if strides is None:
            layout = (c_int(_FLOAT32), c_int(_ANY))
            return self.make("", c_int(len(sizes)), _sizes(sizes), *layout, name="dnnl_memory_desc_create_with_tag")
        layout = (c_int(_FLOAT32), _sizes(strides))
        return self.make("", c_int(len(sizes)), _sizes(sizes), *layout, name="dnnl_memory_desc_create_with_strides")

    def memory(self, description: c_void_p, place: c_void_p | None = None) -> c_void_p:
        """An array that lies at a place, which may be said later."""
        return self.make("memory", description, self.engine, place or c_void_p())

    def equal(self, a: c_void_p, b: c_void_p) -> bool:
        """Whether two descriptions say the same."""
        return bool(self._quick.dnnl_memory_desc_equal(a, b))

    def chosen(self, primitive: c_void_p, query: int) -> c_void_p:
        """The description that a primitive wants of one of its arrays."""
        return c_void_p(self._quick.dnnl_primitive_desc_query_md(primitive, c_int(query), c_int(0)))

    def scratchpad(self, primitive: c_void_p) -> c_void_p:
        """The array of temporary numbers that a primitive wants; `put_scratchpad` says where it lies."""
        wanted = self.chosen(primitive, _QUERY_SCRATCHPAD)
        size = self._quick.dnnl_memory_desc_get_size(wanted)
        if size > len(self._scratchpad):  # one for all, as they run one after the other
            self._scratchpad = mmap.mmap(-1, size)
        self._scratchpad_place = ctypes.addressof(ctypes.c_char.from_buffer(self._scratchpad))
        return self.memory(wanted)

    def put_scratchpad(self, memory: c_void_p) -> None:
        """Says where the temporary numbers lie from now on."""
        self.put(memory, self._scratchpad_place)

    def put(self, memory: c_void_p, place: int) -> None:
        """Says where an array lies."""
        _check(self._quick.dnnl_memory_set_data_handle(memory, place), "dnnl_memory_set_data_handle")

    def execute(self, primitive: c_void_p, arguments: ctypes.Array) -> None:
        """Runs a primitive to its end; the stream of a processor knows no other way."""
        status = self._long.dnnl_primitive_execute(primitive, self.stream, len(arguments), arguments)
        _check(status, "dnnl_primitive_execute")


class _Convolution:
    """One convolution, for one role, of one shape; the arguments are those of `attribute`."""

    def __init__(self, role, x, w, y, strides, low, high, groups):
        library = self._library = _Library.loaded
        (n, height, width, channels), (kh, kw, inner, features), (_, rows, columns, _) = x, w, y
        self.x = library.description((n, channels, height, width), _channels_last(height, width, channels))
        self.y = library.description((n, features, rows, columns), _channels_last(rows, columns, features))
        sizes = (features, inner, kh, kw)
        steps = (1, features, kw * inner * features, inner * features)  # of HWIO
        if groups > 1:
            sizes, steps = (groups, features // groups, *sizes[1:]), (features // groups, *steps)
        self.w, any_w = library.description(sizes, steps), library.description(sizes)
        geometry = (_sizes(strides), _sizes((0, 0)), _sizes(low), _sizes(high))
        self._role = role
        kernel = self._describe(any_w, geometry)
        own = library.chosen(self._described, _QUERY_DIFF_WEIGHTS if role == KERNEL_GRADIENT else _QUERY_WEIGHTS)
        self._convolution = library.make("primitive", self._described)
        self._scratchpads = [library.scratchpad(self._described)]
        x_memory, w_memory, y_memory = map(library.memory, (self.x, self.w, self.y))
        self._reorder, inside = None, w_memory
        if not library.equal(own, self.w):
            inside = library.memory(own, _ALLOCATE)
            here, there = (own, self.w) if role == KERNEL_GRADIENT else (self.w, own)
            described = library.make(
                "", here, library.engine, there, library.engine, library.attributes,
                name="dnnl_reorder_primitive_desc_create",
            )  # fmt: skip
            self._reorder = library.make("primitive", described)
            source, target = (inside, w_memory) if role == KERNEL_GRADIENT else (w_memory, inside)
            self._scratchpads.append(library.scratchpad(described))
            self._moved = _arguments((_SRC, source), (_DST, target), (_SCRATCHPAD, self._scratchpads[-1]))
        x_name = _DIFF_SRC if role == INPUT_GRADIENT else _SRC
        y_name = _DST if role == OUTPUT else _DIFF_DST
        self._arguments = _arguments(
            (x_name, x_memory), (kernel, inside), (y_name, y_memory), (_SCRATCHPAD, self._scratchpads[0])
        )
        self._operands = {
            OUTPUT: (x_memory, w_memory, y_memory),
            INPUT_GRADIENT: (y_memory, w_memory, x_memory),
            KERNEL_GRADIENT: (x_memory, y_memory, w_memory),
        }[role]

    def _describe(self, w, geometry) -> int:
        """Describes the primitive, with any layout of the kernel; returns the name of this argument."""
        make, engine, attributes = self._library.make, self._library.engine, self._library.attributes
        # The direct algorithm: Winograd's is faster here and there, and less exact.
        forward = make(
            "convolution_forward_primitive_desc", engine, c_int(_FORWARD_TRAINING), c_int(_DIRECT),
            self.x, w, None, self.y, *geometry, attributes,
        )  # fmt: skip
        self._described = forward
        if self._role == INPUT_GRADIENT:
            self._described = make(
                "convolution_backward_data_primitive_desc", engine, c_int(_DIRECT),
                self.x, w, self.y, *geometry, forward, attributes,
            )  # fmt: skip
        if self._role == KERNEL_GRADIENT:
            self._described = make(
                "convolution_backward_weights_primitive_desc", engine, c_int(_DIRECT),
                self.x, w, None, self.y, *geometry, forward, attributes,
            )  # fmt: skip
            return _DIFF_WEIGHTS
        return _WEIGHTS

    def __call__(self, *places: int) -> None:
        for memory, place in zip(self._operands, places, strict=True):
            self._library.put(memory, place)
        for memory in self._scratchpads:
            self._library.put_scratchpad(memory)
        if self._reorder and self._role != KERNEL_GRADIENT:
            self._library.execute(self._reorder, self._moved)
        self._library.execute(self._convolution, self._arguments)
        if self._reorder and self._role == KERNEL_GRADIENT:
            self._library.execute(self._reorder, self._moved)


def attribute(role: int, x, w, y, strides, pads, groups: int) -> str:
    """The attribute `convolution` of a call.

    Args:
      role: OUTPUT, of the operands x and w; INPUT_GRADIENT, of y and w; KERNEL_GRADIENT, of x and y.
      x: the shape of the images, `(n, H, W, C)`.
      w: that of the kernel, `(h, w, C / groups, D)`.
      y: that of the output, `(n, H', W', D)`.
      strides: along both axes.
      pads: zeros before and after the images, along both axes.
      groups: of the channels.
    """
    low, high = zip(*pads, strict=True)
    return json.dumps([role, x, w, y, strides, low, high, groups], separators=(",", ":"))


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: status {status} of oneDNN")


def _sizes(values) -> ctypes.Array:
    return (c_int64 * 12)(*values)


def _channels_last(height: int, width: int, channels: int) -> tuple[int, ...]:
    return (height * width * channels, 1, width * channels, channels)


def _arguments(*pairs: tuple[int, c_void_p]) -> ctypes.Array:
    return (_Argument * len(pairs))(*[_Argument(name, memory.value) for name, memory in pairs])


# ---- XLA's foreign-function interface: the beginnings of its structures, as far as they are read here.


class _Buffer(Structure):
    _fields_ = [("size", c_size_t), ("extension", c_void_p), ("dtype", c_int32), ("data", c_void_p)]


class _Buffers(Structure):
    _fields_ = [
        ("size", c_size_t), ("extension", c_void_p), ("count", c_int64), ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    ]  # fmt: skip


class _Bytes(Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t)]


class _Attributes(Structure):
    _fields_ = [
        ("size", c_size_t), ("extension", c_void_p), ("count", c_int64), ("types", c_void_p), ("names", c_void_p),
        ("values", POINTER(POINTER(_Bytes))),
    ]  # fmt: skip


class _ApiVersion(Structure):
    _fields_ = [("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int)]


class _Metadata(Structure):
    _fields_ = [("size", c_size_t), ("version", _ApiVersion), ("traits", c_uint32)]


class _MetadataExtension(Structure):
    _fields_ = [("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata))]


class _Error(Structure):
    _fields_ = [("size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int)]


class _Api(Structure):
    _fields_ = [
        ("size", c_size_t), ("extension", c_void_p), ("version", _ApiVersion), ("internal", c_void_p),
        ("make_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))),
    ]  # fmt: skip


class _Frame(Structure):
    _fields_ = [
        ("size", c_size_t), ("extension", POINTER(_MetadataExtension)), ("api", POINTER(_Api)), ("context", c_void_p),
        ("stage", c_int), ("operands", _Buffers), ("results", _Buffers), ("attributes", _Attributes),
    ]  # fmt: skip


# OpenMP keeps a thread for each core, for every thread that calls it, and XLA calls from as many as there are cores.
# Where these would be too many, one thread calls, which takes 0.03 ms longer.
MANY = 8
_caller = ThreadPoolExecutor(1, "oneDNN") if (os.cpu_count() or 1) > MANY else None
_convolutions: dict[bytes, _Convolution] = {}
_lock = threading.Lock()  # one at a time: each takes all cores, and has one set of arguments


@ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
def _HANDLER(frame):
    frame = frame.contents
    if frame.extension:  # XLA asks what this is, before the first call
        about = frame.extension.contents.metadata.contents
        about.version.major, about.version.minor, about.traits = 0, 1, 0
        return None
    try:
        given = frame.attributes.values[0].contents
        key = ctypes.string_at(given.data, given.length)
        places = [frame.operands.buffers[i].contents.data for i in range(2)]
        with _lock:
            if key not in _convolutions:
                _convolutions[key] = _Convolution(*json.loads(key))
            places.append(frame.results.buffers[0].contents.data)
            if _caller:
                _caller.submit(_convolutions[key], *places).result()
            else:
                _convolutions[key](*places)
        return None
    except Exception as error:
        message = f"oneDNN: {first_line(error)}".encode()
        return frame.api.contents.make_error(byref(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL)))
