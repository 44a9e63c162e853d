"""Check the architecture: imports go down only, scripts are short, losses import only torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    (
        "moco.errors",
        "moco.rng",
        "moco.options",
        "moco.methods",
        "moco.messages",
        "moco.loss.settings",
    ),
    ("moco.sections",),
    ("moco.config",),
    ("moco.files", "moco.user", "moco.devices"),
    ("moco.loss", "moco.distributed", "moco.pickles"),
    ("moco.augment", "moco.encoder"),
    ("moco.builder", "moco.data"),
    ("moco.launch", "moco.api"),
    ("moco.engine",),
    ("moco.evaluate",),
    ("moco.cli",),
    ("moco.report",),
    ("main_", "tools", "detection", "hubconf"),
    ("benchmarks",),
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in (
        "main_*.py",
        "hubconf.py",
        "moco/**/*.py",
        "tools/*.py",
        "detection/*.py",
        "benchmarks/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
}


def room(module: str) -> tuple[int, str]:
    """The floor and the room of a module."""
    return next(
        (i, name) for i, floor in enumerate(FLOORS) for name in floor if module.startswith(name)
    )


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_stay_in_the_room(module):
    floor, name = room(module)
    for other in imported(MODULES[module]):
        other_floor, other_name = room(other)
        assert other_floor < floor or other_name == name, f"{module} imports {other}"


def test_no_circle():
    edges = {module: imported(path) for module, path in MODULES.items()}
    while leaves := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges


@pytest.mark.parametrize("script", sorted(ROOT.glob("main_*.py")), ids=lambda path: path.name)
def test_scripts_have_at_most_120_lines(script):
    assert len(script.read_text().splitlines()) <= 120


@pytest.mark.parametrize("module", MODULES)
def test_files_have_at_most_400_lines(module):
    assert len(MODULES[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", MODULES)
def test_public_docstrings_begin_with_what_is_done(module):
    """A docstring that begins with What, Of, Where, Before, From or The must be read twice."""
    tree = ast.parse(MODULES[module].read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name.startswith("_"):
            continue
        words = (ast.get_docstring(node) or "").split()
        refused = {"What", "Of", "Where", "Before", "From"}
        refused |= {"The"} if isinstance(node, functions) else set()
        assert not words or words[0] not in refused, f"{node.name}: {words[:5]}"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if not name.startswith(("moco.cli", "detection"))]
)
def test_only_the_command_line_looks_into_namespaces(module):
    text = MODULES[module].read_text()
    for words in ("getattr(args", "hasattr(", "Namespace("):
        assert words not in text


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"moco.files"}))
def test_json_is_written_by_one_function(module):
    """By `files.to_json`, which replaces NaN and infinity, because JSON cannot hold them."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
        ):
            assert node.attr not in ("dump", "dumps", "JSONEncoder"), (
                f"{module}, line {node.lineno}"
            )
        assert not (isinstance(node, ast.ImportFrom) and node.module == "json"), (
            f"{module}, line {node.lineno}"
        )


def test_messages_are_imported_from_one_file():
    path = ROOT / "moco" / "messages.py"
    names = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            found = isinstance(node, ast.ImportFrom) and names & {one.name for one in node.names}
            assert not found or node.module == "moco.messages", f"{module} imports {found}"


TORCH_AND_TYPES = ("torch", "math", "dataclasses", "typing", "collections")


@pytest.mark.parametrize("path", sorted(ROOT.glob("moco/loss/*.py")), ids=lambda path: path.name)
def test_losses_import_torch_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            for name in names:
                assert name.split(".")[0] in TORCH_AND_TYPES or name.startswith("moco.loss"), name
