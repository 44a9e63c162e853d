"""A parser that refuses or reports options that have no effect in combination with others."""

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

from moco.cli.tool import OneLineParser
from moco.config import Config, flat
from moco.errors import InputError

Options = argparse.Namespace
Values = dict[str, object]  # by attribute name
OFF = (None, False, 0, [])  # values of an option that is switched off


class Rule(NamedTuple):
    """A rule that says when options have an effect; see `EffectsParser.has_effect`."""

    options: tuple[str, ...]  # attribute names
    when: Callable[[Options], object]
    why: str
    refuse: bool
    off: tuple[object, ...]  # values that mean off


class EffectsParser(OneLineParser):
    """A parser that refuses or reports options without effect.

    Attributes:
        given: the options given on the command line.
        recipe: the options given by --cfg, or by the recipe of a protocol.
        recipe_name: the file of the recipe, for messages.
        of_args_yaml: whether --cfg is the args.yaml of a run, which holds all settings.
        has_settings: whether --cfg has settings for this script. In an evaluation, the recipe of a
            pre-training has none, unless it names the recipe of the probe.
        own: the script's defaults.
    """

    given: Values
    recipe: Values
    recipe_name: str = ""
    of_args_yaml: bool = False
    has_settings: bool = False
    own: Values

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.rules: list[Rule] = []

    def has_effect(
        self,
        options: str,
        when: Callable[[Options], object],
        why: str,
        refuse: bool = True,
        zero_is_off: bool = True,
    ) -> None:
        """Declare that options have an effect only if `when` returns true.

        Args:
            options: attribute names of the options, separated by spaces.
            when: called with all settings as attributes, after the script has completed them.
            why: the reason, and what to do; printed after "--option has no effect: ".
            refuse: whether an option without effect is an error, if it is given on the command line
                and differs from its default. Otherwise it is only reported.
            zero_is_off: whether 0 means off. An option that is off is never refused.
        """
        off = OFF if zero_is_off else (None,)
        self.rules.append(Rule(tuple(options.split()), when, why, refuse, off))

    def without_effect(self, config: Config) -> list[str]:
        """Return a line for each rule according to which given options have no effect.

        Options that are off are left out. Options of --cfg are only reported, never refused,
        and left out if they equal the default.

        Args:
            config: the completed settings of the last `parse`.

        Raises InputError if a rule refuses an option.
        """
        args = Options(**flat(config), config=config)
        refused, noted = [], []
        for rule in self.rules:
            given = [dest for dest in rule.options if self.given.get(dest) not in rule.off]
            found = [
                dest
                for dest in rule.options
                if rule.refuse and dest not in self.given and self._of_recipe(dest, rule.off)
            ]
            if not (given or found) or rule.when(args):
                continue
            refuses = rule.refuse and any(self.given[dest] != self.own.get(dest) for dest in given)
            for dests, where, lines in (
                (given, "", refused if refuses else noted),
                (found, f" of {self.recipe_name}", noted),
            ):
                if dests:
                    names = ", ".join(self._name(dest) + where for dest in dests)
                    lines.append(
                        f"{names} {'has' if len(dests) == 1 else 'have'} no effect: {rule.why}"
                    )
        if refused:
            raise InputError(*refused)
        return noted

    def _of_recipe(self, dest: str, off: tuple[object, ...]) -> bool:
        """Return whether a recipe sets an option to a value other than `off` and its default."""
        return not self.of_args_yaml and self.recipe.get(dest) not in (*off, self.own.get(dest))

    def _name(self, dest: str) -> str:
        """Return the option that sets `args.dest`."""
        names = (
            name
            for action in self._actions
            if action.dest == dest
            for name in action.option_strings or [action.metavar]
        )
        return next(name for name in names if not re.fullmatch("-.|--no-.*", name))
