"""RESULTS.md is what `benchmarks/run.py` writes from the results in benchmarks/results/."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    return run


def test_page_is_up_to_date(run):
    assert run.PAGE.read_text() == run.page(), "python benchmarks/run.py --write"


def test_targets(run, monkeypatch, tmp_path):
    """Write a page from results with a figure on each side of its limit."""
    measured = {"machine": "a machine", "versions": {"torch": "2.0"}, "date": "2026-01-02"}
    figures = {"synco_over_moco": 1.4, "other": 6.0, "plain": 2.0}
    targets = {
        "synco_over_moco": {"limit": 1.35, "least": False},
        "other": {"limit": 6, "least": True},
    }
    results = {"benchmark": "negatives", "K": 4096, **figures, "measured": measured}
    results |= {"figures": list(figures), "targets": targets, "rows": [{"head": "a|b", "ms": 1.25}]}
    (tmp_path / "negatives.json").write_text(json.dumps(results))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    page = run.page()
    assert "Measured 2026-01-02 on a machine. Versions: torch 2.0." in page
    words = "time of SynCo's head / of MoCo's head"
    link = "[negatives](#the-contrastive-head)"
    assert f"| {words} | <= 1.35 | 1.4 | **missed** | {link} |" in page
    assert f"| `other` | >= 6 | 6 | met | {link} |" in page
    assert f"- {words}, <= 1.35: out of reach. MoCo's head" in page
    assert "Settings: K 4096." in page and "| a\\|b | 1.25 |" in page
    assert "|  | `plain` | 2 |" in page and page.count("\n## ") == 3


def test_a_failing_part(run, monkeypatch, tmp_path, capfd):
    """A failing script does not stop the others, and leaves no results."""
    good, bad = (part for part in run.PARTS if part.name in ("negatives", "false_negatives"))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(sys, "argv", ["run.py", good.name, bad.name])
    (tmp_path / f"{bad.name}.json").write_text("{}")

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess:
        failed = command[1] == bad.command.split()[0]
        if not failed:
            results = {"benchmark": good.name, "x": 1.0, "figures": ["x"], "targets": {}}
            text = json.dumps({**results, "rows": [{"head": "ours", "ms": 1.0}]})
            (tmp_path / command[-1]).write_text(text)
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(subprocess, "run", fake)
    assert run.main() == 1
    captured = capfd.readouterr()
    assert f"failed: {bad.name}" in captured.err and good.title in run.PAGE.read_text()
    assert bad.title not in run.PAGE.read_text()


def test_an_unknown_part(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "negative"])
    with pytest.raises(SystemExit) as exit:
        run.main()
    assert exit.value.code == 2 and "no such part: negative" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ("0", "argument --rounds: 0 is below 1"),
        ("-1", "argument --rounds: -1 is below 1"),
        ("x", "argument --rounds: 'x' is not a whole number"),
        ("", "after --rounds=: an empty value"),
    ],
)
def test_a_wrong_number_of_rounds_is_refused(run, rounds, said, capsys):
    import measure  # from the folder to which `run` refers

    with pytest.raises(SystemExit) as exit:
        measure.parser("").parse_args([f"--rounds={rounds}"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and error.count("\n") == 1
    assert measure.parser("").parse_args(["--rounds=1"]).rounds == 1
