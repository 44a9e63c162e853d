"""The collectives of a training step of each method, with their bytes, as formulas.

`TABLE` names a function for each method, which returns what the method's code communicates. If the
code changes, change that function. `python benchmarks/scaling.py --check` compares it with the
collectives of real processes.

Notation: B images per rank and pass, V views, S their pixels, C feature size, K entries of the
queue or bank, W ranks. Features and images are float32, also in mixed precision.
"""

from collections.abc import Callable
from dataclasses import dataclass

from scaling_sizes import Sizes

FLOAT, LONG, DOUBLE = 4, 8, 8  # bytes

# bytes that each rank sends, as a multiple of its payload, with the usual algorithms (rings; for
# broadcast the mean over ranks). The payload is the tensor that a rank gives to the collective.
_WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "reduce_scatter": lambda w: (w - 1) / w,
    "all_gather": lambda w: w - 1.0,
    "all_to_all": lambda w: (w - 1) / w,
    "broadcast": lambda w: (w - 1) / w,
    "barrier": lambda _: 0.0,
}


def wire(op: str, payload: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends for a collective with this payload."""
    return payload * _WIRE[op](ranks)


@dataclass(frozen=True)
class Collective:
    """Some equal collectives of a step.

    Attributes:
        what: what they are for; one of the names in `WHAT`.
        op: the collective.
        payload: bytes that each rank gives to them, in all.
        calls: number of calls.
        when: step, log line or epoch.
        overlaps: whether the step computes while they run.
    """

    what: str
    op: str
    payload: int
    calls: int = 1
    when: str = "step"
    overlaps: bool = False


WHAT = ("image exchange", "feature gather", "bank exchange", "sync batch norm", "gradient")
REST = "rest"

Table = Callable[[Sizes, int, bool], list[Collective]]


def _sync_batch_norm(norms: tuple[int, int], passes: int, trained: bool, cuda: bool):
    """Return the collectives of synchronized batch norms with so many forward passes.

    Args:
        norms: channels of all batch norms, and their number.
        passes: forward passes of a step.
        trained: whether there is a backward pass.
        cuda: whether torch's SyncBatchNorm runs. Otherwise that of moco/distributed.py does.
    """
    channels, count = norms
    if not count:
        return []
    if cuda:  # mean, inverse std and count of every rank; two sums in the backward pass
        forward = (2 * channels + count) * FLOAT
        found = [Collective("sync batch norm", "all_gather", passes * forward, passes * count)]
        backward = 2 * channels * FLOAT, count
    else:  # the mean and the variance are sums over ranks, and so are their gradients
        forward = 2 * channels * FLOAT
        found = [Collective("sync batch norm", "all_reduce", passes * forward, 2 * passes * count)]
        backward = forward, 2 * count
    if trained:
        payload, calls = (passes * value for value in backward)
        found.append(Collective("sync batch norm", "all_reduce", payload, calls))
    return found


def _features(s: Sizes, views: int) -> Collective:
    """Return the gather of the features of so many views."""
    return Collective("feature gather", "all_gather", views * s.batch * s.dim * FLOAT, views)


def _shuffled_keys(s: Sizes, views: tuple[int, ...]) -> list[Collective]:
    """Return the collectives of the keys of these views, computed under shuffled BN."""
    found = [_features(s, len(views))]
    if s.target[1]:  # without batch norm, there is no shuffle
        images = sum(3 * s.pixels[view] ** 2 for view in views) * s.batch * FLOAT
        found.append(Collective("image exchange", "all_to_all", images, len(views)))
    return found


def _moco(s: Sizes, _: int, __: bool) -> list[Collective]:
    return _shuffled_keys(s, (1,))


def _bank(s: Sizes, ranks: int, pairs: int) -> list[Collective]:
    """Return the collectives of AdCo's bank, of which each rank trains a shard.

    Every shard is compared with the queries of all ranks. N = `pairs` B is a rank's number of
    queries. At the end of an epoch, each rank broadcasts its shard and the shard's velocity.
    """
    queries = pairs * s.batch
    features = queries * (s.dim + 1) * FLOAT  # with the similarity of each query to its key

    def step(op: str, payload: int, calls: int = 1) -> Collective:
        return Collective("bank exchange", op, payload, calls)

    return [
        step("all_gather", features),  # the queries; their gradient is a sum over ranks
        step("all_reduce", ranks * features),
        step("all_to_all", 3 * ranks * queries * FLOAT),  # softmax and metrics of a shard
        step("all_gather", queries * FLOAT),  # log-sum-exp at the bank's temperature
        step("all_to_all", 2 * ranks * queries * FLOAT, 2),  # at the encoder's; its gradient
        Collective(REST, "broadcast", 2 * s.entries * s.dim * FLOAT, 2 * ranks, when="epoch"),
    ]


def _adco(s: Sizes, ranks: int, _: bool) -> list[Collective]:
    return [*_shuffled_keys(s, (1,)), *_bank(s, ranks, 1)]


def _adco_symmetric(s: Sizes, ranks: int, _: bool) -> list[Collective]:
    return [*_shuffled_keys(s, (0, 1)), *_bank(s, ranks, 2)]


def _adco_multi_crop(s: Sizes, ranks: int, _: bool) -> list[Collective]:
    return [*_shuffled_keys(s, (0,)), *_bank(s, ranks, len(s.pixels) - 1)]


def _simclr(s: Sizes, ranks: int, cuda: bool) -> list[Collective]:
    """Return the collectives of SimCLR, which gathers the features of both views at once."""
    features = 2 * s.batch * s.dim * FLOAT
    return [
        Collective("feature gather", "all_gather", features),
        Collective("feature gather", "all_reduce", ranks * features),
        *_sync_batch_norm(s.online, 2, trained=True, cuda=cuda),
    ]


def _per_image(s: Sizes, values: int) -> list[Collective]:
    """Return the gathers of the images' indices, and of so many new values for each of them."""
    return [
        Collective("feature gather", "all_gather", s.batch * LONG),
        Collective("feature gather", "all_gather", s.batch * values * FLOAT),
    ]


def _sogclr(s: Sizes, ranks: int, cuda: bool) -> list[Collective]:
    return [*_simclr(s, ranks, cuda), *_per_image(s, 1)]


def _isogclr(s: Sizes, ranks: int, cuda: bool) -> list[Collective]:
    return [*_simclr(s, ranks, cuda), *_per_image(s, 3)]


def _fnc(s: Sizes, _: int, cuda: bool) -> list[Collective]:
    """Return the collectives of FNC. All views pass each network at once.

    The features for the memory have no gradient.
    """
    features = len(s.pixels) * s.batch * s.dim * FLOAT
    return [
        Collective("feature gather", "all_gather", features),
        Collective("feature gather", "all_gather", s.batch * LONG),
        *_sync_batch_norm(s.online, 1, trained=True, cuda=cuda),
        *_sync_batch_norm(s.target, 1, trained=False, cuda=cuda),
    ]


def _byol(s: Sizes, _: int, cuda: bool) -> list[Collective]:
    return [
        *_sync_batch_norm(s.online, 2, trained=True, cuda=cuda),
        *_sync_batch_norm(s.target, 2, trained=False, cuda=cuda),
    ]


def _moby(s: Sizes, ranks: int, cuda: bool) -> list[Collective]:
    """Return the collectives of MoBY and MoCo v3, which gather the target features of each view."""
    return [_features(s, 2), *_byol(s, ranks, cuda)]


@dataclass(frozen=True)
class Entry:
    """A method of the tables.

    Attributes:
        title: its name to print.
        script: the script that trains it, without .py.
        options: the options that select it; all others have their defaults.
        small: further options, for a run in seconds on a small network.
        table: returns the collectives of its steps, given sizes, W and whether ranks are GPUs.
        metrics: number of metrics in addition to those of a step without synthetic negatives.
    """

    title: str
    script: str
    options: str
    small: str
    table: Table
    metrics: int = 0


_V2 = "--mlp --aug-plus"
_SYNCO = "--n-hard 16 --n1 4 --n2 4 --n3 4 --n4 4 --n5 4 --n6 4"
_QUEUE = "--moco-k 1024"
_BANK = "--cluster 1024"
_FNC = "--support-size 1 --fn-topk 2 --randaugment 0 0"
TABLE: dict[str, Entry] = {
    "mocov2": Entry("MoCo v2", "main_synco", _V2, _QUEUE, _moco),
    "synco": Entry(
        "SynCo", "main_synco", _V2, f"{_QUEUE} {_SYNCO} --warmup-epochs 0", _moco, metrics=6
    ),
    "adco": Entry("AdCo", "main_adco", "--no-ad-init", _BANK, _adco),
    "adco-sym": Entry(
        "AdCo, symmetric", "main_adco", "--no-ad-init --sym 1", _BANK, _adco_symmetric
    ),
    "adco-multicrop": Entry(
        "AdCo, multi-crop", "main_adco", "--no-ad-init --multi_crop 1", _BANK, _adco_multi_crop
    ),
    "simclr": Entry("SimCLR", "main_sogclr", "--loss simclr", "", _simclr),
    "sogclr": Entry("SogCLR", "main_sogclr", "", "", _sogclr),
    "isogclr": Entry("iSogCLR", "main_sogclr", "--loss isogclr", "", _isogclr),
    "fnc": Entry("FNC", "main_fnc", "", _FNC, _fnc),
    "moby": Entry("MoBY", "main_moby", "--method moby", "--queue 1024", _moby),
    "byol": Entry("BYOL", "main_moby", "--method byol", "", _byol),
    "mocov3": Entry("MoCo v3", "main_mocov3", "", "", _moby),
}


def collectives(method: str, s: Sizes, ranks: int, cuda: bool) -> list[Collective]:
    """Return the collectives of a step, a log line and an epoch of a method on `ranks` ranks.

    Args:
        method: a name in `TABLE`.
        s: the sizes of a rank.
        ranks: number W of ranks.
        cuda: whether the ranks are GPUs. Synchronized batch norm communicates more on a CPU.
    """
    metrics = s.metrics + TABLE[method].metrics
    return [
        *TABLE[method].table(s, ranks, cuda),
        # DDP averages the gradient while the backward pass runs
        Collective("gradient", "all_reduce", s.gradient, overlaps=True),
        # whether a signal has been received, on the CPU (moco/launch/interrupt.py)
        Collective(REST, "all_reduce", FLOAT, overlaps=True),
        # sums and counts (engine/log.py), and whether a loss is NaN (engine/health.py)
        Collective(REST, "all_reduce", metrics * 2 * DOUBLE, when="log line"),
        Collective(REST, "all_gather", 4 * DOUBLE, when="log line"),
        Collective(REST, "broadcast", s.buffers, s.buffer_count, when="epoch"),
    ]


def sharded_queue(batch: int, dim: int, ranks: int, size: int) -> list[Collective]:
    """Return the collectives of the head if each rank has a shard of the queue.

    See scaling_shards.py. A replicated queue needs none of them. `size` is the bytes of a number.
    """
    features = batch * dim * size
    return [
        Collective("queries", "all_gather", features),
        Collective("largest and sum of the logits", "all_reduce", 2 * ranks * batch * size, 2),
        Collective("gradient of the losses", "all_gather", batch * size),
        Collective("gradient of the queries", "reduce_scatter", ranks * features),
    ]


def sharded_averages(batch: int, ranks: int) -> list[Collective]:
    """Return the collectives of SogCLR that only sharded moving averages need."""
    return [Collective("moving averages", "all_reduce", ranks * batch * FLOAT)]
