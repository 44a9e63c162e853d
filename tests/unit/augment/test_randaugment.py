"""RandAugment against Pillow's operations on one image at a time, its strengths and its draws."""

import numpy as np
import pytest
import torch
from randaugment_helpers import OPERATIONS as NAMES
from randaugment_helpers import slow_operation, slow_randaugment
from scipy.stats import chisquare
from torchvision.transforms.v2.functional import gaussian_blur

from moco.augment import color, randaugment
from moco.augment.randaugment import Arguments
from moco.augment.recipes import View, recipe

WARPS = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
STRENGTHS = {  # of magnitude 7, as in the papers; those not named here have no strength
    "Rotate": 21,
    "Posterize": 2,
    "Solarize": 179,
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.36),
    **dict.fromkeys(("ShearX", "ShearY"), 0.21),
    **dict.fromkeys(("TranslateX", "TranslateY"), 70),
    "Cutout": 28,
    "SolarizeAdd": 77,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(height: int, width: int, n: int = 12) -> torch.Tensor:
    """Return smooth uint8 images; among them dark, gray, uniform ones, and one of two levels."""
    x = torch.randint(0, 256, (n, 3, height, width), generator=generator(height), dtype=torch.uint8)
    x = gaussian_blur(x, [9, 9], [2.0, 2.0])
    x[2:] = ((x[2:].float() - 90).clamp(0) * 3).clamp(0, 255).to(torch.uint8)
    x[1] = x[1] // 4
    x[2] = x[2, :1]
    x[3] = 77
    x[4] = torch.where(x[4] > 100, 255, 3).to(torch.uint8)
    return x


def drawn(name: str, n: int, seed: int = 0) -> torch.Tensor:
    """Return draws [n, 1, 4] of one operation."""
    draws = torch.rand(n, 1, 4, generator=generator(seed))
    draws[..., 0] = (NAMES.index(name) + draws[..., 0]) / 16
    return draws


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Compare levels; a position at the edge of two pixels may be rounded either way."""
    difference = (ours - theirs.float()).abs()
    if name in WARPS:
        assert (difference > 0).float().mean() < 0.03
    else:
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.25


@pytest.mark.parametrize(("height", "width"), [(60, 80), (224, 224)])
@pytest.mark.parametrize("magnitude", [1, 4, 7, 10])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_pillows(name, magnitude, height, width):
    x = pictures(height, width)
    draws = drawn(name, len(x))
    ours = randaugment.apply(x / 255, draws, magnitude)
    theirs = torch.stack(
        [slow_randaugment(image / 255, one, magnitude) for image, one in zip(x, draws, strict=True)]
    )
    assert_alike((255 * ours).round(), 255 * theirs, name)
    assert (
        ours.min() >= 0
        and ours.max() <= 1
        and (255 * ours - (255 * ours).round()).abs().max() < 1e-3
    )
    if name not in ("Brightness", "Color", "Contrast", "Sharpness", "Solarize"):
        assert not torch.equal(ours, x / 255)


def test_there_are_16_operations_with_the_published_strengths():
    assert list(randaugment.OPERATIONS) == NAMES and len(NAMES) == 16
    for name, (strength, _) in randaugment.OPERATIONS.items():
        if name in ("Posterize", "Solarize", "SolarizeAdd"):
            assert int(strength(0.7)) == STRENGTHS[name]
        elif name in STRENGTHS:
            assert strength(0.7) == pytest.approx(STRENGTHS[name])


def change(name: str, x: torch.Tensor, sign: int = 1, center=(0.0, 0.0)) -> torch.Tensor:
    """Return images [B, 3, H, W] of levels after an operation of magnitude 7."""
    strength, apply = randaugment.OPERATIONS[name]
    signs, centers = torch.full((len(x),), float(sign)), torch.tensor([center] * len(x))
    return apply(x, Arguments(strength(0.7), signs, centers))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_moves_an_image_by_70_pixels_and_fills_with_grey(sign):
    x = pictures(224, 224).float()
    moved = change("TranslateX", x, sign)
    kept = (moved[..., :154], x[..., 70:]) if sign > 0 else (moved[..., 70:], x[..., :154])
    assert torch.equal(*kept)
    assert (moved[..., 154:] if sign > 0 else moved[..., :70]).eq(128).all()
    assert torch.equal(change("TranslateY", x.mT, sign), moved.mT)
    assert torch.equal(change("ShearY", x.mT, sign), change("ShearX", x, sign).mT)


def test_a_square_of_56_pixels_is_cut_out_around_its_center():
    x = torch.zeros(1, 3, 224, 224)
    cut = change("Cutout", x, center=(100.5 / 224, 10.5 / 224))
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[72:128, :38] = True
    assert torch.equal(cut == 128, inside.expand(1, 3, -1, -1))


def test_lengths_follow_the_size_of_the_image():
    moved = change("TranslateX", pictures(32, 32).float())
    assert moved[..., 22:].eq(128).all() and not moved[..., 21].eq(128).all()


def test_small_images_keep_their_size():
    for shape in ((1, 1), (2, 5), (3, 3)):
        x = torch.rand(16, 3, *shape, generator=generator(0))
        draws = torch.cat([drawn(name, 1) for name in NAMES])
        assert randaugment.apply(x, draws, 7).shape == x.shape


def test_each_image_of_a_batch_has_its_own_operations():
    x = pictures(40, 40, 64) / 255
    draws = torch.rand(64, 3, 4, generator=generator(3))
    before = x.clone()
    together = randaugment.apply(x, draws, 7)
    alone = [randaugment.apply(x[i : i + 1], draws[i : i + 1], 7) for i in range(64)]
    assert torch.equal(together, torch.cat(alone)) and torch.equal(x, before)


def test_operations_signs_and_centers_are_uniform_and_independent():
    draws = color.draw(View(randaugment=(2, 7)), 20_000, generator(1)).operations
    assert draws.shape == (20_000, 2, 4)
    pairs = (draws[..., 0] * 16).long()
    counts = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256)
    assert chisquare(counts.numpy()).pvalue > 1e-3  # with replacement: each pair is as frequent
    assert abs((draws[..., 1] < 0.5).float().mean() - 0.5) < 0.01
    correlation = np.corrcoef(draws.flatten(1).T.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 0.03


def test_randaugment_comes_after_jitter_and_before_grayscale():
    view = recipe("fnc")[0]
    assert view.order.index("jitter") < view.order.index("randaugment") < view.order.index("gray")
    x = pictures(48, 48, 40)
    draws = color.draw(view, 40, generator(2))
    draws.gray[:], draws.jitter[:], draws.blur[:], draws.flip[:] = True, False, False, False
    seen = color.apply(x, View(randaugment=(2, 7), mean=(0,) * 3, std=(1,) * 3), draws)
    assert torch.equal(seen[:, 0], seen[:, 1])  # no color after grayscale
    slow = torch.stack(
        [
            slow_randaugment(image / 255, one, 7)
            for image, one in zip(x, draws.operations, strict=True)
        ]
    )
    luma = (slow * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert ((seen[:, 0] - luma).abs() > 2.5 / 255).float().mean() < 0.01


def test_slow_versions_change_images():
    """Guard the reference itself: no operation of Pillow may leave a busy image as it is."""
    image = pictures(60, 80)[7]
    for name in NAMES:
        assert not torch.equal(slow_operation(name, image, 7, 1, (0.5, 0.5)), image), name
