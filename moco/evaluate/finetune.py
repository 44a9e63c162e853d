"""Fine-tune a pre-trained network with a new classifier."""

from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import Probing
from moco.data import loader
from moco.encoder import networks
from moco.engine.log import Metrics
from moco.errors import InputError
from moco.evaluate.classifier import ClassifierTask, Setting, init_classifier, with_head_axis
from moco.evaluate.splits import Splits
from moco.rng import Progress


class FineTuning(ClassifierTask):
    """The training of the full network on labelled images, with a new classifier.

    Args:
        config: the settings of the evaluation.
        net: the network with the classifier.
        images: the images to train on, to test on, and to choose on.
        device: the device of this process.
        setting: learning rate and weight decay of the classifier.
        lr_backbone: learning rate of the pre-trained network. It has the weight decay of `setting`.
        more: `best_name` of `ClassifierTask`.

    Raises InputError if each process has a single image per batch.
    """

    keep_last = 2  # batch norm needs at least two images

    def __init__(
        self,
        config: Probing,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        setting: Setting,
        lr_backbone: float,
        **more: str,
    ):
        if config.input.batch_per_process < 2:
            raise InputError(
                "--batch-size gives each process a single image; batch norm needs at least two. "
                "Raise --batch-size"
            )
        self.classifier, self.lr_backbone = networks.classifier(net), lr_backbone
        init_classifier(self.classifier, config.classifier.zero_init_classifier)
        if config.classifier.sync_bn:
            net = distributed.sync_batch_norm(net, device)
        super().__init__(config, net, images, device, [setting], **more)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two parameter groups for the optimizer: the classifier, and everything else."""
        new = list(self.classifier.parameters())
        mine = {id(p) for p in new}
        old = [p for p in self.module.parameters() if id(p) not in mine]
        lr, wd = self.settings[0]
        return [
            {"params": new, "lr": lr, "weight_decay": wd, "adapt": False},
            {"params": old, "lr": self.lr_backbone, "weight_decay": wd},
        ]

    def loss(
        self,
        net: nn.Module,
        views: list[Tensor],
        batch: loader.Batch,
        progress: Progress,  # noqa: ARG002
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and the metrics of the classifier."""
        return self.losses(with_head_axis(net(views[0]).float()), batch.label)
