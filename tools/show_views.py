#!/usr/bin/env python
"""Draw the views that training sees.

Each row shows an image, followed by several draws of each view of the recipe.

  python tools/show_views.py mocov2 photos --image-size 96
  python tools/show_views.py --cfg configs/fnc_100.yaml DIR --images 4

Draw 1 has the crops of epoch 0, draw 2 has those of epoch 1, and so on. Color operations are drawn
as if these images were a batch.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moco import sections
from moco.augment import recipes
from moco.cli import actions, groups, tool
from moco.cli import values as types
from moco.errors import InputError
from moco.files import check_new, creating, read_yaml
from moco.sections_images import Decoding

if TYPE_CHECKING:
    from moco.data.images import Images


def main() -> int:
    """Run the tool; return the exit status."""
    return tool.attempt("show_views.py", lambda: draw(parse(sys.argv[1:])))


def draw(args: argparse.Namespace) -> None:
    """Write the picture. Raises InputError if the images or --out are not usable."""
    from moco.data.images import note_dark
    from moco.report.views import views_figure

    check_new(args.out, args.force)
    images = listed(args) if args.file_list else find(args.data)
    decoding = Decoding(args.exif, args.white, args.shrink_on_decode)
    note_dark(images, decoding)
    figure = views_figure(
        images,
        evenly_spaced(len(images), args.images),
        recipes.from_settings(views_of(args)),
        args.seed,
        args.draws,
        decoding,
    )
    with creating(args.out, args.force) as file:
        figure.savefig(file, format="png")
    print(args.out)


# Command line.


def listed(args: argparse.Namespace) -> "Images":
    """Return the images of --file-list. Raises InputError if the list is not usable."""
    from moco.data import file_lists

    folder = Path(args.data or Path(args.file_list).parent)
    file_lists.check(args.file_list, folder)
    return file_lists.read(args.file_list, folder)


def find(data: str) -> "Images":
    """Return the train images of a data folder, all images of another folder, or a single image.

    Raises InputError if there is no image.
    """
    import numpy as np

    from moco.data import folders, sources
    from moco.data.decoding import SUFFIXES
    from moco.data.images import ImageFolder
    from moco.data.names import Names

    path = Path(data)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{data}: is not an image ({', '.join(SUFFIXES)})")
        return ImageFolder(path.parent, np.zeros(1, int), (), Names.of([os.fsencode(path.name)]))
    no_split = path.is_dir() and not (path / "train").is_dir()
    if no_split and sources.locate(path, "train") is None:
        return folders.scan_flat(path)
    return sources.scan(sources.find(data, ("train",), labels=False), "train")


def evenly_spaced(n: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices of n, including the first and the last."""
    count = min(n, count)
    return [round(i * (n - 1) / max(1, count - 1)) for i in range(count)]


_DECODING = dataclasses.fields(Decoding)


class _Parser(tool.OneLineParser):
    def refuse(self, error: InputError) -> NoReturn:
        raise error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    p = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE DATA",
        help="a recipe, unless --cfg gives it; a folder, an image, or photos (the default)",
    )
    p.add_argument(
        "--cfg",
        metavar="FILE.yaml",
        help="a run's recipe file or args.yaml; options given here win",
    )
    p.add_argument(
        "--out", type=Path, default=Path("views.png"), help="the picture (default: %(default)s)"
    )
    p.add_argument("--force", action="store_true", help="replace an existing picture")
    p.add_argument(
        "--images",
        type=types.in_range(int, sections.POSITIVE),
        default=6,
        metavar="N",
        help="number of images, spread evenly over the data (default: %(default)s)",
    )
    p.add_argument(
        "--draws",
        type=types.in_range(int, sections.POSITIVE),
        metavar="N",
        help="draws of each view, side by side (default: 3, fewer if there are many views)",
    )
    p.add_argument(
        "--seed",
        type=types.in_range(int, "[-9223372036854775808, 9223372036854775807]"),
        default=0,
        help="seed of crops and colors (default: %(default)s)",
    )
    p.add_argument(
        "--image-size",
        type=types.in_range(int, sections.POSITIVE),
        default=224,
        metavar="PIXELS",
        help="width and height of a full-size view (default: %(default)s)",
    )
    for one in (*recipes.CHANGES, *_DECODING):
        groups.add(p, one.name, one.type, one.metadata["option"], None, {})
    p.add_argument(
        "--views",
        type=types.in_range(int, sections.POSITIVE),
        metavar="N",
        help="number of views, instead of the recipe's",
    )
    # other options of a recipe file that determine its views
    p.add_argument("--recipe", help=argparse.SUPPRESS)
    p.add_argument("--aug-plus", action=actions.Switch, default=None, help=argparse.SUPPRESS)
    p.add_argument("--multi-crop", action=actions.Switch, default=False, help=argparse.SUPPRESS)
    p.add_argument(
        "--support-size", type=types.in_range(int, sections.NATURAL), help=argparse.SUPPRESS
    )
    p.add_argument("--data", help=argparse.SUPPRESS)
    p.add_argument(
        "--file-list",
        metavar="FILE",
        help="draw the images that FILE names, one path a line; relative paths start at DATA, by "
        "default FILE's folder",
    )
    p.set_defaults(mean=None, std=None)  # not needed: the picture shows views before normalization
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options, with `recipe` and `views` set. Raises InputError if they are invalid."""
    p = parser()
    args = p.parse_intermixed_args(argv)
    words, given = list(args.words), vars(args)
    if args.cfg:
        try:
            recipe = _words_of(args.cfg)
            p.parse_intermixed_args(recipe)
        except InputError as error:
            raise InputError(f"--cfg {args.cfg}: {error}") from None
        args = p.parse_intermixed_args([*recipe, *argv])
        if args.support_size is not None and args.views is None:
            args.views = 2 + args.support_size
    if len(words) > 2:
        raise InputError(
            f"unexpected argument '{words[2]}'; give a recipe and a data folder, "
            "and options that start with --"
        )
    if len(words) == 2 or (words and not args.cfg):
        args.recipe = words.pop(0)
        _refuse_file(args.recipe)
    args.recipe = args.recipe or _of_method(args)
    if not args.recipe:
        which = f"--cfg {args.cfg}: names no recipe; " if args.cfg else "no recipe; "
        raise InputError(
            f"{which}give RECIPE and DATA, as in {p.prog} mocov2 photos; "
            f"recipes: {', '.join(recipes.RECIPES)}"
        )
    _refuse_without_effect(args, given)
    _choose_data(args, words, given)
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png")
    return args


def _choose_data(args: argparse.Namespace, words: list[str], given: dict[str, object]) -> None:
    """Set `data` and `file_list`: those of the command line, else those of --cfg, else photos.

    Raises InputError if both name the images.
    """
    if words and not given["file_list"]:
        args.file_list = None
    args.data = words[0] if words else args.data
    if args.file_list is None:
        args.data = args.data or "photos"
    elif args.data == "photos":
        raise InputError(
            "--file-list has no effect: the word photos already names the images; "
            "leave out one of them"
        )


def _refuse_without_effect(args: argparse.Namespace, given: dict[str, object]) -> None:
    """Raise InputError if an option given on the command line changes nothing."""
    views = views_of(args)
    recipe = recipes.from_settings(views)
    for name, (condition, why) in recipes.EFFECTS.items():
        if given[name] is not None and not condition(recipe, views):
            raise InputError(f"--{name.replace('_', '-')} has no effect: {why}")


def _refuse_file(recipe: str) -> None:
    """Raise InputError, which names --cfg, if `recipe` is a recipe file or a run folder."""
    if recipe in recipes.RECIPES:
        return
    path = Path(recipe)
    options = path / "args.yaml"
    if options.is_file():
        raise InputError(f"{recipe}: a run folder, not the name of a recipe; give --cfg {options}")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise InputError(f"{recipe}: a file, not the name of a recipe; give it with --cfg {recipe}")


def views_of(args: argparse.Namespace) -> sections.Views:
    """Return the settings of the views."""
    names = ["recipe", "image_size", "views", "mean", "std", *(one.name for one in recipes.CHANGES)]
    return sections.Views(**{name: vars(args).get(name) for name in names})


def _of_method(args: argparse.Namespace) -> str | None:
    """Return the recipe that --multi-crop or --aug-plus selects; None without these switches."""
    if args.multi_crop:
        return "multicrop"
    return None if args.aug_plus is None else "mocov2" if args.aug_plus else "mocov1"


_LISTS = [one.name.replace("_", "-") for one in recipes.CHANGES if one.metadata["option"].nargs]
_KEYS = "data file-list recipe views image-size seed aug-plus multi-crop support-size".split()
for _one in (*recipes.CHANGES, *_DECODING):
    _KEYS += [_one.name.replace("_", "-"), *(name[2:] for name in _one.metadata["option"].names)]


def _words_of(path: str) -> list[str]:
    """Return the options of a YAML file that determine its views, as command-line words.

    Raises InputError if the file cannot be read, or if a value is a list.
    """
    values = read_yaml(path)
    values = {str(key).replace("_", "-"): value for key, value in values.items()}
    words: list[str] = []
    for key in _KEYS:
        value = values.get(key)
        if isinstance(value, list) and key not in _LISTS:
            raise InputError(f"{key}: {value} is not one value")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


if __name__ == "__main__":
    sys.exit(main())
