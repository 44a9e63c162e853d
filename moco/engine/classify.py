"""Classifiers on pre-trained encoders: loading, training, testing, and the results file that every evaluation writes."""

from argparse import Namespace
from pathlib import Path

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
def test(net: nn.Module, folder: ImageFolder, args: Namespace, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 accuracy of `net` on `folder`, in [0, 1]; each image counts once, whatever the number of ranks."""
    net.eval()
    counts = torch.zeros(3, device=device)
    for images, label in test_batches(folder, args, device):
        with precision.autocast(args.amp, device):
            logits = net(images)
        counts += torch.stack([*correct(logits, label), torch.tensor(float(len(logits)), device=device)])
    top1, top5, n = distributed.all_reduce_sum(counts).tolist()
    return {"acc1": top1 / n, "acc5": top5 / n}


def correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels [B] are the first, and among the first five, of their logits [B, classes]."""
    top = logits.topk(min(5, logits.shape[1]), 1).indices == label[:, None]
    return top[:, 0].sum().float(), top.any(1).sum().float()


class LinearProbe(Trainer):
    """Trains a new `fc` on the frozen, eval-mode backbone (MoCo, section 4.1), and tests it after every epoch."""

    def __init__(self, args: Namespace, net: nn.Module, train: ImageFolder, val: ImageFolder, device: torch.device):
        net.requires_grad_(False)
        net.fc.requires_grad_(True)
        nn.init.normal_(net.fc.weight, std=0.01)
        nn.init.zeros_(net.fc.bias)
        self.loaded = {name: net.state_dict()[name].clone() for name in encoder.backbone_keys(net)}
        self.val, self.best = val, 0.0
        super().__init__(args, net, train, device)

    def start_epoch(self) -> None:
        self.module.eval()

    def forward(self, views: list[Tensor], batch: loader.Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.ddp(views[0]).float()
        top1, top5 = correct(logits, batch.label)
        return F.cross_entropy(logits, batch.label), {"acc1": top1 / len(logits), "acc5": top5 / len(logits)}

    def end_epoch(self, done: int) -> dict[str, float]:
        self.accuracy = test(self.module, self.val, self.args, self.device)
        self.best = max(self.best, self.accuracy["acc1"])
        self.save("checkpoint.pth.tar", done, best_acc1=self.best)
        if self.best == self.accuracy["acc1"]:
            self.save("model_best.pth.tar", done, best_acc1=self.best)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def check_frozen(self) -> None:
        """Raise RuntimeError if a backbone tensor is not bit for bit what was loaded."""
        now = self.module.state_dict()
        changed = [name for name, tensor in self.loaded.items() if not torch.equal(tensor, now[name])]
        if changed:
            raise RuntimeError(f"the frozen backbone changed in training: {', '.join(changed)}")
        say(f"frozen backbone is bit-identical to what was loaded: {len(self.loaded)} tensors")
