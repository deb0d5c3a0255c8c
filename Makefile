# make test   install into .venv and run the tests (FBN_PLUGIN_DATA=folder: also those on the real data sets in it)
# make check  a selection of them that ends within two minutes on two cores: one quick file or more of each room
# make test-oldest
#             install the oldest versions that setup.py allows into .venv-oldest and run the tests with them
#             (ARGS="tests/layers -x": pytest's arguments); PyTorch 2.6 wants Python 3.10 to 3.13
# make smoke  run the smallest scale of every table and figure of the papers: seconds each, without downloads
# make demo   install into .venv, train a small Mask R-CNN with BN and with FBN, write a report below demo_output/
#             (DATA=folder: on a COCO-format data set of your own; ARGS="SOLVER.MAX_ITER 300": config overrides)
# make docs   install into .venv and build the documentation: build/docs/index.html; a warning is an error

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
DATA ?=
OUTPUT ?= demo_output
ARGS ?=

# Quick files, of each room at least one.
CHECKED := tests/test_internals.py tests/test_modules.py tests/test_public.py tests/test_registry.py \
	tests/ops/test_dispatch.py tests/ops/test_functional.py tests/ops/test_library.py tests/ops/cpu/test_accuracy.py \
	tests/ops/cuda/test_compiler.py tests/ops/triton/test_triton.py tests/layers/test_filtered_batch_norm.py \
	tests/layers/test_filtered_group_norm.py tests/layers/test_frozen_batch_norm.py tests/surgery/test_convert.py \
	tests/surgery/test_input_norm.py tests/training/test_parameter_groups.py \
	tests/training/test_gamma_initialization.py tests/training/test_evaluation_modes.py tests/models/test_models.py \
	tests/analysis/test_landscape.py tests/analysis/test_bands.py tests/engine/inspection \
	tests/frameworks/test_pytorch.py tests/frameworks/test_torchvision.py tests/frameworks/test_timm_models.py \
	tests/engine/files tests/engine/run tests/engine/data/test_sampling.py tests/engine/data/test_coco_eval.py \
	tests/engine/data/test_image_data.py tests/engine/reports/test_report.py tests/engine/studies/test_seeds.py \
	tests/engine/studies/test_study_file.py tests/engine/studies/test_jobs.py \
	tests/engine/benchmark/test_benchmark_targets.py tests/engine/torchvision/test_detectron2_weights.py \
	tests/engine/classification/test_classification.py tests/engine/detectron2/test_values.py \
	tests/sweeps/test_images.py tests/tools/test_check_peer_tests.py
INTERPRETER := tests/ops/triton/test_triton.py::test_kernels_in_the_interpreter

# Threads that wait give their core away. Without this, one other process on the machine makes small layers many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: test check test-oldest smoke demo docs lint clean

PACKAGED := setup.py pyproject.toml fbn_plugin/ops/cpu/kernels.cpp $(wildcard fbn_plugin/ops/cpu/*.h)
PYTEST = -m pytest -n 2 --dist loadfile

$(VENV)/installed: CONSTRAINTS := constraints.txt
$(OLDEST)/installed: CONSTRAINTS := constraints-oldest.txt
%/installed: $(PACKAGED) constraints.txt constraints-oldest.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $@

test: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST)

check: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) --deselect $(INTERPRETER) $(CHECKED)

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python $(PYTEST) $(ARGS)

smoke: $(VENV)/installed
	$(VENV)/bin/python tools/reproduce.py run all --scale smoke

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
