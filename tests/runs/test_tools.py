"""The tools for people: pictures of views, ImageNet's archives as folders, jobs under SLURM."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, own_lines
from PIL import Image

from moco import rng
from moco.augment import color, recipes
from moco.cli import tool
from moco.data import loader
from moco.errors import InputError
from moco.report.views import settings, view_columns, views_figure
from moco.rng import Progress
from tools import show_views

pytestmark = pytest.mark.slow


def test_ctrl_c_is_one_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert tool.attempt("report.py", work) == 130
    assert capsys.readouterr() == ("", "report.py: interrupted\n")


# tools/show_views.py
def test_a_picture_of_views_and_one_line_for_mistakes(tmp_path, shared_images, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["show_views.py", *map(str, words)])
        status = show_views.main()
        return status, capsys.readouterr()

    out = tmp_path / "a folder" / "views.png"
    status, said = call("multicrop", shared_images, "--image-size", 32, "--images", 2, "--out", out)
    assert (status, said.out) == (0, f"{out}\n")
    width, height = Image.open(out).size
    assert width > 3 * height  # the image and two draws of six views; two rows
    (tmp_path / "bad.yaml").write_text("recipe: [")
    options = tmp_path / "run" / "args.yaml"
    options.parent.mkdir()
    options.write_text("recipe: mocov2")
    for words, what in (
        (["mocov9"], "the nearest is 'mocov2'"),
        (["mocov2", tmp_path / "none"], "no such folder"),
        (["mocov2", tmp_path / "a folder", "--out", tmp_path / "views.jpg"], "a PNG"),
        (["mocov2", "--images", "0"], "0 is below 1"),
        (["--cfg", tmp_path / "bad.yaml"], "not YAML"),
        (["--cfg", ROOT / "configs/lincls_moco.yaml"], "names no recipe"),
        (["mocov2", ROOT / "configs"], "holds no image"),
        (["mocov2", shared_images, "--crop-min", "2"], "--crop-min: 2"),
        (["mocov2", shared_images, "--rotate", "200"], "--rotate: 200 is above 180"),
        (
            ["mocov1", "--blur-sigma", "1", "2"],
            "--blur-sigma has no effect: the recipe's views are not blurred",
        ),
        ([options], f"a file, not the name of a recipe; give it with --cfg {options}"),
        ([options.parent, shared_images], f"not the name of a recipe; give --cfg {options}"),
    ):
        status, said = call(*words)
        assert status == 2 and what in said.err and len(own_lines(said.err)) == 1, (words, said.err)


def test_views_are_training_s(shared_images):
    images = show_views.find(str(shared_images))
    recipe = recipes.recipe("byol", 32)
    picked, seed = [0, 5, 40], 3
    columns = view_columns(images, picked, recipe, seed, draws=2)
    assert [column.title for column in columns] == [
        "",
        *(f"view {view}, draw {draw}" for view in (1, 2) for draw in (1, 2)),
    ]
    cut = loader.RandomCrops(recipe, seed)
    crops = torch.stack([cut(images.read(i), (1, i))[1] for i in picked])
    seen = color.augment(
        crops, recipe[1], Progress(seed, 1, step=1).generator(rng.COLOR, "cpu", 0, 1)
    )
    again = color.normalize(torch.stack(list(columns[4].images)))
    inside = (seen == again.clamp(seen.min(), seen.max())) | ((seen - again).abs() < 1e-4)
    assert inside.float().mean() > 0.999
    assert "solarize, p 0.2" in columns[3].heading and "solarize" not in columns[1].heading


def test_the_heading_of_a_view_names_flips_and_rotation():
    (turned, _) = recipes.recipe("mocov2", vertical_flip_p=0.25, rotate=30)
    assert settings(turned)[-3:] == [
        "flip, p 0.5",
        "vertical flip, p 0.25",
        "rotation by up to 30 degrees, always",
    ]
    assert settings(recipes.recipe("mocov2")[0])[-1] == "flip, p 0.5"


def test_a_recipe_file_says_which_views(tmp_path):
    def of(*words):
        args = show_views.parse(list(map(str, words)))
        return recipes.from_settings(show_views.views_of(args)), args

    configs = ROOT / "configs"
    assert of("--cfg", configs / "mocov1_200.yaml")[0] == recipes.recipe("mocov1")
    assert of("--cfg", configs / "synco_200.yaml")[0] == recipes.recipe("mocov2")
    assert of("--cfg", configs / "adco_multicrop_200.yaml")[0] == recipes.recipe("multicrop")
    file = tmp_path / "args.yaml"
    file.write_text(
        "recipe: fnc\nsupport_size: 2\nimage-size: 64\nrandaugment: [1, 3]\n"
        "blur-sigma: [0.2, 0.5]\njitter: [1, 1, 1, 0.5]\nrotate: 20\nlr: .3\nseed: 4\n"
    )
    views, args = of("--cfg", file, "--image-size", 32)
    assert views == recipes.recipe(
        "fnc",
        32,
        views=4,
        randaugment=(1, 3),
        blur_sigma=(0.2, 0.5),
        jitter=(1, 1, 1, 0.5),
        rotate=20,
    ) and (args.seed, args.data) == (4, "photos")
    views, args = of("sogclr", "DIR", "--cfg", file)
    assert args.data == "DIR" and views[0].blur_p == 1
    file.write_text("recipe: byol\nvertical-flip: 0.5\ncrop_scale: [0.5, 0.75]\n")
    assert of("--cfg", file)[0] == recipes.recipe(
        "byol", vertical_flip_p=0.5, crop_scale=(0.5, 0.75)
    )
    file.write_text("recipe: fnc\nimage-size: many\n")
    with pytest.raises(InputError, match=r"args\.yaml: argument --image-size"):
        of("--cfg", file)


def test_any_folder_of_images_can_be_shown(tmp_path):
    folder = tmp_path / "of mine" / "deeper"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((20, 30 + i, 3), 90, np.uint8)).save(folder / f"{i}.png")
    images = show_views.find(str(tmp_path / "of mine"))
    assert [images.name(i) for i in range(len(images))] == [
        "deeper/0.png",
        "deeper/1.png",
        "deeper/2.png",
    ]
    assert show_views.find(str(folder / "1.png")).read(0).shape == (3, 20, 31)
    assert (
        show_views.evenly_spaced(3, 5) == [0, 1, 2]
        and show_views.evenly_spaced(10, 3) == [0, 4, 9]
        and show_views.evenly_spaced(4, 1) == [0]
    )
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "1.png").write_bytes(b"a thumbnail")
    (folder / "0.png").rename(folder / os.fsdecode(b"\xe9.png"))
    images = show_views.find(str(tmp_path / "of mine"))
    assert [os.fsencode(images.name(i)) for i in range(3)] == [
        b"deeper/1.png",
        b"deeper/2.png",
        b"deeper/\xe9.png",
    ]
    views_figure(images, [0, 2], recipes.recipe("mocov2", 16)).savefig(tmp_path / "views.png")
    assert show_views.find(str(folder / os.fsdecode(b"\xe9.png"))).read(0).shape == (3, 20, 30)
    (folder / "1.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"1\.png"):
        views_figure(images, [0, 1], recipes.recipe("mocov2", 16))
