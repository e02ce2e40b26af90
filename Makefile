PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test docs bench floor gpu gpu-correctness gpu-ops gpu-optim gpu-step gpu-sampling gpu-jvp gpu-attention gpu-missing quality lint clean

demo: .venv/demo
	$(BIN)/fastcm demo --out demo

# The same random inputs each time; SEED= draws fresh ones, as pytest alone does.
SEED := 0
test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(addprefix --seed ,$(SEED))

# The same on the oldest torch and triton that are supported, in an environment of its own.
floor: .venv-floor/test
	.venv-floor/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(addprefix --seed ,$(SEED)) $(TESTS)

# From source, with the torch and triton that $(PYTHON) has. Each part takes at most eight minutes,
# goes on where it was stopped, and none keeps the next from running. Results go to $$OUT if set,
# else benchmarks/results/, row by row; gpu-missing says what is not there yet.
GPU := PYTHONPATH=. PYTHONUNBUFFERED=1 RESUME=1 $(PYTHON) -m pytest

gpu:
	-$(MAKE) gpu-correctness
	-$(MAKE) gpu-ops
	-$(MAKE) gpu-optim
	-$(MAKE) gpu-step
	-$(MAKE) gpu-sampling
	-$(MAKE) gpu-attention
	-$(MAKE) gpu-jvp
	$(MAKE) gpu-missing

gpu-correctness:
	$(GPU) -m gpu tests

gpu-ops gpu-optim gpu-step gpu-sampling gpu-jvp gpu-attention: gpu-%:
	$(GPU) -s benchmarks/test_$*.py

gpu-missing:
	PYTHONPATH=. $(PYTHON) -m benchmarks.missing

# Of this machine: a quick look at all within ten minutes, installation included, of which nothing
# is kept. In full, into benchmarks/results: `make bench PARTS=all`, or PARTS="ops step".
bench: .venv/bench
	PYTHONPATH=. $(BIN)/python -m benchmarks $(PARTS) $(if $(QUICK),--quick)

# Every method on digits, three seeds: about 15 minutes.
quality: .venv/test
	PYTHONPATH=. $(BIN)/python -m benchmarks.quality
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

# The site, into build/site; links that lead nowhere and pages outside the navigation are errors.
docs: .venv/docs
	$(BIN)/python -m mkdocs build --strict

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[demo]'
	touch $@

.venv/bench: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[bench]'
	touch $@

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[demo,test]'
	touch $@

.venv-floor/test: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet -c constraints-floor.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf .venv .venv-floor build dist *.egg-info
