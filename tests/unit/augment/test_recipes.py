"""Test the recipes of views: the published settings, and names that are not known."""

from dataclasses import replace

import pytest

from moco.augment.recipes import RECIPES, recipe
from moco.errors import InputError


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


def test_the_error_for_an_unknown_recipe_names_the_closest():
    with pytest.raises(InputError, match=r"mocov3.*mocov[12]"):
        recipe("mocov3")
