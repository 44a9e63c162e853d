"""How option values are parsed and shown: switches, help, and values from YAML."""

import argparse

from moco.errors import InputError, short


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, except where there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """A switch's value belongs to its name, not to --no-name."""
        if not isinstance(action, Switch):
            return super()._format_action_invocation(action)
        name, negated = action.option_strings
        return f"{name} [{action.metavar}], {negated}"


TRUE_OR_FALSE = ("true", "false")


class Switch(argparse.BooleanOptionalAction):
    """--name, --no-name, and as some papers' scripts have it --name 1, --name 0; with `most` above 1 also --name 2."""

    def __init__(self, *args, most: int = 1, **more):
        super().__init__(*args, **more)
        self.nargs, self.most, self.metavar = "?", most, "|".join(map(str, range(most + 1)))

    def __call__(self, parser, namespace, values, option_string=None):
        negated = option_string.startswith("--no-")
        if negated and values is not None:
            raise argparse.ArgumentError(self, f"{option_string} takes no value")
        try:
            setattr(namespace, self.dest, not negated if values is None else self.level(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None

    def level(self, value: object) -> bool | int:
        """What the value stands for; raises ValueError."""
        word = str(value).lower()
        if word in TRUE_OR_FALSE:
            return word == "true"
        if word not in self.metavar.split("|"):
            raise ValueError(f"{short(repr(value))} is not one of {self.metavar}, true or false")
        return int(word) if self.most > 1 else word == "1"


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def convert(action: argparse.Action, value: object, where: str) -> object:
    """A YAML value as the option would have it."""
    if value is None:
        return action.default
    if "" in (value if isinstance(value, list) else [value]):
        raise InputError(f"{where}: is empty; leave it out, or give a value")
    if isinstance(action, Switch):
        try:
            return action.level(value)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    word = {False: "off", True: "on"}.get(value) if isinstance(value, bool) else None
    if word in (action.choices or ()):  # YAML reads off as false, and on as true
        value = word
    is_flag = action.nargs == 0
    many = action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 0)
    if action.nargs == "+" and not isinstance(value, (list, bool)):
        value = [value]  # one or more: one need not be written as a list
    if is_flag != isinstance(value, bool) or many != isinstance(value, list):
        raise InputError(
            f"{where}: {short(repr(value))} is not {'true or false' if is_flag else 'a list' if many else 'one value'}"
        )
    if is_flag:
        return value
    if many and isinstance(action.nargs, int) and len(value) != action.nargs:
        raise InputError(f"{where}: {short(repr(value))} is not a list of {action.nargs}")

    def one(item: object) -> object:
        try:
            item = action.type(str(item)) if action.type else str(item)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {error}") from None
        except ValueError:
            raise InputError(
                f"{where}: {short(repr(item))} is not {getattr(action.type, '__name__', 'valid')}"
            ) from None
        if action.choices and item not in action.choices:
            raise InputError(
                f"{where}: {short(repr(item))} is not one of {', '.join(map(str, action.choices))}"
            )
        return item

    return [one(item) for item in value] if many else one(value)
