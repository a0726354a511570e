# Everything that people and CI do with this repository. `make help` lists it.

CARGO ?= cargo
# What tests, demo and benches use besides Rust, as Debian packages.
PACKAGES := gcc libc6-dev iproute2 nftables prometheus util-linux \
            user-mode-linux kmod ipvsadm ipset iptables
SHUNT := target/debug/shunt
# What `make bench` measures, and further arguments: make bench MODES=nftables BENCH='--parts latency'. A run
# of everything writes the table of goals, too.
MODES ?= nftables,iptables-legacy,iptables-nft,ebpf
BENCH ?=
TARGET = $(shell rustc -vV | sed -n 's/^host: //p')

.PHONY: help demo test guest lint bench ebpf image deps

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: deps ## Shows Shunt at work: a node, a client and three pods in network namespaces (needs root)
	$(CARGO) build -p shunt -p shunt-harness
	target/debug/shunt-demo $(SHUNT) examples

test: deps ## Runs all tests (needs root for those in network namespaces)
	second=$$(tests/fetch-nft target/nft-1.1.3) && \
	SHUNT_REQUIRE_KERNEL=1 SHUNT_NFT_BINARIES="nft:$$second" $(CARGO) test --workspace

guest: deps ## Runs a command in a kernel that has IPVS: make guest CMD='ipvsadm -L'
	@$(CARGO) build --quiet -p shunt-harness --bin shunt-guest
	@target/debug/shunt-guest sh -c "$$CMD"

lint: ## Formatting, clippy, licences, the direction of dependencies, and that the eBPF object is built from its sources
	$(CARGO) fmt --all --check
	cd ebpf/programs && $(CARGO) fmt --check && $(CARGO) clippy --locked -- -D warnings
	ebpf/build --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --workspace check licenses bans sources

bench: deps ## Measures packets, control plane and memory (see benches/README.md); QUICK=1: only that it runs
	@command -v valgrind >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind
	$(CARGO) build --release -p shunt -p shunt-bench
	target/release/shunt-bench run target/release/shunt --modes $(MODES) $(if $(QUICK),--quick --output target/bench,$(if $(BENCH),,--goals benches/README.md)) $(BENCH)

ebpf: ## Rebuilds the eBPF programs, ebpf/shunt.o
	ebpf/build

image: deps ## Builds the container image, target/shunt-image.tar (an OCI archive; no engine needed)
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release -p shunt --target $(TARGET)
	deploy/build-image target/$(TARGET)/release/shunt target/shunt-image.tar

deps:
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi
