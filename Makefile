# Two commands do everything on a fresh machine with Python 3.11 or later, make and git: `make demo` and `make test`.
PYTHON ?= python3
PIP = -m pip install -q -c constraints.txt
JOBS ?= 2
# A thread for each test process, of which there are as many as cores.
test test-heavy test-oldest nightly mutants: export OMP_NUM_THREADS = 1

# The oldest environment runs in the oldest Python that is here: python3.10 by name, pyenv's, or else the one above.
OLDEST_PYTHON ?= $(shell for python in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python $(PYTHON); do \
	if $$python -c "" 2> /dev/null; then echo $$python; break; fi; done)

.PHONY: help lint test test-all test-heavy test-oldest demo bench readme readme-write tables mutants nightly clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

lint:  ## ruff, mypy, whether Python 3.10 has what is used, and whether the pages' tables are those of docs/evidence
lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/vermin --target=3.10- --violations --no-tips precision_policy hydra_plugins conf examples
	.venv/bin/python docs/tables.py --check

test:  ## lint, type-check and test with Hydra 1.3.8 and 1.4.0rc3: about 15 minutes on 2 cores
test: lint .venv/ready .venv-1.4/ready
	@echo "== Hydra 1.3.8 =="
	.venv/bin/pytest -n $(JOBS) -m "not heavy"
	@echo "== Hydra 1.4.0rc3: what a version of Hydra can change =="
	.venv-1.4/bin/python .venv/bin/pytest -n $(JOBS) -m "not once and not heavy" --ignore tests/estimate

test-all:  ## beside that Ray, Optuna, DeepSpeed and the oldest torch and Hydra: 5 GB of downloads, about 15 minutes more
test-all: test test-heavy test-oldest

test-heavy: .venv-heavy/ready
	@echo "== Ray, Optuna, DeepSpeed =="
	.venv-heavy/bin/pytest -n $(JOBS) tests/applications/test_heavy.py

test-oldest:  ## composition, Hydra and the job with torch 2.4.0, Hydra 1.3.0 and Python 3.10, where it is there
test-oldest: .venv-oldest/ready
	@echo "== oldest: torch 2.4.0, Hydra 1.3.0, $$(.venv-oldest/bin/python --version) =="
	.venv-oldest/bin/pytest -n $(JOBS) -m "not once and not heavy and not newest" tests/hydra tests/composition
	.venv-oldest/bin/pytest -n $(JOBS) -m "not newest" tests/job

demo:  ## the main job: fine-tune a small checkpoint as is and with the policy, three seeds each: three minutes on 2 cores
demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py $(CURDIR)/.demo

readme:  ## check that README's transcripts are what their commands print
readme: .venv/ready
	.venv/bin/python docs/readme.py

readme-write: .venv/ready
	.venv/bin/python docs/readme.py --write

tables:  ## write tables and pictures of the pages from docs/evidence/*.csv
tables: .venv/ready
	.venv/bin/python docs/tables.py
	.venv/bin/python benchmarks/plots.py

bench:  ## what the policy costs; ratios within one run
bench: .venv/ready
	.venv/bin/python benchmarks/startup.py
	.venv/bin/python benchmarks/overhead.py
	.venv/bin/python benchmarks/estimate.py
	.venv/bin/python benchmarks/checkpoint.py

nightly:  ## 10,000 generated config trees
nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly .venv/bin/pytest -n $(JOBS) tests/composition/test_any_config.py

mutants:  ## change the code in thousands of small ways and count which changes the tests notice: an hour or more
mutants: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" mutmut run --max-children $(JOBS)
	.venv/bin/python tests/mutants.py

clean:  ## remove all environments and outputs
	rm -rf .venv .venv-* .demo build dist *.egg-info

# torch first, pinned: an unpinned one, or another package's wish for a newer one, is gigabytes of CUDA.
.venv/ready: pyproject.toml constraints.txt requirements/dev.txt
	@echo "== installing .venv: torch 2.13.0, Hydra 1.3.8, transformers, Lightning and others: 2.2 GB, about 2 minutes =="
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) torch==2.13.0
	.venv/bin/python $(PIP) hydra-core==1.3.8 triton -r requirements/dev.txt
	.venv/bin/python $(PIP) -e .
	touch $@

# Its own Hydra and OmegaConf, and everything else from .venv: the second gigabytes are not worth their minutes.
.venv-1.4/ready: .venv/ready
	@echo "== installing .venv-1.4: Hydra 1.4.0rc3 over what .venv has =="
	$(PYTHON) -m venv .venv-1.4
	.venv-1.4/bin/python -m pip install -q hydra-core==1.4.0rc3 omegaconf==2.4.1rc1
	.venv-1.4/bin/python -m pip install -q --no-deps -e .
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$(.venv-1.4/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/the-rest.pth"
	touch $@

# DeepSpeed's build looks for torch, so it is there before, and compiles nothing ahead of its use.
.venv-heavy/ready: VENV_PYTHON = $(PYTHON)
.venv-oldest/ready: VENV_PYTHON = $(OLDEST_PYTHON)
.venv-heavy/ready .venv-oldest/ready: .venv-%/ready: pyproject.toml requirements/%.txt
	@echo "== installing $(@D): what requirements/$*.txt pins, a few GB, some minutes =="
	$(VENV_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $$(grep -E '^(torch|setuptools|wheel)==' requirements/$*.txt)
	DS_BUILD_OPS=0 $(@D)/bin/python -m pip install -q --no-build-isolation -r requirements/$*.txt
	$(@D)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

.venv-demo/ready: pyproject.toml constraints.txt
	@echo "== installing .venv-demo: torch 2.13.0, Hydra 1.3.8, transformers: 1.2 GB, about 1 minute =="
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP) torch==2.13.0
	.venv-demo/bin/python $(PIP) hydra-core==1.3.8 transformers numpy .
	touch $@
