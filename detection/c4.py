"""Build Faster and Mask R-CNN on res4 of a ResNet ("C4") with detectron2, as in MoCo."""

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
from moco.files import UnreadableError, read_json
from moco.pickles import read_pickle

CONFIGS = Path(__file__).parent / "configs"
SOURCE = "source.json"  # file in a detector's run folder that names the converted checkpoint
BASIC = {18: 2, 34: 3}  # depth of a ResNet without bottlenecks: number of blocks in res5


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """A C4 head of detectron2 with an additional norm after res5.

    MoCo uses this norm (arXiv 1911.05722, appendix). Also supports ResNet-18 and -34.
    """

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
    """Return the MODEL.RESNETS options of a torchvision ResNet.

    Raises InputError if `arch` is unknown.
    """
    net = resnet(arch, 1)
    depth = int(re.search(r"\d+", arch)[0])
    return {
        "DEPTH": depth,
        "RES2_OUT_CHANNELS": 64 if depth in BASIC else 256,
        "NUM_GROUPS": net.groups,
        "WIDTH_PER_GROUP": net.base_width,
    }


def config(file: Path, options: list[str], gpus: int) -> CfgNode:
    """Return the configuration of a run on `gpus` GPUs, or on the CPU if `gpus` is 0.

    If MODEL.WEIGHTS is a converted checkpoint, MODEL.RESNETS is set to match it. Raises InputError
    if the file or an option is invalid, or if the config does not fit converted weights.
    """
    if not Path(file).is_file():
        same = CONFIGS / Path(file).name
        where = f"give {same}" if same.is_file() else f"MoCo's, SynCo's and AdCo's are in {CONFIGS}"
        raise InputError(f"{file}: no such config; {where}")
    cfg = get_cfg()
    try:
        # Refuse Python objects first, because `merge_from_file` would create them.
        CfgNode.load_yaml_with_base(str(file), allow_unsafe=False)
        cfg.merge_from_file(str(file))
        cfg.merge_from_list(options)
    except Exception as error:  # yacs and PyYAML raise errors of many types
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{' '.join([str(file), *options])}: {what}; options are pairs, "
            "as in SOLVER.BASE_LR 0.01"
        ) from None
    if arch := source(cfg.MODEL.WEIGHTS).get("arch"):
        if cfg.INPUT.FORMAT != "RGB" or cfg.MODEL.RESNETS.STRIDE_IN_1X1:
            raise InputError(
                f"{file}: {cfg.MODEL.WEIGHTS} needs RGB and torchvision's strides; "
                "take a config that ends in _moco, _synco or _adco"
            )
        for name, value in resnet_options(arch).items():
            cfg.MODEL.RESNETS[name] = value
    if gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    if gpus <= 1 and cfg.MODEL.RESNETS.NORM == "SyncBN":
        cfg.MODEL.RESNETS.NORM = "BN"
        print("MODEL.RESNETS.NORM BN: SyncBN needs several GPUs, so plain batch norm is used")
    return cfg


def converted(weights: str) -> dict[str, Any] | None:
    """Return the content of MODEL.WEIGHTS if convert-pretrain-to-detectron2.py wrote it, else None.

    Raises InputError if the pickle holds more than arrays and plain values, because detectron2
    would run code in it.
    """
    if not weights.endswith(".pkl") or not Path(weights).is_file():
        return None
    try:
        found = read_pickle(weights)
    except UnreadableError as error:
        raise error.at(weights) from None
    except InputError as error:
        raise InputError(f"{weights}: {error}; convert the checkpoint again") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{weights}: holds a {type(found).__name__} instead of weights; convert a checkpoint"
        )
    if "source" in found and not (
        isinstance(found["source"], dict) and isinstance(found.get("model"), dict)
    ):
        raise InputError(
            f"{weights}: damaged ('source' or 'model' is not a dict); convert the checkpoint again"
        )
    return found if "source" in found else None


def source(weights: str) -> dict[str, Any]:
    """Return the known facts about the origin of MODEL.WEIGHTS.

    It is read from a converted checkpoint, or from the run folder of a trained detector. Returns an
    empty dict for other weights.
    """
    if found := converted(weights):
        return found["source"]
    return detector_origin(Path(weights).parent) if weights.endswith(".pth") else {}


def detector_origin(folder: Path) -> dict[str, Any]:
    """Return the origin of the converted checkpoint from which the detector in `folder` started.

    Returns an empty dict if there is no detector, or if it started from other weights.
    """
    file = folder / SOURCE
    try:
        found = read_json(file) if file.is_file() else {}
    except UnreadableError as error:
        raise error.at(file) from None
    except InputError as error:
        raise InputError(f"{file}: {error}; choose another folder") from None
    return found if isinstance(found, dict) else {}


def differing_tensors(model: nn.Module, tensors: dict[str, np.ndarray]) -> list[str]:
    """Return the names of backbone tensors that differ between a model and a converted checkpoint.

    Tensors must be equal bit by bit. The norm after res5 is ignored, because only the model has it.
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
