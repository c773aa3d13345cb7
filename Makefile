# Each target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

POINTS ?= 500

.PHONY: race test check faults bench report tokenizer clean

race: $(READY)            ## the default race: baseline, cggr_loss and two controls, with its report
	$(BIN)/cggr-ray race

test: $(READY)            ## all tests, those that start Ray by themselves
	$(BIN)/python -m pytest -n 4 --dist loadfile -m "not ray"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ray

check: $(READY)           ## format, lint, types, layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

faults: $(READY)          ## kills runs at POINTS moments, damages checkpoints, fills a disk; prints what survived
	$(BIN)/python -m pytest -m faults --fault-points $(POINTS) -s tests/faults

bench: $(READY)           ## the benchmarks, appended to results/bench
	for name in optimizer loop step memory head-stats logit-stats; do $(BIN)/cggr-ray bench $$name || exit 1; done

report: $(READY)          ## make report RACE=outputs/...
	$(BIN)/cggr-ray report $(RACE)

tokenizer: $(READY)       ## trains another tokenizer in place of the shipped one
	$(BIN)/python -m cggr_ray.data.make_tokenizer

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
