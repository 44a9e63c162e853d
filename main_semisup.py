#!/usr/bin/env python
"""Semi-supervised learning: train a pre-trained encoder on few labels, and test it on val/.

By default, only a classifier trains; --weights finetune also trains the encoder. configs/ has the
settings of the papers. Without --pretrained, the encoder is randomly initialised, as a baseline.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco import config, sections, sections_eval
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.errors import InputError
from moco.sections import option

BEST = "model_best_semisup.pth.tar"


@dataclass(frozen=True)
class Optimizer(sections.Schedule):
    """An optimizer without a learning rate; `FineTune` has the learning rates."""

    wd: float = option(
        1e-6, "weight decay", "--weight-decay", range=sections.WEIGHT_DECAY, metavar="WD"
    )


@dataclass(frozen=True)
class FineTune:
    """The learning rates of encoder and classifier, and the projection layers to keep."""

    TITLE: ClassVar[str] = "fine-tuning"
    lr_backbone: float = option(
        0.0,
        "learning rate of the pre-trained encoder, for --weights finetune",
        range=sections.LEARNING_RATE,
        metavar="LR",
    )
    lr_classifier: float = option(
        0.3,
        "learning rate of the new classifier",
        range=sections.LEARNING_RATE,
        metavar="LR",
    )
    ft_proj: int = option(
        0, "keep the first N layers of the projection head", range="[0, 100]", metavar="N"
    )


@dataclass(frozen=True)
class Config(config.Probing):
    """The settings of this script. The defaults are those of SynCo's script."""

    optimizer: Optimizer = Optimizer(epochs=100, cos=True)
    labels: sections_eval.Labels = sections_eval.Labels()
    finetuning: FineTune = FineTune()

    @property
    def kept_layers(self) -> int:
        """Return the number of layers of the projection head to keep below the classifier."""
        return self.finetuning.ft_proj


def parser() -> Parser:
    p = Parser(__doc__, Config())
    frozen = "--weights freeze only trains a classifier; give --weights finetune, or leave it out"
    p.has_effect("lr_backbone", lambda args: args.weights == "finetune", frozen)
    return p


def complete(c: Config) -> Config:
    from moco.evaluate import inputs, splits

    if c.kept_layers and not c.encoder.pretrained and not c.only_tests:
        raise InputError(
            "--ft-proj keeps layers of a pre-trained head: give the checkpoint with "
            "--pretrained FILE"
        )
    if c.kept_layers and c.classifier.weights == "freeze":
        raise InputError(
            "--ft-proj needs --weights finetune: a frozen encoder is evaluated by the features of "
            "its backbone"
        )
    if c.classifier.weights == "finetune" and not (c.finetuning.lr_backbone or c.only_tests):
        message = "--lr-backbone 0: --weights finetune would not train the encoder; "
        raise InputError(message + "give --lr-backbone 0.02, for example, or --weights freeze")
    splits.check_val_from_train(c)
    names = "weights lr_backbone lr_classifier wd train_percent subset_file ft_proj".split()
    c = inputs.restore_options(config.replaced(c, method="semisup"), names)
    c = inputs.complete(c)
    splits.check_labels(c)
    return c


def worker(c: Config, device: Device) -> None:
    from moco.evaluate import inputs, splits
    from moco.evaluate.classifier import Setting, run
    from moco.evaluate.finetune import FineTuning
    from moco.evaluate.probe import LinearProbe

    images, tuning = splits.load(c), c.finetuning
    net = inputs.load_network(c, len(images.train.classes), device)
    setting = Setting(tuning.lr_classifier, c.optimizer.wd)
    frozen = c.classifier.weights == "freeze"
    if frozen:
        task = LinearProbe(c, net, images, device, [setting], best_name=BEST)
    else:
        task = FineTuning(c, net, images, device, setting, tuning.lr_backbone, best_name=BEST)
    run(task, f"semisup{c.labels.train_percent}{'_frozen' if frozen else ''}")


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
