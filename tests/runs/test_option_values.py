"""Test the numbers of options: their ranges, and values outside of them."""

import importlib.util
import itertools

import pytest
from bad_inputs.base import EVALUATE, PRETRAIN, accepted
from run_helpers import INPUT

from moco.files import read_yaml
from moco.launch import launch

# Unusual numbers that are valid: defaults, or a threshold that accepts all images.
MEANT = {("--seed", "-1"), ("--world-size", "-1"), ("--rank", "-1"), ("--fn-threshold", "-1")}


@pytest.mark.parametrize("program", (*PRETRAIN, *EVALUATE))
def test_numbers_out_of_their_range_are_refused(
    program, script, shared_images, tmp_path, monkeypatch
):
    """-1, nan and 1e30 for every option that takes a number: one line that names the option."""
    monkeypatch.setattr(launch, "launch", accepted)
    run = tmp_path / "run"
    actions = importlib.import_module(program).parser()._actions
    numbers = [a for a in actions if a.option_strings and hasattr(a.type, "interval")]
    assert len(numbers) > 10
    for action, value in itertools.product(numbers, ("-1", "nan", "1e30")):
        option = next(name for name in action.option_strings if name.startswith("--"))
        words = (
            [option, *[value] * action.nargs]
            if isinstance(action.nargs, int)
            else [f"{option}={value}"]
        )
        if (option, value) in MEANT:
            continue
        status, _, err = script(program, shared_images, *INPUT, "--save-dir", run, *words)
        assert status == 2, (words, err)
        assert err.count("\n") == 1 and err.startswith(f"{program}.py: error: "), (words, err)
        assert option in err, (words, err)


@pytest.mark.parametrize("program", (*PRETRAIN, *EVALUATE))
def test_every_number_has_a_range_with_its_default_inside(program):
    for action in importlib.import_module(program).parser()._actions:
        if action.type in (int, float):
            assert action.choices or action.dest == "local_rank", action.dest
        elif hasattr(action.type, "interval"):
            for default in action.default if isinstance(action.default, list) else [action.default]:
                assert default is None or action.type(str(default)) == default, action.dest


def test_yaml_of_options(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\ufefflr: 1\nschedule: &s [1, 2]\nmilestones: *s\nnone:\nday: 2001-02-03\n",
        encoding="utf-8",
    )
    found = {"lr": 1, "schedule": [1, 2], "milestones": [1, 2], "none": None, "day": "2001-02-03"}
    assert read_yaml(tmp_path / "c.yaml") == found
