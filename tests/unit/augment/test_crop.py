"""Random boxes and crops: distribution, position and pixels against torchvision's.

A batch that is cropped at once is compared with one cropped image by image.
"""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from moco.augment import crop
from moco.augment.crop import center_view, random_box, random_views, resized_crop
from moco.augment.recipes import View, recipe
from moco.rng import CROP, key, uniform

DRAWS = 10_000
RATIO = (3 / 4, 4 / 3)


def our_boxes(height, width, view, seed):
    return [random_box(height, width, view, key(CROP, seed, 0, i, 0)) for i in range(DRAWS)]


def torchvision_boxes(height, width, view, seed, n=DRAWS):
    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return [
            RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio))
            for _ in range(n)
        ]


def statistics(boxes):
    top, left, height, width = torch.tensor(boxes, dtype=torch.float64).unbind(1)
    return {
        "area": height * width,
        "aspect": width / height,
        "top": top,
        "left": left,
        "bottom": top + height,
        "right": left + width,
        "diagonal": top + left,
        "antidiagonal": top - left,
    }


def noise(height, width, seed=0):
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def max_difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.2, 1.0)), (100, 900, (0.08, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    view = View(scale=scale)
    ours = statistics(our_boxes(height, width, view, seed=1))
    theirs = statistics(torchvision_boxes(height, width, view, seed=2))
    p = {name: ks_2samp(ours[name].numpy(), theirs[name].numpy()).pvalue for name in ours}
    assert min(p.values()) > 1e-3, p


def test_an_elongated_image_sometimes_falls_back_and_sometimes_not():
    height, width = 100, 900
    fallback = torchvision_boxes(height, width, View(scale=(4, 4)), seed=0, n=1)[0]
    ours = our_boxes(height, width, View(scale=(0.08, 1.0)), seed=1)
    assert 0.02 < ours.count(fallback) / DRAWS < 0.98


def test_boxes_lie_inside_images_of_any_shape():
    draw = random.Random(0)
    shapes = [(1, 1), (1, 500), (500, 1), (2, 3)] + [
        (draw.randint(1, 600), draw.randint(1, 600)) for _ in range(200)
    ]
    for number, (height, width) in enumerate(shapes):
        for i in range(20):
            view = View(scale=draw.choice([(0.08, 1.0), (0.2, 1.0), (0.001, 0.01), (1.0, 1.0)]))
            top, left, h, w = random_box(height, width, view, key(number, i))
            assert h >= 1 and w >= 1
            assert 0 <= top <= height - h and 0 <= left <= width - w


@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.0), (0.5, 3.0)])
def test_the_fallback_is_torchvisions(ratio):
    draw = random.Random(1)
    view = View(scale=(4, 4), ratio=ratio)  # an area that never fits
    shapes = [(1, 1), (1, 99), (99, 1), (100, 900), (900, 100), (375, 500)]
    for height, width in shapes + [
        (draw.randint(1, 700), draw.randint(1, 700)) for _ in range(100)
    ]:
        assert (
            random_box(height, width, view, key(height, width))
            == torchvision_boxes(height, width, view, 0, n=1)[0]
        )


def test_a_box_depends_on_every_counter_of_its_key():
    def boxes(*counters):
        return [random_box(375, 500, View(), key(*counters, index)) for index in range(20)]

    assert boxes(CROP, 0, 0) == boxes(CROP, 0, 0)
    assert boxes(CROP, 0, 0) != boxes(CROP, 1, 0)
    assert boxes(CROP, 0, 0) != boxes(CROP, 0, 1)
    assert len(set(boxes(CROP, 0, 0))) == 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 64, 160])
def test_resized_crop_has_torchvisions_pixels(size, interpolation):
    mode = InterpolationMode(interpolation)
    for i in range(20):
        image = noise(120 + 7 * i, 300 - 11 * i, i)
        image = image if i % 2 else F.gaussian_blur(image, [9, 9], [2.0, 2.0])
        top, left, h, w = box = random_box(*image.shape[1:], View(scale=(0.01, 1.0)), key(size, i))
        theirs = F.resized_crop(image, top, left, h, w, [size, size], mode, antialias=True)
        assert max_difference(resized_crop(image, box, size, interpolation), theirs) <= 1


def test_a_crop_of_its_own_size_keeps_every_pixel():
    image = noise(50, 60)
    assert torch.equal(resized_crop(image, (3, 5, 32, 32), 32), image[:, 3:35, 5:37])


def test_random_views_are_one_crop_for_each_view_of_the_recipe():
    image = noise(90, 120)
    recipe = (View(size=32), View(size=32), View(48, (0.1, 0.3), interpolation="bicubic"))
    views = random_views(image, recipe, CROP, 0, 3, 14)
    assert [tuple(view.shape) for view in views] == [(3, 32, 32), (3, 32, 32), (3, 48, 48)]
    assert not torch.equal(views[0], views[1])
    for i, (ours, view) in enumerate(zip(views, recipe, strict=True)):
        box = random_box(90, 120, view, key(CROP, 0, 3, 14, i))
        assert torch.equal(ours, resized_crop(image, box, view.size, view.interpolation))
        assert ours[None].is_contiguous(memory_format=torch.channels_last)


SHAPES = {
    "landscape": [(375, 500), (320, 427), (256, 259), (37, 39)],
    "portrait": [(500, 375), (500, 333), (427, 320)],
    "tiny": [(1, 1), (5, 7), (3, 40)],
    "square": [(224, 224), (256, 256), (600, 600), (96, 96)],
}


# by resize and size, what torchvision's Resize gets
RESIZES = {
    ("scaled", 32): [37],
    ("scaled", 224): [256],
    ("margin", 32): [64],
    ("margin", 224): [256],
    ("margin", 96): [128],
    ("stretched", 32): [37, 37],
    ("stretched", 224): [256, 256],
}


@pytest.mark.parametrize(("resize", "size"), RESIZES)
@pytest.mark.parametrize(
    ("height", "width"), [shape for shapes in SHAPES.values() for shape in shapes]
)
def test_center_view_has_torchvisions_pixels(height, width, resize, size):
    image = (
        F.gaussian_blur(noise(height, width), [3, 3], [1.0, 1.0])
        if min(height, width) > 1
        else noise(height, width)
    )
    ours = center_view(image, size, resize)
    assert ours.shape == (3, size, size) and ours.is_contiguous()
    if (height, width) == (size, size) and size <= 96:
        assert torch.equal(ours, image)
        return
    theirs = F.center_crop(F.resize(image, RESIZES[resize, size], antialias=True), [size, size])
    assert max_difference(ours, theirs) <= 1
    if resize == "scaled":
        assert torch.equal(ours, center_view(image, size))


# A batch cropped at once


def test_keys_and_uniform_numbers_of_arrays_equal_those_of_each_element():
    indices = np.array([0, 1, 7, 2**31, 2**40, 2**63 - 1])
    epochs = np.array([-3, -1, 0, 1, 5, 199])
    for seed in (0, 2**63, 2**64 - 1):
        keys = key(CROP, seed, epochs, indices, 1)
        alone = [key(CROP, seed, int(e), int(i), 1) for e, i in zip(epochs, indices, strict=True)]
        assert keys.dtype == np.uint64 and keys.tolist() == alone
        for i in (0, 3, 40):
            assert uniform(keys, i).tolist() == [uniform(one, i) for one in alone]
    assert key(CROP, -1, indices, 3).tolist() == [key(CROP, -1, int(i), 3) for i in indices]


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0), (4, 4)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (1, 1), (20, 90), (200, 30)])
def test_boxes_at_once_equal_those_drawn_one_by_one(height, width, scale):
    view = View(scale=scale)
    keys = key(CROP, 0, np.arange(3000), 1)
    boxes = crop.random_boxes_at_once(height, width, view, keys)
    assert boxes.tolist() == [list(random_box(height, width, view, one)) for one in keys.tolist()]


def test_a_box_whose_side_is_nearly_halfway_between_pixels_is_drawn_by_random_box(monkeypatch):
    """NumPy's power may differ from Python's in the last bit, which changes the rounded side."""
    keys, asked = key(CROP, 0, np.arange(64), 0), []
    view = View(scale=(0.25, 0.25), ratio=(1.0, 1.0))
    # all sides are about 16.5 pixels, and round to 16 or 17
    expected = [list(random_box(33, 33, view, one)) for one in keys.tolist()]
    one_by_one = crop.random_box
    monkeypatch.setattr(
        crop, "random_box", lambda *args: asked.append(args[-1]) or one_by_one(*args)
    )
    assert crop.random_boxes_at_once(33, 33, view, keys).tolist() == expected
    assert sorted(asked) == sorted(keys.tolist())


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, 32),
        (32, 32, 24),
        (32, 32, 96),
        (48, 64, 32),
        (64, 48, 16),
        (64, 64, 64),
        (7, 50, 17),
        (1, 1, 8),
        (3, 64, 16),
    ],
)
def test_crops_at_once_equal_those_computed_one_by_one(height, width, size):
    """Allow one grey level of difference: PyTorch's code depends on the processor."""
    n = 150  # more than two chunks
    images = torch.stack([noise(height, width, seed) for seed in range(n)])
    images[::2] = (
        F.gaussian_blur(images[::2], [5, 5], [1.5, 1.5]) if min(height, width) > 3 else images[::2]
    )
    boxes = crop.random_boxes_at_once(
        height, width, View(scale=(0.01, 1.0)), key(size, np.arange(n))
    )
    boxes[:2] = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    ours = torch.empty(n, 3, size, size, dtype=torch.uint8)
    crop.resized_crops(images, boxes, ours)
    alone = torch.stack(
        [
            resized_crop(image, tuple(box), size)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert max_difference(ours, alone) <= 1
    assert (ours != alone).float().mean() < 0.01


def test_random_views_at_once_equal_those_computed_one_by_one():
    images = torch.stack([noise(32, 40, seed) for seed in range(70)])
    views = (View(size=32), View(size=16, scale=(0.1, 0.3)))
    epochs, indices = np.full(70, 3), np.arange(70) * 11
    assert crop.can_crop_at_once(32, 40, views)
    ours = [torch.empty(70, 3, view.size, view.size, dtype=torch.uint8) for view in views]
    crop.random_views_at_once(images, views, CROP, 5, epochs, indices, out=ours)
    for i in range(70):
        alone = random_views(images[i], views, CROP, 5, 3, 11 * i)
        assert all(max_difference(a[i], b) <= 1 for a, b in zip(ours, alone, strict=True))


def test_large_images_much_smaller_views_and_bicubic_crops_are_cropped_one_by_one():
    assert crop.can_crop_at_once(64, 64, recipe("mocov2", 32)) and crop.can_crop_at_once(
        32, 32, recipe("byol", 32)
    )
    assert not crop.can_crop_at_once(32, 65, recipe("mocov2", 32))
    assert not crop.can_crop_at_once(64, 64, (View(size=32), View(size=15)))
    assert not crop.can_crop_at_once(32, 32, recipe("fnc", 32))


@pytest.mark.parametrize("resize", ["scaled", "margin", "stretched"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 37), (40, 33), (5, 100)])
def test_center_views_of_a_batch_equal_those_computed_one_by_one(height, width, resize):
    images = torch.stack([noise(height, width, seed) for seed in range(9)])
    ours = center_view(images, 32, resize, out=torch.empty(len(images), 3, 32, 32).byte())
    assert ours.is_contiguous() and torch.equal(
        ours, torch.stack([center_view(image, 32, resize) for image in images])
    )
