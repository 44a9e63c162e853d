"""The table that benchmarks/gpu.py prints last: all figures, and the targets for one GPU."""

import textwrap

import gpu_cifar

TITLES = {1: "correctness", 2: "speed", 3: "CIFAR-10, MoCo", 4: "CIFAR-10, all methods"}
Stages = dict[str, dict[str, dict]]  # the results of each part, by stage and name


def figure(stages: Stages, stage: int, part: str, name: str) -> float | None:
    """Return a figure of a part by its name; None if it was not measured."""
    value = stages.get(str(stage), {}).get(part, {}).get("figures", {}).get(name)
    return value if isinstance(value, int | float) else None


def targets(stages: Stages) -> list[dict[str, object]]:
    """Return the figures that one H100 should reach, next to those measured."""
    ready, loaded = (
        figure(stages, 2, "steps", "moco pairs/s"),
        figure(stages, 2, "loading", "images/s"),
    )
    finished = (
        figure(stages, 3, "moco", "k-NN epoch") == gpu_cifar.EPOCHS
        and figure(stages, 3, "moco", "data") == "lossless"
    )
    accuracy = figure(stages, 3, "moco", "k-NN") if finished else None
    loading = loaded / ready if loaded and ready else None
    minutes = figure(stages, 3, "moco", "minutes of 200 epochs")
    plain = "MoCo in bf16 over plain MoCo in fp32, in speed"
    wanted: list[tuple[str, float, float | None]] = [  # a minimum, or, if negative, a maximum
        (f"{plain}, TF32", 3, figure(stages, 2, "steps", "plain fp32 TF32 over moco")),
        (f"{plain}, no TF32", 3, figure(stages, 2, "fp32", "plain fp32 over moco")),
        ("SynCo over MoCo, step time", -1.02, figure(stages, 2, "steps", "synco over moco")),
        ("image pairs/s, ResNet-50 MoCo, views ready", 1800, ready),
        ("images/s, loader over training", 1, loading),
        ("minutes of 200 epochs of CIFAR-10", -9, minutes),
        ("k-NN after 200 epochs, lossless images", 80.6, accuracy),
    ]
    return [
        {
            "target": name,
            "wanted": f"{'<=' if limit < 0 else '>='} {abs(limit):g}",
            "measured": value,
            "met": None if value is None else value <= -limit if limit < 0 else value >= limit,
        }
        for name, limit, value in wanted
    ]


def print_table(stages: Stages, on_gpu: bool) -> None:
    """Print all figures, next to the targets and the published log."""
    for stage, parts in sorted(stages.items()):
        print(f"\nstage {stage}, {TITLES[int(stage)]}")
        for name, found in parts.items():
            print(f"  {name:24}{found['status']:10}{_line(found.get('figures', {}))}")
            for row in found.get("figures", {}).get("top ten", []):
                print(
                    f"      {row['ms']:9.3f} ms  {row['share']:6.1%}  {row['calls']:5} x  "
                    f"{row['kernel']}"
                )
    rows = stages.get("3", {}).get("moco", {}).get("figures", {}).get("rows", [])
    if rows:
        print(f"\n{'epoch':>7}{'loss':>9}{'published':>11}{'k-NN':>9}{'published':>11}")
        for row in rows:
            widths = {"loss": 9, "published loss": 11, "k-NN": 9, "published k-NN": 11}
            cells = {name: "" if row[name] is None else f"{row[name]:.2f}" for name in widths}
            print(
                f"{row['epoch']:7}" + "".join(f"{cells[name]:>{widths[name]}}" for name in widths)
            )
    where = "" if on_gpu else " (sizes are tiny here: this is a CPU)"
    print(f"\n{'target for one H100' + where:58}{'wanted':>9}{'measured':>10}")
    for row in targets(stages):
        value = "-" if row["measured"] is None else f"{row['measured']:.4g}"
        met = "" if row["met"] is None or not on_gpu else "  met" if row["met"] else "  MISSED"
        print(f"{row['target']:58}{row['wanted']:>9}{value:>10}{met}")


def _line(figures: dict[str, object]) -> str:
    """Return the numbers and strings among a part's figures, wrapped for a terminal."""
    shown = [
        f"{name} {value:.4g}"
        for name, value in figures.items()
        if isinstance(value, int | float) and value is not True
    ]
    shown += [f"{name} {value}" for name, value in figures.items() if isinstance(value, str)]
    return textwrap.fill("; ".join(shown), 90, subsequent_indent=" " * 36)
