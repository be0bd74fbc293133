#!/usr/bin/env bash
# One machine with NVIDIA GPUs: checks the driver, installs '.[gpu]' into .venv of this checkout, and trains on all
# GPUs of the machine, in one process or in one for each.
#
#   launch/gpu.sh -- --config=configs/cifar10.py --workdir=runs/cifar10
#   launch/gpu.sh --process-per-gpu -- --config=configs/webvision_mini.py --workdir=runs/webvision
#
#   --gpus=LIST        the GPUs to use, such as 0,1; default: all
#   --process-per-gpu  a process for each GPU, by local.sh, so that each has an interpreter and threads of its own that
#                      read and augment its part of a batch: where one process does not keep all GPUs busy
#   --no-install       .venv is ready
#   --dry-run          prints each command and runs none
#
# Python for a new .venv is $PYTHON, else python3; at least 3.11. Ctrl-C saves a checkpoint and ends the training; the
# same command goes on from it.
set -euo pipefail
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

gpus=
process_per_gpu=
no_install=
parse_flags "gpus" "process-per-gpu no-install dry-run" "$@"
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || die "got --gpus=$gpus; expected numbers with commas between, such as 0,1"
check_training_args
[ -f "$config" ] || die "got --config=$config; there is no such file; expected one such as configs/cifar10.py"

# What the wheels of CUDA 12 need; see JAX's installation guide.
least_driver=525

check_driver() {
  local version
  need_program nvidia-smi "install the NVIDIA driver, at least version $least_driver; CUDA itself comes with '.[gpu]'"
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) ||
    die "nvidia-smi found no GPU: ${version:-no output}; check that the driver is loaded"
  version=${version%%$'\n'*}
  [[ $version =~ ^[0-9]+\. ]] || die "nvidia-smi said '$version'; expected the version of the driver"
  [ "${version%%.*}" -ge "$least_driver" ] ||
    die "got NVIDIA driver $version; expected at least $least_driver for CUDA 12; install a newer driver"
  nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader >&2
}

python=$root/.venv/bin/python
if [ -n "$dry_run" ]; then
  quoted nvidia-smi --query-gpu=driver_version --format=csv,noheader
else
  check_driver
fi
if [ -z "$no_install" ]; then
  if [ ! -x "$python" ] || [ -n "$dry_run" ]; then
    run "${PYTHON:-python3}" -m venv "$root/.venv"
  fi
  run "$python" -m pip install --quiet --disable-pip-version-check -e "${root}[gpu]" -c "$root/constraints.txt"
elif [ ! -x "$python" ] && [ -z "$dry_run" ]; then
  die "got --no-install, but there is no $python; leave the flag out"
fi
if [ -n "$process_per_gpu" ]; then
  command=(env "PYTHON=$python" "$root/launch/local.sh" "--gpus=${gpus:-all}" -- "${training_args[@]}")
else
  # With the platforms named, jax fails where it finds no GPU; otherwise it would train on the CPU.
  command=(env "JAX_PLATFORMS=cuda,cpu" ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"} "$python" -m ieg_jax.main "${training_args[@]}")
fi
if [ -n "$dry_run" ]; then
  quoted "${command[@]}"
else
  exec "${command[@]}" # in the place of this script, so that signals reach it
fi
