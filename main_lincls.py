#!/usr/bin/env python
"""Linear probe: train a classifier on the frozen features of a pre-trained encoder, test it on val/.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with. With --weights finetune the
whole network trains.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco.cli import entry, options
from moco.cli.parser import Options, Parser
from moco.errors import InputError
from moco.evaluate import classifier, finetune, inputs
from moco.evaluate.probe import LinearProbe


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_input(p, batch=256, recipe="probe", arch=None)
    options.add_evaluation(p)
    options.add_weights(p, "freeze")
    options.add_optimizer(p, epochs=100, lr=[30.0], wd=[0.0], schedule=[60, 80])
    options.add_choice(p)
    options.add_run(p)
    options.add_launch(p)
    return p


def check(args: Options) -> None:
    for option, values in (("--lr", args.lr), ("--wd", args.wd)):
        printed = [f"{value:g}" for value in values]  # as the results name them
        if len(set(printed)) < len(printed):
            raise InputError(f"{option} {' '.join(printed)}: one stands twice; give each once")
        if len(values) > 1 and args.weights == "finetune":
            raise InputError(
                f"{option} {' '.join(printed)}: --weights finetune trains one network; give one value"
            )
    inputs.check_choice(args)
    inputs.restore_options(args, ("weights", "lr", "wd"))
    args.method = "linear" if args.weights == "freeze" else "finetune"
    inputs.check(args)


def worker(args: Options, device: torch.device) -> None:
    images = inputs.splits(args)
    net = inputs.pretrained(args, len(images.train.classes), device)
    settings = [classifier.Setting(lr, wd) for lr in args.lr for wd in args.wd]
    if args.weights == "freeze":
        trainer = LinearProbe(args, net, images, device, settings)
    else:
        trainer = finetune.FineTuning(
            args, net, images, device, settings[0], lr_backbone=args.lr[0]
        )
    trainer.run(args.method)


if __name__ == "__main__":
    entry.main(parser(), check, worker)
