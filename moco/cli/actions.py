"""Parse and show the values of options: switches, the help page, and values from YAML."""

import argparse

from moco.errors import InputError, short


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """The formatter of --help, which shows each default unless it is None, False or []."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show a switch's values after --name, not after --no-name."""
        if not isinstance(action, Switch):
            return super()._format_action_invocation(action)
        name, negated = action.option_strings
        return f"{name} [{action.metavar}], {negated}"


TRUE_OR_FALSE = ("true", "false")


class Switch(argparse.BooleanOptionalAction):
    """An option that is given as --name, --no-name, --name 1 or --name 0.

    The papers' scripts use both forms.

    Args:
        max_level: the largest number that the option accepts; 1 for true and false only.
    """

    def __init__(self, *args, max_level: int = 1, **more):
        super().__init__(*args, **more)
        self.nargs, self.max_level = "?", max_level
        self.metavar = "|".join(map(str, range(max_level + 1)))

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ARG002
        """Set the switch to the value given after it; without a value, --name is 1, --no-name 0."""
        negated = option_string.startswith("--no-")
        if negated and values is not None:
            raise argparse.ArgumentError(self, f"{option_string} takes no value")
        try:
            setattr(namespace, self.dest, not negated if values is None else self.level(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None

    def level(self, value: object) -> bool | int:
        """Convert a word or YAML value. Raises ValueError if the switch does not accept it."""
        word = str(value).lower()
        if word in TRUE_OR_FALSE:
            return word == "true"
        if word not in self.metavar.split("|"):
            raise ValueError(f"{short(repr(value))} is not one of {self.metavar}, true or false")
        return int(word) if self.max_level > 1 else word == "1"


class Renamed(argparse.Action):
    """An option of a published script that sets an option here, whose values have other names.

    Args:
        values: our value for each of the published ones.
    """

    def __init__(self, *args, values: dict[str, str], **more):
        super().__init__(*args, **more)
        self.values = values

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ARG002
        """Set our option."""
        try:
            setattr(namespace, self.dest, self.ours(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None

    def ours(self, value: object) -> str:
        """Convert a word or YAML value. Raises ValueError if it is not one of the published."""
        if str(value) not in self.values:
            raise ValueError(f"{short(repr(value))} is not {' or '.join(self.values)}")
        return self.values[str(value)]


def refuse_two_values(
    parser: argparse.ArgumentParser, aliases: list[argparse.Action], argv: list[str]
) -> None:
    """Raise InputError if two names of one option are given with different values.

    Args:
        parser: the parser of the options.
        aliases: those of its actions that are further names of other options.
        argv: the words of the command line.
    """
    dests = {alias: alias.dest for alias in aliases}
    for alias in aliases:
        alias.dest = alias.option_strings[0]  # no option has such a dest
    try:
        unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
        values = vars(parser.parse_known_args(argv, unset)[0])
    finally:
        for alias, dest in dests.items():
            alias.dest = dest
    seen: dict[str, str] = {}  # a given alias of each option, by attribute name
    for alias, dest in dests.items():
        name, ours = alias.option_strings[0], f"--{dest.replace('_', '-')}"
        value, own = values[name], values[dest]
        if value is None:
            continue
        other = seen.setdefault(dest, name)
        if own is not None and own != value:
            conflict = f"{ours} is also given, as {own}"
        elif values[other] != value:
            conflict = f"{other} sets it to {values[other]}"
        else:
            continue
        raise InputError(f"{name} sets {ours} to {value}, but {conflict}; leave out one of them")


def is_number(text: str) -> bool:
    """Return whether `text` can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def convert(action: argparse.Action, value: object, where: str) -> object:
    """Convert a YAML value as if it were given on the command line.

    Args:
        action: the option.
        value: a value, or a list of them; None stands for the option's default.
        where: the file and key, with which error messages begin.

    Raises InputError if the option does not take the value.
    """
    if value is None:
        return action.default
    if "" in (value if isinstance(value, list) else [value]):
        raise InputError(f"{where}: is empty; leave it out, or give a value")
    if isinstance(action, Switch | Renamed):
        try:
            return action.level(value) if isinstance(action, Switch) else action.ours(value)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    word = {False: "off", True: "on"}.get(value) if isinstance(value, bool) else None
    if word in (action.choices or ()):  # YAML reads off as false, and on as true
        value = word
    is_flag = action.nargs == 0
    is_list = action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 0)
    if action.nargs == "+" and not isinstance(value, (list, bool)):
        value = [value]  # a single value need not be written as a list
    if is_flag != isinstance(value, bool) or is_list != isinstance(value, list):
        raise InputError(f"{where}: {_yaml(value)} is not {_expected(action)}")
    if is_flag:
        return value
    if is_list and isinstance(action.nargs, int) and len(value) != action.nargs:
        raise InputError(f"{where}: {_yaml(value)} is not {_expected(action)}")

    def one(item: object) -> object:
        try:
            item = action.type(str(item)) if action.type else str(item)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {error}") from None
        except ValueError:
            raise InputError(f"{where}: {_yaml(item)} is not {_value(action)}") from None
        if action.choices and item not in action.choices:
            raise InputError(f"{where}: {_yaml(item)} is not {_value(action)}")
        return item

    return [one(item) for item in value] if is_list else one(value)


def _yaml(value: object) -> str:
    """Return a value as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else short(repr(value))


def _expected(action: argparse.Action) -> str:
    """Return what a YAML file may give for an option, such as "one of off, bf16"."""
    if action.nargs == 0:
        return "true or false"
    if isinstance(action.nargs, int):
        return f"a list of {action.nargs}, each {_value(action)}"
    if action.nargs in ("*", "+"):
        return f"a list of values, each {_value(action)}"
    return _value(action)


def _value(action: argparse.Action) -> str:
    """Return what a single value of an option may be."""
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    name = getattr(action.type, "__name__", "")
    noun = {"int": "a whole number", "float": "a number"}.get(name, "text")
    interval = getattr(action.type, "interval", "")
    return f"{noun} in {interval}" if interval else noun
