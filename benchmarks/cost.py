#!/usr/bin/env python
"""Count the multiply-adds per image of each pre-training config, forward and backward.

Nothing is timed. The script runs one step of the config's method, with its own network, views and
head, on tensors without values. PyTorch's counter adds up matrix products and convolutions.

`ratio` compares an image with one of MoCo v2 (configs/mocov2_200.yaml). `total` is `ratio` times
the images of the run (epochs x images of the data set), relative to the images of MoCo v2's 200
epochs on ImageNet. Memory traffic, decoding, color operations, communication, and the blocks that
--grad-checkpoint recomputes are not counted, so the figures do not predict hours.
"""

import contextlib
import importlib
import io
from pathlib import Path
from unittest import mock

import measure
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from moco.augment import recipes
from moco.config import Pretraining, replaced
from moco.data.images import Images
from moco.engine import pretrain
from moco.rng import Progress

# Images in train/. ImageNet-100 counts as a tenth of ImageNet, because its classes vary by paper.
IMAGES = {None: 1_281_167, "imagenet100": 128_117}
BATCH = 32
BASE = "mocov2_200"


def script(recipe: Path) -> str:
    """Return the script of a pre-training config; "" for other configs."""
    text = recipe.read_text()
    found = next(
        (line for line in text.splitlines() if " main_" in line and line.startswith("#")), ""
    )
    name = next(
        (word.removesuffix(".py") for word in found.split() if word.startswith("main_")), ""
    )
    return name if name not in ("main_lincls", "main_semisup") else ""


def count(recipe: Path, name: str) -> tuple[Pretraining, float]:
    """Return the settings of a config, and the multiply-adds of an image in units of 10^9."""
    module = importlib.import_module(name)
    config = module.parser().parse(["DIR", "--cfg", str(recipe)])
    found = []

    def one_step(config: Pretraining, _: torch.device, build) -> None:
        labels = np.zeros(IMAGES[config.input.data_name], dtype=np.int64)
        images = Images(Path("DIR"), labels, ("one", "two"))
        method = build(images).to("meta")  # timm 1.0.15 cannot build it on this device
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            views = [
                torch.zeros(BATCH, 3, view.size, view.size)
                for view in recipes.from_settings(config.views)
            ]
            loss, _ = method(
                views,
                torch.zeros(BATCH, dtype=torch.long),
                Progress(epochs=config.optimizer.epochs),
            )
            loss.backward()
        found.append(counter.get_total_flops() / 2e9 / BATCH)  # a multiply-add counts as two

    with (
        # autocast does not support the meta device
        mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(pretrain, "train", one_step),
        mock.patch.object(pretrain, "complete", lambda config, *_: config),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        config = module.complete(config)
        config = replaced(config, batch_per_process=config.input.batch_size)
        module.worker(config, torch.device("cpu"))
    return config, found[0]


def main() -> int:
    """Print the table and write it as JSON; return the exit status."""
    p = measure.bare_parser(__doc__)
    measure.add_json(p)
    p.add_argument("recipes", nargs="*", type=Path, help="config files (default: all in configs/)")
    options = p.parse_args()
    for file in options.recipes:
        if not file.is_file():
            p.error(f"{file}: no such file")
        if not script(file):
            p.error(f"{file}: is not a recipe of pre-training; leave it out")
    files = options.recipes or sorted((measure.ROOT / "configs").glob("*.yaml"))
    base_config, base = count(measure.ROOT / "configs" / f"{BASE}.yaml", "main_synco")
    rows = []
    for file in files:
        if not (name := script(file)):
            continue
        config, cost = count(file, name)
        fraction = IMAGES[config.input.data_name] / IMAGES[None]
        total = cost / base * config.optimizer.epochs / base_config.optimizer.epochs * fraction
        rows.append(
            {
                "recipe": file.stem,
                "GMAC": round(cost, 1),
                "ratio": round(cost / base, 2),
                "total": round(total, 2),
            }
        )
    print(f"{'recipe':28}{'GMAC/image':>12}{'ratio':>8}{'total':>8}")
    for row in rows:
        print(f"{row['recipe']:28}{row['GMAC']:12.1f}{row['ratio']:8.2f}{row['total']:8.2f}")
    measure.write("cost", options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    measure.main(main)
