"""Train one classifier or several on labelled images, test them, and keep the best."""

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data import cache, registry
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.engine import checkpoint, features, precision
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.evaluate import metrics
from moco.evaluate.inputs import Splits
from moco.evaluate.results import write_results
from moco.files import read_json


@torch.no_grad()
def init_classifier(layer: nn.Linear, std: float = 0.01) -> None:
    """Draw new weights from N(0, std²), and set the bias to 0.

    The draws are made on the CPU, so that a run starts from the same classifier on every device.
    """
    layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=std))
    layer.bias.zero_()


@torch.inference_mode()
def test(
    net: nn.Module, images: Images, args: Namespace, device: torch.device, heads: int = 1
) -> list[dict[str, float]]:
    """What each of `net`'s classifiers, of which there are `heads`, is worth on `images`: see `metrics`, all in [0, 1].

    Each image counts once, whatever the number of ranks, and a rank may have none.
    """
    net.eval()
    meter = metrics.create_meter(images.multi_label, heads, len(images.classes), device)
    for batch, label in features.test_batches(images, args, device):
        with precision.autocast(args.amp, device):
            meter.add(by_head(net(batch)), label)
    return meter.read()


def by_head(logits: Tensor) -> Tensor:
    """The logits of one classifier [B, classes] or of several [heads, B, classes], as the latter."""
    return logits.view(-1, *logits.shape[-2:])


class Setting(NamedTuple):
    """What tells one classifier's training from another's."""

    lr: float
    wd: float


class Classification(Trainer):
    """Trains one classifier or several, tests them after every epoch, and keeps the best.

    The best one is chosen on val/, as in the papers, or on the held-out part of train/. `settings` are the classifiers'.
    """

    best_name = "model_best.pth.tar"

    def __init__(
        self,
        args: Namespace,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        settings: list[Setting],
    ):
        self.val, self.held_out, self.settings, self.best = (
            images.val,
            images.held_out,
            settings,
            0.0,
        )
        self.metric = registry.METRIC[args.dataset]
        self._decays = len({setting.wd for setting in settings})
        super().__init__(args, net, images.train, device)

    def losses(self, logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to train on and what to show, from logits [heads, B, classes].

        Cross entropy; where images show several classes, the mean binary one over what counts.
        """
        if label.dim() == 2:
            counts = (label >= 0).expand_as(logits)
            target = label.clamp_min(0).to(logits.dtype).expand_as(logits)
            each = F.binary_cross_entropy_with_logits(
                logits, target, counts.to(logits.dtype), reduction="none"
            )
            losses = each.sum((1, 2)) / counts.sum((1, 2)).clamp_min(1)
        else:
            losses = torch.stack([F.cross_entropy(one, label) for one in logits])
        best = losses.nan_to_num(
            torch.inf
        ).argmin()  # the one to show; a rate too high for the features may have diverged
        # take, unlike [best], does not wait for the device
        shown = {"loss": losses.take(best)}
        if label.dim() == 1:
            top1, top5 = (
                right.float().mean(-1).take(best) for right in metrics.correct(logits, label)
            )
            shown |= {"acc1": top1, "acc5": top5}
        return losses.sum(), shown

    def test(self) -> None:
        """Choose a classifier and test it on val/: `accuracy` is its own, beside each one's metric where there are several."""
        on_val = self._test(self.val)
        judged = self._test(self.held_out) if self.held_out else on_val
        best = max(
            self.settings,
            key=lambda one: tuple(judged[one][name] for name in self._order(judged[one])),
        )
        self.chosen_by = judged[best][self.metric]
        self.accuracy = {name: on_val[best][name] for name in self._order(on_val[best])}
        if self.held_out:
            self.accuracy[f"held_out_{self.metric}"] = self.chosen_by
        if len(self.settings) > 1:
            self.accuracy |= {"best_lr": best.lr} | (
                {"best_wd": best.wd} if self._decays > 1 else {}
            )
            self.accuracy |= {
                f"{self.metric}_{self.name(one)}": found[self.metric]
                for one, found in on_val.items()
            }

    def _order(self, found: dict[str, float]) -> list[str]:
        """The metrics that this data set reports, first the one that counts."""
        return [
            self.metric,
            *(name for name in found if name not in (self.metric, "mean_per_class")),
        ]

    def _test(self, images: Images) -> dict[Setting, dict[str, float]]:
        return dict(
            zip(
                self.settings,
                test(self.module, images, self.args, self.device, len(self.settings)),
                strict=True,
            )
        )

    def name(self, setting: Setting, space: str = "") -> str:
        """What a classifier is called: lr30, or lr30_wd0.0001 where several decays are tried; `lr 30` to read."""
        wd = f"{space or '_'}wd{space}{setting.wd:g}" if self._decays > 1 else ""
        return f"lr{space}{setting.lr:g}{wd}"

    def end_epoch(self, done: int) -> dict[str, float]:
        self.test()
        self.best = max(self.best, self.chosen_by)
        if self.best == self.chosen_by:
            self.save(self.best_name, done)
        self.save("checkpoint.pth.tar", done)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def keep_in_memory(self) -> None:
        sets = self.images, self.val, self.held_out
        self.images, self.val, self.held_out = cache.load(self.args, *sets)

    def save_inside(self, epoch: int, step: int) -> Path:
        return self.save("checkpoint.pth.tar", epoch, step)

    def more_state(self) -> dict[str, Any]:
        return {
            "best_acc1": self.best,
            "classes": list(self.images.classes),
            "image_size": self.args.image_size,
        }

    def run(self, protocol: str) -> None:
        """Train what is left to train, or only test; print the accuracies and write results.json.

        If no epochs are left, the results of the run's end stay as they are.
        """
        done = self.first_epoch >= self.args.epochs and not self.args.evaluate
        if done:
            self._say_if_done()
        if done or self.args.evaluate:
            self.test()
        else:
            self.train()
            self.finish()
        found = self.accuracy
        title = metrics.TITLES[self.metric]
        if len(self.settings) > 1:
            each = [
                f"{self.name(one, ' ')}: {100 * found[f'{self.metric}_{self.name(one)}']:.3f}"
                for one in self.settings
            ]
            print_rank0("  ".join(each) + f"  ({title}; the best follows)")
        print_rank0(
            "* "
            + " ".join(
                f"{name} {100 * found[key]:.3f}"
                for key, name in metrics.TITLES.items()
                if key in found
            )
        )
        if done:
            self.args.epochs = self.first_epoch  # what the classifier was trained for
            if self._has_results():
                print_rank0("results.json is of the end of these epochs, and stays as it is")
                return
        write_results(self.args, protocol, found, self.seconds)

    def _has_results(self) -> bool:
        """Return whether results.json is of as many epochs as are done; rank 0 answers."""
        try:
            written = read_json(Path(self.args.save_dir) / "results.json")["settings"]["epochs"]
        except (InputError, KeyError, TypeError):
            written = None
        return written == self.first_epoch

    def finish(self) -> None:
        """What follows training."""

    def check_resumed(self, state: checkpoint.State) -> None:
        if not isinstance(state.get("best_acc1"), int | float):
            raise InputError(
                f"{self.args.resume}: is of no classifier; --resume goes on with those of this script's runs"
            )
        classes = state.get("classes")
        if classes is not None and classes != list(self.images.classes):
            raise InputError(f"{self.args.resume}: {_difference(classes, self.images.classes)}")
        self.best = state["best_acc1"]


def _difference(saved: object, classes: tuple[str, ...]) -> str:
    """Return how the classes of a classifier differ from those of the data."""
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    if len(names) != len(classes):
        return f"has {len(names)} classes, but the data has {len(classes)}; give the data that it was trained on"
    place = next(
        (i for i, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1]), 0
    )
    return (
        f"its classes differ from the data's: number {place} is '{names[place]}', but '{classes[place]}' in the data; "
        "give the data that it was trained on"
    )
