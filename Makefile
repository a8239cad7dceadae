# Two commands on a bare machine: `make demo` and `make test`; on one with a GPU `make gpu` and `make gpu-evidence`.
# All set up .venv first.
PYTHON ?= python3
# Processes that run the tests, a thread each.
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test gpu gpu-evidence lint docs clean

demo: $(READY)
	rm -rf nvit-demo
	$(RUN) -m nvit demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable --durations=15

# All that a GPU shows, in at most 8 minutes: build, tests, kernels, steps, latencies; CSVs into benchmarks/results.
gpu: $(READY)
	$(RUN) -m benchmarks.gpu

# DeiT-Ti pruned on Tiny-ImageNet beside its peers, in at most 10 minutes of a GPU; NVIT_DATA names the folder of data.
gpu-evidence: $(READY)
	$(RUN) -m pip install --quiet 'torch-pruning>=1.6,<1.7'
	$(RUN) -m benchmarks.accuracy.gpu_evidence

# docs/ as a site, API included, into site/; fails on a link that leads nowhere.
docs: $(READY)
	$(RUN) -m mkdocs build --strict

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# torch first, so that the native parts are built against the torch that will run them.
$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit("nvit needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	$(RUN) -m pip install --quiet 'torch>=2.11'
	$(RUN) -m pip install --quiet --no-build-isolation -e '.[test]'
	touch $(READY)

clean:
	rm -rf build dist site *.egg-info nvit-demo nvit-run
