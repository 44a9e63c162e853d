"""Create command-line options from the sections of a config (see moco/sections.py)."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from moco.cli import values
from moco.cli.actions import Switch
from moco.config import Config, sections
from moco.data import catalog
from moco.encoder import archs
from moco.launch import processes
from moco.methods import PROTOCOLS
from moco.options import Option
from moco.sections import AUTO_MAX

# options with a conversion function of their own
_CONVERTERS = {
    "allow_change": values.names,
    "keep": values.keep,
    "data_name": values.data_name,
    "dataset": catalog.canonical,
    "weights": values.weights,
}


def add_groups(parser: argparse.ArgumentParser, config: Config) -> None:
    """Add a group of options for each section of `config`. The values in `config` are defaults."""
    texts = _texts(config)
    for _, section in sections(config):
        group = parser.add_argument_group(section.TITLE)
        for one in dataclasses.fields(section):
            option = one.metadata.get("option")
            if one.name == "data":  # a positional argument, and an option with the same meaning
                group.add_argument("data", nargs="?", metavar="DIR", help=option.help)
                same = {"dest": "data_option", "metavar": "DIR", "help": "the same as DIR"}
                group.add_argument("--data", "--data-path", **same)
            elif option:
                add(group, one.name, one.type, option, getattr(section, one.name), texts)


def _texts(config: Config) -> dict[str, object]:
    """Return the text of each placeholder in help texts."""
    each = config.input.batch_is_per_process
    of = "of each process" if each else "of this node, split over its processes"
    total = "of all nodes, split over their processes"
    return {
        "of": of,
        "batch_of": total if config.input.batch_is_of_all_nodes else of,
        "cores": processes.cores(),
        "most": processes.WORKERS,
        "gib": AUTO_MAX >> 30,
        "datasets": ", ".join(catalog.NAMES),
        # main_retrieval.py describes its own
        "protocols": ", ".join(
            dict.fromkeys(one.name for one in PROTOCOLS if one.script != "main_retrieval")
        ),
        "whose": "data set's" if config.network.arch else "checkpoint's",
        "archs": f"any torchvision ResNet, {', '.join(archs.SHORT)}, any other timm "
        "network, or any other torchvision classifier; timm:NAME or torchvision:NAME selects the "
        "library of a name that both have",
    }


def add(
    group: argparse._ActionsContainer,
    name: str,
    annotation: Any,
    option: Option,
    default: Any,
    texts: dict[str, object],
) -> None:
    """Add one field to a parser or group, as an option.

    `texts` has the text of each placeholder in help texts.
    """
    flag = f"--{name.replace('_', '-')}"
    names = sorted((flag, *option.names), key=lambda one: one.startswith("--"))
    text = option.help.format(**texts)
    if default is None and option.unset:
        text += f" (default: {option.unset.format(**texts)})"
    more: dict[str, Any] = {
        "dest": name,
        "default": list(default) if isinstance(default, tuple) else default,
        "help": argparse.SUPPRESS if option.hidden else text,
    }
    type_ = value_type(annotation)
    if type_ is bool and not option.switch:
        group.add_argument(*names, action="store_true", **more)
        return
    if type_ is bool or option.max_level > 1:
        group.add_argument(*names, action=Switch, max_level=option.max_level, **more)
        return
    if name in _CONVERTERS:
        more["type"] = _CONVERTERS[name]
    elif option.range:
        more["type"] = values.in_range(type_, option.range)
    elif type_ is not str:
        more["type"] = type_
    for key in ("choices", "metavar", "nargs"):
        if value := getattr(option, key):
            more[key] = value
    group.add_argument(*names, **more)


def value_type(annotation: Any) -> type:
    """Return the type of a single value, such as float for `tuple[float, ...] | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    return annotation
