"""Compare the formulas of scaling_counts.py with the collectives of real processes.

Each method trains for a few steps on several processes, with a small network on small images. Two
measurements are compared with the formulas: the payload of each process's collectives, as its
process group counts them, and the bytes that the loopback interface transports. The second one
also checks the factors from payload to bytes sent.
"""

import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import scaling_counter
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_setup import image_folder
from scaling_counts import TABLE, Collective, collectives, wire
from scaling_sizes import sizes

BATCH = 8  # images of a process
STEPS, FIRST = 4, 2  # steps of a run, and the first one to count
LIMIT = 0.01  # largest relative difference
_WORDS = "-a resnet18 --image-size 32 -j 0 --epochs 1 -p 2".split()
_HEADER = 66  # bytes of a TCP packet's headers on the loopback interface
_IN_NAMESPACE = "SCALING_IN_NAMESPACE"


def in_namespace(words: list[str]) -> bool:
    """Return whether this process has a loopback interface to itself.

    If the system allows it, start the script again in a network namespace of its own, and exit
    with its status.
    """
    if os.environ.get(_IN_NAMESPACE) == "yes":
        _start_loopback()
        return True
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        try:
            possible = subprocess.run([*command, "true"], capture_output=True).returncode == 0
        except OSError:
            break
        if possible:
            env = {**os.environ, _IN_NAMESPACE: "yes"}
            sys.exit(subprocess.run([*command, sys.executable, *words], env=env).returncode)
    return False


def _start_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    import fcntl

    up, get_flags, set_flags = 1, 0x8913, 0x8914  # IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(handle, get_flags, request))[1]
        fcntl.ioctl(handle, set_flags, struct.pack("16sh14x", b"lo", flags | up))


def compare(methods: list[str], ranks: int, loopback: bool) -> list[dict[str, object]]:
    """Train with methods on `ranks` processes; return the counted and the measured bytes of each.

    Args:
        methods: names in `scaling_counts.TABLE`.
        ranks: number of processes.
        loopback: whether the loopback interface has no other traffic.
    """
    images = BATCH * ranks * STEPS
    with tempfile.TemporaryDirectory() as folder:
        data, runs, formulas = Path(folder) / "images", [], []
        image_folder(data, classes=2, train=images // 2, val=2, pixels=32)
        for method in methods:
            entry, run = TABLE[method], Path(folder) / method
            run.mkdir()
            words = [*_WORDS, *entry.options.split(), *entry.small.split()]
            # the meta device has no random numbers for synthetic negatives
            first = ["--warmup-epochs", 1000] if "--warmup-epochs" in words else []
            s = sizes(entry.script, [*words, *first], BATCH, images, ranks)
            formulas.append(collectives(method, s, ranks, cuda=False))
            # the batch of main_moby.py is that of a process
            batch = BATCH if entry.script == "main_moby" else BATCH * ranks
            words = [data, *words, "-b", batch]
            runs.append(scaling_counter.prepared(entry.script, words, ranks, run))
        records = scaling_counter.count(runs, ranks, FIRST)
    found = []
    for method, of_ranks, of_method in zip(methods, records, formulas, strict=True):
        one = {"method": method, "ranks": ranks, "rows": _rows(of_ranks, of_method)}
        found.append(one | (_sent(of_ranks, of_method) if loopback else {}))
    return found


def _sent(records: list[dict], formulas: list[Collective]) -> dict[str, float]:
    """Return the bytes that all ranks send in the steps: formula, and loopback interface."""
    ranks = len(records)
    of_step = sum(wire(c.op, c.payload, ranks) for c in formulas if c.when == "step")
    total, packets = records[0]["loopback"]
    return {
        "formula_sent": records[0]["step"] * ranks * of_step,
        "loopback": total - _HEADER * packets,
        "loopback_with_headers": total,
    }


def _rows(records: list[dict], formulas: list[Collective]) -> list[dict[str, object]]:
    """Return the payload per rank, in bytes, by phase and collective: formula and measurement."""
    counted: dict[tuple, float] = defaultdict(float)
    for c in formulas:
        counted[c.when, "gradient" if c.what == "gradient" else "explicit", c.op] += c.payload
    measured: dict[tuple, float] = defaultdict(float)
    for record in records:
        for phase, caller, op, _, payload, _ in record["found"]:
            if phase in ("step", "log line", "epoch"):
                measured[phase, caller, op] += payload / record[phase] / len(records)
    return [
        {
            "when": key[0],
            "what": "gradient" if key[1] == "gradient" else "other",
            "op": key[2],
            "counted": counted[key],
            "measured": measured[key],
        }
        for key in sorted(counted.keys() | measured.keys())
    ]


def worst(checks: list[dict]) -> dict[str, float]:
    """Return the largest relative differences between formulas and measurements.

    The keys are "payload", and "sent" if the loopback interface was measured.
    """

    def difference(a: float, b: float) -> float:
        return abs(a - b) / max(a, b, 1)

    rows = [row for check in checks for row in check["rows"]]
    found = {"payload": max(difference(row["counted"], row["measured"]) for row in rows)}
    if "loopback" in checks[0]:
        pairs = [(check["formula_sent"], check["loopback"]) for check in checks]
        found["sent"] = max(difference(*pair) for pair in pairs)
    return found


# The factors from the payload to the bytes sent, for each collective alone.


def factors(ranks: int) -> dict[str, dict[str, float]]:
    """Return, for each collective, bytes sent per byte of payload: the factor and as measured.

    Call it only if the loopback interface has no other traffic.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure_factors, (ranks, folder), nprocs=ranks)
        found = torch.load(Path(folder) / "found.pt")
    return {op: {"factor": wire(op, 1, ranks), "measured": found[op]} for op in found}


def _measure_factors(rank: int, ranks: int, folder: str) -> None:
    """Measure the bytes on the loopback interface of one call of each collective."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    x = torch.zeros(ranks * 2**17)
    gathered = x.new_empty(ranks * len(x))
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather(list(gathered.chunk(ranks)), x),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
        "broadcast": lambda: dist.broadcast(x, 0),
    }
    found = {}
    for op, call in calls.items():
        call()
        dist.barrier()
        before = scaling_counter.loopback()
        dist.barrier()
        for _ in range(4):
            call()
        dist.barrier()
        total, packets = (b - a for a, b in zip(before, scaling_counter.loopback(), strict=True))
        dist.barrier()
        payload = x.numel() * x.element_size()
        found[op] = (total - _HEADER * packets) / 4 / ranks / payload
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
