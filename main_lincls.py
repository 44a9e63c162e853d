#!/usr/bin/env python
"""Linear probe: train a classifier on the frozen features of a pre-trained encoder, test it on val/.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import torch

from moco.engine import classify, cli
from moco.engine.log import say
from moco.errors import InputError


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_input(p, batch=256, recipe="probe", arch=None)
    cli.add_pretrained(p)
    cli.add_optimizer(p, epochs=100, lr=[30.0], wd=0.0, schedule=[60, 80])
    cli.add_run(p)
    p.add_argument("-e", "--evaluate", action="store_true", help="only test the classifier of --resume")
    cli.add_launch(p)
    return p


def check(args: cli.Options) -> None:
    args.method = "linear"
    rates = [f"{lr:g}" for lr in args.lr]  # as the results name them
    if len(set(rates)) < len(rates):
        raise InputError(f"--lr {' '.join(rates)}: a rate stands twice; give each once")
    classify.check(args)


def worker(args: cli.Options, device: torch.device) -> None:
    train, val = classify.splits(args)
    net = classify.pretrained(args, len(train.classes), device)
    probe = classify.LinearProbe(args, net, train, val, device)
    if args.evaluate:
        probe.test()
    else:
        probe.train()
        probe.check_frozen()
    accuracy = probe.accuracy
    if len(args.lr) > 1:
        say("  ".join(f"lr {lr:g}: {100 * accuracy[f'acc1_lr{lr:g}']:.3f}" for lr in args.lr) + "  (Acc@1; the best follows)")
    say(f"* Acc@1 {100 * accuracy['acc1']:.3f} Acc@5 {100 * accuracy['acc5']:.3f}")
    classify.write_results(args, "linear", accuracy)


if __name__ == "__main__":
    cli.main(parser(), check, worker)
