"""Test the extraction of features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_helpers import CPU, Sizes, on_ranks, options
from torch import nn

from moco.augment.color import normalize
from moco.augment.crop import center_view
from moco.data.images import ImageArray
from moco.engine import features


# Extraction
def pictures(n, labels=None, size=16):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    labels = np.arange(n) % 3 if labels is None else labels
    return ImageArray(Path("memory"), labels, ("a", "b", "c"), pixels)


class Flat(nn.Sequential):
    """A network whose features are the pixels, a little less in eval mode, and its classifier."""

    pretrained_cfg = {"classifier": "fc"}  # noqa: RUF012 (as networks of timm have it)

    def __init__(self):
        super().__init__()
        self.add_module("flat", nn.Flatten())
        self.add_module("mode", nn.Dropout(0.9))
        self.add_module("fc", nn.Linear(768, 3))


def expected(images, resize="scaled"):
    views = (center_view(images.read(i), 16, resize) for i in range(len(images)))
    return torch.stack([normalize(view[None]).flatten() for view in views])


@pytest.mark.parametrize("resize", ["scaled", "margin", "stretched"])
def test_features_are_those_of_resized_test_images(resize):
    square = pictures(9, size=20)
    images = replace(square, pixels=square.pixels[..., :13])
    rows, _ = features.extract(Flat(), images, options(test_resize=resize), CPU, unit_norm=False)
    torch.testing.assert_close(rows, expected(images, resize), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_features_are_those_of_each_image_in_eval_mode(unit_norm, many):
    labels = np.random.default_rng(0).integers(-1, 2, (21, 3)) if many else None
    images, net = pictures(21, labels), Flat()
    rows, found = features.extract(net, images, options(), CPU, unit_norm)
    want = expected(images)
    torch.testing.assert_close(
        rows, want / want.norm(dim=1, keepdim=True) if unit_norm else want, rtol=0, atol=1e-6
    )
    assert torch.equal(found, torch.from_numpy(images.labels)) and found.dtype == torch.int64
    assert (
        net.training
        and not features.extract(net.eval(), images, options(host_features=True), CPU)[0].is_cuda
    )
    assert not net.training


def test_features_lie_in_memory_once():
    with Sizes() as sizes:
        rows, _ = features.extract(Flat(), pictures(48), options(), CPU)
    large = [at for at, n in sizes.memory.items() if n >= rows.numel()]
    assert (
        large == [rows.untyped_storage().data_ptr()]
        and rows.untyped_storage().nbytes() == 4 * rows.numel()
    )


@pytest.mark.parametrize("n", [15, 1])
def test_ranks_extract_what_one_process_does(n, monkeypatch):
    """The second rank has none of a single image, and still takes part in what follows."""
    images = pictures(n)

    def work(rank):
        bank = features.extract(Flat(), images, options(), CPU)
        return (*bank, features.knn(*bank, *bank, 3, [1], 0.07))

    whole = features.extract(Flat(), images, options(), CPU)
    for rank, (rows, labels, found) in enumerate(on_ranks(2, work, monkeypatch)):
        torch.testing.assert_close(rows, whole[0][rank::2], rtol=0, atol=1e-6)
        assert torch.equal(labels, whole[1][rank::2]) and found == {1: 1.0}
