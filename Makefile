# aurora_vllm: `make demo` shows the loop, `make test` runs the tests, `make quality` lints. Everything runs in $(VENV).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
RUN    := $(VENV)/bin/python
VLLM   ?= 0.33.0
NEEDS  ?= orjson
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := aurora_vllm demo benchmarks tests tools

.PHONY: help setup model demo test compat quality docs format bench lock clean

help:            ## show this list
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:           ## make the environment from the lock file; nothing to do if it is up to date
	@$(PYTHON) tools/environment.py ensure $(VENV)

model: setup     ## build the demo's model, once per machine
	@$(RUN) -m demo.model

demo: model      ## serve, learn, swap and measure in at most 15 minutes; writes build/demo/
	@$(RUN) -m demo.run $(ARGS)

test: model      ## run the whole suite: at most 15 minutes on 2 cores
	@$(PYTEST) $(ARGS)

compat: model    ## run the integration tests on another vLLM's sources with the installed CPU kernels: VLLM=0.33.0
	@test -d build/vllm-$(VLLM) || $(RUN) -m tools.other_vllm $(VLLM) build/vllm-$(VLLM) $(NEEDS:%=--with %)
	@PYTHONPATH=$(CURDIR)/build/vllm-$(VLLM):$(CURDIR) $(PYTEST) tests/integration $(ARGS)

quality: setup   ## run ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: setup      ## write the pages and tables that are generated from code and results; tests compare them
	$(RUN) -m tools.settings_table
	$(RUN) -m tools.compatibility_table
	$(RUN) -m aurora_vllm.server.metrics > docs/metrics.md
	$(RUN) -m tools.dashboard
	$(RUN) -m benchmarks.results_page

format: setup    ## let ruff fix and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: model     ## run the short benchmarks; writes JSON to build/bench/
	@mkdir -p build/bench
	@set -e; for name in ring capture_overhead swap learning; do \
		echo "== $$name"; $(RUN) -m benchmarks.$$name --json build/bench/$$name.json; done

lock: setup      ## write the lock file from the environment
	@$(PYTHON) tools/environment.py freeze $(VENV) > $(VENV)/new.lock && cp $(VENV)/new.lock requirements/cpu.lock

clean:           ## remove what was built here; the model and compile caches stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -exec rm -rf {} +
