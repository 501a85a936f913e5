# The one command surface. Every target sets up what it needs from nothing and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOKE := target/smoke-venv
RUST := Cargo.toml Cargo.lock $(wildcard rust/*.rs)

.PHONY: demo test test-rust test-python test-wheel lint format bench wheel clean

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
	cargo clippy --locked --all-targets --quiet -- -D warnings
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo clippy --locked --features python --quiet -- -D warnings

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

bench: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pytest-benchmark>=5'
	$(BIN)/python -m pytest benches -p no:cacheprovider --benchmark-columns=min,median,rounds --benchmark-sort=name

wheel: $(VENV)/.tools
	rm -rf dist
	$(BIN)/maturin build --release --locked --quiet --out dist

clean:
	rm -rf $(VENV) target dist

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'maturin>=1.16,<2'
	touch $@

# An editable install: Python changes need no rebuild, Rust changes do.
$(VENV)/.built: $(VENV)/.tools pyproject.toml $(RUST)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --quiet --extras test
	touch $@

$(VENV)/.lint: $(VENV)/.tools pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.12' 'mypy>=1.16'
	touch $@
