"""Predict the time of a step, the memory and the first limit of each method on many GPUs.

The time of one GPU was measured (results/gpu-nvidia-h200.json) or follows from multiply-adds. The
communication follows from the counted bytes and the speeds of a `Cluster`, which are assumptions.
"""

import functools
import json
import math
from dataclasses import dataclass, replace

import measure
from scaling_counts import (
    FLOAT,
    LONG,
    REST,
    TABLE,
    WHAT,
    Collective,
    collectives,
    sharded_averages,
    sharded_queue,
    wire,
)
from scaling_sizes import Sizes, sizes

IMAGES = 1_281_167  # ImageNet's training images
BATCH = 256  # images of a pass on the measured GPU
GIB = 2.0**30
_BUCKET = 25 * 2**20  # bytes of DDP's buckets


@dataclass(frozen=True)
class Cluster:
    """The assumed machines: by default nodes like NVIDIA's DGX H200. See `ASSUMPTIONS`."""

    node: int = 8
    nvlink: float = 450.0
    network: float = 50.0
    adapters: int = 8
    efficiency: float = 0.8
    start: float = 10.0
    hop: float = 1.0
    hop_out: float = 5.0
    cores: float = 14.0
    disk: float = 1.0
    tflops: float = 50.0
    memory: float = 3500.0


# for each field of `Cluster`, the option that sets it, and what it is
ASSUMPTIONS = {
    "--node": "GPUs of a node",
    "--nvlink": "GB/s from a GPU to those of its node",
    "--network": "GB/s of a network adapter (50: InfiniBand of 400 Gbit/s)",
    "--adapters": "network adapters of a node",
    "--efficiency": "fraction of these speeds that collectives reach",
    "--start": "microseconds to start a collective",
    "--hop": "microseconds from a GPU to the next one in the node",
    "--hop-out": "microseconds from a node to the next one",
    "--cores": "CPU cores for each GPU",
    "--disk": "GB/s of writing a checkpoint",
    "--tflops": "10^12 operations per second of the losses' matrix products in float32",
    "--memory": "GB/s of the GPU's memory in elementwise operations",
}


def seconds(c: Collective, ranks: int, cluster: Cluster) -> float:
    """Return the time of collectives with the usual algorithms.

    Rings send all bytes. They cross between nodes through all adapters of a node. Small all-reduces
    use trees of nodes. In an all-to-all, each GPU uses its share of the adapters.
    """
    if ranks == 1:
        return 0.0
    local, nodes = min(ranks, cluster.node), -(-ranks // cluster.node)
    inside = (local - 1) * cluster.hop
    between = cluster.hop_out * math.log2(nodes) if nodes > 1 else 0.0
    latency = {
        "all_reduce": 2 * (inside + between),
        "all_to_all": (ranks - 1) * cluster.hop + (cluster.hop_out if nodes > 1 else 0.0),
    }.get(c.op, (ranks - nodes) * cluster.hop + (nodes > 1) * nodes * cluster.hop_out)
    sent = wire(c.op, c.payload, ranks)
    out = cluster.network * cluster.adapters
    if c.op == "all_to_all":
        away = sent * (ranks - local) / (ranks - 1)  # to other nodes
        moving = max((sent - away) / cluster.nvlink, away / (out / cluster.node))
    else:
        moving = sent / (cluster.nvlink if nodes == 1 else min(cluster.nvlink, out))
    return c.calls * 1e-6 * (cluster.start + latency) + moving / (cluster.efficiency * 1e9)


@dataclass(frozen=True)
class Measured:
    """The figures of one GPU: of ResNet-50 at 224 pixels, 256 images, bf16.

    Attributes:
        step: seconds of a step, by method.
        memory: peak bytes of a step, by method.
        views: seconds to make two views of 256 images.
        loader: images per second of a core that decodes and crops.
    """

    step: dict[str, float]
    memory: dict[str, float]
    views: float
    loader: float


def measured() -> Measured:
    """Return the figures of the H200 in the committed results."""
    file = measure.ROOT / "benchmarks" / "results" / "gpu-nvidia-h200.json"
    stage = json.loads(file.read_text())["stages"]["2"]
    steps, others = stage["steps"]["figures"], stage["others"]["figures"]
    # several GPUs have one batch norm group each; the other ratios are of the same visit
    moco = steps["moco, one BN group ms"] / 1e3
    return Measured(
        step={
            "mocov2": moco,
            "synco": moco * steps["synco over moco"],
            "adco": moco * steps["adco over moco"],
            "sogclr": others["sogclr ms"] / 1e3,
        },
        memory={
            "mocov2": steps["moco, one BN group GiB"] * GIB,
            "synco": steps["synco GiB"] * GIB,
            "adco": steps["adco GiB"] * GIB,
            "sogclr": others["sogclr GiB"] * GIB,
        },
        views=stage["views"]["figures"]["ms"] / 1e3,
        loader=stage["loading"]["figures"]["images/s per worker"],
    )


_LIKE = {"simclr": "sogclr", "isogclr": "sogclr"}  # the same network and passes
_CHUNK = 256  # images that FNC compares at a time
JPEG = 110_000  # bytes of one of ImageNet's files, about

# fraction of a step's multiply-adds in the backward pass: 2 of 4 passes with a moving average, 2 of
# 3 without one
_BACKWARD = {"simclr": 2 / 3, "sogclr": 2 / 3, "isogclr": 2 / 3, "adco-multicrop": 0.6}


def _logits(method: str, s: Sizes, ranks: int) -> tuple[float, float]:
    """Return the logits and the multiply-adds that a loss has in addition to those of one rank.

    These are the comparisons with the joint batch, or with FNC's memory, which grows with it.
    """
    b, more = s.batch, (ranks - 1) * s.batch
    rows, columns, products = {
        "adco": (b, more, 2),
        "adco-sym": (2 * b, more, 2),
        "adco-multicrop": (5 * b, more, 2),
        "simclr": (2 * b, 2 * more, 3),
        "sogclr": (2 * b, 2 * more, 3),
        "isogclr": (2 * b, 2 * more, 3),
        "fnc": (len(s.pixels) * b, s.entries * (ranks - 1) / ranks, 3),
        "mocov3": (2 * b, more, 2),
    }.get(method, (0, 0, 0))
    return rows * columns, products * rows * columns * s.dim


def loss_seconds(logits: float, products: float, cluster: Cluster) -> float:
    """Return the time of a loss: its matrix products, and six passes over its float32 logits."""
    return 2 * products / (cluster.tflops * 1e12) + 6 * 4 * logits / (cluster.memory * 1e9)


@functools.cache
def _one_gpu(method: str) -> Sizes:
    """Return the sizes of a method with ResNet-50 and its default options, on one GPU."""
    entry = TABLE[method]
    words = ["-a", "resnet50", *entry.options.split()]
    return sizes(entry.script, words, BATCH, IMAGES, ranks=1)


def resnet50(method: str, batch: int, ranks: int) -> Sizes:
    """Return the sizes of a method with ResNet-50 and its default options on each of the GPUs."""
    s = _one_gpu(method)
    scale = batch / BATCH
    s = replace(s, batch=batch, gmac=s.gmac * scale, saved=round(s.saved * scale))
    if method != "fnc":
        return s
    # the memory has a number of joint batches, and keeps the index of each entry
    entries = round(s.entries * scale * ranks)
    more = (entries - s.entries) * (s.dim * FLOAT + LONG)
    return replace(s, entries=entries, buffers=s.buffers + more, state=s.state + more)


def compute_seconds(method: str, batch: int, one: Measured) -> tuple[float, str]:
    """Return the time of a step on one GPU, and how it is known.

    It is proportional to the batch. For a small batch, that is a lower bound.
    """
    if method in one.step:
        return one.step[method] * batch / BATCH, "measured"
    if method in _LIKE:
        return one.step[_LIKE[method]] * batch / BATCH, f"as {TABLE[_LIKE[method]].title}"
    more = resnet50(method, BATCH, 1).gmac / resnet50("mocov2", BATCH, 1).gmac
    return one.step["mocov2"] * more * batch / BATCH, "multiply-adds"


def memory_bytes(method: str, batch: int, ranks: int, one: Measured) -> tuple[float, str]:
    """Return the peak memory of a GPU, and how that of one GPU is known."""
    s, alone = resnet50(method, batch, ranks), resnet50(method, BATCH, 1)
    if method in one.memory:
        activations, source = one.memory[method] - _state(alone), "measured"
        if method == "adco":
            # the version that was measured kept two tensors of the size of the bank
            bank = alone.entries * alone.dim * FLOAT
            activations -= 2 * bank
            source += f", less 2 x {bank / 1e6:.1f} MB"
    else:
        activations, source = alone.saved / 2, "counted"  # in bf16
    if method == "fnc":
        grown = 2 * _CHUNK * 4 * (s.entries - alone.entries)  # two buffers for the similarities
    else:
        grown = 3 * 4 * _logits(method, s, ranks)[0]  # logits, their exponentials and gradient
    return _state(s) + activations * batch / BATCH + grown, source


def _state(s: Sizes) -> float:
    """Return the bytes of weights, buffers, gradient and the optimizer's state."""
    return s.state + s.gradient + s.gradient * s.moments


def predict(method: str, batch: int, ranks: int, cluster: Cluster, one: Measured) -> dict:
    """Return the prediction for a method on `ranks` GPUs with `batch` images each.

    `lost` has the seconds that each cause adds to a step. Bytes are those of a rank and step.
    """
    s = resnet50(method, batch, ranks)
    compute, source = compute_seconds(method, batch, one)
    area = sum(size**2 for size in s.pixels) / (2 * 224**2)
    busy = compute + one.views * area * batch / BATCH

    lost = dict.fromkeys((*WHAT, "larger head", "loader", "checkpoint"), 0.0)
    payload, sent = dict.fromkeys(WHAT, 0.0), dict.fromkeys(WHAT, 0.0)
    for c in collectives(method, s, ranks, cuda=True):
        if c.what == REST:
            continue
        payload[c.what] += c.payload
        sent[c.what] += wire(c.op, c.payload, ranks)
        took = seconds(c, ranks, cluster)
        if c.overlaps:  # all but the last bucket is sent during the backward pass
            last = min(1.0, _BUCKET / c.payload)
            took = max(took * last, took - compute * _BACKWARD.get(method, 0.5))
        lost[c.what] += took
    lost["larger head"] = loss_seconds(*_logits(method, s, ranks), cluster)
    step = busy + sum(lost.values())
    cores = batch / step / one.loader
    lost["loader"] = max(0.0, cores / cluster.cores - 1) * step

    memory, memory_source = memory_bytes(method, batch, ranks, one)
    saved = s.state + s.gradient * s.moments
    save = saved / (cluster.disk * 1e9)
    lost["checkpoint"] = save / max(1, IMAGES // (batch * ranks))  # saved once an epoch
    total = busy + sum(lost.values())
    first = max(lost, key=lost.get)
    return {
        "method": method,
        "ranks": ranks,
        "batch": batch,
        "compute": compute,
        "compute_source": source,
        "busy": busy,
        "lost": lost,
        "step": total,
        "images_per_s": batch * ranks / total,
        "efficiency": busy / total,
        "first_limit": first,
        "first_share": lost[first] / total,
        "payload": payload,
        "sent": sent,
        "memory": memory,
        "memory_source": memory_source,
        "cores": cores,
        "read_GB_per_s": batch * ranks / total * JPEG / 1e9,
        "checkpoint": saved,
        "save_seconds": save,
    }


# Must the queue be sharded? Must the moving averages of SogCLR?


def queue(ranks: int, batch: int, entries: int, dim: int, cluster: Cluster) -> dict:
    """Return the costs of a replicated and a sharded queue, in bytes and seconds, on a GPU.

    Both compare as many pairs: a rank's queries with all entries, or all queries with its entries.
    """
    logits = batch * entries
    head = loss_seconds(logits, 2 * logits * dim, cluster)  # similarities and gradient of q
    moved = sharded_queue(batch, dim, ranks, FLOAT)
    return {
        "ranks": ranks,
        "batch": batch,
        "entries": entries,
        "replicated_bytes": entries * dim * FLOAT,
        "sharded_bytes": entries * dim * FLOAT / ranks,
        "logits_bytes": logits * FLOAT,
        "head": head,
        "sent": sum(wire(c.op, c.payload, ranks) for c in moved),
        "communication": sum(seconds(c, ranks, cluster) for c in moved),
    }


def averages(ranks: int, batch: int, images: int, cluster: Cluster) -> dict:
    """Return the costs of replicated and sharded moving averages of SogCLR on a GPU."""
    more = sharded_averages(batch, ranks)
    return {
        "ranks": ranks,
        "batch": batch,
        "images": images,
        "replicated_bytes": images * FLOAT,
        "sharded_bytes": images * FLOAT / ranks,
        "sent": sum(wire(c.op, c.payload, ranks) for c in more),
        "communication": sum(seconds(c, ranks, cluster) for c in more),
        "save_seconds": images * FLOAT / (cluster.disk * 1e9),
    }
