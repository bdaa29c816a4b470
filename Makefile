# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment of its own. `make demo` and `make test` install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHARED ?= ../shared
# Without a GPU the CPU builds of torch and vLLM are installed (see README.md); with one, the usual ones.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH := 2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of pip's hundreds of lines, those that tell where it is: the large downloads, and that it unpacks.
NEWS := sed -un -e 's/^ *\(Downloading\|Using cached\) \(.*[0-9][0-9]\.[0-9] MB)\)/   \1 \2/p' \
  -e 's/^Installing collected packages:.*/   unpacking/p' -e 's/^ERROR/&/p'
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# Where pip does not find the CPU build of torch by itself, name PyTorch's index of CPU wheels here.
TORCH_INDEX ?=

.PHONY: setup tools serve demo test lint docs image clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml deploy/cpu/pyproject.toml
	@echo "Setting up $(VENV), once: a few minutes, most of it pip fetching and unpacking packages."
	@$(PYTHON) -m venv $(VENV) && $(PIP) install --quiet --upgrade pip
ifeq ($(GPU),)
	@echo "1 of 4: torch, its CPU build"
	@$(PIP) install "torch==$(TORCH)+cpu" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) | $(NEWS)
	@echo "2 of 4: vLLM, its CPU build"
	@$(PIP) install ./deploy/cpu | $(NEWS)
	@echo "3 of 4: this package, and what its tests and the demo need"
else
	@echo "1 of 2: this package with vLLM and torch for CUDA, and what tests and the demo need"
endif
	@$(PIP) install --editable '.[dev]' | $(NEWS)
ifeq ($(GPU),)
	@# Last, since every install brings them back: vLLM requires builds that do not fit the CPU build of torch, and
	@# with them transformers can not be imported.
	@$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@echo "the last: compiling the CPU workers' kernels (a minute), unpacking the demo's model"
	@$(BIN)/python -m vllm_retrieval_attn.demo --prepare >/dev/null 2>$(VENV)/prepare.log \
	  || echo "not done ($(VENV)/prepare.log says why); the first start will"
	@touch $@

serve: setup  ## serve the demo's model and its page until Ctrl-C
	@$(BIN)/python -m vllm_retrieval_attn.demo --serve

demo: setup  ## serve SmolLM2 and ask it about a long document
	@$(BIN)/python -m vllm_retrieval_attn.demo

tools: setup  ## helm, checkov, a browser and promtool for tests, where they can be had; without them these tests are skipped
	@# checkov in an environment of its own: it wants other versions of much.
	@[ -x $(VENV)/policy/bin/checkov ] || { echo "installing checkov, which checks the chart (a minute)"; \
	  $(PYTHON) -m venv $(VENV)/policy && $(VENV)/policy/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30; } \
	  || echo "no checkov: the chart's policy check is skipped"
	@[ -x $(BIN)/helm ] || $(BIN)/python tests/tools/fetch_helm.py || echo "no helm: the chart's tests are skipped"
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  for pair in chromium-headless-shell:chromium-headless-shell promtool:prometheus; do \
	    command -v $${pair%:*} >/dev/null || missing="$$missing $${pair#*:}"; \
	  done; \
	  if [ -n "$$missing" ]; then \
	    echo "installing$$missing for the tests"; \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing) \
	      >/dev/null || echo "not installed: their tests are skipped"; \
	  fi; \
	fi

test: setup tools lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup  ## the documentation as a site, in site/
	@$(BIN)/mkdocs build --quiet --strict --config-file deploy/docs/mkdocs.yml
	@echo "site/index.html"

image: setup  ## build the CPU image (buildah or docker, as root) and ask it something
	deploy/image.sh "$$($(BIN)/python -m vllm_retrieval_attn.bench.models)"

clean:
	rm -rf $(VENV)
