import copyreg
import io
import os
import pathlib
import pickle
import pickletools
import random
import struct
import warnings
import zipfile

import archives
import numpy as np
import pytest

from ieg_jax import unpickle
from ieg_jax.errors import UserError

ARRAYS = {
    "int64": np.arange(-3, 9),
    "two dimensions": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "columns first": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big-endian": np.arange(5, dtype=">u4"),
    "float16": np.linspace(0, 1, 5, dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "bool": np.array([[True], [False]]),
    "no dimensions": np.array(7),
}


def assert_equal(got, want):
    assert type(got) is type(want)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype and got.shape == want.shape


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(protocol, name):
    pickled = pickle.dumps({"array": ARRAYS[name]}, protocol)
    assert_equal(unpickle.loads(pickled, "file")["array"], ARRAYS[name])


def test_empty_arrays():
    empty = np.zeros((0, 3), np.float32)
    assert_equal(unpickle.loads(pickle.dumps(empty, 3), "file"), empty)
    with pytest.raises(UserError, match="builtin.*bytes"):  # how protocols before bytes write none of them
        unpickle.loads(pickle.dumps(empty, 2), "file")


@pytest.mark.parametrize("protocol", range(4))
def test_names_of_numpy_1(protocol):
    pickled = archives.old_numpy(pickle.dumps([ARRAYS["int64"], np.float32(0.5)], protocol))
    assert b"numpy.core.multiarray" in pickled
    array, scalar = unpickle.loads(pickled, "file")
    assert_equal(array, ARRAYS["int64"])
    assert_equal(scalar, np.float32(0.5))


def test_plain_values_come_back():
    value = {"a": [1, -(2**70), 2.5, None, True], b"b": ("x", b"y" * 300, {1, 2}, frozenset([3])), 4: {}}
    got = unpickle.loads(pickle.dumps(value), "file")
    assert got == value
    assert got["a"][4] is True


def test_what_occurs_twice_stays_one():
    array = np.arange(3)
    got = unpickle.loads(pickle.dumps([array, (array, [array])]), "file")
    assert got[0] is got[1][0] is got[1][1][0]
    lists = [[0]]
    for _ in range(60):  # 2^60 if each were made as often as it occurs
        lists = [lists, lists]
    assert len(unpickle.loads(pickle.dumps(lists), "file")) == 2


def test_python_2_is_read_as_pickle_reads_it():
    value = {b"data": np.arange(300, dtype=np.uint8).reshape(2, 150), b"labels": [7, -1, 300], b"name": b"x" * 300}
    pickled = archives.python2_pickle(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy minds align=0
        other = pickle.loads(pickled, encoding="bytes")
    got = unpickle.loads(pickled, "file")
    for found in (got, other):
        assert_equal(found.pop(b"data"), value[b"data"])
        assert found == {b"labels": [7, -1, 300], b"name": b"x" * 300}
    as_text = unpickle.loads(pickled, "file", encoding="latin1")
    assert_equal(as_text["data"], value[b"data"])
    assert as_text["name"] == "x" * 300


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def with_state(array, state):
    """A pickle of an array whose state is another."""

    class Other:
        def __reduce__(self):
            return (*array.__reduce__()[:2], state)

    return Other()


def dtype_with_state(code, state):
    """A pickle of an array whose dtype has this state."""

    class Other:
        def __reduce__(self):
            return np.dtype, (code, False, True), state

    return with_state(np.zeros(1), (1, (1,), Other(), False, b"\0" * 8))


def evil(marker):
    """name -> (what, name that the message must have); each creates the file `marker` when it is run."""
    command = Calls(os.system, f"touch {marker}")
    code = Calls(eval, f"open({str(marker)!r}, 'w')")
    int64 = np.dtype(np.int64)
    return {
        "os.system": (command, f"names {os.system.__module__}.system"),
        "eval": (code, "names builtins.eval|names __builtin__.eval"),
        "exec": (Calls(exec, f"open({str(marker)!r}, 'w')"), "exec"),
        "getattr": (Calls(getattr, "a", "upper"), "getattr"),
        "import": (Calls(__import__, "antigravity"), "__import__"),
        "deep in containers": ({"a": [({1: command},)]}, "system"),
        "object array": (np.array([command, 1], object), "system"),
        "object array of plain things": (np.array(["a", 1], object), "dtype 'O8'"),
        "objects in fields": (np.zeros(2, [("a", object), ("b", int)]), "dtype 'V16'"),
        "text array": (np.array(["a"]), "dtype 'U1'"),
        "times": (np.array(["2020-01-01"], "M8[D]"), "dtype 'M8'"),
        "state of an array": (with_state(np.zeros(1), (1, (1,), int64, False, code)), "eval"),
        "list as data": (with_state(np.zeros(1), (1, (1,), int64, False, [command])), "system"),
        "dtype that hides objects": (
            # Says that it holds no objects (the last number): numpy would follow the eight bytes as a pointer.
            dtype_with_state("V8", (3, "|", None, ("f",), {"f": (np.dtype(object), 0)}, 8, 1, 0)),
            "dtype 'V8'",
        ),
        "a number with fields": (
            dtype_with_state("i8", (3, "<", None, ("f",), {"f": (np.dtype(np.int64), 0)}, 8, 1, 0)),
            "dtype 'i8'",
        ),
        "metadata of a dtype": (dtype_with_state("i8", (4, "<", None, None, None, -1, -1, 0, {"f": code})), "eval"),
        "plain metadata of a dtype": (
            dtype_with_state("i8", (4, "<", None, None, None, -1, -1, 0, {1: 2})),
            "dtype 'i8'",
        ),
        "another maker": (Calls(np.frombuffer, b"12345678"), "names numpy.*frombuffer"),
        "another codec": (Calls(__import__("_codecs").encode, "x", "rot13"), "codecs.encode with 'rot13'"),
        "a class": ([np.ndarray], "holds a type"),
        "a function of numpy": ([np.load], "names numpy.*load"),
        "a set by a call": (Calls(set, [1]), "names .*set"),
        "slice": (slice(3), "names .*slice"),
        "bytearray": (bytearray(b"x"), "bytearray"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", evil(""))
def test_what_is_no_array_is_refused_and_not_run(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    what, message = evil(marker)[name]
    pickled = pickle.dumps(what, protocol)
    message = message.replace("'", "b?'") if protocol < 2 else message
    with pytest.raises(UserError, match=f"^some file: .*({message}|names .*_frombuffer).*Nothing of it was run"):
        unpickle.loads(pickled, "some file")
    assert not marker.exists()


def test_the_evil_ones_do_run_where_nothing_stops_them(tmp_path):
    marker = tmp_path / "marker"
    for name in ("os.system", "eval", "deep in containers", "object array"):
        pickle.loads(pickle.dumps(evil(marker)[name][0]))
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02cnumpy\ndtype\n}(U\x04makeK\x01ub.",  # attributes of what stands for numpy.dtype
        b"\x80\x02cnumpy\ndtype\nN}(U\x04makeK\x01u\x86b.",  # the same through slots
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x04makeK\x01s\x86b.",
        b"\x80\x02c_codecs\nencode\nN}U\x07__new__cnumpy\ndtype\ns\x86b.",
        b"\x80\x02c_codecs\nencode\nU\x01xU\x06latin1\x86R}U\x01aK\x01sb.",  # attributes of bytes
        b"\x80\x02cnumpy\ndtype\n)\x81.",  # made without a call
        b"\x80\x02cnumpy\ndtype\n)R.",  # called without arguments
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy\nndarray\n)R(K\x01NNNNtb.",
        b"(S'true'\nios\nsystem\n.",  # the opcode INST
        b"(cos\nsystem\nS'true'\no.",  # the opcode OBJ
        b"\x80\x04\x8c\x05numpy\x8c\x12core.multiarray.sys\x93.",  # a path of attributes
        b"\x80\x02K\x01Q.",  # a reference to what lies outside
        b"P1\n.",
        b"\x80\x02\x82\xf0.",  # the opcode EXT1 with an unknown code
        b"\x80\x02](h\x00e.",  # a memo that is not there
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x05\x97.",
        b"",
        b"text",
        b"\x80\x63.",
    ],
)
def test_crafted_streams(stream):
    with pytest.raises(UserError, match=r"^some file: "):
        unpickle.loads(stream, "some file")
    assert_equal(unpickle.loads(pickle.dumps(ARRAYS["int64"], 2), "file"), ARRAYS["int64"])


def test_registered_extension_codes_are_refused_too(tmp_path):
    copyreg.add_extension("os", "mkdir", 240)
    try:
        with pytest.raises(UserError, match=r"names os\.mkdir"):
            unpickle.loads(b"\x80\x02\x82\xf0U" + bytes([9]) + b"/dev/null\x85R.", "file")
    finally:
        copyreg.remove_extension("os", "mkdir", 240)


def test_a_buffer_of_another_size():
    for state in ((1, (2,), np.dtype(np.int64), False, b"\0" * 8), (1, (1,), np.dtype(np.int64), False, b"\0" * 9)):
        with pytest.raises(UserError, match="damaged|leads out of its"):
            unpickle.loads(pickle.dumps(with_state(np.zeros(1), state), 2), "file")


def makes_room(stream):
    """Whether an opcode makes room for as many objects as it says, perhaps for billions: too slow for a test."""
    try:
        return any(opcode.name == "LONG_BINPUT" for opcode, _, _ in pickletools.genops(stream))
    except Exception:
        return False


def test_damaged_streams_give_data_or_a_clear_error():
    whole = pickle.dumps({"a": ARRAYS["int64"], "b": [1, "x", ARRAYS["two dimensions"], np.int64(3)]}, 2)
    for length in range(len(whole)):
        with pytest.raises(UserError):
            unpickle.loads(whole[:length], "file")
    rng = random.Random(0)
    errors = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if makes_room(bytes(damaged)):
            continue
        try:
            unpickle.loads(bytes(damaged), "file")
        except UserError:
            errors += 1
    assert 1000 < errors < 3000


PICKLED = pickle.dumps({"labels": np.arange(4)}, 2)


def write(path, *entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_torch_zip(tmp_path):
    path = tmp_path / "labels.pt"
    for name in ("archive", "CIFAR-10_human"):
        path.write_bytes(archives.torch_zip(PICKLED, name))
        content = unpickle.read_torch_zip(path)
        assert content.keys() == {"labels"}
        assert_equal(content["labels"], np.arange(4))
    assert [file.name for file in tmp_path.iterdir()] == ["labels.pt"], "nothing unpacked"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "entries, message",
    [
        ([("archive/version", "3")], "0 entries called <name>/data.pkl"),
        ([("data.pkl", PICKLED)], "0 entries"),
        ([("a/data.pkl", PICKLED), ("b/data.pkl", PICKLED)], "2 entries"),
        ([("a/data.pkl", PICKLED), ("a/data.pkl", PICKLED)], "2 entries"),
        ([("a/data.pkl", PICKLED), ("../x", "")], "'../x' that leads out of it"),
        ([("a/../../data.pkl", PICKLED)], "leads out"),
        ([("a/data.pkl", PICKLED), ("/etc/x", "")], "leads out"),
        ([("a/data.pkl", PICKLED), ("a\\..\\x", "")], "leads out"),
        ([("a/data.pkl", PICKLED), ("C:/x", "")], "leads out"),
        ([("a/data.pkl", pickle.dumps([1]))], "holds a list, expected a dict"),
        ([("a/data.pkl", PICKLED[:-9])], r"labels.pt: a/data.pkl: .*damaged"),
        ([("a/data.pkl", pickle.dumps(os.system))], r"names posix.system|names nt.system"),
        ([("a/data.pkl", b"\x80\x02U\x07storageQ.")], "a tensor"),
    ],
)
def test_bad_torch_zips(tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        unpickle.read_torch_zip(write(tmp_path / "labels.pt", *entries))
    assert [file.name for file in tmp_path.iterdir()] == ["labels.pt"]


def test_torch_zips_that_are_damaged(tmp_path, monkeypatch):
    path = tmp_path / "labels.pt"
    whole = archives.torch_zip(PICKLED)
    with pytest.raises(UserError, match=r"labels.pt: cannot be read .*FileNotFoundError"):
        unpickle.read_torch_zip(path)
    changed = bytearray(whole)
    changed[whole.index(PICKLED) + 20] ^= 1
    for content in (b"", b"text", whole[:-30], whole[len(whole) // 2 :], bytes(changed)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            unpickle.read_torch_zip(path)
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x03\x04") + 6] |= 1  # of the local header
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1  # of the table of contents
    path.write_bytes(encrypted)
    with pytest.raises(UserError, match=r"archive/data.pkl is encrypted"):
        unpickle.read_torch_zip(path)
    path.write_bytes(whole)
    monkeypatch.setattr(unpickle, "MAX_UNPACKED", 20)
    with pytest.raises(UserError, match="bytes unpacked, expected at most 20"):
        unpickle.read_torch_zip(path)


def test_a_zip_that_unpacks_to_far_more_than_it_is(tmp_path):
    path = tmp_path / "labels.pt"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", PICKLED)
    small = file.getvalue()
    at = small.index(b"PK\x01\x02") + 24  # unpacked size, in the table of contents
    path.write_bytes(small[:at] + struct.pack("<I", 2**32 - 2) + small[at + 4 :])
    with pytest.raises(UserError, match="4294967294 bytes unpacked"):
        unpickle.read_torch_zip(path)


FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# torch.save of 2.14.1, in the form of today and in that of before 2020: a turned view, halves, bfloat16, a counter.
STATE = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "half": np.array([1.5, -2], np.float16),
    "brain": np.array([1, 3.140625], np.float32),
    "bn.num_batches_tracked": np.array(7),
}


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_a_state_dict_of_torch(form):
    found = unpickle.read_tensors((FIXTURES / f"torch_state_{form}.pth").read_bytes(), "file")
    assert found.keys() == STATE.keys()
    for name, array in STATE.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_a_state_dict_that_names_anything_else_is_refused_and_not_run(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({"weight": Evil()}, 2)
    if form == "zip":
        with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
            archive.writestr("model/data.pkl", evil)
        evil = content.getvalue()
    else:
        evil = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + evil
    with pytest.raises(UserError, match="names (posix|nt).system, which could run code.*Nothing of it was run"):
        unpickle.read_tensors(evil, "file")
    assert not (tmp_path / "evil").exists()


def test_a_state_dict_that_is_cut_off():
    for form in ("zip", "stream"):
        content = (FIXTURES / f"torch_state_{form}.pth").read_bytes()
        with pytest.raises(UserError, match="damaged|leads out of its"):
            unpickle.read_tensors(content[:-40], "file")
    with pytest.raises(UserError, match="no tensors in it"):
        stream = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {"epoch": 3}, []))
        unpickle.read_tensors(stream, "file")
