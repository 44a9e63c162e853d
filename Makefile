PYTHON ?= python3
SEED ?= 0
ENV := .venv/ready

.PHONY: demo test lint detectron2 clean

# pre-train SynCo on the built-in photographs, probe it beside a randomly initialised encoder, draw the report
demo: $(ENV)
	.venv/bin/python tools/demo.py --seed $(SEED)

test: $(ENV)
	.venv/bin/python -m pytest -q -n 2 --dist worksteal tests

lint: $(ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(ENV): requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.x ...')"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# detectron2's Python code without its compiled extension, which is enough to test detection/ on a CPU
detectron2: .venv/detectron2

.venv/detectron2: $(ENV)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "setuptools<81" fvcore pycocotools cloudpickle omegaconf tensorboard
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.10 \
		--target "$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')" sal-detectron2==0.7.2
	touch $@

clean:
	rm -rf .venv runs
