# Everything is set up by itself in .venv, when it is missing or older than what it is made from.
PYTHON ?= python3

.PHONY: quickstart demo-images test lint types clean

quickstart: .venv/.train  ## adapt a real language model on this machine, and show before and after
	.venv/bin/veneer train quickstart

demo-images: .venv/.train .venv/.diffusion  ## teach a small text-to-image model two styles, and show them on one sheet
	.venv/bin/veneer train emoji-high-contrast
	.venv/bin/veneer train emoji-delft
	.venv/bin/python examples/emoji/style_sheet.py

test: lint types  ## lint, types, tests
	.venv/bin/python -m pytest -n auto --dist loadfile

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: .venv/.dev
	.venv/bin/mypy

clean:  ## remove what make and the tools made; runs/ stays
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/.train, .venv/.diffusion and .venv/.dev: the environment with that extra
.venv/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "veneer needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv for '$*' (a few minutes the first time)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@
