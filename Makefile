# Two commands do everything on a fresh machine with Python, make and git: `make demo` and `make test`.
PYTHON ?= python3
PIP = -m pip install -q -c constraints.txt
JOBS ?= 2

.PHONY: help test test-all demo bench readme readme-write mutants nightly clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

test:  ## lint, type-check and test with Hydra 1.3.8 and 1.4.0rc3: about 10 minutes on 2 cores
test: .venv/ready .venv-1.4/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	@echo "== Hydra 1.3.8 =="
	.venv/bin/pytest -n $(JOBS) -m "not heavy"
	@echo "== Hydra 1.4.0rc3 =="
	.venv-1.4/bin/pytest -n $(JOBS) -m "not once and not heavy"

test-all:  ## beside that Ray, Optuna, DeepSpeed and the oldest torch and Hydra: 2 GB of downloads, about 10 minutes more
test-all: test .venv-heavy/ready .venv-oldest/ready
	@echo "== Ray, Optuna, DeepSpeed =="
	.venv-heavy/bin/pytest -n $(JOBS) tests/applications/test_heavy.py
	@echo "== oldest: torch 2.6.0, Hydra 1.3.2 =="
	.venv-oldest/bin/pytest -n $(JOBS) -m "not once and not heavy"

demo:  ## the main job: fine-tune a small checkpoint as is and with the policy, three seeds each: two minutes on 2 cores
demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py $(CURDIR)/.demo

readme:  ## check that README's transcripts are what their commands print
readme: .venv-demo/ready
	.venv-demo/bin/python docs/readme.py

readme-write: .venv-demo/ready
	.venv-demo/bin/python docs/readme.py --write

bench:  ## what the policy costs; ratios within one run
bench: .venv/ready
	.venv/bin/python benchmarks/startup.py
	.venv/bin/python benchmarks/overhead.py
	.venv/bin/python benchmarks/estimate.py
	.venv/bin/python benchmarks/checkpoint.py

nightly:  ## 10,000 generated config trees
nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly .venv/bin/pytest -n $(JOBS) tests/composition/test_any_config.py

mutants:  ## change the code in thousands of small ways and count which changes the tests notice: under an hour
mutants: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 mutmut run --max-children $(JOBS)
	.venv/bin/python tests/mutants.py

clean:  ## remove all environments and outputs
	rm -rf .venv .venv-* .demo build dist *.egg-info

# torch first, pinned: an unpinned one, or another package's wish for a newer one, is gigabytes of CUDA.
# Triton's interpreter runs the kernels; one of the two environments is enough for that.
.venv/ready: HYDRA = 1.3.8
.venv/ready: TRITON = triton
.venv-1.4/ready: HYDRA = 1.4.0rc3
.venv/ready .venv-1.4/ready: pyproject.toml constraints.txt requirements/dev.txt
	@echo "== installing $(@D): torch 2.13.0 (CPU), Hydra $(HYDRA), transformers, Lightning and others: 1.6 GB, about 2 minutes =="
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) torch==2.13.0
	$(@D)/bin/python $(PIP) hydra-core==$(HYDRA) $(TRITON) -r requirements/dev.txt
	$(@D)/bin/python $(PIP) -e .
	touch $@

# DeepSpeed's build looks for torch, so it is there before, and compiles nothing ahead of its use.
.venv-heavy/ready .venv-oldest/ready: .venv-%/ready: pyproject.toml requirements/%.txt
	@echo "== installing $(@D): what requirements/$*.txt pins, a few GB, some minutes =="
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $$(grep -E '^(torch|setuptools|wheel)==' requirements/$*.txt)
	DS_BUILD_OPS=0 $(@D)/bin/python -m pip install -q --no-build-isolation -r requirements/$*.txt
	$(@D)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

.venv-demo/ready: pyproject.toml constraints.txt
	@echo "== installing .venv-demo: torch 2.13.0 (CPU), Hydra 1.3.8, transformers: 1.2 GB, about 1 minute =="
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP) torch==2.13.0
	.venv-demo/bin/python $(PIP) hydra-core==1.3.8 transformers numpy .
	touch $@
