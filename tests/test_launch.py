"""The scripts of launch/: what they would run, what they refuse, and how they handle processes that die.

Nothing here reaches a cloud: `gcloud`, `kubectl` and the others are small scripts that record how they were called.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from etils import epath
from runs import ROOT

from ieg_jax.runtime.claim import sign_of_life

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
EXECUTABLE = [path for path in SCRIPTS if path.name != "common.sh"]
SUBCOMMANDS = {
    "tpu_vm.sh": ["create", "install", "run", "logs", "status", "stop", "delete", "watch"],
    "gke.sh": ["render", "apply", "status", "logs", "delete"],
    "tpu_worker.sh": ["install", "start", "state", "stop", "log"],
}
CONFIG = "--config=configs/quickstart.py:method=l2r,noise_rate=0.4"
BUCKET = "--workdir=gs://bucket/run one"
TRAIN = [CONFIG, BUCKET, "--config.augment.standard=crop(pad=4)|flip"]
GKE = ["--image=us-docker.pkg.dev/project/images/ieg_jax:1", "--slice=v5e:4x4"]
ZONE = "--zone=us-west4-a"
PROGRAMS = ["gcloud", "kubectl", "srun", "scontrol", "scancel", "squeue", "nvidia-smi", "docker"]


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    """A folder, first on PATH, whose programs leave a trace and fail: no test may reach the real ones by mistake."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        write_program(folder / name, f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/called"\nexit 99\n')
    return folder


@pytest.fixture
def launch(programs, tmp_path):
    """Runs a script and returns the finished process."""

    def call(name, *arguments, env=None, timeout=60):
        return subprocess.run(
            [LAUNCH / name, *arguments],
            cwd=ROOT,
            env=environment(programs, tmp_path) | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return call


def environment(programs, tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "XLA_", "JAX_", "PYTHON"))}
    return kept | {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}


def commands(output):
    """The commands in the output of --dry-run, as lists of words."""
    return [shlex.split(line) for line in output.splitlines() if line and not line.startswith("#")]


def flags(words):
    return {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}


# ---- every script ----


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian and Ubuntu: apt-get install shellcheck)")
    result = subprocess.run(
        ["shellcheck", "-x", path.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", EXECUTABLE, ids=lambda path: path.name)
def test_head_and_help(path, launch):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    result = launch(path.name, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout
    assert "#" not in result.stdout.splitlines()[0]
    for subcommand in SUBCOMMANDS.get(path.name, []):
        assert re.search(rf"\b{subcommand}\b", result.stdout)
        assert launch(path.name, subcommand, "--help").stdout == result.stdout


@pytest.mark.parametrize("path", EXECUTABLE, ids=lambda path: path.name)
def test_help_names_every_flag_that_is_parsed(path):
    text = path.read_text()
    parsed = re.search(r"parse_flags((?:\s|\\\n)+\"[^\"]*\"(?:\s|\\\n)+\"[^\"]*\")", text)[1]
    names = set(re.findall(r"[a-z][a-z-]+", parsed))
    assert "dry-run" in names
    header = text.split("\nset -euo")[0]
    assert {name for name in names if f"--{name}" not in header} == set()


DRY_RUNS = [
    ("local.sh", ["--processes=3"], TRAIN),
    ("local.sh", ["--gpus=0,1"], TRAIN),
    ("gpu.sh", [], TRAIN),
    ("gpu.sh", ["--process-per-gpu"], TRAIN),
    ("slurm.sbatch", [], TRAIN),
    *[("tpu_vm.sh", [name, ZONE], TRAIN if name in ("run", "watch") else None) for name in SUBCOMMANDS["tpu_vm.sh"]],
    ("gke.sh", ["apply", *GKE], TRAIN),
    *[("gke.sh", [name], None) for name in ("status", "logs", "delete")],
    ("tpu_worker.sh", ["start"], TRAIN),
]


@pytest.mark.parametrize(
    "name, arguments, train",
    DRY_RUNS,
    ids=lambda value: value if isinstance(value, str) else "-".join(value or [])[:20],
)
def test_dry_run_prints_commands_and_runs_none(name, arguments, train, launch, tmp_path):
    before = set(tmp_path.rglob("*"))
    result = launch(name, *arguments, "--dry-run", *(["--", *train] if train else []))
    assert result.returncode == 0, result.stderr
    assert commands(result.stdout)
    assert set(tmp_path.rglob("*")) == before  # no program was called, and no file was made


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("local.sh", ["--proceses=2"], "got unknown flag --proceses; expected one of --processes"),
        ("local.sh", ["--processes"], "got --processes with no value; expected --processes=VALUE"),
        ("local.sh", ["--processes", "--devices=2"], "got --processes with no value"),
        ("local.sh", ["--processes=two"], "got --processes=two; expected a whole number of at least 1"),
        ("local.sh", ["--processes=0"], "got --processes=0; expected a whole number of at least 1"),
        ("local.sh", ["--dry-run=yes"], "got '--dry-run=yes'; --dry-run takes no value"),
        ("local.sh", ["configs/quickstart.py"], "got 'configs/quickstart.py'; expected a flag"),
        ("local.sh", [], "got no --config after --"),
        ("local.sh", ["--", CONFIG], "got no --workdir after --"),
        ("local.sh", ["--", CONFIG, "--workdir=x", "--process_id=1"], "got --process_id after --; leave it out"),
        ("local.sh", ["--", CONFIG, "--workdir=x", "a\nb"], "got an argument with a line break"),
        ("local.sh", ["--gpus=0", "--devices=2", "--", *TRAIN], "got --gpus with --processes or --devices"),
        ("local.sh", ["--gpus=0;1", "--", *TRAIN], "got --gpus=0;1; expected all, or numbers with commas"),
        ("local.sh", ["--gpus=all", "--dry-run", "--", *TRAIN], "got --gpus=all with --dry-run, which asks nothing"),
        ("local.sh", ["--gpus=all", "--", *TRAIN], "nvidia-smi found no GPU"),
        ("gpu.sh", ["--gpus=a", "--", *TRAIN], "got --gpus=a; expected numbers with commas"),
        (
            "gpu.sh",
            ["--", "--config=configs/no.py", "--workdir=x"],
            "got --config=configs/no.py; there is no such file",
        ),
        ("gpu.sh", ["--", *TRAIN], "nvidia-smi found no GPU"),
        ("slurm.sbatch", ["--", *TRAIN], "got no Slurm job; submit with sbatch"),
        ("tpu_vm.sh", [], "got ''; expected create, install, run"),
        ("tpu_vm.sh", ["start"], "got 'start'; expected create, install, run"),
        ("tpu_vm.sh", ["create"], "got no --zone; expected --zone=ZONE"),
        ("tpu_vm.sh", ["create", "--zone=us-west4"], "got --zone=us-west4; expected a zone such as us-west4-a"),
        ("tpu_vm.sh", ["create", ZONE, "--name=Ieg"], "got --name=Ieg; expected lower-case letters"),
        ("tpu_vm.sh", ["create", ZONE, "--accelerator-type=v5e-16"], "got --accelerator-type=v5e-16; expected v4-N"),
        ("tpu_vm.sh", ["create", ZONE, "--spot", "--reserved"], "got --spot and --reserved"),
        ("tpu_vm.sh", ["create", ZONE, "--", CONFIG], "got flags after -- for 'create'"),
        ("tpu_vm.sh", ["logs", ZONE, "--worker=x"], "got --worker=x; expected the number of a host"),
        (
            "tpu_vm.sh",
            ["run", ZONE, "--", CONFIG, "--workdir=runs/x"],
            "got --workdir=runs/x; expected gs://BUCKET/FOLDER",
        ),
        ("tpu_vm.sh", ["watch", ZONE, "--any-workdir", "--", CONFIG, "--workdir=x"], "expected gs://BUCKET/FOLDER"),
        (
            "tpu_vm.sh",
            ["run", ZONE, "--", "--config=/tmp/x.py", BUCKET],
            "got --config=/tmp/x.py; expected a path such",
        ),
        ("tpu_vm.sh", ["run", ZONE, "--", "--config=tests/x.py", BUCKET], "expected a file in configs/"),
        (
            "tpu_vm.sh",
            ["run", ZONE, "--", "--config=configs/x.py", BUCKET],
            "got --config=configs/x.py; there is no such",
        ),
        ("gke.sh", ["start"], "got 'start'; expected render, apply"),
        ("gke.sh", ["render", "--slice=v5e:4x4", "--", *TRAIN], "got no --image"),
        ("gke.sh", ["render", "--image=a b", "--slice=v5e:4x4", "--", *TRAIN], "got --image=a b; expected"),
        ("gke.sh", ["render", "--image=i", "--", *TRAIN], "got no --slice; expected CHIP:TOPOLOGY"),
        ("gke.sh", ["render", *GKE, "--gpus=1", "--", *TRAIN], "got --slice and --gpus; expected one of them"),
        ("gke.sh", ["render", "--image=i", "--gpus=0", "--", *TRAIN], "got --gpus=0; expected a whole number of at"),
        ("gke.sh", ["render", *GKE, "--queue=Big", "--", *TRAIN], "got --queue=Big; expected the name of a LocalQueue"),
        ("gke.sh", ["render", "--image=i", "--slice=v9:4x4", "--", *TRAIN], "got --slice=v9:4x4; expected v4:AxBxC"),
        (
            "gke.sh",
            ["render", "--image=i", "--slice=v5e", "--", *TRAIN],
            "got --slice=v5e; expected 2 numbers after v5e:",
        ),
        (
            "gke.sh",
            ["render", "--image=i", "--slice=v4:4x4", "--", *TRAIN],
            "expected 3 numbers after v4:, such as v4:2x2x4",
        ),
        ("gke.sh", ["render", "--image=i", "--slice=v5e:1x2", "--", *TRAIN], "with 2 chips and 4 on a host"),
        ("gke.sh", ["render", *GKE, "--chips-per-host=3", "--", *TRAIN], "got --chips-per-host=3; expected 1, 4 or 8"),
        (
            "gke.sh",
            ["render", *GKE, "--slices=0", "--", *TRAIN],
            "got --slices=0; expected a whole number of at least 1",
        ),
        ("gke.sh", ["render", *GKE, "--slices=1000", "--", *TRAIN], "got --slices=1000; expected at most 999"),
        (
            "gke.sh",
            ["render", "--image=i", "--slice=v5e:2x2", "--slices=2", "--", *TRAIN],
            "got --slices=2 with one host in each; expected slices of several hosts",
        ),
        (
            "gke.sh",
            ["render", *GKE, "--queue=Team", "--", *TRAIN],
            "got --queue=Team; expected the name of a LocalQueue",
        ),
        ("gke.sh", ["render", *GKE, "--", CONFIG, "--workdir=/data/x"], "expected gs://BUCKET/FOLDER"),
        ("gke.sh", ["status", "--name=" + "x" * 41], "expected up to 40 lower-case letters"),
        ("gke.sh", ["delete", "--", CONFIG], "got flags after -- for 'delete'"),
        ("tpu_worker.sh", ["begin"], "got 'begin'; expected install, start"),
    ],
)
def test_mistakes_are_refused(name, arguments, message, launch, tmp_path):
    result = launch(name, *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    if (tmp_path / "called").exists():
        assert (tmp_path / "called").read_text().startswith("nvidia-smi --query-gpu")


# Parses command lines as `python -m ieg_jax.main` does, without running it.
PARSER = """
import json, os, sys
from absl import flags
from ieg_jax import main
main.define_flags()
names = ["workdir", "coordinator", "num_processes", "process_id"]
for arguments in json.load(sys.stdin):
    if os.fork():  # the keys of a configuration can be parsed only once in a process
        if os.wait()[1]:
            sys.exit(str(arguments))
        continue
    sys.argv = ["main", *arguments]  # where these look
    assert flags.FLAGS(sys.argv) == ["main"]
    found = {name: flags.FLAGS[name].value for name in names}
    print(json.dumps(found | {"policy": flags.FLAGS.config.augment.standard}))
    sys.exit()
"""


def test_main_takes_the_flags_that_the_scripts_give_it(launch):
    """All that starts processes: the last words of a printed command, and the arguments of a container."""
    lines = commands(launch("local.sh", "--processes=2", "--port=2000", "--dry-run", "--", *TRAIN).stdout)
    lines += commands(launch("local.sh", "--gpus=0,3", "--port=2000", "--dry-run", "--", *TRAIN).stdout)
    lines += commands(launch("gpu.sh", "--dry-run", "--", *TRAIN).stdout)[-1:]
    lines += commands(launch("slurm.sbatch", "--dry-run", "--", *TRAIN).stdout)
    given = [words[words.index("ieg_jax.main") + 1 :] for words in lines]
    manifest = render(launch, "--slices=2", "--queue=team")
    given.append(manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"])
    zero, one, other = sorted(set(map(tuple, given)), key=len, reverse=True)
    done = subprocess.run(
        [sys.executable, "-c", PARSER],
        input=json.dumps([zero, one, other]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same = {"workdir": "gs://bucket/run one", "policy": "crop(pad=4)|flip"}
    alone = same | {"coordinator": "", "num_processes": 0, "process_id": -1}
    two = [same | {"coordinator": "127.0.0.1:2000", "num_processes": 2, "process_id": i} for i in range(2)]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(found, key=lambda values: values["process_id"]) == [alone, *two]
    assert [len(given), given.count(list(zero)), given.count(list(one)), given.count(TRAIN)] == [7, 2, 2, 3]


@pytest.mark.parametrize("name, arguments", [("tpu_vm.sh", ["status", ZONE]), ("gke.sh", ["status"])])
def test_a_missing_program_is_named(name, arguments, launch, tmp_path):
    """With a PATH that holds nothing but what the scripts need before they look for it."""
    folder = tmp_path / "few"
    folder.mkdir()
    for program in ("bash", "env", "dirname"):
        (folder / program).symlink_to(shutil.which(program))
    result = launch(name, *arguments, env={"PATH": str(folder)})
    assert result.returncode == 1
    assert re.match(r"error: got no program '(gcloud|kubectl)' on PATH; install", result.stderr)


# ---- local.sh ----


def test_local_commands(launch):
    result = launch(
        "local.sh",
        "--processes",
        "2",
        "--devices=4",
        "--dry-run",
        "--",
        *TRAIN,
        env={"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8", "PYTHON": "bash"},
    )
    lines = commands(result.stdout)
    assert len(lines) == 2
    ports = set()
    for process, words in enumerate(lines):
        assert words[:3] == ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4"]
        assert words[3:6] == ["bash", "-m", "ieg_jax.main"]
        assert words[6:9] == TRAIN
        coordinator = re.fullmatch(r"--coordinator=127\.0\.0\.1:(\d+)", words[9])
        ports.add(int(coordinator[1]))
        assert words[10:] == ["--num_processes=2", f"--process_id={process}"]
    assert len(ports) == 1
    assert 20000 <= ports.pop() < 32000


def test_local_with_one_process_needs_no_coordinator(launch):
    (words,) = commands(launch("local.sh", "--processes=1", "--dry-run", "--", *TRAIN).stdout)
    assert words[-3:] == TRAIN


def test_local_with_a_process_for_each_gpu(launch):
    lines = commands(launch("local.sh", "--gpus=2,0,5", "--dry-run", "--", *TRAIN, env={"PYTHON": "bash"}).stdout)
    assert [words[:4] for words in lines] == [
        ["env", "JAX_PLATFORMS=cuda,cpu", f"CUDA_VISIBLE_DEVICES={gpu}", "bash"] for gpu in (2, 0, 5)
    ]
    for process, words in enumerate(lines):
        assert words[4:9] == ["-m", "ieg_jax.main", *TRAIN]
        assert words[10:] == ["--num_processes=3", f"--process_id={process}"]
    (words,) = commands(launch("local.sh", "--gpus=4", "--dry-run", "--", *TRAIN).stdout)
    assert words[2] == "CUDA_VISIBLE_DEVICES=4"
    assert words[-3:] == TRAIN, "one process has nobody to find"


# Stands for Python: does what the variable of its process says, and notes which signals arrive.
STUB = """#!/usr/bin/env bash
for argument; do case $argument in --process_id=*) id=${argument#*=} ;; esac; done
id=${id:-0}
trap 'echo "$id TERM" >> "$NOTES"; [ -n "${STUBBORN:-}" ] || exit 1' TERM
echo "output of $id${CUDA_VISIBLE_DEVICES:+ on GPU $CUDA_VISIBLE_DEVICES}"
action=DO_$id
case ${!action} in
  wait) echo "$id ready" >> "$NOTES"; for _ in {1..400}; do sleep 0.05; done ;; # none outlives a test that fails
  kill) kill -s KILL $$ ;;
  *) sleep 0.1; exit "${!action}" ;;
esac
"""


@pytest.fixture
def local(programs, tmp_path):
    """Starts local.sh with the stub in the place of Python."""
    write_program(tmp_path / "python", STUB)
    notes = tmp_path / "notes"
    notes.touch()
    started = []

    def start(*actions, arguments=(), **env):
        process = subprocess.Popen(
            [
                *[LAUNCH / "local.sh", *(arguments or [f"--processes={len(actions)}"])],
                *["--", CONFIG, f"--workdir={tmp_path / 'run'}"],
            ],
            env=environment(programs, tmp_path)
            | {f"DO_{i}": str(action) for i, action in enumerate(actions)}
            | {"PYTHON": str(tmp_path / "python"), "NOTES": str(notes)}
            | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell ignores SIGINT if it was ignored when it began, as where these tests run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_local_all_end_well(local, tmp_path):
    process = local(0, 0, 0)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output == "output of 0\n"
    assert "3 processes with 1 devices each" in errors
    logs = tmp_path / "run" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["process-1.log", "process-2.log"]
    assert (logs / "process-2.log").read_text() == "output of 2\n"
    assert str(logs) in errors


def test_local_finds_all_gpus(local, programs, tmp_path):
    write_program(programs / "nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")
    process = local(0, 0, arguments=["--gpus=all"])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output == "output of 0 on GPU 0\n"
    assert "2 processes with one GPU each, 0,1, on 127.0.0.1:" in errors
    assert (tmp_path / "run" / "logs" / "process-1.log").read_text() == "output of 1 on GPU 1\n"


@pytest.mark.parametrize(
    "actions, message",
    [
        (("wait", 3), "process 1 of 2 exited with code 3, so the others were ended; its output: .*logs/process-1.log"),
        ((4, "wait"), "process 0 of 2 exited with code 4, so the others were ended; its output is above"),
        (("wait", "kill"), "process 1 of 2 was killed by SIGKILL, so the others were ended"),
        ((2,), "process 0 of 1 exited with code 2; its output is above"),
    ],
)
def test_local_ends_the_others_when_one_dies(local, tmp_path, actions, message):
    process = local(*actions)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.match(f"error: {message}", errors.splitlines()[-1])
    assert len(errors.splitlines()) == (2 if len(actions) > 1 else 1)
    waiting = [str(i) for i, action in enumerate(actions) if action == "wait"]
    assert [line for line in (tmp_path / "notes").read_text().splitlines() if "TERM" in line] == [
        f"{i} TERM" for i in waiting
    ]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(local, tmp_path, sent):
    process = local("wait", "wait")
    notes = tmp_path / "notes"
    wait_for(lambda: notes.read_text().count("ready") == 2)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sorted(notes.read_text().splitlines()) == ["0 TERM", "0 ready", "1 TERM", "1 ready"]
    assert errors.splitlines()[-1] == f"stopped by {sent.name}; the same command goes on from the last checkpoint"


def test_local_kills_what_does_not_stop(local, tmp_path):
    process = local("wait", 5, arguments=["--grace-seconds=1"], STUBBORN="yes")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed, since they did not end by themselves: process 0" in errors.splitlines()[-1]
    assert "process 1 of 2 exited with code 5" in errors.splitlines()[-1]


def test_local_kills_at_the_second_signal(local, tmp_path):
    process = local("wait", "wait", STUBBORN="yes")
    notes = tmp_path / "notes"
    wait_for(lambda: notes.read_text().count("ready") == 2)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: notes.read_text().count("TERM") == 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 0 1" in errors.splitlines()[-1]


# ---- tpu_vm.sh ----


def test_tpu_create(launch):
    (words,) = commands(launch("tpu_vm.sh", "create", ZONE, "--dry-run").stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "ieg"]
    assert flags(words) == {
        "--zone": "us-west4-a",
        "--accelerator-type": "v5litepod-8",
        "--version": "v2-alpha-tpuv5-lite",
    }
    arguments = ["--spot", "--queued", "--accelerator-type=v4-32", "--name=big", "--project=p", "--internal-ips"]
    (words,) = commands(launch("tpu_vm.sh", "create", ZONE, "--dry-run", *arguments).stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "big"]
    assert flags(words) == {
        "--node-id": "big",
        "--runtime-version": "tpu-ubuntu2204-base",
        "--zone": "us-west4-a",
        "--project": "p",
        "--accelerator-type": "v4-32",
        "--spot": "",
        "--internal-ips": "",
    }


@pytest.mark.parametrize(
    "accelerator, version",
    [("v5p-8", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e"), ("v3-8", "tpu-ubuntu2204-base")],
)
def test_tpu_runtime_versions(launch, accelerator, version):
    result = launch("tpu_vm.sh", "create", ZONE, "--dry-run", f"--accelerator-type={accelerator}")
    assert flags(commands(result.stdout)[0])["--version"] == version


def test_tpu_install(launch):
    made, packed, copied, removed, unpacked = commands(launch("tpu_vm.sh", "install", ZONE, "--dry-run").stdout)
    assert made[:3] == ["mkdir", "-m", "700"]
    assert removed == ["rm", "-r", made[3]]
    assert packed[:2] == ["tar", "-czf"]
    for name in packed[packed.index("-C") + 2 :]:
        assert (ROOT / name).exists()
    assert {"ieg_jax", "configs", "launch", "constraints.txt", "pyproject.toml"} <= set(packed)
    assert copied[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copied[5:] == [packed[2], "ieg:", ZONE, "--worker=all"]
    assert unpacked[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "ieg", ZONE]
    assert flags(unpacked)["--worker"] == "all"
    assert flags(unpacked)["--command"].endswith("&& bash ieg_jax/launch/tpu_worker.sh install")


def test_tpu_run_quotes_the_flags_for_the_shell_of_the_host(launch):
    (words,) = commands(launch("tpu_vm.sh", "run", ZONE, "--internal-ips", "--dry-run", "--", *TRAIN).stdout)
    assert words[4:9] == ["ssh", "ieg", ZONE, "--internal-ip", "--worker=all"]
    remote = shlex.split(words[9].removeprefix("--command="))
    assert remote == ["bash", "ieg_jax/launch/tpu_worker.sh", "start", "--", *TRAIN]


def test_tpu_logs_status_delete(launch):
    (words,) = commands(launch("tpu_vm.sh", "logs", ZONE, "--follow", "--worker=2", "--dry-run").stdout)
    assert flags(words) == {
        "--zone": "us-west4-a",
        "--worker": "2",
        "--command": "bash ieg_jax/launch/tpu_worker.sh log --lines=50 --follow",
    }
    lines = commands(launch("tpu_vm.sh", "status", ZONE, "--queued", "--dry-run").stdout)
    assert [words[3:5] for words in lines] == [
        ["queued-resources", "describe"],
        ["tpu-vm", "describe"],
        ["tpu-vm", "ssh"],
    ]
    (words,) = commands(launch("tpu_vm.sh", "delete", ZONE, "--dry-run").stdout)
    assert words[3:] == ["tpu-vm", "delete", "ieg", ZONE]
    (words,) = commands(launch("tpu_vm.sh", "delete", ZONE, "--queued", "--yes", "--dry-run").stdout)
    assert words[3:] == ["queued-resources", "delete", "ieg", ZONE, "--force", "--quiet"]


# A cloud in a folder: `queue`, `node`, `workers` and `result` hold its state, and each look at the slice takes the next
# line of `plan`, whose words are commands for the shell.
FAKE_GCLOUD = """#!/usr/bin/env bash
cd "$CLOUD"
echo "$*" >> calls
case "$*" in
  "storage ls"*)
    line=$(head -n 1 plan); sed -i 1d plan; eval "$line"
    if [ -f broken ]; then rm broken; echo "ERROR: HTTPError 503" >&2; exit 1; fi
    [ -f result ] || { echo "ERROR: (gcloud.storage.ls) One or more URLs matched no objects." >&2; exit 1; } ;;
  *"queued-resources describe"*)
    [ -f queue ] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    cat queue ;;
  *"queued-resources create"*)
    [ ! -f queue ] || { echo "ERROR: ALREADY_EXISTS" >&2; exit 1; }
    echo ACTIVE > queue; echo READY > node; echo idle > workers ;;
  *"queued-resources delete"*) rm -f queue node workers ;;
  *"tpu-vm describe"*) cat node ;;
  *"tpu-vm scp"*) [ -f node ] ;;
  *"tpu_worker.sh install"*) ;;
  *"tpu_worker.sh start"*) echo running > workers ;;
  *"tpu_worker.sh stop"*) echo "exited 1" > workers ;;
  *"tpu_worker.sh log"*) echo "the last lines of the log" ;;
  *"tpu_worker.sh state"*) echo "SSH: Attempting to connect to worker 0..."; sed 's/^/ieg_jax: /' workers ;;
  *) echo "unknown: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def watch(programs, launch, tmp_path):
    """Runs `tpu_vm.sh watch` against the fake cloud, and returns the process and the verbs that the cloud was called
    with."""
    cloud = tmp_path / "cloud"
    cloud.mkdir()
    write_program(programs / "gcloud", FAKE_GCLOUD)
    kinds = ["create", "delete", "scp", "install", "start", "stop", "log"]

    def call(*plan, arguments=()):
        (cloud / "plan").write_text("\n".join(plan) + "\n")
        result = launch(
            "tpu_vm.sh",
            *["watch", "--spot", ZONE, "--accelerator-type=v5litepod-16", "--poll-seconds=0", *arguments],
            *["--", CONFIG, "--workdir=gs://bucket/run"],
            env={"CLOUD": str(cloud)},
        )
        verbs = []
        for line in (cloud / "calls").read_text().splitlines():
            words = line.replace("ieg_jax/launch/tpu_worker.sh ", "").replace("queued-resources ", "").split()
            assert "create" not in words or {"--spot", "--node-id=ieg", "--accelerator-type=v5litepod-16"} <= set(words)
            verbs += [kind for kind in kinds if kind in words and "state" not in words]
        return result, verbs

    return call


BEGIN = ["create", "scp", "install", "start"]


def test_watch_creates_installs_runs_and_deletes(watch):
    # no slice; idle hosts; training; finished
    result, verbs = watch(":", ":", ":", "touch result")
    assert result.returncode == 0, result.stderr
    assert verbs == [*BEGIN, "delete"]
    assert result.stderr.splitlines()[-1] == "finished: gs://bucket/run/result.json"


@pytest.mark.parametrize(
    "state", ["echo SUSPENDED > queue", "echo PREEMPTED > node", "rm node; echo SUSPENDED > queue"]
)
def test_watch_recreates_after_a_preemption(watch, state):
    result, verbs = watch(":", ":", ":", state, ":", ":", "touch result")
    assert result.returncode == 0, result.stderr
    assert verbs == [*BEGIN, "delete", *BEGIN, "delete"]
    assert "is gone" in result.stderr


def test_watch_waits_for_the_queue_and_takes_over_a_run_that_goes_on(watch):
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING"]
    result, verbs = watch(
        *[f"echo {state} > queue" for state in states],
        "echo ACTIVE > queue; echo READY > node; printf 'running\\nrunning\\n' > workers",
        "touch result",
        arguments=["--keep"],
    )
    assert result.returncode == 0, result.stderr
    assert verbs == []
    assert result.stderr.count("WAITING_FOR_RESOURCES") == 1
    assert "costs money" in result.stderr.splitlines()[-1]


def test_watch_runs_again_after_a_failure_and_gives_up_after_too_many(watch):
    failed = "printf 'exited 1\\nrunning\\n' > workers"
    result, verbs = watch(":", ":", failed, ":", failed, ":", failed, ":")
    assert result.returncode == 1
    assert verbs == [*BEGIN, "log", "stop", "start", "log", "stop", "start", "log"]
    assert "the last lines of the log" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: gave up after 3 failures of the training; the slice is still there and costs money")
    assert "delete --queued --name=ieg --zone=us-west4-a" in last


def test_watch_does_not_take_an_error_for_a_preemption(watch):
    result, verbs = watch(":", ":", "touch broken", "touch broken", ":", "touch result")
    assert result.returncode == 0, result.stderr
    assert verbs == [*BEGIN, "delete"]
    assert "cannot look into gs://bucket/run (2 of 10 in a row): ERROR: HTTPError 503" in result.stderr


def test_watch_gives_up_after_errors_in_a_row(watch):
    result, verbs = watch(*["touch broken"] * 3, arguments=["--max-errors=3"])
    assert result.returncode == 1
    assert verbs == []
    assert "error: gave up after 3 errors in a row" in result.stderr.splitlines()[-1]


def test_watch_says_when_a_run_ended_without_a_result(watch):
    result, verbs = watch(":", ":", "echo 'exited 0' > workers", ":")
    assert result.returncode == 1
    assert "ended well, but there is no result.json in gs://bucket/run" in result.stderr.splitlines()[-1]
    assert verbs == BEGIN


def test_watch_has_nothing_to_do_when_finished(watch):
    result, verbs = watch("touch result")
    assert result.returncode == 0
    assert verbs == []


# ---- tpu_worker.sh ----


@pytest.fixture
def worker(launch, tmp_path):
    """A copy of the checkout's scripts, as on a host, with a stub in the place of Python."""
    root = tmp_path / "ieg_jax"
    (root / "launch").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("common.sh", "tpu_worker.sh"):
        shutil.copy(LAUNCH / name, root / "launch" / name)
    stub = f'#!/usr/bin/env bash\necho "$JAX_PLATFORMS $*"\n{STUB.split(chr(10), 1)[1]}'
    write_program(root / ".venv" / "bin" / "python", stub)

    def call(*arguments, action="wait"):
        return launch(
            root / "launch" / "tpu_worker.sh",
            *arguments,
            env={"DO_0": str(action), "NOTES": str(tmp_path / "notes")},
        )

    yield call
    call("stop", "--grace-seconds=0")


def test_worker_starts_stops_and_tells(worker, tmp_path):
    assert worker("state").stdout == "ieg_jax: idle\n"
    assert worker("start", "--", *TRAIN).returncode == 0
    wait_for((tmp_path / "notes").exists)
    assert worker("state").stdout == "ieg_jax: running\n"
    refused = worker("start", "--", *TRAIN)
    assert (refused.returncode, refused.stderr[:40]) == (1, "error: a training is going on here alrea")
    assert worker("stop").stdout == "ieg_jax: exited 1\n"
    assert (tmp_path / "notes").read_text() == "0 ready\n0 TERM\n"
    log = worker("log").stdout.splitlines()
    assert shlex.split(log[0])[2:] == TRAIN
    assert log[1] == "tpu,cpu -m ieg_jax.main " + " ".join(TRAIN)


def test_worker_keeps_the_exit_code(worker):
    assert worker("start", "--", *TRAIN, action=0).returncode == 0
    wait_for(lambda: worker("state").stdout == "ieg_jax: exited 0\n")


# ---- gke.sh ----


def render(launch, *arguments, train=TRAIN, machine=GKE):
    result = launch("gke.sh", "render", *machine, *arguments, "--", *train)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def object_of(required, optional=None):
    optional = optional or {}
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
        "additionalProperties": False,
    }


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "array", "items": TEXT, "uniqueItems": True}
COUNT = {"type": "integer", "minimum": 0}
SWITCH = {"type": "boolean"}
# The fields of JobSet v1alpha2 as its API documents them. Nothing else is let through, so that a misspelt field fails.
JOBSET = object_of(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": object_of(
            {"name": NAME},
            {
                "namespace": NAME,
                "labels": {"additionalProperties": TEXT},
                "annotations": {"additionalProperties": TEXT},
            },
        ),
        "spec": object_of(
            {
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": object_of(
                        {"name": NAME, "template": object_of({"spec": {"type": "object"}}, {"metadata": {}})},
                        {"replicas": COUNT, "groupName": NAME, "dependsOn": {"type": "array"}},
                    ),
                }
            },
            {
                "network": object_of(
                    {}, {"enableDNSHostnames": SWITCH, "subdomain": NAME, "publishNotReadyAddresses": SWITCH}
                ),
                "failurePolicy": object_of(
                    {},
                    {
                        "maxRestarts": COUNT,
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
                        "rules": {
                            "type": "array",
                            "items": object_of(
                                {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                            "RestartJob",
                                            "RestartJobAndIgnoreMaxRestarts",
                                        ]
                                    },
                                },
                                {
                                    "onJobFailureReasons": TEXTS,
                                    "onJobFailureMessagePatterns": TEXTS,
                                    "targetReplicatedJobs": TEXTS,
                                },
                            ),
                        },
                    },
                ),
                "successPolicy": {"type": "object"},
                "suspend": SWITCH,
                "coordinator": {"type": "object"},
                "managedBy": TEXT,
                "ttlSecondsAfterFinished": COUNT,
            },
        ),
    }
)
VARIANTS = [
    [],
    ["--spot", "--run-as-root", "--service-account=trainer", "--namespace=team", "--name=big", "--queue=research"],
    ["--slices=4", "--queue=research"],
]
GPUS = ["--image=us-docker.pkg.dev/project/images/ieg_jax:1", "--gpus=2"]


@pytest.mark.parametrize(
    ("machine", "arguments"),
    [(GKE, VARIANTS[0]), (GKE, VARIANTS[1]), (GKE, VARIANTS[2]), (GPUS, VARIANTS[0]), (GPUS, VARIANTS[1])],
    ids=["plain", "all-flags", "slices-and-queue", "gpus", "gpus-all-flags"],
)
def test_manifest_fits_the_schemas(launch, arguments, machine):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    import jsonschema

    manifest = render(launch, *arguments, machine=machine)
    jsonschema.validate(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]}
    validator.validate(template, validator.latest_version(), strict=True)
    template["spec"]["paralelism"] = 1
    with pytest.raises(validator.ValidationError):
        validator.validate(template, validator.latest_version(), strict=True)


def test_manifest_says_what_the_flags_say(launch):
    awkward = [*TRAIN, '--config.x=a"b\\c: d # e', "--config.y=on"]
    manifest = render(launch, train=awkward)
    assert manifest["metadata"]["name"] == manifest["spec"]["network"]["subdomain"] == "ieg"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["args"] == awkward
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert "tolerations" not in pod
    assert "serviceAccountName" not in pod
    assert "securityContext" not in container
    assert "labels" not in manifest["metadata"], "it waits for no queue"
    assert list(manifest["metadata"]["annotations"]) == ["alpha.jobset.sigs.k8s.io/exclusive-topology"]


def test_manifest_with_gpus_asks_for_no_slice(launch):
    manifest = render(launch, machine=GPUS)
    assert "annotations" not in manifest["metadata"], "one pod does not need a node pool for itself"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (1, 1)
    assert "nodeSelector" not in job["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"nvidia.com/gpu": 2}
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": "cuda,cpu"}]
    assert "ports" not in container
    with_slice = render(launch)["spec"]
    assert manifest["spec"]["failurePolicy"] == with_slice["failurePolicy"]
    assert job["podFailurePolicy"] == with_slice["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    pod = render(launch, "--spot", machine=GPUS)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}


def test_manifest_with_the_other_flags(launch):
    manifest = render(launch, *VARIANTS[1], "--max-restarts=0", "--grace-seconds=30")
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"] == [
        {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    ]
    assert pod["containers"][0]["securityContext"] == {"runAsUser": 0}
    assert pod["terminationGracePeriodSeconds"] == 30
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert manifest["metadata"]["namespace"] == "team"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}


def test_manifest_of_several_slices_in_a_queue(launch):
    one, several = render(launch), render(launch, *VARIANTS[2])
    assert several["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "research"}
    (job,) = several["spec"]["replicatedJobs"]
    assert job["replicas"] == 4
    # Each of the four jobs is a slice of four hosts, kept on one node pool.
    assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (4, 4)
    assert several["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    job["replicas"] = 1
    assert several == one, "nothing else differs: who is who GKE tells the pods"


@pytest.mark.parametrize(
    "arguments, accelerator, hosts, chips",
    [
        (["--slice=v4:2x2x4"], "tpu-v4-podslice", 4, 4),
        (["--slice=v5p:2x2x1"], "tpu-v5p-slice", 1, 4),
        (["--slice=v6e:16x16"], "tpu-v6e-slice", 64, 4),
        (["--slice=v6e:1x1"], "tpu-v6e-slice", 1, 1),
        (["--slice=v5e:2x4"], "tpu-v5-lite-podslice", 2, 4),
        (["--slice=v5e:2x4", "--chips-per-host=8"], "tpu-v5-lite-podslice", 1, 8),
    ],
)
def test_hosts_of_a_slice(launch, arguments, accelerator, hosts, chips):
    job = render(launch, *arguments)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_gke_commands(launch, tmp_path):
    rendered, applied = launch("gke.sh", "apply", *GKE, "--dry-run", "--", *TRAIN).stdout.split(" | ")
    rendered = shlex.split(rendered)
    assert rendered[1:] == ["render", *GKE, "--", *TRAIN]
    assert shlex.split(applied) == ["kubectl", "--namespace=default", "apply", "--filename=-"]
    found = subprocess.run(rendered, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert yaml.safe_load(found) == render(launch)
    out = f"--out={tmp_path}/jobset.yaml"
    rendered, applied = commands(launch("gke.sh", "apply", *GKE, out, "--dry-run", "--", *TRAIN).stdout)
    assert rendered[1:] == ["render", *GKE, out, "--", *TRAIN]
    assert applied == ["kubectl", "--namespace=default", "apply", f"--filename={tmp_path}/jobset.yaml"]
    (words,) = commands(launch("gke.sh", "logs", "--follow", "--worker=3", "--dry-run").stdout)
    assert words == [
        *["kubectl", "--namespace=default", "logs"],
        "--selector=jobset.sigs.k8s.io/jobset-name=ieg,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=3",
        *["--tail=50", "--follow"],
    ]
    (words,) = commands(launch("gke.sh", "logs", "--of-slice=2", "--dry-run").stdout)
    assert "jobset.sigs.k8s.io/job-index=2,batch.kubernetes.io/job-completion-index=0" in words[3]
    (words,) = commands(launch("gke.sh", "delete", "--namespace=team", "--dry-run").stdout)
    assert words == ["kubectl", "--namespace=team", "delete", "jobset", "ieg"]


@pytest.mark.parametrize("out", [False, True])
def test_gke_apply_hands_the_manifest_to_kubectl(launch, programs, tmp_path, out):
    write_program(
        programs / "kubectl",
        f'#!/bin/sh\nfor a; do :; done\na="${{a#--filename=}}"\n[ "$a" = - ] || exec <"$a"\ncat >{tmp_path}/applied\n',
    )
    before = {path.name for path in tmp_path.iterdir()}
    flags = [f"--out={tmp_path}/jobset.yaml"] if out else []
    assert launch("gke.sh", "apply", *GKE, *flags, "--", *TRAIN).returncode == 0
    assert yaml.safe_load((tmp_path / "applied").read_text()) == render(launch)
    new = {path.name for path in tmp_path.iterdir()} - before
    assert new == ({"applied", "jobset.yaml"} if out else {"applied"}), "no other file is left"


# ---- slurm.sbatch ----


def test_slurm_directives_come_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives
    assert max(directives) < first
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@300"} <= set(lines)


def test_slurm_command(launch):
    (words,) = commands(launch("slurm.sbatch", "--devices=2", "--dry-run", "--", *TRAIN).stdout)
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "env"]
    assert words[3:5] == ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2"]
    assert words[6:] == ["-m", "ieg_jax.main", *TRAIN]
    gpus = {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}
    (words,) = commands(launch("slurm.sbatch", "--dry-run", "--", *TRAIN, env=gpus).stdout)
    assert words[3] == "JAX_PLATFORMS=cuda,cpu"
    assert words[5:] == ["-m", "ieg_jax.main", *TRAIN]


@pytest.mark.parametrize(
    "env, message",
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "got 1 tasks on a node with 8 GPUs; submit with --gpus-per-node=8"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "got --gpus-per-task, which hides the other GPUs"),
        ({"SLURM_SUBMIT_DIR": "/"}, "got no launch/common.sh in /; submit from the root of the checkout"),
    ],
)
def test_slurm_refuses(launch, env, message):
    result = launch("slurm.sbatch", "--dry-run", "--", *TRAIN, env=env)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


SRUN = """#!/usr/bin/env bash
trap 'echo "step TERM" >> "$SLURM_NOTES"; exit 1' USR2
echo $BASHPID > "$SLURM_NOTES.step"
echo "${SRUN_CPUS_PER_TASK:-none}" > "$SLURM_NOTES.cpus"
[ "$TASK" = wait ] || exit "$TASK"
echo ready >> "$SLURM_NOTES"
for _ in {1..400}; do sleep 0.05; done
"""


@pytest.fixture
def slurm(programs, tmp_path):
    """The batch script with stand-ins for Slurm: `scancel` reaches the step, as Slurm would."""
    notes = tmp_path / "slurm"
    notes.touch()
    write_program(programs / "srun", SRUN)
    write_program(
        programs / "scancel",
        '#!/bin/sh\necho "scancel $*" >> "$SLURM_NOTES"\nkill -s USR2 $(cat "$SLURM_NOTES.step")\n',
    )
    write_program(
        programs / "scontrol",
        """#!/bin/sh
case $1 in
  show) echo "   PreemptEligibleTime=2026-11-24T06:27:15 PreemptTime=$PREEMPTED" ;;
  *) echo "scontrol $*" >> "$SLURM_NOTES" ;;
esac
""",
    )
    write_program(programs / "squeue", '#!/bin/sh\necho "$STATE"\n')

    def start(task, state="RUNNING", restarts=0, preempted="None", train=TRAIN, **more):
        return subprocess.Popen(
            [LAUNCH / "slurm.sbatch", "--", *train],
            env=environment(programs, tmp_path)
            | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_SUBMIT_DIR": str(ROOT)}
            | {"SLURM_NOTES": str(notes), "TASK": str(task), "STATE": state, "PYTHON": sys.executable}
            | {"PREEMPTED": preempted}
            | more,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.notes = notes
    return start


@pytest.mark.parametrize("state, requeued", [("RUNNING", ["scontrol requeue 7"]), ("CANCELLED", [])])
def test_slurm_requeues_before_the_time_limit(slurm, state, requeued):
    process = slurm("wait", state)
    wait_for(lambda: "ready" in slurm.notes.read_text())
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert slurm.notes.read_text().splitlines() == ["ready", "scancel --signal=TERM 7", "step TERM", *requeued]


def test_slurm_leaves_the_other_tasks_of_an_array_alone(slurm):
    """The last task of an array has the number of the array."""
    process = slurm("wait", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="4")
    wait_for(lambda: "ready" in slurm.notes.read_text())
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    notes = slurm.notes.read_text().splitlines()
    assert notes == ["ready", "scancel --signal=TERM 7_3", "step TERM", "scontrol requeue 7_3"]
    assert slurm.notes.with_name("slurm.cpus").read_text() == "4\n"


def test_slurm_stopped_and_saved_does_not_count(slurm):
    process = slurm(75, restarts=3)
    _, errors = process.communicate(timeout=60)
    assert slurm.notes.read_text().splitlines() == ["scontrol requeue 7"]
    assert "stopped and saved; the job goes back into the queue" in errors


@pytest.mark.parametrize("state, sign", [("RUNNING", "queued"), ("CANCELLED", "")])
def test_slurm_says_in_the_work_folder_that_the_job_waits_again(slurm, tmp_path, state, sign):
    folder = tmp_path / "run one"
    folder.mkdir()
    slurm(75, state, train=[CONFIG, f"--workdir={folder}"]).communicate(timeout=60)
    assert sign_of_life(epath.Path(folder)) == sign


@pytest.mark.parametrize(
    "task, state, restarts, code, notes, message",
    [
        (0, "RUNNING", 0, 0, [], ""),
        (1, "RUNNING", 2, 1, ["scontrol requeue 7"], "restarted 2 times, at most 3"),
        (1, "RUNNING", 3, 1, [], "error: the training exited with code 1, and the job was restarted 3 times"),
        (1, "CANCELLED", 0, 1, [], "the job is CANCELLED, so it is not put back"),
    ],
)
def test_slurm_exit_codes(slurm, task, state, restarts, code, notes, message):
    process = slurm(task, state, restarts)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert slurm.notes.read_text().splitlines() == notes
    assert message in errors


def test_slurm_preemptions_do_not_count(slurm):
    process = slurm(1, restarts=3, preempted="2026-11-24T06:27:19")
    _, errors = process.communicate(timeout=60)
    assert slurm.notes.read_text().splitlines() == ["scontrol requeue 7"]
    assert "preempted; the job goes back into the queue" in errors


# ---- gpu.sh, Dockerfile ----


def test_gpu_commands(launch):
    driver, venv, install, train = commands(launch("gpu.sh", "--gpus=0,1", "--dry-run", "--", *TRAIN).stdout)
    assert driver == ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    assert venv == ["python3", "-m", "venv", f"{ROOT}/.venv"]
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-4:] == ["-e", f"{ROOT}[gpu]", "-c", f"{ROOT}/constraints.txt"]
    assert train[:3] == ["env", "JAX_PLATFORMS=cuda,cpu", "CUDA_VISIBLE_DEVICES=0,1"]
    assert train[4:] == ["-m", "ieg_jax.main", *TRAIN]


@pytest.mark.parametrize("flags, gpus", [([], "all"), (["--gpus=0,3"], "0,3")])
def test_gpu_with_a_process_for_each(launch, flags, gpus):
    lines = commands(launch("gpu.sh", *flags, "--process-per-gpu", "--no-install", "--dry-run", "--", *TRAIN).stdout)
    assert [words[0] for words in lines] == ["nvidia-smi", "env"]
    assert lines[1] == [
        *["env", f"PYTHON={ROOT}/.venv/bin/python", str(LAUNCH / "local.sh"), f"--gpus={gpus}", "--", *TRAIN]
    ]


@pytest.mark.parametrize(
    "version, message", [("470.82.01", "got NVIDIA driver 470.82.01; expected at least 525"), ("?", "said '?'")]
)
def test_gpu_refuses_an_old_driver(launch, programs, version, message):
    write_program(programs / "nvidia-smi", f"#!/bin/sh\necho '{version}'\n")
    result = launch("gpu.sh", "--", *TRAIN)
    assert result.returncode == 1
    assert message in result.stderr


def test_docker_context_holds_what_the_image_copies():
    copied = set()
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_image_runs_as_a_user_and_without_a_shell_in_between():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["python", "-m", "ieg_jax.main"]' in lines
    users = [line for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("USER root", "USER 0")
