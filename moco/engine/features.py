"""Features of a frozen encoder, in memory and in files, and weighted k-NN on them (Wu et al., arXiv 1805.01978, section 3.4)."""

import math
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.augment.color import normalize
from moco.data import loader, named
from moco.data.images import Images
from moco.encoder import networks
from moco.engine.log import say, write_json
from moco.engine.precision import autocast, layout
from moco.errors import InputError
from moco.files import Unreadable, read_json, unreadable

Features = tuple[Tensor, Tensor]  # of this rank's share of a split, every W-th image: rows [n, D], labels [n] or [n, classes]


def test_batches(
    images: Images, args: Namespace, device: torch.device, unreadable: list[tuple[int, str]] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of `images` (every W-th) as normalized centre crops [B, 3, S, S] and labels [B].

    Images that cannot be read are left out, and their numbers and reasons are added to
    `unreadable`. Raises InputError for the first one if that is None.
    """
    order = loader.EvalOrder(len(images), args.batch_per_process)
    cut, done = loader.CenterCrop(args.image_size), 0
    for batch in loader.batches(images, cut, order, args, device, skips=unreadable is not None):
        x, label = batch.views[0], batch.label
        if batch.unreadable:
            unreadable += batch.unreadable
            # the loader puts another image in the place of one that cannot be read
            wanted = [i for _, i in order.places[done : done + len(x)]]
            own = batch.index == torch.tensor(wanted, device=device)
            x, label = x[own], label[own]
        done += len(batch.index)
        if len(x):
            yield layout(normalize(x, args.mean, args.std)), label


@torch.inference_mode()
def extract(
    net: nn.Module,
    images: Images,
    args: Namespace,
    device: torch.device,
    unit: bool = True,
    of: Callable[[nn.Module, Tensor], Tensor] = networks.features,
    unreadable: list[tuple[int, str]] | None = None,
) -> Features:
    """Return the features of this rank's share of `images`, and their labels, in eval mode.

    `of(net, batch)` computes the features: by default those of the backbone. With `unit` they are
    normalized to norm 1. `unreadable` is that of `test_batches`.

    The labels are on `device`, and so are the features, unless `args.host_features` keeps them in the host's memory. There is
    one copy of them.
    """
    was_training = net.training
    net.eval()
    labels = torch.tensor(images.labels[distributed.rank() :: distributed.world()], device=device)
    rows, done = None, 0
    for batch, label in test_batches(images, args, device, unreadable):
        with autocast(args.amp, device):
            x = of(net, batch)
        if rows is None:
            rows = torch.empty(len(labels), x.shape[1], device=_home(args, device))
        rows[done : done + len(x)] = F.normalize(x.float(), dim=1) if unit else x
        labels[done : done + len(x)] = label  # these move up where an image is left out
        done += len(x)
    rows, labels = rows if rows is None else rows[:done], labels[:done]
    net.train(was_training)
    # a rank without images learns from the others how long features are
    width = int(distributed.all_gather(torch.tensor([0 if rows is None else rows.shape[1]], device=device)).max())
    return (torch.empty(0, width, device=_home(args, device)) if rows is None else rows), labels


def _home(args: Namespace, device: torch.device) -> torch.device:
    """Where features are kept. Host memory is not pinned: k-NN moves them only once."""
    return torch.device("cpu") if getattr(args, "host_features", False) else device


def in_order(x: Tensor) -> Tensor:
    """The rows of every rank's share of a split (every W-th), as the split has them."""
    whole = distributed.all_gather_uneven(x)
    ranks = distributed.world()
    places = torch.cat([torch.arange(rank, len(whole), ranks) for rank in range(ranks)])
    return whole[places.argsort().to(whole.device)]


# Weighted k-NN. What is kept of all similarities at a time is one block of queries against one block of the bank.

QUERIES, BANK = 1024, 65_536  # rows of a block


@torch.inference_mode()
def knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int, ks: list[int], temperature: float
) -> dict[int, float]:
    """Top-1 of the weighted k-NN classifier for each k in `ks`, in [0, 1]; each neighbour votes with exp(similarity / T).

    It is computed where the labels are; the features may be in the host's memory.

    Args:
        bank, bank_labels: this rank's share of the bank, unit rows [n, D] and [n].
        queries, labels: this rank's share of the queries; every rank may hold another number of rows.
    """
    queries, labels = distributed.all_gather_uneven(queries.to(labels.device)), distributed.all_gather_uneven(labels)
    correct = dict.fromkeys(ks, 0)
    found = nearest(bank, bank_labels, queries, max(ks))
    for similarity, neighbour, y in zip(*(x.split(QUERIES) for x in (*found, labels)), strict=True):
        similarity, neighbour = _of_all_ranks(similarity, neighbour, max(ks))
        # less the best similarity: exp(1 / T) of a small T would be infinite, and a common factor changes no vote
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        for k in ks:
            votes = weight.new_zeros(len(y), classes).scatter_add_(1, neighbour[:, :k], weight[:, :k])
            correct[k] += int((votes.argmax(1) == y).sum())
    return {k: n / len(labels) for k, n in correct.items()}


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Features:
    """The k rows of this rank's bank that are nearest to each query, nearest first: similarities [N, k] and labels [N, k].

    k is at most the bank's rows. Each block of the bank is moved to the queries' device once, and its best are merged with
    the best so far, which is exact.
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    label = bank_labels.new_zeros(best.shape)
    for part, part_label in zip(bank.split(BANK), bank_labels.split(BANK), strict=True):
        part = part.to(queries.device)
        for start in range(0, len(queries), QUERIES):
            block = slice(start, start + QUERIES)
            similarity, place = (queries[block] @ part.T).topk(min(k, len(part)), dim=1)
            best[block], place_of_both = torch.cat([best[block], similarity], 1).topk(k, dim=1)
            label[block] = torch.cat([label[block], part_label[place]], 1).gather(1, place_of_both)
    return best, label


def _of_all_ranks(similarity: Tensor, label: Tensor, k: int) -> Features:
    """The best k of what every rank found: each rank's best k hold the best k of all."""
    if distributed.world() == 1:
        return similarity, label
    similarity = distributed.all_gather_uneven(similarity.T.contiguous()).T
    label = distributed.all_gather_uneven(label.T.contiguous()).T
    similarity, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, label.gather(1, place)


# Files: FOLDER/{train,val}_{features,labels}.npy with the rows in the split's own order, and meta.json, which is written last.

_BLOCK = 8192  # rows copied at a time
# what features are of: its name in meta.json, and in the options
_ORIGIN = {"arch": "arch", "method": "encoder_method", "checkpoint": "pretrained", "pretrain_epochs": "pretrain_epochs"}
_ORIGIN |= {name: name for name in "features stem mean std dataset data class_list image_size amp seed".split()}
_KINDS = dict.fromkeys(("arch", "method", "dataset", "data", "amp"), str) | dict.fromkeys(("image_size", "seed"), int)
_KINDS |= {"checkpoint": str | None, "pretrain_epochs": int | None, "class_list": str | None, "classes": list}
_OPTIONAL = {"class_list": None, "features": "backbone", "stem": None, "mean": None, "std": None}  # older dumps lack them


def add_files(parser: ArgumentParser) -> None:
    """Features kept in files, to be classified again."""
    group = parser.add_argument_group("files of features")
    group.add_argument("--dump-features", metavar="FOLDER", help="write those of both splits there, as .npy files")
    group.add_argument(
        "--load-features", metavar="FOLDER", help="read them from there: no DIR, no --pretrained; the seed is that of the dump"
    )


def check(args: Namespace, many: bool) -> None:
    """Check, before any process starts, the features to load, and that images show several classes, if `many`, or one.

    With `--load-features`, `args` takes from there what the features are of. Raises InputError.
    """
    if args.load_features and args.dump_features:
        raise InputError("--load-features and --dump-features: features that are read lie in files already; leave one out")
    if args.load_features:
        meta, _ = _open(Path(args.load_features))
        for name in ("arch", "pretrained", "class_list", "features"):
            given, dumped = getattr(args, name, None), meta["checkpoint" if name == "pretrained" else name]
            if given not in (None, dumped):
                option, dumped = f"--{name.replace('_', '-')}", dumped or "all classes"
                raise InputError(f"{option} {given}: the features in {args.load_features} are of {dumped}; leave {option} out")
        vars(args).update({option: meta[name] for name, option in _ORIGIN.items()})
    dataset = "photos" if args.data == "photos" else args.dataset
    if dataset in named.METRIC and (named.METRIC[dataset] == "map11") != many:
        if many:
            raise InputError(f"{dataset}: its images show one class each; use main_lincls.py or main_knn.py, or --dataset voc2007")
        raise InputError(f"{dataset}: its images show several classes, and k-NN wants one; use main_voc07.py")


def check_dump(args: Namespace) -> None:
    """Refuse, before any process starts, a folder for `--dump-features` that holds what would be lost, or cannot be written."""
    if not args.dump_features:
        return
    folder = Path(args.dump_features)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink()
    except OSError as error:
        raise InputError(f"--dump-features {folder}: cannot be written ({error.strerror}); choose another folder") from None
    if any(folder.glob("*.npy")) or (folder / "meta.json").exists():
        finished = (folder / "meta.json").exists()
        held = "features" if finished else "an unfinished dump of features"
        how = "choose another folder" + ", or read them with --load-features" * finished
        raise InputError(f"--dump-features {folder}: holds {held}; {how}")


def _origin(args: Namespace) -> dict[str, Any]:
    return {name: getattr(args, option, _OPTIONAL.get(name)) for name, option in _ORIGIN.items()}


def of_splits(
    net: nn.Module, train: Images, val: Images, args: Namespace, device: torch.device, unit: bool = True
) -> tuple[Features, Features]:
    """`extract` for both splits; `--dump-features` writes them."""
    of = networks.embedding if getattr(args, "features", "backbone") == "head" else networks.features
    found = extract(net, train, args, device, unit, of), extract(net, val, args, device, unit, of)
    if args.dump_features:
        dump(args, train.classes, *found)
    return found


def dump(args: Namespace, classes: tuple[str, ...], train: Features, val: Features) -> None:
    """Write every rank's features to the folder of `--dump-features`, which all ranks must see."""
    folder, first = Path(args.dump_features), distributed.rank() == 0
    for split, (rows, labels) in (("train", train), ("val", val)):
        count = int(distributed.all_reduce_sum(torch.tensor([len(labels)], device=labels.device)))
        _write(folder / f"{split}_features.npy", rows, count)
        _write(folder / f"{split}_labels.npy", labels, count)
    if first:
        write_json(folder / "meta.json", _origin(args) | {"classes": list(classes)})
    distributed.barrier()
    say(f"features of both splits are in {folder}")


def _write(path: Path, mine: Tensor, count: int) -> None:
    """Each rank fills its rows of one file of `count`, which rank 0 makes. Raises InputError where the disk has no room for it."""
    if distributed.rank() == 0:
        kind = np.int64 if mine.dtype == torch.int64 else np.float32
        shape = (count, *mine.shape[1:])
        needed, free = math.prod(shape) * np.dtype(kind).itemsize, shutil.disk_usage(path.parent).free
        if needed > free:  # writing through a memory map to a full disk would end the process
            where = f"--dump-features {path.parent}"
            raise InputError(f"{where}: {path.name} needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free; free some")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise InputError(f"--dump-features {path.parent}: another program is writing there; choose another folder") from None
        np.lib.format.open_memmap(path, "w+", kind, shape).flush()
    distributed.barrier()
    rows = np.lib.format.open_memmap(path, "r+")[distributed.rank() :: distributed.world()]
    for start in range(0, len(mine), _BLOCK):
        rows[start : start + _BLOCK] = mine[start : start + _BLOCK].cpu().numpy()
    del rows  # flushed
    distributed.barrier()


def load(args: Namespace, device: torch.device) -> tuple[Features, Features, tuple[str, ...]]:
    """This rank's share of the features of both splits in the folder of `--load-features`, and the classes."""
    meta, arrays = _open(Path(args.load_features))
    splits = []
    for split in ("train", "val"):
        rows, labels = (arrays[f"{split}_{kind}"][distributed.rank() :: distributed.world()] for kind in ("features", "labels"))
        kept = torch.empty(rows.shape, device=_home(args, device))
        for start in range(0, len(rows), _BLOCK):
            kept[start : start + _BLOCK] = torch.from_numpy(np.array(rows[start : start + _BLOCK]))
        splits.append((kept, torch.from_numpy(np.array(labels)).to(device)))
    return *splits, tuple(meta["classes"])


def _words(values: list) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """meta.json and the arrays, not yet read, of a folder that `dump` wrote. Raises InputError where something is wrong."""

    def wrong(what: str) -> InputError:
        return InputError(f"--load-features {folder}: {what}; give a folder that --dump-features has finished")

    if not (folder / "meta.json").is_file():
        raise wrong("no meta.json there" if folder.is_dir() else "no such folder")
    try:
        meta = read_json(folder / "meta.json")
    except Unreadable as error:
        raise error.at(folder / "meta.json") from None
    except InputError as error:
        raise wrong(f"meta.json is damaged ({error})") from None
    meta = _OPTIONAL | meta if isinstance(meta, dict) else {}
    if not all(name in meta and isinstance(meta[name], kind) for name, kind in _KINDS.items()) or not _words(meta["classes"]):
        raise wrong("meta.json does not say what the features are of")
    arrays = {}
    for name in (f"{split}_{kind}" for split in ("train", "val") for kind in ("features", "labels")):
        try:
            arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "r")
        except FileNotFoundError:
            raise wrong(f"no {name}.npy there") from None
        except (OSError, MemoryError) as error:
            raise unreadable(error).at(folder / f"{name}.npy") from None
        except Exception as error:  # damaged ones end in many kinds
            raise wrong(f"{name}.npy is damaged ({' '.join(str(error).split())})") from None
    classes = len(meta["classes"])
    for split in ("train", "val"):
        rows, labels = arrays[f"{split}_features"], arrays[f"{split}_labels"]
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1:] != arrays["train_features"].shape[1:]:
            raise wrong(f"{split}_features.npy holds {rows.dtype} {rows.shape}, not float32 rows of train's length")
        if labels.dtype != np.int64 or labels.ndim not in (1, 2) or len(labels) != len(rows) or not len(rows):
            raise wrong(f"{split}_labels.npy holds {labels.dtype} {labels.shape} for {len(rows)} rows of features")
        low, high = (0, classes) if labels.ndim == 1 else (-1, 2)
        if not low <= labels.min() <= labels.max() < high or labels.shape[1:] not in ((), (classes,)):
            raise wrong(f"{split}_labels.npy does not fit the {classes} classes of meta.json")
    return meta, arrays
