"""Options that have no effect in some combinations, and the parser that says so."""

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple

from moco.cli.tool import OneLineParser
from moco.config import Config, flat
from moco.errors import InputError

Options = argparse.Namespace
Values = dict[str, object]  # by attribute name
OFF = (None, False, 0, [])  # values of an option that asks for nothing


class Rule(NamedTuple):
    """Options that have an effect only in some combinations; see `has_effect`."""

    options: tuple[str, ...]  # attribute names
    when: Callable[[Options], object]
    why: str
    refuse: bool


class ParserOfEffects(OneLineParser):
    """A parser that refuses, or reports, options without effect.

    Attributes:
        given: the options on the command line.
        recipe: the values of --cfg.
        own: the script's defaults.
    """

    given: Values
    recipe: Values
    own: Values

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.rules: list[Rule] = []

    def has_effect(
        self, options: str, when: Callable[[Options], object], why: str, refuse: bool = True
    ) -> None:
        """Declare that options do nothing unless `when(args)`, called after the script's check.

        Args:
            options: their attribute names.
            why: completes "--option has no effect: ", and says what to do.
            refuse: whether such an option on the command line is an error if it differs from its
                default. Otherwise a line says that it has no effect.
        """
        self.rules.append(Rule(tuple(options.split()), when, why, refuse))

    def without_effect(self, config: Config) -> list[str]:
        """Return a line for each rule by which options of the last `parse` have no effect.

        Raises InputError if such a rule refuses. Skips switches that are off and values of 0. Of a
        recipe's values (--cfg), skips those equal to the default and those whose rule does not refuse.
        """
        args = Options(**flat(config), config=config)
        refused, noted = [], []
        for rule in self.rules:
            given = [dest for dest in rule.options if self.given.get(dest) not in OFF]
            found = [
                dest
                for dest in rule.options
                if rule.refuse and dest not in self.given and self._of_recipe(dest)
            ]
            if not (given or found) or rule.when(args):
                continue
            refuses = rule.refuse and any(self.given[dest] != self.own.get(dest) for dest in given)
            for dests, where, lines in (
                (given, "", refused if refuses else noted),
                (found, f" of {args.cfg}", noted),
            ):
                if dests:
                    names = ", ".join(self._name(dest) + where for dest in dests)
                    lines.append(
                        f"{names} {'has' if len(dests) == 1 else 'have'} no effect: {rule.why}"
                    )
        if refused:
            raise InputError(*refused)
        return noted

    def _of_recipe(self, dest: str) -> bool:
        """Return whether --cfg has set this option to another value than the script's default."""
        return self.recipe.get(dest) not in (*OFF, self.own.get(dest))

    def _name(self, dest: str) -> str:
        """Return the option that sets `args.dest`."""
        names = (
            name
            for action in self._actions
            if action.dest == dest
            for name in action.option_strings or [action.metavar]
        )
        return next(name for name in names if not re.fullmatch("-.|--no-.*", name))
