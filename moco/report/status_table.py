"""Print the status of runs as a table or as JSON."""

import dataclasses
import math
from typing import Any

from moco.engine.log import format_duration
from moco.messages import counted
from moco.report.status import Status


def as_dicts(found: list[Status]) -> list[dict[str, Any]]:
    """Return the runs as plain values, for JSON."""
    return [dataclasses.asdict(one) for one in found]


def table(found: list[Status], now: float, width: float = math.inf) -> str:
    """Return a table of the runs, and a line that counts them. Reasons are cut at `width`."""
    head = ("run", "method", "data", "epoch", "loss", "accuracy", "left", "seen", "state")
    rows = [head, *(_row(one, now) for one in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    reasons = ["", *(one.reason or "" for one in found)]
    for i, reason in enumerate(reasons):
        reason = "".join(c if c.isprintable() else " " for c in reason)
        room = max(20, width - len(lines[i]) - 2)
        cut = reason if len(reason) <= room else f"{reason[: int(room) - 4]} ..."
        lines[i] = f"{lines[i]}  {cut}".rstrip()
    states = [one.state for one in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return "\n".join([*lines, f"{counted(len(found), 'run')}: {counts}"]) + "\n"


def _row(one: Status, now: float) -> tuple[str, ...]:
    """Return the cells of a run, without its reason."""
    epoch = "" if one.epochs_done is None else f"{one.epochs_done:.1f}".removesuffix(".0")
    if one.epochs:
        epoch = f"{epoch or 0}/{one.epochs}"
    accuracy = ""
    if one.accuracy is not None:
        accuracy = f"{one.metric} {100 * one.accuracy:.1f}"
        accuracy += "" if one.gain is None else f" ({100 * one.gain:+.1f})"
    return (
        one.folder,
        one.method or "",
        one.data or "",
        epoch,
        "" if one.loss is None else f"{one.loss:.4g}",
        accuracy,
        "" if one.seconds_left is None else format_duration(one.seconds_left),
        "" if one.seen is None else f"{format_duration(max(0.0, now - one.seen))} ago",
        one.state,
    )
