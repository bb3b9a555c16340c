# Bezel's commands; `make` alone lists them. Each sets up what it needs, once, in .venv,
# which belongs to this file: a half-made or moved one is thrown away and made again.

PYTHON ?= python3
MODEL =
HOST =
PORT =
ARGS =

# Its wheel has Gemma 4's chat templates; what it needs to train models isn't wanted.
TEMPLATES = trl==1.16.0

EXTRAS_serve = cpu,default-model
EXTRAS_test = $(EXTRAS_serve),otel,plot,test
EXTRAS_dev = $(EXTRAS_test),dev

# dev brings all that test needs, and test all that serve needs.
STAMPS_serve = .venv/.installed-serve
STAMPS_test = $(STAMPS_serve) .venv/.installed-test
STAMPS_dev = $(STAMPS_test) .venv/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help serve install test check lint types format docs size audit kernels-aot gpu-check clean
.NOTPARALLEL:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

serve: $(if $(filter-out default,$(MODEL)),.venv/.installed-serve,install) ## serve a model: MODEL=default HOST=127.0.0.1 PORT=8000 ARGS="--flag …"
	@exec .venv/bin/bezel serve $(if $(MODEL),"$(MODEL)") $(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)") $(ARGS)

install: .venv/.installed-serve ## set up .venv/bin/bezel and the default model, start nothing
	@.venv/bin/python -m bezel.engine.default_model

test: .venv/.installed-test ## run the tests: ARGS="-k scheduler" picks some
	.venv/bin/python -m pytest $(ARGS)

check: lint types test ## what has to pass before a change goes in

lint: .venv/.installed-dev ## ruff: rules and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# mypy can't see that `bezel` is mapped to this folder, so it gets a `bezel` made of links.
types: .venv/.installed-dev ## mypy, strict
	@mkdir -p build/typed/bezel
	@for layer in server engine kernels; do ln -sfn ../../../$$layer build/typed/bezel/$$layer; done
	.venv/bin/mypy

format: .venv/.installed-dev ## rewrite the code in the project's format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/.installed-serve ## write the generated pages and tables in docs anew
	.venv/bin/python docs/generate.py
	.venv/bin/python docs/generate_http_api.py
	.venv/bin/python docs/generate_metrics.py

size: ## lines per folder and module
	@$(PYTHON) benchmarks/size.py

audit: .venv/.installed-serve ## ask an advisory service about known vulnerabilities of what is installed
	.venv/bin/python .ci/audit.py $(ARGS)

kernels-aot: .venv/.installed-test ## compile all kernels for all GPUs, on none: ARGS=--update writes the table anew
	.venv/bin/python benchmarks/kernels_aot.py $(ARGS)

gpu-check: .venv/.installed-test ## on a GPU: kernel tests, parity, CUDA graphs, timings, all into gpu-check.json
	.venv/bin/python benchmarks/gpu_check.py $(ARGS)

clean: ## back to a fresh checkout (the model cache in ~/.cache/bezel stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment remembers its place, so one that was moved or copied is of no use.
ifneq ($(shell test -x .venv/bin/python && cat .venv/.created 2>/dev/null),$(CURDIR))
$(shell rm -f .venv/.created)
endif

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Bezel needs Python 3.11 or newer; if you have one, name it: make … PYTHON=python3.12"; \
	  exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) can't make virtual environments; on Debian or Ubuntu: apt install python3-venv"; \
	  exit 1; } >&2
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@echo "$(CURDIR)" >$@

# A stamp is written only when all is done; whatever interrupts pip, the next run repeats it.
$(STAMPS_dev): .venv/.installed-%: pyproject.toml .venv/.created
	@echo "Installing Bezel into .venv (once; PyTorch makes it take a minute or more) …"
	@if [ -t 1 ]; then quiet=; else quiet="--quiet --progress-bar off"; fi; \
	  .venv/bin/python -m pip install --disable-pip-version-check $$quiet -e '.[$(EXTRAS_$*)]'
	$(if $(filter serve,$*),,@.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(TEMPLATES))
	@touch $(STAMPS_$*)
