#!/usr/bin/env bash
# The default tests at both ends of what is supported: Python 3.11 with the oldest versions that pyproject.toml
# allows, and Python 3.13 with the newest that pip finds. Other interpreters: PY311=... PY313=... make test-matrix
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() { # version
  local found
  for found in "$(command -v "python$1" || true)" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if [ -x "$found" ]; then
      echo "$found"
      return
    fi
  done
  echo "no Python $1 found; set PY${1/./} to its path" >&2
  return 1
}

oldest() { # the lower bounds in pyproject.toml, as pins
  sed -n '/^dependencies/,/^]/p' pyproject.toml | grep -o '"[^"]*>=[^"]*"' | tr -d '"' | sed 's/\[.*\]//; s/>=/==/'
}

run() { # name interpreter pins
  local venv=.venvs/$1
  echo "== $1: $("$2" --version)"
  if [ ! -e "$venv/installed" ] || [ pyproject.toml -nt "$venv/installed" ]; then
    rm -rf "$venv"
    "$2" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]' -c "$3"
    touch "$venv/installed"
  fi
  "$venv/bin/python" -m pip list --format=freeze 2>/dev/null | grep -E '^(jax|flax|optax|numpy|tensorflow)==' | xargs
  "$venv/bin/python" -m pytest -m "not slow" -n auto --maxprocesses=8 --dist=loadfile
}

mkdir -p .venvs
oldest > .venvs/oldest.txt
: > .venvs/newest.txt
PY311=${PY311:-$(find_python 3.11)}
PY313=${PY313:-$(find_python 3.13)}
run oldest "$PY311" .venvs/oldest.txt
run newest "$PY313" .venvs/newest.txt
