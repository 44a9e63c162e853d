"""Save features to files, and load them.

A folder of features has {train,val}_{features,labels}.npy, in the order of the split, and
meta.json. meta.json is written last, so a folder without it is unfinished.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import Evaluation, flat, replaced
from moco.data import catalog
from moco.data.images import Images
from moco.encoder import networks
from moco.engine.features import Features, extract, feature_device
from moco.errors import InputError
from moco.files import UnreadableError, read_json, unreadable, write_json
from moco.messages import print_rank0

_BLOCK = 8192  # number of features copied at a time

# entries of meta.json that describe the features, and the settings that have the same values
_ORIGIN = {
    "arch": "arch",
    "method": "encoder_method",
    "checkpoint": "pretrained",
    "pretrain_epochs": "pretrain_epochs",
}
_SAME = "features stem norm_eps mean std dataset data class_list image_size test_resize amp seed"
_ORIGIN |= {name: name for name in (*_SAME.split(), "exif", "white")}

# types of the entries of meta.json
_TYPES = dict.fromkeys(("arch", "method", "dataset", "data", "test_resize", "amp"), str)
_TYPES |= dict.fromkeys(("image_size", "seed"), int)
_TYPES |= {
    "checkpoint": str | None,
    "pretrain_epochs": int | None,
    "class_list": str | None,
    "classes": list,
}

# default values of entries that older versions did not write
_OPTIONAL = {"class_list": None, "features": "backbone", "stem": None, "mean": None, "std": None}
_OPTIONAL |= {"test_resize": "scaled", "norm_eps": None, "exif": "ignore", "white": None}


def complete(config: Evaluation, multi_label: bool) -> Evaluation:
    """Return `config` with the settings that computed the features of `--load-features`.

    Call it before any process starts.

    Args:
        config: the settings of the evaluation.
        multi_label: whether the evaluation is for images that can show several classes.

    Raises InputError if the features contradict the options, or if the images of the data set show
    one class and `multi_label` is true, or several classes and it is false.
    """
    settings = flat(config)
    if config.files.load_features and config.files.dump_features:
        raise InputError(
            "--load-features and --dump-features: the loaded features are already in files; "
            "leave one of them out"
        )
    if config.files.load_features:
        meta, _ = _open(Path(config.files.load_features))
        for name in ("arch", "pretrained", "class_list", "features"):
            given = settings.get(name)
            dumped = meta["checkpoint" if name == "pretrained" else name]
            if given not in (None, dumped):
                option, dumped = f"--{name.replace('_', '-')}", dumped or "all classes"
                raise InputError(
                    f"{option} {given}: the features in {config.files.load_features} are of "
                    f"{dumped}; leave {option} out"
                )
        origin = {option: meta[name] for name, option in _ORIGIN.items()}
        config = replaced(config, **{name: origin[name] for name in origin.keys() & settings})
    dataset = "photos" if config.run.data == "photos" else config.input.dataset
    if dataset in catalog.METRIC and (catalog.METRIC[dataset] == "map11") != multi_label:
        if multi_label:
            raise InputError(
                f"{dataset}: its images show one class each; "
                "use main_lincls.py or main_knn.py, or --dataset voc2007"
            )
        raise InputError(
            f"{dataset}: its images show several classes, and k-NN needs one; use main_voc07.py"
        )
    return config


def check_dump(config: Evaluation) -> None:
    """Raise InputError if the folder of `--dump-features` has features, or cannot be written.

    Call it before any process starts. Creates the folder.
    """
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
    """Return the entries of meta.json that describe the features."""
    settings = flat(config)
    return {name: settings.get(option, _OPTIONAL.get(name)) for name, option in _ORIGIN.items()}


def extract_splits(
    net: nn.Module,
    train: Images,
    val: Images,
    config: Evaluation,
    device: torch.device,
    unit_norm: bool = True,
) -> tuple[Features, Features]:
    """Return this rank's features of both splits. With `--dump-features`, save them as well.

    Args:
        net: the network.
        train: the training images.
        val: the validation images.
        config: the settings of the evaluation.
        device: the device of this process.
        unit_norm: whether features are normalized to norm 1.

    Raises InputError if an image cannot be read, or a file cannot be written.
    """
    found = tuple(extract_one(net, images, config, device, unit_norm) for images in (train, val))
    if config.files.dump_features:
        dump(config, train.classes, *found)
    return found


def extract_one(
    net: nn.Module,
    images: Images,
    config: Evaluation,
    device: torch.device,
    unit_norm: bool = True,
) -> Features:
    """Return this rank's features of one split; see `extract_splits`."""
    feature_fn = networks.embedding if config.use_head_features else networks.features
    return extract(net, images, config, device, unit_norm, feature_fn, on_host=config.on_host)


def dump(config: Evaluation, classes: tuple[str, ...], train: Features, val: Features) -> None:
    """Write the features of all ranks to the folder of `--dump-features`.

    Args:
        config: the settings of the evaluation.
        classes: the class names.
        train: this rank's features and labels of the training images.
        val: this rank's features and labels of the validation images.

    All ranks must call this function, and see the folder. Raises InputError if it cannot be
    written.
    """
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
    """Write this rank's rows to a .npy file of `count` rows, which rank 0 creates.

    Raises InputError if the disk lacks the room, or if another program has created the file.
    """
    if distributed.rank() == 0:
        dtype = np.int64 if mine.dtype == torch.int64 else np.float32
        shape = (count, *mine.shape[1:])
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        free = shutil.disk_usage(path.parent).free
        # check, because writing to a full disk through a memory map would kill the process
        if needed > free:
            raise InputError(
                f"--dump-features {path.parent}: {path.name} needs {needed / 2**30:.2f} GiB, "
                f"and {free / 2**30:.2f} GiB are free; make room, or choose another folder"
            )
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise InputError(
                f"--dump-features {path.parent}: another program is writing there; "
                "choose another folder"
            ) from None
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    distributed.barrier()
    rows = np.lib.format.open_memmap(path, "r+")[distributed.rank() :: distributed.world_size()]
    for start in range(0, len(mine), _BLOCK):
        rows[start : start + _BLOCK] = mine[start : start + _BLOCK].cpu().numpy()
    del rows  # flushes the memory map
    distributed.barrier()


def load(config: Evaluation, device: torch.device) -> tuple[Features, Features, tuple[str, ...]]:
    """Return this rank's features of both splits from `--load-features`, and the class names.

    Args:
        config: the settings of the evaluation.
        device: the device of the labels, and of the features unless `config.on_host`.

    Raises InputError if a file is missing or damaged.
    """
    meta, arrays = _open(Path(config.files.load_features))
    splits = []
    for split in ("train", "val"):
        rows, labels = (
            arrays[f"{split}_{part}"][distributed.rank() :: distributed.world_size()]
            for part in ("features", "labels")
        )
        kept = torch.empty(rows.shape, device=feature_device(config.on_host, device))
        for start in range(0, len(rows), _BLOCK):
            kept[start : start + _BLOCK] = torch.from_numpy(np.array(rows[start : start + _BLOCK]))
        splits.append((kept, torch.from_numpy(np.array(labels)).to(device)))
    return *splits, tuple(meta["classes"])


def _are_names(values: list) -> bool:
    """Return whether a list from meta.json has class names, at least one."""
    return bool(values) and all(isinstance(value, str) for value in values)


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return meta.json and the memory-mapped arrays, by name, of a folder that `dump` wrote.

    Raises InputError if a file is missing or damaged.
    """

    def wrong(problem: str) -> InputError:
        return InputError(
            f"--load-features {folder}: {problem}; give a folder that --dump-features has finished"
        )

    if not (folder / "meta.json").is_file():
        raise wrong("no meta.json there" if folder.is_dir() else "no such folder")
    try:
        meta = read_json(folder / "meta.json")
    except UnreadableError as error:
        raise error.at(folder / "meta.json") from None
    except InputError as error:
        raise wrong(f"meta.json is damaged ({error})") from None
    meta = _OPTIONAL | meta if isinstance(meta, dict) else {}
    if not all(
        name in meta and isinstance(meta[name], needed) for name, needed in _TYPES.items()
    ) or not _are_names(meta["classes"]):
        raise wrong("meta.json does not describe the features")
    arrays = {}
    for name in (
        f"{split}_{part}" for split in ("train", "val") for part in ("features", "labels")
    ):
        try:
            arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "r")
        except FileNotFoundError:
            raise wrong(f"no {name}.npy there") from None
        except (OSError, MemoryError) as error:
            raise unreadable(error).at(folder / f"{name}.npy") from None
        except Exception as error:  # a damaged file can cause any error
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
                f"{split}_features.npy holds {rows.dtype} {rows.shape}, "
                "not float32 features of the same size as those of train"
            )
        if (
            labels.dtype != np.int64
            or labels.ndim not in (1, 2)
            or len(labels) != len(rows)
            or not len(rows)
        ):
            raise wrong(
                f"{split}_labels.npy holds {labels.dtype} {labels.shape} "
                f"for {len(rows)} rows of features"
            )
        low, high = (0, classes) if labels.ndim == 1 else (-1, 2)
        if not low <= labels.min() <= labels.max() < high or labels.shape[1:] not in (
            (),
            (classes,),
        ):
            raise wrong(f"{split}_labels.npy does not fit the {classes} classes of meta.json")
    return meta, arrays
