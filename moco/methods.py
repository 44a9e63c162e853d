"""The registries of pre-training methods, and of the papers' protocols of evaluation.

A new method is one more entry of `METHODS`. See docs/adding-a-method.md. Tests, benchmarks, the
demo and printed commands read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A pre-training method, and the options of its commands.

    Attributes:
        name: the name of the method; also in checkpoints and results, unless `saved` is.
        script: the script that trains it, without .py.
        tiny: options for tests: those that select the method, and small sizes.
        photos: options for a run of minutes on `photos`, at 32 pixels with a ResNet (ViT: 64).
        recipe: the recipe of its published settings, in configs/.
        protocol: the protocol of its paper's evaluations, a name in `PROTOCOLS`.
        saved: the name in checkpoints and results, if it is another one.
        uses_labels: whether it trains on labels, and so is not self-supervised.
    """

    name: str
    script: str
    tiny: str
    photos: str
    recipe: str
    protocol: str = "moco"
    saved: str = ""
    uses_labels: bool = False


SIX = "--n1 4 --n2 4 --n3 4 --n4 4 --n5 4 --n6 4"

_MOCOV2 = "--moco-k 256 --mlp --moco-t 0.2 --aug-plus --cos"
# no stochastic depth, because its random draws differ between devices
_VIT = "-a test_vit --mlp-dim 256 --online-drop-path 0"

# For the 1,140 training images of `photos`, the bank, the batch and the numbers of negatives are
# smaller. Batch norm has one group, because the statistics of smaller groups are mostly noise.
_PHOTOS = "--batch-size 32 --lr 0.008 --moco-m 0.99 --bn-splits 1 --save-every 1000"
_PHOTOS_V2 = f"{_PHOTOS} --moco-k 256 --mlp --moco-t 0.2 --aug-plus --cos"
# the published learning rate: LARS, .075 sqrt(batch)
_PHOTOS_SIMCLR = "--batch-size 32 --mlp-dim 512 --save-every 1000"
# a run has few steps, so the learning rate is higher and there is no stochastic depth
_PHOTOS_VIT = "--batch-size 32 --mlp-dim 512 --lr-warmup-epochs 1 --online-drop-path 0"
_PHOTOS_VIT += " --save-every 1000"
# heads of MoCo v3 for tests
_MOCOV3 = "--moco-dim 64 --moco-mlp-dim 64 --moco-m-cos"
_PHOTOS_MOCOV3 = "--batch-size 32 --moco-mlp-dim 512 --moco-m-cos --lr-warmup-epochs 1"
_PHOTOS_MOCOV3 += " --save-every 1000"
# The published learning rate. At 32 pixels, RandAugment leaves little of an image.
_PHOTOS_FNC = "--batch-size 32 --ema 0.99 --support-size 1 --randaugment 0 0 --save-every 1000"
_PHOTOS_MOBY = f"{_PHOTOS_VIT} --lr 0.004 --queue 512"

METHODS = {
    method.name: method
    for method in (
        Method(
            name="mocov1",
            script="main_synco",
            tiny="--moco-k 256",
            photos=f"{_PHOTOS} --moco-k 256 --schedule 12 16",
            recipe="mocov1_200.yaml",
            saved="moco",
        ),
        Method(
            name="mocov2",
            script="main_synco",
            tiny=_MOCOV2,
            photos=_PHOTOS_V2,
            recipe="mocov2_200.yaml",
            saved="moco",
        ),
        Method(
            name="mochi",
            script="main_synco",
            tiny=f"{_MOCOV2} --n-hard 16 --warmup-epochs 0 --n1 4 --n3 4",
            photos=f"{_PHOTOS_V2} --n-hard 16 --warmup-epochs 4 --n1 4 --n3 4",
            recipe="mochi_1024_512_256_200.yaml",
        ),
        Method(
            name="synco",
            script="main_synco",
            tiny=f"{_MOCOV2} --n-hard 16 --warmup-epochs 0 {SIX}",
            photos=f"{_PHOTOS_V2} --knn-every 5 --n-hard 16 --n1 2 --n2 2 --n3 2 --n4 1 --n5 1"
            " --n6 1 --warmup-epochs 4",
            recipe="synco_200.yaml",
        ),
        Method(
            name="adco",
            script="main_adco",
            tiny="--cluster 256 --no-ad-init --sym 1 --lr 0.01",
            photos=f"{_PHOTOS} --lr-final 0 --cluster 256",
            recipe="adco_200.yaml",
            protocol="adco",
        ),
        Method(
            name="simclr",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss simclr",
            photos=f"{_PHOTOS_SIMCLR} --loss simclr",
            recipe="simclr_800.yaml",
            protocol="sogclr",
        ),
        Method(
            name="sogclr",
            script="main_sogclr",
            tiny="--mlp-dim 256",
            photos=_PHOTOS_SIMCLR,
            recipe="sogclr_800.yaml",
            protocol="sogclr",
        ),
        # The temperatures of the next five are those of their recipes.
        Method(
            name="isogclr",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss isogclr",
            photos=f"{_PHOTOS_SIMCLR} --loss isogclr",
            recipe="cifar100/isogclr.yaml",
            protocol="sogclr",
        ),
        Method(
            name="dcl",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss dcl",
            photos=f"{_PHOTOS_SIMCLR} --loss dcl",
            recipe="cifar10/dcl_batch32.yaml",
            protocol="sogclr",
        ),
        Method(
            name="dclw",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss dclw",
            photos=f"{_PHOTOS_SIMCLR} --loss dclw",
            recipe="cifar10/dclw_batch32.yaml",
            protocol="sogclr",
        ),
        Method(
            name="debiased",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss debiased --t 0.5",
            photos=f"{_PHOTOS_SIMCLR} --loss debiased --t 0.5",
            recipe="stl10/debiased.yaml",
            protocol="sogclr",
        ),
        Method(
            name="hcl",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss hcl --t 0.5",
            photos=f"{_PHOTOS_SIMCLR} --loss hcl --t 0.5",
            recipe="stl10/hcl.yaml",
            protocol="sogclr",
        ),
        Method(
            name="supcon",
            script="main_sogclr",
            tiny="--mlp-dim 256 --loss supcon",
            photos=f"{_PHOTOS_SIMCLR} --loss supcon",
            recipe="cifar10/supcon.yaml",
            protocol="sogclr",
            uses_labels=True,
        ),
        Method(
            name="fnc",
            script="main_fnc",
            tiny="--support-size 1 --fn-topk 2 --fn-threshold 0.3 --randaugment 0 0",
            # at most 2 false negatives among 512 entries, not 10 among 65,536
            photos=f"{_PHOTOS_FNC} --fn-topk 2 --fn-threshold 0.8",
            recipe="fnc_100.yaml",
            protocol="fnc",
        ),
        Method(
            name="fnc-labels",
            script="main_fnc",
            tiny="--support-size 1 --fn-from labels --randaugment 0 0",
            photos=f"{_PHOTOS_FNC} --fn-from labels",
            recipe="fnc_100.yaml",
            protocol="fnc",
            uses_labels=True,
        ),
        Method(
            name="moby",
            script="main_moby",
            tiny=f"{_VIT} --queue 256",
            photos=f"{_PHOTOS_MOBY} --method moby",
            recipe="moby_swin_tiny.yaml",
            protocol="moby",
        ),
        Method(
            name="synco-v2",
            script="main_moby",
            tiny=f"{_VIT} --method synco --queue 256 --n-hard 16 --synthetic-first 0"
            f" --synthetic-last 20 {SIX}",
            photos=f"{_PHOTOS_MOBY} --method synco --n-hard 32 --synthetic-first 4"
            f" --synthetic-last 24 {SIX}",
            recipe="synco_swin_tiny.yaml",
            protocol="moby",
            saved="synco",
        ),
        Method(
            name="byol",
            script="main_moby",
            tiny=f"{_VIT} --method byol",
            photos=f"{_PHOTOS_VIT} --method byol --lr 0.002 --wd 0.05 --moco-m 0.99",
            recipe="byol_swin_tiny.yaml",
            protocol="moby",
        ),
        Method(
            name="mocov3",
            script="main_mocov3",
            tiny=_MOCOV3,
            photos=f"{_PHOTOS_MOCOV3} --crop-min 0.2",
            recipe="mocov3_r50_100.yaml",
            protocol="mocov3",
        ),
        Method(
            name="mocov3-vit",
            script="main_mocov3",
            tiny=f"-a test_vit --optimizer adamw --wd 0.1 --stop-grad-conv1 {_MOCOV3}",
            photos=f"{_PHOTOS_MOCOV3} --optimizer adamw --lr 0.004 --wd 0.1 --stop-grad-conv1"
            " --moco-t 0.2",
            recipe="mocov3_vit_small.yaml",
            protocol="mocov3",
            saved="mocov3",
        ),
    )
}


def trains_on_labels(name: object) -> bool:
    """Return whether `name`, the method of a checkpoint or a run, is pre-trained on labels."""
    name = str(name).removesuffix(", fine-tuned")
    return any(name == (one.saved or one.name) for one in METHODS.values() if one.uses_labels)


@dataclass(frozen=True)
class Protocol:
    """The settings with which a paper evaluates encoders by one of the scripts.

    Attributes:
        name: the name for --protocol.
        script: the evaluation script, without .py.
        recipe: the recipe of the settings, in configs/; "" for the script's defaults.
        options: values of options with which this recipe applies; {} if it applies to all others.
        transformers: whether this recipe applies to transformers alone.
        every_gpu: whether it starts a process on every visible GPU by default.
        unless: options of another evaluation: if the command line has one of them, the checkpoint's
            method does not select this protocol.
    """

    name: str
    script: str
    recipe: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    transformers: bool = False
    every_gpu: bool = False
    unless: tuple[str, ...] = ()


# The first protocol of a script is its default.
PROTOCOLS = (
    Protocol("moco", "main_lincls"),
    Protocol(
        "adco",
        "main_lincls",
        "lincls_adco_places205.yaml",
        {"dataset": "places205"},
        every_gpu=True,
    ),
    Protocol("adco", "main_lincls", "lincls_adco.yaml", every_gpu=True),
    Protocol("fnc", "main_lincls", "lincls_fnc.yaml"),
    Protocol("moby", "main_lincls", "finetune_moby.yaml", {"weights": "finetune"}),
    Protocol("moby", "main_lincls", "lincls_moby.yaml"),
    Protocol("sogclr", "main_lincls", "lincls_sogclr.yaml"),
    Protocol("mocov3", "main_lincls", "lincls_mocov3_vit.yaml", transformers=True),
    Protocol("mocov3", "main_lincls", "lincls_mocov3.yaml"),
    Protocol("synco", "main_semisup"),
    Protocol("fnc", "main_semisup", "semisup_fnc_1pct.yaml", {"train_percent": 1}),
    Protocol("fnc", "main_semisup", "semisup_fnc_10pct.yaml", {"train_percent": 10}),
    Protocol("moco", "main_voc07"),
    Protocol(
        "adco",
        "main_voc07",
        "voc07_adco.yaml",
        unless=("classifier", "c", "test_resize", "dump_features"),
    ),
    *(
        Protocol(name, "main_retrieval", recipe, {"dataset": dataset})
        for name, dataset, recipe in (
            ("revisited", "roxford5k", ""),
            ("revisited", "rparis6k", ""),
            ("dino", "roxford5k", "retrieval_dino_oxford.yaml"),
            ("dino", "rparis6k", "retrieval_dino_paris.yaml"),
            ("synco-v2", "roxford5k", "retrieval_syncov2.yaml"),
            ("synco-v2", "rparis6k", "retrieval_syncov2.yaml"),
        )
    ),
)
