"""Parse the command line of a script into its config, with defaults from a YAML file."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from moco.cli import compat, folders, protocols, rules, translate
from moco.cli.actions import (
    TRUE_OR_FALSE,
    Help,
    Renamed,
    Switch,
    convert,
    is_number,
    refuse_two_values,
)
from moco.cli.effects import EffectsParser, Options, Values
from moco.cli.groups import add_groups
from moco.config import Config, flat, replaced
from moco.data import catalog
from moco.errors import InputError, nearest, short, unknown
from moco.files import UnreadableError, read_yaml, refuse_remote
from moco.messages import print_rank0

PATIENCE = 10  # seconds for the first process of torchrun to print its error

# keys that a YAML file may have although the script has no such option: args.yaml has all settings,
# and `lincls` in a recipe names the recipe of the linear probe
_NOT_OPTIONS = set(
    "cfg script method encoder-method pretrain-epochs views nodes batch-per-process "
    "batch-is-per-process batch-is-of-all-nodes lincls".split()
)
MOST_LINES = 20  # lines about the unknown keys of one file
_UNSET = object()
_INSTALLED = Path(__file__).parents[1] / "configs"  # of a wheel; a clone has configs/ at its root
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "configs"


class Parser(EffectsParser):
    """The parser of a script's options. In the names of options, `-` and `_` are the same.

    Args:
        description: the script's docstring, which --help shows.
        config: the script's default settings; their fields are its options.
        replacements: advice by option, for options of a published script that this one lacks.
            Names have no leading dashes.
    """

    def __init__(
        self, description: str, config: Config, replacements: dict[str, str] | None = None
    ):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)
        self.config, self.replacements = config, replacements or {}
        self.aliases: list[argparse.Action] = []  # further names of options
        add_groups(self, config)
        evaluates = "pretrained" in flat(config)
        unread = "--save-dir names the run folder" + " and --pretrained the checkpoint" * evaluates
        unread += "; leave out either"
        self.has_effect("output tag", self._reads_output, unread)
        for declare in rules.section_rules(config):
            declare(self)

    def add_aliases(self, names: dict[str, str]) -> None:
        """Add further names for options.

        Args:
            names: the option for each further name, both without leading dashes.
        """
        actions = {name: action for action in self._actions for name in action.option_strings}
        for published, ours in names.items():
            mine = actions[f"--{ours}"]
            conversion = {"type": mine.type} if mine.nargs != 0 else {"action": "store_true"}
            alias = self.add_argument(
                f"--{published}",
                dest=mine.dest,
                default=mine.default,
                help=argparse.SUPPRESS,
                **conversion,
            )
            self.aliases.append(alias)

    def add_renamed(self, name: str, ours: str, values: dict[str, str]) -> None:
        """Add an option of a published script whose values have other names here.

        Args:
            name: its name, without leading dashes.
            ours: the option that it sets, without leading dashes.
            values: the value of `ours` for each of its values.
        """
        alias = self.add_argument(
            f"--{name}",
            dest=ours.replace("-", "_"),
            default=self.get_default(ours.replace("-", "_")),
            help=argparse.SUPPRESS,
            action=Renamed,
            values=values,
        )
        self.aliases.append(alias)

    def refuse(self, error: InputError) -> NoReturn:
        """Print the error and exit with status 2.

        If torchrun started the processes, all of them usually have the same error. The first one of
        each node prints it, and torchrun then ends the others. These wait for that. They must not
        exit before, because torchrun would end the first one instead.
        """
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if str(error) and "TORCHELASTIC_RUN_ID" in os.environ and not first:
            time.sleep(PATIENCE)
        super().refuse(error)

    def _reads_output(self, args: Options) -> bool:
        """Return whether --output determines the run folder, or the checkpoint to evaluate."""
        finds = hasattr(args, "pretrained") and "pretrained" not in self.given
        return finds or "save_dir" not in self.given

    def parse(self, argv: Sequence[str] | None = None) -> Config:
        """Return the settings that the command line gives.

        Args:
            argv: words of the command line; by default those of this process.

        Raises InputError for an unknown option, an invalid value, or an invalid YAML file.
        """
        names = self.names()
        self.add_aliases(
            {
                name: ours
                for name, ours in compat.ALIASES.items()
                if f"--{name}" not in names and f"--{ours}" in names
            }
        )
        argv = [self._canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
        self.refuse_empty(argv)
        translate.refuse_fnc(argv)
        argv = self._read_opts(argv)
        argv = self._folder_first(argv)
        self.own = {action.dest: action.default for action in self._actions}
        self.recipe: Values = {}  # from --cfg
        named = self.parse_known_args(argv, Options(**dict.fromkeys(self.own, _UNSET)))[0]
        self.given: Values = {
            dest: value for dest, value in vars(named).items() if value is not _UNSET
        }
        refuse_two_values(self, self.aliases, argv)
        first, _ = self.parse_known_args(argv)
        self._refuse_remote(first)
        if first.cfg:
            self._defaults_from(first.cfg)
        args, rest = self.parse_known_args(argv)
        self._refuse_remote(args)
        self._refuse_rest(args, rest)
        tests = getattr(args, "evaluate", False)
        if not tests and protocols.apply(f"main_{self._script()}", vars(args)):
            self._defaults_of_protocol(args)
            args = self.parse_known_args(argv)[0]
        config = self._config_of(args)
        if note := protocols.note_batch(config, self.given):
            print_rank0(note)
        return folders.resolve_output(config) if args.output else config

    def _refuse_rest(self, args: Options, rest: list[str]) -> None:
        """Raise InputError for the words `rest` of the command line that argparse did not take."""
        if unknown_ones := self.unknown(
            token.split("=")[0] for token in rest if token.startswith("-")
        ):
            raise InputError(*unknown_ones)
        for token in rest:
            expected = "one data folder is expected, options start with --"
            if getattr(args, "allow_change", None):
                expected += "; several names of --allow-change are joined by commas: lr,wd"
            raise InputError(f"unexpected argument '{token}'; {expected}")

    def _config_of(self, args: Options) -> Config:
        """Return the config of a parsed command line. Raises InputError if words contradict."""
        if args.data and args.data_option and args.data != args.data_option:
            raise InputError(
                f"two data folders: '{args.data}' and --data {args.data_option}; give one"
            )
        args.data = args.data_option or args.data
        named = args.data == "photos" or args.dataset != "imagenet"
        if named and self.given.get("file_list"):  # before a data set is downloaded
            raise InputError(f"--file-list has no effect: {rules.TWO_SOURCES}")
        if args.data is None and not getattr(args, "load_features", None):
            self._take_own_folder(args)
        del args.data_option
        args.script = self._script()
        if args.tag and not args.output:
            raise InputError(
                f"--tag {args.tag}: needs --output DIR, the folder that contains the tag; "
                "give --output, or use --save-dir"
            )
        return replaced(self.config, **vars(args))

    def _take_own_folder(self, args: Options) -> None:
        """Set the data folder to ./data. Turn on --download if --dataset can be downloaded.

        With --file-list, set it to the folder of the list. Raises InputError for ImageNet and
        photos, whose folder must be given.
        """
        file_list = getattr(args, "file_list", None)
        if args.dataset == "imagenet" and file_list:
            args.data = os.path.dirname(os.path.abspath(file_list))
            return
        if args.dataset in ("imagenet", "photos"):
            raise InputError("no data folder: give DIR (with train/ and val/), or the word photos")
        args.data, args.download = "./data", catalog.is_downloadable(args.dataset)
        loaded = ", and downloaded to it unless it is there" if args.download else ""
        print_rank0(f"no data folder is given: {args.dataset} is read from ./data{loaded}")

    def _defaults_of_protocol(self, args: Options) -> None:
        """Take the settings of a paper's protocol as defaults, and print which one and why.

        A recipe of --cfg takes the place of the protocol. If both are given, the settings of the
        recipe take precedence over those of the protocol.

        Args:
            args: the command line, parsed with the defaults of --cfg.
        """
        named = self.given.get("protocol")
        if self.has_settings and named is None:
            name = args.protocol and f" {args.protocol}"
            print_rank0(f"protocol{name or ''}: the settings of {args.cfg} (--cfg)")
            return
        settings = vars(args)
        if args.output and not (args.pretrained or getattr(args, "load_features", None)):
            run = folders.resolve_output(replaced(self.config, output=args.output, tag=args.tag))
            settings = {**settings, "pretrained": flat(run)["pretrained"]}
        protocol, why = protocols.choose(f"main_{self._script()}", settings, self.given)
        recipe = protocol.recipe and f" (configs/{protocol.recipe})"
        wins = f"; the settings of {args.cfg} win (--cfg)" if self.has_settings else ""
        print_rank0(f"protocol {protocol.name}{recipe}: {why}{wins}")
        of_cfg, self.recipe = self.recipe, {}
        if protocol.recipe:
            self._defaults_from(str(RECIPES / protocol.recipe))
        if protocol.every_gpu:
            self.recipe["multiprocessing_distributed"] = None
        self.recipe |= {**of_cfg, "protocol": protocol.name}
        self.set_defaults(**self.recipe)

    def _refuse_remote(self, args: Options) -> None:
        """Raise InputError if a path is a URL."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if isinstance(value, str) and action.dest != "dist_url":
                refuse_remote(value, next(iter(action.option_strings), ""))

    def _script(self) -> str:
        return Path(self.prog).stem.removeprefix("main_")

    def _read_opts(self, argv: list[str]) -> list[str]:
        """Return the words of a command line, with --opts KEY VALUE ... replaced by options.

        These come first, so that the other options take precedence, as in Swin-style scripts.
        """
        if "--opts" not in argv:
            return argv
        start = argv.index("--opts")
        rest = argv[start + 1 :]
        each = self.config.input.batch_is_per_process
        options, taken = translate.read_opts(rest, self.names(), each)
        print_rank0(f"--opts is read as: {' '.join(options) or 'no option'}")
        return [*options, *argv[:start], *rest[taken:]]

    def unknown(
        self, names: Iterable[str], noun: str = "option", known: Iterable[str] = ()
    ) -> list[str]:
        """Return an error line for each unknown name.

        Each line says what to use instead, or suggests the nearest known name.

        Args:
            names: the unknown names.
            noun: "option", or "key" of a YAML file.
            known: the names to suggest; by default those of this parser's options.
        """
        known = list(known) or self.names()
        lines = []
        for name in dict.fromkeys(names):
            bare = name.lstrip("-").replace("_", "-").lower()
            others = (bare, bare.removeprefix("no-"), bare.removeprefix("no"))
            found = (
                self.replacements.get(other) or compat.replacement(other, self.names())
                for other in others
            )
            instead = next(filter(None, found), None)
            lines.append(f"{name}: {instead}" if instead else str(unknown(noun, name, known)))
        return lines

    def _canonical(self, token: str) -> str:
        """Return a word with `-` for `_` in an option's name: --n_hard=5 becomes --n-hard=5."""
        if not token.startswith("--"):
            return token
        name, equals, value = token.partition("=")
        return name.replace("_", "-") + equals + value

    def _folder_first(self, argv: list[str]) -> list[str]:
        """Return the words with the data folder first.

        Otherwise argparse would read DIR in `--schedule 120 160 DIR` as one more epoch.
        """
        switches = {
            name
            for action in self._actions
            if isinstance(action, Switch)
            for name in action.option_strings
        }
        several = (action for action in self._actions if action.nargs in ("*", "+") and action.type)
        numbers = switches | {name for action in several for name in action.option_strings}
        folders: list[str] = []
        rest: list[str] = []
        option = ""
        for token in argv:
            is_value = is_number(token) or (option in switches and token.lower() in TRUE_OR_FALSE)
            is_folder = option in numbers and not token.startswith("-") and not is_value
            (folders if is_folder else rest).append(token)
            if token.startswith("-") and not is_number(token):
                option = token
        return folders + rest

    def _defaults_from(self, path: str) -> None:
        """Read defaults from a YAML file. Raises InputError if it cannot be read or has errors."""
        try:
            values = read_yaml(path)
        except InputError as error:
            advice = f"; give a recipe, such as those in {RECIPES}, or a run's args.yaml"
            if not Path(path).exists() and (near := _nearest_recipe(Path(path))):
                advice = f"; the nearest recipe is {near}"
            is_other = isinstance(error, UnreadableError) or str(error).startswith("not ")
            raise InputError(f"--cfg {path}: {error}{advice * is_other}") from None
        script = values.get("script", self._script())
        # a program that only reads a script's options, such as a benchmark, has another name
        if script != self._script() and self.prog.startswith("main_"):
            raise InputError(
                f"--cfg {path}: holds the options of main_{short(str(script))}.py, "
                "which has other options; use that script"
            )
        self.of_args_yaml, self.recipe_name = "script" in values, path
        self.has_settings = True
        given = ((name, action) for action in self._actions for name in action.option_strings)
        actions = {
            name.removeprefix("--"): action
            for name, action in given
            if not name.startswith("--no-")
        }
        actions["data"] = next(action for action in self._actions if action.dest == "data")
        # An evaluation may be given the recipe of a pre-training, which names the probe's recipe.
        if "lincls" in values and "pretrained" in actions:
            recipe = values.get(self._script())
            if recipe:
                self._defaults_from(str(Path(path).parent / str(recipe)))
                self.recipe["protocol"] = protocols.name_of(str(recipe))
            self.has_settings = bool(recipe)
            values = {key: values[key] for key in ("arch", "image-size") if key in values}
        names = {str(key).replace("_", "-"): key for key in values}
        known = {*actions, *_NOT_OPTIONS}
        if self.of_args_yaml:  # it has every setting, also those that are no option of the script
            known |= {name.replace("_", "-") for name in flat(self.config)}
        strange = [str(key) for name, key in names.items() if name not in known]
        if strange:
            lines = self.unknown(strange[:MOST_LINES], "key", actions)
            lines += [f"and {len(strange) - MOST_LINES} more unknown keys"] * (
                len(strange) > MOST_LINES
            )
            raise InputError(*(f"--cfg {path}: {line}" for line in lines))
        keys: dict[str, str] = {}  # by attribute name
        for name, key in names.items():
            if name in ("resume", "allow-change") and "script" in values:
                continue  # args.yaml: these only say how the run was last started
            if name not in actions:
                continue
            dest = actions[name].dest
            value = convert(actions[name], values[key], f"--cfg {path}: {key}")
            if dest in keys and value != self.recipe[dest]:
                raise InputError(
                    f"--cfg {path}: {keys[dest]} and {key} are the same option, and their values "
                    "differ; leave out one of them"
                )
            keys[dest], self.recipe[dest] = key, value
        self.set_defaults(**self.recipe)


def _nearest_recipe(path: Path) -> Path | None:
    """Return the recipe that is probably meant by `path`, or None.

    A recipe whose words are all in the name of `path` comes before one with a similar name.
    """
    folder = RECIPES / path.parent.name  # such as cifar10
    recipes = {file.stem: file for file in (folder if folder.is_dir() else RECIPES).glob("*.yaml")}
    words = set(path.stem.replace("-", "_").split("_"))
    within = [name for name in sorted(recipes) if words.issuperset(name.split("_"))]
    near = max(within, key=len) if within else nearest(path.stem, sorted(recipes))
    return recipes[near] if near else None
