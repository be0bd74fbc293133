#!/usr/bin/env bash
# What `tpu_vm.sh` runs on each host of a slice, in the copy of the checkout there. Not meant to be called by hand, but
# it may be: after `gcloud compute tpus tpu-vm ssh`.
#
#   tpu_worker.sh install              makes .venv with Python >= 3.11 and installs '.[tpu]' with constraints.txt
#   tpu_worker.sh start -- FLAGS       starts `python -m ieg_jax.main FLAGS`, which outlives the connection
#   tpu_worker.sh state                prints `ieg_jax: running`, `ieg_jax: exited CODE` or `ieg_jax: idle`
#   tpu_worker.sh stop                 sends SIGTERM, so that a checkpoint is saved, and waits
#   tpu_worker.sh log [--follow]       the output of the training
#
#   --lines=N          of the log; default 50
#   --grace-seconds=N  for stop: how long to wait before the process is killed; default 120
#   --dry-run          prints the commands and runs none
set -euo pipefail
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

command=${1-}
case $command in
  install | start | supervise | state | stop | log) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) die "got '$command'; expected install, start, state, stop, log or --help" ;;
esac
follow=
lines=50
grace_seconds=120
parse_flags "lines grace-seconds" "follow dry-run" "$@"
check_count --lines "$lines" 0
check_count --grace-seconds "$grace_seconds" 0

run_dir=$HOME/ieg_jax_run
log=$run_dir/log
python=$root/.venv/bin/python

# The process that supervises the training. A number that another process got after a reboot does not count.
supervisor() {
  local pid
  pid=$(cat "$run_dir/pid" 2>/dev/null) || return 0
  if grep -q tpu_worker.sh "/proc/$pid/cmdline" 2>/dev/null; then
    echo "$pid"
  fi
}

state() {
  if [ -n "$(supervisor)" ]; then
    echo running
  elif [ -f "$run_dir/exit_code" ]; then
    echo "exited $(cat "$run_dir/exit_code")"
  else
    echo idle
  fi
}

make_venv() {
  local candidate
  rm -rf "$root/.venv"
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
      "$candidate" -m venv "$root/.venv" 2>/dev/null; then
      return
    fi
  done
  # The images of TPU VMs have Python 3.10, which jax no longer supports; uv brings one of its own.
  say "no Python >= 3.11 with venv here; installing one with uv"
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --seed --python 3.11 "$root/.venv"
}

install() {
  local wanted
  wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  if [ "$(cat "$root/.venv/installed" 2>/dev/null)" != "$wanted" ]; then
    make_venv
    "$python" -m pip install --quiet --disable-pip-version-check -e "${root}[tpu]" -c "$root/constraints.txt"
    echo "$wanted" >"$root/.venv/installed"
  fi
  "$python" -c 'import jax; print("ieg_jax: installed, jax", jax.__version__)'
}

start() {
  [ "$(state)" != running ] || die "a training is going on here already; stop it first, or follow its log"
  [ -x "$python" ] || die "nothing is installed here; install first"
  mkdir -p "$run_dir"
  rm -f "$run_dir/exit_code" "$run_dir/pid"
  echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $(quoted "${training_args[@]}")" >>"$log"
  nohup setsid bash "$script" supervise -- "${training_args[@]}" </dev/null >>"$log" 2>&1 &
  for _ in {1..50}; do
    [ ! -s "$run_dir/pid" ] || break
    sleep 0.1
  done
  [ -s "$run_dir/pid" ] || die "the training did not start; see $log"
  echo "ieg_jax: started, output in $log"
}

# Outlives the connection, and leaves the exit code behind for `state`.
supervise() {
  local child=''
  trap 'kill -s TERM "$child" 2>/dev/null || true' TERM
  echo $$ >"$run_dir/pid"
  cd "$root"
  # With the platforms named, jax fails where it finds no TPU; otherwise it would train on the CPU of a TPU host.
  JAX_PLATFORMS=tpu,cpu "$python" -m ieg_jax.main "${training_args[@]}" &
  child=$!
  wait_for "$child"
  echo "$code" >"$run_dir/exit_code"
}

stop() {
  local pid waited=0
  pid=$(supervisor)
  if [ -n "$pid" ]; then
    kill -s TERM "$pid" || true
    while [ -n "$(supervisor)" ] && [ "$waited" -lt "$((grace_seconds * 5))" ]; do
      sleep 0.2
      waited=$((waited + 1))
    done
    if [ -n "$(supervisor)" ]; then
      kill -s KILL -- "-$pid" || true
      sleep 0.2
    fi
  fi
  echo "ieg_jax: $(state)"
}

if [ -n "$dry_run" ]; then
  case $command in
    install) quoted "$python" -m pip install --quiet --disable-pip-version-check -e "${root}[tpu]" -c "$root/constraints.txt" ;;
    start) quoted nohup setsid bash "$script" supervise -- "${training_args[@]}" ;;
    log) quoted tail -n "$lines" ${follow:+-F} "$log" ;;
    *) say "$command runs no command of its own" ;;
  esac
  exit 0
fi

case $command in
  state) echo "ieg_jax: $(state)" ;;
  log) exec tail -n "$lines" ${follow:+-F} "$log" ;;
  *) "$command" ;;
esac
