# shellcheck shell=bash
# Sourced by the scripts of this folder. Keeps to bash 3.2, which macOS ships: `local.sh` is for laptops too.

dry_run=
training_args=()

say() { echo "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# The comment at the top of a script is its help.
usage() { awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "${script:-$0}"; }

# A command as one line that can be pasted into a shell.
quoted() {
  local line
  line=$(printf '%q ' "$@")
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it with --dry-run.
run() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# parse_flags "name zone" "spot dry-run" "$@": sets the variables `name`, `zone`, `spot`, `dry_run` from --name=VALUE or
# --name VALUE and from --spot, and the array `training_args` from what follows after --. Its own variables begin with _,
# since a flag may have any other name.
parse_flags() {
  local _values=$1 _switches=$2 _argument _name _value
  shift 2
  while [ $# -gt 0 ]; do
    _argument=$1
    shift
    case $_argument in
      --)
        training_args=("$@")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*) ;;
      *) die "got '$_argument'; expected a flag that begins with --; the flags of the training go after a single --" ;;
    esac
    _name=${_argument#--}
    _name=${_name%%=*}
    if [[ " $_switches " == *" $_name "* ]]; then
      [[ $_argument != *=* ]] || die "got '$_argument'; --$_name takes no value; give it alone or leave it out"
      printf -v "${_name//-/_}" 1
    elif [[ " $_values " == *" $_name "* ]]; then
      if [[ $_argument == *=* ]]; then
        _value=${_argument#*=}
      else
        _value=${1-}
        [ $# -eq 0 ] || shift
      fi
      case $_value in
        '' | --*) die "got --$_name with no value; expected --$_name=VALUE" ;;
      esac
      printf -v "${_name//-/_}" %s "$_value"
    else
      # shellcheck disable=SC2086  # a list of names
      die "got unknown flag --$_name; expected one of $(printf -- '--%s ' $_values $_switches)or --help;" \
        "the flags of the training go after a single --"
    fi
  done
}

# check_count --flag VALUE LEAST
check_count() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || [ "$((10#$2))" -lt "$3" ]; then
    die "got $1=$2; expected a whole number of at least $3"
  fi
}

# The value of a flag among the arguments of the training, empty where it is not there; the last one counts.
training_flag() {
  local name=$1 value='' previous='' argument
  for argument in ${training_args[@]+"${training_args[@]}"}; do
    case $argument in
      "--$name="*) value=${argument#*=} ;;
      *) [ "$previous" != "--$name" ] || value=$argument ;;
    esac
    previous=$argument
  done
  printf '%s\n' "$value"
}

# Sets `config` (the file, without its arguments) and `workdir`.
check_training_args() {
  local argument
  config=$(training_flag config)
  config=${config%%:*}
  workdir=$(training_flag workdir)
  [ -n "$config" ] || die "got no --config after --; expected -- --config=FILE --workdir=DIR [--config.key=value ...]"
  [ -n "$workdir" ] || die "got no --workdir after --; expected -- --config=FILE --workdir=DIR [--config.key=value ...]"
  for argument in "${training_args[@]}"; do
    case $argument in
      *$'\n'*) die "got an argument with a line break: $(quoted "$argument"); write it on one line" ;;
    esac
  done
}

# What is sent elsewhere has the configurations of `configs/` only. Call with the root of the checkout.
check_sent_config() {
  case $config in
    /* | *..*) die "got --config=$config; expected a path such as configs/quickstart.py: it is read in the copy of the" \
      "checkout" ;;
    configs/*) ;;
    *) die "got --config=$config; expected a file in configs/: nothing else is sent along; move it there" ;;
  esac
  [ -f "$1/$config" ] || die "got --config=$config; there is no such file in $1"
}

check_bucket_workdir() {
  case $workdir in
    gs://?*) ;;
    *) die "got --workdir=$workdir; expected gs://BUCKET/FOLDER: the hosts share no disk, and what is on them is lost" \
      "with them" ;;
  esac
}

need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || die "got no program '$1' on PATH; $2"
}

# Waits for a child to end, whatever signals arrive meanwhile, and sets `code`. `wait` alone returns at a signal.
# shellcheck disable=SC2034  # `code` is for the caller
wait_for() {
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || return 0
  done
}
