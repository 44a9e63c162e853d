"""Classifiers on pre-trained encoders: loading, training, testing, and the results file that every evaluation writes."""

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, encoder
from moco.data import datasets, loader
from moco.data.datasets import ImageFolder
from moco.engine import checkpoint, precision
from moco.engine.features import test_batches
from moco.engine.log import say, write_json
from moco.engine.train import Trainer
from moco.errors import InputError
from moco.rng import Progress


def check(args: Namespace) -> None:
    """Check, before any process starts, the data folder and that the checkpoint fits; take the arch from it if not given."""
    datasets.find(args.data, ("train", "val"))
    state = checkpoint.load(args.pretrained) if args.pretrained else {}
    args.arch = args.arch or state.get("arch") or "resnet50"
    args.encoder_method = state.get("method", "unknown") if args.pretrained else "random"
    if args.pretrained:
        net = encoder.resnet(args.arch, 1)
        encoder.load_backbone(net, checkpoint.tensors(state), args.pretrained)


def splits(args: Namespace) -> tuple[ImageFolder, ImageFolder]:
    """The train and val images; val's labels are places among train's classes."""
    root = datasets.find(args.data, ("train", "val"))
    train = datasets.scan(root, "train")
    return train, datasets.scan(root, "val", train.classes)


def pretrained(args: Namespace, classes: int, device: torch.device) -> nn.Module:
    """The encoder of `--pretrained` (randomly initialised without it) with a new classifier for `classes`, on `device`."""
    torch.manual_seed(args.seed)
    net = encoder.resnet(args.arch, classes)
    if args.pretrained:
        matched = encoder.load_backbone(net, checkpoint.tensors(checkpoint.load(args.pretrained)), args.pretrained)
        say(f"{args.pretrained}: {matched} of {len(encoder.backbone_keys(net))} backbone tensors matched")
    else:
        say(f"no --pretrained: a randomly initialised {args.arch}")
    return precision.place(net, device, args.compile)


def write_results(args: Namespace, protocol: str, metrics: dict[str, float]) -> None:
    """Write results.json to the run folder, on rank 0; metrics are fractions in [0, 1]."""
    if distributed.rank() != 0:
        return
    results = {
        "method": args.encoder_method,
        "arch": args.arch,
        "checkpoint": args.pretrained,
        "protocol": protocol,
        "dataset": args.data,
        "metrics": metrics,
    }
    write_json(Path(args.save_dir) / "results.json", results)


@torch.inference_mode()
def test(net: nn.Module, folder: ImageFolder, args: Namespace, device: torch.device, heads: int = 1) -> list[tuple[float, float]]:
    """Top-1 and top-5 accuracy on `folder`, in [0, 1], of each of `net`'s classifiers, of which there are `heads`.

    Each image counts once, whatever the number of ranks, and a rank may have none.
    """
    net.eval()
    counts = torch.zeros(3, heads, device=device)
    for images, label in test_batches(folder, args, device):
        with precision.autocast(args.amp, device):
            top1, top5 = correct(by_head(net(images)), label)
        counts += torch.stack([top1, top5, torch.full_like(top1, len(label))])
    top1, top5, n = distributed.all_reduce_sum(counts).double()
    return list(zip((top1 / n).tolist(), (top5 / n).tolist(), strict=True))


def correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels [B] are the first, and among the first five, of their logits [..., B, classes]; both [...]."""
    top = logits.topk(min(5, logits.shape[-1]), -1).indices == label[:, None]
    return top[..., 0].sum(-1).float(), top.any(-1).sum(-1).float()


class Heads(nn.ModuleList):
    """Several classifiers of the same features [B, D]: their logits [heads, B, classes]."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self])


class Setting(NamedTuple):
    """What tells one classifier's training from another's."""

    lr: float
    wd: float


def by_head(logits: Tensor) -> Tensor:
    """The logits of one classifier [B, classes] or of several [heads, B, classes], as the latter."""
    return logits.view(-1, *logits.shape[-2:])


class LinearProbe(Trainer):
    """Trains a new `fc` on the frozen, eval-mode backbone (MoCo, section 4.1), and tests it after every epoch.

    With several rates in `args.lr` or decays in `args.wd`, `fc` is one classifier for each pair, all from the same start, on
    the same features. What one of them becomes is, to the bit on a CPU, what it would be alone. The best one counts,
    on val/ as in the papers, or on `held_out`, a part of train/ that is not trained on.
    """

    def __init__(
        self,
        args: Namespace,
        net: nn.Module,
        train: ImageFolder,
        val: ImageFolder,
        device: torch.device,
        held_out: ImageFolder | None = None,
    ):
        net.requires_grad_(False)
        net.fc.requires_grad_(True)
        nn.init.normal_(net.fc.weight, std=0.01)
        nn.init.zeros_(net.fc.bias)
        self.settings = [Setting(lr, wd) for lr in args.lr for wd in args.wd]
        self.heads = [net.fc] + [copy.deepcopy(net.fc) for _ in self.settings[1:]]
        if len(self.heads) > 1:
            net.fc = Heads(self.heads)
        self.loaded = {name: net.state_dict()[name].clone() for name in encoder.backbone_keys(net)}
        self.val, self.held_out, self.best = val, held_out, 0.0
        super().__init__(args, net, train, device)
        # the classifiers compute in fp32: one that diverges must not make a gradient scaler skip the others' steps
        self.scaler = precision.scaler("off", device)
        if self._changed():
            source = args.pretrained or f"a random one with --seed {args.seed}"
            raise InputError(f"--resume {args.resume}: its backbone is not {source}; give the same --pretrained to go on")

    def trained(self) -> nn.Module:
        return self.module.fc

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(head.parameters()), "lr": lr, "weight_decay": wd}
            for head, (lr, wd) in zip(self.heads, self.settings, strict=True)
        ]

    def start_epoch(self) -> None:
        self.module.eval()

    def forward(self, views: list[Tensor], batch: loader.Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.inference_mode():
            features = encoder.features(self.module, views[0])
        with torch.autocast(self.device.type, enabled=False):
            logits = by_head(self.ddp(features.float().clone()))  # [heads, B, classes]
        losses = torch.stack([F.cross_entropy(one, batch.label) for one in logits])
        best = losses.nan_to_num(torch.inf).argmin()  # the one to show; a rate too high for the features may have diverged
        # take, unlike [best], does not wait for the device
        top1, top5 = (count.take(best) / len(batch.label) for count in correct(logits, batch.label))
        return losses.sum(), {"loss": losses.take(best), "acc1": top1, "acc5": top5}

    def test(self) -> None:
        """Choose a classifier and test it on val/: `accuracy` is its own, beside each one's top-1 where there are several."""
        on_val = self._test(self.val)
        judged = self._test(self.held_out) if self.held_out else on_val
        best = max(self.settings, key=judged.get)
        self.chosen_by = judged[best][0]
        self.accuracy = {"acc1": on_val[best][0], "acc5": on_val[best][1]}
        if self.held_out:
            self.accuracy["held_out_acc1"] = self.chosen_by
        if len(self.settings) > 1:
            self.accuracy |= {"best_lr": best.lr} | ({"best_wd": best.wd} if len(self.args.wd) > 1 else {})
            self.accuracy |= {f"acc1_{self.name(one)}": top1 for one, (top1, _) in on_val.items()}

    def _test(self, folder: ImageFolder) -> dict[Setting, tuple[float, float]]:
        return dict(zip(self.settings, test(self.module, folder, self.args, self.device, len(self.heads)), strict=True))

    def name(self, setting: Setting, space: str = "") -> str:
        """What a classifier is called: lr30, or lr30_wd0.0001 where several decays are tried; `lr 30` to read."""
        wd = f"{space or '_'}wd{space}{setting.wd:g}" if len(self.args.wd) > 1 else ""
        return f"lr{space}{setting.lr:g}{wd}"

    def end_epoch(self, done: int) -> dict[str, float]:
        self.test()
        self.best = max(self.best, self.chosen_by)
        self.save("checkpoint.pth.tar", done, best_acc1=self.best)
        if self.best == self.chosen_by:
            self.save("model_best.pth.tar", done, best_acc1=self.best)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def check_frozen(self) -> None:
        """Raise RuntimeError if a backbone tensor is not bit for bit what was loaded."""
        if changed := self._changed():
            raise RuntimeError(f"the frozen backbone changed in training: {', '.join(changed)}")
        say(f"frozen backbone is bit-identical to what was loaded: {len(self.loaded)} tensors")

    def _changed(self) -> list[str]:
        now = self.module.state_dict()
        return [name for name, tensor in self.loaded.items() if not torch.equal(tensor, now[name])]

    def _resume(self, state: checkpoint.State) -> int:
        self.best = state["best_acc1"]
        return super()._resume(state)
