"""Train linear classifiers on the frozen features of a pre-trained encoder (linear probe)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco.config import Probing
from moco.data import loader
from moco.encoder import networks
from moco.engine.log import Metrics
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.evaluate.classifier import ClassifierTask, Setting, init_classifier, with_head_axis
from moco.evaluate.inputs import tests_full_network
from moco.evaluate.splits import Splits
from moco.messages import counted, print_rank0
from moco.rng import Progress


class Heads(nn.ModuleList):
    """A list of classifiers of the same features."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [heads, B, num_classes] of features [B, D]."""
        return torch.stack([head(features) for head in self])


class LinearProbe(ClassifierTask):
    """The training of new last layers on a frozen backbone in eval mode (MoCo, section 4.1).

    With `--drop-path`, the stochastic depth of the backbone is active while the classifiers train,
    as in MoBY's code. Batch norm stays in eval mode, so that the backbone does not change.

    With several settings, a classifier for each is trained in the same pass, from the same initial
    weights and on the same features. On a CPU, each result has the same bits as if the classifier
    were trained alone.

    Args:
        config: the settings of the evaluation.
        net: the network, whose last layer is trained.
        images: the images to train on, to test on, and to choose on.
        device: the device of this process.
        settings: the learning rate and weight decay of each classifier.
        more: `best_name` of `ClassifierTask`.
    """

    # The classifiers compute in float32 without a gradient scaler. A scaler would skip a step of
    # all classifiers if one of them diverged.
    scales_gradient = False

    def __init__(
        self,
        config: Probing,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        settings: list[Setting],
        **more: str,
    ):
        net.requires_grad_(False)
        first = networks.head(net).requires_grad_(True)
        init_classifier(first, config.classifier.zero_init_classifier)
        self.heads = [first] + [copy.deepcopy(first) for _ in settings[1:]]
        if len(self.heads) > 1:
            networks.set_head(net, Heads(self.heads))
        self.loaded = {name: net.state_dict()[name].clone() for name in networks.backbone_keys(net)}
        super().__init__(config, net, images, device, settings, **more)
        # if one of several classifiers diverges, the others continue
        self.may_diverge = len(self.heads) > 1

    @property
    def trained_module(self) -> nn.Module:
        """Return the classifiers."""
        return networks.head(self.module)

    @property
    def grad_clip_modules(self) -> list[nn.Module]:
        """Return the classifiers, because the gradient of each is clipped separately."""
        return self.heads

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one parameter group for each classifier."""
        return [
            {"params": list(head.parameters()), "lr": lr, "weight_decay": wd, "adapt": False}
            for head, (lr, wd) in zip(self.heads, self.settings, strict=True)
        ]

    def start_epoch(self) -> None:
        """Keep the backbone in eval mode, except its stochastic depth."""
        self.module.eval()
        for module in networks.stochastic_depth(self.module):
            module.train()

    def loss(
        self,
        net: nn.Module,
        views: list[Tensor],
        batch: loader.Batch,
        progress: Progress,  # noqa: ARG002
    ) -> tuple[Tensor, Metrics]:
        """Return the sum of the classifiers' losses, and the metrics of the best one."""
        with torch.inference_mode():
            features = networks.features(self.module, views[0])
        with torch.autocast(self.device.type, enabled=False):
            return self.losses(with_head_axis(net(features.float().clone())), batch.label)

    def check_restored(self) -> None:
        """Raise InputError if the checkpoint of `--resume` has another backbone."""
        if not tests_full_network(self.config) and self._changed():
            config = self.config
            source = config.encoder.pretrained or f"a random one with --seed {config.run.seed}"
            raise InputError(
                f"--resume {config.log.resume}: its backbone is not {source}; "
                "give the --pretrained with which the run started"
            )

    def finish(self, trainer: Trainer) -> None:  # noqa: ARG002
        """Raise RuntimeError if a tensor of the backbone has changed since it was loaded."""
        if changed := self._changed():
            raise RuntimeError(f"the frozen backbone changed in training: {', '.join(changed)}")
        print_rank0(
            "frozen backbone is bit-identical to what was loaded: "
            f"{counted(len(self.loaded), 'tensor')}"
        )

    def _changed(self) -> list[str]:
        """Return the names of the backbone tensors that have changed since they were loaded."""
        now = self.module.state_dict()
        return [name for name, tensor in self.loaded.items() if not torch.equal(tensor, now[name])]
