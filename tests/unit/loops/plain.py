"""Parts of a plain training loop: a network on several simulated processes, and optimizers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models
from torchvision.models.resnet import BasicBlock

WIDTH = 32  # features of `TinyResNet`


class TinyResNet(models.ResNet):
    """A ResNet of torchvision with four blocks of 4 to 32 channels."""

    def __init__(self, out: int, zero_init_residual: bool = False):
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 4, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        self.layer1 = self._make_layer(BasicBlock, 4, 1)
        self.layer2 = self._make_layer(BasicBlock, 8, 1, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 16, 1)
        self.layer4 = self._make_layer(BasicBlock, WIDTH, 1)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTH, out)
        if zero_init_residual:
            for block in self.modules():
                if isinstance(block, BasicBlock):
                    nn.init.zeros_(block.bn2.weight)


class Network:
    """A network on W simulated processes, with shared weights and separate batch norm statistics.

    Args:
        net: the layers; its own weights are not used.
        state: the weights and statistics at the start.
        ranks: number of processes W.
        fixed: names of the weights that do not train; True: all.
    """

    def __init__(
        self,
        net: nn.Module,
        state: dict[str, Tensor],
        ranks: int,
        fixed: Sequence[str] | bool = (),
    ):
        net.load_state_dict(state)  # raises an error if a name is missing
        self.net = net.double().train()
        trained = {name for name, _ in net.named_parameters()}
        self.weights = {name: state[name].clone() for name in state if name in trained}
        self.statistics = [
            {name: state[name].clone() for name in state if name not in trained}
            for _ in range(ranks)
        ]
        self.trained = {}
        if fixed is not True:
            self.trained = {
                name: w.requires_grad_() for name, w in self.weights.items() if name not in fixed
            }

    def on(self, rank: int, images: Tensor) -> Tensor:
        """Return the output for the images of one process, with their own batch statistics."""
        return functional_call(self.net, {**self.weights, **self.statistics[rank]}, (images,))

    def in_groups(self, images: Tensor, groups: int) -> Tensor:
        """Return the output for images in groups that are normalized separately, in one process.

        The statistics are the mean of those of the groups.
        """
        before, outputs, after = self.statistics[0], [], []
        for part in images.tensor_split(groups):
            self.statistics[0] = {name: x.clone() for name, x in before.items()}
            outputs.append(self.on(0, part))
            after.append(self.statistics[0])
        self.statistics[0] = {
            name: torch.stack([one[name] for one in after]).mean(0)
            if x.is_floating_point()
            else x + 1
            for name, x in before.items()
        }
        return torch.cat(outputs)

    def jointly(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the output for the images of each process, normalized over all processes."""
        output = self.on(0, torch.cat(parts))
        self.share_statistics()
        return list(output.tensor_split(len(parts)))

    def share_statistics(self) -> None:
        """Copy the statistics of the first process to all others, as at the end of an epoch."""
        for rank in range(1, len(self.statistics)):
            self.statistics[rank] = {name: x.clone() for name, x in self.statistics[0].items()}

    def follow(self, other: "Network", momentum: float) -> None:
        """Move the weights towards those of another network."""
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(momentum * w + (1 - momentum) * other.weights[name])

    def state(self, rank: int, prefix: str) -> dict[str, Tensor]:
        """Return a copy of the weights and of a process's statistics, with a prefix."""
        tensors = {**self.weights, **self.statistics[rank]}
        return {f"{prefix}{name}": x.detach().clone() for name, x in tensors.items()}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradient of each trained weight."""
        return gradients(loss, self.trained)


@torch.no_grad()
def shuffled_keys(f_k: Network, images: Tensor, order: Tensor) -> Tensor:
    """Return the normalized keys of the joint batch, in its order.

    Each process encodes an equal part of the shuffled batch. One process encodes groups of 8.
    """
    processes = len(f_k.statistics)
    if processes == 1:
        keys = f_k.in_groups(images[order], len(images) // 8)
    else:
        parts = images[order].tensor_split(processes)
        keys = torch.cat([f_k.on(rank, part) for rank, part in enumerate(parts)])
    k = torch.empty_like(keys)
    k[order] = unit(keys)
    return k


def synthetic_negatives(
    q: Tensor,
    hard: Tensor,
    counts: Sequence[int],
    draws: dict[str, Tensor],
    delta: float,
    eta: float,
) -> Tensor:
    """Return the synthetic negatives of one query, one after the other.

    Args:
        q: normalized query.
        hard: its hardest entries of the queue, the hardest first.
        counts: number of negatives of each of the six types.
        draws: indices among `hard` of n and n', weights and noise, in the order of the types.
        delta: size of the perturbation.
        eta: size of the adversarial step.
    """
    n = [hard[i] for i in draws["first"]]
    second = iter(hard[i] for i in draws["second"])
    weight, noise = iter(draws["weight"]), iter(draws["noise"])
    kinds = [kind for kind, count in enumerate(counts, 1) for _ in range(count)]
    found = []
    for kind, entry in zip(kinds, n, strict=True):
        if kind == 1:  # between the query and the entry, nearer to the entry
            a = next(weight)
            h = a * q + (1 - a) * entry
        elif kind == 2:  # beyond the entry, seen from the query
            b = next(weight)
            h = q + b * (entry - q)
        elif kind == 3:  # between two entries
            g = next(weight)
            h = g * entry + (1 - g) * next(second)
        elif kind == 4:  # with noise
            h = entry + next(noise)
        elif kind == 5:  # along the gradient of q.n with respect to n, which is q
            h = entry + delta * q
        else:  # along the sign of that gradient
            h = entry + eta * torch.sign(q)
        found.append(unit(h))
    return torch.stack(found)


def gradients(loss: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of `loss` by the name of each weight."""
    found = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip(weights, found, strict=True))


class SGD:
    """Momentum SGD: v <- momentum v + g + decay w, w <- w - lr v."""

    def __init__(self, momentum: float, decay: float, nesterov: bool = False):
        self.momentum, self.decay, self.nesterov = momentum, decay, nesterov
        self.velocity: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, weights: dict[str, Tensor], grads: dict[str, Tensor], lr: float) -> None:
        for name, w in weights.items():
            g = grads[name] + self.decay * w
            v = self.momentum * self.velocity.get(name, torch.zeros_like(w)) + g
            self.velocity[name] = v
            w.sub_(lr * (g + self.momentum * v if self.nesterov else v))


class LARS:
    """SGD with a learning rate for each layer: trust |w| / |g + decay w|.

    Vectors have neither that factor nor weight decay. With `inside`, the learning rate is inside
    the momentum: v <- momentum v + lr g, w <- w - v. Otherwise v <- momentum v + g, w <- w - lr v.
    """

    def __init__(self, momentum: float, decay: float, trust: float = 0.001, inside: bool = False):
        self.momentum, self.decay, self.trust, self.inside = momentum, decay, trust, inside
        self.velocity: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, weights: dict[str, Tensor], grads: dict[str, Tensor], lr: float) -> None:
        for name, w in weights.items():
            g = grads[name]
            if w.dim() > 1:
                g = g + self.decay * w
                if w.norm() > 0 and g.norm() > 0:
                    g = g * self.trust * w.norm() / g.norm()
            v = self.momentum * self.velocity.get(name, torch.zeros_like(w))
            v = v + (lr * g if self.inside else g)
            self.velocity[name] = v
            w.sub_(v if self.inside else lr * v)


class AdamW:
    """Adam with decoupled weight decay. Vectors have none, unless `decays_all`."""

    def __init__(
        self,
        decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decays_all: bool = False,
    ):
        self.decay, self.betas, self.eps, self.steps = decay, betas, eps, 0
        self.decays_all = decays_all
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, weights: dict[str, Tensor], grads: dict[str, Tensor], lr: float) -> None:
        self.steps += 1
        one, two = self.betas
        for name, w in weights.items():
            g, zero = grads[name], torch.zeros_like(w)
            if w.dim() > 1 or self.decays_all:
                w.mul_(1 - lr * self.decay)
            self.mean[name] = one * self.mean.get(name, zero) + (1 - one) * g
            self.square[name] = two * self.square.get(name, zero) + (1 - two) * g * g
            mean = self.mean[name] / (1 - one**self.steps)
            square = self.square[name] / (1 - two**self.steps)
            w.sub_(lr * mean / (square.sqrt() + self.eps))


def clipped(grads: dict[str, Tensor], most: float) -> dict[str, Tensor]:
    """Return gradients whose joint norm is at most `most`."""
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    factor = min(1.0, most / (norm + 1e-6))
    return {name: g * factor for name, g in grads.items()}


def unit(x: Tensor) -> Tensor:
    """Return `x`, with each row divided by its norm."""
    return x / x.square().sum(-1, keepdim=True).sqrt()


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
