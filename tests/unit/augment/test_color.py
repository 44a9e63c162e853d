"""Colour operations on batches against torchvision's on each image, and their random draws."""

import math
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional as F

from moco.augment import color, one_image, operations, randaugment
from moco.augment.recipes import RECIPES, View, recipe
from moco.config import MEAN, STD

TOLERANCE = 1e-4
IMAGES_PER_BATCH = 50
FOUR_BATCHES = pytest.mark.parametrize(
    ("height", "width", "seed"), [(24, 24, 0), (17, 31, 1), (40, 23, 2), (33, 48, 3)]
)
MANY = 20_000
MAGNITUDE = 7
ORDER = ("jitter", "randaugment", "gray", "blur", "solarize", "flip", "vertical_flip", "rotate")
PROBABILITIES = ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip_p", "vertical_flip_p")
BUSY = View(
    jitter=(0.3, 0.5, 0.7, 0.2),
    jitter_p=0.7,
    gray_p=0.3,
    blur_p=0.6,
    solarize_p=0.4,
    flip_p=0.5,
    vertical_flip_p=0.4,
    rotate=50.0,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def images(height, width, seed):
    """Return 50 random images.

    Some are saturated, gray, black, white or nearly uniform. The others contain such pixels.
    """
    x = torch.rand(IMAGES_PER_BATCH, 3, height, width, generator=generator(seed))
    x[:6] = x[:6].round()
    x[6:12] = x[6:12, :1]
    x[12:14] = 0
    x[14:16] = 1
    x[16:20] = 0.3 + 0.001 * x[16:20]
    x[20:, :, 0] = x[20:, :, 0].round()
    x[20:, :, 1] = x[20:, :1, 1]
    x[20:, :, 2] = 0
    x[20:, 1:, 3] = x[20:, 1:2, 3]
    return x


def between(low, high, seed):
    """Return 50 random numbers in [low, high], including both ends."""
    values = low + (high - low) * torch.rand(IMAGES_PER_BATCH, generator=generator(100 + seed))
    values[20], values[-1] = low, high
    return values


def one_by_one(operation, x, *parameters):
    return torch.stack(
        [
            operation(image, *values)
            for image, *values in zip(x, *(p.tolist() for p in parameters), strict=True)
        ]
    )


def assert_close(ours, theirs, atol=TOLERANCE, view=None):
    """Compare images. After RandAugment, which rounds to grey levels, a few pixels may differ."""
    if view is not None and view.randaugment[0]:
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() > atol).float().mean() < 0.03
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@FOUR_BATCHES
@pytest.mark.parametrize("operation", range(3))
def test_blend_is_torchvisions_brightness_contrast_and_saturation(operation, height, width, seed):
    x, factor = images(height, width, seed), between(0, 2, seed)
    factors = [torch.ones(len(x))] * 3
    factors[operation] = factor
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operation]
    assert_close(color.blend(x, *factors), one_by_one(theirs, x, factor))


@FOUR_BATCHES
def test_each_sample_of_a_batch_may_have_another_blend(height, width, seed):
    x, factor = images(height, width, seed), between(0, 2, seed)
    operation = torch.arange(len(x)) % 4  # every fourth sample stays as it is
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, lambda image, _: image)
    expected = one_by_one(lambda image, i, f: theirs[i](image, f), x, operation, factor)
    factors = [torch.where(operation == i, factor, torch.ones(())) for i in range(3)]
    ours = color.blend(x, *factors)
    assert_close(ours, expected)


@FOUR_BATCHES
def test_hue(height, width, seed):
    x, shift = images(height, width, seed), between(-0.5, 0.5, seed)
    shift[21:28] = torch.arange(-3, 4) / 6  # full sectors of the colour circle
    assert_close(color.adjust_hue(x, shift), one_by_one(F.adjust_hue, x, shift))


@FOUR_BATCHES
@pytest.mark.parametrize("radius", [1, 6])
def test_blur_with_a_sigma_for_each_sample(radius, height, width, seed):
    x, sigma = images(height, width, seed), between(0.1, 2, seed)
    taps = 2 * radius + 1
    expected = one_by_one(lambda image, s: F.gaussian_blur(image, [taps, taps], [s, s]), x, sigma)
    assert_close(color.gaussian_blur(x, sigma, radius), expected)


@FOUR_BATCHES
@pytest.mark.parametrize("radius", [1, 6])
def test_blur_of_one_image_equals_blur_of_a_batch(radius, height, width, seed):
    x, sigma = images(height, width, seed), between(0.1, 2, seed)
    alone = torch.cat(
        [
            one_image.gaussian_blur(image, s, radius)
            for image, s in zip(x.split(1), sigma.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(alone, color.gaussian_blur(x, sigma, radius), rtol=0, atol=2e-5)


@FOUR_BATCHES
def test_hue_of_one_image(height, width, seed):
    x, shift = images(height, width, seed), between(-0.5, 0.5, seed)
    shift[21:28] = torch.arange(-3, 4) / 6
    x[::5] = x[::5].round()  # channels of equal value
    alone = [
        one_image.adjust_hue(image.clone(), s)
        for image, s in zip(x.split(1), shift.tolist(), strict=True)
    ]
    assert_close(torch.cat(alone), one_by_one(F.adjust_hue, x, shift))


@FOUR_BATCHES
def test_grayscale(height, width, seed):
    x = images(height, width, seed)
    assert_close(color.grayscale(x), one_by_one(F.rgb_to_grayscale, x))


@FOUR_BATCHES
def test_solarize(height, width, seed):
    x, threshold = images(height, width, seed), between(0, 1, seed)
    assert_close(color.solarize(x), one_by_one(lambda image: F.solarize(image, 0.5), x))
    ours = torch.cat([color.solarize(x[i : i + 1], t) for i, t in enumerate(threshold.tolist())])
    assert_close(ours, one_by_one(F.solarize, x, threshold))


@FOUR_BATCHES
def test_normalize_takes_floats_and_bytes(height, width, seed):
    x = images(height, width, seed)
    assert_close(color.normalize(x), one_by_one(lambda image: F.normalize(image, MEAN, STD), x))
    x = (x * 255).round().to(torch.uint8)
    as_float = F.to_dtype(x, torch.float32, scale=True)
    assert_close(
        color.normalize(x), one_by_one(lambda image: F.normalize(image, MEAN, STD), as_float)
    )


@FOUR_BATCHES
def test_flip_changes_only_the_drawn_samples(height, width, seed):
    x, view = images(height, width, seed), View(flip_p=0.5)
    draws = color.draw(view, len(x), generator(seed))
    expected = one_by_one(
        lambda image, flip: F.horizontal_flip(image) if flip else image, x, draws.flip
    )
    assert 0 < draws.flip.sum() < len(x)
    assert_close(color.apply(x, view, draws), F.normalize(expected, MEAN, STD))


@FOUR_BATCHES
def test_vertical_flip_changes_only_the_drawn_samples(height, width, seed):
    x, view = images(height, width, seed), View(flip_p=0.0, vertical_flip_p=0.5)
    draws = color.draw(view, len(x), generator(seed))
    expected = one_by_one(
        lambda image, flip: F.vertical_flip(image) if flip else image, x, draws.vertical_flip
    )
    assert 0 < draws.vertical_flip.sum() < len(x)
    assert_close(color.apply(x, view, draws), F.normalize(expected, MEAN, STD))


@FOUR_BATCHES
def test_rotate_is_bilinear_and_reflects_at_the_borders(height, width, seed):
    x, angle = images(height, width, seed), between(-180, 180, seed)
    assert_close(operations.rotate(x, angle), one_by_one(rotated, x, angle))


def test_rotate_is_torchvisions_inside_the_image():
    x, angle = images(41, 33, 0), between(-180, 180, 0)
    ours = operations.rotate(x, angle)
    theirs = one_by_one(
        lambda image, angle: F.rotate(image, angle, F.InterpolationMode.BILINEAR), x, angle
    )
    inside = (..., slice(10, 31), slice(6, 27))  # no pixel comes from outside at any angle
    assert_close(ours[inside], theirs[inside])
    quarter = operations.rotate(x[..., :33, :], torch.full((IMAGES_PER_BATCH,), 90.0))
    assert_close(quarter, x[..., :33, :].rot90(1, (-2, -1)))


@pytest.mark.parametrize(
    "change",
    [
        {"rotate": 90.0},
        {"vertical_flip_p": 0.7},
        {"flip_p": 0.9},
        {"gray_p": 0.9},
        {"jitter_p": 0.2},
        {"jitter": (0.1, 0.2, 0.3, 0.4)},
        {"blur_p": 0.1},
        {"blur_sigma": (0.5, 3.0)},
        {"solarize_p": 0.9},
        {"scale": (0.5, 0.6)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_setting_changes_only_its_own_draws(change):
    """Leave all other draws with the same bits: a setting does not shift them."""
    (name,) = change
    own = {"rotate": "angle", "jitter": "factors", "blur_sigma": "sigma", "scale": None}
    before, after = (
        color.draw(view, 1000, generator(5)) for view in (BUSY, replace(BUSY, **change))
    )
    changed = {
        field.name
        for field in fields(before)
        if not torch.equal(getattr(before, field.name), getattr(after, field.name))
    }
    assert changed == {own.get(name, name.removesuffix("_p"))} - {None}


@pytest.mark.parametrize("view", [view for views in RECIPES.values() for view in views[:2]])
def test_rotation_and_vertical_flip_left_the_views_of_recipes_as_they_were(view):
    """The draws are the same bits as when there was neither, in the order of that time."""
    n, g = 300, generator(9)
    jitter = torch.rand(n, generator=g) < view.jitter_p
    order = torch.rand(n, 4, generator=g).argsort(1)
    u = torch.rand(n, 4, generator=g)
    gray = torch.rand(n, generator=g) < view.gray_p
    blur = torch.rand(n, generator=g) < view.blur_p
    v = torch.rand(n, generator=g)
    solarize = torch.rand(n, generator=g) < view.solarize_p
    flip = torch.rand(n, generator=g) < view.flip_p
    layers = torch.rand(n, view.randaugment[0], 4, generator=g)
    draws = color.draw(view, n, generator(9))
    strength = torch.tensor(view.jitter)
    low = torch.cat([(1 - strength[:3]).clamp_min(0), -strength[3:]])
    high = torch.cat([1 + strength[:3], strength[3:]])
    low_sigma, high_sigma = view.blur_sigma
    assert torch.equal(draws.factors, low + (high - low) * u)
    assert torch.equal(draws.sigma, low_sigma + (high_sigma - low_sigma) * v)
    for name, value in (
        ("jitter", jitter),
        ("order", order),
        ("gray", gray),
        ("blur", blur),
        ("solarize", solarize),
        ("flip", flip),
        ("operations", layers),
    ):
        assert torch.equal(getattr(draws, name), value), name
    assert not draws.vertical_flip.any() and not draws.rotate.any()


def jittered(image, order, factors):
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for operation in order:
        image = theirs[operation](image, factors[operation])
    return image


def rotated(image, angle):
    """Rotate a float image pixel by pixel, in float64. Pixels outside are those of its mirror."""
    _, h, w = image.shape
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rows, columns = sin * x + cos * y + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2
    channels = [
        map_coordinates(channel, [rows, columns], order=1, mode="reflect")
        for channel in image.double().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).float()


def one_view(image, draws, i, order, taps):
    """Return the view of a float image for sample `i` of `draws`, by torchvision's operations."""
    operations = {
        "jitter": lambda image: jittered(image, draws.order[i].tolist(), draws.factors[i].tolist()),
        "gray": lambda image: F.rgb_to_grayscale(image, num_output_channels=3),
        "blur": lambda image: F.gaussian_blur(image, [taps, taps], [draws.sigma[i].item()] * 2),
        "solarize": lambda image: F.solarize(image, 0.5),
        # test_randaugment.py compares it with Pillow
        "randaugment": lambda image: randaugment.apply(
            image[None], draws.operations[i : i + 1], MAGNITUDE
        )[0],
        "flip": F.horizontal_flip,
        "vertical_flip": F.vertical_flip,
        "rotate": lambda image: rotated(image, draws.angle[i].item()),
    }
    for name in order:
        if getattr(draws, name)[i]:
            image = operations[name](image)
    return F.normalize(image, MEAN, STD)


VIEWS = [
    pytest.param(
        view,
        ("gray", "jitter", "flip") if name == "mocov1" else ORDER,
        id=f"{name}-{i}",
    )
    for name, views in RECIPES.items()
    for i, view in enumerate(views)
]


def assert_apply_is_the_drawn_operations(x, view, order):
    before = x.clone()
    draws = color.draw(view, len(x), generator(5))
    as_float = F.to_dtype(x, torch.float32, scale=True)
    expected = torch.stack(
        [one_view(image, draws, i, order, taps=13) for i, image in enumerate(as_float)]
    )
    assert_close(color.apply(x, view, draws), expected, view=view)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("view", "order"),
    [*VIEWS, pytest.param(BUSY, ORDER, id="busy")],
)
def test_apply_is_the_drawn_operations_one_image_at_a_time(view, order):
    x = torch.cat([images(24, 32, seed) for seed in range(2)])
    assert_apply_is_the_drawn_operations((x * 255).round().to(torch.uint8), view, order)


@FOUR_BATCHES
def test_apply_takes_floats_of_any_size_and_does_not_change_them(height, width, seed):
    assert_apply_is_the_drawn_operations(images(height, width, seed), BUSY, ORDER)


def test_apply_returns_float32_for_float64_images():
    x = torch.rand(8, 3, 16, 16, dtype=torch.float64, generator=generator(0))
    draws = color.draw(BUSY, 8, generator(1))
    ours = color.apply(x, BUSY, draws)
    assert ours.dtype == torch.float32
    assert_close(ours, color.apply(x.float(), BUSY, draws))


def test_views_smaller_than_the_blur_kernel_get_a_smaller_kernel():
    x = torch.rand(20, 3, 5, 9, generator=generator(0))
    view = View(blur_p=1.0, flip_p=0.0)
    draws = color.draw(view, len(x), generator(1))
    assert_close(
        color.apply(x, view, draws),
        torch.stack([one_view(image, draws, i, ("blur",), taps=9) for i, image in enumerate(x)]),
    )


@pytest.mark.parametrize(
    "view", [case.values[0] for case in VIEWS] + [BUSY], ids=[case.id for case in VIEWS] + ["busy"]
)
def test_all_images_at_once_equal_each_image_alone(view):
    x = images(24, 32, 3)
    draws = color.draw(view, len(x), generator(6))
    together, alone = (
        how(x, view, draws) for how in (color._apply_by_operation, color._apply_by_image)
    )
    assert_close(together, alone, 2e-5, view)


@pytest.mark.parametrize(
    ("view", "order"),
    [*VIEWS, pytest.param(BUSY, ORDER, id="busy")],
)
def test_apply_is_the_drawn_operations_on_large_images(view, order):
    x = images(150, 130, 3)[20:30]
    assert x[0, 0].numel() > color._SMALL
    assert_apply_is_the_drawn_operations((x * 255).round().to(torch.uint8), view, order)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fused_operations_give_the_same_views(monkeypatch):
    for name in ("blend", "adjust_hue"):
        monkeypatch.setattr(color, name, getattr(color, name))  # monkeypatch restores it
    x, view = images(24, 32, 4), View(jitter_p=1.0)
    draws = color.draw(view, len(x), generator(8))
    before, eager = color.apply(x, view, draws), color.adjust_hue
    color.compile_operations.__wrapped__()
    assert color.adjust_hue is not eager
    for apply in (color._apply_by_image, color._apply_by_operation):
        torch.testing.assert_close(apply(x, view, draws), before, rtol=0, atol=2e-5)


def test_augment_draws_and_applies():
    x = images(24, 24, 0)
    assert torch.equal(
        color.augment(x, BUSY, generator(7)),
        color.apply(x, BUSY, color.draw(BUSY, len(x), generator(7))),
    )


@pytest.mark.parametrize("recipe_name", sorted(RECIPES))
def test_views_of_equal_settings_together_equal_each_view_alone(recipe_name):
    """`augment_views` on an accelerator returns what `augment` returns for each view."""
    views = recipe(recipe_name, 32)
    crops = [images(view.size, view.size, i)[:6] for i, view in enumerate(views)]
    draws = [
        color.draw(view, len(x), generator(i))
        for i, (x, view) in enumerate(zip(crops, views, strict=True))
    ]
    for one, x, view, drawn in zip(
        color._apply_together(crops, views, draws), crops, views, draws, strict=True
    ):
        assert_close(one, color.apply(x, view, drawn), 2e-6, view)
    each = color.augment_views(crops, views, [generator(i) for i in range(len(views))])
    assert all(map(torch.equal, each, map(color.apply, crops, views, draws)))


def assert_happens_with_probability(happened, p):
    assert abs(happened.float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / len(happened))


def assert_uniform(values, low, high):
    assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
    if high > low:
        assert kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


def assert_draws_fit(view, draws):
    for name in PROBABILITIES:
        assert_happens_with_probability(
            getattr(draws, name.removesuffix("_p")), getattr(view, name)
        )
    for operation, strength in enumerate(view.jitter[:3]):
        assert_uniform(draws.factors[:, operation], max(0, 1 - strength), 1 + strength)
    assert_uniform(draws.factors[:, 3], -view.jitter[3], view.jitter[3])
    assert_uniform(draws.sigma, *view.blur_sigma)
    assert_uniform(draws.angle, -view.rotate, view.rotate)
    orders = draws.order @ torch.tensor([64, 16, 4, 1])
    assert torch.equal(draws.order.sort(1).values, torch.arange(4).expand(MANY, 4))
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "view", [case.values[0] for case in VIEWS] + [BUSY], ids=[case.id for case in VIEWS] + ["busy"]
)
def test_draws_have_the_views_ranges_and_probabilities(view):
    assert_draws_fit(view, color.draw(view, MANY, generator(11)))


def test_factors_of_a_strong_jitter_stop_at_zero_but_hue_shifts_have_both_signs():
    view = View(jitter=(1.5, 1.0, 2.0, 0.5), blur_sigma=(0.5, 3.0))
    assert_draws_fit(view, color.draw(view, MANY, generator(12)))


def test_draws_are_independent_of_each_other():
    draws = color.draw(BUSY, MANY, generator(13))
    columns = [
        draws.jitter,
        draws.gray,
        draws.blur,
        draws.solarize,
        draws.flip,
        draws.vertical_flip,
        draws.angle,
        draws.sigma,
        *draws.factors.T,
        *draws.order.T[:3],
    ]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns]))
    within_order = torch.zeros_like(correlation, dtype=torch.bool)
    within_order[-3:, -3:] = True
    correlation[within_order] = 0
    assert correlation.fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(MANY)


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    view = replace(BUSY, randaugment=(2, MAGNITUDE))
    first, again, other = (color.draw(view, 100, generator(seed)) for seed in (3, 3, 4))
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
        assert not torch.equal(getattr(first, field.name), getattr(other, field.name))


@pytest.mark.parametrize("name", PROBABILITIES)
def test_an_operation_of_probability_zero_never_happens_and_of_one_always(name):
    never = color.draw(replace(BUSY, **{name: 0.0}), MANY, generator(1))
    always = color.draw(replace(BUSY, **{name: 1.0}), MANY, generator(1))
    assert not getattr(never, name.removesuffix("_p")).any()
    assert getattr(always, name.removesuffix("_p")).all()


def test_a_view_without_operations_only_normalizes():
    x, view = images(24, 24, 0), View(flip_p=0.0)
    assert torch.equal(color.augment(x, view, generator(0)), color.normalize(x))
