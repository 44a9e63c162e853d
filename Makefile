PYTHON ?= python3
SEED ?= 0
ENV := .venv/ready

.PHONY: demo test lint clean

# pre-train SynCo on the built-in photographs, probe it beside a randomly initialised encoder, draw the report
demo: $(ENV)
	.venv/bin/python tools/demo.py --seed $(SEED)

test: $(ENV)
	.venv/bin/python -m pytest -q -n 2 tests

lint: $(ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(ENV): requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.x ...')"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
