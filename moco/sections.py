"""The sections of a run's settings: frozen dataclasses, one per concern.

A field made by `option` is also a command-line option. Only this file, the other files
moco/sections_*.py and the scripts define its default, type, range and help text. moco/config.py
combines the sections; moco/cli/groups.py creates the options. None of these files imports torch, so
that --help is quick.
"""

from dataclasses import dataclass
from typing import ClassVar

from moco.options import (
    AVERAGE,
    EPOCHS,
    LEARNING_RATE,
    MOMENTUM,
    NATURAL,
    POSITIVE,
    PROCESSES,
    TEMPERATURE,
    WEIGHT_DECAY,
    WIDTH,
    option,
)
from moco.options import ENTRIES as ENTRIES  # unused here: scripts write sections.ENTRIES
from moco.options import LAYERS as LAYERS
from moco.options import PIXELS as PIXELS
from moco.sections_images import Decoding
from moco.sections_views import Views as Views

STEMS = ("imagenet", "cifar")  # of ResNets; see `moco.encoder.resnets.resnet`
NORM_EPS = ("timm", "synco-v2")  # of Swins; see `moco.encoder.timm_networks.create`
DEVICES = ("cpu", "cuda", "xpu", "mps")
OPTIMIZERS = ("sgd", "lars", "lars_tf", "adam", "adamw")
SCALINGS = ("none", "sqrt", "linear")
CACHE_MODES = ("auto", "on", "off")
AUTO_MAX = 8 << 30  # bytes of images in memory, at most, with --cache-images auto
TRACKERS = ("wandb", "trackio", "mlflow")  # the names of their packages


@dataclass(frozen=True)
class Run:
    """The data folder, the run folder and the seed."""

    TITLE: ClassVar[str] = "run"
    data: str | None = option(
        None,
        "folder with train/ and val/ (for pre-training, any folder of images), or the word photos: "
        "the built-in data set",
        metavar="DIR",
    )
    cfg: str | None = option(
        None, "YAML file of defaults by option name; the command line wins", metavar="FILE.yaml"
    )
    save_dir: str | None = option(None, "run folder", metavar="DIR", unset="runs/SCRIPT-ARCH-TIME")
    output: str | None = option(
        None,
        "the run folder is DIR/TAG; an evaluation with the same options finds the run",
        metavar="DIR",
    )
    tag: str | None = option(None, "subfolder of --output for this run", unset="the word default")
    seed: int = option(
        0,
        "seed of weights, image order, views and negatives",
        range="[-9223372036854775808, 9223372036854775807]",  # what torch's generators accept
    )
    script: str = ""  # synco for main_synco.py
    method: str = ""


@dataclass(frozen=True)
class Input(Decoding):
    """The images of a run, and how they are decoded and loaded."""

    TITLE: ClassVar[str] = "images"
    batch_size: int = option(256, "images in one pass {batch_of}", "-b", range="[1, 1048576]")
    workers: int | None = option(
        None,
        "loader processes {of}",
        "-j",
        range=PROCESSES,
        unset="one for each core, here {cores}, divided among the node's processes; "
        "at most {most} for each",
    )
    cache_images: str = option(
        "auto",
        "decode the images of a folder once and keep them in memory; auto: do so if they take "
        "at most a quarter of the node's free memory, and at most {gib} GiB",
        choices=CACHE_MODES,
    )
    class_list: str | None = option(
        None, "use only the class folders that FILE names, one a line", metavar="FILE"
    )
    data_name: str | None = option(
        None,
        "imagenet100 or imagenet1000: check that DIR has no more classes",
        metavar="NAME",
    )
    dataset: str = option("imagenet", "data set in DIR: {datasets}", metavar="NAME")
    download: bool = option(False, "download the data set to DIR first", switch=False)
    batch_is_per_process: bool = False  # whether batch_size and workers count for each process
    batch_is_of_all_nodes: bool = False  # whether batch_size counts for all nodes together
    batch_per_process: int = 0  # set by the launch
    nodes: int = 1  # set by the launch


@dataclass(frozen=True)
class Network:
    """The encoder's architecture."""

    TITLE: ClassVar[str] = "network"
    arch: str | None = option(
        "resnet50", "architecture: {archs}", "-a", unset="the checkpoint's, else resnet50"
    )
    stem: str | None = option(
        None,
        "first layers of a ResNet; imagenet: a 7x7 convolution of stride 2 and max-pooling; "
        "cifar: a 3x3 convolution of stride 1, for images of 32 or 64 pixels",
        choices=STEMS,
        unset="the checkpoint's, else imagenet",
    )
    norm_eps: str | None = option(
        None, "epsilons of a Swin's norms", choices=NORM_EPS, unset="the checkpoint's, else timm"
    )


@dataclass(frozen=True)
class Compute:
    """The settings of computation, which change results only by rounding."""

    TITLE: ClassVar[str] = "computation"
    amp: str = option(
        "off", "mixed precision; losses are computed in fp32", choices=("off", "bf16", "fp16")
    )
    compile: bool = option(
        False, "torch.compile the networks and the color operations", switch=False
    )
    grad_checkpoint: bool = option(
        False,
        "recompute the activations of blocks in the backward pass, to save memory",
        "--use-checkpoint",
        switch=False,
    )
    grad_compress: str = option(
        "off",
        "bf16: processes exchange gradients that are rounded to bf16, half as many bytes",
        choices=("off", "bf16"),
    )


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and how they find each other."""

    TITLE: ClassVar[str] = "launch (or use torchrun, torch.distributed.launch, srun)"
    device: str = option(
        "auto",
        "device to compute on; auto: the accelerator that PyTorch finds, else the CPU; "
        "xpu and mps support a single process only",
        choices=("auto", *DEVICES),
    )
    multiprocessing_distributed: bool | None = option(
        False, "start one process per GPU of this node", unset="on every visible GPU"
    )
    nproc_per_node: int | None = option(
        None,
        "processes of this node",
        range=PROCESSES,
        metavar="N",
        unset="its GPUs; 1 on a CPU",
    )
    world_size: int = option(-1, "number of nodes", range="[-1, 65536]", metavar="NODES")
    rank: int = option(-1, "this node's number, from 0", range="[-1, 65535]", metavar="NODE")
    dist_url: str = option(
        "auto",
        "address at which the processes connect; auto: a free port of this node",
        metavar="URL",
    )
    dist_backend: str | None = option(
        None,
        "backend of torch.distributed",
        choices=("nccl", "gloo"),
        unset="nccl on GPUs, gloo on CPUs",
    )
    gpu: int | None = option(None, "use only this GPU", range=NATURAL, metavar="ID")
    local_rank: int | None = option(None, "", hidden=True)  # torch.distributed.launch passes it


@dataclass(frozen=True)
class Schedule:
    """The number of epochs, the optimizer, and the schedule of the learning rate."""

    TITLE: ClassVar[str] = "optimization"
    epochs: int = option(200, "number of epochs", range=EPOCHS)
    optimizer: str = option(
        "sgd",
        "optimizer; lars_tf: LARS as in SimCLR's TensorFlow code, with the learning rate inside "
        "the momentum, and no layer-wise rates for a classifier; adam: with weight decay in the "
        "gradient; all but adam and adamw use --momentum",
        choices=OPTIMIZERS,
    )
    learning_rate_scaling: str = option(
        "none",
        "multiply the learning rate by sqrt(total batch), or by total batch / 256",
        choices=SCALINGS,
    )
    schedule: tuple[int, ...] = option(
        (),
        "multiply the learning rate by 0.1 at these epochs",
        range=NATURAL,
        nargs="*",
        metavar="EPOCH",
    )
    cos: bool = option(False, "cosine schedule instead of --schedule")
    lr_by: str = option(
        "epoch",
        "epoch, epoch-end: the learning rate is constant in each epoch, at the schedule's value "
        "at its start or its end; step: it changes at each step; previous-step: likewise, but one "
        "step later, and the cosine begins at step 0, not after the warm-up",
        choices=("epoch", "epoch-end", "step", "previous-step"),
    )
    sgdr: int = option(
        0,
        "cosine that changes at each step; 1: falls and rises in turn; 2: falls and restarts",
        switch=True,
        max_level=2,
    )
    sgdr_t0: int | None = option(
        None,
        "length of each period of --sgdr",
        range=EPOCHS,
        metavar="EPOCHS",
        unset="12 with --sgdr 1, 10 with --sgdr 2",
    )
    lr_final: float = option(
        0.0, "value at the end of a cosine; scaled like --lr", range=LEARNING_RATE, metavar="LR"
    )
    lr_warmup_epochs: int = option(0, "epochs of linear learning-rate warm-up", range=NATURAL)
    lr_warmup_from: float = option(
        0.0, "value at the warm-up's start; scaled like --lr", range=LEARNING_RATE, metavar="LR"
    )
    momentum: float = option(0.9, "momentum of sgd, lars and lars_tf", range=MOMENTUM)
    clip_grad: float = option(
        0.0, "maximum gradient norm; 0: no clipping", range="[0, 1000000]", metavar="NORM"
    )
    nesterov: bool = option(False, "Nesterov momentum, for sgd")
    accumulation_steps: int = option(
        1, "passes of --batch-size in one step", range=POSITIVE, metavar="N"
    )


@dataclass(frozen=True)
class Optimizer(Schedule):
    """An optimizer with one learning rate and one weight decay."""

    lr: float | None = option(
        0.03,
        "learning rate, before --learning-rate-scaling",
        "--learning-rate",
        range=LEARNING_RATE,
        metavar="LR",
    )
    wd: float | None = option(
        1e-4, "weight decay", "--weight-decay", range=WEIGHT_DECAY, metavar="WD"
    )


@dataclass(frozen=True)
class Log:
    """The log and the checkpoints of a training run, and the checkpoint to resume from."""

    TITLE: ClassVar[str] = "log and checkpoints"
    print_freq: int = option(10, "steps between log lines", "-p", range=POSITIVE, metavar="STEPS")
    resume: str | None = option(
        None,
        "continue from this checkpoint as if the run had never stopped; "
        "auto: from the furthest one in the run folder, if any",
        metavar="FILE",
    )
    allow_change: tuple[str, ...] = option(
        (),
        "options that may differ from those of the run that --resume continues, such as lr,wd",
        metavar="NAME,...",
    )
    save_every: int = option(
        1,
        "epochs between checkpoints; the last epoch is always saved",
        range=POSITIVE,
        metavar="EPOCHS",
    )
    on_bad_image: str = option(
        "skip",
        "skip: print the name of an unreadable training image and use another one instead, "
        "up to 1 %% of an epoch; error: end the run",
        choices=("skip", "error"),
    )
    save_every_steps: int = option(
        0,
        "steps between checkpoints inside epochs; 0: save there only if a signal stops the run",
        range=NATURAL,
        metavar="STEPS",
    )


@dataclass(frozen=True)
class Tracking:
    """The experiment tracker that also gets the metrics of the run."""

    TITLE: ClassVar[str] = "experiment tracking"
    track: str | None = option(
        None,
        "also send the settings, the metrics and the results to this tracker: Weights & Biases, "
        "Trackio or MLflow, whose package must be installed",
        choices=TRACKERS,
    )


@dataclass(frozen=True)
class Retention:
    """The checkpoints of a pre-training to keep."""

    TITLE: ClassVar[str] = "checkpoints to keep"
    keep: int = option(2, "keep the newest N epoch checkpoints; all, or 0: keep all", metavar="N")
    keep_every: int = option(
        10,
        "also keep the checkpoint of every Nth epoch; 0: of none. "
        "The best by --knn-every is always kept",
        range=NATURAL,
        metavar="EPOCHS",
    )


@dataclass(frozen=True)
class Monitor:
    """The measurements of the encoder that a pre-training reports while it runs."""

    TITLE: ClassVar[str] = "monitor"
    knn_every: int = option(
        0,
        "epochs between k-NN tests of val/ against train/; 0: none",
        range=NATURAL,
        metavar="EPOCHS",
    )
    knn_k: int = option(20, "number of neighbours that vote", range=POSITIVE, metavar="K")
    knn_t: float = option(
        0.07, "temperature of the neighbours' weights", range=TEMPERATURE, metavar="T"
    )
    knn_features: str = option(
        "backbone",
        "features to compare: those of the backbone, or those of the projection head",
        choices=("backbone", "head"),
    )
    probe_online: bool = option(
        False,
        "train a linear classifier on the features of each batch, without effect on the encoder, "
        "and test it on val/ together with k-NN (--knn-every), or else after every epoch",
        switch=False,
    )
    rankme_every: int = option(
        0,
        "epochs between measurements of RankMe, which needs no labels; 0: none",
        range=NATURAL,
        metavar="EPOCHS",
    )


@dataclass(frozen=True)
class QueryAndKey:
    """A query encoder, and the key encoder that follows it, with MoCo's head and views."""

    TITLE: ClassVar[str] = "query and key encoder"
    moco_dim: int = option(128, "feature size", range=WIDTH)
    moco_m: float = option(0.999, "momentum of the key encoder", range=AVERAGE)
    moco_t: float = option(0.07, "softmax temperature", range=TEMPERATURE)
    mlp: bool = option(False, "two-layer head (MoCo v2)")
    aug_plus: bool = option(False, "recipe mocov2 instead of mocov1")
    bn_splits: int = option(
        8, "batch norm groups of the key encoder if the run has one process", range=POSITIVE
    )
    bn_splits_query: bool = option(
        False, "also split the batch norm of the query encoder into --bn-splits groups"
    )
