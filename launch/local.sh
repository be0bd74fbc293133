#!/usr/bin/env bash
# Trains in several processes on this machine, which find each other over 127.0.0.1: a rehearsal of a slice with several
# hosts, on the CPU; or a process for each GPU.
#
#   launch/local.sh --processes=2 --devices=4 -- --config=configs/quickstart.py --workdir=runs/two
#   launch/local.sh --gpus=all -- --config=configs/cifar10.py --workdir=runs/cifar10
#
#   --processes=N      number of processes on the CPU; default 2
#   --devices=N        simulated devices in each process; default 1
#   --gpus=LIST        in place of these two: a process for each of these GPUs, such as 0,1, which sees no other; all =
#                      those that nvidia-smi lists
#   --logs=DIR         folder for the output of processes 1, 2, ...; default WORKDIR/logs, or a temporary folder where
#                      the work folder is in a bucket. The output of process 0 goes to the terminal.
#   --port=N           port of the coordinator; default: a free one
#   --grace-seconds=N  after SIGTERM, how long a process may take to save a checkpoint before it is killed; default 60,
#                      and 10 at most where another one has failed: they save together or not at all
#   --dry-run          prints the command of each process and runs none
#
# Python is $PYTHON, else .venv/bin/python of this checkout, else python3. SIGTERM, SIGHUP and Ctrl-C are passed on to
# every process as SIGTERM; a second one kills them. When one process fails the others are ended. Exits with 0 if all
# processes did, else with 1; the same command then goes on from the last checkpoint.
set -euo pipefail
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

processes=
devices=
gpus=
logs=
port=
grace_seconds=60
parse_flags "processes devices gpus logs port grace-seconds" "dry-run" "$@"
if [ -n "$gpus" ]; then
  [ -z "$processes$devices" ] || die "got --gpus with --processes or --devices; expected one process for each GPU"
  if [ "$gpus" = all ]; then
    [ -z "$dry_run" ] || die "got --gpus=all with --dry-run, which asks nothing; expected numbers such as 0,1"
    need_program nvidia-smi "install the NVIDIA driver, or name the GPUs: --gpus=0,1"
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader) || die "nvidia-smi found no GPU: ${gpus:-no output}"
    gpus=${gpus//$'\n'/,}
  fi
  [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    die "got --gpus=$gpus; expected all, or numbers with commas between, such as 0,1"
  IFS=, read -r -a gpu_of <<<"$gpus"
  processes=${#gpu_of[@]}
fi
processes=${processes:-2}
devices=${devices:-1}
check_count --processes "$processes" 1
check_count --devices "$devices" 1
check_count --grace-seconds "$grace_seconds" 0
[ -z "$port" ] || check_count --port "$port" 1
check_training_args
for flag in coordinator num_processes process_id; do
  [ -z "$(training_flag "$flag")" ] || die "got --$flag after --; leave it out: this script sets it for each process"
done

if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
else
  python=python3
fi
command -v "$python" >/dev/null || die "got no interpreter $python; set PYTHON to one that has ieg_jax installed"

# True where nothing listens. Another program may still take the port before the coordinator does, which is why the
# range lies below the one that the system hands out by itself.
port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

if [ -z "$port" ]; then
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    ! port_is_free "$port" || break
  done
fi

if [ -z "$logs" ]; then
  case $workdir in
    *://*) logs=${TMPDIR:-/tmp}/ieg_jax-logs-$$ ;;
    *) logs=$workdir/logs ;;
  esac
fi

# A count that is set already would be overruled or would overrule, depending on the version of XLA.
xla_flags=$(sed -E 's/ *--xla_force_host_platform_device_count=[0-9]+//g' <<<"${XLA_FLAGS:-}")
xla_flags="${xla_flags:+$xla_flags }--xla_force_host_platform_device_count=$devices"

set_command() { # process
  command=(env)
  if [ -n "$gpus" ]; then
    # With the platforms named, jax fails where it finds no GPU; otherwise it would train on the CPU.
    command+=("JAX_PLATFORMS=cuda,cpu" "CUDA_VISIBLE_DEVICES=${gpu_of[$1]}")
  else
    command+=(JAX_PLATFORMS=cpu "XLA_FLAGS=$xla_flags")
  fi
  command+=("$python" -m ieg_jax.main "${training_args[@]}")
  if [ "$processes" -gt 1 ]; then
    command+=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1")
  fi
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    set_command "$i"
    quoted "${command[@]}"
  done
  exit 0
fi

if [ "$processes" -gt 1 ]; then
  mkdir -p "$logs" || die "cannot make $logs; name another folder with --logs"
  what="$devices devices each"
  [ -z "$gpus" ] || what="one GPU each, $gpus,"
  say "$processes processes with $what on 127.0.0.1:$port; output of processes 1 and up: $logs"
fi

pids=()
codes=() # empty while the process runs
signal=
failed=
deadline=
killed=
if [ "$grace_seconds" -lt 10 ]; then failure_grace=$grace_seconds; else failure_grace=10; fi

signal_all() { # signal
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [ -n "${codes[i]}" ] || kill -s "$1" -- "${pids[i]}" 2>/dev/null || true
  done
}

kill_all() { # whole process groups: children that a process left behind would keep the devices and the port
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    if [ -z "${codes[i]}" ]; then
      killed="$killed $i"
      kill -s KILL -- "-${pids[i]}" 2>/dev/null || true
    fi
  done
}

on_signal() {
  if [ -n "$signal" ]; then
    kill_all
    return
  fi
  signal=$1
  deadline=$((SECONDS + grace_seconds))
  signal_all TERM
}
trap 'on_signal SIGTERM' TERM
trap 'on_signal SIGINT' INT
trap 'on_signal SIGHUP' HUP

# Job control gives each process a group of its own, so that Ctrl-C in the terminal reaches this script alone, which
# passes it on once.
set -m
for ((i = 0; i < processes; i++)); do
  [ -z "$signal" ] || break
  set_command "$i"
  if [ "$i" -eq 0 ]; then
    "${command[@]}" </dev/null &
  else
    "${command[@]}" </dev/null >>"$logs/process-$i.log" 2>&1 &
  fi
  pids[i]=$!
  codes[i]=''
done
set +m

remaining=${#pids[@]}
while [ "$remaining" -gt 0 ]; do
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [ -z "${codes[i]}" ] || continue
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    codes[i]=$code
    remaining=$((remaining - 1))
    if [ "$code" -ne 0 ] && [ -z "$failed$signal" ]; then
      failed=$i
      deadline=$((SECONDS + failure_grace))
      signal_all TERM
    fi
  done
  if [ -n "$deadline" ] && [ "$remaining" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
    kill_all
    deadline=
  fi
  [ "$remaining" -eq 0 ] || sleep 0.1
done 2>/dev/null # bash's own notices of killed jobs; the messages below say it

how=
if [ -n "$killed" ]; then
  how="; killed, since they did not end by themselves: process$killed"
fi
if [ -n "$failed" ]; then
  code=${codes[failed]}
  what="exited with code $code"
  [ "$code" -le 128 ] || what="was killed by SIG$(kill -l "$code")"
  where="its output is above"
  [ "$failed" -eq 0 ] || where="its output: $logs/process-$failed.log"
  others=
  [ "$processes" -eq 1 ] || others=", so the others were ended"
  die "process $failed of $processes $what$others$how; $where"
fi
for code in "${codes[@]}"; do
  if [ "$code" -ne 0 ]; then
    say "stopped by $signal$how; the same command goes on from the last checkpoint"
    exit 1
  fi
done
