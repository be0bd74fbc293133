#!/usr/bin/env bash
# Cloud TPU VMs, one host or a slice of many: every command goes to all hosts.
#
#   launch/tpu_vm.sh create  --name=ieg --zone=us-west4-a --accelerator-type=v5litepod-16
#   launch/tpu_vm.sh install --name=ieg --zone=us-west4-a
#   launch/tpu_vm.sh run     --name=ieg --zone=us-west4-a -- --config=configs/cifar100.py --workdir=gs://BUCKET/cifar100
#   launch/tpu_vm.sh logs    --name=ieg --zone=us-west4-a --follow
#   launch/tpu_vm.sh status  --name=ieg --zone=us-west4-a
#   launch/tpu_vm.sh stop    --name=ieg --zone=us-west4-a
#   launch/tpu_vm.sh delete  --name=ieg --zone=us-west4-a
#
#   launch/tpu_vm.sh watch --spot --name=ieg --zone=us-west4-a -- --config=... --workdir=gs://BUCKET/FOLDER
#
# create      makes the slice: at once and on demand; with --queued as a queued resource, which waits for capacity; with
#             --spot from capacity that may be taken away at any time, at a lower price
# install     copies this checkout (ieg_jax/, configs/, launch/, with changes that are not committed) to all hosts and
#             installs '.[tpu]' with constraints.txt
# run         starts the training on all hosts, detached; the flags after -- are those of `python -m ieg_jax.main`
# logs        the output of the training on one host (--worker, --lines, --follow)
# status      the state of the slice, and of the training on each host
# stop        SIGTERM on all hosts: the training saves a checkpoint and ends; `run` with the same flags goes on from it
# delete      deletes the slice; with --queued, the queued resource with it. It costs money until then.
# watch       does all of it as a queued resource until the training is finished, which is when result.json is in the
#             work folder: creates, installs, runs; looks every minute; creates anew after a preemption; runs again after
#             a failure; deletes the slice in the end. May itself be stopped and started at any time.
#
#   --name=NAME              of the slice; default ieg
#   --zone=ZONE              required, such as us-west4-a
#   --project=ID             default: the one gcloud is set to
#   --accelerator-type=TYPE  default v5litepod-8 (v4-N, v5litepod-N, v5p-N, v6e-N)
#   --runtime-version=NAME   default: the one for JAX on that type
#   --network=, --subnetwork=, --service-account=   default: those of the project
#   --internal-ips           the hosts get no external address, and are reached by their internal one; they then need
#                            Cloud NAT to install packages
#   --spot                   for create and watch
#   --reserved               for create and watch: from the reservation of the project
#   --queued                 for create, status and delete: as a queued resource of the same name
#   --any-workdir            for run: accept a work folder that is not in a bucket. Right for a slice with one host, or
#                            with a disk that all hosts mount.
#   --worker=N               for logs; default 0
#   --lines=N                for logs; default 50
#   --follow                 for logs
#   --poll-seconds=N         for watch; default 60
#   --max-failures=N         for watch: gives up after so many failures of the training itself; default 3
#   --max-errors=N           for watch: gives up after so many errors of gcloud in a row; default 10
#   --keep                   for watch: does not delete the slice in the end
#   --yes                    for delete: does not ask
#   --dry-run                prints each command and runs none
set -euo pipefail
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

command=${1-}
case $command in
  create | install | run | logs | status | stop | delete | watch) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) die "got '$command'; expected create, install, run, logs, status, stop, delete, watch or --help" ;;
esac

name=ieg
zone=
project=
accelerator_type=v5litepod-8
runtime_version=
network=
subnetwork=
service_account=
internal_ips=
spot=
reserved=
queued=
any_workdir=
worker=0
lines=50
follow=
poll_seconds=60
max_failures=3
max_errors=10
keep=
yes=
parse_flags \
  "name zone project accelerator-type runtime-version network subnetwork service-account worker lines \
poll-seconds max-failures max-errors" \
  "internal-ips spot reserved queued any-workdir follow keep yes dry-run" "$@"

[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "got --name=$name; expected lower-case letters, digits and -, beginning with a letter"
[ -n "$zone" ] || die "got no --zone; expected --zone=ZONE, such as us-west4-a, where the project has quota for TPUs"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "got --zone=$zone; expected a zone such as us-west4-a, not a region"
[[ $worker =~ ^([0-9]+|all)$ ]] || die "got --worker=$worker; expected the number of a host, from 0, or all"
check_count --lines "$lines" 0
check_count --poll-seconds "$poll_seconds" 0
check_count --max-failures "$max_failures" 1
check_count --max-errors "$max_errors" 1
[ -z "$spot" ] || [ -z "$reserved" ] || die "got --spot and --reserved; a reservation is not preempted: give one of them"
if [ ${#training_args[@]} -gt 0 ]; then
  case $command in
    run | watch) ;;
    *) die "got flags after -- for '$command'; only run and watch take them" ;;
  esac
fi
case $accelerator_type in
  v[234]-[1-9]*) default_version='tpu-ubuntu2204-base' ;;
  v5litepod-[1-9]*) default_version='v2-alpha-tpuv5-lite' ;;
  v5p-[1-9]*) default_version='v2-alpha-tpuv5' ;;
  v6e-[1-9]*) default_version='v2-alpha-tpuv6e' ;;
  *) die "got --accelerator-type=$accelerator_type; expected v4-N, v5litepod-N, v5p-N or v6e-N, such as v5litepod-16" ;;
esac
runtime_version=${runtime_version:-$default_version}
case $command in
  run | watch)
    check_training_args
    check_sent_config "$root"
    if [ -z "$any_workdir" ] || [ "$command" = watch ]; then
      check_bucket_workdir
    fi
    ;;
esac
need_program gcloud "install the Google Cloud CLI, then run gcloud auth login and gcloud config set project ID"

place=("--zone=$zone" ${project:+"--project=$project"})
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
reach=("${place[@]}" ${internal_ips:+--internal-ip})
worker_script=ieg_jax/launch/tpu_worker.sh

on_workers() { # command for the shell of each host
  run "${tpu[@]}" ssh "$name" "${reach[@]}" --worker=all --command="$1"
}

create() {
  local options=(
    "${place[@]}" "--accelerator-type=$accelerator_type"
    ${spot:+--spot} ${reserved:+--reserved} ${internal_ips:+--internal-ips}
    ${network:+"--network=$network"} ${subnetwork:+"--subnetwork=$subnetwork"}
    ${service_account:+"--service-account=$service_account"}
  )
  if [ -n "$queued" ]; then
    run "${queue[@]}" create "$name" "--node-id=$name" "--runtime-version=$runtime_version" "${options[@]}"
  else
    run "${tpu[@]}" create "$name" "--version=$runtime_version" "${options[@]}"
  fi
}

# Joined with && throughout: `watch` calls this in a condition, where set -e does not hold.
install() {
  local folder
  # The name cannot be guessed, and mkdir fails where something is there already.
  folder=$(mktemp -du "${TMPDIR:-/tmp}/ieg_jax-XXXXXXXXXX")
  run mkdir -m 700 "$folder" &&
    run tar -czf "$folder/ieg_jax.tar.gz" --exclude=__pycache__ -C "$root" \
      README.md LICENSE pyproject.toml setup.py constraints.txt ieg_jax configs launch &&
    run "${tpu[@]}" scp "$folder/ieg_jax.tar.gz" "$name:" "${reach[@]}" --worker=all &&
    run rm -r "$folder" &&
    on_workers "rm -rf ieg_jax/ieg_jax ieg_jax/configs ieg_jax/launch && mkdir -p ieg_jax && tar -xzf ieg_jax.tar.gz -C ieg_jax && bash $worker_script install"
}

start() {
  on_workers "bash $worker_script start -- $(quoted "${training_args[@]}")"
}

stop() { on_workers "bash $worker_script stop"; }

logs() {
  run "${tpu[@]}" ssh "$name" "${reach[@]}" "--worker=$worker" \
    --command="bash $worker_script log --lines=$lines${follow:+ --follow}"
}

status() {
  [ -z "$queued" ] || run "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
  run "${tpu[@]}" describe "$name" "${place[@]}" '--format=value(state)'
  on_workers "bash $worker_script state"
}

delete() {
  if [ -n "$queued" ]; then
    run "${queue[@]}" delete "$name" "${place[@]}" --force ${yes:+--quiet}
  else
    run "${tpu[@]}" delete "$name" "${place[@]}" ${yes:+--quiet}
  fi
}

# ---- watch ----

errors=0   # of gcloud, in a row
failures=0 # of the training
last_said=

say_once() {
  [ "$*" = "$last_said" ] || say "$(date -u +%H:%M:%SZ) $*"
  last_said=$*
}

give_up() {
  die "$*; the slice is still there and costs money: $(quoted "$script" delete --queued "--name=$name" "${place[@]}")"
}

error() {
  errors=$((errors + 1))
  say "$(date -u +%H:%M:%SZ) $1 ($errors of $max_errors in a row): $(tr '\n' ' ' <"$error_file" | tail -c 500)"
  [ "$errors" -lt "$max_errors" ] || give_up "gave up after $errors errors in a row"
}

# finished, unfinished, or unknown where the bucket could not be asked
result() {
  if gcloud storage ls "${workdir%/}/result.json" >/dev/null 2>"$error_file"; then
    echo finished
  elif grep -q 'matched no objects' "$error_file"; then
    echo unfinished
  else
    echo unknown
  fi
}

# The state that gcloud names, MISSING, or UNKNOWN where it could not be asked: only what is known to be gone may be
# created again.
described() { # --format command...
  local format=$1 state
  shift
  if state=$("$@" "$name" "${place[@]}" "--format=value($format)" 2>"$error_file") && [ -n "$state" ]; then
    echo "$state"
  elif grep -q -i -e NOT_FOUND -e 'was not found' "$error_file"; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

create_again() {
  say_once "the slice is gone (${1}); deleting what is left and creating it anew"
  if delete >&2 2>"$error_file" && create >&2 2>"$error_file"; then
    errors=0
  else
    error "cannot create the slice"
  fi
}

install_and_start() {
  say_once "installing and starting on all hosts"
  if install >&2 2>"$error_file" && start >&2 2>"$error_file"; then
    errors=0
  else
    error "cannot install or start"
  fi
}

look_at_training() {
  local states
  if ! states=$(on_workers "bash $worker_script state 2>/dev/null || echo ieg_jax: idle" 2>"$error_file") ||
    ! states=$(grep -o 'ieg_jax: .*' <<<"$states" | sort -u); then
    error "cannot reach the hosts"
    return
  fi
  errors=0
  case $states in
    'ieg_jax: running' | $'ieg_jax: exited 0\nieg_jax: running') say_once "training" ;;
    'ieg_jax: idle') install_and_start ;;
    'ieg_jax: exited 0')
      # The result may have been written since it was asked for.
      if [ "$(result)" = unfinished ]; then
        give_up "the training ended well, but there is no result.json in $workdir"
      fi
      ;;
    *)
      failures=$((failures + 1))
      say_once "the training failed, or ended on some of the hosts ($failures of $max_failures): $(tr '\n' ',' <<<"$states")"
      logs >&2 || true
      [ "$failures" -lt "$max_failures" ] || give_up "gave up after $failures failures of the training"
      # Hosts whose peer has died wait for it for ever.
      if stop >&2 2>"$error_file" && start >&2 2>"$error_file"; then
        last_said=
      else
        error "cannot start again"
      fi
      ;;
  esac
}

look() {
  local state
  state=$(described state.state "${queue[@]}" describe)
  case $state in
    MISSING)
      say_once "creating the slice"
      if create >&2 2>"$error_file"; then errors=0; else error "cannot create the slice"; fi
      ;;
    ACTIVE)
      state=$(described state "${tpu[@]}" describe)
      case $state in
        READY) look_at_training ;;
        UNKNOWN) error "cannot ask for the state of the slice" ;;
        MISSING | PREEMPTED | TERMINATED | STOPPED) create_again "$state" ;;
        *) say_once "the slice is $state" ;;
      esac
      ;;
    SUSPENDED) create_again "$state" ;;
    FAILED)
      # Preemption is not what leads here; a wrong type, zone or quota is, and trying again does not help for long.
      failures=$((failures + 1))
      [ "$failures" -lt "$max_failures" ] ||
        give_up "the queued resource failed $failures times; see $(quoted "${queue[@]}" describe "$name" "${place[@]}")"
      create_again "$state"
      ;;
    UNKNOWN) error "cannot ask for the state of the queued resource" ;;
    *) say_once "the queued resource is $state" ;;
  esac
}

watch() {
  queued=1
  yes=1
  if [ -n "$dry_run" ]; then
    echo "# until this finds the file:"
    quoted gcloud storage ls "${workdir%/}/result.json"
    echo "# where the first does not find it, or the second finds it preempted, after deleting what is left:"
    quoted "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
    quoted "${tpu[@]}" describe "$name" "${place[@]}" '--format=value(state)'
    delete
    create
    echo "# where no training runs on a host:"
    on_workers "bash $worker_script state 2>/dev/null || echo ieg_jax: idle"
    install
    start
    echo "# in the end:"
    [ -n "$keep" ] || delete
    return
  fi
  error_file=$(mktemp)
  trap 'rm -f "$error_file"' EXIT
  # Nobody is there to answer gcloud's questions.
  export CLOUDSDK_CORE_DISABLE_PROMPTS=1
  while true; do
    case $(result) in
      finished) break ;;
      unfinished) look ;;
      unknown) error "cannot look into $workdir" ;;
    esac
    sleep "$poll_seconds"
  done
  say "finished: ${workdir%/}/result.json"
  if [ -n "$keep" ]; then
    say "the slice is still there and costs money: $(quoted "$script" delete --queued "--name=$name" "${place[@]}")"
  elif [ "$(described state.state "${queue[@]}" describe)" != MISSING ]; then
    delete >&2 || die "cannot delete the slice, which still costs money: $(quoted "$script" delete --queued "--name=$name" "${place[@]}")"
  fi
}

case $command in
  run) start ;;
  *) "$command" ;;
esac
