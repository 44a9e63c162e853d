"""Write the tables and the plot of docs/scaling.md from the results of scaling.py."""

import re
from pathlib import Path

import scaling_check
from matplotlib.figure import Figure
from scaling_counts import TABLE, WHAT
from scaling_predict import ASSUMPTIONS

from moco.report.plots import COLORS

GIB = 2.0**30
_MARKED = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end of table -->)", re.S)
_CAUSES = (*WHAT, "larger head", "loader", "checkpoint")
_SHORT = {"sync batch norm": "SyncBN"}
# the methods of the plot; the others are like one of them
_DRAWN = ("mocov2", "adco", "sogclr", "fnc", "moby", "mocov3")


def write(page: Path, found: dict) -> None:
    """Replace the tables between the page's markers, and draw its plot next to it."""
    page.write_text(filled(page.read_text(), found))
    draw(found["predictions"]).savefig(page.with_suffix(".png"), dpi=110)


def filled(text: str, found: dict) -> str:
    """Return the text of the page with the tables of these results."""
    return _MARKED.sub(lambda m: f"{m[1]}\n{SECTIONS[m[2]](found)}\n\n{m[3]}", text)


def _table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _number(value: float) -> str:
    """Return a value with at least three digits."""
    for least, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _mega(value: float) -> str:
    return _number(value / 1e6)


def _cause(what: str) -> str:
    return _SHORT.get(what, what)


def _of(found: dict, batch: int) -> dict[tuple[str, int], dict]:
    """Return the predictions by method and number of GPUs."""
    return {(p["method"], p["ranks"]): p for p in found["predictions"] if p["batch"] == batch}


def _bytes(found: dict) -> str:
    of = _of(found, 256)
    rows = []
    for method, entry in TABLE.items():
        p = [of[method, ranks] for ranks in (8, 64, 512)]
        payload = [_mega(p[0]["payload"][what]) if p[0]["payload"][what] else "" for what in WHAT]
        rows.append([entry.title, *payload, *[_mega(sum(one["sent"].values())) for one in p]])
    sent = [f"sent, {ranks} GPUs" for ranks in (8, 64, 512)]
    return _table(["MB per GPU and step", *map(_cause, WHAT), *sent], rows)


def _check(found: dict) -> str:
    rows = []
    checks = {(one["method"], one["ranks"]): one for one in found["checks"]}
    for method, entry in TABLE.items():
        for ranks in sorted({ranks for name, ranks in checks if name == method}):
            one = checks[method, ranks]
            step = [row for row in one["rows"] if row["when"] == "step"]
            counted, real = (sum(row[key] for row in step) for key in ("counted", "measured"))
            worst = scaling_check.worst([one])
            wire = [""] * 3
            if "loopback" in one:
                sent = one["formula_sent"] / 1e6, one["loopback"] / 1e6
                wire = [f"{sent[0]:,.3f}", f"{sent[1]:,.3f}", f"{worst['sent']:.2%}"]
            cells = [f"{counted:,.0f}", f"{real:,.0f}", f"{worst['payload']:.2%}"]
            rows.append([entry.title, ranks, *cells, *wire])
    return _table(
        [
            "method",
            "processes",
            "payload per process and step, bytes: counted",
            "measured",
            "largest difference of a collective",
            "sent by all processes, MB: counted",
            "measured on the wire",
            "difference",
        ],
        rows,
    )


def _factors(found: dict) -> str:
    ops = list(next(iter(found["factors"].values())))
    rows = [
        [ranks, *[f"{of[op]['factor']:.3f} / {of[op]['measured']:.3f}" for op in ops]]
        for ranks, of in sorted(found["factors"].items(), key=lambda item: int(item[0]))
    ]
    return _table(["processes", *[f"{op}: counted / measured" for op in ops]], rows)


def _prediction(batch: int):
    def section(found: dict) -> str:
        of, rows = _of(found, batch), []
        for method, entry in TABLE.items():
            one = of[method, 1]
            cells = [f"{1e3 * one['compute']:.1f} ({one['compute_source']})"]
            for ranks in (8, 64, 512):
                p = of[method, ranks]
                cells.append(f"{1e3 * p['step']:.1f}")
                cells.append(f"{p['efficiency']:.0%}")
                cells.append(f"{_cause(p['first_limit'])}, {p['first_share']:.1%}")
            rows.append([entry.title, *cells])
        head = ["method", "ms on one GPU"]
        for ranks in (8, 64, 512):
            head += [f"{ranks} GPUs: ms, predicted", "efficiency", "first limit"]
        return _table(head, rows)

    return section


def _slow_network(found: dict) -> str:
    rows = []
    for method in _DRAWN:
        cells = []
        for p in found["slow_network"]:
            if p["method"] == method:
                cells += [f"{1e3 * p['step']:.1f}", f"{p['efficiency']:.0%}"]
                cells.append(f"{_cause(p['first_limit'])}, {p['first_share']:.1%}")
        rows.append([TABLE[method].title, *cells])
    head = ["method"]
    for ranks in (64, 512):
        head += [f"{ranks} GPUs: ms, predicted", "efficiency", "first limit"]
    return _table(head, rows)


def _memory(found: dict) -> str:
    of, rows = _of(found, 256), []
    for method, entry in TABLE.items():
        one, p = of[method, 1], [of[method, ranks] for ranks in (8, 64, 512)]
        rows.append(
            [
                entry.title,
                f"{one['memory'] / GIB:.1f} ({one['memory_source']})",
                *[f"{q['memory'] / GIB:.1f}" for q in p],
                f"{p[0]['checkpoint'] / 1e6:,.0f} / {p[2]['checkpoint'] / 1e6:,.0f}",
                f"{p[0]['save_seconds']:.1f} / {p[2]['save_seconds']:.1f}",
                f"{p[0]['cores']:.1f}",
                " / ".join(_number(q["read_GB_per_s"]) for q in p),
            ]
        )
    head = ["method", "GiB on one GPU"]
    head += [f"{ranks} GPUs: GiB, predicted" for ranks in (8, 64, 512)]
    head += ["checkpoint, MB, 8 / 512 GPUs (counted)", "seconds to save it (predicted)"]
    head += [
        "loader cores per GPU (predicted)",
        "GB/s of JPEG files, 8 / 64 / 512 GPUs (predicted)",
    ]
    return _table(head, rows)


def _queue(found: dict) -> str:
    rows = [
        [
            q["ranks"],
            q["batch"],
            f"{q['replicated_bytes'] / 2**20:.0f} / {q['sharded_bytes'] / 2**20:.0f}",
            f"{q['logits_bytes'] / 2**20:.0f}",
            f"{1e3 * q['head']:.2f}",
            f"0 / {_mega(q['sent'])}",
            f"0 / {1e3 * q['communication']:.2f}",
        ]
        for q in found["queue"]
    ]
    return _table(
        [
            "GPUs",
            "images per GPU",
            "queue, MiB per GPU: replicated / sharded",
            "logits [B, K], MiB: both (SynCo)",
            "loss, ms: both (predicted)",
            "MB sent per GPU: replicated / sharded (counted)",
            "ms of communication (predicted)",
        ],
        rows,
    )


def _queue_check(found: dict) -> str:
    rows = [
        [
            (q := one["queue"])["ranks"],
            f"{q['loss']:.1e}",
            f"{q['gradient']:.1e}",
            "yes" if q["equal_queues"] else "no",
            f"{q['bytes_counted']:,.0f} / {q['bytes_sent']:,.0f}",
        ]
        for one in found["shards"]
    ]
    head = ["processes", "relative difference: loss", "gradient", "equal queues"]
    return _table([*head, "bytes sent per process and step: counted / measured"], rows)


def _averages(found: dict) -> str:
    rows = [
        [
            u["ranks"],
            f"{u['replicated_bytes'] / 1e6:.0f} / {u['sharded_bytes'] / 1e6:.1f}",
            _mega(u["sent"]),
            f"{1e3 * u['communication']:.3f}",
            f"{u['save_seconds']:.1f}",
        ]
        for u in found["averages"]
    ]
    return _table(
        [
            "GPUs",
            "`u`, MB per GPU: replicated / sharded",
            "MB sent per GPU and step, in addition, if sharded (counted)",
            "ms per step, in addition, if sharded (predicted)",
            "seconds to save `u` (predicted)",
        ],
        rows,
    )


def _averages_check(found: dict) -> str:
    rows = [
        [
            (u := one["u"])["ranks"],
            "yes" if u["equal_losses"] and u["equal_gradients"] else "no",
            "yes" if u["equal_averages"] else "no",
            f"{u['MB_replicated']:.0f} / {u['MB_sharded']:.0f}",
            f"{u['bytes_sent_replicated']:,.0f} / {u['bytes_sent_sharded']:,.0f}",
            f"{u['bytes_counted_sharded']:,.0f}",
        ]
        for one in found["shards"]
    ]
    return _table(
        [
            "processes",
            "same bits: losses and gradients",
            "all `u`",
            "`u`, MB per process: replicated / sharded",
            "bytes sent per process and step, measured: replicated / sharded",
            "sharded, counted",
        ],
        rows,
    )


def _assumptions(found: dict) -> str:
    rows = []
    for name, value in found["cluster"].items():
        option = f"--{name.replace('_', '-')}"
        rows.append([f"`{option}`", f"{value:g}", ASSUMPTIONS[option]])
    return _table(["option", "value", "meaning"], rows)


SECTIONS = {
    "bytes": _bytes,
    "check": _check,
    "factors": _factors,
    "prediction-256": _prediction(256),
    "prediction-32": _prediction(32),
    "slow-network": _slow_network,
    "memory": _memory,
    "queue": _queue,
    "queue-check": _queue_check,
    "averages": _averages,
    "averages-check": _averages_check,
    "assumptions": _assumptions,
}


def draw(predictions: list[dict]) -> Figure:
    """Return the plot: the fraction of a step that each cause takes, for methods and sizes."""
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    of = {(p["method"], p["ranks"], p["batch"]): p for p in predictions}
    causes = [
        cause for cause in _CAUSES if any(p["lost"][cause] / p["step"] > 0.002 for p in predictions)
    ]
    for panel, batch in zip(panels, (256, 32), strict=True):
        ticks, labels = [], []
        for i, method in enumerate(_DRAWN):
            for j, ranks in enumerate((8, 64, 512)):
                p, x, bottom = of[method, ranks, batch], 3.8 * i + j, 0.0
                for color, cause in zip(COLORS, causes, strict=False):
                    height = 100 * p["lost"][cause] / p["step"]
                    panel.bar(
                        x, height, 0.85, bottom, color=color, label=None if x else _cause(cause)
                    )
                    bottom += height
                panel.text(x, bottom + 1.5, f"{bottom:.0f}", ha="center", fontsize=9)
                ticks.append(x)
                labels.append(str(ranks))
            if batch == 32:
                panel.text(3.8 * i + 1, -13, TABLE[method].title, ha="center", va="top")
        panel.set_ylim(0, 100)
        panel.set_ylabel("% of a step's time, not computing")
        panel.set_title(f"{batch} images per GPU", loc="left", fontsize=11)
        panel.set_xticks(ticks, labels)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].legend(loc="upper left", ncols=2, fontsize=9, frameon=False)
    panels[1].set_xlabel("GPUs (predicted)", labelpad=28)
    return figure
