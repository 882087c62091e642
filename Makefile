# kvxfer: `make demo` shows it work, `make test` proves it. `make help` lists the rest.
PREFIX ?= /usr/local
PROFILE_DIR := target/release
KVXFER := $(PROFILE_DIR)/kvxfer
# Without libclang and a C++ compiler everything but NIXL and CUDA still builds; scripts/features.sh says so in a sentence.
FEATURES = $(shell scripts/features.sh)

.DEFAULT_GOAL := help
.PHONY: help setup setup-test build demo test test-rust test-python lint fmt header bench bench-proxy demo-vllm test-vllm doctor install wheel fuzz doc clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test

build: setup ## the library and the command, release profile
	cargo build --release --workspace $(FEATURES)

nixl: ## NIXL from PyPI into the cache folder, for the nixl transport
	@scripts/install-nixl.sh || echo "nixl: not installed; everything else works without it"

nvrtc: ## NVIDIA's run-time compiler from PyPI into the cache folder, to check the GPU kernels
	@scripts/install-nvrtc.sh || echo "nvrtc: not installed; the kernels' PTX is not compared with their sources"

ptx: nvrtc ## regenerate the PTX of the GPU kernels
	KVXFER_UPDATE_PTX=1 cargo test -p kvxfer-core --lib the_shipped_ptx

demo: build nixl ## the main job: two prefillers, a decoder and the proxy answer prompts; a large cache over each transport
	KVXFER=$(CURDIR)/$(KVXFER) KVXFER_ENGINE=$(CURDIR)/$(PROFILE_DIR)/kvxfer-engine examples/disagg_prefill/demo.sh

test: setup-test nixl nvrtc test-rust test-python ## every test: Rust, C, C++, Python

test-rust:
	cargo test --workspace $(FEATURES)

test-python:
	scripts/test-python.sh

lint: ## formatting, and lints with warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --all-targets --no-default-features -- -D warnings

header: ## regenerate include/kvxfer.h
	KVXFER_UPDATE_HEADER=1 cargo test --test header

bench: build nixl ## the table of docs/performance.md; JSON and an HTML report land in build/
	@mkdir -p build
	$(KVXFER) bench --json build/bench.json --html build/bench.html

# A Python with fastapi, uvicorn, httpx, msgspec and pyzmq for the comparison; the one of demo-vllm has them.
PROXY_PYTHON ?= $(or $(wildcard $(or $(E2E_HOME),$(HOME)/.cache/kvxfer-e2e)/venv/bin/python),python3)

bench-proxy: setup ## the proxy against one in Python: requests/s, added latency, 1,000 streams, idle
	@mkdir -p build
	cargo run --release -p kvxfer-proxy --example proxy_bench -- --python $(PROXY_PYTHON) --json build/bench-proxy.json

doctor: build ## what this machine can do
	$(KVXFER) doctor

demo-vllm: setup-test build ## a real vLLM prefiller and decoder hand over a real cache through kvxfer (CPU, ~10 min the first time)
	scripts/demo-vllm.sh

test-vllm: setup-test test-python ## kvxfer's PD backend with real vLLM servers: tokens, faults, metrics (CPU, ~10 min)
	scripts/test-vllm.sh

test-gpu: setup-test nvrtc ## the tests of device memory on this machine's GPU, and the benchmark
	scripts/test-gpu.sh

install: build ## library, headers, pkg-config, CMake package and command into PREFIX (DESTDIR is honoured)
	scripts/install.sh $(PREFIX)

wheel: setup ## the release wheel with its manylinux tag, in dist/
	scripts/wheel.sh

fuzz: ## every decoder under libFuzzer for a minute each (needs cargo-fuzz and a nightly toolchain)
	scripts/fuzz.sh

doc: ## the Rust documentation
	cargo doc --workspace --no-deps

clean:
	cargo clean
	rm -rf build
