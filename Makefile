# Each target makes .venv when it is missing, and installs again when pyproject.toml or constraints.txt changed.
# Needs Python >= 3.11 and pip. Another interpreter: make PYTHON=python3.13 test
# Flags of the benchmark: make BENCH="--quick --torch_python=/elsewhere/bin/python" bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# One process of tests per core; a file stays together, for the fixtures that its tests share.
WORKERS := -n auto --maxprocesses=8 --dist=loadfile

.PHONY: quickstart quickstart-seeds test test-all test-matrix kill-matrix lint format docs bench clean

quickstart: $(STAMP)
	$(BIN)/python -m ieg_jax.quickstart --workdir=runs/quickstart --seeds=0

quickstart-seeds: $(STAMP)
	$(BIN)/python -m ieg_jax.quickstart --workdir=runs/quickstart --seeds=0,1,2,3,4

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

test-matrix:
	./tests/matrix.sh

kill-matrix: $(STAMP)
	$(BIN)/python tests/kill_matrix.py --kills=30

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	! command -v shellcheck >/dev/null || shellcheck -x launch/*.sh launch/slurm.sbatch tests/*.sh

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m ieg_jax.methods > docs/methods.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH)

clean:
	rm -rf $(VENV) .venvs .cache build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $(STAMP)
