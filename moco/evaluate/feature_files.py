"""Save features to files, and load them."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import Evaluation, flat, replaced
from moco.data import registry
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.encoder import networks
from moco.engine.features import Features, extract, feature_device
from moco.errors import InputError
from moco.files import Unreadable, read_json, unreadable, write_json

# Files: FOLDER/{train,val}_{features,labels}.npy with the rows in the split's own order, and meta.json, which is written last.

_BLOCK = 8192  # rows copied at a time


# what features are of: its name in meta.json, and in the options
_ORIGIN = {
    "arch": "arch",
    "method": "encoder_method",
    "checkpoint": "pretrained",
    "pretrain_epochs": "pretrain_epochs",
}


_ORIGIN |= {
    name: name
    for name in "features stem mean std dataset data class_list image_size amp seed".split()
}


_KINDS = dict.fromkeys(("arch", "method", "dataset", "data", "amp"), str) | dict.fromkeys(
    ("image_size", "seed"), int
)


_KINDS |= {
    "checkpoint": str | None,
    "pretrain_epochs": int | None,
    "class_list": str | None,
    "classes": list,
}


_OPTIONAL = {
    "class_list": None,
    "features": "backbone",
    "stem": None,
    "mean": None,
    "std": None,
}  # older dumps lack them


def complete(config: Evaluation, multi_label: bool) -> Evaluation:
    """Return `config` with what the features of `--load-features` are of.

    Raises InputError, before any process starts, if they do not fit the options, or if images show
    several classes (`multi_label`) and should show one, or the other way round.
    """
    settings = flat(config)
    if config.files.load_features and config.files.dump_features:
        raise InputError(
            "--load-features and --dump-features: features that are read lie in files already; leave one out"
        )
    if config.files.load_features:
        meta, _ = _open(Path(config.files.load_features))
        for name in ("arch", "pretrained", "class_list", "features"):
            given = settings.get(name)
            dumped = meta["checkpoint" if name == "pretrained" else name]
            if given not in (None, dumped):
                option, dumped = f"--{name.replace('_', '-')}", dumped or "all classes"
                raise InputError(
                    f"{option} {given}: the features in {config.files.load_features} are of {dumped}; leave {option} out"
                )
        origin = {option: meta[name] for name, option in _ORIGIN.items()}
        config = replaced(config, **{name: origin[name] for name in origin.keys() & settings})
    dataset = "photos" if config.run.data == "photos" else config.input.dataset
    if dataset in registry.METRIC and (registry.METRIC[dataset] == "map11") != multi_label:
        if multi_label:
            raise InputError(
                f"{dataset}: its images show one class each; use main_lincls.py or main_knn.py, or --dataset voc2007"
            )
        raise InputError(
            f"{dataset}: its images show several classes, and k-NN wants one; use main_voc07.py"
        )
    return config


def check_dump(config: Evaluation) -> None:
    """Refuse, before any process starts, a folder for `--dump-features` that holds what would be lost, or cannot be written."""
    if not config.files.dump_features:
        return
    folder = Path(config.files.dump_features)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink()
    except OSError as error:
        raise InputError(
            f"--dump-features {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    if any(folder.glob("*.npy")) or (folder / "meta.json").exists():
        finished = (folder / "meta.json").exists()
        held = "features" if finished else "an unfinished dump of features"
        how = "choose another folder" + ", or read them with --load-features" * finished
        raise InputError(f"--dump-features {folder}: holds {held}; {how}")


def _origin(config: Evaluation) -> dict[str, Any]:
    """Return what the features are of, for meta.json."""
    settings = flat(config)
    return {name: settings.get(option, _OPTIONAL.get(name)) for name, option in _ORIGIN.items()}


def of_splits(
    net: nn.Module,
    train: Images,
    val: Images,
    config: Evaluation,
    device: torch.device,
    unit_norm: bool = True,
) -> tuple[Features, Features]:
    """`extract` for both splits; `--dump-features` writes them."""
    of = networks.embedding if config.of_head else networks.features
    found = tuple(
        extract(net, images, config, device, unit_norm, of, on_host=config.on_host)
        for images in (train, val)
    )
    if config.files.dump_features:
        dump(config, train.classes, *found)
    return found


def dump(config: Evaluation, classes: tuple[str, ...], train: Features, val: Features) -> None:
    """Write every rank's features to the folder of `--dump-features`, which all ranks must see."""
    folder, first = Path(config.files.dump_features), distributed.rank() == 0
    for split, (rows, labels) in (("train", train), ("val", val)):
        count = int(distributed.all_reduce_sum(torch.tensor([len(labels)], device=labels.device)))
        _write(folder / f"{split}_features.npy", rows, count)
        _write(folder / f"{split}_labels.npy", labels, count)
    if first:
        write_json(folder / "meta.json", _origin(config) | {"classes": list(classes)})
    distributed.barrier()
    print_rank0(f"features of both splits are in {folder}")


def _write(path: Path, mine: Tensor, count: int) -> None:
    """Each rank fills its rows of one file of `count`, which rank 0 makes. Raises InputError where the disk has no room for it."""
    if distributed.rank() == 0:
        kind = np.int64 if mine.dtype == torch.int64 else np.float32
        shape = (count, *mine.shape[1:])
        needed, free = (
            math.prod(shape) * np.dtype(kind).itemsize,
            shutil.disk_usage(path.parent).free,
        )
        if needed > free:  # writing through a memory map to a full disk would end the process
            where = f"--dump-features {path.parent}"
            raise InputError(
                f"{where}: {path.name} needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free; free some"
            )
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise InputError(
                f"--dump-features {path.parent}: another program is writing there; choose another folder"
            ) from None
        np.lib.format.open_memmap(path, "w+", kind, shape).flush()
    distributed.barrier()
    rows = np.lib.format.open_memmap(path, "r+")[distributed.rank() :: distributed.world_size()]
    for start in range(0, len(mine), _BLOCK):
        rows[start : start + _BLOCK] = mine[start : start + _BLOCK].cpu().numpy()
    del rows  # flushed
    distributed.barrier()


def load(config: Evaluation, device: torch.device) -> tuple[Features, Features, tuple[str, ...]]:
    """This rank's share of the features of both splits in the folder of `--load-features`, and the classes."""
    meta, arrays = _open(Path(config.files.load_features))
    splits = []
    for split in ("train", "val"):
        rows, labels = (
            arrays[f"{split}_{kind}"][distributed.rank() :: distributed.world_size()]
            for kind in ("features", "labels")
        )
        kept = torch.empty(rows.shape, device=feature_device(config.on_host, device))
        for start in range(0, len(rows), _BLOCK):
            kept[start : start + _BLOCK] = torch.from_numpy(np.array(rows[start : start + _BLOCK]))
        splits.append((kept, torch.from_numpy(np.array(labels)).to(device)))
    return *splits, tuple(meta["classes"])


def _words(values: list) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """meta.json and the arrays, not yet read, of a folder that `dump` wrote. Raises InputError where something is wrong."""

    def wrong(what: str) -> InputError:
        return InputError(
            f"--load-features {folder}: {what}; give a folder that --dump-features has finished"
        )

    if not (folder / "meta.json").is_file():
        raise wrong("no meta.json there" if folder.is_dir() else "no such folder")
    try:
        meta = read_json(folder / "meta.json")
    except Unreadable as error:
        raise error.at(folder / "meta.json") from None
    except InputError as error:
        raise wrong(f"meta.json is damaged ({error})") from None
    meta = _OPTIONAL | meta if isinstance(meta, dict) else {}
    if not all(
        name in meta and isinstance(meta[name], kind) for name, kind in _KINDS.items()
    ) or not _words(meta["classes"]):
        raise wrong("meta.json does not say what the features are of")
    arrays = {}
    for name in (
        f"{split}_{kind}" for split in ("train", "val") for kind in ("features", "labels")
    ):
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
        if (
            rows.dtype != np.float32
            or rows.ndim != 2
            or rows.shape[1:] != arrays["train_features"].shape[1:]
        ):
            raise wrong(
                f"{split}_features.npy holds {rows.dtype} {rows.shape}, not float32 rows of train's length"
            )
        if (
            labels.dtype != np.int64
            or labels.ndim not in (1, 2)
            or len(labels) != len(rows)
            or not len(rows)
        ):
            raise wrong(
                f"{split}_labels.npy holds {labels.dtype} {labels.shape} for {len(rows)} rows of features"
            )
        low, high = (0, classes) if labels.ndim == 1 else (-1, 2)
        if not low <= labels.min() <= labels.max() < high or labels.shape[1:] not in (
            (),
            (classes,),
        ):
            raise wrong(f"{split}_labels.npy does not fit the {classes} classes of meta.json")
    return meta, arrays
