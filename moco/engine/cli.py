"""The command line: option groups that scripts share, YAML defaults, and errors of one line with status 2."""

import argparse
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from moco import devices, user
from moco.augment import recipes
from moco.data import cache, named
from moco.encoder import timm_networks
from moco.encoder.networks import ARCHS, STEMS, check_arch
from moco.engine import checkpoint, compat, interrupt, launch, optim, output, precision, resume, run_folder, values
from moco.engine.log import say
from moco.engine.tool import OneLineParser
from moco.errors import InputError, of_file, short, unknown
from moco.files import read_yaml, refuse_remote
from moco.loss.synthetic import Synthetic

Options = argparse.Namespace
Values = dict[str, object]  # by attribute name

# what a run's args.yaml holds beside its options
_NOT_OPTIONS = set("cfg script method encoder-method pretrain-epochs views nodes batch-per-process batch-is-per-process".split())
_NOT_OPTIONS.add("lincls")  # and a recipe: the one of that script that goes with it


MOST_LINES = 20  # on unknown keys of one file


class _Help(argparse.ArgumentDefaultsHelpFormatter):
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


class Rule(NamedTuple):
    """Options that have an effect only in some combinations; see `Parser.has_effect`."""

    options: tuple[str, ...]  # attribute names
    when: Callable[[Options], object]
    why: str
    refuse: bool


_UNSET = object()
OFF = (None, False, 0, [])
_WORDS = ("true", "false")


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
        if word in _WORDS:
            return word == "true"
        if word not in self.metavar.split("|"):
            raise ValueError(f"{short(repr(value))} is not one of {self.metavar}, true or false")
        return int(word) if self.most > 1 else word == "1"


class Parser(OneLineParser):
    """argparse in which `-` and `_` in option names are the same, `--cfg` gives defaults, and an error is one line.

    `elsewhere` says of options of a published script that this one does not have, without their dashes, what to use instead.
    """

    def __init__(self, description: str, elsewhere: dict[str, str] | None = None):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)
        self.elsewhere = elsewhere or {}
        self.rules: list[Rule] = []
        run = self.add_argument_group("run")
        run.add_argument("data", nargs="?", metavar="DIR", help="folder with train/ and val/, or photos: the built-in data set")
        run.add_argument("--data", "--data-path", dest="data_option", metavar="DIR", help="the same as DIR")
        run.add_argument("--cfg", metavar="FILE.yaml", help="defaults by option name; options given here win")
        run.add_argument("--save-dir", metavar="DIR", help="run folder; by default runs/<script>-<arch>-<time>")
        run.add_argument("--output", metavar="DIR", help="run folder DIR/TAG, and of evaluations of that run")
        run.add_argument("--tag", help="of the run, in the folder of --output; by default the word default")
        two = "--save-dir names the run folder (and --pretrained the checkpoint); leave it out"
        self.has_effect("output tag", self._reads_output, two)
        run.add_argument("--seed", type=values.seed, default=0, help="seed of weights, image order, views and negatives")

    def also_named(self, names: dict[str, str]) -> None:
        """Give options, without their dashes, further names: those of a published script."""
        actions = {name: action for action in self._actions for name in action.option_strings}
        for published, ours in names.items():
            mine = actions[f"--{ours}"]
            kind = {"type": mine.type} if mine.nargs != 0 else {"action": "store_true"}
            self.add_argument(f"--{published}", dest=mine.dest, default=mine.default, help=argparse.SUPPRESS, **kind)

    def has_effect(self, options: str, when: Callable[[Options], object], why: str, refuse: bool = True) -> None:
        """Declare that options do nothing unless `when(args)`, called after the script's check.

        Args:
            options: their attribute names.
            why: completes "--option has no effect: ", and says what to do.
            refuse: whether such an option on the command line is an error if it differs from its
                default. Otherwise a line says that it has no effect.
        """
        self.rules.append(Rule(tuple(options.split()), when, why, refuse))

    def without_effect(self, args: Options) -> list[str]:
        """Return a line for each rule by which options of the last `parse` have no effect.

        Raises InputError if such a rule refuses. Skips switches that are off and values of 0. Of a
        recipe's values (--cfg), skips those equal to the default and those whose rule does not refuse.
        """
        refused, noted = [], []
        for rule in self.rules:
            given = [dest for dest in rule.options if self.given.get(dest) not in OFF]
            found = [dest for dest in rule.options if rule.refuse and dest not in self.given and self._of_recipe(dest)]
            if not (given or found) or rule.when(args):
                continue
            refuses = rule.refuse and any(self.given[dest] != self.own.get(dest) for dest in given)
            for dests, where, lines in ((given, "", refused if refuses else noted), (found, f" of {args.cfg}", noted)):
                if dests:
                    names = ", ".join(self._name(dest) + where for dest in dests)
                    lines.append(f"{names} {'has' if len(dests) == 1 else 'have'} no effect: {rule.why}")
        if refused:
            raise InputError(*refused)
        return noted

    def refuse(self, error: InputError) -> NoReturn:
        """Print the error and exit with status 2.

        Of the processes that torchrun has started, one of each node prints it.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            error = InputError()
        super().refuse(error)

    def _reads_output(self, args: Options) -> bool:
        """Return whether --output is read, for the run folder or an evaluation's checkpoint."""
        finds = hasattr(args, "pretrained") and "pretrained" not in self.given
        return finds or "save_dir" not in self.given

    def _of_recipe(self, dest: str) -> bool:
        """Return whether --cfg has set this option to another value than the script's default."""
        return self.recipe.get(dest) not in (*OFF, self.own.get(dest))

    def _name(self, dest: str) -> str:
        """Return the option that sets `args.dest`."""
        names = (name for action in self._actions if action.dest == dest for name in action.option_strings or [action.metavar])
        return next(name for name in names if not re.fullmatch("-.|--no-.*", name))

    def parse(self, argv: Sequence[str] | None = None) -> Options:
        """Parse; raises InputError for an unknown option (it names the nearest) or a wrong YAML file."""
        names = self.names()
        self.also_named({name: ours for name, ours in compat.SAME.items() if f"--{name}" not in names and f"--{ours}" in names})
        argv = [self._canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
        self._refuse_opts(argv)
        self.refuse_empty(argv)
        argv = self._folder_first(argv)
        self.own = {action.dest: action.default for action in self._actions}
        self.recipe: Values = {}  # from --cfg
        named = self.parse_known_args(argv, Options(**dict.fromkeys(self.own, _UNSET)))[0]
        self.given: Values = {dest: value for dest, value in vars(named).items() if value is not _UNSET}
        first, _ = self.parse_known_args(argv)
        self._refuse_remote(first)
        if first.cfg:
            self._defaults_from(first.cfg)
        args, rest = self.parse_known_args(argv)
        self._refuse_remote(args)
        if unknown_ones := self.unknown(token.split("=")[0] for token in rest if token.startswith("-")):
            raise InputError(*unknown_ones)
        for token in rest:
            expected = "one data folder is expected, options start with --"
            if getattr(args, "allow_change", None):
                expected += "; several names of --allow-change are joined by commas: lr,wd"
            raise InputError(f"unexpected argument '{token}'; {expected}")
        if args.data and args.data_option and args.data != args.data_option:
            raise InputError(f"two data folders: '{args.data}' and --data {args.data_option}; give one")
        args.data = args.data_option or args.data
        if args.data is None and not getattr(args, "load_features", None):
            raise InputError("no data folder: give DIR (with train/ and val/), or the word photos")
        del args.data_option
        args.script = self._script()
        if args.tag and not args.output:
            raise InputError(f"--tag {args.tag}: names a folder in that of --output; give --output DIR, or --save-dir")
        if args.output:
            folder = _of_output(args)
            args.save_dir = args.save_dir or str(folder)
        return args

    def _refuse_remote(self, args: Options) -> None:
        """Raise InputError if a path is a URL."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if isinstance(value, str) and action.dest != "dist_url":
                refuse_remote(value, next(iter(action.option_strings), ""))

    def _script(self) -> str:
        return Path(self.prog).stem.removeprefix("main_")

    def _refuse_opts(self, argv: list[str]) -> None:
        """Raise InputError for --opts KEY VALUE ... of Swin-style scripts, that spells it in options of this one."""
        if "--opts" not in argv:
            return
        rest = argv[argv.index("--opts") + 1 :]
        given = list(itertools.takewhile(lambda token: not token.startswith("-") or _is_number(token), rest))
        meant = {key: self._option(key, value) for key, value in itertools.zip_longest(given[::2], given[1::2], fillvalue="")}
        strange = [key for key, option in meant.items() if option is None]
        spelled = f"give {' '.join(filter(None, meant.values()))} instead" if any(meant.values()) else "leave it out"
        no = f"; here is nothing like {', '.join(strange)}" if strange else ""
        raise InputError(f"--opts: each setting is an option of its own; {spelled}{no}")

    def _option(self, key: str, value: str) -> str | None:
        """How one setting of --opts is spelled here; None where this script has nothing like it."""
        form = _OPTS.get(key, "").replace("{half}", f"{float(value) / 2:g}" if _is_number(value) else "half of it")
        if form.split(" ")[0] not in self.names():
            return None
        if " " not in form:  # a switch
            return form if value.lower() in ("true", "1") else ""
        if key == "DATA.BATCH_SIZE" and not self.get_default("batch_is_per_process"):
            value += " x processes"
        return form.format(value)

    def unknown(self, names: Iterable[str], kind: str = "option", known: Iterable[str] = ()) -> list[str]:
        """Return a line for each unknown option: what to use instead, or the nearest option."""
        known = list(known) or self.names()
        lines = []
        for name in dict.fromkeys(names):
            bare = name.lstrip("-").replace("_", "-").lower()
            others = (bare, bare.removeprefix("no-"), bare.removeprefix("no"))
            found = (self.elsewhere.get(other) or compat.instead(other, self.names()) for other in others)
            instead = next(filter(None, found), None)
            lines.append(f"{name}: {instead}" if instead else str(unknown(kind, name, known)))
        return lines

    def _canonical(self, token: str) -> str:
        """--n_hard=5 -> --n-hard=5, where that is how the option is registered."""
        if not token.startswith("--"):
            return token
        name, equals, value = token.partition("=")
        return name.replace("_", "-") + equals + value

    def _folder_first(self, argv: list[str]) -> list[str]:
        """Move what is no number out of the options that may take one more: --schedule 120 160 DIR names a folder last."""
        switches = {name for action in self._actions if isinstance(action, Switch) for name in action.option_strings}
        several = (action for action in self._actions if action.nargs in ("*", "+") and action.type)
        numbers = switches | {name for action in several for name in action.option_strings}
        folders: list[str] = []
        rest: list[str] = []
        option = ""
        for token in argv:
            is_value = _is_number(token) or (option in switches and token.lower() in _WORDS)
            is_folder = option in numbers and not token.startswith("-") and not is_value
            (folders if is_folder else rest).append(token)
            if token.startswith("-") and not _is_number(token):
                option = token
        return folders + rest

    def _defaults_from(self, path: str) -> None:
        try:
            values = read_yaml(path)
        except InputError as error:
            raise InputError(f"--cfg {path}: {error}") from None
        given = ((name, action) for action in self._actions for name in action.option_strings)
        actions = {name.removeprefix("--"): action for name, action in given if not name.startswith("--no-")}
        actions["data"] = next(action for action in self._actions if action.dest == "data")
        if "lincls" in values and "pretrained" in actions:  # pre-training's, for an evaluation of it; may name this script's own
            if recipe := values.get(self._script()):
                self._defaults_from(str(Path(path).parent / str(recipe)))
            values = {key: values[key] for key in ("arch", "image-size") if key in values}
        names = {str(key).replace("_", "-"): key for key in values}
        strange = [str(key) for name, key in names.items() if name not in actions and name not in _NOT_OPTIONS]
        if strange:
            lines = self.unknown(strange[:MOST_LINES], "key", actions)
            lines += [f"and {len(strange) - MOST_LINES} more unknown keys"] * (len(strange) > MOST_LINES)
            raise InputError(*(f"--cfg {path}: {line}" for line in lines))
        for name, key in names.items():
            value = values[key]
            if name in ("resume", "allow-change") and "script" in values:
                continue  # not settings: they say how the run of this args.yaml was last started
            if name not in actions:
                continue
            self.recipe[actions[name].dest] = _convert(actions[name], value, f"--cfg {path}: {key}")
        self.set_defaults(**self.recipe)


# what Swin-style scripts call these in --opts
_OPTS = {
    "DATA.DATASET": "--dataset {}",
    "DATA.DATA_PATH": "--data {}",
    "DATA.BATCH_SIZE": "--batch-size {}",
    "DATA.IMG_SIZE": "--image-size {}",
    "DATA.NUM_WORKERS": "--workers {}",
    "LINEAR_EVAL.WEIGHTS": "--weights {}",
    "LINEAR_EVAL.PRETRAINED": "--pretrained {}",
    "MODEL.TYPE": "--method {}",
    "MODEL.RESUME": "--resume {}",
    "TRAIN.EPOCHS": "--epochs {}",
    "TRAIN.BASE_LR": "--lr {half} --learning-rate-scaling linear",  # x batch / 512 there, / 256 here
    "TRAIN.WEIGHT_DECAY": "--wd {}",
    "TRAIN.WARMUP_EPOCHS": "--lr-warmup-epochs {}",
    "TRAIN.CLIP_GRAD": "--clip-grad {}",
    "TRAIN.ACCUMULATION_STEPS": "--accumulation-steps {}",
    "TRAIN.USE_CHECKPOINT": "--grad-checkpoint",
    "SEED": "--seed {}",
}


def _of_output(args: Options) -> Path:
    """Return the run folder that --output and --tag name.

    An evaluation has one inside it, for its data set and protocol. It evaluates the last checkpoint
    of the outer one unless it is given another: this sets `args.pretrained`.
    """
    folder = Path(args.output) / (args.tag or "default")
    if hasattr(args, "pretrained"):
        features = getattr(args, "load_features", None)
        if not (args.pretrained or features or getattr(args, "evaluate", False)):
            saved = checkpoint.found(folder)
            if not saved:
                raise InputError(f"no checkpoint_*.pth.tar in {folder}: --output and --tag name no run that has saved one")
            args.pretrained = str(saved[0])
        data = "features" if features else "photos" if args.data == "photos" else args.dataset
        protocol = [str(getattr(args, name)) for name in ("weights", "train_percent") if hasattr(args, name)]
        folder /= "-".join([args.script, data, *protocol])
    return folder


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _convert(action: argparse.Action, value: object, where: str) -> object:
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
            raise InputError(f"{where}: {short(repr(item))} is not {getattr(action.type, '__name__', 'valid')}") from None
        if action.choices and item not in action.choices:
            raise InputError(f"{where}: {short(repr(item))} is not one of {', '.join(map(str, action.choices))}")
        return item

    return [one(item) for item in value] if many else one(value)


# Option groups that scripts share.


def add_launch(parser: Parser) -> None:
    """Add the options of the launch.

    A script whose --multiprocessing-distributed is None by default takes all GPUs.
    """
    group = parser.add_argument_group("launch (or use torchrun, torch.distributed.launch, srun)")
    where = "device to compute on; auto: the accelerator that PyTorch finds, else the CPU"
    one = f"{' and '.join(devices.ONE_PROCESS)} support a single process only"
    kinds = ("auto", *devices.TYPES)
    group.add_argument("--device", choices=kinds, default="auto", help=f"{where}; {one}")
    group.add_argument("--multiprocessing-distributed", action=Switch, default=False, help="start one process per GPU of this node")
    group.add_argument(
        "--nproc-per-node", type=values.processes, metavar="N", help="processes of this node (default: its GPUs; 1 on CPU)"
    )
    group.add_argument("--world-size", type=values.whole("[-1, 65536]"), default=-1, metavar="NODES", help="number of nodes")
    group.add_argument("--rank", type=values.whole("[-1, 65535]"), default=-1, metavar="NODE", help="this node's number, from 0")
    group.add_argument("--dist-url", default="auto", metavar="URL", help="where the processes meet; auto: a free port of this node")
    group.add_argument("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPU")
    group.add_argument("--gpu", type=values.natural, metavar="ID", help="use this GPU only")
    group.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    spawned = "it counts the processes that --multiprocessing-distributed starts; give both, or neither"
    parser.has_effect("nproc_per_node", lambda args: launch.plan(args).launcher == "spawn", spawned)
    own = "there are several processes, and each has a GPU of its own; leave it out"
    parser.has_effect("gpu", lambda args: launch.plan(args).local == 1, own)
    alone = "this is one process"
    parser.has_effect("dist_url", lambda args: launch.plan(args).url, alone, refuse=False)
    parser.has_effect("dist_backend", lambda args: launch.plan(args).url, alone, refuse=False)
    launcher = "the launcher says where processes meet and how many nodes there are"
    own_launch = ("spawn", "single")
    parser.has_effect("world_size rank", lambda args: launch.plan(args).launcher in own_launch, launcher, refuse=False)
    parser.has_effect("dist_url", lambda args: launch.plan(args).launcher != "torchrun", launcher, refuse=False)


def add_input(
    parser: Parser, batch: int, recipe: str | None, arch: str | None = "resnet50", *, transformers: bool = True, each: bool = False
) -> None:
    """What is read and how it is computed. `recipe` or `arch` None leaves the choice to the script.

    `transformers`: it may have other networks than ResNets; `each`: batch and workers are counted for each process.
    """
    group = parser.add_argument_group("input and computation" + (" (batch size and workers: of each process)" if each else ""))
    kinds = ", ".join(timm_networks.SHORT) + ", any other network of timm's, " if transformers else ""
    group.add_argument(
        "-a", "--arch", default=arch, help=f"{kinds}any torchvision ResNet" + ("" if arch else "; read from the checkpoint")
    )
    few = f"one for each core, here {launch.cores()}, divided among the processes of the node; at most {launch.WORKERS} for each"
    of = "of each process" if each else "of this node, split over its processes"
    group.add_argument("-b", "--batch-size", type=values.batch, default=batch, help=f"images in one pass {of}")
    group.add_argument("-j", "--workers", type=values.processes, help=f"loader processes {of} (default: {few})")
    group.add_argument(
        "--cache-images",
        choices=cache.MODES,
        default="auto",
        help="decode the images of a folder once and keep them in memory; auto: do so if they take "
        f"at most a quarter of the node's free memory, and at most {cache.MOST >> 30} GiB",
    )
    size = "" if arch else "; read from the checkpoint, else 224"
    group.add_argument(
        "--image-size",
        type=values.pixels,
        default=224 if arch else None,
        metavar="PIXELS",
        help="width and height of a full-size view" + size,
    )
    stems = "imagenet: a 7x7 convolution of stride 2 and max-pooling; cifar: a 3x3 convolution of "
    stems += "stride 1, for images of 32 or 64 pixels"
    found = "default: imagenet" if arch else "default: the checkpoint's, else imagenet"
    group.add_argument("--stem", choices=STEMS, help=f"first layers of a ResNet; {stems} ({found})")
    three = {"nargs": 3, "metavar": tuple("RGB")}
    whose = "the data set's" if arch else "the checkpoint's"
    normal = f"RGB values in [0, 1], to normalize images with (default: {whose}, else ImageNet's)"
    group.add_argument("--mean", type=values.mean, **three, help=f"mean of {normal}")
    group.add_argument("--std", type=values.std, **three, help=f"standard deviation of {normal}")
    only = "it is for torchvision's ResNets; leave it out"
    parser.has_effect("stem", lambda args: args.arch in ARCHS, only)
    group.add_argument("--recipe", default=recipe, help="views by name, see moco/augment/recipes.py")
    sigma = "range of the blur's standard deviation in pixels "
    sigma += "(default: the recipe's, scaled by --image-size / 224)"
    group.add_argument(
        "--blur-sigma",
        type=values.real("[0.01, 100]"),
        nargs=2,
        metavar=("LEAST", "MOST"),
        help=sigma,
    )
    blurs = "the recipe's views are not blurred; leave it out, or give another --recipe"
    # without a recipe, another rule says why there is none
    blurred = lambda args: not args.recipe or any(view.blur_p for view in recipes.of_options(args))  # noqa: E731
    parser.has_effect("blur_sigma", blurred, blurs)
    group.add_argument(
        "--crop-min",
        type=values.real("(0, 1]"),
        metavar="SHARE",
        help="smallest fraction of the image that a crop covers, instead of the recipe's",
    )
    group.add_argument(
        "--randaugment",
        type=values.whole("[0, 16]"),
        nargs=2,
        metavar=("N", "M"),
        help="operations and magnitude, 0 to 10, of RandAugment, instead of the recipe's; 0 0: none",
    )
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision; losses stay in fp32")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks and the colour operations")
    less = "run the blocks once more for the gradient: less memory"
    group.add_argument("--grad-checkpoint", "--use-checkpoint", action="store_true", help=less)
    group.add_argument("--class-list", metavar="FILE", help="use these class folders of DIR only; one name a line")
    group.add_argument(
        "--data-name", type=values.data_name, metavar="NAME", help="imagenet100 or imagenet1000: check that DIR has no more classes"
    )


def add_evaluation(parser: Parser) -> None:
    """Which encoder is evaluated, and on which data set."""
    group = parser.add_argument_group("encoder and data set")
    group.add_argument("--pretrained", metavar="FILE", help="checkpoint of any method here, or a MoCo, SogCLR, MoBY or bare file")
    add_data_set(parser, group)


def add_data_set(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """Add the options that name the data set and download it."""
    help = f"what lies in DIR, of {', '.join(named.NAMES)}"
    group.add_argument("--dataset", type=named.canonical, default="imagenet", metavar="NAME", help=help)
    group.add_argument("--download", action="store_true", help="fetch the data set into DIR first")
    folder = "DIR is a folder of images, used as it is; give --dataset NAME for a data set to fetch, or leave it out"
    parser.has_effect("download", lambda args: args.dataset not in ("imagenet", "photos"), folder)
    parser.has_effect("data_name", lambda args: args.dataset == "imagenet", "it is for folders of ImageNet; leave it out")
    photos = "the word photos already names the data set; for another one give its folder instead"
    parser.has_effect("dataset", lambda args: args.data != "photos" or parser.given.get("dataset") == "photos", photos)


def add_weights(parser: Parser, default: str) -> None:
    """Whether the encoder trains too."""
    group = parser.add_argument_group("weights")
    group.add_argument("--weights", choices=("freeze", "finetune"), default=default, help="of the encoder: kept, or trained too")
    frozen = "--weights freeze trains no block of the network; leave it out"
    parser.has_effect("grad_checkpoint", lambda args: args.weights == "finetune", frozen)


def add_choice(parser: Parser) -> None:
    """On what the best classifier is chosen."""
    group = parser.add_argument_group("choice")
    group.add_argument("-e", "--evaluate", action="store_true", help="only test the classifier of --resume")
    trains = "epochs optimizer lr lr_backbone lr_classifier learning_rate_scaling wd schedule cos lr_by sgdr sgdr_t0 lr_final"
    trains += " lr_warmup_epochs momentum clip_grad nesterov accumulation_steps print_freq save_every_steps on_bad_image"
    trains += " recipe crop_min randaugment blur_sigma zero_init_classifier grad_checkpoint pretrained cache_images"
    only_tests = "--evaluate only tests the classifier of --resume"
    parser.has_effect(trains, lambda args: not args.evaluate, only_tests, refuse=False)
    last = "a classifier's last checkpoint and its best are kept, and no others; leave it out"
    parser.has_effect("save_every", lambda args: False, last)
    group.add_argument(
        "--val-from-train",
        type=values.real("(0, 1)"),
        metavar="FRACTION",
        help="of each class's training images, held out to choose the best classifier on; by default it is chosen on val/",
    )


def add_optimizer(
    parser: Parser, epochs: int, lr: float | list[float] | None, wd: float | list[float], schedule: list[int], cos: int = 1
) -> None:
    """How weights change, with a protocol's defaults; where those of `lr` and `wd` are lists, several of each may be given.

    `lr` None leaves the rate to the script; `cos` is the most that `--cos` may be.
    """
    several = isinstance(lr, list)
    number = {"type": values.learning_rate, "nargs": "+" if several else None}
    note = "; with several, a classifier for each in one pass" if several else ""
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=values.epochs, default=epochs)
    group.add_argument("--optimizer", choices=optim.OPTIMIZERS, default="sgd", help="sgd and lars with --momentum")
    if lr is not None:
        scale = "as it is, unless --learning-rate-scaling says otherwise" + note
        group.add_argument("--lr", "--learning-rate", **number, metavar="LR", default=lr, help=scale)
    group.add_argument(
        "--learning-rate-scaling",
        choices=optim.SCALINGS,
        default="none",
        help="x sqrt(total batch), x total batch / 256",
    )
    number["type"] = values.decay
    group.add_argument("--wd", "--weight-decay", dest="wd", **number, metavar="WD", default=wd, help="weight decay" + note)
    group.add_argument(
        "--schedule", type=values.natural, nargs="*", default=schedule, metavar="EPOCH", help="lr x .1 at these epochs"
    )
    group.add_argument("--cos", action=Switch, most=cos, default=False, help="cosine schedule instead")
    group.add_argument(
        "--lr-by",
        choices=("epoch", "epoch-end", "step"),
        default="epoch",
        help="when the learning rate is computed: at each epoch's start, for each epoch's end, or at each step",
    )
    group.add_argument("--sgdr", action=Switch, default=False, help="cosine schedule that begins anew (warm restarts)")
    group.add_argument("--sgdr-t0", type=values.epochs, default=12, metavar="EPOCHS", help="length of each period of --sgdr")
    group.add_argument(
        "--lr-final",
        type=values.learning_rate,
        default=0.0,
        metavar="LR",
        help="learning rate at the end of a cosine; scaled like --lr",
    )
    group.add_argument("--lr-warmup-epochs", type=values.natural, default=0, help="epochs of linear learning-rate warm-up")
    group.add_argument("--momentum", type=values.momentum, default=0.9)
    group.add_argument(
        "--clip-grad", type=values.real("[0, 1000000]"), default=0.0, metavar="NORM", help="maximum gradient norm; 0: no clipping"
    )
    group.add_argument("--nesterov", action=Switch, default=False, help="Nesterov's momentum, of sgd")
    group.add_argument(
        "--accumulation-steps", type=values.positive, default=1, metavar="N", help="passes of --batch-size in one step"
    )

    def cosine(args: Options) -> bool:
        return args.cos or args.sgdr

    follows = "the learning rate follows a cosine (--cos, --sgdr); leave it out, or give --no-cos and --no-sgdr"
    parser.has_effect("schedule", lambda args: not cosine(args), follows)
    late = "the run ends before the first of these epochs"
    first = lambda args: min(args.schedule, default=0)  # noqa: E731
    parser.has_effect("schedule", lambda args: cosine(args) or first(args) < args.epochs, late, refuse=False)
    parser.has_effect("cos", lambda args: not args.sgdr, "--sgdr is a cosine of its own; give one of them")
    parser.has_effect("sgdr", lambda args: args.lr_by != "epoch-end", "--lr-by epoch-end is for --cos; leave out one of them")
    parser.has_effect("sgdr_t0", lambda args: args.sgdr, "it is the period of --sgdr; give both, or neither")
    parser.has_effect("lr_final", cosine, "it is where a cosine ends; give --cos as well, or leave it out")
    changes = "the learning rate changes at the epochs of --schedule alone; leave it out"
    parser.has_effect("lr_by", lambda args: cosine(args) or args.lr_warmup_epochs, changes)
    parser.has_effect("momentum", lambda args: args.optimizer != "adamw", "adamw has its own; leave it out")
    parser.has_effect("nesterov", lambda args: args.optimizer == "sgd", "it is for --optimizer sgd; leave it out")


def add_run(parser: Parser) -> None:
    """What is written while training, and from where to go on."""
    group = parser.add_argument_group("monitor")
    group.add_argument("-p", "--print-freq", type=values.positive, default=10, metavar="STEPS", help="steps between log lines")
    group.add_argument(
        "--resume",
        metavar="FILE",
        help="continue from this checkpoint as if the run had never stopped; auto: from the furthest one in the run folder, if any",
    )
    group.add_argument(
        "--allow-change",
        type=values.names,
        default=[],
        metavar="NAME,...",
        help="options that may differ from those of the run that --resume continues, such as lr,wd",
    )
    group.add_argument(
        "--save-every",
        type=values.positive,
        default=1,
        metavar="EPOCHS",
        help="epochs between checkpoints; the last epoch is always saved",
    )
    group.add_argument(
        "--on-bad-image",
        choices=("skip", "error"),
        default="skip",
        help="a training image that cannot be read is named, and another takes its place, up to 1 %% of an epoch; or the run ends",
    )
    inside = "also save inside epochs, every so many steps; 0: only if a signal stops the run"
    group.add_argument("--save-every-steps", type=values.natural, default=0, metavar="STEPS", help=inside)


def add_pretrain(parser: Parser, cos: int = 1, *, transformers: bool = False, each: bool = False) -> None:
    """The groups of every pre-training script, with MoCo's defaults; `cos` is `add_optimizer`'s, the others `add_input`'s."""
    add_input(parser, batch=256, recipe=None, transformers=transformers, each=each)
    add_data_set(parser, parser.add_argument_group("data set"))
    parser.set_defaults(batch_is_per_process=each)
    add_optimizer(parser, epochs=200, lr=0.03, wd=1e-4, schedule=[120, 160], cos=cos)
    add_run(parser)
    group = parser.add_argument_group("retention")
    newest = "keep the newest N epoch checkpoints; all, or 0: keep all"
    group.add_argument("--keep", type=values.keep, default=2, metavar="N", help=newest)
    group.add_argument(
        "--keep-every",
        type=values.natural,
        default=10,
        metavar="EPOCHS",
        help="also keep the checkpoint of every Nth epoch; 0: of none. The best by --knn-every is kept in any case",
    )
    group = parser.add_argument_group("k-NN monitor")
    group.add_argument(
        "--knn-every", type=values.natural, default=0, metavar="EPOCHS", help="report k-NN top-1 on val/, against train/"
    )
    group.add_argument("--knn-k", type=values.positive, default=20, metavar="K", help="neighbours that vote")
    group.add_argument("--knn-t", type=values.temperature, default=0.07, metavar="T", help="temperature of the neighbours' weights")
    whose = "features to compare: the encoder's without projection head, or the head's"
    group.add_argument("--knn-features", choices=("backbone", "head"), default="backbone", help=whose)
    monitor = "the k-NN monitor is off; give --knn-every EPOCHS as well, or leave it out"
    parser.has_effect("knn_k knn_t knn_features", lambda args: args.knn_every, monitor)
    add_launch(parser)


def add_feature_rules(parser: Parser) -> None:
    """Declare the options without effect in a script that classifies features."""
    centre = "this script sees the centre of each image, and trains nothing; leave it out"
    parser.has_effect("recipe crop_min randaugment blur_sigma grad_checkpoint", lambda args: False, centre)
    once = "this script reads each image once; leave it out"
    parser.has_effect("cache_images", lambda args: False, once)
    files = "batch_size workers image_size stem mean std amp compile data dataset download data_name seed"
    parser.has_effect(files, lambda args: not args.load_features, "features come from files (--load-features)", refuse=False)


def add_momentum_encoder(parser: Parser, t: float, v2: bool) -> None:
    """Query and key encoder, with temperature `t` and MoCo v1's or v2's head and views."""
    group = parser.add_argument_group("query and key encoder")
    group.add_argument("--moco-dim", type=values.width, default=128, help="feature size")
    group.add_argument("--moco-m", type=values.average, default=0.999, help="momentum of the key encoder")
    group.add_argument("--moco-t", type=values.temperature, default=t, help="softmax temperature")
    group.add_argument("--mlp", action=Switch, default=v2, help="two-layer head (v2)")
    group.add_argument("--aug-plus", action=Switch, default=v2, help="recipe mocov2 instead of mocov1")
    group.add_argument(
        "--bn-splits", type=values.positive, default=8, help="batch norm groups of the key encoder if one process trains alone"
    )
    both = "split the batch norm of the query encoder into --bn-splits groups, too"
    group.add_argument("--bn-splits-query", action=Switch, default=False, help=both)
    named = "--recipe names the views; leave it out"
    parser.has_effect("aug_plus", lambda args: args.recipe == ("mocov2" if args.aug_plus else "mocov1"), named)
    shuffled = "it is for a run of one process, and this run has several; leave it out"
    parser.has_effect("bn_splits bn_splits_query", lambda args: launch.plan(args).world == 1, shuffled)
    one = "--bn-splits 1 makes one group; leave out one of them"
    parser.has_effect("bn_splits_query", lambda args: args.bn_splits > 1, one)


def check_momentum_encoder(args: Options) -> None:
    """Choose the default recipe unless `--recipe` is given."""
    args.recipe = args.recipe or ("mocov2" if args.aug_plus else "mocov1")


_KINDS = ("interpolated", "extrapolated", "mixup", "noise", "perturbed", "adversarial")


def add_synthetic(parser: Parser, title: str, n_hard: int, each: int, sigma: float) -> argparse._ArgumentGroup:
    """Synthetic negatives, by default `each` of every kind; returns the group, for what only one script has."""
    group = parser.add_argument_group(title)
    group.add_argument("--n-hard", type=values.natural, default=n_hard, help="hardest queue entries, of which they are made")
    for i, name in enumerate(_KINDS, 1):
        group.add_argument(f"--n{i}", type=values.natural, default=each, help=f"{name} negatives per query")
    group.add_argument("--sigma", type=values.size, default=sigma, help="standard deviation of the noise")
    group.add_argument("--delta", type=values.size, default=0.01, help="size of the perturbation")
    group.add_argument("--eta", type=values.size, default=0.01, help="size of the adversarial step")
    for dest, n, name in (("sigma", "n4", "noise"), ("delta", "n5", "perturbed"), ("eta", "n6", "adversarial")):
        none = f"there are no {name} negatives; give --{n} as well, or leave it out"
        parser.has_effect(dest, lambda args, n=n: getattr(args, n), none)
    return group


def synthetic(args: Options, rows: int, option: str) -> Synthetic:
    """What these options ask for, of a queue of `rows` that `option` sets. Raises InputError where that cannot be."""
    counts = tuple(getattr(args, f"n{i}") for i in range(1, 7))
    if args.n_hard > rows:
        raise InputError(f"--n-hard {args.n_hard} is above the queue's {rows} rows ({option}); lower it")
    if any(counts) and not args.n_hard:
        raise InputError("synthetic negatives are made of the hardest queue rows: give --n-hard, as in --n-hard 1024")
    return Synthetic(args.n_hard, counts, args.sigma, args.delta, args.eta)


def writable(folder: str) -> None:
    """Raise InputError where a run folder cannot be made, or written to, before hours are spent on what goes there."""
    if folder != folder.encode(errors="replace").decode():
        raise InputError(f"--save-dir {folder}: is not UTF-8, which TensorBoard needs; choose another folder")
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"--save-dir {folder}: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--save-dir {folder}: {there} is read-only; choose another place")


def _in_own_folder(worker: launch.Worker, continues: bool, named: bool, args: Options, device: torch.device) -> None:
    """Run the worker while the run holds the lock of its folder."""
    with run_folder.claim(args, continues, named):
        worker(args, device)


def main(parser: Parser, check: Callable[[Options], None], worker: launch.Worker) -> None:
    """Parse, check, and run `worker(args, device)` in every process of the launch.

    `check` completes and refuses options before any process starts. An InputError becomes one line on stderr and exit
    status 2; a run that a signal has ended, after it has saved, exits with status 75, and one that has lost a process with 1.
    """
    user.prepare()
    output.guard()
    try:
        args = parser.parse()
        precision.choose(args)
        if args.arch:
            check_arch(args.arch)
        if args.recipe:
            recipes.check_name(args.recipe)
        tests = getattr(args, "evaluate", False)
        of_output = tests and args.output and args.save_dir == str(_of_output(args))
        continues = resume.start(args)
        if not hasattr(args, "pretrained"):
            resume.inherit(args)
        check(args)
        if of_output:  # named by the classifier's options, which `check` has read
            args.save_dir = str(_of_output(args))
        if args.recipe:
            recipes.of_options(args)
        notes = parser.without_effect(args)
        if args.workers is None:
            args.workers = launch.workers(launch.plan(args), args)
        named = bool(args.save_dir)
        if named:
            writable(args.save_dir)
            if not continues and not hasattr(args, "pretrained"):
                run_folder.check_free(args.save_dir)
        args.save_dir = args.save_dir or time.strftime(f"runs/{args.script}-{args.arch}-%Y%m%d-%H%M%S")
        for note in notes:
            say(note)
        launch.launch(functools.partial(_in_own_folder, worker, continues, named), args)
    except InputError as error:
        parser.refuse(error)
    except OSError as error:
        parser.refuse(of_file(error))
    except launch.Lost as lost:
        parser.exit(1, f"{parser.prog}: error: {lost}\n")
    except interrupt.Interrupted as end:
        parser.exit(interrupt.STATUS, f"{parser.prog}: {end}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
