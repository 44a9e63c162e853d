"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco.errors import InputError
from moco.sections import Schedule


def make(groups: list[dict[str, Any]], schedule: Schedule, amp: str) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` on groups of parameters with an `lr` and a `weight_decay` each.

    SGD and AdamW are fused on CUDA and on the CPU; on other devices PyTorch chooses. SGD is not
    fused under fp16: if the gradient scaler skips the first step, PyTorch's fused SGD leaves the momentum
    buffer uninitialised and uses it in the next step.
    """
    if not 0 <= schedule.momentum < 1 or (schedule.nesterov and not schedule.momentum):
        least = "above 0 with --nesterov" if schedule.nesterov else "at least 0"
        raise InputError(f"--momentum {schedule.momentum:g}: must be {least}, and below 1")
    if schedule.optimizer == "lars":
        return LARS(groups, momentum=schedule.momentum)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(_decayed_apart(groups), fused=_fused(groups))
    fused = _fused(groups) if amp != "fp16" else None
    return torch.optim.SGD(
        groups, momentum=schedule.momentum, nesterov=schedule.nesterov, fused=fused
    )


def _fused(groups: list[dict[str, Any]]) -> bool | None:
    """Return True if torch 2.6 has fused optimizers for the devices of the parameters, else None.

    With None, torch chooses: one kernel for many parameters (foreach) if the device supports that.
    With False, there would be one kernel per parameter.
    """
    kinds = {p.device.type for group in groups for p in group["params"]}
    return True if kinds <= {"cpu", "cuda"} else None


def restore(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str, diverged: bool = False
) -> None:
    """Load what the checkpoint in `path` has of such an optimizer. Raises InputError where it is another one's, or damaged."""
    mine = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        same = all(
            _like(group, own) for group, own in zip(saved["param_groups"], mine, strict=True)
        )
        optimizer.load_state_dict(saved)
        for group, own in zip(optimizer.param_groups, mine, strict=True):
            group.update(own)  # settings are this run's: --allow-change lets them differ
        same &= all(_sound(p, state, optimizer, diverged) for p, state in optimizer.state.items())
    except Exception:  # whatever a stranger's file may lead to
        same = False
    if not same:
        what = "its optimizer is not this run's"
        raise InputError(
            f"{path}: {what}; resume with the options it was made with, or use --pretrained for the weights alone"
        )
    _place_counts(optimizer)
    for p, state in optimizer.state.items():
        for (
            name,
            x,
        ) in state.items():  # fused steps take it for granted that both lie alike in memory
            if x is not None and x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(x)


def _place_counts(optimizer: torch.optim.Optimizer) -> None:
    """Move AdamW's step counts to the device that this run's optimizer needs.

    The fused optimizer needs each count on the device of its parameter. The others read the count
    in Python: on the CPU that waits for no device. The checkpoint's counts may be elsewhere, if its
    run had another device.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "step" in optimizer.state.get(p, {}):
                count = optimizer.state[p]["step"]
                optimizer.state[p]["step"] = count.to(p.device if group["fused"] else "cpu")


_STATE = {
    "momentum": {"momentum_buffer"},
    "betas": {"step", "exp_avg", "exp_avg_sq"},
}  # what each kind keeps for a parameter
_KIND = (
    "dampening",
    "betas",
    "eps",
    "trust",
    "amsgrad",
)  # tells an optimizer from another one of the same shapes


def _like(saved: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Return whether a saved group is of the same optimizer as `mine`; its settings may differ."""
    same = all(saved.get(name) == mine.get(name) for name in _KIND) and ("momentum" in saved) == (
        "momentum" in mine
    )
    return same and all(
        isinstance(saved[name], int | float | None)
        for name in mine.keys() & saved.keys() - {"params", "betas"}
    )


def _sound(
    p: Tensor, state: dict[str, Any], optimizer: torch.optim.Optimizer, diverged: bool
) -> bool:
    """Whether a parameter's state is a number, or tensors of its shape, by the names that the optimizer gives them."""
    names = next(names for setting, names in _STATE.items() if setting in optimizer.defaults)
    tensors = [x for x in state.values() if x is not None]
    fit = all(
        isinstance(x, Tensor) and x.shape in ((), p.shape) and (diverged or x.isfinite().all())
        for x in tensors
    )
    return state.keys() <= names and fit


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), in the form that SimCLR, MoCo v3 and SogCLR use.

    For weights of two dimensions or more g <- trust |w| / |g + wd w| (g + wd w); biases and the scales of norms take g as it
    is, without decay. Then v <- momentum v + g and w <- w - lr v.
    """

    def __init__(
        self,
        params,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        )

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
                gradients.update(
                    zip(
                        matrices,
                        _scaled(matrices, group["weight_decay"], group["trust"]),
                        strict=True,
                    )
                )
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [gradients[p] for p in params])
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
        return loss


def _scaled(params: list[Tensor], decay: float, trust: float) -> list[Tensor]:
    """Trust |w| / |g| g with g the gradient and its decay; g itself where a length is 0."""
    gradients = torch._foreach_add([p.grad for p in params], params, alpha=decay)
    length, slope = (torch.stack(torch._foreach_norm(x)) for x in (params, gradients))
    ratio = torch.where((length > 0) & (slope > 0), trust * length / slope, 1.0)
    torch._foreach_mul_(gradients, list(ratio.to(gradients[0].dtype).unbind()))
    return gradients


def _decayed_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group in two: what has two dimensions or more, and, without weight decay, biases and the scales of norms."""
    parts = []
    for group in groups:
        parts.append({**group, "params": [p for p in group["params"] if p.dim() > 1]})
        parts.append(
            {**group, "params": [p for p in group["params"] if p.dim() <= 1], "weight_decay": 0.0}
        )
    return [part for part in parts if part["params"]]


def scale(scaling: str, batch: int) -> float:
    """By what a learning rate is multiplied for a total batch: 1 (none), sqrt(batch), or batch / 256 (linear)."""
    return {"none": 1.0, "sqrt": math.sqrt(batch), "linear": batch / 256}[scaling]


def rate(schedule: Schedule, base: float, epoch: float, factor: float = 1.0) -> float:
    """The learning rate at an epoch, which may be part of the way through it; `factor` is `scale`'s, already in `base`.

    Linear warm-up over `schedule.lr_warmup_epochs`; then a half cosine down to `schedule.lr_final`, over the whole run (`schedule.cos`) or
    again and again over `schedule.sgdr_t0` epochs (`schedule.sgdr`; Loshchilov & Hutter, arXiv 1608.03983); or x .1 at each of
    `schedule.schedule`. With `schedule.lr_by` "step" and "epoch-end" the warm-up begins at 0 and the cosine at its end (as in SimCLR and
    MoCo v3); with "epoch" the first rate is not 0 and the cosine is the whole run's.
    """
    warmup, by_step = schedule.lr_warmup_epochs, schedule.lr_by != "epoch"
    if epoch < warmup:
        return base * (epoch / warmup if by_step else (epoch + 1) / (warmup + 1))
    if schedule.cos or schedule.sgdr:
        first = warmup if by_step else 0
        passed = (
            (epoch - first) % schedule.sgdr_t0 / schedule.sgdr_t0
            if schedule.sgdr
            else (epoch - first) / (schedule.epochs - first)
        )
        share = 0.5 * (1 + math.cos(math.pi * passed))
        final = schedule.lr_final * factor
        return final + (base - final) * share
    return base * 0.1 ** sum(epoch >= milestone for milestone in schedule.schedule)
