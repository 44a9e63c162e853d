"""Describe an encoder for timm and transformers, which load a folder in Hugging Face's layout.

The folder holds config.json, model.safetensors and a model card. timm loads it by the name
`local-dir:FOLDER`, and transformers by `AutoModel.from_pretrained(FOLDER)`.
"""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from moco.encoder import networks, timm_networks
from moco.encoder.pretrained import Encoder
from moco.encoder.stock import stock_models
from moco.errors import InputError, short

# config.json is last, because it makes the folder loadable
FILES = ("model.safetensors", "README.md", "config.json")


def check(found: Encoder) -> None:
    """Raise InputError if no config.json can describe `found`, or if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise InputError("--hf needs the package timm: pip install timm")
    homes = {
        home.library: home
        for home in stock_models(found.arch, found.image_size, found.stem, found.norm_eps)
    }
    advice = "leave --hf out, and give OUT"
    if "timm" not in homes:
        raise InputError(f"--hf: timm has no {found.arch}, only {', '.join(homes)}; {advice}")
    if len(homes["timm"].lines) > 1:  # lines that change the network after timm created it
        what = "--stem cifar" if found.stem == "cifar" else f"--norm-eps {found.norm_eps}"
        raise InputError(
            f"--hf: the {found.arch} has {what}, which timm's config.json cannot describe; "
            f"{advice} with --hub: its hubconf.py can"
        )


def timm_config(found: Encoder, crop: float) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        found: the encoder, which `check` accepts.
        crop: the fraction of the resized image's shorter side that a test image covers, in (0, 1].
    """
    import timm

    name, arguments = timm_networks.stock_arguments(found.arch, found.image_size)
    stock = timm.get_pretrained_cfg(name)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": networks.num_features(found.net),
        "pretrained_cfg": {
            "input_size": [3, found.image_size, found.image_size],
            "fixed_input_size": bool(stock and stock.fixed_input_size),
            "interpolation": "bilinear",
            "crop_pct": crop,
            "crop_mode": "center",
            "mean": list(found.mean),
            "std": list(found.std),
            "num_classes": 0,
            "pool_size": list(stock.pool_size) if stock and stock.pool_size else None,
            "first_conv": stock.first_conv if stock else None,
            "classifier": stock.classifier if stock else None,
        },
        **({"model_args": arguments} if arguments else {}),
    }


def load(folder: Path) -> nn.Module:
    """Return the network that timm creates from the folder, in eval mode.

    Raises InputError if timm cannot.
    """
    import timm

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    except Exception as error:  # an older timm may fail in many ways
        why = short(" ".join(str(error).split()))
        raise InputError(
            f"--hf: timm {timm.__version__} cannot load such a folder ({why}), so nothing was "
            "written; 1.0.26 and newer can, and load Swins from 1.0.31 on: pip install -U timm"
        ) from None


def python(folder: Path) -> tuple[str, str]:
    """Return the Python code with which timm loads the folder as `net`, and transformers'."""
    name = repr(f"local-dir:{folder}")
    return (
        f"import timm; net = timm.create_model({name}, pretrained=True).eval()",
        f"import transformers; net = transformers.AutoModel.from_pretrained({str(folder)!r})",
    )
