# make test   install into .venv and run the tests
# make demo   install into .venv, train a small Mask R-CNN with BN and with FBN, write a report below demo_output/
#             (DATA=folder: on a COCO-format data set of your own; ARGS="SOLVER.MAX_ITER 300": config overrides)
# make docs   install into .venv and build the documentation: build/docs/index.html; a warning is an error

PYTHON ?= python3
VENV ?= .venv
DATA ?=
OUTPUT ?= demo_output
ARGS ?=

# Threads that wait give their core away. Without this, one other process on the machine makes small layers many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: test demo docs lint clean

$(VENV)/installed: setup.py pyproject.toml constraints.txt fbn_plugin/ops/cpu/kernels.cpp $(wildcard fbn_plugin/ops/cpu/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

demo: $(VENV)/installed
	$(VENV)/bin/python tools/demo.py --output "$(OUTPUT)" $(if $(DATA),--data "$(DATA)") $(ARGS)

$(VENV)/docs-installed: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(VENV)/docs-installed
	$(VENV)/bin/python -m sphinx --builder html --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	@echo "Open build/docs/index.html"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info fbn_plugin/ops/cpu/_kernels*
