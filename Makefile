# make demo: speech recognition, from nothing to word error rates.   make test: every check.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DELETE_ON_ERROR:
.PHONY: venv demo test clean

venv: $(STAMP)

$(STAMP): requirements/ci.txt pyproject.toml
	@echo "installing the pinned packages and quadric into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/ci.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

demo: venv
	@$(BIN)/quadric train digits

test: venv
	@echo "ruff check" && $(BIN)/ruff check --quiet .
	@echo "ruff format" && $(BIN)/ruff format --quiet --check .
	@echo "lint-imports" && out=$$($(BIN)/lint-imports 2>&1) || { echo "$$out"; exit 1; }
	@echo "mypy, pytest"; $(BIN)/mypy --no-error-summary & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || { echo "mypy has found errors, above"; exit 1; }; exit $$tests

clean:
	rm -rf .venv build dist exp .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find quadric tests -name __pycache__ -prune -exec rm -rf {} +
