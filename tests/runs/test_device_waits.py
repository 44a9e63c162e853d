"""Test that 50 steps of each method do not wait for the device, on a simulated accelerator."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from conftest import in_process
from device_helpers import META, STEPS, Accelerator, Log, generator
from run_helpers import typed
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from moco import devices, rng
from moco.data.loader import Batch
from moco.encoder import networks
from moco.engine import trainer
from moco.loss import bank
from moco.methods import METHODS

pytestmark = pytest.mark.slow

SMALL = typed("-a resnet18 --image-size 32 -b 8 -j 0 --epochs 200 --print-freq 1000")
ADCO = "--cluster 64 --no-ad-init"
SYNTHETIC = "--n-hard 6 --n1 2 --n2 2 --n3 2 --n4 2 --n5 2 --n6 2 --synthetic-first 0"
FNC = "--support-size 1 --memory-multiplier 4"
VARIANTS = {
    "mocov1, clipped": ("main_synco", "--moco-k 64 --clip-grad 1"),
    "mocov1, accumulation": ("main_synco", "--moco-k 64 --accumulation-steps 2"),
    "mocov1, symmetric": ("main_synco", "--moco-k 64 --symmetric --bn-splits-query --stem cifar"),
    "adco, asymmetric": ("main_adco", ADCO),
    "adco, filling its bank": ("main_adco", f"--cluster {8 * (STEPS + 5)}"),
    "adco, multi-crop": ("main_adco", f"{ADCO} --multi-crop"),
    "sogclr, clipped": ("main_sogclr", "--mlp-dim 32 --clip-grad 1"),
    "simclr, synthetic": ("main_sogclr", f"--mlp-dim 32 --loss simclr {SYNTHETIC}"),
    "mocov3, synthetic": ("main_mocov3", f"--moco-mlp-dim 32 {SYNTHETIC}"),
    "fnc, eliminate": ("main_fnc", f"{FNC} --fn-mode eliminate"),
    "fnc, off": ("main_fnc", f"{FNC} --fn-mode off"),
    "fnc, no memory": ("main_fnc", "--support-size 1 --memory-multiplier 0 --fn-topk 3"),
    "fnc, labels, no memory": (
        "main_fnc",
        "--support-size 1 --memory-multiplier 0 --fn-from labels --fn-mode eliminate",
    ),
    "moby, drop path": ("main_moby", "-a test_vit --queue 64 --mlp-dim 64 --online-drop-path 0.2"),
    "byol, ResNet": ("main_moby", "--mlp-dim 64 --method byol"),
}
RUNS = {name: (method.script, method.tiny) for name, method in METHODS.items()} | VARIANTS


@pytest.fixture
def accelerator(monkeypatch) -> Iterator[Accelerator]:
    """Simulate an accelerator on which scripts train for STEPS + 1 steps.

    All steps but the first count.
    """
    accelerator = Accelerator(monkeypatch)

    def steps(self: trainer.Trainer) -> None:
        self.steps_per_epoch = STEPS + 10
        batch, sizes = self.config.input.batch_per_process, [view.size for view in self.recipe]

        def batches() -> Iterator[Batch]:
            for _ in range((STEPS + 1) * self.config.optimizer.accumulation_steps):
                views = [
                    torch.randint(256, (batch, 3, size, size), dtype=torch.uint8) for size in sizes
                ]
                index, label = (
                    torch.randint(len(self.task.images), (batch,)),
                    torch.zeros(batch, dtype=torch.long),
                )
                *views, index, label = (
                    devices.to_device(x, self.device) for x in (*views, index, label)
                )
                yield Batch(views, index, label, [])

        stub = Log(accelerator)
        with contextlib.suppress(StopIteration):
            self._train_epoch(self.order.start // self.steps_per_epoch, batches(), stub, stub)
        accelerator.counts = False
        accelerator.losses = [loss.item() for _, loss, _ in self.health._recent]

    monkeypatch.setattr(devices, "for_process", lambda *_: META)
    monkeypatch.setattr(rng, "generator", generator)
    monkeypatch.setattr(trainer.Trainer, "train", steps)
    autocast = torch.autocast  # it does not support META; here it is off
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *amp, **more: autocast(kind.replace("meta", "cpu"), *amp, **more),
    )

    def small(arch: str, weights: None, num_classes: int, **more: bool) -> ResNet:
        net = ResNet(BasicBlock, [1, 1, 1, 1], **more)
        net.layer2, net.layer3, net.layer4 = nn.Conv2d(64, 512, 1), nn.Identity(), nn.Identity()
        net.fc = nn.Linear(512, num_classes)
        return net

    monkeypatch.setattr(networks.models, "get_model", small)
    with accelerator:
        yield accelerator


@pytest.mark.parametrize("method", RUNS)
def test_50_steps_without_a_log_line_do_not_wait_for_the_device(
    method, accelerator, shared_images, tmp_path
):
    script, options = RUNS[method]
    words = (shared_images, *SMALL, *options.split(), "--save-dir", tmp_path / "run")
    status, _, err = in_process(script, *words)
    assert status == 0, err
    assert accelerator.waits == []
    assert accelerator.wide == set() or "fnc" in method, (
        "mps has no float64: see devices.widest_float"
    )
    passes = STEPS + 1 if "accumulation" not in method else 2 * STEPS + 2
    assert len(accelerator.losses) == passes and all(map(math.isfinite, accelerator.losses))


# Each function gets the numbers 0 to 3. `.tolist()` and `.numpy()` raise, and need no case here.
WAITS = {
    "item": lambda x: x[1].item(),
    "float": lambda x: float(x[1]),
    "if": lambda x: bool(x[1] > 0),
    "cpu": lambda x: x.cpu(),
    "copy": lambda x: torch.zeros(4, dtype=torch.long).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked write": lambda x: x.__setitem__(x > 1, x[:2].clone()),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "slice": lambda x: x[: x[2]],
    "repeat": lambda x: x.repeat_interleave(x),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "to": lambda x: torch.ones(2).to(x.device),
    "index from the host": lambda x: x[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("wait", WAITS)
def test_waits_are_counted_on_the_device_and_not_on_the_cpu(wait, monkeypatch):
    host = torch.arange(4)
    with Accelerator(monkeypatch) as accelerator:
        device = host.to(META)
        accelerator.counts = True
        WAITS[wait](host)
        assert accelerator.waits == []
        WAITS[wait](device)
        assert len(accelerator.waits) == 1


def test_operations_without_a_wait_are_not_counted(monkeypatch):
    with Accelerator(monkeypatch) as accelerator:
        accelerator.counts = True
        x = torch.arange(4).to(META, non_blocking=True)
        y = torch.zeros(4, device=META, requires_grad=True)
        (y[x] * 2).masked_fill(x > 2, 0.0).sum().backward()
        x[:2].add_(1)
        assert x.device == y.grad.device == META and accelerator.waits == []
        accelerator.counts = False
        assert y.grad.cpu().tolist() == [2, 2, 2, 0] and x.cpu().tolist() == [1, 2, 2, 3]


def test_item_in_a_loss_is_found(accelerator, shared_images, tmp_path, monkeypatch):
    """`.item()` is added to a loss: each step is recorded, with the line."""
    own = bank.bank_log_sum

    def waits(*args):
        found = own(*args)
        return found._replace(log_sum=found.log_sum * (1 if found.log_sum.sum().item() else 0))

    monkeypatch.setattr("moco.builder.moco.bank_log_sum", waits)
    in_process("main_synco", shared_images, *SMALL, "--moco-k", 64, "--save-dir", tmp_path / "run")
    assert len(accelerator.waits) == STEPS and "_local_scalar_dense" in accelerator.waits[0]
