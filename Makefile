# make demo, make test: all that a fresh clone needs; each makes the environment in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
# another torch: make TORCH_SPEC='torch==2.13.0+cpu' (or a wheel's path), where the plain one would bring CUDA
TORCH_SPEC ?= torch==2.13.0
EXTRAS := torch,nuscenes,prune,quantize,export,deploy,monitor,dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
STAMP := $(VENV)/.bevorin-installed

.PHONY: help env demo test check docs lab clean

help:
	@echo 'make demo   the whole way with the demo model, from checkpoint to bundle: runs/demo/report/report.html'
	@echo 'make test   all checks, the notebooks with them'
	@echo 'make check  all checks but the notebooks'
	@echo 'make docs   the site in _docs/, and README.md'
	@echo 'make lab    JupyterLab in nbs/'
	@echo 'make env    only the environment, in $(VENV)/'
	@echo 'make clean  remove what these made, the environment too'

env: $(STAMP)

$(STAMP): constraints.txt setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10))' || { echo 'bevorin needs Python 3.10 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'installing into $(VENV) (some minutes)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH_SPEC)'
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	@$(PIP) -c $(VENV)/constraints.txt --no-deps pytorch-quantization
	@touch $@

demo: $(STAMP)
	$(BIN)/bevorin run recipes/demo.yaml

test: $(STAMP)
	@$(BIN)/python .ci/check.py

check: $(STAMP)
	@$(BIN)/python .ci/check.py --but notebooks_run

docs: $(STAMP)
	@$(BIN)/python .ci/docs.py

lab: $(STAMP)
	@cd nbs && $(abspath $(BIN))/jupyter lab

clean:
	rm -rf $(VENV) runs _docs _proc build dist bevorin.egg-info nbs/nbdev.yml
