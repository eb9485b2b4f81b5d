# Needs python3 >= 3.10 with venv, g++ and make; everything else goes into .venv.
PYTHON ?= python3
CXX ?= g++
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

DEMO := dist/demo
QUESTION ?= What is 17 plus 25?

.PHONY: demo test test-families lint clean check

# The demo model on two ranks of this machine's CPU.
demo: $(VENV)/.installed
	@echo "== Build demo/model for 2 CPU ranks"
	$(BIN)/shardwright build --model demo/model --quantization q4f16_1 --num-shards 2 \
		--target cpu -o $(DEMO)
	@echo "== Ask it: $(QUESTION)"
	$(BIN)/shardwright chat $(DEMO) --prompt "$(QUESTION)"

# All tests that need neither a GPU nor torch.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -m "not gpu and not reference and not matrix"

# Every model family, published model and quantized format at every number of ranks; `make test`
# has one for each.
test-families: $(VENV)/.installed-dev
	$(BIN)/pytest tests/test_families.py tests/test_published.py tests/test_format_logits.py \
		tests/test_reshard.py tests/test_mxfp4.py -m "not gpu and not reference"

# mypy does not follow the folder mapping of an editable install, and it would take the folder
# shardwright/ for the whole package if it ran here; so it reads a plain copy from build/lint.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) install --no-deps --target build/lint .
	cd build/lint && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p shardwright

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable: the worker processes must import the same files as the tests, from any directory.
$(VENV)/.installed: pyproject.toml | check
	@echo "== Install into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | check
	@echo "== Install into $(VENV), with the test tools"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

check:
	@command -v $(PYTHON) >/dev/null || { \
		echo "Error: no $(PYTHON); install Python >= 3.10, or name it: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Error: $$($(PYTHON) --version) is too old; name a Python >= 3.10: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "Error: $(PYTHON) has no venv; install it, on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@command -v $(CXX) >/dev/null || { \
		echo "Error: no $(CXX); install a C++ compiler, on Debian and Ubuntu: apt install g++" >&2; \
		exit 1; }
