"""Train one classifier or several on labelled images, test them, and keep the best."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import Config, Probing, replaced
from moco.data import cache, registry
from moco.data.images import Images
from moco.distributed import print_rank0
from moco.engine import checkpoint, features, precision
from moco.engine.announce import print_if_done
from moco.engine.trainer import Task, Trainer
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
def evaluate(
    net: nn.Module, images: Images, config: Config, device: torch.device, heads: int = 1
) -> list[dict[str, float]]:
    """Evaluate each of the `heads` classifiers of `net` on `images`.

    Returns metrics in [0, 1] by name (see moco/evaluate/metrics.py). Each image counts once,
    whatever the number of ranks, and a rank may have none.
    """
    net.eval()
    meter = metrics.create_meter(images.multi_label, heads, len(images.classes), device)
    for batch, label in features.test_batches(images, config, device):
        with precision.autocast(config.compute.amp, device):
            meter.add(by_head(net(batch)), label)
    return meter.read()


def by_head(logits: Tensor) -> Tensor:
    """The logits of one classifier [B, classes] or of several [heads, B, classes], as the latter."""
    return logits.view(-1, *logits.shape[-2:])


class Setting(NamedTuple):
    """What tells one classifier's training from another's."""

    lr: float
    wd: float


class ClassifierTask(Task):
    """The training of one classifier or several, which tests them after every epoch.

    The best one is kept. It is chosen on val/, as in the papers, or on the held-out part of train/.

    Args:
        config: the settings of the evaluation.
        net: the network with the classifiers.
        images: what they are trained, chosen and tested on.
        device: the device of this process.
        settings: those of each classifier.
        best_name: file name of the best checkpoint.
    """

    def __init__(
        self,
        config: Probing,
        net: nn.Module,
        images: Splits,
        device: torch.device,
        settings: list[Setting],
        best_name: str = "model_best.pth.tar",
    ):
        super().__init__(config, net, images.train, device)
        self.val, self.held_out, self.settings = images.val, images.held_out, settings
        self.best, self.best_name = 0.0, best_name
        self.metric = registry.METRIC[config.input.dataset]
        self._decays = len({setting.wd for setting in settings})

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
                evaluate(self.module, images, self.config, self.device, len(self.settings)),
                strict=True,
            )
        )

    def name(self, setting: Setting, space: str = "") -> str:
        """What a classifier is called: lr30, or lr30_wd0.0001 where several decays are tried; `lr 30` to read."""
        wd = f"{space or '_'}wd{space}{setting.wd:g}" if self._decays > 1 else ""
        return f"lr{space}{setting.lr:g}{wd}"

    def end_epoch(self, trainer: Trainer, done: int) -> dict[str, float]:
        """Test the classifiers, and save them after `done` epochs; return what to log."""
        self.test()
        self.best = max(self.best, self.chosen_by)
        if self.best == self.chosen_by:
            trainer.save(self.best_name, done)
        trainer.save("checkpoint.pth.tar", done)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def load_images(self) -> None:
        """Decode the images of every split into memory, if --cache-images says so."""
        sets = self.images, self.val, self.held_out
        self.images, self.val, self.held_out = cache.load(self.config.input, *sets)

    def save_inside(self, trainer: Trainer, epoch: int, step: int) -> Path:
        """Save after `step` steps, some of them of an unfinished epoch; return the file's path."""
        return trainer.save("checkpoint.pth.tar", epoch, step)

    def state(self) -> dict[str, Any]:
        """Return the best accuracy, the class names and the image size."""
        return {
            "best_acc1": self.best,
            "classes": list(self.images.classes),
            "image_size": self.config.views.image_size,
        }

    def restore(self, state: checkpoint.State) -> None:
        """Restore the best accuracy. Raises InputError if the checkpoint has other classes."""
        path = self.config.log.resume
        if not isinstance(state.get("best_acc1"), int | float):
            raise InputError(
                f"{path}: is of no classifier; --resume goes on with those of this script's runs"
            )
        classes = state.get("classes")
        if classes is not None and classes != list(self.images.classes):
            raise InputError(f"{path}: {_difference(classes, self.images.classes)}")
        self.best = state["best_acc1"]


def run(task: ClassifierTask, protocol: str) -> None:
    """Train the classifiers, or only test them; print the accuracies and write results.json.

    If no epochs are left to train, the results of the last epoch stay as they are.
    """
    trainer, config = Trainer(task), task.config
    done = trainer.first_epoch >= config.optimizer.epochs and not config.only_tests
    if done:
        print_if_done(trainer)
    if done or config.only_tests:
        task.test()
    else:
        trainer.train()
    _print_accuracies(task)
    if done:
        # what the classifier was trained for
        config = replaced(config, epochs=trainer.first_epoch)
        if _has_results(config):
            print_rank0("results.json is of the end of these epochs, and stays as it is")
            return
    write_results(config, protocol, task.accuracy, trainer.seconds)


def _print_accuracies(task: ClassifierTask) -> None:
    """Print the accuracy of each classifier, and all metrics of the best one."""
    found, title = task.accuracy, metrics.TITLES[task.metric]
    if len(task.settings) > 1:
        each = [
            f"{task.name(one, ' ')}: {100 * found[f'{task.metric}_{task.name(one)}']:.3f}"
            for one in task.settings
        ]
        print_rank0("  ".join(each) + f"  ({title}; the best follows)")
    shown = (
        f"{name} {100 * found[key]:.3f}" for key, name in metrics.TITLES.items() if key in found
    )
    print_rank0("* " + " ".join(shown))


def _has_results(config: Probing) -> bool:
    """Return whether results.json is of as many epochs as `config` has; rank 0 answers."""
    try:
        results = read_json(Path(config.run.save_dir) / "results.json")
        written = results["settings"]["epochs"]
    except (InputError, KeyError, TypeError):
        written = None
    return written == config.optimizer.epochs


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
