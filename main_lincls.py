#!/usr/bin/env python
"""Linear probe: train a classifier on the frozen features of a pre-trained encoder, test it on val/.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with. With --weights finetune the
whole network trains.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco.engine import classify, cli
from moco.engine.probe import LinearProbe
from moco.errors import InputError


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_input(p, batch=256, recipe="probe", arch=None)
    cli.add_evaluation(p)
    cli.add_weights(p, "freeze")
    cli.add_optimizer(p, epochs=100, lr=[30.0], wd=[0.0], schedule=[60, 80])
    cli.add_choice(p)
    cli.add_run(p)
    cli.add_launch(p)
    return p


def check(args: cli.Options) -> None:
    for option, values in (("--lr", args.lr), ("--wd", args.wd)):
        printed = [f"{value:g}" for value in values]  # as the results name them
        if len(set(printed)) < len(printed):
            raise InputError(f"{option} {' '.join(printed)}: one stands twice; give each once")
        if len(values) > 1 and args.weights == "finetune":
            raise InputError(f"{option} {' '.join(printed)}: --weights finetune trains one network; give one value")
    classify.check_choice(args)
    classify.restore_options(args, ("weights", "lr", "wd"))
    args.method = "linear" if args.weights == "freeze" else "finetune"
    classify.check(args)


def worker(args: cli.Options, device: torch.device) -> None:
    images = classify.splits(args)
    net = classify.pretrained(args, len(images.train.classes), device)
    settings = [classify.Setting(lr, wd) for lr in args.lr for wd in args.wd]
    if args.weights == "freeze":
        trainer = LinearProbe(args, net, images, device, settings)
    else:
        trainer = classify.FineTuning(args, net, images, device, settings[0], lr_backbone=args.lr[0])
    trainer.run(args.method)


if __name__ == "__main__":
    cli.main(parser(), check, worker)
