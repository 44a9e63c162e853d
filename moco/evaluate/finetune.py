"""Fine-tune a pre-trained network with a new classifier."""

from typing import Any

import torch
from torch import Tensor, nn

from moco.data import loader
from moco.encoder import networks
from moco.errors import InputError
from moco.evaluate.classifier import Classification, Setting, by_head, init_classifier
from moco.evaluate.inputs import Splits
from moco.rng import Progress


class FineTuning(Classification):
    """Trains the whole network on labelled images: a new classifier at one rate, what was pre-trained at another.

    Args:
        setting: of the classifier.
        lr_backbone: of what was pre-trained, which has the same weight decay.
        zero_init: the classifier begins at 0.
    """

    def __init__(
        self,
        config: Config,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        setting: Setting,
        lr_backbone: float,
        zero_init: bool = False,
    ):
        if config.input.batch_per_process < 2:
            raise InputError(
                "--batch-size gives each process a single image; batch norm needs at least two. Raise --batch-size"
            )
        self.classifier, self.lr_backbone = networks.classifier(net), lr_backbone
        init_classifier(self.classifier, std=0.0 if zero_init else 0.01)
        super().__init__(config, net, images, device, [setting])

    def groups(self) -> list[dict[str, Any]]:
        new = list(self.classifier.parameters())
        mine = {id(p) for p in new}
        old = [p for p in self.module.parameters() if id(p) not in mine]
        (lr, wd), old_lr = self.settings[0], self.lr_backbone
        return [
            {"params": new, "lr": lr, "weight_decay": wd},
            {"params": old, "lr": old_lr, "weight_decay": wd},
        ]

    def forward(
        self, views: list[Tensor], batch: loader.Batch, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(by_head(self.ddp(views[0]).float()), batch.label)
