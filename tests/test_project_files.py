"""Check the files about the project: Dockerfile, citation, workflow and pre-commit."""

import re

import pytest
import yaml
from conftest import ROOT
from dockerfile_parse import DockerfileParser

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
PAPER = re.compile(r"\d{4}\.\d{5}")


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their values."""
    with (ROOT / "Dockerfile").open("rb") as file:
        return [
            (step["instruction"], step["value"])
            for step in DockerfileParser(fileobj=file).structure
            if step["instruction"] != "COMMENT"
        ]


def test_the_image_installs_what_pyproject_asks_for(steps):
    runs = " ".join(value for instruction, value in steps if instruction == "RUN")
    pinned = re.findall(r'"((?:torch|torchvision)>=[\d.]+)"', runs)
    assert len(pinned) == 4 and set(pinned) <= set(PROJECT["dependencies"])
    extras = re.search(r'-e "\.\[([\w,]+)\]"', runs)[1].split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


def test_the_stages_of_the_image_are_the_variants(steps):
    stages = [value.split() for instruction, value in steps if instruction == "FROM"]
    names = {words[2] for words in stages}
    assert [words[0] for words in stages] == ["python:3.12-slim", "base", "base", "${VARIANT}"]
    default = next(value for name, value in steps if name == "ARG").removeprefix("VARIANT=")
    page = (ROOT / "docs/running.md").read_text()
    assert {default, *re.findall(r"VARIANT=(\w+)", page)} == {"cpu", "cuda"} <= names


def test_the_image_does_not_run_as_root_and_starts_a_script(steps):
    last = dict(steps)
    assert last["USER"] == "1000" and "--uid 1000" in last["RUN"]
    assert last["ENTRYPOINT"] == '["python"]'
    assert (ROOT / yaml.safe_load(last["CMD"])[0]).exists()


def test_git_ignores_what_the_image_leaves_out():
    left_out = {line.strip("/*") for line in (ROOT / ".dockerignore").read_text().split()}
    for ignored in (ROOT / ".gitignore").read_text().split():
        assert any(ignored.strip("/*").startswith(name) for name in left_out), ignored
    assert not left_out & {"moco", "configs", "README.md", "LICENSE", "pyproject.toml"}


def test_the_citation_names_this_version_and_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert all({"title", "type", "authors"} <= one.keys() for one in citation["references"])
    cited = {PAPER.search(one["url"])[0] for one in citation["references"] if "url" in one}
    heads = re.findall(r"^\*arXiv (.*?)\.\*", (ROOT / "docs/methods.md").read_text(), re.M)
    assert cited == {paper for head in heads for paper in PAPER.findall(head)}


def test_the_workflow_runs_targets_of_the_makefile():
    jobs = WORKFLOW["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {command.removeprefix("make ") for command in commands}
    assert called == {"lint", "docs", "test", "demo", "test-slow", "matrix"} <= TARGETS
    assert all("timeout-minutes" in job for job in jobs.values())


def test_the_workflow_tests_each_supported_python():
    jobs = WORKFLOW["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    minors = [int(version.split(".")[1]) for version in versions]
    assert minors == list(range(minors[0], minors[-1] + 1))
    setup = next(step for step in jobs["matrix"]["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["with"]["python-version"].split() == [versions[0], versions[-1]]
    newest = re.search(r"NEWEST_PYTHON \?= .*?in python([\d.]+)", (ROOT / "Makefile").read_text())
    assert newest[1] == versions[-1]


def test_pre_commit_runs_the_linter_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all({"id", "name", "entry", "language"} <= hook.keys() for hook in hooks)
    commands = {" ".join(hook["entry"].split()[:2]) for hook in hooks}
    assert {"ruff check", "ruff format"} <= commands


def test_contributing_names_targets_of_the_makefile():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    assert {"lint", "test", "docs"} <= named <= TARGETS
