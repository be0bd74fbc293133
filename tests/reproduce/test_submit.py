"""Runs as jobs of a cluster: what is handed to `sbatch` and `kubectl`, which are small scripts here that write it down.

The array script is executed as Slurm would do it; a manifest is compared with the command of a local run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import bucket as buckets
import pytest
import yaml
from etils import epath
from finished_runs import write_run
from rich.console import Console
from runs import ROOT

from ieg_jax import files
from ieg_jax.errors import UserError
from ieg_jax.reproduce import jobs, results, submit
from ieg_jax.reproduce.experiments import Experiment
from ieg_jax.reproduce.submit import Cell, Cluster
from ieg_jax.runtime import claim

ONE = Experiment("one", "configs/digits.py:method=ieg,noise_rate=0.4", {"augment.strong": "crop(pad=1)|cutout(0.25)"})
TWO = Experiment("two", "configs/digits.py:method=l2r,noise_rate=0.4", {"noise.file": '/a b/$HOME\'s "x"; exit 3'})
IMAGE = "us-docker.pkg.dev/project/images/ieg_jax:1"
KUEUE = {"image": IMAGE, "queue": "research", "namespace": "team", "slice": "v5e:2x2", "service-account": "trainer"}


def write_program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder first on PATH, with an sbatch and a kubectl that write down what they are given."""
    folder = tmp_path / "programs"
    folder.mkdir()
    record = 'printf "%s\\n" "$(basename "$0")" "$@" > "$0.given"; cp "${@: -1}" "$0.file"\n'
    write_program(folder / "sbatch", record + "echo Submitted batch job 7\n")
    write_program(folder / "kubectl", record + 'sed -n "s|^  name: |jobset.jobset.x-k8s.io/|p" "$0.file"\n')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return results.Store(epath.Path(tmp_path / "work"), epath.Path(tmp_path / "kept"))


@pytest.fixture
def slurm(tmp_path):
    return Cluster("slurm", {"gpus": 2, "partition": "gpu", "time-limit": "2:00:00"}, tmp_path / "submissions")


def run(store, cluster, experiments=(ONE, TWO), seeds=2, dry_run=False):
    """Returns what is printed."""
    console = Console(width=160)
    with console.capture() as captured:
        jobs.run(experiments, store, seeds, 1, dry_run, console, cluster)
    return captured.get()


def given(programs, program):
    return (programs / f"{program}.given").read_text().splitlines()


def command(store, experiment, seed):
    return jobs.command_line(experiment, seed, store.work_folder(experiment, seed))


# ---- flags ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--partition=a"], "--partition: got --on=local; it is read with --on=slurm only"),
        (["--on=slurm", "--image=i"], "--image: got --on=slurm; it is read with --on=jobset only"),
        (["--on=jobset", "--jobs=2"], "--jobs: got --on=jobset; it is read with --on=local or --on=slurm only"),
        (["--on=slurm", "--jobs=0"], "--jobs=0: it is read with --on=local only"),
        (["--on=slurm", "--partition=a b"], "--partition=a b: expected the name of a partition"),
        (["--on=slurm", "--time-limit=12:00"], "--time-limit=12:00: expected MINUTES, HH:MM:SS or DAYS-HH:MM:SS"),
        (["--on=slurm", "--submissions=a b"], "--submissions=a b: expected a folder of this machine"),
        (["--on=jobset"], "got no --queue; expected the name of a LocalQueue of Kueue"),
        (["--on=jobset", "--queue=q"], "got no --image; expected one that was built from launch/Dockerfile"),
        (["--on=jobset", "--queue=q", "--image=i"], "got no --slice; expected CHIP:TOPOLOGY"),
        (["--on=jobset", "--queue=q", "--image=i", "--gpus=1"], "expected gs://BUCKET/FOLDER: the hosts share no disk"),
        (["--on=slurm"], "got no program 'sbatch' on PATH; run this on a login node of the cluster, or see with --dry"),
    ],
)
def test_what_cannot_be_submitted(arguments, message, tmp_path):
    """Where sbatch is not."""
    few = tmp_path / "few"
    few.mkdir()
    for program in ("bash", "env", "dirname", "sed", "wc", "tr"):
        (few / program).symlink_to(shutil.which(program))
    flags = [f"--workdir={tmp_path / 'work'}", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "ieg_jax.reproduce", "run", "digits-sweep", *flags],
        cwd=ROOT,
        env=os.environ | {"PATH": str(few)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["few"], "nothing is written"


# ---- Slurm ----


def test_array_asks_slurm_for_what_the_flags_say(store, slurm):
    text = run(store, slurm, dry_run=True)
    assert not store.workdir.exists() and not slurm.submissions.exists(), "nothing is written"
    assert text.startswith("# 4 runs, 0 finished already, 4 to do\n")
    _, script, cells = re.split(rf"^# {slurm.submissions}/\S+/(?:array.sbatch|cells.txt)\n", text, flags=re.MULTILINE)
    assert script.startswith("#!/usr/bin/env bash\n")
    lines = script.splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[:first]) and len(directives) == len(set(directives))
    assert set(directives) > {"array=0-3", "nodes=1", "ntasks-per-node=2", "gpus-per-node=2", "partition=gpu"}
    assert set(directives) > {"time=2:00:00", "requeue", "open-mode=append", "signal=B:USR1@300"}
    assert len([line for line in directives if line.startswith("output=")]) == 1
    wanted = [command(store, experiment, seed)[3:] for seed in range(2) for experiment in (ONE, TWO)]
    assert [shlex.split(line) for line in cells.splitlines()] == wanted
    at_once = run(store, Cluster("slurm", {"jobs": 3, "cpus": 4}, slurm.submissions), dry_run=True)
    assert "\n#SBATCH --array=0-3%3\n" in at_once and "\n#SBATCH --cpus-per-task=4\n" in at_once
    assert "gpus" not in at_once and "--time" not in at_once and "--partition" not in at_once


def test_a_task_of_the_array_runs_the_command_of_its_run(store, slurm, programs, tmp_path, monkeypatch):
    write_program(programs / "python", f'printf "%s\\0" "$@" > "{tmp_path}/called-$SLURM_ARRAY_TASK_ID"\n')
    write_program(programs / "srun", 'shift\nexec "$@"\n')  # --kill-on-bad-exit=1
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    text = run(store, slurm)
    assert "4 runs submitted" in text and "Submitted batch job 7" in text
    name, script = given(programs, "sbatch")
    assert name == "sbatch" and (programs / "sbatch.file").read_text() == epath.Path(script).read_text()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    cells = [(experiment, seed) for seed in range(2) for experiment in (ONE, TWO)]
    for number, (experiment, seed) in enumerate(cells):
        task = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": str(8 + number)}
        task |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}
        # Slurm runs a copy from a folder of its own.
        done = subprocess.run(
            ["bash", programs / "sbatch.file"], env=clean | task, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        called = (tmp_path / f"called-{number}").read_text().split("\0")[:-1]
        assert ["python", *called] == command(store, experiment, seed)


def test_the_second_submission_leaves_out_what_is_done_or_under_way(store, slurm, programs):
    def submitted():
        cells = epath.Path(given(programs, "sbatch")[1]).parent / "cells.txt"
        return [re.search(r"--workdir=\S*/work/(\S+)$", line)[1] for line in cells.read_text().splitlines()]

    stopped, running = write_run(store, ONE, 1, finished=False), write_run(store, TWO, 0, finished=False)
    failed = write_run(store, TWO, 1, finished=False)
    files.write_json(failed / claim.FAILED, {"error": "NonFiniteError: the loss is nan", "time": 0.0})
    write_run(store, ONE, 0)
    with claim.Claim(running) as held:
        held.take()
        assert store.state(TWO, 0) == "running, step 400"
        assert store.state(TWO, 1) == "failed at step 400 (NonFiniteError: the loss is nan)"
        text = run(store, slurm, seeds=3)
        assert "6 runs, 1 finished already, 4 to do, 1 running" in text
        assert submitted() == ["one/1", "two/1", "one/2", "two/2"]
        assert [store.state(ONE, seed) for seed in range(3)] == ["done", "queued", "queued"]
        assert store.state(TWO, 1) == "queued again after NonFiniteError: the loss is nan"
        first = given(programs, "sbatch")
        text = run(store, slurm, seeds=3)
        assert "6 runs, 1 finished already, 0 to do, 1 running, 4 queued" in text and "--resubmit" in text
        assert given(programs, "sbatch") == first, "sbatch was not called"
        with claim.Claim(stopped) as begun:
            begun.take()  # its job has started
        write_run(store, TWO, 2)
        assert "6 runs, 2 finished already, 1 to do, 1 running, 2 queued" in run(store, slurm, seeds=3)
        assert submitted() == ["one/1"]
        again = Cluster("slurm", {}, slurm.submissions, resubmit=True)
        assert "6 runs, 2 finished already, 3 to do, 1 running" in run(store, again, seeds=3)
        assert submitted() == ["one/1", "two/1", "one/2"]
    assert len(list(slurm.submissions.iterdir())) == 3, "each in a folder of its own"


def test_what_ran_elsewhere_is_kept(store, slurm, programs):
    write_run(store, ONE, 0, accuracy=0.75)
    run(store, slurm, [ONE], 1, dry_run=True)
    assert not store.results.exists()
    text = run(store, slurm, [ONE], 1)
    assert "1 runs, 1 finished already, 0 to do" in text and "kept: one, seed 0: 75.0 %, 12 s" in text
    assert json.loads((store.results / "one" / "0.json").read_text())["result"]["test_accuracy"] == 0.75
    assert "kept:" not in run(store, None, [ONE], 1)
    assert not (programs / "sbatch.given").exists()


def test_a_refusal_leaves_nothing_in_the_queue(store, slurm, programs):
    write_program(programs / "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused .*array.sbatch \(exit code 1\): .* invalid partition"):
        run(store, slurm)
    assert store.state(ONE, 0) == store.state(TWO, 1) == "not run"


def test_a_flag_with_a_line_break_is_refused(store, slurm, programs):
    broken = Experiment("broken", ONE.config, {"noise.file": "a\nb"})
    with pytest.raises(UserError, match="got a flag with a line break"):
        run(store, slurm, [broken])
    assert not store.workdir.exists() and not slurm.submissions.exists()


# ---- JobSet ----


def cells(tmp_path, experiments=(ONE, TWO)):
    """With work folders on a bucket in the commands, and on this machine for what is written here."""
    return [
        Cell(e.name, seed, jobs.command_line(e, seed, epath.Path(f"gs://bucket/runs/{e.name}/{seed}")),
             epath.Path(tmp_path / "work" / e.name / str(seed)))
        for seed in range(2) for e in experiments
    ]  # fmt: skip


def test_manifests(tmp_path, programs):
    cluster = Cluster("jobset", KUEUE, tmp_path / "submissions")
    wanted, console = cells(tmp_path), Console(width=160)
    with console.capture() as captured:
        submit.submit(cluster, wanted, dry_run=True, console=console)
    assert not cluster.submissions.exists() and not (programs / "kubectl.given").exists()
    shown = list(yaml.safe_load_all(captured.get()))
    with console.capture():
        submit.submit(cluster, wanted, dry_run=False, console=console)
    *arguments, file = given(programs, "kubectl")
    assert arguments == ["kubectl", "--namespace=team", "apply", "--filename"]
    assert (programs / "kubectl.file").read_text() == epath.Path(file).read_text()
    manifests = list(yaml.safe_load_all(epath.Path(file).read_text()))
    assert len(shown) == len(manifests) == 4
    assert len({manifest["metadata"]["name"] for manifest in manifests}) == 4
    (entry,) = [line for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if "ENTRYPOINT" in line]
    for manifest, cell in zip(manifests, wanted, strict=True):
        assert manifest["kind"] == "JobSet"
        assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
        assert manifest["metadata"]["namespace"] == "team"
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert json.loads(entry.removeprefix("ENTRYPOINT ")) + container["args"] == cell.command
        assert container["image"] == IMAGE and pod["serviceAccountName"] == "trainer"
        assert container["resources"]["limits"] == {"google.com/tpu": 4}
        mark = json.loads((cell.folder / claim.QUEUED).read_text())
        assert mark == {"on": "jobset", "submission": os.path.dirname(file)}


def test_names_of_jobsets(tmp_path):
    long = Experiment("cifar100-ieg-wrn28_10-uniform-0.8-10-no-AutoAugment-no-cutout", ONE.config)
    longer = Experiment(f"{long.name}-k5", ONE.config)
    names = [submit.jobset_name(cell, tmp_path / "a") for cell in cells(tmp_path, (long, longer, ONE))]
    assert len(set(names)) == 6 and all(re.fullmatch(r"ieg-[a-z0-9-]{1,35}[a-z0-9]", name) for name in names)
    assert re.fullmatch("ieg-one-0-[0-9a-f]{8}", names[2])
    assert re.fullmatch("ieg-cifar100-ieg-wrn28-10-uni-0-[0-9a-f]{8}", names[0]) and len(names[0]) == 40
    assert names == [submit.jobset_name(cell, tmp_path / "a") for cell in cells(tmp_path, (long, longer, ONE))]
    assert names[2] != submit.jobset_name(cells(tmp_path)[0], tmp_path / "b"), "one that has failed may still be there"


def test_what_kubectl_took_before_it_failed_is_queued(tmp_path, programs):
    said = "jobset.jobset.x-k8s.io/$(sed -n 's|^  name: ||p' \"${@: -1}\" | head -1) created"
    write_program(programs / "kubectl", f'echo "{said}"\necho "error: quota" >&2\nexit 1\n')
    wanted = cells(tmp_path)
    with pytest.raises(UserError, match=r"kubectl refused .*jobsets.yaml \(exit code 1\): error: quota"):
        submit.submit(Cluster("jobset", KUEUE, tmp_path / "submissions"), wanted, False, Console())
    assert [claim.sign_of_life(cell.folder) for cell in wanted] == ["queued", "", "", ""]


def test_submissions_of_one_second_do_not_overwrite_each_other(store, slurm, programs, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    run(store, slurm, [ONE], 1)
    run(store, slurm, [TWO], 1)
    assert sorted(path.name for path in slurm.submissions.iterdir()) == ["20260102-030405", "20260102-030405-2"]
    (mark,) = [json.loads(path.read_text()) for path in store.workdir.glob("two/0/queued.json")]
    assert mark["submission"] == str(slurm.submissions / "20260102-030405-2")


@pytest.mark.slow
def test_runs_on_a_bucket(programs, tmp_path):
    """The command as a whole, with a bucket on loopback: what it hands over, and what it finds there the next time."""
    target = ["run", "digits-sweep.digits-supervised-0.4", "--seeds=2", "--workdir=gs://bucket/runs", "--results="]
    jobset = ["--on=jobset", f"--image={IMAGE}", "--queue=research", "--gpus=1", f"--submissions={tmp_path / 'given'}"]
    few = tmp_path / "few"
    few.mkdir()
    for program in ("bash", "env", "dirname", "basename", "cp", "sed", "wc", "tr"):
        (few / program).symlink_to(shutil.which(program))

    def call(*more, path=few, status=0):
        command = [sys.executable, "-m", "ieg_jax.reproduce", *target, *more]
        env = environment | {"PATH": str(path)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    with buckets.Bucket() as bucket, buckets.environment(bucket) as made:
        environment = os.environ | made | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        bucket.put("bucket/about", b"")  # a bucket is there when something is in it
        local = [shlex.split(line) for line in call("--dry-run").splitlines() if line.startswith("python -m ")]
        assert "got no program 'kubectl' on PATH; install it" in call(*jobset, status=1)
        assert set(bucket.objects) == {"bucket/about"} and not (tmp_path / "given").exists()
        assert "2 runs submitted" in call(*jobset, path=f"{few}:{programs}")
        manifests = list(yaml.safe_load_all((programs / "kubectl.file").read_text()))
        pods = [m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] for m in manifests]
        assert [["python", "-m", "ieg_jax.main", *pod["containers"][0]["args"]] for pod in pods] == local
        folders = [f"bucket/runs/digits-supervised-0.4/{seed}" for seed in range(2)]
        assert {f"{folder}/queued.json" for folder in folders} < set(bucket.objects)
        # The first job begins on another machine.
        bucket.remove(f"{folders[0]}/queued.json")
        holder = {"run": "a", "host": "b", "machine": "b", "pid": 1, "started": 0.0, "folder": "c", "beat": "d"}
        bucket.put(f"{folders[0]}/running.json", json.dumps(holder | {"time": time.time()}).encode())
        text = call(*jobset, path=f"{few}:{programs}")
        assert "2 runs, 0 finished already, 0 to do, 1 running, 1 queued" in text
