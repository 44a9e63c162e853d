"""Helpers of the tests of `moco.data`."""

import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moco import distributed
from moco.augment.recipes import recipe
from moco.data import decoding, photos
from moco.data.loader import TrainBatchSampler, batches
from moco.data.registry import check
from moco.data.sources import find, scan
from moco.errors import InputError
from moco.sections import Input

CPU = torch.device("cpu")
RECIPE = recipe("mocov2", 32)


def set_rank(monkeypatch, rank, world_size):
    """Let the code run as if it were this rank of a distributed run."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


def some_photographs():
    """Return every sixth of the built-in training images: 190 images of 19 classes."""
    train = scan(find("photos", ("train", "val")), "train")
    return replace(train, paths=train.paths[::6], labels=train.labels[::6])


def read(folder, batch_sampler, crop, workers=0, batch=38):
    """Return all batches that the loader yields in one process."""
    args = Input(workers=workers, batch_per_process=batch, batch_size=batch)
    return list(batches(folder, crop, batch_sampler, args, CPU))


def train_batches(n, batch, accumulation, start, epochs, seed):
    """Return the batch sampler for the epochs from `start` up to `epochs`."""
    sampler = TrainBatchSampler(n, batch, accumulation, seed)
    per_epoch = sampler.steps_per_epoch
    sampler.start, sampler.stop = per_epoch * start, per_epoch * epochs
    return sampler


def smooth_rgb(height=40, width=56):
    """Return a picture that compresses well, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y], axis=2).clip(0, 255).astype(np.uint8)


def write_jpeg(path):
    """Write a JPEG of noise to `path` and return `path`."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    return path


def write_empty(path):
    path.write_bytes(b"")


def write_truncated(path):
    data = write_jpeg(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_text(path):
    path.write_text("This is not an image.\n" * 20)


BAD = pytest.mark.parametrize("write_bad", [write_empty, write_truncated, write_text])


def write_large_photograph(root):
    """Write one large JPEG to `root`/train/a and return the folder's images."""
    path = root / "train" / "a" / "0.jpg"
    path.parent.mkdir(parents=True)
    photos._photograph("hubble_deep_field").resize((1600, 1400), 3).save(path, quality=95)
    assert path.stat().st_size > decoding._LARGE
    return scan(path.parents[2], "train")


def refuse_network(monkeypatch):
    """Make every request to the network fail. Return the list to which it adds the URLs."""
    urls = []

    def refuse(request):
        urls.append(request.full_url)
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return urls


def check_error(name, root, download=False):
    """Return the message of the InputError that `check` raises, which is one line."""
    with pytest.raises(InputError) as caught:
        check(name, str(root), download)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    return str(caught.value)
