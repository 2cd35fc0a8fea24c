# A machine with Python 3.11 or 3.12, git and make runs `make demo` and `make test`; both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-long check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## the whole pipeline on the embedded corpus
	$(BIN)/raysys demo output=outputs/demo

test: install  ## unit tests and one real run a stage, at most 15 minutes
	$(BIN)/python -m pytest -m "not long and not gpu and not ray" --numprocesses 2
	$(BIN)/python -m pytest -m "ray and not long and not gpu"

test-long: install  ## what make test leaves out: processes that die, a real browser (apt-get install chromium), paddlepaddle, clip-benchmark's numbers, img2dataset
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,paddle,browser]'
	$(BIN)/python -m pytest -m "long"

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## speed against references; writes outputs/bench/*.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	for tool in tools/bench_*.py; do $(BIN)/python $$tool || exit 1; done

clean:
	rm -rf $(VENV) outputs
