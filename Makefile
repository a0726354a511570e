# Everything that people and CI do with this repository. `make help` lists it.

CARGO ?= cargo
# What tests, demo and benches use besides Rust, as Debian packages.
PACKAGES := gcc ipset iptables iproute2 libc6-dev nftables prometheus util-linux
SHUNT := target/debug/shunt
TARGET = $(shell rustc -vV | sed -n 's/^host: //p')

.PHONY: help demo test lint bench ebpf image deps build

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: deps ## Shows Shunt at work: a node, a client and three pods in network namespaces (needs root)
	$(CARGO) build -p shunt -p shunt-harness
	target/debug/shunt-demo $(SHUNT) examples

test: deps ## Runs all tests (needs root for those in network namespaces)
	second=$$(tests/fetch-nft target/nft-1.1.3) && \
	SHUNT_REQUIRE_KERNEL=1 SHUNT_NFT_BINARIES="nft:$$second" $(CARGO) test --workspace

lint: ## Formatting, clippy, licences and the direction of dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --workspace check licenses bans sources

bench: deps ## Measures speed and memory at 10,000 Services (see benches/README.md)
	$(CARGO) build --release -p shunt -p shunt-bench
	target/release/shunt-bench target/release/shunt

ebpf: ## Rebuilds the eBPF programs
	@echo "This version has no eBPF programs: there is nothing to build."

image: ## Builds the container image, target/shunt-image.tar (an OCI archive; no engine needed)
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release -p shunt --target $(TARGET)
	deploy/build-image target/$(TARGET)/release/shunt target/shunt-image.tar

deps:
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi
