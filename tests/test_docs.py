"""Check README.md and docs/ against the code.

Commands parse, options and files exist, quoted messages are those of the scripts, and the example
trains.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
from conftest import ROOT

from moco.augment.recipes import check_name
from moco.config import Config
from moco.encoder.networks import canonical
from moco.engine import pretrain
from moco.methods import METHODS

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
EXAMPLE = ("main_simsiam", "moco/builder/simsiam.py")  # of docs/adding-a-method.md
ELSEWHERE = ("main_moco.py", "main_pretrain.py", "main_linear.py")  # scripts of other repositories
# options of other programs: torch.distributed.launch's, those of Swin-style scripts and FNC's,
# TensorBoard's, and Docker's
FOREIGN = {"--nproc-per-node", "--master-port", "--opts", "--fine-tune-after-block", "--logdir"}
FOREIGN |= {"--build-arg", "--rm", "--gpus", "--ipc", "--user"}


def fences(page: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", page, re.S | re.M)


def ours(name: str, page: str) -> str:
    """Return a page without the commands of other repositories.

    These are in the second column of the tables in docs/commands.md that have four columns.
    """
    lines = page.splitlines()
    return "\n".join(
        re.sub(r"^\|[^|]*\| (`.*?[^\\]`) \|", "|", line)
        if name.endswith("commands.md") and line.count(" | ") == 3
        else line
        for line in lines
    )


def first_of_sweep(line: str) -> str:
    """Return the command of the first combination of a sweep; other lines stay as they are."""
    if not line.startswith("tools/sweep.sh"):
        return line
    words = shlex.split(line)
    script = next(word for word in words if word.startswith("main_"))
    end = words.index("--")
    first = [script]
    for axis in words[words.index(script) + 1 : end]:
        first += axis.split("|")[0].split() if "|" in axis else axis.split()[:2]
    return shlex.join([*first, *words[end + 1 :]])


def commands() -> list[tuple[bool, str]]:
    """Return our commands, each from the script's name on.

    Each has a flag: whether it is a line of a code block, which can be typed unchanged.
    """
    found = []
    for name, page in PAGES.items():
        page = ours(name, page)
        values = {}
        blocks = [
            block.replace("\\\n", " ")
            for block in fences(page)
            if not block.startswith(('"""', "#!"))
        ]
        for line in "\n".join(blocks).splitlines():
            if loop := re.match(r"\s*for (\w+) in (\S+)", line):
                values[loop[1]] = loop[2]
            line = re.sub(
                r"\$\{?(\w+)\}?", lambda match, values=values: values.get(match[1], match[0]), line
            )
            line = first_of_sweep(line)
            if not line.startswith("#") and (match := re.search(r"\bmain_\w+\.py .*", line)):
                found.append((True, match[0]))
        prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
        inside = (re.search(r"\bmain_\w+\.py .*", code) for code in re.findall(r"`([^`]+)`", prose))
        found += [(False, match[0]) for match in inside if match]
    return [
        (typed, text)
        for typed, text in found
        if not text.startswith((*ELSEWHERE, f"{EXAMPLE[0]}.py")) and "--cfg FILE" not in text
    ]


COMMANDS = commands()


def test_there_are_commands_of_every_script_with_a_recipe():
    assert len(COMMANDS) > 60
    found = {text.partition(".py")[0] for _, text in COMMANDS}
    assert found <= {path.stem for path in ROOT.glob("main_*.py")}
    assert found >= {"main_lincls", "main_semisup", "main_knn", "main_voc07"}
    assert found >= {method.script for method in METHODS.values() if method.recipe}


@pytest.mark.parametrize(
    ("typed", "text"), COMMANDS, ids=[f"{i} {text[:60]}" for i, (_, text) in enumerate(COMMANDS)]
)
def test_command_is_accepted(typed, text, tmp_path, monkeypatch):
    """Parse the command; for pre-training, also run the checks that do not need the data."""
    monkeypatch.chdir(ROOT)
    name, _, rest = text.partition(".py ")
    words = [word for word in shlex.split(rest, comments=True) if word != "..."]
    if words == ["--help"]:
        return
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "checkpoint_0000.pth.tar").touch()  # for an evaluation that looks for it
    words = [str(tmp_path) if word == "OUT" else word for word in words]
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    has_data = any(
        re.search(r"^(DIR|data/|photos)$|=DIR$|^--(load-features|file-list)$", word)
        for word in words
    )
    assert has_data or not typed, "no data folder"
    parser = module.parser()
    config = parser.parse(words if has_data else ["DIR", *words])
    if config.network.arch:
        canonical(config.network.arch)
    if config.views.recipe:
        check_name(config.views.recipe)
    config = completed(module, config)
    # Check also that no option lacks an effect. Other tests may be using the ports of the papers.
    with mock.patch("moco.launch.address._check_own"):
        parser.without_effect(config)


RECIPES = {
    str(path.relative_to(ROOT / "configs").with_suffix("")): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_has_nothing_without_effect(recipe, monkeypatch):
    text = recipe.read_text()
    name = re.search(r"^# (?:python|torchrun .*?) (main_\w+)\.py", text, re.M)[1]
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    module = importlib.import_module(name)
    parser = module.parser()
    config = completed(module, parser.parse(["DIR", "--cfg", str(recipe)]))
    assert parser.without_effect(config) == []


def completed(module: ModuleType, config: Config) -> Config:
    """Return a pre-training's completed settings, without a look at the data."""
    if config.EVALUATES:
        return config
    with mock.patch.object(pretrain, "complete", lambda config, *_: config):
        return module.complete(config)


def options() -> set[str]:
    """Every option of a script or a tool."""
    found = {"--help"}
    for path in ROOT.glob("main_*.py"):
        parser = importlib.import_module(path.stem).parser()
        found |= {name for action in parser._actions for name in action.option_strings}
        found |= {f"--{name}" for name in getattr(parser, "replacements", {})}
    for pattern in ("tools/*", "benchmarks/*.py", "detection/*.py"):
        for path in ROOT.glob(pattern):
            if path.is_file():
                found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text()))
    return {name.replace("_", "-") for name in found}


@pytest.fixture(scope="module")
def known() -> set[str]:
    return options() | FOREIGN


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name, known):
    page = ours(name, PAGES[name])
    if name == "docs/adding-a-method.md":
        known = known | set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', page))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
    assert {name for name in named if name.replace("_", "-").rstrip("-") not in known} == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name):
    folder, page = (ROOT / name).parent, PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ], target
    page = ours(name, page)
    folders = r"(?:tools|configs|moco|benchmarks|detection|docs|tests)/[\w./-]*\.(?:py|sh|yaml|md)"
    files = set(re.findall(rf"\b(?:{folders}|main_\w+\.py|hubconf\.py)", page))
    files -= {*ELSEWHERE, f"{EXAMPLE[0]}.py", EXAMPLE[1]}
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_recipe_is_on_its_page():
    listed = set(re.findall(r"configs/([\w/]+)\.yaml\)", PAGES["docs/recipes.md"]))
    assert listed == RECIPES.keys()


def test_published_accuracies_are_those_of_the_recipes():
    """Each figure of the column `published` stands in its recipe's comments."""
    column, seen = 0, 0
    for line in PAGES["docs/recipes.md"].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if "recipe" in cells[1:2]:
            column = next((i for i, cell in enumerate(cells) if cell.startswith("published")), 0)
        elif (
            column and line.startswith("|") and (name := re.search(r"configs/([\w/]+)\.yaml", line))
        ):
            figures = re.findall(r"\d\d\.\d", cells[column])
            assert all(figure in RECIPES[name[1]].read_text() for figure in figures), line
            seen += len(figures)
    assert seen > 40


def constants() -> set[str]:
    """Every piece of text that the code may print."""
    found = set()
    for pattern in ("moco/**/*.py", "main_*.py", "tools/*.py", "detection/*.py"):
        for path in ROOT.glob(pattern):
            nodes = ast.walk(ast.parse(path.read_text()))
            found |= {
                node.value
                for node in nodes
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
    return found | {(ROOT / "Makefile").read_text()}


def test_messages_are_the_scripts_own():
    """Check the code in the left column of docs/troubleshooting.md; `...` matches any text."""
    said = constants()
    for line in PAGES["docs/troubleshooting.md"].splitlines():
        cell = line.split("|")[1] if line.startswith("| ") else ""
        if "'s words)" in cell or "'s word)" in cell:
            continue
        for code in re.findall(r"`([^`]+)`", cell):
            if " " in code:
                pieces = [piece.strip() for piece in code.split("...")]
                absent = [
                    piece
                    for piece in pieces
                    if len(piece) > 3 and not any(piece in text for text in said)
                ]
                assert absent == [], code


def test_costs_are_those_that_are_counted(tmp_path):
    """Count a small recipe, and the one to which all are compared, with the documented command."""
    recipes = ("configs/mocov2_200.yaml", "configs/moby_vit_tiny.yaml")
    subprocess.run(
        [sys.executable, "benchmarks/cost.py", *recipes, "--json", tmp_path / "cost.json"],
        cwd=ROOT,
        check=True,
    )
    for recipe, row in zip(
        recipes, json.loads((tmp_path / "cost.json").read_text())["rows"], strict=True
    ):
        line = next(line for line in PAGES["docs/recipes.md"].splitlines() if recipe in line)
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[-4:-1] == [f"{row['GMAC']:.1f}", f"{row['ratio']:.2f}", f"{row['total']:.1f}"]
