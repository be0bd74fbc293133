"""Checkpoints: what is kept, and what becomes of damaged ones."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import default
from ieg_jax.errors import StorageError
from ieg_jax.runtime.checkpoints import Checkpoints, checksums


def tree(step):
    rng = np.random.default_rng(step)
    return {
        "weights": jnp.asarray(rng.standard_normal((64, 33)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
        "count": jnp.asarray(step, jnp.int32),
        "flags": jnp.asarray(rng.integers(-1, 2, (5, 9)), jnp.int8),
    }


def opened(folder, **keys):
    config = default.get_config().checkpoint
    config.update({"keep": 3, **keys})
    return Checkpoints(folder / "checkpoints", config)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    checkpoints = opened(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), 10 * step)
    checkpoints.close()
    return folder


def restore(folder):
    """Step, tree, position and warnings."""
    checkpoints, warnings = opened(folder), []
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree(0))
    try:
        return *checkpoints.restore_newest(like, warnings.append), warnings
    finally:
        checkpoints.close()


def assert_is(found, step):
    for name, leaf in tree(step).items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


def files(folder, step):
    return sorted(path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file())


def truncate(folder):
    largest = max(files(folder, 3), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def half_written(folder):
    """As a kill in the middle leaves it: under the name that Orbax gives to what is not complete."""
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "tree").mkdir(parents=True)
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "tree" / "data").write_bytes(b"half")


DAMAGE = {
    "a truncated file": truncate,
    "a removed file": lambda folder: max(files(folder, 3), key=lambda path: path.stat().st_size).unlink(),
    "an empty folder": lambda folder: [path.unlink() for path in files(folder, 3)],
    "a flipped bit": lambda folder: flip(max(files(folder, 3), key=lambda path: path.stat().st_size), 2000, 3),
    "no data file": lambda folder: shutil.rmtree(folder / "checkpoints" / "3" / "data"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_set_aside_and_the_one_before_is_used(three, tmp_path, damage):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path)
    step, found, position, warnings = restore(tmp_path)
    assert (step, position) == (2, 20)
    assert_is(found, 2)
    assert len(warnings) == 1 and warnings[0].startswith("the checkpoint at step 3 is damaged and is not used")
    assert (tmp_path / "damaged_checkpoints" / "3").is_dir(), "nothing is deleted"
    assert restore(tmp_path)[3] == [], "and it is not met again"
    checkpoints = opened(tmp_path)
    checkpoints.save(3, tree(3), 30)
    checkpoints.close()
    assert restore(tmp_path)[0] == 3, "its place is free"


def test_every_flipped_bit_is_harmless_or_noticed(three, tmp_path):
    rng = np.random.default_rng(0)
    chosen = [path.relative_to(three) for path in files(three, 3)]
    outcomes = {2: 0, 3: 0}
    for number in range(24):
        folder = tmp_path / str(number)
        shutil.copytree(three, folder)
        path = folder / chosen[number % len(chosen)]
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        step, found, position, _ = restore(folder)
        assert_is(found, step)
        assert position == 10 * step
        outcomes[step] += 1
    assert outcomes[2] > 0, "some were noticed"


def test_what_a_kill_left_half_written_is_not_met(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    half_written(tmp_path)
    step, found, _, warnings = restore(tmp_path)
    assert (step, warnings) == (3, [])
    assert_is(found, 3)


def test_all_damaged_is_an_error_and_nothing_is_lost(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "tree")
    with pytest.raises(StorageError, match=r"all 3 checkpoints of .* are damaged \(step 3: .*restore one from a copy"):
        restore(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_nothing_saved_yet(tmp_path):
    checkpoints = opened(tmp_path)
    assert checkpoints.restore_newest(tree(0), pytest.fail) is None
    checkpoints.close()


def test_the_best_the_last_and_every_fifth_are_kept(tmp_path):
    keys = {"keep": 2, "keep_every_steps": 5, "keep_best": 2, "best_metric": "trusted/accuracy"}
    checkpoints = opened(tmp_path, **keys)
    accuracy = {1: 0.9, 2: 0.2, 3: 0.95, 4: None, 5: 0.1, 6: 0.9, 7: 0.3, 8: 0.4, 9: None}
    for step, value in accuracy.items():
        checkpoints.note_metrics([{"step": step} if value is None else {"step": step, "trusted/accuracy": value}])
        checkpoints.save(step, {"x": jnp.zeros(3)}, step)
    checkpoints.close()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [3, 5, 6, 8, 9], "8, 9: the last two; 5: every fifth; 3, 6: the best (of equal ones the later)"


def test_the_reported_one_is_kept_and_a_low_rate_breaks_ties(tmp_path):
    config = default.get_config().checkpoint
    config.update({"keep": 1, "keep_best": 1, "best_metric": "trusted/accuracy"})
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, reported=2)
    for step, rate in enumerate((0.1, 0.3, 0.0, 0.2, 0.1), start=1):
        checkpoints.note_metrics([{"step": step, "trusted/accuracy": 1.0, "evaluation/learning_rate": rate}])
        checkpoints.save(step, {"x": jnp.zeros(3)}, step)
    checkpoints.close()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == ["2", "3", "5"], "2: reported; 3: the best with the lowest rate; 5: the last"


def test_the_least_can_be_the_best(tmp_path):
    checkpoints = opened(tmp_path, keep=1, keep_best=1, best_metric="loss/total", best_mode="min")
    for step, value in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        checkpoints.note_metrics([{"step": step, "loss/total": value}])
        checkpoints.save(step, {"x": jnp.zeros(3)}, step)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def test_storage_that_is_gone_is_said_in_one_line(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path)
    checkpoints.save(1, tree(1), 10)
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        StorageError, match=r"No space left on device.*the last good checkpoint is .*checkpoints/1\. Make"
    ):
        checkpoints.save(2, tree(2), 20)


def by_hand(words):
    return sum((2 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32


def test_checksums_by_hand():
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5
    tree = {"a": leaf, "b": np.array([-1, 5], np.int8), "c": np.array([True, False, True]), "d": np.int32(-3)}
    found = jax.jit(checksums)(tree)
    assert int(found["a"]) == by_hand(leaf.view(np.uint32).ravel())
    assert int(found["b"]) == by_hand([255, 5])
    assert int(found["c"]) == by_hand([1, 0, 1])
    assert int(found["d"]) == 2**32 - 3
    with x64():
        wide = np.array([1.5, -2.25])
        assert int(jax.jit(checksums)({"w": wide})["w"]) == by_hand(wide.view(np.uint32))


def test_checksums_do_not_depend_on_the_devices():
    leaf = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sums = set()
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "fsdp"), PartitionSpec("fsdp", "data")):
        laid = jax.device_put(leaf, NamedSharding(mesh, spec))
        sums.add(int(jax.jit(checksums)({"x": laid})["x"]))
    assert sums == {by_hand(leaf.view(np.uint32).ravel())}


def failing(monkeypatch, error, times):
    """The first so many reads of a checkpoint fail; returns the list of waits."""
    usual, left, waits = Checkpoints._restore, [times], []

    def restore(self, step, like):
        if left[0]:
            left[0] -= 1
            raise error
        return usual(self, step, like)

    monkeypatch.setattr(Checkpoints, "_restore", restore)
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    ValueError('UNAVAILABLE: Error reading "ocdbt.manifest" in OCDBT database'),
    ValueError("Error reading local file: Input/output error"),
]


@pytest.mark.parametrize("error", PASSING)
def test_a_read_that_fails_once_sets_nothing_aside(three, tmp_path, monkeypatch, error):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    waits = failing(monkeypatch, error, times=2)
    step, found, _, warnings = restore(tmp_path)
    assert (step, warnings) == (3, []) and len(waits) == 2
    assert_is(found, 3)


@pytest.mark.parametrize("error", PASSING)
def test_a_storage_that_cannot_be_read_is_no_damage(three, tmp_path, monkeypatch, error):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    failing(monkeypatch, error, times=100)
    with pytest.raises(StorageError, match=r"checkpoints/3 cannot be read now: .*nothing was moved"):
        restore(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_an_odd_error_that_does_not_come_again_is_no_damage(three, tmp_path, monkeypatch):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    failing(monkeypatch, RuntimeError("odd"), times=1)
    assert restore(tmp_path)[0] == 3
