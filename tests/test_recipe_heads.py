"""Check the head of each recipe, its leading comment: command, published figures, hours."""

import importlib
import re
import sys

import pytest
from conftest import ROOT, settings

import main_synco
from moco.loss.synthetic import TYPES

CONFIGS = ROOT / "configs"
RECIPES = {str(path.relative_to(CONFIGS)): path for path in sorted(CONFIGS.rglob("*.yaml"))}
# statements of a head instead of a figure
NO_FIGURE = r"[Nn]o (published )?accuracy|Published accuracies: in the heads of"
NO_FIGURE += r"|Published: see the head of the encoder's recipe"


def head(text: str) -> list[str]:
    """Return the leading comment of a recipe, without the `# ` of each line."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("# ") for line in lines[:end]]


def missing(name: str, text: str) -> list[str]:
    """Return what the head of the recipe configs/`name` lacks."""
    lines, found = head(text), []
    joined = " ".join(lines)
    typed = [line for line in lines if re.match(r"(python|torchrun [-\w ]+) main_\w+\.py ", line)]
    if not any(f" --cfg configs/{name} " in line for line in typed):
        found.append("its own command")
    for path in re.findall(r"--cfg (configs/\S+\.yaml)", joined):
        if path != f"configs/{name}":
            found.append(f"a command of its own instead of {path}")
    prose = " ".join(line for line in lines if line not in typed)
    without_papers = re.sub(r"arXiv [\d., and]+", "", prose)
    if not re.search(r"\b\d\d\.\d\d?\b", without_papers) and not re.search(NO_FIGURE, prose):
        found.append("a published figure, or that none is known")
    if not re.search(r"\b[Hh]ours\b", prose):
        found.append("hours and hardware, or that they are not known")
    if re.search(r"\b\d+(\.\d+)? hours\b", prose) and not re.search(r"\b(V100|GPUs?|TPU)", prose):
        found.append("the hardware of the hours")
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_has_command_figures_and_hours(name):
    assert missing(name, RECIPES[name].read_text()) == []


GOOD = "# Method: top-1 70.1 in the paper; 53 hours on 8 V100.\n"
GOOD += "# python main_synco.py --cfg configs/a.yaml DIR\narch: resnet50\n"


@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        ("arch", "arch", []),
        ("configs/a.yaml", "configs/b.yaml", ["its own command", "a command of its own"]),
        ("# python main", "# main", ["its own command"]),
        ("top-1 70.1", "arXiv 2011.08435", ["a published figure"]),
        ("top-1 70.1", "No accuracy is known to us", []),
        ("53 hours on 8 V100", "fast", ["hours and hardware"]),
        (" on 8 V100", "", ["the hardware"]),
        ("53 hours on 8 V100", "hours: not known to us", []),
    ],
)
def test_a_head_that_lacks_a_part_is_found(old, new, lacks):
    found = missing("a.yaml", GOOD.replace(old, new))
    assert len(found) == len(lacks)
    assert all(line.startswith(start) for line, start in zip(found, lacks, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_is_of_the_script_that_reads_the_recipe(name, monkeypatch):
    """Parse the recipe with the script of its command: the script must know all its options."""
    lines = head(RECIPES[name].read_text())
    scripts = {
        match[1]
        for line in lines
        if (match := re.match(r"(?:python|torchrun .*?) (main_\w+)", line))
    }
    assert len(scripts) == 1
    script = scripts.pop()
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    importlib.import_module(script).parser().parse(["DIR", "--cfg", str(RECIPES[name])])


@pytest.mark.parametrize("name", [name for name in RECIPES if "as_run" in name])
def test_what_ran_and_what_was_published_name_each_other(name):
    published = name.replace("_as_run", "")
    both = [" ".join(head(RECIPES[one].read_text())) for one in (name, published)]
    assert "As run" in both[0] and "As published" in both[1]
    assert f"configs/{published}" in both[0] and f"configs/{name}" in both[1]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("mochi_")])
def test_a_recipe_of_mochi_is_the_row_in_its_name(name):
    """(N, s, s'): the N hardest, s mixed from two of them, s' mixed with the query."""
    row = [int(word) for word in name.removesuffix(".yaml").split("_")[1:4]]
    args = settings(main_synco, ["DIR", "--cfg", RECIPES[name]])
    assert [args.n_hard, args.n3, args.n1] == row
    assert (TYPES[0].name, TYPES[2].name) == ("interpolated", "mixup")
    assert args.n2 == args.n4 == args.n5 == args.n6 == 0
    assert f"(N, s, s') = ({', '.join(map(str, row))})" in RECIPES[name].read_text()
