"""The methods that benchmarks/family.py compares, and the recipe that they share.

Each method is one line of `FAMILY`: its name, its script and the options that differ from the
shared recipe. Words in braces stand for values that depend on the data set. To add a method, add a
line.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moco.errors import unknown


class Entry(NamedTuple):
    """A method to compare.

    Attributes:
        name: the name in the table, and of the run folders.
        script: the script that trains it, without .py.
        options: its options beyond the shared ones; `{queue}` and the like come from `sizes`.
        title: the name to print.
        lr: the learning rate, as a multiple of the recipe's.
    """

    name: str
    script: str
    options: str
    title: str
    lr: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """The settings that all methods share on a data set.

    Attributes:
        dataset: the value of --dataset; "" for the built-in `photos`.
        stem: the first layers of the ResNet.
        batch: images in a step.
        lr: learning rate of SGD for a batch of this size.
        wd: weight decay.
        mean: mean of the RGB channels, in [0, 1].
        std: standard deviation of the RGB channels, in [0, 1].
        knn: options of the k-NN monitor, except how often it runs.
        probe: options of the linear probe.
        sizes: values of the words in braces in `FAMILY`.
    """

    dataset: str
    stem: str
    batch: int
    lr: float
    wd: float
    mean: str
    std: str
    knn: str
    probe: str
    sizes: dict[str, object]

    def options(self, epochs: int) -> list[str]:
        """Return the options that every method gets, except learning rate, seed and folder."""
        words = f"--arch resnet18 --stem {self.stem} --image-size 32 --recipe small"
        words += f" --mean {self.mean} --std {self.std} --batch-size {self.batch}"
        words += f" --epochs {epochs} --optimizer sgd --wd {self.wd:g} --cos --lr-by step"
        words += " --learning-rate-scaling none --lr-warmup-epochs 0 --lr-final 0 --clip-grad 0"
        # only two k-NN measurements: before training and at the end
        words += f" --knn-every {epochs} {self.knn} --save-every {epochs}"
        return words.split()

    def own_options(self, entry: Entry, epochs: int) -> list[str]:
        """Return the options of a method: its own ones, and its learning rate."""
        # synthetic negatives start after a fifth of the epochs, as in the demo
        sizes = {**self.sizes, "start": epochs // 5, "epochs": epochs}
        return [*entry.options.format(**sizes).split(), "--lr", f"{self.lr * entry.lr:g}"]


# Sizes, learning rate and probe are those of the demo and of `photos` in moco/methods.py. With the
# stem of CIFAR-10, a CPU would need six times as long.
PHOTOS = Recipe(
    dataset="",
    stem="imagenet",
    batch=32,
    lr=0.008,
    wd=1e-4,
    mean="0.485 0.456 0.406",
    std="0.229 0.224 0.225",
    knn="--knn-k 20",
    probe="--protocol moco --batch-size 32 --lr 0.01 0.03 0.1 0.3 1 --cos --epochs 12",
    sizes={
        "queue": 256,
        "batches": 16,
        "momentum": 0.99,
        "groups": "--bn-splits 1",
        "hard": 16,
        "n123": "--n1 2 --n2 2 --n3 2",
        "n456": "--n4 1 --n5 1 --n6 1",
        "mochi": "--n1 4 --n3 4",
        "false": "--fn-topk 2 --fn-threshold 0.8",
    },
)
# The values are those of configs/cifar10/.
CIFAR10 = Recipe(
    dataset="cifar10",
    stem="cifar",
    batch=512,
    lr=0.06,
    wd=5e-4,
    mean="0.4914 0.4822 0.4465",
    std="0.2023 0.1994 0.2010",
    knn="--knn-k 200 --knn-t 0.1",
    probe="--protocol moco --batch-size 256 --lr 0.1 0.3 1 3 10 --cos --epochs 30",
    sizes={
        "queue": 4096,
        "batches": 32,
        "momentum": 0.99,
        "groups": "--bn-splits 8 --bn-splits-query",
        "hard": 64,
        "n123": "--n1 16 --n2 16 --n3 16",
        "n456": "--n4 4 --n5 4 --n6 4",
        "mochi": "--n1 32 --n3 64",
        "false": "--fn-topk 10 --fn-threshold 0.7",
    },
)
RECIPES = {recipe.dataset or "photos": recipe for recipe in (PHOTOS, CIFAR10)}

# The temperatures are those of the papers or, if there are several, of the ResNet's recipe in
# configs/. Every projection head has 128 outputs, and hidden layers of 512 units if it has any.
_QUEUE = "--moco-k {queue} --moco-m {momentum} {groups}"
_V2 = f"{_QUEUE} --mlp --moco-t 0.2"
_HARD = f"{_V2} --n-hard {{hard}} --warmup-epochs {{start}}"
_ADCO = "--cluster {queue} --moco-m {momentum} {groups}"
_BATCH = "--mlp-dim 512 --loss"
_FNC = "--ema {momentum} --memory-multiplier {batches} --support-size 1"
_MOBY = "--mlp-dim 512 --moco-dim 128 --moco-m {momentum} --method"
_V3 = "--moco-mlp-dim 512 --moco-dim 128 --moco-m {momentum} --moco-m-cos"
_SYNTHETIC = "--n-hard {hard} {n123} {n456} --synthetic-first {start}"
_SYNCO_V2 = f"synco --queue {{queue}} {_SYNTHETIC} --synthetic-last {{epochs}}"

FAMILY = (
    Entry("mocov1", "main_synco", f"{_QUEUE} --moco-t 0.07", "MoCo v1"),
    Entry("mocov2", "main_synco", _V2, "MoCo v2"),
    Entry("mochi", "main_synco", f"{_HARD} {{mochi}}", "MoCHI"),
    Entry("synco", "main_synco", f"{_HARD} {{n123}} {{n456}}", "SynCo"),
    Entry("adco", "main_adco", f"{_ADCO} --moco-t 0.12 --mem-t 0.02", "AdCo"),
    Entry("adco-sym", "main_adco", f"{_ADCO} --sym 1 --moco-t 0.14 --mem-t 0.03", "AdCo, sym."),
    Entry("simclr", "main_sogclr", f"{_BATCH} simclr --t 0.1", "SimCLR"),
    Entry("dcl", "main_sogclr", f"{_BATCH} dcl --t 0.1", "DCL"),
    Entry("dclw", "main_sogclr", f"{_BATCH} dclw --t 0.1", "DCLW"),
    Entry("debiased", "main_sogclr", f"{_BATCH} debiased --t 0.5", "debiased"),
    Entry("hcl", "main_sogclr", f"{_BATCH} hcl --t 0.5", "HCL"),
    Entry("sogclr", "main_sogclr", f"{_BATCH} sogclr --t 0.1", "SogCLR"),
    Entry("isogclr", "main_sogclr", f"{_BATCH} isogclr --t 0.1", "iSogCLR"),
    Entry("fnc", "main_fnc", f"{_FNC} {{false}}", "FNC"),
    Entry("moby", "main_moby", f"{_MOBY} moby --queue {{queue}}", "MoBY"),
    Entry("synco-v2", "main_moby", f"{_MOBY} {_SYNCO_V2}", "SynCo-v2"),
    Entry("byol", "main_moby", f"{_MOBY} byol", "BYOL"),
    Entry("mocov3", "main_mocov3", _V3, "MoCo v3"),
    # synthetic negatives from the batch, an addition of this repository
    Entry(
        "simclr+",
        "main_sogclr",
        f"{_BATCH} simclr --t 0.1 {_SYNTHETIC}",
        "SimCLR, synthetic negatives",
    ),
    Entry("mocov3+", "main_mocov3", f"{_V3} {_SYNTHETIC}", "MoCo v3, synthetic negatives"),
    # with labels: upper bounds
    Entry("supcon", "main_sogclr", f"{_BATCH} supcon --t 0.1", "SupCon, with labels"),
    Entry("fnc-labels", "main_fnc", f"{_FNC} --fn-from labels", "FNC, with labels"),
)
NAMES = tuple(entry.name for entry in FAMILY)


def chosen(names: Iterable[str]) -> list[Entry]:
    """Return the entries with these names, in the order of `FAMILY`.

    Raises InputError if a name is unknown.
    """
    names = set(names)
    for name in sorted(names):
        if name not in NAMES:
            raise unknown("method", name, NAMES)
    return [entry for entry in FAMILY if entry.name in names]
