"""Optimizers and learning-rate schedules."""

import math
from argparse import Namespace
from typing import Any

import torch


def sgd(groups: list[dict[str, Any]], args: Namespace) -> torch.optim.SGD:
    """SGD with momentum, fused, on groups of parameters with an `lr` and a `weight_decay` each.

    Not fused under fp16: where the gradient scaler skips the first step, PyTorch's fused SGD leaves the momentum buffer
    uninitialised and uses it in the next.
    """
    return torch.optim.SGD(groups, momentum=args.momentum, fused=args.amp != "fp16")


def decay(args: Namespace, epoch: int) -> float:
    """The epoch's share of the learning rate: linear warm-up, then a half cosine, or x .1 at each of `args.schedule`."""
    if epoch < args.lr_warmup_epochs:
        return (epoch + 1) / (args.lr_warmup_epochs + 1)
    if args.cos:
        return 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
