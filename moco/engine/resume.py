"""Resolve `--resume`: find the folder and the checkpoint, and check that the options match."""

import re
from pathlib import Path

from moco import distributed
from moco.config import AnyConfig, Training, flat, replaced
from moco.encoder import metadata
from moco.engine import checkpoint
from moco.engine.decoding import BEFORE, of_resumed
from moco.errors import InputError, short
from moco.files import read_yaml
from moco.messages import print_rank0

# Options that may differ from those of the resumed run, because they change neither the result nor
# the schedule of training: launch, reading, logging and saving. The batch options are here because
# `check_unchanged` compares the total batch instead.
MAY_DIFFER = frozenset(
    "data save_dir output tag cfg resume allow_change evaluate script"
    " workers cache_images download on_bad_image host_features loss_chunk compile grad_checkpoint"
    " print_freq save_every save_every_steps keep keep_every knn_every knn_k knn_t knn_features"
    " probe_online rankme_every"
    " multiprocessing_distributed nproc_per_node world_size rank dist_url dist_backend gpu device"
    " local_rank track nodes batch_size batch_per_process accumulation_steps batch_is_per_process"
    " batch_is_of_all_nodes encoder_method encoder_script pretrain_epochs".split()
)


def resolve(config: AnyConfig) -> tuple[AnyConfig, bool]:
    """Return `config` with the checkpoint and folder of `--resume`, and whether the run continues.

    `--resume auto` continues the run of this script in `--save-dir`, or in the subfolder that an
    evaluation uses if the folder holds another run. If there is no such run, a new one starts.
    `--resume FILE` continues in FILE's folder. With another `--save-dir`, it starts a new run there
    from FILE. A run that only tests (`--evaluate`) continues nothing.

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
            print_rank0(f"--resume auto: no checkpoint in {chosen} yet; the run starts")
        elif not tests:
            config = replaced(config, save_dir=str(own))
        return config, own is not None and not tests
    file, folder = Path(given), Path(given).parent
    if tests or (chosen and Path(chosen).resolve() != folder.resolve()):
        return config, False
    checkpoint.load(given)
    further = next(iter(checkpoint.list_checkpoints(folder)), file)
    if not further.samefile(file):
        raise InputError(
            f"--resume {given}: {further.name} in the same folder is further, and would be "
            "overwritten; --resume auto continues from it, and --save-dir with a new folder "
            f"starts another run from {file.name}"
        )
    return replaced(config, save_dir=str(folder)), True


def inherit(config: AnyConfig) -> AnyConfig:
    """Return the config of a pre-training run with some settings of the checkpoint of `--resume`.

    These are the network's, mean and std, and how images are decoded. Given options are kept.
    Without `--resume`, the stem is ImageNet's, and the epsilons of the layer norms are timm's.
    Raises InputError if the checkpoint cannot be read.
    """
    settings = flat(config)
    found = {name: settings[name] for name in ("stem", "norm_eps", "mean", "std", *BEFORE)}
    if config.log.resume and None in found.values():
        facts = of_resumed(metadata.read_metadata(checkpoint.load(config.log.resume)))
        found = {name: getattr(facts, name) if one is None else one for name, one in found.items()}
    found["stem"] = found["stem"] or "imagenet"
    found["norm_eps"] = found["norm_eps"] or "timm"
    found["exif"] = found["exif"] or "ignore"
    found["shrink_on_decode"] = bool(found["shrink_on_decode"])
    return replaced(config, **found)


def _own_folder(folder: Path, script: str) -> Path | None:
    """Return the last folder with a run of `script`, or None.

    Searches `folder` and its subfolders SCRIPT, SCRIPT-2, ... Runs that only tested (`--evaluate`)
    are ignored, because they leave nothing to continue.
    """
    name = re.compile(rf"{script}(-\d+)?")
    subfolders = (path for path in folder.glob(f"{script}*") if name.fullmatch(path.name))
    paths = [folder, *sorted(subfolders, key=_number)]
    own = [path for path in paths if (path / "args.yaml").is_file() and _is_of(path, script)]
    if not own and checkpoint.list_checkpoints(folder) and not (folder / "args.yaml").exists():
        return folder  # the user has copied the checkpoints alone
    return own[-1] if own else None


def _number(folder: Path) -> int:
    """Return 3 for lincls-3, and 1 for lincls."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 1


def _is_of(folder: Path, script: str) -> bool:
    """Return whether `folder` has a run of `script` that trained.

    Raises InputError if its args.yaml cannot be read.
    """
    try:
        options = read_yaml(folder / "args.yaml")
    except InputError as error:
        raise InputError(f"{folder / 'args.yaml'}: {error}; choose another folder") from None
    return options.get("script") == script and options.get("evaluate") is not True


def check_unchanged(config: Training, state: checkpoint.State, batch: int) -> None:
    """Raise InputError if options differ from those of the run that `--resume` continues.

    The message names each difference. Options in `MAY_DIFFER` may differ. Options that the user
    names with `--allow-change` may differ, too; their changes are printed. `--epochs` may differ
    unless a schedule depends on it, and `--sgdr-t0` without `--sgdr`. `--bn-splits` may differ if
    there are several processes, because these ignore it.

    Args:
        config: the settings of this run.
        state: the content of the checkpoint of `--resume`.
        batch: images in a step, over all processes.
    """
    saved, settings = BEFORE | state["args"], flat(config)
    allowed = set(config.log.allow_change)
    if unknown := sorted(allowed - {_spelled(name) for name in settings}):
        raise InputError(f"--allow-change {','.join(unknown)}: this script has no such option")
    unread = {"epochs"} if _open_ended(config) else set()
    if not config.optimizer.sgdr:
        unread.add("sgdr_t0")
    if distributed.world_size() > 1:
        unread |= {"bn_splits", "bn_splits_query"}
    compared = saved.keys() & settings.keys() - MAY_DIFFER - unread
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
        print_rank0(f"--allow-change {name}: {_shown(then)} before, {_shown(now)} from now on")
    if refused:
        listed = "; ".join(
            f"--{name} is {_shown(now)}, and was {_shown(then)}"
            for name, (now, then) in refused.items()
        )
        raise InputError(
            f"--resume {config.log.resume}: options differ from those of the run: {listed}. "
            f"Give the same ones ({Path(config.log.resume).parent / 'args.yaml'} has all of them), "
            f"or change them on purpose with --allow-change {','.join(refused)}"
        )


def _open_ended(config: Training) -> bool:
    """Return whether no schedule depends on `--epochs`."""
    return not (config.optimizer.cos or config.depends_on_epochs)


def _same(now: object, then: object) -> bool:
    """Return whether two values of an option are equal. `then` is untrusted, of any type."""
    if isinstance(now, list | tuple):
        return (
            isinstance(then, list | tuple)
            and len(now) == len(then)
            and all(_same(a, b) for a, b in zip(now, then, strict=True))
        )
    return isinstance(then, bool | int | float | str | None) and now == then


def _spelled(name: str) -> str:
    """Return an option's name as on the command line, without leading dashes."""
    return name.replace("_", "-")


def _shown(value: object) -> str:
    """Return an option's value as text for a message."""
    return "unset" if value is None else short(str(value))
