"""The short form of kill_matrix.py: one run that is killed, damaged and starved of room, bit for bit as undisturbed."""

import random
import shutil
import subprocess

import kill_matrix
import pytest

STEPS = {"num_train_steps": 500}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return kill_matrix.Run(tmp_path_factory.mktemp("undisturbed"), STEPS).finish()


@pytest.mark.slow
def test_killed_and_damaged(tmp_path, undisturbed):
    disturbances = [
        kill_matrix.kill_at_random,
        kill_matrix.kill_in_a_checkpoint,
        kill_matrix.flip,
        kill_matrix.terminate,
        kill_matrix.truncate,
    ]
    kill_matrix.disturb(kill_matrix.Run(tmp_path, STEPS), disturbances, undisturbed, random.Random(1))
    assert list((tmp_path / "run" / "damaged_checkpoints").iterdir()), "the damaged ones were met"


@pytest.mark.slow
def test_a_full_disk(tmp_path, undisturbed):
    if not kill_matrix.on_small_disk(tmp_path / "disk"):
        pytest.skip("this user may not mount a file system")
    try:
        run = kill_matrix.Run(tmp_path, STEPS, work=tmp_path / "disk" / "run")
        kill_matrix.disturb(run, [kill_matrix.fill_the_disk], undisturbed, random.Random(2))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.slow
def test_one_of_two_killed(tmp_path):
    keys = {"num_train_steps": 100, "checkpoint_every_steps": 10}
    alone = kill_matrix.Run(tmp_path / "alone", keys, kill_matrix.TWO).finish()
    killed = kill_matrix.Run(tmp_path / "killed", keys, kill_matrix.TWO)
    disturbances = [kill_matrix.kill_one_of_two] * 2 + [kill_matrix.flip]
    kill_matrix.disturb(killed, disturbances, alone, random.Random(3))
    assert list((tmp_path / "killed" / "run" / "damaged_checkpoints").iterdir())


@pytest.mark.slow
def test_killed_on_a_bucket(tmp_path):
    """Alone, and as one of two processes, while answers are late and fail."""
    told = []
    kill_matrix.on_bucket(tmp_path, 3, random.Random(4), told.append)
    assert sum("SIGKILL" in line for line in told) == 4 and sum("equal to" in line for line in told) == 2
    assert int(told[-1].split()[-3]) >= 5, "answers did fail"


@pytest.mark.slow
def test_a_difference_would_be_noticed(tmp_path, undisturbed):
    """The comparison can fail: by one row, and by one bit of one variable."""
    other = kill_matrix.Run(tmp_path)
    shutil.copytree(undisturbed.work, other.work)
    kill_matrix.compare(other, undisturbed)
    lines = (other.work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other.work / "metrics.jsonl").write_text("".join(lines[:-2] + lines[-1:]))
    with pytest.raises(AssertionError):
        kill_matrix.compare(other, undisturbed)
