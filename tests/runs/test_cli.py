"""Test the command line: bad input, options, YAML defaults and launch plans.

Bad input ends with one clear line and status 2.
"""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, own_lines, settings, shell, wants_detectron2
from run_helpers import INPUT, SMALL, options, refused, typed

import main_lincls
from moco.errors import InputError, unknown


def test_what_other_packages_print_is_no_failure(tmp_path):
    """Each process prints warnings like torch's, in Python and in C++; our line is found."""
    warned = "warnings.warn('`f` is deprecated. Please use `g`.', FutureWarning)"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys, warnings\n{warned}\n{warned[:-1]}, stacklevel=2)\n"
        "print('[rank1]:[W1126 10:00:00.1 ProcessGroup.cpp:1] Warning: no device', "
        "file=sys.stderr)\n"
    )
    done = shell("main_synco.py", tmp_path / "nowhere", *SMALL, env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.count("FutureWarning: `f`") == 2 and "[W1126" in done.stderr
    refused((done.returncode, done.stdout, done.stderr), "nowhere", "no such folder")
    with pytest.raises(AssertionError):
        refused((2, "", f"{done.stderr}another line\n"))
    with pytest.raises(AssertionError):
        own_lines("Traceback (most recent call last):\n")


# numbers
def test_more_hard_negatives_than_queue_rows(script, images):
    refused(
        script("main_synco", images, *SMALL, "--n-hard", 33, "--n1", 1),
        "--n-hard 33",
        "--moco-k 32",
    )


def test_synthetic_negatives_without_hard_ones(script, images):
    refused(script("main_synco", images, *SMALL, "--n4", 1), "--n-hard")


@pytest.mark.parametrize(
    "option", [("--moco-t", 0), ("--moco-m", 1.5), ("--n1", -1), ("-b", 0), ("--epochs", "many")]
)
def test_numbers_out_of_range(script, images, option):
    refused(script("main_synco", images, *SMALL, *option), option[0])


def test_batch_smaller_than_processes(script, images):
    result = script(
        "main_synco",
        images,
        *SMALL,
        *typed("-b 2 --multiprocessing-distributed --nproc-per-node 3"),
    )
    refused(result, "--batch-size 2", "3 processes")


def test_bank_smaller_than_processes(script):
    words = typed("--cluster 1 --multiprocessing-distributed --nproc-per-node 2")
    result = script("main_adco", "nowhere", *INPUT, *words)
    refused(result, "--cluster 1", "2 processes", "raise --cluster")


# launch
# programs, each with arguments with which it imports torch
ENTRIES = [(path, "photos") for path in sorted(ROOT.glob("main_*.py"))]
ENTRIES += [
    (ROOT / "tools" / "export.py", "x.pth y.pth"),
    (ROOT / "tools" / "report.py", "x"),
    (ROOT / "tools" / "schedule.py", ROOT / "configs" / "synco_200.yaml"),
    (ROOT / "tools" / "show_views.py", "mocov2"),
    (ROOT / "benchmarks" / "threads.py", ""),
    (ROOT / "detection" / "convert-pretrain-to-detectron2.py", "x y"),
    pytest.param(
        (ROOT / "detection" / "train_net.py", ""), marks=(pytest.mark.slow, wants_detectron2)
    ),
]
WHEN_TORCH_LOADS = """
import os, runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry[0].name)
def test_threads_wait_briefly_unless_the_user_chose(entry):
    """OpenMP reads the variable when torch is loaded."""
    program, words = entry
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    for given, expected in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_NUM_THREADS": "1"}, "10000"),  # torchrun sets it
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        command = [sys.executable, "-c", WHEN_TORCH_LOADS, str(program), *typed(str(words))]
        done = subprocess.run(
            command,
            env=clean | given,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=program.parent,
        )
        assert done.stdout.split()[-1] == expected, done.stderr


# what options mean
def test_underscores_and_hyphens_are_the_same():
    hyphens = options("d", "--n-hard", 5, "--moco-t", 0.3, "--batch-size=7")
    underscores = options("d", "--n_hard", 5, "--moco_t", 0.3, "--batch_size=7")
    assert vars(hyphens) == vars(underscores)
    assert (hyphens.n_hard, hyphens.moco_t, hyphens.batch_size) == (5, 0.3, 7)


def test_data_is_positional_or_an_option():
    assert options("--mlp", "folder").data == "folder"
    assert options("--data", "folder").data == "folder"


def test_the_folder_may_follow_an_option_that_takes_several_values():
    args = options("--mlp", "--schedule", 120, 160, "folder")
    assert (args.schedule, args.data) == ([120, 160], "folder")
    assert settings(main_lincls, ["--lr", "30", "1e-2", "folder", "-b", "8"]).lr == [30, 0.01]
    assert settings(main_lincls, ["folder", "--lr", "30"]).lr == [30]


def test_rates_of_a_probe_are_checked(script, images, tmp_path):
    refused(script("main_lincls", images, "--lr", 3, 1, 3.0), "--lr 3 1 3", "is given twice")
    refused(script("main_lincls", images, "--lr", "-1"), "--lr", "below 0")
    (tmp_path / "one.yaml").write_text("lr: 2.5")
    assert settings(main_lincls, ["folder", "--cfg", tmp_path / "one.yaml"]).lr == [2.5]


def test_decays_and_the_held_out_part_of_a_probe_are_checked(script, images):
    refused(script("main_lincls", images, "--wd", 0, 1e-4, 0), "--wd 0 0.0001 0", "is given twice")
    for fraction in (0, 1, 1.5, "nan"):
        refused(script("main_lincls", images, "--val-from-train", fraction), "--val-from-train")
    assert settings(main_lincls, ["--wd", "0", "1e-4", "folder"]).wd == [0, 1e-4]


def test_flags_win_over_yaml(tmp_path):
    given = {
        "learning_rate": 0.5,
        "weight-decay": 0.125,
        "n_hard": 7,
        "cos": True,
        "schedule": [1, 2],
        "moco-k": 64,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    args = options("d", "--cfg", tmp_path / "c.yaml", "--lr", 0.25, "--no-cos")
    assert (args.lr, args.wd, args.n_hard, args.cos, args.schedule, args.moco_k) == (
        0.25,
        0.125,
        7,
        False,
        [1, 2],
        64,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("synco_200", (200, 1024, 256, 64, 0.2)), ("mocov2_800", (800, 0, 0, 0, 0.2))],
)
def test_published_recipes_parse(name, expected):
    args = options("d", "--cfg", f"configs/{name}.yaml")
    assert (args.epochs, args.n_hard, args.n1, args.n6, args.moco_t) == expected


def test_help_groups_options_and_shows_defaults(script):
    status, out, _ = script("main_synco", "--help")
    assert status == 0
    assert "synthetic negatives" in out and "launch" in out
    assert "(default: 65536)" in out
    assert "interpolated negatives per query (default: 0)" in " ".join(out.split())
    assert "local-rank" not in out


def test_bad_input_error_is_an_exception_of_its_own():
    with pytest.raises(InputError, match="nearest is 'beta'"):
        raise unknown("thing", "betta", ["alpha", "beta"])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize(
    ("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False)]
)
def test_freed_memory_is_kept_for_the_next_tensors(variables, kept):
    """Then they take no page faults. glibc's own variables have the last word."""
    code = """
import resource, moco, torch
def fill():
    return [torch.zeros(2 << 20) for _ in range(5)]
for _ in range(5):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = shell("-c", code, env={**variables, "THP_MEM_ALLOC_ENABLE": "0"})
    assert result.returncode == 0, result.stderr
    pages = 5 * (2 << 22) // resource.getpagesize()
    assert (int(result.stdout) < pages / 10) == kept


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the system has no huge pages")
@pytest.mark.parametrize(
    ("variables", "asked"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)]
)
def test_large_tensors_ask_for_huge_pages_unless_the_user_chose(variables, asked):
    """Check the request only: what they get depends on the memory that is free."""
    code = """
import moco, torch
tensor = torch.empty(32 << 20)
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if not first.endswith(":"):
        low, high = (int(end, 16) for end in first.split("-"))
    elif first == "VmFlags:" and low <= tensor.data_ptr() < high:
        print("hg" in rest)
"""
    result = shell("-c", code, env=variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{asked}\n"
