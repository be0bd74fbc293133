"""Stops a run in every way there is, starts it again each time, and compares it with one that nothing happened to.

    python tests/kill_matrix.py --kills=30 --bucket_kills=10 --seed=0

on a disk, on a full disk, as two processes, on other devices, and on a bucket (tests/bucket.py), whose answers are slow
and fail now and then. The variables of the last checkpoint and metrics.jsonl must be equal bit for bit, with no step
logged twice or missing. `test_kill_matrix.py` runs a short form.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import bucket as buckets
import numpy as np
from compilation import FAST_COMPILATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import runs  # imports jax

from ieg_jax.cli import STOPPED_AND_SAVED

STEPS = 4000
KEYS = runs.SMALL | {
    "noise.kind": "uniform",
    "noise.rate": 0.8,
    "num_train_steps": STEPS,
    "log_every_steps": 7,  # so that most checkpoints fall inside a window of metrics
    "eval_every_steps": 250,
    "checkpoint_every_steps": 20,
}
CONFIG = "configs/quickstart.py"
WAIT = 240  # seconds for anything to happen
TWO = [runs.ROOT / "launch" / "local.sh", "--processes=2", "--devices=1", "--grace-seconds=5"]


class Failed(AssertionError):
    """The run did not do what it should; the message has the end of what it printed."""


class Run:
    """A work folder and the command that trains in it."""

    def __init__(self, folder, keys=None, launcher=(), work=None, environment=None):
        """`keys` are added to KEYS; `launcher` stands before the command, as launch/local.sh does."""
        self.folder, self.work, self._launcher = folder, work or folder / "run", launcher
        self._keys, self._environment = KEYS | (keys or {}), environment or {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self):
        arguments = runs.main_arguments(CONFIG, self.work, self._keys)
        if not self._launcher:
            return runs.start(arguments, log=self.folder, environment=self._environment)[0]
        with open(self.folder / "0.txt", "a") as log:
            command = [*map(str, self._launcher), "--", *arguments[2:]]
            environment = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": FAST_COMPILATION}
            environment |= self._environment
            return subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)

    def finish(self):
        process = self.start()
        if process.wait(WAIT * 5):
            raise Failed(self.log())
        return self

    def log(self):
        return "".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.txt")))

    def saved(self):
        """Steps of the complete checkpoints."""
        return runs.checkpoint_steps(self.work) if (self.work / "checkpoints").exists() else []

    def start_until_it_saves(self):
        """Starts the run, and returns its process when it has saved a checkpoint newer than any before."""
        before, process = self.saved()[-1:], self.start()
        wait_for(lambda: self.saved()[-1:] > before, self, process)
        return process

    def half_written(self):
        """Names of the checkpoints that are not complete."""
        return [path.name for path in (self.work / "checkpoints").glob("*orbax-checkpoint-tmp*")]

    def local(self):
        """The work folder, or a copy of it, on this disk."""
        return self.work


class BucketRun(Run):
    """A work folder on a bucket, that answers late, and fails now and then, from each start on."""

    def __init__(self, folder, bucket, environment, rng, keys=None, launcher=()):
        super().__init__(folder, keys, launcher, f"gs://bucket/{folder.name}", environment)
        self._bucket, self._rng, self._prefix = bucket, rng, f"bucket/{folder.name}/"

    def start(self):
        self._bucket.latency = self._rng.choice([0.0, 0.05])
        self._bucket.failures = [("upload/", 503, 2), ("GET /storage", 503, 1), ("checkpoints/", 429, 2)]
        return super().start()

    def objects(self):
        """Names within the work folder, without those of folders, which are empty objects."""
        names = [name for name in list(self._bucket.objects) if name.startswith(self._prefix) and name[-1] != "/"]
        return [name.removeprefix(self._prefix) for name in names]

    def saved(self):
        return sorted(int(name.split("/")[1]) for name in self.objects() if name.endswith("/commit_success.txt"))

    def half_written(self):
        begun = {name.split("/")[1] for name in self.objects() if name.startswith("checkpoints/")}
        return sorted((begun & set(filter(str.isdigit, begun))) - set(map(str, self.saved())))

    def local(self):
        for name in self.objects():
            (self.folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "copy" / name).write_bytes(self._bucket.objects[self._prefix + name])
        return self.folder / "copy"


def wait_for(condition, run, process):
    """Waits until the condition holds while the process lives."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"the run ended with {process.poll()} or hangs:\n{run.log()}")
        time.sleep(0.001)


# ---- Each takes a run and a generator of random numbers, starts the run, stops it, and says what it did.


def kill_at_random(run, rng):
    """SIGKILL, up to a second after the first checkpoint of this start."""
    process = run.start_until_it_saves()
    time.sleep(rng.random())
    process.kill()
    process.wait()
    return f"SIGKILL; checkpoints {run.saved()}, half written {len(run.half_written())}"


def kill_in_a_checkpoint(run, rng):
    """SIGKILL while a checkpoint is half written."""
    del rng
    for _ in range(5):
        process = run.start_until_it_saves()
        wait_for(run.half_written, run, process)
        process.kill()
        process.wait()
        if run.half_written():
            return f"SIGKILL with {run.half_written()[0]} half written"
    raise Failed("five times the checkpoint was complete before the kill")


def terminate(run, rng):
    """SIGTERM: it saves and exits with 75."""
    process = run.start_until_it_saves()
    time.sleep(rng.random())
    process.send_signal(signal.SIGTERM)
    if process.wait(WAIT) != STOPPED_AND_SAVED or "goes on from there" not in run.log():
        raise Failed(run.log())
    return f"SIGTERM; checkpoints {run.saved()}"


def _newest_files(run):
    newest = run.work / "checkpoints" / str(run.saved()[-1])
    return newest.name, sorted((path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def truncate(run, rng):
    """One of the three largest files of the newest checkpoint is cut in half."""
    step, files = _newest_files(run)
    victim = rng.choice(files[-3:])
    os.truncate(victim, victim.stat().st_size // 2)
    return f"checkpoint {step}: {victim.name} cut to a half"


def remove(run, rng):
    """One of the three largest files of the newest checkpoint is removed."""
    step, files = _newest_files(run)
    victim = rng.choice(files[-3:])
    victim.unlink()
    return f"checkpoint {step}: {victim.name} removed"


def flip(run, rng):
    """A byte of each of the three largest files of the arrays of the newest checkpoint is changed.

    Of more than one, since some hold what is not used any more.
    """
    step, files = _newest_files(run)
    victims = [path for path in files if path.parent.name == "d"][-3:]
    for victim in victims:
        content = bytearray(victim.read_bytes())
        content[rng.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 0xFF
        victim.write_bytes(content)
    return f"checkpoint {step}: a byte in each of {len(victims)} files flipped"


def kill_one_of_two(run, rng):
    """SIGKILL to process 1; launch/local.sh ends process 0 too."""
    process = run.start_until_it_saves()
    time.sleep(rng.random())
    found = subprocess.run(["pgrep", "-f", f"{run.work} .*--process_id=1"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    if process.wait(WAIT) == 0:
        raise Failed(run.log())
    return f"SIGKILL to one of two; checkpoints {run.saved()}"


def fill_the_disk(run, rng):
    """The file system of the work folder is filled while the run writes; then there is room again."""
    del rng
    process = run.start_until_it_saves()
    filler = run.work / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    code = process.wait(WAIT)
    filler.unlink(missing_ok=True)
    last = run.log().strip().splitlines()[-1]
    if code != 1 or not last.startswith("error: ") or "No space left" not in last:
        raise Failed(f"exit {code}: {run.log()}")
    return f"disk full: {last[:150]}"


def compare(run, undisturbed):
    """Raises AssertionError unless both runs left the same behind."""
    work = run.local()
    runs.assert_same_run(work, undisturbed.work, runs.checkpoint_steps(undisturbed.work)[-1])
    steps = [row["step"] for row in runs.rows(work)]
    assert steps == sorted(set(steps)), "no step twice"


def disturb(run, disturbances, undisturbed, rng, say=print):
    """Disturbs the run in the given order, lets it finish, and compares."""
    for number, disturbance in enumerate(disturbances, start=1):
        say(f"{number:3d} {disturbance(run, rng)}")
    run.finish()
    compare(run, undisturbed)
    say(f"    equal to the undisturbed run after {len(disturbances)} disturbances")


def on_small_disk(folder, megabytes=64):
    """Mounts a file system of its own on the folder; False where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def on_other_devices(folder, say=print):
    """8, then 1, then 4 devices, against 1 device throughout; float64, since sums are taken in another order."""
    environment = {"JAX_ENABLE_X64": "1"}
    keys = KEYS | {"num_train_steps": 60, "model.dtype": "float64", "eval_every_steps": 20, "batch_groups": 8}
    keys |= {"eval_batch_size": 200}
    for name, devices in (("moved", (8, 1, 4)), ("one", (1,))):
        (folder / name).mkdir(parents=True)
        for stop, count in zip((20, 40, 60)[-len(devices) :], devices, strict=True):
            arguments = runs.main_arguments(CONFIG, folder / name / "run", keys)
            arguments[0:2] = [runs.ROOT / "tests" / "stop_at.py", str(stop)]
            (process,) = runs.start(arguments, devices=count, environment=environment, log=folder / name)
            if process.wait(WAIT) != (0 if stop == 60 else STOPPED_AND_SAVED):
                raise Failed((folder / name / "0.txt").read_text()[-3000:])
    one, moved = (runs.variables(folder / name / "run", 60) for name in ("one", "moved"))
    for path in one:
        np.testing.assert_allclose(moved[path], one[path], rtol=1e-9, atol=1e-9, err_msg=path)
    say("    8, 1, 4 devices: equal to one device throughout (1e-9, float64)")


def on_bucket(folder, kills, rng, say=print):
    """Killed on a bucket, alone and as one of two processes; compared with undisturbed runs on this disk."""
    with buckets.Bucket() as bucket, buckets.environment(bucket) as variables:
        keys = {"num_train_steps": 400, "checkpoint_every_steps": 10}
        alone = Run(folder / "alone", keys).finish()
        ways = [kill_in_a_checkpoint if number % 3 == 2 else kill_at_random for number in range(kills)]
        disturb(BucketRun(folder / "killed", bucket, variables, rng, keys), ways, alone, rng, say)
        two = Run(folder / "two", keys, TWO).finish()
        ways = [kill_one_of_two] * max(1, kills // 5)
        disturb(BucketRun(folder / "one-of-two", bucket, variables, rng, keys, TWO), ways, two, rng, say)
        say(f"    on a bucket: {bucket.requests['failed']} answers failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs in all, every third in a checkpoint")
    parser.add_argument("--bucket_kills", type=int, default=10, help="SIGKILLs on a bucket")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill_matrix_") as temporary:
        folder = pathlib.Path(temporary)
        undisturbed = Run(folder / "undisturbed").finish()
        print(f"undisturbed: {STEPS} steps, {len(runs.rows(undisturbed.work))} rows")
        kills = [kill_in_a_checkpoint if number % 3 == 2 else kill_at_random for number in range(arguments.kills)]
        disturb(Run(folder / "killed"), kills, undisturbed, rng)
        others = [terminate, truncate, terminate, remove, kill_at_random, flip, terminate]
        disturb(Run(folder / "damaged"), others, undisturbed, rng)
        if on_small_disk(folder / "full"):
            try:
                full = Run(folder / "disk full", work=folder / "full" / "run")
                disturb(full, [fill_the_disk, fill_the_disk], undisturbed, rng)
            finally:
                subprocess.run(["umount", "-l", str(folder / "full")], check=True)
        else:
            print("    disk full: not tried, this user may not mount a file system")
        two = {"num_train_steps": 400, "checkpoint_every_steps": 10}
        alone = Run(folder / "two undisturbed", two, TWO).finish()
        hurt = [kill_one_of_two, kill_one_of_two, flip, kill_one_of_two, truncate]
        disturb(Run(folder / "one of two killed", two, TWO), hurt, alone, rng)
        on_other_devices(folder / "devices")
        on_bucket(folder / "bucket", arguments.bucket_kills, rng)


if __name__ == "__main__":
    main()
