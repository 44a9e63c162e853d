"""Test the recipes of views: the published settings, and names that are not known."""

from dataclasses import replace

import pytest

from moco.augment.recipes import RECIPES, from_settings, recipe
from moco.errors import InputError
from moco.sections import Views


def test_recipes_scale_with_the_size_of_the_run():
    assert [view.size for view in recipe("mocov2", 32)] == [32, 32]
    assert recipe("mocov2") == RECIPES["mocov2"]


def test_the_views_of_multi_crop_are_the_published_ones():
    scales = [(0.2, 1), (0.2, 1), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    views = recipe("multicrop")
    assert [view.size for view in views] == [224, 224, 192, 160, 128, 96] and [
        view.scale for view in views
    ] == scales
    (colours,) = {replace(view, size=224, scale=(0.2, 1.0)) for view in recipe("multicrop")}
    assert colours == recipe("mocov2")[0]
    assert [view.size for view in recipe("multicrop", 2)] == [2, 2, 2, 1, 1, 1]


def test_the_views_of_sogclr_are_the_published_ones():
    first, second = recipe("sogclr")
    assert first == second
    assert (first.scale, first.jitter, first.jitter_p, first.gray_p) == (
        (0.08, 1.0),
        (0.4, 0.4, 0.2, 0.1),
        0.8,
        0.2,
    )
    assert (first.blur_p, first.flip_p, first.solarize_p) == (1, 0.5, 0)
    assert {view.scale for view in recipe("sogclr", crop_min=0.3)} == {(0.3, 1.0)}
    with pytest.raises(InputError, match=r"at most 0\.429"):
        recipe("multicrop", crop_min=0.5)


def test_the_views_of_fnc_are_the_published_ones():
    views = recipe("fnc")
    assert len(views) == 10 and len(set(views)) == 1
    view = views[0]
    assert (view.size, view.scale, view.jitter, view.jitter_p) == (
        224,
        (0.08, 1.0),
        (0.8, 0.8, 0.8, 0.2),
        0.8,
    )
    assert (view.gray_p, view.blur_p, view.flip_p, view.solarize_p, view.randaugment) == (
        0.2,
        0.5,
        0.5,
        0,
        (2, 7),
    )


def test_simclr_has_the_views_of_fnc_without_randaugment():
    view = recipe("fnc")[0]
    assert view.interpolation == "bicubic" and view.randaugment == (2, 7)
    assert recipe("simclr") == (replace(view, randaugment=(0, 0)),) * 2


def test_a_recipe_with_more_or_fewer_views():
    assert (
        recipe("fnc", views=4) == recipe("fnc")[:4]
        and recipe("fnc", views=12) == recipe("fnc")[:1] * 12
    )
    first, second = recipe("byol")
    assert recipe("byol", views=4) == (first, second, second, second)
    assert {view.randaugment for view in recipe("multicrop", randaugment=(1, 10))} == {(1, 10)}
    for wrong in ((-1, 5), (2, 11), (2, -1)):
        with pytest.raises(
            InputError, match=f"--randaugment {wrong[0]} {wrong[1]}: .* from 0 to 10"
        ):
            recipe("fnc", randaugment=wrong)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("crop_scale", (0.3, 0.4), "scale"),
        ("jitter", (0.1, 2.0, 0.0, 0.5), "jitter"),
        ("jitter_p", 0.25, "jitter_p"),
        ("grayscale_p", 0.75, "gray_p"),
        ("blur_sigma", (1.0, 3.0), "blur_sigma"),
        ("blur_p", 0.25, "blur_p"),
        ("solarize_p", 1.0, "solarize_p"),
        ("flip_p", 0.0, "flip_p"),
        ("vertical_flip_p", 0.75, "vertical_flip_p"),
        ("rotate", 180.0, "rotate"),
    ],
)
def test_an_option_sets_one_field_of_every_view(name, option, value, field):
    expected = tuple(replace(view, **{field: value}) for view in recipe(name, 96))
    assert recipe(name, 96, **{option: value}) == expected != recipe(name, 96)
    as_in_yaml = list(value) if isinstance(value, tuple) else value
    views = Views(recipe=name, image_size=96, **{option: as_in_yaml})
    assert from_settings(views) == expected
    assert recipe(name, 96, **{option: None}) == recipe(name, 96)
    # every operation that an option can switch on is in the order of every recipe
    assert {"jitter", "gray", "blur", "solarize"} <= set(expected[0].order)


def test_crop_scale_takes_precedence_over_crop_min():
    assert recipe("mocov2", crop_min=0.9, crop_scale=(0.5, 0.6)) == recipe(
        "mocov2", crop_scale=(0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("crop_scale", (0.5, 0.2), "--crop-scale 0.5 0.2: give the smaller one first"),
        ("crop_scale", (0.0, 0.2), "--crop-scale 0 0.2: .* above 0"),
        ("crop_scale", (0.5, 1.2), "--crop-scale 0.5 1.2: .* at most 1"),
        ("jitter", (0.4, 0.4, 0.4, 0.6), "--jitter 0.4 0.4 0.4 0.6: .*hue.* at most 0.5"),
        ("jitter", (-0.1, 0.4, 0.4, 0.1), "--jitter -0.1 .* at least 0"),
        ("jitter", (0.4, float("nan"), 0.4, 0.1), "--jitter 0.4 nan .* at least 0"),
        ("jitter", (0.4, 0.4, 0.1), "--jitter 0.4 0.4 0.1: give four"),
        ("jitter_p", 1.5, r"--jitter-p 1.5: must be in \[0, 1\]"),
        ("grayscale_p", -0.1, "--grayscale-p -0.1: must be in"),
        ("blur_p", 2, "--blur-p 2: must be in"),
        ("solarize_p", float("nan"), "--solarize-p nan: must be in"),
        ("flip_p", 1.01, "--flip-p 1.01: must be in"),
        ("vertical_flip_p", -1, "--vertical-flip-p -1: must be in"),
        ("rotate", 181, r"--rotate 181: must be in \[0, 180\]"),
        ("blur_sigma", (2.0, 1.0), "--blur-sigma 2 1: give the smaller one first"),
    ],
)
def test_a_value_out_of_range_is_refused(option, value, said):
    with pytest.raises(InputError, match=said):
        recipe("mocov2", **{option: value})


def test_the_error_for_an_unknown_recipe_names_the_closest():
    with pytest.raises(InputError, match=r"mocov3.*mocov[12]"):
        recipe("mocov3")
