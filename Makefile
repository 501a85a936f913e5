# The one command surface. Every target sets up what it needs from nothing and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOKE := target/smoke-venv
RUST := Cargo.toml Cargo.lock $(wildcard rust/*.rs)

.PHONY: demo test test-rust test-python test-wheel lint format bench bench-kernels bench-scaling hostile fuzz browser docs wheel clean

demo: $(VENV)/.built
	$(BIN)/tacfast demo

test: test-rust test-python test-wheel

test-rust:
	cargo test --locked --quiet

test-python: $(VENV)/.built
	$(BIN)/python -m pytest

# The wheel in an environment that holds only what the solver needs: no torch.
test-wheel: wheel
	test -d $(SMOKE) || $(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/python -m pip install --quiet --disable-pip-version-check numpy rich typer
	$(SMOKE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	$(SMOKE)/bin/python tests/smoke_wheel.py $(SMOKE)/bin/tacfast

lint: $(VENV)/.built $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tacfast._rust
	cargo fmt --check
	cargo clippy --locked --all-targets --features bench --quiet -- -D warnings
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo clippy --locked --features python --quiet -- -D warnings

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

# Accuracy first, then one table of our engines and of other solvers; those that cannot be installed here are skipped.
bench: $(VENV)/.built $(VENV)/.peers
	mkdir -p target
	$(BIN)/python -m pytest benches -q -p no:cacheprovider --benchmark-quiet --benchmark-json=target/bench.json
	$(BIN)/python benches/table.py target/bench.json

bench-kernels:
	cargo bench --locked --features bench

# Minutes: time and peak memory against C, d and n.
bench-scaling: $(VENV)/.built
	$(BIN)/python benches/scaling.py

# What becomes of each kind of hostile file.
hostile: $(VENV)/.built
	$(BIN)/python tests/hostile.py

# About half an hour: mutations for MINUTES, CASES examples of each property test, in Python and in Rust.
MINUTES ?= 10
CASES ?= 10000
fuzz: $(VENV)/.built
	$(BIN)/python tests/fuzz.py $(MINUTES)
	TACFAST_FUZZ=$(CASES) $(BIN)/python -m pytest -s tests/test_fuzz.py
	PROPTEST_CASES=$(CASES)0 cargo test --locked --test anything

# The pages in Debian's Chromium (apt-get install chromium), with screenshots into PAGES.
PAGES ?= target/browser
browser: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'playwright>=1.50'
	$(BIN)/python tests/browser.py $(PAGES)

# The documentation as a site in site/; a broken link or an undocumented reference is an error. (The variable stills a note on mkdocs 2.)
docs: $(VENV)/.built $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(VENV)/.tools
	rm -rf dist
	$(BIN)/maturin build --release --locked --quiet --out dist

clean:
	rm -rf $(VENV) target dist site

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'maturin>=1.16,<2'
	touch $@

# An editable install: Python changes need no rebuild, Rust changes do.
$(VENV)/.built: $(VENV)/.tools pyproject.toml $(RUST)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --quiet --extras test
	touch $@

# What an extra asks for.
EXTRA = import sys; from importlib.metadata import requires; print(*(r.split(';')[0].strip() for r in requires('tacfast') if sys.argv[1] in r.partition(';')[2]))

# One by one: a solver without a wheel for this machine must not keep the others away.
$(VENV)/.peers: pyproject.toml | $(VENV)/.built
	for package in $$($(BIN)/python -c "$(EXTRA)" bench); do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary "$$package" || echo "skipped: $$package"; \
	done
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c "$(EXTRA)" docs)
	touch $@

$(VENV)/.lint: $(VENV)/.tools pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.12' 'mypy>=1.16'
	touch $@
