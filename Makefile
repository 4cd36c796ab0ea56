# make demo   see it work, under three minutes        make demo ARGS="--lambdas 0 10 --steps 30"
# make space  the same models side by side, on a page of this machine: http://127.0.0.1:7860
# make test   lint, types and all tests             make lint   ruff and mypy only        make clean
#
# The virtual environment is made by itself, and again when setup.cfg or constraints.txt changes. Without a GPU, spare yourself
# the CUDA packages: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

demo: $(READY)
	$(BIN)/hf-ewc demo --resume $(ARGS)

space: $(READY)
	$(BIN)/hf-ewc compare $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist hf_ewc.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find hf_ewc tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("transformers 5 needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo space test lint clean
