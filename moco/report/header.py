"""Show what each run is: its method, data, command, dates, device and versions."""

import math
import time
from pathlib import Path

import numpy as np

from moco.engine import record
from moco.engine.log import format_duration
from moco.messages import counted
from moco.methods import METHODS, trains_on_labels
from moco.report import markup, status
from moco.report.markup import escaped
from moco.report.runs import Run


def section(found: list[Run]) -> str:
    """Return a card for each run, with the lines about damaged or empty logs."""
    cards = "".join(_card(i, run, len(found) > 1) for i, run in enumerate(found))
    lines = [
        markup.note(run, f"{n} damaged line(s) of log.jsonl left out")
        for run in found
        if (n := run.log.damaged)
    ]
    lines += [
        markup.note(run, "no epoch is logged yet, so there are no curves")
        for run in found
        if not run.log.columns
    ]
    return f'<div class="cards">{cards}</div>{"".join(lines)}'


def _card(i: int, run: Run, several: bool) -> str:
    noted = record.read(run.folder)
    title = f"<h3>{markup.run_name(i, run)}</h3>" if several else ""
    rows = [
        ("Method", escaped(_method(run))),
        ("Network", escaped(_network(run))),
        ("Data", escaped(data_of(run, noted))),
        ("Views", escaped(run.args.get("recipe") or "")),
        ("Training", escaped(_training(run))),
        ("Dates", escaped(_dates(run, noted))),
        ("State", escaped(_state(run))),
        ("Device", escaped(_device(run, noted))),
        ("Versions", escaped(_versions(noted))),
        ("Folder", escaped(run.folder)),
        ("Command", _command(noted)),
    ]
    return f'<div class="card">{title}{markup.facts(rows)}</div>'


def _method(run: Run) -> str:
    """Return the name of the method and its script, and whether it trains on labels."""
    script, method = run.args.get("script", ""), run.args.get("method", "")
    known = f"main_{script}" in {method.script for method in METHODS.values()}
    labels = ", trained on labels" * trains_on_labels(method)
    return f"{method}" + f" (main_{script}.py)" * known + labels


def _network(run: Run) -> str:
    size = run.args.get("image_size")
    return f"{run.args.get('arch', '')}" + f", {size} x {size} pixels" * isinstance(size, int)


def data_of(run: Run, noted: dict) -> str:
    """Return the name of the data, with its list files and numbers of images and classes."""
    args = run.args
    text = Path(str(args.get("data", ""))).name
    if args.get("dataset") not in (None, "imagenet", text):
        text = f"{args['dataset']} in {text}"
    lists = [args[name] for name in ("class_list", "file_list") if args.get(name)]
    text += "".join(f" ({Path(str(file)).name})" for file in lists)
    images, classes = noted.get("images"), noted.get("classes")
    if isinstance(images, int):
        text += f", {images:,} training images"
        if isinstance(classes, int):
            word = "class" if classes == 1 else "classes"
            text += f" of {classes:,} {word}" if classes else " without labels"
    return text


def _training(run: Run) -> str:
    word = "epoch" if run.args.get("epochs") == 1 else "epochs"
    facts = [f"{epochs(run)} {word}"]
    if size := batch(run.args):
        facts.append(f"batch {size}")
    if lr := peak_lr(run):
        facts.append(f"peak learning rate {lr}")
    if (seed := run.args.get("seed")) is not None:
        facts.append(f"seed {seed}")
    return ", ".join(facts)


def epochs(run: Run) -> str:
    """Return the numbers of epochs done and planned."""
    log, total = run.log, run.args.get("epochs")
    done = log.last_step or 0
    per_epoch = log.steps_per_epoch
    text = f"{done / per_epoch:.4g}" if per_epoch else counted(round(done), "step")
    if not log.steps_per_epoch and not done:
        text = "0"
    return text if total is None else f"{text} of {total}"


def batch(args: dict) -> str:
    """Return the total batch size, as far as the options tell; "" if they do not."""
    sizes = [args.get(name, 1) for name in ("batch_size", "nodes", "accumulation_steps")]
    if args.get("batch_is_of_all_nodes"):
        sizes[1] = 1
    if not all(isinstance(size, int) for size in sizes) or "batch_size" not in args:
        return ""
    if args.get("batch_is_per_process"):
        return f"{sizes[0] * sizes[2]} a process"
    return f"{sizes[0] * sizes[1] * sizes[2]}"


def peak_lr(run: Run) -> str:
    """Return the largest learning rate of the log, or the option."""
    if "lr" in run.log.columns:
        return f"{np.nanmax(run.log.columns['lr'][1]):.3g}"
    return str(run.args.get("lr") or "")


def _dates(run: Run, noted: dict) -> str:
    """Return when the run began and ended, and how long it trained."""
    first, began, ended = (_date(noted.get(name)) for name in ("first_began", "began", "ended"))
    parts = [f"began {first or began}"] if first or began else []
    if first and began and first != began:
        parts.append(f"last resumed {began}")
    if ended:
        parts.append(f"ended {ended}")
    if run.log.seconds:
        parts.append(f"trained {format_duration(run.log.seconds)}")
    return ", ".join(parts)


def _date(seconds: object) -> str:
    """Return a time in seconds since 1970 as a date of this time zone; "" if it is none."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return ""
    try:
        valid = math.isfinite(seconds) and seconds > 0
        return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)) if valid else ""
    except (OverflowError, ValueError, OSError):
        return ""


def _state(run: Run) -> str:
    found = status.read(run.folder)
    return found.state + (f": {found.reason}" if found.reason else "")


def _device(run: Run, noted: dict) -> str:
    device, processes = noted.get("device"), noted.get("processes")
    text = device if isinstance(device, str) else ""
    if text and isinstance(processes, int) and processes > 1:
        text += f", {processes} processes"
    speed = run.log.columns.get("images_per_s")
    if text and speed is not None and np.isfinite(speed[1]).any():
        text += f", {np.nanmedian(speed[1]):.0f} images per second"
    return text


def _versions(noted: dict) -> str:
    found = noted.get("versions")
    if not isinstance(found, dict):
        return ""
    return ", ".join(f"{name} {version}" for name, version in list(found.items())[:12])


def _command(noted: dict) -> str:
    command = noted.get("command")
    if not isinstance(command, str) or not command:
        return ""
    # a browser would break lines within an option, after its hyphens
    words = " ".join(f"<span>{escaped(word)}</span>" for word in command.split(" "))
    return f"<code>{words}</code>"
