#!/usr/bin/env python
"""Pre-train a ResNet with FNC: negatives that look like the image itself are attracted, or left out.

--support-size 0 --fn-mode off --memory-multiplier 0 is SimCLR. configs/fnc_100.yaml holds the published settings.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch
from torch import nn

from moco import distributed
from moco.builder.fnc import FNC
from moco.cli import entry, options, values
from moco.cli.parser import Options, Parser
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.encoder.networks import projector
from moco.encoder.resnets import resnet
from moco.engine import pretrain
from moco.errors import InputError
from moco.launch import processes
from moco.loss.false_negatives import MODES, Cancellation

PUBLISHED = {
    "train-batch-size": "batch-size",
    "train-epochs": "epochs",
    "warmup-epochs": "lr-warmup-epochs",
}
_ONE_JOB = "this script pre-trains; main_lincls.py probes, main_semisup.py fine-tunes"
ELSEWHERE = {
    **dict.fromkeys(
        "data-dir dataset cache-dataset".split(),
        "give the data folder as DIR, on a disk; buckets are not read",
    ),
    "model-dir": "use --save-dir DIR; buckets are not written to",
    **dict.fromkeys(
        "mode train-mode train-split eval-split eval-steps eval-batch-size eval-name".split(),
        _ONE_JOB,
    ),
    **dict.fromkeys(
        "zero-init-logits-layer ft-proj-selector fine-tune-after-block variable-schema checkpoint".split(),
        _ONE_JOB,
    ),
    **dict.fromkeys(
        "resnet-depth width-multiplier sk-ratio se-ratio".split(), "use -a, as in -a resnet50"
    ),
    **dict.fromkeys("global-bn hidden-norm".split(), "it is always so; leave it out"),
    "proj-head-mode": "use --num-proj-layers",
    "train-steps": "use --epochs",
    **dict.fromkeys(
        "train-summary-steps checkpoint-steps".split(),
        "use --print-freq STEPS, --save-every EPOCHS",
    ),
    "checkpoint-epochs": "use --save-every EPOCHS",
    "keep-checkpoint-max": "use --save-every EPOCHS and --keep N",
}


def parser() -> Parser:
    p = Parser(__doc__, ELSEWHERE)
    options.add_pretrain(p)
    group = p.add_argument_group("FNC")
    group.add_argument(
        "--support-size",
        type=values.whole("[0, 100]"),
        default=8,
        metavar="N",
        help="extra views per image, used to find false negatives",
    )
    group.add_argument(
        "--fn-mode",
        choices=MODES,
        default="attract",
        help="what becomes of false negatives; off: none is looked for",
    )
    group.add_argument(
        "--fn-topk",
        type=values.natural,
        default=10,
        metavar="K",
        help="maximum number of false negatives per image",
    )
    group.add_argument(
        "--fn-threshold",
        type=values.real("[-1, 1]"),
        default=0.7,
        metavar="COS",
        help="minimum cosine similarity of a false negative",
    )
    group.add_argument(
        "--memory-multiplier",
        type=values.whole("[0, 100000]"),
        default=16,
        metavar="N",
        help="size of the memory, in total batches; 0: no memory, images are compared with the batch",
    )
    group.add_argument(
        "--ema",
        type=values.average,
        default=0.999,
        help="momentum of the encoder that fills the memory",
    )
    group.add_argument(
        "--temperature",
        type=values.temperature,
        default=0.1,
        metavar="T",
        help="softmax temperature",
    )
    group.add_argument(
        "--num-proj-layers",
        type=values.layers,
        default=3,
        help="linear layers of the projection head",
    )
    group.add_argument("--proj-out-dim", type=values.width, default=128, help="feature size")
    group.add_argument(
        "--loss-chunk",
        type=values.positive,
        default=256,
        metavar="IMAGES",
        help="images compared at a time; fewer need less memory",
    )
    off = "false negatives are not searched (--fn-mode off, or --fn-topk 0); leave it out"
    p.has_effect("fn_topk", lambda args: args.fn_mode != "off", off)
    p.has_effect("fn_threshold", lambda args: args.fn_mode != "off" and args.fn_topk, off)
    no_memory = "without a memory (--memory-multiplier 0) there is one encoder; leave it out"
    p.has_effect("ema", lambda args: args.memory_multiplier, no_memory)
    p.also_named(PUBLISHED)
    p.set_defaults(
        epochs=100,
        batch_size=4096,
        recipe="fnc",
        optimizer="lars",
        lr=0.1,
        learning_rate_scaling="sqrt",
    )
    p.set_defaults(lr_warmup_epochs=10, lr_by="step", cos=True)
    return p


def check(args: Options) -> None:
    args.views = 2 + args.support_size
    passes = args.memory_multiplier * args.accumulation_steps
    if 0 < passes < args.views:
        least = -(-args.views // args.accumulation_steps)
        given = (
            f"--memory-multiplier {args.memory_multiplier} with --support-size {args.support_size}"
        )
        raise InputError(
            f"{given}: the memory must hold a batch's {args.views} views; give {least} or more, or 0 for none"
        )
    check_negatives(args)
    args.method = "fnc"
    pretrain.check(args)


def check_negatives(args: Options) -> None:
    """Raise InputError if all entries that an image is compared with could be false negatives."""
    p = processes.plan(args)
    batch = args.batch_size // p.local * p.world_size  # images in a pass, over all processes
    rows = args.memory_multiplier * args.accumulation_steps * batch or args.views * batch
    others = rows - args.views  # its own views are neither negatives nor false negatives
    if args.fn_mode != "off" and args.fn_topk >= others > 0:
        where = (
            "the memory (--memory-multiplier)"
            if args.memory_multiplier
            else "the batch (--batch-size)"
        )
        least = (
            f"{where} has {others} entries of other images, and at least one must stay a negative"
        )
        raise InputError(
            f"--fn-topk {args.fn_topk}: {least}; give {others - 1} or fewer, or --fn-mode off"
        )


def encoder(args: Options, device: torch.device) -> nn.Module:
    net = resnet(args.arch, args.proj_out_dim, stem=args.stem, zero_init_residual=True)
    last = nn.BatchNorm1d(args.proj_out_dim)
    last.bias.requires_grad_(False)  # stays 0
    width = net.fc.in_features
    net.fc = projector([*[width] * args.num_proj_layers, args.proj_out_dim], last)
    return distributed.sync_batch_norm(net, device)


def worker(args: Options, device: torch.device) -> None:
    rows = (
        args.memory_multiplier
        * args.batch_per_process
        * distributed.world_size()
        * args.accumulation_steps
    )

    def build(images: Images) -> FNC:
        labels = (
            torch.as_tensor(images.labels)
            if len(images.classes) > 1 and not images.multi_label
            else None
        )
        how = Cancellation(args.fn_mode, args.fn_topk, args.fn_threshold)
        make = lambda: encoder(args, device)  # noqa: E731
        return FNC(
            make, args.proj_out_dim, rows, args.ema, args.temperature, how, args.loss_chunk, labels
        )

    wanted = (
        f"up to {args.fn_topk} above {args.fn_threshold:g} of each image"
        if args.fn_mode != "off"
        else "not looked for"
    )
    print_rank0(
        f"{args.views} views; false negatives: {args.fn_mode}, {wanted}; {f'a memory of {rows} rows' if rows else 'no memory'}"
    )
    pretrain.train(args, device, build)


if __name__ == "__main__":
    entry.main(parser(), check, worker)
