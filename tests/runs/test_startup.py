"""Programs answer --help and refuse wrong options without importing torch, which takes seconds."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = sorted(
    path
    for pattern in ("main_*.py", "tools/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)
SLOW = "torch torchvision timm tensorboard sklearn scipy matplotlib pandas PIL pyarrow".split()
# Run a program with each of several lists of words. Print the exit statuses, the outputs, and which
# slow modules were imported.
RUN_ALL = """
import contextlib, io, json, os, runpy, sys
program, slow, cases = json.loads(sys.argv[1])
sys.path.insert(0, os.path.dirname(program))
found = []
for words in cases:
    sys.argv, status, out = [program, *words], 0, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            status = end.code
    found.append((status, out.getvalue(), [name for name in slow if name in sys.modules]))
print(json.dumps(found))
"""
FAKE_TORCH = """
class ones:
    def __init__(self, n):
        pass
    def exp(self):
        print("exp")
"""


def run(*words):
    return subprocess.run(
        [sys.executable, "-c", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )


def run_all(program, *cases):
    """Return the exit status, the output and the slow imports of a program for each case."""
    done = run(RUN_ALL, json.dumps([str(program), SLOW, cases]))
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_and_refused_options_import_nothing_slow(program):
    cases = [(0, "usage:", ["--help"])]
    if program.name != "schedule.py":  # it reads the recipe first, which names the options' script
        cases.append((2, "error:", ["--no-such-option"]))
    if program.name.startswith("main_"):
        cases.append((2, "'many' is not a whole number", ["photos", "--batch-size", "many"]))
        cases.append((2, "invalid choice: 'abacus'", ["photos", "--device", "abacus"]))
        cases.append((2, "error: ", ["DIR", "--tag", "name"]))
    found = run_all(program, *(words for *_, words in cases))
    for (status, what, words), (ended, said, slow) in zip(cases, found, strict=True):
        assert ended == status and what in said, (words, said)
        assert not slow, words


@pytest.mark.parametrize("name", SLOW[:2])
def test_the_check_finds_a_slow_import(name, tmp_path):
    (tmp_path / "program.py").write_text(f"import {name}\n")
    [(status, _, slow)] = run_all(tmp_path / "program.py", [])
    assert status == 0 and name in slow


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import moco; print('moco'); import torch; print('torch')", "moco exp torch"),
        ("import torch; print('torch'); import moco; print('moco')", "torch exp moco"),
        ("import moco, sys; import torch; print(len(sys.meta_path) - before)", "exp 0"),
        # some packages look for torch before anything imports it
        ("import moco, importlib.util as u; u.find_spec('torch'); import torch", "exp"),
    ],
)
def test_the_first_exp_follows_the_import_of_torch(code, expected, tmp_path):
    """See `moco._FirstExp`."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    begin = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; before = len(sys.meta_path)\n"
    done = run(begin + code)
    assert done.stdout.split() == expected.split(), done
