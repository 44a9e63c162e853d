#!/usr/bin/env python
"""Semi-supervised learning: fine-tune a pre-trained encoder on 1 %, 10 % or all of the labels, test it on val/.

Without --pretrained the encoder is randomly initialised, which is the baseline to compare with.
"""

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import torch

from moco.cli import entry, options, values
from moco.cli.parser import Options, Parser
from moco.errors import InputError
from moco.evaluate import classifier, finetune, inputs
from moco.evaluate.probe import LinearProbe


def parser() -> Parser:
    p = Parser(__doc__)
    options.add_input(p, batch=1024, recipe="probe", arch=None)
    options.add_evaluation(p)
    labels = p.add_argument_group("labels")
    labels.add_argument(
        "--train-percent",
        type=int,
        choices=(1, 10, 100),
        default=10,
        help="of the labels: on ImageNet those of the published lists, else, or with --class-list, a sample of each class",
    )
    labels.add_argument(
        "--subset-file", metavar="FILE", help="list of the labelled images, one file name a line"
    )
    options.add_weights(p, "finetune")
    head = p.add_argument_group("classifier")
    head.add_argument(
        "--lr-backbone",
        type=values.learning_rate,
        default=0.02,
        metavar="LR",
        help="learning rate of the pre-trained encoder",
    )
    head.add_argument(
        "--lr-classifier",
        type=values.learning_rate,
        default=0.02,
        metavar="LR",
        help="learning rate of the new classifier",
    )
    head.add_argument(
        "--ft-proj",
        type=values.whole("[0, 100]"),
        default=0,
        metavar="N",
        help="keep N layers of the projection head below it",
    )
    head.add_argument("--zero-init-classifier", action="store_true", help="begin with weights of 0")
    frozen = "--weights freeze trains a classifier alone, which starts like a linear probe's; leave it out"
    p.has_effect(
        "lr_backbone zero_init_classifier", lambda args: args.weights == "finetune", frozen
    )
    options.add_optimizer(p, epochs=30, lr=None, wd=1e-6, schedule=[])
    p.set_defaults(cos=True)
    options.add_choice(p)
    options.add_run(p)
    options.add_launch(p)
    return p


def check(args: Options) -> None:
    args.method = "semisup"
    if args.ft_proj and not args.pretrained and not args.evaluate:
        raise InputError(
            "--ft-proj keeps layers of a pre-trained head: give the checkpoint with --pretrained FILE"
        )
    if args.ft_proj and args.weights == "freeze":
        raise InputError(
            "--ft-proj needs --weights finetune: a frozen encoder is judged by its backbone's features"
        )
    inputs.check_choice(args)
    inputs.restore_options(
        args,
        (
            "weights",
            "lr_backbone",
            "lr_classifier",
            "wd",
            "train_percent",
            "subset_file",
            "ft_proj",
        ),
    )
    inputs.check(args)
    inputs.check_labels(args)


def worker(args: Options, device: torch.device) -> None:
    images = inputs.splits(args)
    net = inputs.pretrained(args, len(images.train.classes), device)
    setting = classifier.Setting(args.lr_classifier, args.wd)
    if args.weights == "freeze":
        trainer = LinearProbe(args, net, images, device, [setting])
    else:
        trainer = finetune.FineTuning(
            args, net, images, device, setting, args.lr_backbone, args.zero_init_classifier
        )
    trainer.best_name = "model_best_semisup.pth.tar"
    trainer.run(f"semisup{args.train_percent}{'_frozen' if args.weights == 'freeze' else ''}")


if __name__ == "__main__":
    entry.main(parser(), check, worker)
