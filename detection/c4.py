"""Faster and Mask R-CNN on a ResNet's res4 ("C4"), as MoCo fine-tunes them, in detectron2's terms."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

from moco.encoder.resnets import resnet
from moco.errors import InputError
from moco.files import Unreadable, read_json, read_pickle

CONFIGS = Path(__file__).parent / "configs"
SOURCE = "source.json"  # of a detector's run folder: what it began from
BASIC = {18: 2, 34: 3}  # ResNets without bottlenecks: blocks in res5


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """detectron2's C4 head with one more norm after res5 (MoCo, arXiv 1911.05722, appendix), and for ResNet-18 and -34 too."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        resnets = cfg.MODEL.RESNETS
        if resnets.DEPTH in BASIC:
            blocks, width = BASIC[resnets.DEPTH], 8 * resnets.RES2_OUT_CHANNELS
            strides = [2] + [1] * (blocks - 1)
            sizes = {"in_channels": width // 2, "out_channels": width}
            res5 = nn.Sequential(
                *ResNet.make_stage(
                    BasicBlock, blocks, stride_per_block=strides, norm=resnets.NORM, **sizes
                )
            )
        else:
            res5, width = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(resnets.NORM, width))
        return res5, width


def resnet_options(arch: str) -> dict[str, int]:
    """What MODEL.RESNETS says of a torchvision ResNet. Raises InputError for an unknown `arch`."""
    net = resnet(arch, 1)
    depth = int(re.search(r"\d+", arch)[0])
    return {
        "DEPTH": depth,
        "RES2_OUT_CHANNELS": 64 if depth in BASIC else 256,
        "NUM_GROUPS": net.groups,
        "WIDTH_PER_GROUP": net.base_width,
    }


def config(file: Path, options: list[str], gpus: int) -> CfgNode:
    """The configuration of a run on so many GPUs; on 0 it runs on the CPU. A converted checkpoint brings its MODEL.RESNETS.

    Raises InputError for a file or an option that is none, and for a config that does not suit converted weights.
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: no such config; those of MoCo's protocols are in {CONFIGS}")
    cfg = get_cfg()
    try:
        CfgNode.load_yaml_with_base(
            str(file), allow_unsafe=False
        )  # merging would make the Python objects that it names
        cfg.merge_from_file(str(file))
        cfg.merge_from_list(options)
    except Exception as error:  # yacs and PyYAML raise many kinds
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{' '.join([str(file), *options])}: {what}; options are pairs, as in SOLVER.BASE_LR 0.01"
        ) from None
    if arch := source(cfg.MODEL.WEIGHTS).get("arch"):
        if cfg.INPUT.FORMAT != "RGB" or cfg.MODEL.RESNETS.STRIDE_IN_1X1:
            raise InputError(
                f"{file}: {cfg.MODEL.WEIGHTS} wants RGB and torchvision's strides; take a config that ends in _moco"
            )
        for name, value in resnet_options(arch).items():
            cfg.MODEL.RESNETS[name] = value
    if gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    if gpus <= 1 and cfg.MODEL.RESNETS.NORM == "SyncBN":
        cfg.MODEL.RESNETS.NORM = "BN"
        print(
            "MODEL.RESNETS.NORM BN: SyncBN needs several GPUs; each batch's statistics are those of its own images"
        )
    return cfg


def converted(weights: str) -> dict[str, Any] | None:
    """What `convert-pretrain-to-detectron2.py` wrote to the file MODEL.WEIGHTS; None for weights that it did not write.

    Raises InputError for a pickle of anything but arrays and plain values, in which detectron2 would run what it says.
    """
    if not weights.endswith(".pkl") or not Path(weights).is_file():
        return None
    try:
        found = read_pickle(weights)
    except Unreadable as error:
        raise error.at(weights) from None
    except InputError as error:
        raise InputError(f"{weights}: {error}; convert the checkpoint again") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{weights}: holds a {type(found).__name__}, and no weights; convert a checkpoint"
        )
    if "source" in found and not (
        isinstance(found["source"], dict) and isinstance(found.get("model"), dict)
    ):
        raise InputError(
            f"{weights}: damaged (what it says of itself is no table); convert the checkpoint again"
        )
    return found if "source" in found else None


def source(weights: str) -> dict[str, Any]:
    """What the file MODEL.WEIGHTS comes from: a converted checkpoint says it, and a detector's run folder; empty for others."""
    if found := converted(weights):
        return found["source"]
    return began_from(Path(weights).parent) if weights.endswith(".pth") else {}


def began_from(folder: Path) -> dict[str, Any]:
    """What the detector in a run folder began from; empty where none has begun, or not from a converted checkpoint."""
    file = folder / SOURCE
    try:
        found = read_json(file) if file.is_file() else {}
    except Unreadable as error:
        raise error.at(file) from None
    except InputError as error:
        raise InputError(f"{file}: {error}; choose another folder") from None
    return found if isinstance(found, dict) else {}


def not_arrived(model: nn.Module, tensors: dict[str, np.ndarray]) -> list[str]:
    """The backbone tensors, of the model or of a converted checkpoint, that are not bit by bit the same in both.

    The norm after res5 is the model's own and is left out.
    """
    theirs = {
        ("roi_heads." if name.startswith("res5.") else "backbone.") + name: x
        for name, x in tensors.items()
    }
    own = ("num_batches_tracked", "roi_heads.res5.norm.")
    mine = {
        name: x.cpu()
        for name, x in model.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.res5."))
        and not any(part in name for part in own)
    }
    same = {
        name
        for name in mine.keys() & theirs.keys()
        if torch.equal(mine[name], torch.from_numpy(theirs[name]))
    }
    return sorted((mine.keys() | theirs.keys()) - same)
