#!/usr/bin/env bash
# A TPU slice, several, or one node with GPUs, on Google Kubernetes Engine, as a JobSet that kubectl hands to the cluster.
#
#   launch/gke.sh render --name=ieg --image=IMAGE --slice=v5e:4x4 -- --config=configs/cifar100.py --workdir=gs://BUCKET/c
#   launch/gke.sh apply  --name=ieg --image=IMAGE --slice=v5e:4x4 -- --config=configs/cifar100.py --workdir=gs://BUCKET/c
#   launch/gke.sh status --name=ieg
#   launch/gke.sh logs   --name=ieg --follow
#   launch/gke.sh delete --name=ieg
#
# render      prints the manifest, gke/jobset.yaml filled in; with --out=FILE, writes it
# apply       renders, and starts the training; the flags after -- are those of `python -m ieg_jax.main`
# status      of the JobSet and its pods
# logs        the output of one host (--worker, --of-slice, --lines, --follow)
# delete      stops the training (it saves a checkpoint first) and frees the slice; `apply` goes on from there
#
#   --name=NAME            of the JobSet; default ieg
#   --namespace=NAME       default: default
#   --image=IMAGE          required for render and apply: built from launch/Dockerfile with EXTRA=tpu or gpu, and pushed
#   --slice=CHIP:TOPOLOGY  for render and apply: v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:4x4, ... as the node pool
#   --slices=N             train together, each on a node pool of its own; default 1. Several need more than one host each
#   --gpus=N               for render and apply, in place of --slice: so many NVIDIA GPUs of one node, in one process
#   --chips-per-host=N     default 4, or 1 for a slice of one chip; 8 for nodes of ct5lp-hightpu-8t, ct6e-standard-8t
#   --service-account=NAME of Kubernetes, that may write to the bucket (Workload Identity)
#   --queue=NAME           a LocalQueue of Kueue in the namespace, which decides when the JobSet starts; default: none
#   --spot                 on nodes that may be taken away at any time
#   --max-restarts=N       after failures of the training itself; preemptions do not count; default 3
#   --grace-seconds=N      from SIGTERM to SIGKILL; default 300
#   --run-as-root          where the TPU devices of the node are not open to other users
#   --out=FILE             for render and apply: where the manifest is written; default: it is kept nowhere
#   --worker=N, --of-slice=N, --lines=N, --follow   for logs; default: host 0 of slice 0, 50 lines
#   --dry-run              prints each command and runs none
set -euo pipefail
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

command=${1-}
case $command in
  render | apply | status | logs | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) die "got '$command'; expected render, apply, status, logs, delete or --help" ;;
esac

name=ieg
namespace=default
image=
slice=
slices=1
gpus=
chips_per_host=
service_account=
queue=
spot=
max_restarts=3
grace_seconds=300
run_as_root=
out=
worker=0
of_slice=0
lines=50
follow=
all_flags=("$@")
parse_flags "name namespace image slice slices gpus queue chips-per-host service-account max-restarts grace-seconds out \
  worker of-slice lines" "spot run-as-root follow dry-run" "$@"

# The names of pods and hosts are longer by -slice-0-N and a suffix, and may have 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  die "got --name=$name; expected up to 40 lower-case letters, digits and -, beginning with a letter"
[[ $namespace =~ ^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "got --namespace=$namespace; expected lower-case letters, digits and -"
[[ $queue =~ ^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$ ]] ||
  die "got --queue=$queue; expected the name of a LocalQueue: lower-case letters, digits and -"
check_count --slices "$slices" 1
slices=$((10#$slices))
[ "$slices" -le 999 ] || die "got --slices=$slices; expected at most 999"
check_count --of-slice "$of_slice" 0
check_count --worker "$worker" 0
check_count --lines "$lines" 0
check_count --max-restarts "$max_restarts" 0
check_count --grace-seconds "$grace_seconds" 1

check_slice() { # sets accelerator, topology and hosts
  local chip dimensions factor chips=1
  chip=${slice%%:*}
  topology=${slice#*:}
  case $chip in
    v4) accelerator=tpu-v4-podslice dimensions=3 ;;
    v5e) accelerator=tpu-v5-lite-podslice dimensions=2 ;;
    v5p) accelerator=tpu-v5p-slice dimensions=3 ;;
    v6e) accelerator=tpu-v6e-slice dimensions=2 ;;
    *) die "got --slice=$slice; expected v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, such as v5e:4x4" ;;
  esac
  if ! [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    [ "$(tr -cd x <<<"$topology" | wc -c)" -ne $((dimensions - 1)) ]; then
    die "got --slice=$slice; expected $dimensions numbers after $chip:, such as" \
      "$([ "$dimensions" = 2 ] && echo "$chip:4x4" || echo "$chip:2x2x4")"
  fi
  for factor in ${topology//x/ }; do
    chips=$((chips * factor))
  done
  if [ -z "$chips_per_host" ]; then
    chips_per_host=$((chips == 1 ? 1 : 4))
  fi
  case $chips_per_host in
    1 | 4 | 8) ;;
    *) die "got --chips-per-host=$chips_per_host; expected 1, 4 or 8, as the machine type of the node pool has" ;;
  esac
  [ $((chips % chips_per_host)) -eq 0 ] ||
    die "got --slice=$slice with $chips chips and $chips_per_host on a host; expected a multiple of it"
  hosts=$((chips / chips_per_host))
  [ "$slices" -eq 1 ] || [ "$hosts" -gt 1 ] ||
    die "got --slices=$slices with one host in each; expected slices of several hosts: GKE joins no others"
  resource=google.com/tpu platforms=tpu,cpu
}

check_gpus() { # sets what check_slice sets
  check_count --gpus "$gpus" 1
  [ -z "$chips_per_host" ] || die "got --chips-per-host=$chips_per_host with --gpus; it belongs to --slice"
  [ "$slices" -eq 1 ] || die "got --slices=$slices with --gpus; it belongs to --slice"
  accelerator='' topology='' hosts=1 chips_per_host=$gpus
  resource=nvidia.com/gpu platforms=cuda,cpu
}

# A string of YAML in double quotes, so that nothing in it is read as anything but text.
# shellcheck disable=SC2001  # what bash makes of a backslash in a replacement depends on its version
yaml_string() { printf '"%s"' "$(sed 's/[\\"]/\\&/g' <<<"$1")"; }

fill_in() {
  local line argument many=
  [ "$hosts" -eq 1 ] || many=1
  sed -e '1,/^apiVersion/{/^#/d;}' \
    -e "${spot:+s/ # only with --spot\$//;}/ # only with --spot\$/d" \
    -e "${run_as_root:+s/ # only with --run-as-root\$//;}/ # only with --run-as-root\$/d" \
    -e "${service_account:+s/ # only with --service-account\$//;}/ # only with --service-account\$/d" \
    -e "${queue:+s/ # only with --queue\$//;}/ # only with --queue\$/d" \
    -e "${slice:+s/ # only with --slice\$//;}/ # only with --slice\$/d" \
    -e "${slice:+s/ # only with --slice or --spot\$//;}${spot:+s/ # only with --slice or --spot\$//;}" \
    -e "/ # only with --slice or --spot\$/d" \
    -e "${many:+s/ # only with many hosts\$//;}/ # only with many hosts\$/d" \
    -e "s|@QUEUE@|$queue|; s|@SLICES@|$slices|; s|@RESOURCE@|$resource|; s|@PLATFORMS@|$platforms|" \
    -e "s|@NAME@|$name|; s|@NAMESPACE@|$namespace|; s|@IMAGE@|$image|; s|@SERVICE_ACCOUNT@|$service_account|" \
    -e "s|@ACCELERATOR@|$accelerator|; s|@TOPOLOGY@|$topology|; s|@HOSTS@|$hosts|" \
    -e "s|@CHIPS_PER_HOST@|$chips_per_host|; s|@MAX_RESTARTS@|$max_restarts|; s|@GRACE_SECONDS@|$grace_seconds|" \
    "$root/launch/gke/jobset.yaml" |
    while IFS= read -r line; do
      case $line in
        *'- @ARGS@')
          for argument in "${training_args[@]}"; do
            printf '%s- %s\n' "${line%%-*}" "$(yaml_string "$argument")"
          done
          ;;
        *) printf '%s\n' "$line" ;;
      esac
    done
}

case $command in
  render | apply)
    [ -n "$image" ] || die "got no --image; expected one that was built from launch/Dockerfile and pushed"
    [[ $image =~ ^[A-Za-z0-9][-A-Za-z0-9_./:@]*$ ]] ||
      die "got --image=$image; expected something like us-docker.pkg.dev/PROJECT/REPOSITORY/ieg_jax:TAG"
    [[ $service_account =~ ^([a-z0-9][-a-z0-9.]*)?$ ]] ||
      die "got --service-account=$service_account; expected the name of a Kubernetes service account, not an address"
    [ -n "$slice$gpus" ] || die "got no --slice; expected CHIP:TOPOLOGY of the node pool, such as --slice=v5e:4x4, or" \
      "--gpus=N"
    [ -z "$slice" ] || [ -z "$gpus" ] || die "got --slice and --gpus; expected one of them"
    if [ -n "$slice" ]; then check_slice; else check_gpus; fi
    check_training_args
    check_sent_config "$root"
    check_bucket_workdir
    ;;
  *) [ ${#training_args[@]} -eq 0 ] || die "got flags after -- for '$command'; only render and apply take them" ;;
esac

in_cluster=(kubectl "--namespace=$namespace")
pods=jobset.sigs.k8s.io/jobset-name=$name
kubectl_hint="install it with gcloud components install kubectl, then run gcloud container clusters get-credentials CLUSTER"

case $command in
  render)
    if [ -n "$out" ]; then
      fill_in >"$out"
    else
      fill_in
    fi
    ;;
  apply)
    need_program kubectl "$kubectl_hint"
    apply=("${in_cluster[@]}" apply "--filename=${out:--}")
    if [ -n "$dry_run" ]; then
      before=()
      for flag in ${all_flags[@]+"${all_flags[@]}"}; do
        [ "$flag" != -- ] || break
        [ "$flag" = --dry-run ] || before+=("$flag")
      done
      rendering=$(quoted "$script" render "${before[@]}" -- "${training_args[@]}")
      if [ -n "$out" ]; then
        printf '%s\n%s\n' "$rendering" "$(quoted "${apply[@]}")"
      else
        printf '%s | %s\n' "$rendering" "$(quoted "${apply[@]}")"
      fi
    elif [ -n "$out" ]; then
      fill_in >"$out"
      "${apply[@]}"
    else
      fill_in | "${apply[@]}"
    fi
    ;;
  status)
    need_program kubectl "$kubectl_hint"
    run "${in_cluster[@]}" get jobset "$name"
    run "${in_cluster[@]}" get pods "--selector=$pods" --output=wide
    ;;
  logs)
    need_program kubectl "$kubectl_hint"
    of_host=jobset.sigs.k8s.io/job-index=$of_slice,batch.kubernetes.io/job-completion-index=$worker
    run "${in_cluster[@]}" logs "--selector=$pods,$of_host" "--tail=$lines" ${follow:+--follow}
    ;;
  delete)
    need_program kubectl "$kubectl_hint"
    run "${in_cluster[@]}" delete jobset "$name"
    ;;
esac
