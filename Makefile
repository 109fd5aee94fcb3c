# `make chat` and `make test` need nothing but Python 3.11 or newer (with venv) and a package index.
# Both keep all they make in .venv, and install again only when the packaging or the set of files has changed.

VENV := .venv
BIN := $(VENV)/bin
# The first Python on the path that runs and is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)
# A strict editable install links the files that there are: a new file needs a new install.
DIGEST := $(shell (find engine formats models cli server -name '*.py' -o -name py.typed | sort; cat setup.cfg setup.py pyproject.toml) | cksum | tr ' ' -)
RUNTIME := $(VENV)/installed-runtime-$(DIGEST)
SERVING := $(VENV)/installed-serving-$(DIGEST)
TESTING := $(VENV)/installed-testing-$(DIGEST)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=strict
CLIENTS := .venv-clients
RAY := .venv-ray
PACKERS := .venv-packers
DIST := .venv-dist
# Not editable: an app is packed from what is in the files, too.
PACKERS_READY := $(PACKERS)/installed-$(DIGEST)-$(shell find engine formats models cli server -type f -not -name '*.pyc' \
	| LC_ALL=C sort | xargs cat | cksum | tr ' ' -)
WORKERS ?= 2
SERVE_OPTIONS ?=

# `make test-lowest` installs what setup.cfg allows at its lowest, which goes with the lowest Python. CI does not run it:
# it takes as long as `make test` once more, and what it finds changes only when a bound or a dependency does.
LOWEST := .venv-lowest
LOWEST_PYTHON ?= $(shell command -v python3.11 || echo $(PYTHON))
LOWEST_TESTS ?= tests

# What `make bench` measures: models (paths or names), types of random models of 1.2 billion weights, and the engines to
# compare with (Pythons as `qrun bench --compare` takes them). None of them is needed.
BENCH_MODELS ?=
BENCH_MIXES ?= q4_k_m
BENCH_PEERS ?=
BENCH_OPTIONS ?= --depths 0 4096 --seqs 8 --threads 1 2

# What `make bench-serve` measures: models, the path of a llama-server to compare with (or nothing), and options of
# tests/bench/serve_load.py.
SERVE_MODELS ?= smollm2:135m
SERVE_PEER ?=
SERVE_BENCH_OPTIONS ?=

# What `make bench-convert` measures: a model in F16, BF16 or F32, an importance matrix for it, and llama-quantize to
# compare with. All but the model may be left out.
CONVERT_MODEL ?=
CONVERT_IMATRIX ?=
CONVERT_PEER ?=

# What `make bench-quantise` measures: a model in F16, BF16 or F32, a text to calibrate by and another to judge by, the
# folder with llama.cpp's programs to compare with (or nothing), and options of tests/bench/calibrate_table.py.
QUANTISE_MODEL ?=
QUANTISE_TEXT ?=
QUANTISE_JUDGE ?=
QUANTISE_PEER ?=
QUANTISE_OPTIONS ?=

# What `make report` compares the speed of random models with, as `qrun bench --compare` takes it; nothing by default.
REPORT_PEER ?=

# The model that the apps of `make test-packers` load, and options of tests/bench/packers.py.
PACKERS_MODEL ?= smollm2:135m
PACKERS_OPTIONS ?=

# How long `make soak-serve` goes on, and with what; the default model where none is named.
SOAK_MINUTES ?= 20
SOAK_MODEL ?=

.PHONY: help chat serve test test-forms test-clients test-ray test-packers test-lowest report soak soak-serve bench bench-serve bench-convert bench-quantise docs dist clean

help:
	@echo "make chat   install, fetch the default model, talk with it"
	@echo "make serve  the same over HTTP, for OpenAI's, Anthropic's and Ollama's clients; SERVE_OPTIONS go to qrun serve"
	@echo "make test   install and run all checks: ruff, mypy, pytest"
	@echo "make test-forms  kernels of all types in all instruction sets, of which make test leaves some out"
	@echo "make report  what is claimed of models: matches, bits, types, names; with REPORT_PEER=... speed"
	@echo "make test-clients  the server against the clients of OpenAI, Anthropic and Ollama, and libraries over them"
	@echo "make test-ray  two replicas on Ray Serve (some minutes)"
	@echo "make test-packers  apps of PyInstaller, cx_Freeze and Nuitka, run on their own (an hour or so)"
	@echo "make soak   load and drop models a thousand times in all ways, beside other work too (some minutes)"
	@echo "make soak-serve  the server under clients of all manners, SOAK_MINUTES=20 of them"
	@echo "make test-lowest  pytest with the lowest versions of everything that setup.cfg allows; LOWEST_TESTS names some"
	@echo "make bench  the table of speeds; BENCH_MODELS, BENCH_MIXES, BENCH_PEERS, BENCH_OPTIONS say of what"
	@echo "make bench-serve SERVE_MODELS=... SERVE_PEER=llama-server  the table of the server under load"
	@echo "make bench-convert CONVERT_MODEL=model-f16.gguf  the table of what converting loses, and how long it takes"
	@echo "make bench-quantise QUANTISE_MODEL=... QUANTISE_TEXT=... QUANTISE_JUDGE=...  what calibrated files lose, by type and method"
	@echo "make docs   write the generated parts of the documentation anew, and the library's reference to docs/html"
	@echo "make dist   what is published: a wheel and its sources in dist/, checked, installed and asked a question"
	@echo "make clean  delete what these made, but no models"

chat: $(RUNTIME)
	@$(BIN)/qrun chat

serve: $(SERVING)
	@$(BIN)/qrun serve $(SERVE_OPTIONS)

# The type checker, which is one process for half a minute, runs beside the tests; what it says comes after them.
test: $(TESTING)
	$(BIN)/ruff check
	$(BIN)/mypy >$(VENV)/mypy.txt 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.txt; exit $$((tests ? tests : types))

test-forms: $(TESTING)
	QRUN_TEST_FORMS=1 $(BIN)/python -m pytest -n $(WORKERS) $(addprefix tests/unit/test_,kernels_matmul.py kernels_attention.py operations.py arm_emulated.py targets.py)

report: $(TESTING)
	@$(BIN)/python -m tests.report $(addprefix --peer ,$(REPORT_PEER))

# Some minutes: Ray alone takes half a one to start.
test-ray: $(RAY)/installed-$(DIGEST)
	$(RAY)/bin/python -m pytest tests/ray_serve

# In an environment of its own: these libraries bring some two hundred others.
test-clients: $(CLIENTS)/installed-$(DIGEST)
	$(CLIENTS)/bin/python -m pytest -W ignore tests/clients

# In an environment with nothing that the apps do not need: packers take along what they find. Not editable, as an app's.
test-packers: $(TESTING) $(PACKERS_READY)
	QRUN_TEST_PACKERS=1 $(BIN)/python -m pytest tests/unit/test_frozen.py
	$(PACKERS)/bin/python tests/bench/packers.py $(PACKERS_MODEL) $(PACKERS_OPTIONS)

soak: $(TESTING)
	QRUN_TEST_LOADS=1000 $(BIN)/python -m pytest tests/unit/test_lifetimes.py

soak-serve: $(SERVING)
	$(BIN)/python -m tests.soak_serve $(SOAK_MODEL) --minutes $(SOAK_MINUTES)

test-lowest:
	@rm -rf $(LOWEST)
	@$(LOWEST_PYTHON) -m venv $(LOWEST) </dev/null
	@$(LOWEST)/bin/python .ci/lowest.py >$(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(LOWEST)/lowest.txt
	$(PIP_INSTALL:$(BIN)/%=$(LOWEST)/bin/%) --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) $(LOWEST_TESTS)

bench: $(RUNTIME)
	@$(BIN)/python tests/bench/table.py $(BENCH_MODELS) --random $(BENCH_MIXES) \
		$(addprefix --peer ,$(BENCH_PEERS)) $(BENCH_OPTIONS)

bench-serve: $(SERVING)
	@$(BIN)/python tests/bench/serve_load.py $(SERVE_MODELS) $(addprefix --peer ,$(SERVE_PEER)) $(SERVE_BENCH_OPTIONS)

bench-convert: $(RUNTIME)
	@$(BIN)/python tests/bench/quantize_table.py $(CONVERT_MODEL) \
		$(addprefix --imatrix ,$(CONVERT_IMATRIX)) $(addprefix --quantize ,$(CONVERT_PEER))

bench-quantise: $(TESTING)
	@$(BIN)/python tests/bench/calibrate_table.py $(QUANTISE_MODEL) --calibrate $(QUANTISE_TEXT) \
		--judge $(QUANTISE_JUDGE) $(addprefix --peer ,$(QUANTISE_PEER)) --types q8_0 q6_k q5_k_m q4_k_m q3_k_m q2_k \
		--methods plain imatrix awq gptq both --mixes q4_k_m q3_k_m --plot quantising.svg $(QUANTISE_OPTIONS)

docs: $(RUNTIME)
	@$(BIN)/python -m qrun.cli.docs
	@$(PIP_INSTALL) --editable '.[docs]' </dev/null
	@$(BIN)/python docs/build.py

# The wheel is made from the sources' archive, not from this folder, and answers from elsewhere, in an environment with
# nothing else. That archive would hold whatever lies around here, so all must be committed.
dist:
	@left="$$(git status --porcelain 2>/dev/null)"; test -z "$$left" || { echo "not committed, and would be published:" \
		"$$left" >&2; exit 1; }
	@rm -rf $(DIST) dist
	@$(PYTHON) -m venv $(DIST)/making </dev/null
	@$(DIST)/making/bin/python -m pip install --quiet --disable-pip-version-check build twine </dev/null
	@$(DIST)/making/bin/python -m build --outdir dist . >$(DIST)/build.log 2>&1 || { cat $(DIST)/build.log >&2; exit 1; }
	@$(DIST)/making/bin/python -m twine --no-color check --strict dist/*
	@$(PYTHON) -m venv $(DIST)/trying </dev/null
	@$(DIST)/trying/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl </dev/null
	@cd $(DIST) && trying/bin/qrun --version && echo "What is the capital of France?" | trying/bin/qrun chat

clean:
	rm -rf $(VENV) $(DIST) $(LOWEST) $(CLIENTS) $(RAY) $(PACKERS) build dist docs/html *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module was not found;" \
		"name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..." >&2
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) </dev/null
	@touch $@

# Standard input is the chat's: nothing here may read from it.
$(RUNTIME): | $(VENV)/made
	@echo "Installing qrun into $(VENV) ..." >&2
	@rm -rf $(VENV)/installed-* build
	@$(PIP_INSTALL) --editable . </dev/null
	@touch $@

$(SERVING): | $(VENV)/made
	@echo "Installing qrun and its server into $(VENV) ..." >&2
	@rm -rf $(VENV)/installed-* build
	@$(PIP_INSTALL) --editable '.[server,grammar]' </dev/null
	@touch $@ $(RUNTIME)

$(TESTING): | $(VENV)/made
	@echo "Installing qrun and its tests' needs into $(VENV) ..." >&2
	@rm -rf $(VENV)/installed-* build
	@$(PIP_INSTALL) --editable '.[test]' </dev/null
	@touch $@ $(RUNTIME) $(SERVING)

$(CLIENTS)/installed-$(DIGEST):
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS) </dev/null
	@rm -rf $(CLIENTS)/installed-*
	@$(PIP_INSTALL:$(BIN)/%=$(CLIENTS)/bin/%) --editable '.[test,clients]' </dev/null
	@touch $@

$(PACKERS_READY):
	@test -x $(PACKERS)/bin/python || $(PYTHON) -m venv $(PACKERS) </dev/null
	@rm -rf $(PACKERS)/installed-* build/lib
	@$(PACKERS)/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps . </dev/null
	@$(PACKERS)/bin/python -m pip install --quiet --disable-pip-version-check '.[packers]' </dev/null
	@touch $@

$(RAY)/installed-$(DIGEST):
	@test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY) </dev/null
	@rm -rf $(RAY)/installed-*
	@$(PIP_INSTALL:$(BIN)/%=$(RAY)/bin/%) --editable '.[test,ray]' </dev/null
	@touch $@
