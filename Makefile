PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test gpu gpu-step gpu-sampling lint clean

demo: .venv/demo
	$(BIN)/fastcm demo --out demo

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile

# From source, with the torch and triton that $(PYTHON) has: correctness, then benchmarks, some
# minutes each. Results go to $$OUT if set, else benchmarks/results/, row by row.
GPU := PYTHONPATH=. PYTHONUNBUFFERED=1 $(PYTHON) -m pytest

gpu:
	$(GPU) -m gpu tests
	$(GPU) -s benchmarks/test_ops.py benchmarks/test_optim.py

gpu-step:
	$(GPU) -s benchmarks/test_step.py

gpu-sampling:
	$(GPU) -s benchmarks/test_sampling.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[demo]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
