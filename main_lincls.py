#!/usr/bin/env python
"""Linear probe: train a classifier on the features of a frozen encoder, and test it on val/.

Without --pretrained, the encoder is randomly initialised, which is the baseline to compare with.
With --weights finetune, the full network trains.
"""

from dataclasses import dataclass

from moco import config, sections, sections_eval
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.errors import InputError
from moco.sections import option


@dataclass(frozen=True)
class Optimizer(sections.Schedule):
    """An optimizer with several learning rates and weight decays, and a classifier for each."""

    lr: tuple[float, ...] = option(
        (30.0,),
        "learning rate, before --learning-rate-scaling; several: train a classifier for each, in "
        "one pass",
        "--learning-rate",
        range=sections.LEARNING_RATE,
        nargs="+",
        metavar="LR",
    )
    wd: tuple[float, ...] = option(
        (0.0,),
        "weight decay; several: train a classifier for each, in one pass",
        "--weight-decay",
        range=sections.WEIGHT_DECAY,
        nargs="+",
        metavar="WD",
    )


@dataclass(frozen=True)
class Config(config.Probing):
    """The settings of this script."""

    optimizer: Optimizer = Optimizer(epochs=100, schedule=(60, 80))
    other: sections_eval.OtherTest = sections_eval.OtherTest()

    @property
    def other_test(self) -> sections_eval.OtherTest:
        """Return the settings of test images in another folder than the training images."""
        return self.other


def parser() -> Parser:
    p = Parser(__doc__, Config())
    tests = "it is for tests of a trained classifier: give -e and --resume FILE, or leave it out"
    p.has_effect("eval_data class_map", lambda args: args.evaluate, tests)
    return p


def complete(c: Config) -> Config:
    from moco.evaluate import inputs, splits

    for flag, values in (("--lr", c.optimizer.lr), ("--wd", c.optimizer.wd)):
        inputs.check_distinct(flag, values)
        if len(values) > 1 and c.classifier.weights == "finetune":
            given = " ".join(f"{value:g}" for value in values)
            raise InputError(
                f"{flag} {given}: --weights finetune trains one network; give one value"
            )
    splits.check_val_from_train(c)
    c = inputs.restore_options(c, ("weights", "lr", "wd"))
    c = config.replaced(c, method="linear" if c.classifier.weights == "freeze" else "finetune")
    return inputs.complete(c)


def worker(c: Config, device: Device) -> None:
    from moco.evaluate import inputs, splits
    from moco.evaluate.classifier import Setting, run
    from moco.evaluate.finetune import FineTuning
    from moco.evaluate.probe import LinearProbe

    images = splits.load(c)
    net = inputs.load_network(c, len(images.train.classes), device)
    settings = [Setting(lr, wd) for lr in c.optimizer.lr for wd in c.optimizer.wd]
    if c.classifier.weights == "freeze":
        task = LinearProbe(c, net, images, device, settings)
    else:
        task = FineTuning(c, net, images, device, settings[0], lr_backbone=c.optimizer.lr[0])
    run(task, c.run.method)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
