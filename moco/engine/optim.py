"""Create optimizers and restore their state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco.errors import InputError
from moco.sections import Schedule


def make(groups: list[dict[str, Any]], schedule: Schedule, amp: str) -> torch.optim.Optimizer:
    """Return the optimizer of `--optimizer`.

    SGD, Adam and AdamW are fused on CUDA and on the CPU; on other devices PyTorch chooses. SGD is
    not fused under fp16: if the gradient scaler skips the first step, PyTorch's fused SGD leaves
    the momentum buffer uninitialised and uses it in the next step.

    Args:
        groups: parameter groups, each with `params`, `lr` and `weight_decay`. A group with
            `"adapt": False` holds a new classifier; lars_tf trains it without layer-wise rates.
            In a group with `"decay_all": True`, adamw decays vectors, too.
        schedule: the settings of the optimizer and its schedule.
        amp: the value of `--amp`.

    Raises InputError if `--momentum` is out of range.
    """
    if not 0 <= schedule.momentum < 1 or (schedule.nesterov and not schedule.momentum):
        least = "above 0 with --nesterov" if schedule.nesterov else "at least 0"
        raise InputError(f"--momentum {schedule.momentum:g}: must be {least}, and below 1")
    if schedule.optimizer == "adamw":
        groups = _split_decay(groups)
    groups = [{k: v for k, v in group.items() if k != "decay_all"} for group in groups]
    if schedule.optimizer == "lars_tf":
        return TFLARS(groups, momentum=schedule.momentum)
    groups = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    if schedule.optimizer == "lars":
        return LARS(groups, momentum=schedule.momentum)
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, fused=_fused(groups))
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=_fused(groups))
    fused = _fused(groups) if amp != "fp16" else None
    return torch.optim.SGD(
        groups, momentum=schedule.momentum, nesterov=schedule.nesterov, fused=fused
    )


def _fused(groups: list[dict[str, Any]]) -> bool | None:
    """Return the argument `fused` of torch's optimizers: True on the CPU and CUDA, else None.

    PyTorch 2.6 has fused optimizers for these devices. With None, torch runs one kernel for many
    parameters (foreach) if the device supports that. With False, it would run one kernel per
    parameter.
    """
    device_types = {p.device.type for group in groups for p in group["params"]}
    return True if device_types <= {"cpu", "cuda"} else None


def restore(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str, diverged: bool = False
) -> None:
    """Load the state of an optimizer from a checkpoint, but keep this run's lr and other settings.

    Args:
        optimizer: the optimizer of this run.
        saved: the `state_dict` of the optimizer in the checkpoint.
        path: the file of the checkpoint, for messages.
        diverged: whether to accept NaN and infinite values.

    Raises InputError if the state is that of another optimizer, or damaged.
    """
    mine = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        same = all(
            _matches(group, own) for group, own in zip(saved["param_groups"], mine, strict=True)
        )
        optimizer.load_state_dict(saved)
        for group, own in zip(optimizer.param_groups, mine, strict=True):
            group.update(own)  # --allow-change lets settings differ
        same &= all(
            _is_valid(p, state, optimizer, diverged) for p, state in optimizer.state.items()
        )
    except Exception:  # an untrusted file can cause any error
        same = False
    if not same:
        raise InputError(
            f"{path}: its optimizer is not this run's; resume with the options it was made with, "
            "or use --pretrained for the weights alone"
        )
    _place_counts(optimizer)
    for p, state in optimizer.state.items():
        for name, x in state.items():
            # fused steps need the memory layout of the parameter, and do not check it
            if x is not None and x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(x)


def _place_counts(optimizer: torch.optim.Optimizer) -> None:
    """Move the step counts of Adam and AdamW to the device that this run's optimizer needs.

    Fused steps need each count on the device of its parameter. Otherwise Python reads the counts;
    on the CPU, reading does not wait for the device. The counts in a checkpoint may be on another
    device, the one that its run used.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "step" in optimizer.state.get(p, {}):
                count = optimizer.state[p]["step"]
                optimizer.state[p]["step"] = count.to(p.device if group["fused"] else "cpu")


# names of a parameter's state, by a setting that only the optimizers with this state have
_STATE = {"momentum": {"momentum_buffer"}, "betas": {"step", "exp_avg", "exp_avg_sq"}}
# settings that tell apart optimizers whose states have the same shapes
_DISTINCTIVE = ("dampening", "betas", "eps", "trust", "adapt", "amsgrad")


def _matches(saved: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Return whether two groups are of the same optimizer. Other settings may differ."""
    same = all(saved.get(name) == mine.get(name) for name in _DISTINCTIVE)
    same = same and ("momentum" in saved) == ("momentum" in mine)
    return same and all(
        isinstance(saved[name], int | float | None)
        for name in mine.keys() & saved.keys() - {"params", "betas"}
    )


def _is_valid(
    p: Tensor, state: dict[str, Any], optimizer: torch.optim.Optimizer, diverged: bool
) -> bool:
    """Return whether the state of a parameter has the names, shapes and finite values it needs.

    Each value is a scalar or has the shape of the parameter. With `diverged`, NaN and infinity are
    valid.
    """
    names = next(names for setting, names in _STATE.items() if setting in optimizer.defaults)
    tensors = [x for x in state.values() if x is not None]
    fit = all(
        isinstance(x, Tensor) and x.shape in ((), p.shape) and (diverged or x.isfinite().all())
        for x in tensors
    )
    return state.keys() <= names and fit


class LARS(torch.optim.Optimizer):
    """The LARS optimizer: layer-wise adaptive rate scaling (You et al., arXiv 1708.03888).

    This is the variant of MoCo v3 and of SogCLR's PyTorch code. A parameter w with gradient g is
    updated by v <- momentum v + u and w <- w - lr v. If w has two dimensions or more,
    u = trust |w| / |g + wd w| (g + wd w). Otherwise, for biases and the scales of norm layers,
    u = g, without weight decay.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        weight_decay: wd.
        momentum: momentum, in [0, 1).
        trust: trust coefficient.
        more: further default settings of parameter groups, which `TFLARS` needs.
    """

    lr_in_momentum = False

    def __init__(
        self,
        params,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        **more: bool,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults | more)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update the parameters. `closure` and the returned loss are as in torch.optim."""
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
            if matrices and group.get("adapt", True):
                scaled = _scaled(matrices, group["weight_decay"], group["trust"])
                gradients.update(zip(matrices, scaled, strict=True))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            inside, outside = (group["lr"], 1) if self.lr_in_momentum else (1, group["lr"])
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [gradients[p] for p in params], alpha=inside)
            torch._foreach_add_(params, momenta, alpha=-outside)
        return loss


class TFLARS(LARS):
    """LARS as in the TensorFlow code of SimCLR, FNC and SogCLR.

    The learning rate is inside the momentum: v <- momentum v + lr u and w <- w - v, with the u of
    `LARS`. A parameter group with `"adapt": False` has u = g, without weight decay. It is for a
    classifier: if its weights start at 0, |w| in u would keep them too small to learn anything.
    """

    lr_in_momentum = True

    def __init__(self, params, **settings: float):
        super().__init__(params, adapt=True, **settings)


def _scaled(params: list[Tensor], decay: float, trust: float) -> list[Tensor]:
    """Return trust |w| / |g| g for each parameter w, with g its gradient plus weight decay.

    If a norm is 0, return g.
    """
    gradients = torch._foreach_add([p.grad for p in params], params, alpha=decay)
    w_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (params, gradients))
    ratio = torch.where((w_norm > 0) & (g_norm > 0), trust * w_norm / g_norm, 1.0)
    torch._foreach_mul_(gradients, list(ratio.to(gradients[0].dtype).unbind()))
    return gradients


def _split_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each group as two: weights, and parameters of one dimension without weight decay.

    The latter are biases and the scales of norm layers. A group with `"decay_all"` is not split.
    """
    split = []
    for group in groups:
        if group.get("decay_all"):
            split.append(group)
            continue
        weights = [p for p in group["params"] if p.dim() > 1]
        others = [p for p in group["params"] if p.dim() <= 1]
        split.append({**group, "params": weights})
        split.append({**group, "params": others, "weight_decay": 0.0})
    return [group for group in split if group["params"]]
