"""Translate command lines of other repositories: --opts of Swin-style scripts, and FNC's run.py."""

import itertools
import shlex
from collections.abc import Collection
from typing import NamedTuple

from moco.cli.actions import is_number
from moco.errors import InputError, nearest, unknown

# Settings that Swin-style scripts (MoBY, SynCo-v2) take after --opts, and the options to use here.
# {half} is half of the value: these scripts scale learning rates by total batch / 512, this project
# by total batch / 256. Entries without {} are switches.
_SCALED = "--learning-rate-scaling linear"
SWIN_OPTS = {
    "AMP_OPT_LEVEL": "--amp {amp}",
    "AUG.SSL_AUG_CROP": "--crop-min {}",
    "DATA.BATCH_SIZE": "--batch-size {}",
    "DATA.CACHE_MODE": "",
    "DATA.DATASET": "--dataset {}",
    "DATA.DATA_PATH": "--data {}",
    "DATA.IMG_SIZE": "--image-size {}",
    "DATA.NUM_WORKERS": "--workers {}",
    "DATA.PIN_MEMORY": "",
    "DATA.ZIP_MODE": "",
    "EVAL_MODE": "--evaluate",
    "LINEAR_EVAL.PRETRAINED": "--pretrained {}",
    "LINEAR_EVAL.WEIGHTS": "--weights {}",
    "MODEL.DROP_PATH_RATE": "--drop-path {}",
    "MODEL.LABEL_SMOOTHING": "--label-smoothing {}",
    "MODEL.MOBY.CONTRAST_MOMENTUM": "--moco-m {}",
    "MODEL.MOBY.CONTRAST_NUM_NEGATIVE": "--queue {}",
    "MODEL.MOBY.CONTRAST_TEMPERATURE": "--moco-t {}",
    "MODEL.MOBY.ONLINE_DROP_PATH_RATE": "--online-drop-path {}",
    "MODEL.MOBY.PRED_NUM_LAYERS": "--pred-layers {}",
    "MODEL.MOBY.PROJ_NUM_LAYERS": "--proj-layers {}",
    "MODEL.MOBY.TARGET_DROP_PATH_RATE": "--target-drop-path {}",
    "MODEL.NUM_CLASSES": "",
    "MODEL.RESUME": "--resume {}",
    "MODEL.TYPE": "--method {}",
    "OUTPUT": "--output {}",
    "PRINT_FREQ": "--print-freq {}",
    "SAVE_FREQ": "--save-every {}",
    "SEED": "--seed {}",
    "TAG": "--tag {}",
    "TRAIN.ACCUMULATION_STEPS": "--accumulation-steps {}",
    "TRAIN.AUTO_RESUME": "--resume auto",
    "TRAIN.BASE_LR": f"--lr {{half}} {_SCALED}",
    "TRAIN.CLIP_GRAD": "--clip-grad {}",
    "TRAIN.EPOCHS": "--epochs {}",
    "TRAIN.MIN_LR": f"--lr-final {{half}} {_SCALED}",
    "TRAIN.OPTIMIZER.MOMENTUM": "--momentum {}",
    "TRAIN.OPTIMIZER.NAME": "--optimizer {}",
    "TRAIN.USE_CHECKPOINT": "--grad-checkpoint",
    "TRAIN.WARMUP_EPOCHS": "--lr-warmup-epochs {}",
    "TRAIN.WARMUP_LR": f"--lr-warmup-from {{half}} {_SCALED}",
    "TRAIN.WEIGHT_DECAY": "--wd {}",
}
_AMP = {"O0": "off", "O1": "fp16", "O2": "fp16", "O3": "fp16"}  # apex's levels
_OPTS = "--opts"


def read_opts(
    words: list[str], options: Collection[str], batch_is_per_process: bool
) -> tuple[list[str], int]:
    """Return the options that stand for `--opts KEY VALUE ...`, and how many words were read.

    Args:
        words: the words of the command line after --opts.
        options: the script's own options, with leading dashes.
        batch_is_per_process: whether --batch-size counts the images of each process, as the
            authors' scripts do.

    Raises InputError if a key has no value, or if the script has no option for it.
    """
    is_value = lambda word: not word.startswith("-") or is_number(word)  # noqa: E731
    given = list(itertools.takewhile(is_value, words))
    if len(given) % 2:
        hint = "give KEY VALUE ..., and DIR before --opts or after another option"
        raise InputError(f"{_OPTS}: '{given[-1]}' has no value; {hint}")
    found, errors = [], []
    for key, value in zip(given[::2], given[1::2], strict=True):
        form = SWIN_OPTS.get(key, f"--{key.split('.')[-1].lower().replace('_', '-')} {{}}")
        if form and form.split()[0] not in options:
            known = [one for one, form in SWIN_OPTS.items() if form.split(" ")[0] in options]
            what = f"{_OPTS} {key}: this script has no option for it"
            mistyped = key not in SWIN_OPTS and nearest(key, known)
            page = "; docs/commands.md lists the settings" if key not in SWIN_OPTS else ""
            errors.append(str(unknown("key", key, known)) if mistyped else what + page)
        elif key == "DATA.BATCH_SIZE" and not batch_is_per_process:
            total = f"--batch-size counts all images of the node: give {value} x its processes"
            errors.append(f"{_OPTS} {key} {value}: {total}")
        else:
            found += _words(form, value)
    if errors:
        raise InputError(*errors)
    return found, len(given)


def _words(form: str, value: str) -> list[str]:
    """Return the words of the option for a setting of --opts. A switch that is off has none."""
    if " " not in form or "{" not in form:  # a switch, or nothing
        return form.split() if value.lower() in ("true", "1") else []
    half = f"{float(value) / 2:g}" if is_number(value) else value
    return form.format(value, half=half, amp=_AMP.get(value, value)).split(" ")


class _Forms(NamedTuple):
    """The options here for one option of FNC's run.py, for each job; "" if none is needed."""

    pretrain: str = ""
    probe: str = ""
    few_labels: str = ""


def _same(form: str) -> _Forms:
    return _Forms(form, form, form)


_FNC_OPTIONS = {
    "checkpoint": _Forms("", "--pretrained {}", "--pretrained {}"),
    "checkpoint-epochs": _Forms("--save-every {}"),
    "ft-proj-selector": _Forms("", "", "--ft-proj {}"),
    "image-size": _same("--image-size {}"),
    "keep-checkpoint-max": _Forms("--keep {}"),
    "learning-rate": _Forms("--lr {}", "--lr {}", "--lr-backbone {} --lr-classifier {}"),
    "learning-rate-scaling": _same("--learning-rate-scaling {}"),
    "model-dir": _same("--save-dir {}"),
    "momentum": _same("--momentum {}"),
    "num-proj-layers": _Forms("--num-proj-layers {}"),
    "proj-out-dim": _Forms("--proj-out-dim {}"),
    "resnet-depth": _same("-a resnet{}"),
    "temperature": _Forms("--temperature {}"),
    "train-batch-size": _same("--batch-size {}"),
    "train-epochs": _same("--epochs {}"),
    "warmup-epochs": _same("--lr-warmup-epochs {}"),
    "weight-decay": _same("--wd {}"),
}
# options for machines, logs and tests, which change no result
_FNC_DROPPED = (
    "cache-dataset checkpoint-steps data-dir eval-batch-size eval-name eval-split eval-steps "
    "gcp-project master tpu-name tpu-zone train-split train-summary-steps use-tpu "
    "variable-schema"
).split()
# options without a counterpart, with the values that correspond to this project
_FNC_FIXED = {
    "color-jitter-strength": ("1", "1.0"),
    "fine-tune-after-block": ("4", "-1"),
    "hidden-norm": ("True", "true", "1", ""),
    "mode": ("train", "train_then_eval"),
    "proj-head-mode": ("nonlinear",),
    "se-ratio": ("0", "0.0"),
    "sk-ratio": ("0", "0.0"),
    "train-mode": ("pretrain", "finetune"),
    "train-steps": ("0",),
    "use-blur": ("True", "true", "1", ""),
    "width-multiplier": ("1",),
}
_FNC_SWITCHES = ("global-bn", "zero-init-logits-layer")
_FNC_OPTIMIZERS = {"momentum": "--optimizer sgd --nesterov", "lars": "--optimizer lars_tf"}
# options that only run.py has
_FNC_MARKS = {"train-mode", "fine-tune-after-block", "ft-proj-selector", "zero-init-logits-layer"}


def refuse_fnc(argv: list[str]) -> None:
    """Raise InputError for a command line of FNC's run.py. The error has the command to use here.

    Args:
        argv: the words of the command line, with `-` for `_` in the names of options.
    """
    flags, others = _flags(argv)
    if not _FNC_MARKS & flags.keys():
        return
    theirs = "these are options of FNC's run.py"
    lacking = [
        f"--{name}={value}"
        for name, value in flags.items()
        if name in _FNC_FIXED and value not in _FNC_FIXED[name]
    ]
    if lacking:
        raise InputError(f"{theirs}; no option here corresponds to {', '.join(lacking)}")
    raise InputError(f"{theirs}; the same here is: {_fnc_command(flags, others)}")


def _fnc_command(flags: dict[str, str], others: list[str]) -> str:
    """Return the command to use here. An evaluation has the protocol of FNC's paper."""
    name, _, split = flags.get("dataset", "imagenet2012").partition("/")
    subset = {"1pct": "1", "10pct": "10"}.get(split)  # of the data set imagenet2012_subset
    if flags.get("train-mode") == "pretrain":
        job, words = 0, ["main_fnc.py"]
    elif subset or flags.get("ft-proj-selector", "0") != "0":
        job, words = 2, [f"main_semisup.py --protocol fnc --train-percent {subset or 'PERCENT'}"]
    else:
        job, words = 1, ["main_lincls.py --protocol fnc"]
        words += ["--weights finetune"] * (flags.get("fine-tune-after-block") == "-1")
    if job and not _is_true(flags.get("zero-init-logits-layer", "False")):  # run.py's default
        words.append("--no-zero-init-classifier")
    if job == 2 and not _is_true(flags.get("global-bn", "True")):
        words.append("--no-sync-bn")
    flags = {flag: value for flag, value in flags.items() if "://" not in value}  # no buckets here
    folder = flags.get("data-dir", "DIR" if name.startswith("imagenet") and not others else "")
    if not name.startswith("imagenet"):
        words.append(f"--dataset {name}")
    for flag, value in flags.items():
        if flag == "optimizer":
            words.append(_FNC_OPTIMIZERS.get(value, f"--optimizer {value}"))
        elif flag in _FNC_OPTIONS:
            words.append(_FNC_OPTIONS[flag][job].replace("{}", shlex.quote(value)))
        elif flag not in (*_FNC_DROPPED, *_FNC_FIXED, *_FNC_SWITCHES, "dataset"):
            words.append(f"--{flag} {value}".strip())
    return " ".join(filter(None, [*words, *map(shlex.quote, filter(None, [*others, folder]))]))


def _is_true(value: str) -> bool:
    """Return whether a switch of run.py is on; without a value, it is."""
    return value.lower() in ("", "true", "1")


def _flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options of a command line with their values, and the other words."""
    flags: dict[str, str] = {}
    others, name = [], ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value
            name = "" if equals else name
        elif name and name != "use-tpu":
            flags[name], name = word, ""
        else:
            others.append(word)
    return flags, others
