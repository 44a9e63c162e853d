"""Test the copies of batches to a device on a separate stream."""

import contextlib

import torch
from torch import Tensor

from moco import devices
from moco.data import loader
from moco.data.loader import Batch


# The copy of the next batch on a separate stream
class Stream:
    """A stand-in for a CUDA stream that records its waits in `done`."""

    def __init__(self, name: str, done: list[str]):
        self.name, self.done = name, done

    def wait_stream(self, other: "Stream") -> None:
        self.done.append(f"{self.name} waits for {other.name}")


def test_on_cuda_batches_are_copied_on_a_stream_that_training_waits_for(monkeypatch):
    done: list[str] = []
    copies, training = Stream("copies", done), Stream("training", done)

    @contextlib.contextmanager
    def on(stream):
        done.append(f"on {stream.name}")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(
        devices, "to_device", lambda x, device: done.append(f"copy {tuple(x.shape)}") or x.clone()
    )
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda x, stream: done.append(f"{tuple(x.shape)} used by {stream.name}"),
    )
    batch = Batch(
        [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 5)],
        torch.arange(2),
        torch.zeros(2),
        [(1, "bad")],
    )
    moved = loader._moved(batch, torch.device("cuda", 0), copies)
    shapes = ("(2, 3, 4, 4)", "(2, 3, 5, 5)", "(2,)", "(2,)")
    expected = [
        "on copies",
        *(f"copy {shape}" for shape in shapes),
        "end",
        "training waits for copies",
    ]
    assert done == [*expected, *(f"{shape} used by training" for shape in shapes)]
    for one, other in zip(
        (*batch.views, batch.index, batch.label),
        (*moved.views, moved.index, moved.label),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert moved.unreadable == batch.unreadable


def test_on_a_cpu_a_batch_is_not_copied():
    batch = Batch([torch.ones(2, 3, 4, 4)], torch.arange(2), torch.zeros(2), [])
    moved = loader._moved(batch, torch.device("cpu"), None)
    assert (
        moved.views[0] is batch.views[0]
        and moved.index is batch.index
        and moved.label is batch.label
    )


def test_copies_are_queued_on_cuda_only(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Tensor, "to", lambda x, device, non_blocking: asked.append((device.type, non_blocking))
    )
    for kind in ("cuda", "xpu", "mps"):
        devices.to_device(torch.ones(1), torch.device(kind, 0))
    assert asked == [("cuda", True), ("xpu", False), ("mps", False)]
