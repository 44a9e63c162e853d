#!/usr/bin/env python
"""Run all benchmarks of speed and memory, and write RESULTS.md from their results.

`make benchmarks` runs this script. It runs the scripts in parts.py one after the other, and keeps
the results of each in results/NAME.json. RESULTS.md is written from these files. To measure some
parts again, name them: python benchmarks/run.py negatives step. If a script fails, the others still
run, and the exit status is 1. Stop other programs first, because they change the figures.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import measure
from parts import INTRODUCTION, LONGER, OUT_OF_REACH, PARTS, PEERS, Part

from moco.files import write_json

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "Pillow",
    "torchcodec",
    "lightly",
    "kornia",
    "solo-learn",
    "simplejpeg",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Return the version of Python, and of each installed package of `PACKAGES`, by name."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = measure.versions(*PACKAGES)
    return {"Python": python, **{name: full.split("+")[0] for name, full in found.items()}}


def machine() -> str:
    """Return the processor, the number of cores and the memory of this machine, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        processor = "an unknown processor"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {processor} with {memory:.0f} GiB and no GPU"


def run(part: Part) -> bool:
    """Run the script of a part and keep its results; return whether it succeeded.

    If it fails, the part has no results.
    """
    print(f"\n{part.title}: python benchmarks/{part.command}", flush=True)
    kept = RESULTS / f"{part.name}.json"
    kept.unlink(missing_ok=True)
    measured = {"machine": machine(), "versions": versions(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        command = [sys.executable, *part.command.split(), "--json", str(file)]
        if subprocess.run(command, cwd=HERE).returncode or not file.exists():
            print(f"{part.name}: failed", file=sys.stderr)
            return False
        found = json.loads(file.read_text())
    measured["date"] = datetime.date.today().isoformat()
    write_json(kept, {"measured": measured, **found})
    return True


def page() -> str:
    """Return the content of RESULTS.md, from the files in results/."""
    found = []
    for part in PARTS:
        if (file := RESULTS / f"{part.name}.json").exists():
            found.append((part, json.loads(file.read_text())))
    lines = ["# Results of the benchmarks", ""]
    if found:
        lines += [*paragraph(conditions([results["measured"] for _, results in found])), ""]
    lines += [*paragraph(INTRODUCTION), "", *targets(found), "", *peers(found), "", *LONGER]
    for part, results in found:
        lines += ["", *section(part, results)]
    return "\n".join(lines) + "\n"


def paragraph(text: str) -> list[str]:
    """Return the lines of a paragraph of Markdown."""
    return textwrap.wrap(text, 130, break_on_hyphens=False, break_long_words=False)


def conditions(measured: list[dict]) -> str:
    """Return the dates, machines and versions of the measurements, in words."""
    dates = sorted({one["date"] for one in measured})
    machines = sorted({one["machine"] for one in measured})
    used: dict[str, set[str]] = {}
    for one in measured:
        for name, version in one["versions"].items():
            used.setdefault(name, set()).add(version)
    packages = (f"{name} {' and '.join(sorted(found))}" for name, found in used.items())
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"Measured {when} on {', and on '.join(machines)}. Versions: {', '.join(packages)}."


def targets(found: list[tuple[Part, dict]]) -> list[str]:
    """Return the table of all figures that have a target, and why some are out of reach."""
    reasons = {}
    lines = [
        "## Targets",
        "",
        "| figure | target | measured | | section |",
        "|---|---|---|---|---|",
    ]
    for part, results in found:
        for name, limits in results["targets"].items():
            target = measure.Target(**limits)
            met, words = target.is_met(results[name]), part.figures.get(name, f"`{name}`")
            verdict = "met" if met else "**missed**"
            cells = [words, str(target), number(results[name]), verdict, link(part)]
            lines.append(f"| {' | '.join(cells)} |")
            if not met and name in OUT_OF_REACH:
                reasons[name] = f"- {words}, {target}: out of reach. {OUT_OF_REACH[name]}"
    if reasons:
        lines.append("")
    for reason in reasons.values():
        lines += textwrap.wrap(
            reason, 130, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
    return lines


def peers(found: list[tuple[Part, dict]]) -> list[str]:
    """Return the table of all figures that compare this code with another library's."""
    lines = ["## Other libraries", "", "| figure | measured | section |", "|---|---|---|"]
    for part, results in found:
        for name in results["figures"]:
            if any(peer in name for peer in PEERS):
                words = part.figures.get(name, f"`{name}`")
                lines.append(f"| {words} | {number(results[name])} | {link(part)} |")
    return lines


def link(part: Part) -> str:
    """Return a link to the section of a part."""
    anchor = "".join(c for c in part.title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return f"[{part.name}](#{anchor})"


def section(part: Part, results: dict) -> list[str]:
    """Return the lines of a part's section."""
    other = {"benchmark", "rows", "targets", "figures", "measured", *results["figures"]}
    values = {key: value for key, value in results.items() if key not in other}
    facts = ", ".join(
        f"{key} {number(value) if isinstance(value, float) else value}"
        for key, value in values.items()
    )
    rows = results["rows"]
    lines = [f"## {part.title}", "", f"`python benchmarks/{part.command}`", ""]
    lines += [*paragraph(part.about), "", *paragraph(f"Settings: {facts}."), ""]
    lines += [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(cell, row.values()))} |" for row in rows]
    lines += ["", "| figure | name | measured |", "|---|---|---|"]
    for name in results["figures"]:
        lines.append(f"| {part.figures.get(name, '')} | `{name}` | {number(results[name])} |")
    return lines


def number(value: float) -> str:
    """Return a number as text, with three digits or with separated thousands."""
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"


def cell(value: object) -> str:
    """Return the content of a cell as Markdown."""
    return value.replace("|", "\\|") if isinstance(value, str) else number(value)


def main() -> int:
    """Run the parts, write RESULTS.md, print its targets; return the exit status."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [part.name for part in PARTS]
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)} (default: all)")
    p.add_argument("--write", action="store_true", help="measure nothing; only write RESULTS.md")
    args = p.parse_args()
    if wrong := sorted(set(args.parts) - set(names)):
        p.error(f"no such part: {wrong[0]}; choose among {', '.join(names)}")
    chosen = [part for part in PARTS if not args.parts or part.name in args.parts]
    failed = [] if args.write else [part.name for part in chosen if not run(part)]
    text = page()
    PAGE.write_text(text)
    print("\n" + text[text.index("## Targets") : text.index(LONGER[0])].strip())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
