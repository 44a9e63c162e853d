PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
# the Pythons of `make matrix`, and a file that pins versions for pip (-c)
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= $(shell for p in python3.13 python3.12; do $$p -V >/dev/null 2>&1 && echo $$p && break; done)
CONSTRAINTS ?=

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

.PHONY: demo pictures test test-slow test-browser test-track test-track-here coverage lint docs docs-serve detectron2 \
	matrix benchmarks benchmarks-here clean

# pre-train SynCo on the built-in photographs, evaluate it and a randomly initialised encoder, write the report
demo: $(VENV)/ready
	$(VENV)/bin/python tools/demo.py --seed $(SEED)

# the pictures of README.md, from the report of the last `make demo`; needs Chromium
DEMO ?= $(shell ls -dt runs/demo* 2>/dev/null | head -n 1)
pictures: $(VENV)/ready
	$(VENV)/bin/python tools/show_views.py mocov2 photos --image-size 96 --images 2 --draws 1 --out docs/views.png --force
	$(VENV)/bin/python tools/pictures.py $(DEMO)/report.html docs --force

# unit tests, and one short run of each script
test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q -rs -n 2 --dist worksteal -m "not slow" tests

# the other tests: long runs, several processes, faults, resuming, detectron2
test-slow: $(VENV)/ready $(VENV)/detectron2
	$(VENV)/bin/python -m pytest -q -rs -n 2 --dist worksteal -m slow tests

# the report in a browser; `make test-slow` skips these tests if there is no Chromium
test-browser: $(VENV)/ready
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { echo "make test-browser: no Chromium on the PATH; on Debian: apt-get install chromium" >&2; exit 2; }
	$(VENV)/bin/python -m pytest -q -rs tests/runs/test_report_browser.py

# --track with the packages of all trackers, which need other versions of some packages than the newest
test-track:
	$(MAKE) test-track-here VENV=$(VENV)-track

test-track-here: $(VENV)/ready
	$(PIP) -e ".[track]"
	$(VENV)/bin/python -m pytest -q -rs tests/runs/test_trackers.py

# the fraction of lines that all tests run, in their subprocesses too
coverage: $(VENV)/ready $(VENV)/detectron2
	$(PIP) "coverage>=7.10"
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest -q -n 2 --dist worksteal tests
	$(VENV)/bin/python -m coverage combine -q
	$(VENV)/bin/python -m coverage report

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# the documentation as a site in site/; a link without a target is an error
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# the same site, served on http://127.0.0.1:8000 and built again at each change
docs-serve: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.x ...')"
	@echo "installing PyTorch and other packages in $(VENV): some minutes, and gigabytes of downloads"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@

# detectron2's Python code without its compiled extension, which is enough to test detection/ on a CPU
detectron2: $(VENV)/detectron2

$(VENV)/detectron2: $(VENV)/ready
	$(PIP) "setuptools>=70.1,<81" fvcore pycocotools cloudpickle omegaconf tensorboard
	$(PIP) --no-deps --only-binary=:all: --python-version 3.10 \
		--target "$$($(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')" sal-detectron2==0.7.2
	touch $@

# measure speed and memory, next to other libraries, and write benchmarks/RESULTS.md; PARTS="negatives step" measures only these
# parts again. The other libraries need other versions of some packages than the newest, so they have their own environment.
benchmarks:
	$(MAKE) benchmarks-here VENV=$(VENV)-benchmarks

benchmarks-here: $(VENV)/ready
	$(PIP) -e ".[benchmarks]"
	$(PIP) --no-deps solo-learn==1.0.2
	$(VENV)/bin/python benchmarks/run.py $(PARTS)

# all tests, with the oldest versions that pyproject.toml allows, then with the newest available
matrix: .matrix/oldest.txt
	@"$(OLDEST_PYTHON)" -c "import sys; sys.exit(sys.version_info[:2] != (3, 10))" 2>/dev/null \
		|| { echo "make matrix: '$(OLDEST_PYTHON)' is not Python 3.10: give OLDEST_PYTHON=/path/to/python3.10" >&2; exit 2; }
	@"$(NEWEST_PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null \
		|| { echo "make matrix: '$(NEWEST_PYTHON)' is not Python 3.12 or newer: give NEWEST_PYTHON=/path/to/python3.13" >&2; exit 2; }
	$(MAKE) test test-slow PYTHON=$(OLDEST_PYTHON) VENV=.matrix/oldest CONSTRAINTS=.matrix/oldest.txt
	$(MAKE) test test-slow PYTHON=$(NEWEST_PYTHON) VENV=.matrix/newest

.matrix/oldest.txt: pyproject.toml
	mkdir -p .matrix
	sed -n '/^dependencies = /,/^]/s/^    "\([a-z-]*\)>=\([0-9.]*\)",$$/\1==\2/p' pyproject.toml > $@

clean:
	rm -rf $(VENV) $(VENV)-track $(VENV)-benchmarks .matrix runs site
