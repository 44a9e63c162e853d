"""A smaller last batch trains as any other: its gradient is the mean over all images of the step.

Each step is compared with the same step on the joint batch of all processes, written out.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_two_ranks
from torch import nn

from moco import distributed
from moco.config import Probing, replaced
from moco.data.images import ImageArray
from moco.engine.task import Task
from moco.engine.trainer import Trainer
from moco.launch.interrupt import Interrupted

CPU, LR, EPOCHS, BATCH, PASSES, N = torch.device("cpu"), 0.5, 2, 2, 2, 13


class Regression(Task):
    """Least squares on the mean colour of a view. Notes what each step has seen."""

    keep_last = 1

    def __init__(self, folder, n, batch, keep_last=1, **settings):
        pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
        images = ImageArray(Path("memory"), np.arange(n) % 3, ("a", "b", "c"), pixels)
        given = {"image_size": 8, "batch_size": batch, "batch_per_process": batch, "workers": 0}
        given |= {"recipe": "probe", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        given |= {"epochs": EPOCHS, "schedule": (), "momentum": 0.0, "print_freq": 1}
        given |= {"accumulation_steps": PASSES, "save_dir": str(folder), "cache_images": "off"}
        config = replaced(Probing(), **given | settings)
        super().__init__(config, nn.Linear(3, 1).double(), images, CPU)
        nn.init.zeros_(self.module.weight), nn.init.zeros_(self.module.bias)
        self.keep_last, self.steps, self.passes = keep_last, [], []

    def parameter_groups(self):
        return [{"params": list(self.module.parameters()), "lr": LR, "weight_decay": 0.0}]

    def loss(self, net, views, batch, progress):
        x, y = views[0].double().mean((2, 3)), batch.label.double()
        self.passes.append((x, y, batch.index))
        loss = (net(x)[:, 0] - y).square().mean()
        return loss, {"loss": loss.detach()}

    def after_step(self):
        x, y, index = (torch.cat(parts) for parts in zip(*self.passes, strict=True))
        weights = torch.cat([p.detach().flatten() for p in self.module.parameters()])
        self.steps.append({"x": x, "y": y, "index": index, "weights": weights})
        self.passes = []

    def save_mid_epoch(self, trainer, epoch, step):
        return trainer.save("checkpoint.pth.tar", epoch, step)


def train(rank, folder, n, batch, passes=PASSES, keep_last=1):
    """Return what each step of this rank has seen, and its weights; with the log's lines."""
    torch.manual_seed(0)
    task = Regression(folder, n, batch, keep_last, accumulation_steps=passes)
    Path(folder).mkdir(exist_ok=True)
    trainer = Trainer(task)
    trainer.train()
    distributed.barrier()
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {
        "steps": task.steps,
        "losses": [line["loss"] for line in log],
        "samples": trainer.order.images(trainer.order.stop) * distributed.world_size(),
    }


CASES = {  # images, images per pass and process, passes of a step, least images of the last pass
    "equal": (14, 2, 2, 1),
    "padded": (13, 2, 2, 1),
    "one image": (17, 2, 2, 1),
    "two at least": (17, 2, 2, 2),
    "no accumulation": (11, 4, 1, 1),
    "fewer than a step": (3, 4, 3, 1),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    checks = {name: (train, str(folder / name), *case) for name, case in CASES.items()}
    return on_two_ranks(checks, tmp_path_factory.mktemp("found"))


def check_steps(found, n):
    """Compare each step with one on the joint batch; `found` has the steps of each rank."""
    weights = torch.zeros(4, dtype=torch.float64)
    for step, parts in enumerate(zip(*(rank["steps"] for rank in found), strict=True)):
        x, y = (torch.cat([part[name] for part in parts]) for name in ("x", "y"))
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        inputs = torch.cat([x, ones], 1)
        error = inputs @ weights - y
        for rank in found:
            assert rank["losses"][step] == pytest.approx(error.square().mean().item(), rel=1e-12)
        weights = weights - LR * 2 * (inputs * error[:, None]).mean(0)
        for part in parts:
            torch.testing.assert_close(part["weights"], weights, rtol=0, atol=1e-12)
    seen = [part["index"] for rank in found for part in rank["steps"]]
    per_epoch = len(found[0]["steps"]) // EPOCHS
    for epoch in range(EPOCHS):
        of_epoch = torch.cat(
            [
                part["index"]
                for rank in found
                for part in rank["steps"][epoch * per_epoch : (epoch + 1) * per_epoch]
            ]
        )
        assert set(of_epoch.tolist()) == set(range(n))
    assert {rank["samples"] for rank in found} == {sum(map(len, seen))}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_their_joint_batches(name, ranks):
    check_steps(ranks(name), CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_one_process_takes_the_mean_over_the_images_of_each_step(name, tmp_path):
    check_steps([train(0, tmp_path / "run", *CASES[name])], CASES[name][0])


def test_a_run_stopped_inside_an_epoch_continues_with_its_last_batch(tmp_path, monkeypatch):
    """Stop after each step of the first epoch, the smaller last one included."""
    whole = Regression(tmp_path / "whole", N, BATCH)
    Trainer(whole).train()
    per_epoch = len(whole.steps) // EPOCHS
    assert [len(step["index"]) for step in whole.steps] == [4, 4, 4, 1] * EPOCHS
    for stop in range(1, per_epoch + 1):
        folder = tmp_path / str(stop)
        first = Regression(folder, N, BATCH)
        with monkeypatch.context() as patch:

            def ends(self, first=first, stop=stop):
                return "stop" * (len(first.steps) == stop)

            patch.setattr("moco.launch.interrupt.Requests.agreed", ends)
            with pytest.raises(Interrupted):
                Trainer(first).train()
        second = Regression(folder, N, BATCH, resume=str(folder / "checkpoint.pth.tar"))
        Trainer(second).train()
        steps = [*first.steps, *second.steps]
        assert len(steps) == len(whole.steps)
        for mine, expected in zip(steps, whole.steps, strict=True):
            assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_pretraining_leaves_the_last_images_out(tmp_path):
    task = Regression(tmp_path / "run", N, BATCH, keep_last=Task.keep_last)
    Trainer(task).train()
    assert [len(step["index"]) for step in task.steps] == [4, 4, 4] * EPOCHS
