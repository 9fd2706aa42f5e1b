PYTHON ?= python3.11
BIN := .venv/bin
GLUE ?= ../shared/data/glue
# files side by side, in their order: the long ones are in the middle, so that both ends meet
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test unit lint bench clean

demo: .venv/demo  ## the main job on the embedded corpus: no data set, no download but the packages
	$(BIN)/fedistill simulate

test: .venv/dev  ## every test this machine can run; says what it skipped and why
	$(PYTEST)

unit: .venv/dev  ## the quick tier: no Flower run, no real data
	$(PYTEST) -m "not integration and not real"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/dev  ## training speed beside plain PyTorch and a usual Flower app, on SST-2
	$(BIN)/fedistill bench --workload few-large -s data.source=$(GLUE)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch first and by its exact version: another package's range could draw another build of it
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(INSTALL) -e ".[demo]"
	touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e ".[demo,dev]"
	touch $@
