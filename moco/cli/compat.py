"""Tables of other repositories' options, and of the options to use here instead.

They cover the scripts of MoCo (v1 to v3), SynCo, AdCo, SogCLR, SimCLR, FNC, MoBY, DINO, MAE, SwAV,
solo-learn and Lightly. Names have no leading dashes, and `-` for `_`.
"""

from collections.abc import Collection

# other names of the same options; the scripts also accept them
ALIASES = {
    "num-workers": "workers",
    "output-dir": "save-dir",
    "max-epochs": "epochs",
    "accum-iter": "accumulation-steps",
}

# other names, and similar options here; the first one that the script has is suggested
_SIMILAR = {
    "out-dim output-dim feat-dim proj-output-dim": "moco-dim dim proj-out-dim",
    "proj-dim low-dim nce-dim": "moco-dim dim proj-out-dim",
    "proj-hidden-dim pred-hidden-dim hidden-dim mlp-dim moco-mlp-dim": "mlp-dim moco-mlp-dim",
    "lr-warmup warmup-epochs warmup-epoch warmup warm": "lr-warmup-epochs",
    "min-lr final-lr end-lr eta-min": "lr-final",
    "opt": "optimizer",
    "momentum-teacher momentum-target base-tau ema-decay moco-momentum alpha-ema": "moco-m ema",
    "teacher-temp student-temp nce-t temp tau temperature moco-t t": "moco-t t temperature",
    "queue-size queue-len queue-length nce-k": "moco-k cluster queue memory-multiplier",
    "moco-k queue cluster": "moco-k cluster queue memory-multiplier",
    "drop-path drop-path-rate": "drop-path online-drop-path",
    "smoothing": "label-smoothing",
    "local-crops-number num-small-crops nmb-crops size-crops multicrop": "multi-crop recipe",
    "global-crops-scale": "crop-scale",
    "min-scale": "crop-min",
    "color-jitter-prob": "jitter-p",
    "grayscale-prob": "grayscale-p",
    "gaussian-blur-prob": "blur-p",
    "hflip": "flip-p",
    "vflip": "vertical-flip-p",
    "saveckp-freq save-freq checkpoint-freq save-interval checkpoint-steps": "save-every",
    "knn knn-eval knn-freq": "knn-every",
    "backbone model net network patch-size": "arch",
    "pretrained-weights pretrained-feature-extractor pretrain-path": "pretrained",
    "checkpoint-path ckpt ckpt-path": "pretrained",
    "resume-path load-checkpoint": "resume",
    "accelerator device-type": "device",
    "workers-per-gpu n-workers": "workers",
    "keep-checkpoint-max": "keep",
    "accumulate-grad-batches": "accumulation-steps",
    "gradient-clip-val": "clip-grad",
    "stop-epoch": "epochs",
}

_FOLDER = "give the data folder as DIR"
_PROCESSES = (
    "use --multiprocessing-distributed for all GPUs, --gpu ID for one, --device cpu for none"
)
_PROCESSES += ", or torchrun or srun"
_TPU = "GPUs are found automatically; --multiprocessing-distributed uses all of them"
_PRECISION = "use --amp fp16, --amp bf16 or --amp off"
_RATE = "use --cos, or --schedule EPOCH ..."
_VIEWS = "views are recipes: use --recipe, --jitter, --jitter-p, --blur-p, --randaugment"
_METHOD = "no counterpart here: it belongs to another method; leave it out"
_LOG = "no counterpart here: log.jsonl and TensorBoard events are in the run folder; leave it out"
_ADVICE = {
    "wandb use-wandb wandb-project project entity offline neptune comet mlflow": _LOG,
    "tb-path tb-dir log-dir tensorboard": (
        "TensorBoard events are in the run folder: use --save-dir DIR"
    ),
    "exp-name experiment trial run-name": "use --save-dir DIR, or --output DIR with --tag NAME",
    "model-dir exp-dir dump-path checkpoint-dir": "use --save-dir DIR",
    "use-tpu tpu-name tpu-zone gcp-project master": _TPU,
    "use-amp amp-opt-level fp16 use-fp16 use-bf16 bf16 precision no-amp": _PRECISION,
    "sync-bn syncbn sync-batchnorm": (
        "each method chooses its batch norm (shuffled or synchronized); leave it out"
    ),
    "devices gpus num-gpus ngpus strategy cuda use-cuda no-cuda dist-on-itp": _PROCESSES,
    "batch-size-per-gpu batch-size-per-device": (
        "use --batch-size; --help says whether it is a node's or a process's"
    ),
    "base-lr blr start-lr": "use --lr; --learning-rate-scaling scales it by the batch size",
    "sched scheduler lr-scheduler lr-decay-epochs": _RATE,
    "lr-decay-rate decay-epochs decay-rate cosine": _RATE,
    "weight-decay-end": "no counterpart here: the weight decay is constant; use --wd",
    "lars": "use --optimizer lars",
    "color-jitter color-jitter-strength jitter-d use-blur aa auto-augment": _VIEWS,
    "start-epoch": "use --resume FILE, which begins at the checkpoint's epoch",
    "pin-mem pin-memory zip cache-mode cache-dataset data-format dali": (
        "images are read from folders; leave it out"
    ),
    "data-dir dataset train-data-path val-data-path data-root data-folder root": _FOLDER,
    "eval evaluate eval-only linear-eval": "use main_lincls.py or main_knn.py",
    "num-classes nb-classes n-classes": "classes are counted in the data; leave it out",
    "lr-backbone lr-classifier": "only main_semisup.py has this option",
    "benchmark deterministic cudnn-benchmark": (
        "no counterpart here: --seed fixes weights, order and views; leave it out"
    ),
    "moco-m-cos": (
        "the momentum always rises to 1 in main_moby.py, and is constant in other scripts; leave "
        "it out, or use main_mocov3.py for MoCo v3"
    ),
    "mixup cutmix smoothing label-smoothing reprob": "no counterpart here; leave it out",
    "mask-ratio norm-pix-loss norm-last-layer": _METHOD,
    "use-bn-in-head freeze-last-layer warmup-teacher-temp": _METHOD,
    "warmup-teacher-temp-epochs epsilon sinkhorn-iterations nmb-prototypes": _METHOD,
    "prototypes moco-align moco-unif": _METHOD,
    "throughput": "no counterpart here: every log line has images_per_s; leave it out",
    "hub push-to-hub": "use tools/export.py --hf DIR, and upload DIR",
}


def replacement(name: str, options: Collection[str]) -> str | None:
    """Return advice on another repository's option; None if the tables lack it.

    Args:
        name: the option, spelled as in the tables.
        options: the script's own options, with leading dashes.
    """
    for names, similar in _SIMILAR.items():
        if name in names.split():
            for option in similar.split():
                if f"--{option}" in options:
                    return f"use --{option}"
    return next((advice for names, advice in _ADVICE.items() if name in names.split()), None)


# options of FNC's run.py that have another name in main_fnc.py, and advice on the others;
# translate.py translates whole commands
FNC_ALIASES = {
    "train-batch-size": "batch-size",
    "train-epochs": "epochs",
    "warmup-epochs": "lr-warmup-epochs",
}
FNC_REPLACEMENTS = {
    **dict.fromkeys(
        "data-dir dataset cache-dataset".split(),
        "give the data folder as DIR, on a disk; buckets are not read",
    ),
    "model-dir": "use --save-dir DIR; buckets are not written to",
    **dict.fromkeys(
        "mode train-split eval-split eval-steps eval-batch-size eval-name".split(),
        "this script pre-trains; leave it out",
    ),
    **dict.fromkeys("variable-schema checkpoint".split(), "use main_lincls.py --pretrained FILE"),
    **dict.fromkeys(
        "resnet-depth width-multiplier sk-ratio se-ratio".split(), "use -a, as in -a resnet50"
    ),
    **dict.fromkeys("global-bn hidden-norm".split(), "this is always on; leave it out"),
    "proj-head-mode": "use --num-proj-layers",
    "train-steps": "use --epochs",
    **dict.fromkeys(
        "train-summary-steps checkpoint-steps".split(),
        "use --print-freq STEPS, --save-every EPOCHS",
    ),
    "checkpoint-epochs": "use --save-every EPOCHS",
    "keep-checkpoint-max": "use --save-every EPOCHS and --keep N",
}
