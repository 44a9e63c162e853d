"""Record a run of a script in float64: its weights, views, random draws and loss at each step.

The tests of this folder replay the run with a plain loop of their own, and compare.
"""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import on_two_ranks, write_images
from plain import TinyResNet, unit
from run_helpers import typed
from torch import Tensor, nn
from torchvision import models

from moco import distributed
from moco.config import replaced
from moco.engine.task import Task
from moco.engine.trainer import Trainer
from moco.loss import synthetic

IMAGES, CLASSES, BATCH, EPOCHS, STEPS = 32, 4, 16, 4, 8  # two steps an epoch
COMMON = typed(f"-a resnet18 --image-size 16 -j 0 --device cpu --epochs {EPOCHS} --print-freq 1")


class Recorder:
    """The record of one process: a dict for each step, and the weights at the end."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.task: Task | None = None
        self.module: nn.Module | None = None

    def add(self, name: str, value: object) -> None:
        """Append a value to a list of the current step, such as its permutations."""
        self.steps[-1].setdefault(name, []).append(value)

    def follow(self, task) -> None:
        """Convert the trained module to float64, and record each step of the task."""
        self.task, self.module = task, task.module
        task.trained_module.double()
        for name, buffer in task.module.named_buffers():
            if name.startswith(("queue", "memory")) and buffer.dim() == 2:
                buffer.copy_(unit(buffer))  # to float64; they were normalized in float32
        task.trained_module.register_forward_pre_hook(self.convert)
        task.loss = self.recording(task.loss)

    def convert(self, module: nn.Module, inputs: tuple) -> tuple:
        """Convert the images, or the features of a linear probe, to float64."""
        images, *others = inputs
        if isinstance(images, Tensor):
            images = images.double()
        else:
            images = [view.double() for view in images]
        if torch.is_grad_enabled():  # not in a test
            self.steps[-1]["inputs"] = images
        return images, *others

    def recording(self, loss: Callable) -> Callable:
        """Return `loss` of a task, which also records its arguments and its result."""

        def recorded(net, views, batch, progress):
            step = {
                "epoch": progress.epoch,
                "state": self.state(),
                "views": views,
                "index": batch.index,
                "label": batch.label,
                "random": torch.get_rng_state(),
            }
            self.steps.append(step)
            result = loss(net, views, batch, progress)
            step["loss"] = result[0].detach().clone()
            return result

        return recorded

    def state(self) -> dict[str, Tensor]:
        self.task.gather_state()  # every rank records each step
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    def shuffle(self, images: Tensor, permutation: Tensor, shuffle=distributed.shuffle) -> Tensor:
        self.add("permutations", permutation)
        return shuffle(images, permutation)

    def draw(self, *args, draw=synthetic.draw) -> synthetic.Draws:
        draws = draw(*args)
        self.add("draws", {name: tensor.clone() for name, tensor in vars(draws).items()})
        return draws


def tiny(arch: str, weights: None, num_classes: int, **more: bool) -> nn.Module:
    """Return a small ResNet instead of torchvision's `arch`."""
    return TinyResNet(num_classes, **more)


def record(rank: int, script: str, words: Iterable[object], data: str, folder: str) -> dict:
    """Train by a script's command line. Return the record of this process.

    Args:
        rank: rank of this process, used by the caller.
        script: name of the script.
        words: options in addition to `COMMON`.
        data: folder of images.
        folder: run folder.
    """
    found, module = Recorder(), importlib.import_module(script)
    start = Trainer.__init__

    def followed(self, task):
        found.follow(task)
        start(self, task)

    with (
        mock.patch.object(models, "get_model", tiny),
        mock.patch.object(Trainer, "__init__", followed),
        mock.patch.object(distributed, "shuffle", found.shuffle),
        mock.patch.object(synthetic, "draw", found.draw),
    ):
        mine = BATCH // distributed.world_size()
        size = mine if module.Config().input.batch_is_per_process else BATCH
        words = map(str, (data, *COMMON, "-b", size, "--save-dir", folder, *words))
        config = module.complete(module.parser().parse(list(words)))
        config = replaced(config, batch_per_process=mine)
        module.worker(config, torch.device("cpu"))
    return {"steps": found.steps, "final": found.state()}


def recordings(variants: dict[str, tuple], folder: Path) -> Callable[[str, int], list[dict]]:
    """Return a function from a variant and a number of processes to the records of its ranks.

    Args:
        variants: the script and the options of each variant, by name.
        folder: a folder for images and runs.
    """
    data = write_images(folder / "images", classes=CLASSES, train=IMAGES // CLASSES, val=2, size=24)
    done: dict[int, Callable[[str], list[dict]]] = {}

    def of(variant: str, processes: int) -> list[dict]:
        runs = folder / f"runs{processes}"
        checks = {
            name: (record, script, words, str(data), str(runs / name))
            for name, (script, *words) in variants.items()
        }
        if processes == 1:
            function, *args = checks[variant]
            return [function(0, *args)]
        if processes not in done:
            done[processes] = on_two_ranks(checks, folder)
        return done[processes](variant)

    return of


def permutation(ranks: list[dict], step: int, number: int = 0) -> Tensor:
    """Return a permutation of the joint batch, which must be the same on all processes."""
    of_ranks = [one["steps"][step]["permutations"][number] for one in ranks]
    assert sorted(of_ranks[0].tolist()) == list(range(BATCH))
    assert all(torch.equal(one, of_ranks[0]) for one in of_ranks)
    return of_ranks[0]


def joint(ranks: list[dict], step: int) -> list[Tensor]:
    """Return the views of the joint batch of all processes."""
    return [torch.cat(parts) for parts in zip(*views_by_rank(ranks, step), strict=True)]


def views_by_rank(ranks: list[dict], step: int) -> list[list[Tensor]]:
    """Return the views of each process."""
    return [one["steps"][step]["inputs"] for one in ranks]


PROCESSES = [1, pytest.param(2, marks=pytest.mark.slow)]


def check(ranks: list[dict], replayed: list[dict]) -> None:
    """Fail unless the losses, weights and buffers of all steps and ranks are equal to 1e-10.

    Args:
        ranks: the record of each rank.
        replayed: for each step, the "losses" and the "states" before it, by rank. The last entry
            only has the states at the end.
    """
    for rank, one in enumerate(ranks):
        assert len(replayed) - 1 == len(one["steps"]) >= STEPS
        for step, mine in enumerate(replayed):
            last = step == len(one["steps"])
            state = one["final"] if last else one["steps"][step]["state"]
            assert state.keys() == mine["states"][rank].keys()
            for name, tensor in state.items():
                where = f"{name} before step {step} on rank {rank}"
                near(mine["states"][rank][name], tensor, where)
            if not last:
                near(mine["losses"][rank], one["steps"][step]["loss"], f"loss of step {step}")


def near(mine: Tensor, tensor: Tensor, where: str) -> None:
    torch.testing.assert_close(
        mine.detach(), tensor, rtol=1e-10, atol=1e-10, msg=lambda text: f"{where}: {text}"
    )
