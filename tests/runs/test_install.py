"""The documented commands install what they need, and the continuous integration runs them."""

import os
import shlex
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

import pytest
from conftest import ROOT, wants_detectron2

pytestmark = pytest.mark.slow

MATRIX = ("OLDEST_PYTHON", "NEWEST_PYTHON")
wants_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def block(page: str, heading: str) -> list[str]:
    """The commands of the first code block below a heading, without comments."""
    text = (ROOT / page).read_text().split(f"\n## {heading}\n", 1)[1]
    lines = text.split("```")[1].strip().splitlines()
    return [line.split("  #")[0].strip() for line in lines]


def project() -> dict:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def make(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("VENV", "MAKEFLAGS")}
    return subprocess.run(
        ["make", *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_ci_runs_the_documented_commands_in_a_new_environment():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line.startswith("make ")]
    assert set(commands) == {*block("README.md", "Two commands"), "make lint", "make test-slow"}
    assert (
        'export VENV=.ci/venv\nrm -rf "$VENV"\n' in script
        and ".ci/venv/\n" in (ROOT / ".gitignore").read_text()
    )


@wants_make
def test_make_test_installs_all_that_the_tests_import(tmp_path):
    plan = make("-n", "test", "test-slow", f"VENV={tmp_path}/venv").stdout
    for words in (
        "-m venv",
        '-e ".[dev]"',
        "fvcore pycocotools",
        "sal-detectron2==",
        "-m pytest -q -rs ",
    ):
        assert words in plan, plan
    assert all(
        f"{tmp_path}/venv/" in line
        for line in plan.splitlines()
        if " -m pytest" in line or " -m pip" in line
    )
    assert {"hatchling", "pytest", "pytest-xdist", "ruff", "yacs"} <= set(
        project()["optional-dependencies"]["dev"]
    )


@wants_make
def test_the_oldest_versions_of_the_matrix_are_the_lower_bounds(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    assert make(".matrix/oldest.txt", cwd=tmp_path).returncode == 0
    pins = (tmp_path / ".matrix" / "oldest.txt").read_text().split()
    assert [pin.replace("==", ">=") for pin in pins] == project()["dependencies"]
    assert {"torch==2.6", "torchvision==0.21", "timm==1.0.15", "numpy==2.0"} <= set(pins)


@wants_make
@pytest.mark.parametrize("missing", MATRIX)
def test_a_python_that_the_matrix_lacks_is_one_line(missing, tmp_path):
    there = tmp_path / "python"  # any program that says that it is the right version
    there.write_text("#!/bin/sh\nexit 0\n")
    there.chmod(0o755)
    given = dict.fromkeys(MATRIX, there) | {missing: "python0.0"}
    done = make("matrix", *(f"{name}={path}" for name, path in given.items()))
    lines = [line for line in done.stderr.splitlines() if line.startswith("make matrix: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "'python0.0' is not Python" in lines[0] and f"give {missing}=/path/to/" in lines[0]
    assert "pytest" not in done.stdout


@wants_detectron2
def test_detectron2_is_built_by_the_documented_command(tmp_path):
    """Install a stand-in for detectron2 without network; its build imports torch, too."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "setup.py").write_text(
        "import torch\nfrom setuptools import setup\n"
        "setup(name='stand-in', version=torch.__version__.split('+')[0], py_modules=['stand_in'])\n"
    )
    (package / "stand_in.py").write_text("")
    first, second = (shlex.split(line) for line in block("detection/README.md", "Install"))
    assert first == ["pip", "install", "-e", ".[detection]"]
    assert {"setuptools>=70.1,<81", "pycocotools"} == set(
        project()["optional-dependencies"]["detection"]
    )
    assert second[-1] == "git+https://github.com/facebookresearch/detectron2.git"
    # an environment of its own, in which the packages of this one are installed too
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    folder = subprocess.check_output(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], text=True
    ).strip()
    Path(folder, "outer.pth").write_text("\n".join(site.getsitepackages()))
    command = [python, "-m", *second[:-1], package, "--no-index"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(folder, "stand_in.py").exists()


def test_a_wheel_has_the_package_and_the_recipes_and_works_from_any_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"moco/configs/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "moco").rglob("*.py")}
    assert recipes and recipes | modules <= inside
    subprocess.run([*pip, "install", *offline, "--target", tmp_path / "site", wheel], check=True)
    program = "import moco.builder.synco; print(moco.builder.synco.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, text=True
    ).strip()
    assert Path(found).is_relative_to(tmp_path / "site")


def test_only_tests_change_the_import_path():
    """Import the tools after an editable install; the scripts are next to the package."""
    listed = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    assert [
        name
        for name in listed
        if not name.startswith("tests/") and "sys.path" in (ROOT / name).read_text()
    ] == ["moco/engine/trackers.py"]  # it runs alone, and removes its own folder from the path
