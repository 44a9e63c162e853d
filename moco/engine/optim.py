"""Optimizers and learning-rate schedules."""

import math
from argparse import Namespace
from collections.abc import Iterable

import torch
from torch import nn


def sgd(parameters: Iterable[nn.Parameter], args: Namespace) -> torch.optim.SGD:
    """SGD with momentum and weight decay on the parameters that train, fused.

    Not fused under fp16: where the gradient scaler skips the first step, PyTorch's fused SGD leaves the momentum buffer
    uninitialised and uses it in the next.
    """
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.wd, fused=args.amp != "fp16")


def learning_rate(args: Namespace, epoch: int) -> float:
    """The epoch's learning rate: linear warm-up, then a half cosine, or x .1 at each of `args.schedule`."""
    if epoch < args.lr_warmup_epochs:
        return args.lr * (epoch + 1) / (args.lr_warmup_epochs + 1)
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
