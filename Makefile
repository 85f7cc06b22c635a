# Everything happens in .venv, which `make venv` makes; every other target makes it first if it has to.
#
#   PYTHON=python3.12      interpreter to make it from (3.10 to 3.13)
#   TORCH=2.9.1            another torch; TORCH_INDEX=URL takes it from there
#   TRANSFORMERS=4.57.6    another transformers;  MLFLOW=3.1.4  another MLflow
#   ARGS='-k serve'        handed to pytest by `make test`
#   LOCAL=1                `make stack` with processes on loopback instead of containers

PYTHON ?= python3
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made

export TORCH TORCH_INDEX TRANSFORMERS MLFLOW

# No test and no example asks a hub or reports usage to anybody.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true ORT_DISABLE_TELEMETRY=1 DO_NOT_TRACK=true
# One thread a test process: `-n $(JOBS)` already fills the cores, and sums come in one order.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# What `make coverage` runs: the unit tests, and of the integration tests those that reach much in little time.
MEASURED := tests/unit $(patsubst %,tests/integration/test_%.py,arguments audio cli download edits images load \
	log_saved object_detection params parity_endpoint predict_stream prefetch tasks text_ranking used zero_shot_images)

.PHONY: help venv test unit coverage measured test-here test-docker matrix sweep graphs check bench soak demo codebuggy stack stack-down clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

venv: $(STAMP)  ## make .venv with everything in it (about 4 minutes, once)

$(STAMP): setup.cfg pyproject.toml tools/install.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install.py
	@touch $@

demo: $(STAMP)  ## log a real model, serve it, compare host and server
	@$(OFFLINE) $(BIN)/python examples/demo.py

codebuggy: $(STAMP)  ## train CodeBuggy, log it, serve it, ask it about code it has never seen
	@$(OFFLINE) $(BIN)/python examples/codebuggy/demo.py

stack: $(STAMP)  ## start PostgreSQL, S3, MLflow, the model and the app, and ask one question (LOCAL=1: no containers)
	@$(OFFLINE) $(BIN)/python examples/codebuggy/stack.py up $(if $(LOCAL),--local)

stack-down: $(STAMP)  ## stop all that `make stack` started
	@$(BIN)/python examples/codebuggy/stack.py down

# The Docker tests apart, in one process: they share an engine, and images that take minutes to build.
test: test-here test-docker  ## run the tests

unit: $(STAMP)  ## tests of one room: make unit ROOM=predict
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -q -p no:cacheprovider -p no:anyio -m "not slow and not serve" tests/unit/$(ROOM) $(ARGS)

coverage: $(STAMP)  ## branches of the package that its unit tests and some others take; fails below the floor in pyproject.toml
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -q --cov -n $(JOBS) -p no:cacheprovider $(MEASURED) $(ARGS)

measured:  # what `make coverage` runs
	@echo $(MEASURED)

test-here: $(STAMP)
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not docker" $(ARGS)

test-docker: $(STAMP)
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -n 0 -m docker -o testpaths=tests/system/docker $(ARGS) || [ $$? = 5 ]  # 5: ARGS chose none

matrix: $(STAMP)  ## run what CI runs on other releases of transformers and MLflow, and on other Pythons
	@$(BIN)/nox -t ci -j $(JOBS) -- $(ARGS)

sweep: $(STAMP)  ## save and load every architecture of transformers that can be made small (an hour)
	@cd tests && $(OFFLINE) $(ONE_THREAD) ../$(BIN)/python -W ignore -m sweep.run --jobs $(JOBS)

graphs: $(STAMP)  ## record the forward of every encoder of transformers that can be made small (hours)
	@cd tests && $(OFFLINE) $(ONE_THREAD) ../$(BIN)/python -W ignore -m sweep.graphs

check: $(STAMP)  ## lint, format, types, direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)  ## time loading, predictions and threads, side by side with MLflow's own flavor
	@$(OFFLINE) $(BIN)/python benchmarks/load.py
	@$(OFFLINE) $(BIN)/python benchmarks/predict.py
	@$(OFFLINE) $(BIN)/python benchmarks/threads.py

soak: $(STAMP)  ## serve MiniLM under load, kills and bad requests: MINUTES=30; ARGS='--workers 4 --plot soak.svg'
	@$(OFFLINE) $(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30) $(ARGS)

clean:  ## remove all that make made
	rm -rf $(VENV) .demo .nox .stack build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
