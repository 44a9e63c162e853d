#!/usr/bin/env python
"""Linear probe: train a classifier on the frozen features of a pre-trained encoder, test it on val/.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import torch

from moco.data import subsets
from moco.engine import checkpoint, classify, cli
from moco.engine.log import say
from moco.errors import InputError


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_input(p, batch=256, recipe="probe", arch=None)
    cli.add_pretrained(p)
    cli.add_optimizer(p, epochs=100, lr=[30.0], wd=[0.0], schedule=[60, 80])
    cli.add_run(p)
    p.add_argument("-e", "--evaluate", action="store_true", help="only test the classifier of --resume")
    p.add_argument(
        "--val-from-train",
        type=float,
        metavar="FRACTION",
        help="of each class in train/, held out to choose the best classifier on",
    )
    cli.add_launch(p)
    return p


def check(args: cli.Options) -> None:
    args.method = "linear"
    for option, values in (("--lr", args.lr), ("--wd", args.wd)):
        printed = [f"{value:g}" for value in values]  # as the results name them
        if len(set(printed)) < len(printed):
            raise InputError(f"{option} {' '.join(printed)}: one stands twice; give each once")
    if args.val_from_train is not None and not 0 < args.val_from_train < 1:
        raise InputError(f"--val-from-train {args.val_from_train:g}: must lie between 0 and 1, as in --val-from-train 0.1")
    if args.evaluate and not args.resume:
        raise InputError("--evaluate tests a trained classifier: give its checkpoint with --resume FILE")
    if args.resume:
        take_up(args, checkpoint.load(args.resume))
    classify.check(args)


def take_up(args: cli.Options, state: checkpoint.State) -> None:
    """Go on with the seed and the classifiers of a checkpoint: refuse others, or, only to test, take what it holds."""
    args.seed = state["progress"]["seed"]
    for name in ("lr", "wd", "val_from_train", *(["pretrained"] if args.evaluate else [])):
        given, saved = getattr(args, name), state["args"].get(name)
        if args.evaluate:
            setattr(args, name, saved)
        elif given != saved:
            raise InputError(f"--{name.replace('_', '-')} {given}: {args.resume} was trained with {saved}; give the same to go on")


def worker(args: cli.Options, device: torch.device) -> None:
    train, val = classify.splits(args)
    held_out = None
    if args.val_from_train:
        train, held_out = subsets.hold_out(train, args.val_from_train, args.seed)
        say(f"{len(held_out)} images of train/ are held out to choose on, {len(train)} to train on")
    net = classify.pretrained(args, len(train.classes), device)
    probe = classify.LinearProbe(args, net, train, val, device, held_out)
    if args.evaluate or probe.first_epoch >= args.epochs:
        probe.test()
    else:
        probe.train()
        probe.check_frozen()
    accuracy = probe.accuracy
    if len(probe.settings) > 1:
        top1 = [f"{probe.name(one, ' ')}: {100 * accuracy[f'acc1_{probe.name(one)}']:.3f}" for one in probe.settings]
        say("  ".join(top1) + "  (Acc@1; the best follows)")
    say(f"* Acc@1 {100 * accuracy['acc1']:.3f} Acc@5 {100 * accuracy['acc5']:.3f}")
    classify.write_results(args, "linear", accuracy)


if __name__ == "__main__":
    cli.main(parser(), check, worker)
