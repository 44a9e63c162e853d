"""Optimizers and learning-rate schedules."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "lars")


def make(groups: list[dict[str, Any]], args: Namespace) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` on groups of parameters with an `lr` and a `weight_decay` each.

    SGD is fused, but not under fp16: where the gradient scaler skips the first step, PyTorch's fused SGD leaves the momentum
    buffer uninitialised and uses it in the next.
    """
    if args.optimizer == "lars":
        return LARS(groups, momentum=args.momentum)
    return torch.optim.SGD(groups, momentum=args.momentum, nesterov=args.nesterov, fused=args.amp != "fp16")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), in the form that SimCLR, MoCo v3 and SogCLR use.

    For weights of two dimensions or more g <- trust |w| / |g + wd w| (g + wd w); biases and the scales of norms take g as it
    is, without decay. Then v <- momentum v + g and w <- w - lr v.
    """

    def __init__(self, params, lr: float = 0.1, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; `closure` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = {p: p.grad for p in params}
            matrices = [p for p in params if p.dim() > 1]
            if matrices:
                gradients.update(zip(matrices, _scaled(matrices, group["weight_decay"], group["trust"]), strict=True))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [gradients[p] for p in params])
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
        return loss


def _scaled(params: list[Tensor], decay: float, trust: float) -> list[Tensor]:
    """trust |w| / |g| g with g the gradient and its decay; g itself where a length is 0."""
    gradients = torch._foreach_add([p.grad for p in params], params, alpha=decay)
    length, slope = (torch.stack(torch._foreach_norm(x)) for x in (params, gradients))
    ratio = torch.where((length > 0) & (slope > 0), trust * length / slope, 1.0)
    torch._foreach_mul_(gradients, list(ratio.to(gradients[0].dtype).unbind()))
    return gradients


def rate(args: Namespace, base: float, epoch: int) -> float:
    """The learning rate of an epoch, which begins at `base`.

    Linear warm-up over `args.lr_warmup_epochs`; then a half cosine down to `args.lr_final`, over the whole run (`args.cos`) or
    again and again over `args.sgdr_t0` epochs (`args.sgdr`; Loshchilov & Hutter, arXiv 1608.03983); or x .1 at each of
    `args.schedule`.
    """
    if epoch < args.lr_warmup_epochs:
        return base * ((epoch + 1) / (args.lr_warmup_epochs + 1))
    if args.cos or args.sgdr:
        passed = epoch % args.sgdr_t0 / args.sgdr_t0 if args.sgdr else epoch / args.epochs
        share = 0.5 * (1 + math.cos(math.pi * passed))
        return args.lr_final + (base - args.lr_final) * share
    return base * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
