"""The linear probe: classifiers on the frozen features of a pre-trained encoder."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco.data import loader
from moco.distributed import print_rank0
from moco.encoder import networks
from moco.engine import precision
from moco.errors import InputError
from moco.evaluate.classifier import Classification, Setting, by_head, init_classifier
from moco.evaluate.inputs import Splits, tests_only
from moco.rng import Progress


class Heads(nn.ModuleList):
    """Several classifiers of the same features [B, D]: their logits [heads, B, classes]."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self])


class LinearProbe(Classification):
    """Trains a new last layer on the frozen, eval-mode backbone (MoCo, section 4.1).

    With several settings, that is one classifier for each, all from the same start, on the same features. What one of them
    becomes is, to the bit on a CPU, what it would be alone.
    """

    def __init__(
        self,
        config: Config,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        settings: list[Setting],
    ):
        net.requires_grad_(False)
        first = networks.head(net).requires_grad_(True)
        init_classifier(first)
        self.heads = [first] + [copy.deepcopy(first) for _ in settings[1:]]
        if len(self.heads) > 1:
            networks.set_head(net, Heads(self.heads))
        self.loaded = {name: net.state_dict()[name].clone() for name in networks.backbone_keys(net)}
        super().__init__(config, net, images, device, settings)
        if not tests_only(config) and self._changed():
            source = config.encoder.pretrained or f"a random one with --seed {config.run.seed}"
            raise InputError(
                f"--resume {config.log.resume}: its backbone is not {source}; give the same --pretrained to go on"
            )

    @property
    def may_diverge(self) -> bool:
        """One of several classifiers, whose numbers then stop no other."""
        return len(self.heads) > 1

    def make_scaler(self) -> torch.amp.GradScaler:
        # the classifiers compute in fp32: one that diverges must not make a gradient scaler skip the others' steps
        return precision.scaler("off", self.device)

    def trained(self) -> nn.Module:
        return networks.head(self.module)

    def independent(self) -> list[nn.Module]:
        return self.heads

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(head.parameters()), "lr": lr, "weight_decay": wd}
            for head, (lr, wd) in zip(self.heads, self.settings, strict=True)
        ]

    def start_epoch(self) -> None:
        self.module.eval()

    def forward(
        self, views: list[Tensor], batch: loader.Batch, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.inference_mode():
            features = networks.features(self.module, views[0])
        with torch.autocast(self.device.type, enabled=False):
            return self.losses(by_head(self.ddp(features.float().clone())), batch.label)

    def finish(self) -> None:
        """Raise RuntimeError if a backbone tensor is not bit for bit what was loaded."""
        if changed := self._changed():
            raise RuntimeError(f"the frozen backbone changed in training: {', '.join(changed)}")
        print_rank0(
            f"frozen backbone is bit-identical to what was loaded: {len(self.loaded)} tensors"
        )

    def _changed(self) -> list[str]:
        now = self.module.state_dict()
        return [name for name, tensor in self.loaded.items() if not torch.equal(tensor, now[name])]
