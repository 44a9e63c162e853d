"""`--resume`: which folder and checkpoint a run continues from, and which options may differ."""

import re
from pathlib import Path

from moco import distributed
from moco.config import AnyConfig, Training, flat, replaced
from moco.distributed import print_rank0
from moco.encoder import metadata
from moco.engine import checkpoint
from moco.errors import InputError, short
from moco.files import read_yaml

# Options that may differ, because they change neither what is learned nor its schedule: launch,
# reading, logging, saving. `check_unchanged` compares the total batch, not how it is divided.
FREE = frozenset(
    "data save_dir output tag cfg resume allow_change evaluate script"
    " workers cache_images download on_bad_image host_features loss_chunk compile grad_checkpoint"
    " print_freq save_every save_every_steps keep keep_every knn_every knn_k knn_t knn_features"
    " multiprocessing_distributed nproc_per_node world_size rank dist_url dist_backend gpu device"
    " local_rank nodes batch_size batch_per_process accumulation_steps batch_is_per_process"
    " encoder_method pretrain_epochs".split()
)


def start(config: AnyConfig) -> tuple[AnyConfig, bool]:
    """Return `config` with the checkpoint and the folder that `--resume` means, and whether the run there continues.

    `--resume auto` continues the run of this script in `--save-dir`, or in the subfolder that an
    evaluation got because the folder holds another run. If there is no such run, a new one begins.
    `--resume FILE` continues in FILE's folder. With another `--save-dir` it begins a new run there
    from FILE. A test alone (`--evaluate`) continues nothing.

    Raises InputError if no checkpoint can be read, or if FILE's folder has a later one.
    """
    if not config.TRAINS:
        return config, False
    given, tests, chosen = config.log.resume, config.only_tests, config.run.save_dir
    if not given:
        if config.log.allow_change:
            raise InputError("--allow-change: has no effect without --resume; leave it out")
        return config, False
    if given == "auto":
        if not chosen:
            raise InputError(
                "--resume auto: give the run folder with --save-dir, or --output and --tag"
            )
        own = _own_folder(Path(chosen), config.run.script)
        config = replaced(config, resume=checkpoint.newest(str(own)) if own else None)
        if own is None:
            print_rank0(f"--resume auto: no checkpoint in {chosen} yet; the run begins")
        elif not tests:
            config = replaced(config, save_dir=str(own))
        return config, own is not None and not tests
    file, folder = Path(given), Path(given).parent
    if tests or (chosen and Path(chosen).resolve() != folder.resolve()):
        return config, False
    checkpoint.load(given)
    further = next(iter(checkpoint.found(folder)), file)
    if not further.samefile(file):
        raise InputError(
            f"--resume {given}: {further.name} in the same folder is further, and would be "
            "overwritten; --resume auto continues from it, and --save-dir with a new folder "
            f"begins another run from {file.name}"
        )
    return replaced(config, save_dir=str(folder)), True


def inherit(config: AnyConfig) -> AnyConfig:
    """Return a pre-training's config with the stem, mean and std of the checkpoint, unless they are given.

    The checkpoint is that of `--resume`. Without one the stem is ImageNet's.
    """
    stem, mean, std = config.network.stem, config.views.mean, config.views.std
    if config.log.resume and None in (stem, mean, std):
        facts = metadata.read_metadata(checkpoint.load(config.log.resume))
        stem, mean, std = stem or facts.stem, mean or facts.mean, std or facts.std
    return replaced(config, stem=stem or "imagenet", mean=mean, std=std)


def _own_folder(folder: Path, script: str) -> Path | None:
    """Return the last folder with a run of `script`: `folder`, or its subfolder SCRIPT, SCRIPT-2, ...

    A test alone (`--evaluate`) leaves nothing to continue, and does not count.
    """
    name = re.compile(rf"{script}(-\d+)?")
    subfolders = (place for place in folder.glob(f"{script}*") if name.fullmatch(place.name))
    places = [folder, *sorted(subfolders, key=_number)]
    own = [place for place in places if (place / "args.yaml").is_file() and _is_of(place, script)]
    if not own and checkpoint.found(folder) and not (folder / "args.yaml").exists():
        return folder  # only the checkpoints were copied
    return own[-1] if own else None


def _number(folder: Path) -> int:
    """Return 3 for lincls-3, and 1 for lincls."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 1


def _is_of(folder: Path, script: str) -> bool:
    try:
        options = read_yaml(folder / "args.yaml")
    except InputError as error:
        raise InputError(f"{folder / 'args.yaml'}: {error}; choose another folder") from None
    return options.get("script") == script and options.get("evaluate") is not True


def check_unchanged(config: Training, state: checkpoint.State, batch: int) -> None:
    """Raise InputError if options differ from those of the run that `--resume` continues.

    It names each difference. Options in `FREE` may differ, and so may those that the user names
    with `--allow-change`. `--epochs` may differ unless a schedule depends on it, and `--bn-splits`
    among several processes, which do not read it.

    Args:
        config: this run's settings.
        state: the checkpoint of `--resume`.
        batch: images in a step, over all processes.
    """
    saved, allowed, settings = state["args"], set(config.log.allow_change), flat(config)
    if unknown := sorted(allowed - {_spelled(name) for name in settings}):
        raise InputError(f"--allow-change {','.join(unknown)}: this script has no such option")
    unread = {"epochs"} if _open_ended(config) else set()
    if distributed.world_size() > 1:
        unread |= {"bn_splits", "bn_splits_query"}
    compared = saved.keys() & settings.keys() - FREE - unread
    differences = {
        _spelled(name): (settings[name], saved[name])
        for name in sorted(compared)
        if not _same(settings[name], saved[name])
    }
    before = state["progress"].get("batch", batch)
    if before != batch:
        differences["batch-size"] = (f"{batch} in all", f"{before} in all")
    refused = {name: pair for name, pair in differences.items() if name not in allowed}
    for name in sorted(differences.keys() & allowed):
        now, then = differences[name]
        print_rank0(f"--allow-change {name}: {_shown(then)} until here, {_shown(now)} from here on")
    if refused:
        listed = "; ".join(
            f"--{name} is {_shown(now)}, and was {_shown(then)}"
            for name, (now, then) in refused.items()
        )
        raise InputError(
            f"--resume {config.log.resume}: options differ from those of the run: {listed}. Give the same ones "
            f"({Path(config.log.resume).parent / 'args.yaml'} has all of them), or change them on purpose "
            f"with --allow-change {','.join(refused)}"
        )


def _open_ended(config: Training) -> bool:
    """Return whether no schedule depends on `--epochs`."""
    return not (config.optimizer.cos or config.SCHEDULED)


def _same(now: object, then: object) -> bool:
    """Return whether plain values, or lists of them, are equal. `then` may be anything."""
    if isinstance(now, list | tuple):
        return (
            isinstance(then, list | tuple)
            and len(now) == len(then)
            and all(_same(a, b) for a, b in zip(now, then, strict=True))
        )
    return isinstance(then, bool | int | float | str | None) and now == then


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: object) -> str:
    """Return an option's value as a message shows it."""
    return "unset" if value is None else short(str(value))
