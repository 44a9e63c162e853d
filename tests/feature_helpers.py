"""Extraction of features on the CPU: its options, its memory, and ranks that are threads."""

import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main_knn
from moco import distributed
from moco.config import MEAN, STD, replaced

CPU = torch.device("cpu")
META = {  # a valid meta.json of features
    "arch": "resnet18",
    "method": "moco",
    "checkpoint": None,
    "pretrain_epochs": 1,
    "dataset": "imagenet",
    "data": "d",
    "class_list": None,
    "image_size": 32,
    "amp": "off",
    "seed": 0,
    "classes": ["a", "b"],
}


def options(**more):
    shared = {"workers": 0, "amp": "off", "mean": MEAN, "std": STD}
    sizes = {"batch_per_process": 8, "batch_size": 8, "image_size": 16}
    return replaced(main_knn.Config(), **sizes, **shared, **more)


class Sizes(TorchDispatchMode):
    """Record how many numbers each new piece of memory has room for."""

    def __init__(self):
        super().__init__()
        self.memory = {}
        self.alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.memory[x.untyped_storage().data_ptr()] = (
                    x.untyped_storage().nbytes() // x.element_size()
                )
                self.alive.append(x)  # its address stays its own
        return out


def on_ranks(world_size, function, monkeypatch):
    """Call `function(rank)` on several ranks, which are threads, and return the results."""
    local, barrier, sent = (
        threading.local(),
        threading.Barrier(world_size, timeout=60),
        [None] * world_size,
    )

    def all_gather(x):
        sent[local.rank] = x.clone()
        barrier.wait()
        assert len({(part.shape, part.dtype) for part in sent}) == 1
        out = torch.cat(sent)
        barrier.wait()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: local.rank)
        patch.setattr(distributed, "world_size", lambda: world_size)
        patch.setattr(distributed, "all_gather", all_gather)
        patch.setattr(distributed, "all_reduce_sum", lambda x: all_gather(x[None]).sum(0))
        patch.setattr(distributed, "barrier", barrier.wait)
        results = [None] * world_size

        def run(rank):
            local.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not any(isinstance(result, Exception) for result in results), results
    return results
