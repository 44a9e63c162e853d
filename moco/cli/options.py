"""The option groups that scripts share."""

import argparse
from argparse import ArgumentParser

from moco import devices
from moco.augment import recipes
from moco.cli import values
from moco.cli.actions import Switch
from moco.cli.parser import Options, Parser
from moco.data import cache, registry
from moco.encoder import timm_networks
from moco.encoder.resnets import ARCHS, STEMS
from moco.engine import optim
from moco.errors import InputError
from moco.launch import processes
from moco.loss.synthetic import Synthetic

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
    group.add_argument(
        "--multiprocessing-distributed",
        action=Switch,
        default=False,
        help="start one process per GPU of this node",
    )
    group.add_argument(
        "--nproc-per-node",
        type=values.processes,
        metavar="N",
        help="processes of this node (default: its GPUs; 1 on CPU)",
    )
    group.add_argument(
        "--world-size",
        type=values.whole("[-1, 65536]"),
        default=-1,
        metavar="NODES",
        help="number of nodes",
    )
    group.add_argument(
        "--rank",
        type=values.whole("[-1, 65535]"),
        default=-1,
        metavar="NODE",
        help="this node's number, from 0",
    )
    group.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the processes meet; auto: a free port of this node",
    )
    group.add_argument(
        "--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPU"
    )
    group.add_argument("--gpu", type=values.natural, metavar="ID", help="use this GPU only")
    group.add_argument(
        "--local-rank", type=int, help=argparse.SUPPRESS
    )  # torch.distributed.launch passes it
    spawned = (
        "it counts the processes that --multiprocessing-distributed starts; give both, or neither"
    )
    parser.has_effect(
        "nproc_per_node", lambda args: processes.plan(args).launcher == "spawn", spawned
    )
    own = "there are several processes, and each has a GPU of its own; leave it out"
    parser.has_effect("gpu", lambda args: processes.plan(args).local == 1, own)
    alone = "this is one process"
    parser.has_effect("dist_url", lambda args: processes.plan(args).url, alone, refuse=False)
    parser.has_effect("dist_backend", lambda args: processes.plan(args).url, alone, refuse=False)
    launcher = "the launcher says where processes meet and how many nodes there are"
    own_launch = ("spawn", "single")
    parser.has_effect(
        "world_size rank",
        lambda args: processes.plan(args).launcher in own_launch,
        launcher,
        refuse=False,
    )
    parser.has_effect(
        "dist_url", lambda args: processes.plan(args).launcher != "torchrun", launcher, refuse=False
    )


def add_input(
    parser: Parser,
    batch: int,
    recipe: str | None,
    arch: str | None = "resnet50",
    *,
    transformers: bool = True,
    each: bool = False,
) -> None:
    """What is read and how it is computed. `recipe` or `arch` None leaves the choice to the script.

    `transformers`: it may have other networks than ResNets; `each`: batch and workers are counted for each process.
    """
    group = parser.add_argument_group(
        "input and computation" + (" (batch size and workers: of each process)" if each else "")
    )
    kinds = (
        ", ".join(timm_networks.SHORT) + ", any other network of timm's, " if transformers else ""
    )
    group.add_argument(
        "-a",
        "--arch",
        default=arch,
        help=f"{kinds}any torchvision ResNet" + ("" if arch else "; read from the checkpoint"),
    )
    few = f"one for each core, here {processes.cores()}, divided among the node's processes; at most {processes.WORKERS} for each"
    of = "of each process" if each else "of this node, split over its processes"
    group.add_argument(
        "-b", "--batch-size", type=values.batch, default=batch, help=f"images in one pass {of}"
    )
    group.add_argument(
        "-j", "--workers", type=values.processes, help=f"loader processes {of} (default: {few})"
    )
    group.add_argument(
        "--cache-images",
        choices=cache.MODES,
        default="auto",
        help="decode the images of a folder once and keep them in memory; auto: do so if they take "
        f"at most a quarter of the node's free memory, and at most {cache.AUTO_MAX >> 30} GiB",
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
    group.add_argument(
        "--recipe", default=recipe, help="views by name, see moco/augment/recipes.py"
    )
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
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision; losses stay in fp32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks and the colour operations",
    )
    less = "run the blocks once more for the gradient: less memory"
    group.add_argument("--grad-checkpoint", "--use-checkpoint", action="store_true", help=less)
    group.add_argument(
        "--class-list", metavar="FILE", help="use these class folders of DIR only; one name a line"
    )
    group.add_argument(
        "--data-name",
        type=values.data_name,
        metavar="NAME",
        help="imagenet100 or imagenet1000: check that DIR has no more classes",
    )


def add_evaluation(parser: Parser) -> None:
    """Which encoder is evaluated, and on which data set."""
    group = parser.add_argument_group("encoder and data set")
    group.add_argument(
        "--pretrained",
        metavar="FILE",
        help="checkpoint of any method here, or a MoCo, SogCLR, MoBY or bare file",
    )
    add_data_set(parser, group)


def add_data_set(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """Add the options that name the data set and download it."""
    help = f"what lies in DIR, of {', '.join(registry.NAMES)}"
    group.add_argument(
        "--dataset", type=registry.canonical, default="imagenet", metavar="NAME", help=help
    )
    group.add_argument("--download", action="store_true", help="fetch the data set into DIR first")
    folder = "DIR is a folder of images, used as it is; give --dataset NAME for a data set to fetch, or leave it out"
    parser.has_effect("download", lambda args: args.dataset not in ("imagenet", "photos"), folder)
    parser.has_effect(
        "data_name",
        lambda args: args.dataset == "imagenet",
        "it is for folders of ImageNet; leave it out",
    )
    photos = "the word photos already names the data set; for another one give its folder instead"
    parser.has_effect(
        "dataset",
        lambda args: args.data != "photos" or parser.given.get("dataset") == "photos",
        photos,
    )


def add_weights(parser: Parser, default: str) -> None:
    """Whether the encoder trains too."""
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--weights",
        choices=("freeze", "finetune"),
        default=default,
        help="of the encoder: kept, or trained too",
    )
    frozen = "--weights freeze trains no block of the network; leave it out"
    parser.has_effect("grad_checkpoint", lambda args: args.weights == "finetune", frozen)


def add_choice(parser: Parser) -> None:
    """On what the best classifier is chosen."""
    group = parser.add_argument_group("choice")
    group.add_argument(
        "-e", "--evaluate", action="store_true", help="only test the classifier of --resume"
    )
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
    parser: Parser,
    epochs: int,
    lr: float | list[float] | None,
    wd: float | list[float],
    schedule: list[int],
    cos: int = 1,
) -> None:
    """How weights change, with a protocol's defaults; where those of `lr` and `wd` are lists, several of each may be given.

    `lr` None leaves the rate to the script; `cos` is the most that `--cos` may be.
    """
    several = isinstance(lr, list)
    number = {"type": values.learning_rate, "nargs": "+" if several else None}
    note = "; with several, a classifier for each in one pass" if several else ""
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=values.epochs, default=epochs)
    group.add_argument(
        "--optimizer", choices=optim.OPTIMIZERS, default="sgd", help="sgd and lars with --momentum"
    )
    if lr is not None:
        scale = "as it is, unless --learning-rate-scaling says otherwise" + note
        group.add_argument(
            "--lr", "--learning-rate", **number, metavar="LR", default=lr, help=scale
        )
    group.add_argument(
        "--learning-rate-scaling",
        choices=optim.SCALINGS,
        default="none",
        help="x sqrt(total batch), x total batch / 256",
    )
    number["type"] = values.decay
    group.add_argument(
        "--wd",
        "--weight-decay",
        dest="wd",
        **number,
        metavar="WD",
        default=wd,
        help="weight decay" + note,
    )
    group.add_argument(
        "--schedule",
        type=values.natural,
        nargs="*",
        default=schedule,
        metavar="EPOCH",
        help="lr x .1 at these epochs",
    )
    group.add_argument(
        "--cos", action=Switch, most=cos, default=False, help="cosine schedule instead"
    )
    group.add_argument(
        "--lr-by",
        choices=("epoch", "epoch-end", "step"),
        default="epoch",
        help="when the learning rate is computed: at each epoch's start, for each epoch's end, or at each step",
    )
    group.add_argument(
        "--sgdr",
        action=Switch,
        default=False,
        help="cosine schedule that begins anew (warm restarts)",
    )
    group.add_argument(
        "--sgdr-t0",
        type=values.epochs,
        default=12,
        metavar="EPOCHS",
        help="length of each period of --sgdr",
    )
    group.add_argument(
        "--lr-final",
        type=values.learning_rate,
        default=0.0,
        metavar="LR",
        help="learning rate at the end of a cosine; scaled like --lr",
    )
    group.add_argument(
        "--lr-warmup-epochs",
        type=values.natural,
        default=0,
        help="epochs of linear learning-rate warm-up",
    )
    group.add_argument("--momentum", type=values.momentum, default=0.9)
    group.add_argument(
        "--clip-grad",
        type=values.real("[0, 1000000]"),
        default=0.0,
        metavar="NORM",
        help="maximum gradient norm; 0: no clipping",
    )
    group.add_argument(
        "--nesterov", action=Switch, default=False, help="Nesterov's momentum, of sgd"
    )
    group.add_argument(
        "--accumulation-steps",
        type=values.positive,
        default=1,
        metavar="N",
        help="passes of --batch-size in one step",
    )

    def cosine(args: Options) -> bool:
        return args.cos or args.sgdr

    follows = "the learning rate follows a cosine (--cos, --sgdr); leave it out, or give --no-cos and --no-sgdr"
    parser.has_effect("schedule", lambda args: not cosine(args), follows)
    late = "the run ends before the first of these epochs"
    first = lambda args: min(args.schedule, default=0)  # noqa: E731
    parser.has_effect(
        "schedule", lambda args: cosine(args) or first(args) < args.epochs, late, refuse=False
    )
    parser.has_effect(
        "cos", lambda args: not args.sgdr, "--sgdr is a cosine of its own; give one of them"
    )
    parser.has_effect(
        "sgdr",
        lambda args: args.lr_by != "epoch-end",
        "--lr-by epoch-end is for --cos; leave out one of them",
    )
    parser.has_effect(
        "sgdr_t0", lambda args: args.sgdr, "it is the period of --sgdr; give both, or neither"
    )
    parser.has_effect(
        "lr_final", cosine, "it is where a cosine ends; give --cos as well, or leave it out"
    )
    changes = "the learning rate changes at the epochs of --schedule alone; leave it out"
    parser.has_effect("lr_by", lambda args: cosine(args) or args.lr_warmup_epochs, changes)
    parser.has_effect(
        "momentum", lambda args: args.optimizer != "adamw", "adamw has its own; leave it out"
    )
    parser.has_effect(
        "nesterov", lambda args: args.optimizer == "sgd", "it is for --optimizer sgd; leave it out"
    )


def add_run(parser: Parser) -> None:
    """What is written while training, and from where to go on."""
    group = parser.add_argument_group("monitor")
    group.add_argument(
        "-p",
        "--print-freq",
        type=values.positive,
        default=10,
        metavar="STEPS",
        help="steps between log lines",
    )
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
    group.add_argument(
        "--save-every-steps", type=values.natural, default=0, metavar="STEPS", help=inside
    )


def add_pretrain(
    parser: Parser, cos: int = 1, *, transformers: bool = False, each: bool = False
) -> None:
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
        "--knn-every",
        type=values.natural,
        default=0,
        metavar="EPOCHS",
        help="report k-NN top-1 on val/, against train/",
    )
    group.add_argument(
        "--knn-k", type=values.positive, default=20, metavar="K", help="neighbours that vote"
    )
    group.add_argument(
        "--knn-t",
        type=values.temperature,
        default=0.07,
        metavar="T",
        help="temperature of the neighbours' weights",
    )
    whose = "features to compare: the encoder's without projection head, or the head's"
    group.add_argument(
        "--knn-features", choices=("backbone", "head"), default="backbone", help=whose
    )
    monitor = "the k-NN monitor is off; give --knn-every EPOCHS as well, or leave it out"
    parser.has_effect("knn_k knn_t knn_features", lambda args: args.knn_every, monitor)
    add_launch(parser)


def add_feature_rules(parser: Parser) -> None:
    """Declare the options without effect in a script that classifies features."""
    centre = "this script sees the centre of each image, and trains nothing; leave it out"
    parser.has_effect(
        "recipe crop_min randaugment blur_sigma grad_checkpoint", lambda args: False, centre
    )
    once = "this script reads each image once; leave it out"
    parser.has_effect("cache_images", lambda args: False, once)
    files = "batch_size workers image_size stem mean std amp compile data dataset download data_name seed"
    parser.has_effect(
        files,
        lambda args: not args.load_features,
        "features come from files (--load-features)",
        refuse=False,
    )


def add_momentum_encoder(parser: Parser, t: float, v2: bool) -> None:
    """Query and key encoder, with temperature `t` and MoCo v1's or v2's head and views."""
    group = parser.add_argument_group("query and key encoder")
    group.add_argument("--moco-dim", type=values.width, default=128, help="feature size")
    group.add_argument(
        "--moco-m", type=values.average, default=0.999, help="momentum of the key encoder"
    )
    group.add_argument("--moco-t", type=values.temperature, default=t, help="softmax temperature")
    group.add_argument("--mlp", action=Switch, default=v2, help="two-layer head (v2)")
    group.add_argument(
        "--aug-plus", action=Switch, default=v2, help="recipe mocov2 instead of mocov1"
    )
    group.add_argument(
        "--bn-splits",
        type=values.positive,
        default=8,
        help="batch norm groups of the key encoder if one process trains alone",
    )
    both = "split the batch norm of the query encoder into --bn-splits groups, too"
    group.add_argument("--bn-splits-query", action=Switch, default=False, help=both)
    named = "--recipe names the views; leave it out"
    parser.has_effect(
        "aug_plus", lambda args: args.recipe == ("mocov2" if args.aug_plus else "mocov1"), named
    )
    shuffled = "it is for a run of one process, and this run has several; leave it out"
    parser.has_effect(
        "bn_splits bn_splits_query", lambda args: processes.plan(args).world_size == 1, shuffled
    )
    one = "--bn-splits 1 makes one group; leave out one of them"
    parser.has_effect("bn_splits_query", lambda args: args.bn_splits > 1, one)


def check_momentum_encoder(args: Options) -> None:
    """Choose the default recipe unless `--recipe` is given."""
    args.recipe = args.recipe or ("mocov2" if args.aug_plus else "mocov1")


_KINDS = ("interpolated", "extrapolated", "mixup", "noise", "perturbed", "adversarial")


def add_synthetic(
    parser: Parser, title: str, n_hard: int, each: int, sigma: float
) -> argparse._ArgumentGroup:
    """Synthetic negatives, by default `each` of every kind; returns the group, for what only one script has."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--n-hard",
        type=values.natural,
        default=n_hard,
        help="hardest queue entries, of which they are made",
    )
    for i, name in enumerate(_KINDS, 1):
        group.add_argument(
            f"--n{i}", type=values.natural, default=each, help=f"{name} negatives per query"
        )
    group.add_argument(
        "--sigma", type=values.size, default=sigma, help="standard deviation of the noise"
    )
    group.add_argument("--delta", type=values.size, default=0.01, help="size of the perturbation")
    group.add_argument("--eta", type=values.size, default=0.01, help="size of the adversarial step")
    for dest, n, name in (
        ("sigma", "n4", "noise"),
        ("delta", "n5", "perturbed"),
        ("eta", "n6", "adversarial"),
    ):
        none = f"there are no {name} negatives; give --{n} as well, or leave it out"
        parser.has_effect(dest, lambda args, n=n: getattr(args, n), none)
    return group


def synthetic(args: Options, rows: int, option: str) -> Synthetic:
    """What these options ask for, of a queue of `rows` that `option` sets. Raises InputError where that cannot be."""
    counts = tuple(getattr(args, f"n{i}") for i in range(1, 7))
    if args.n_hard > rows:
        raise InputError(
            f"--n-hard {args.n_hard} is above the queue's {rows} rows ({option}); lower it"
        )
    if any(counts) and not args.n_hard:
        raise InputError(
            "synthetic negatives are made of the hardest queue rows: give --n-hard, as in --n-hard 1024"
        )
    return Synthetic(args.n_hard, counts, args.sigma, args.delta, args.eta)


def add_files(parser: ArgumentParser) -> None:
    """Features kept in files, to be classified again."""
    group = parser.add_argument_group("files of features")
    group.add_argument(
        "--dump-features", metavar="FOLDER", help="write those of both splits there, as .npy files"
    )
    group.add_argument(
        "--load-features",
        metavar="FOLDER",
        help="read them from there: no DIR, no --pretrained; the seed is that of the dump",
    )
