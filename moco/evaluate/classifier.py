"""Train one or several classifiers on labelled images, test them, and keep the best."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import Config, Probing, replaced
from moco.data import cache, catalog
from moco.data.images import Images
from moco.engine import checkpoint, features, precision
from moco.engine.announce import print_if_done
from moco.engine.task import Task
from moco.engine.trainer import Trainer
from moco.errors import InputError
from moco.evaluate import metrics, other_images
from moco.evaluate.results import write_results
from moco.evaluate.splits import Splits
from moco.files import read_json
from moco.messages import counted, print_rank0


@torch.no_grad()
def init_classifier(layer: nn.Linear, zeros: bool = False) -> None:
    """Draw the weights of `layer` from N(0, .01²), or set them to 0 if `zeros`. Set its bias to 0.

    The weights are drawn on the CPU, so that they are the same on every device.
    """
    std = 0.0 if zeros else 0.01
    layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=std))
    layer.bias.zero_()


@torch.inference_mode()
def evaluate(
    net: nn.Module, images: Images, config: Config, device: torch.device, heads: int = 1
) -> list[dict[str, float]]:
    """Evaluate each of the `heads` classifiers of `net` on `images`.

    Returns the metrics of each classifier by name, in [0, 1]; see moco/evaluate/metrics.py. They
    cover the images of all ranks. Each image counts once, and a rank may have none. With
    `--eval-data`, only the classes of its images can be predicted.

    Args:
        net: the network, [B, 3, H, W] -> logits, [B, num_classes] or [heads, B, num_classes]. It
            is left in eval mode.
        images: the images of a split.
        config: the settings of the evaluation.
        device: the device of this process.
        heads: number of classifiers.

    Raises InputError if an image cannot be read, or if all images of `--eval-data` have one class.
    """
    net.eval()
    meter = metrics.create_meter(images.multi_label, heads, len(images.classes), device)
    absent = torch.zeros(len(images.classes), dtype=torch.bool, device=device)
    if config.other_test.eval_data:
        shown = other_images.shown_classes(images)
        other_images.require_two(shown, images)
        absent = ~absent
        absent[torch.from_numpy(shown).to(device)] = False
    for batch, label in features.eval_batches(images, config, device):
        with precision.autocast(config.compute.amp, device):
            logits = with_head_axis(net(batch))
        meter.add(logits.masked_fill(absent, -torch.inf), label)
    return meter.read()


def with_head_axis(logits: Tensor) -> Tensor:
    """Return logits as [heads, B, num_classes]. Add the first axis if it is missing."""
    return logits.view(-1, *logits.shape[-2:])


class Setting(NamedTuple):
    """The hyperparameters of one of several classifiers: learning rate and weight decay."""

    lr: float
    wd: float


class ClassifierTask(Task):
    """The training of one or several classifiers, which are tested after every epoch.

    The best epoch and classifier are chosen on val/, as in the papers, or on the held-out training
    images.

    Args:
        config: the settings of the evaluation.
        net: the network with the classifiers.
        images: the images to train on, to test on, and to choose on.
        device: the device of this process.
        settings: the learning rate and weight decay of each classifier.
        best_name: file name of the best checkpoint.
    """

    keep_last = 1

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
        self.metric = catalog.METRIC[config.input.dataset]
        self._weight_decays = len({setting.wd for setting in settings})

    def losses(self, logits: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the classifiers' losses, and the metrics of the best classifier.

        The loss is cross entropy, with `--label-smoothing`. If images can show several classes, it
        is the mean binary cross entropy over the labels that count.

        Args:
            logits: [heads, B, num_classes].
            label: [B], or [B, num_classes] of 1 (shown), 0 (not shown) and -1 (ignored).
        """
        if label.dim() == 2:
            counts = (label >= 0).expand_as(logits)
            target = label.clamp_min(0).to(logits.dtype).expand_as(logits)
            each = F.binary_cross_entropy_with_logits(
                logits, target, counts.to(logits.dtype), reduction="none"
            )
            losses = each.sum((1, 2)) / counts.sum((1, 2)).clamp_min(1)
        else:
            smoothing = self.config.classifier.label_smoothing
            losses = torch.stack(
                [F.cross_entropy(one, label, label_smoothing=smoothing) for one in logits]
            )
        # a classifier with too high a learning rate may have diverged; it cannot be the best
        best = losses.nan_to_num(torch.inf).argmin()
        # take does not wait for the device; losses[best] would
        shown = {"loss": losses.take(best)}
        if label.dim() == 1:
            top1, top5 = (
                right.float().mean(-1).take(best) for right in metrics.correct(logits, label)
            )
            shown |= {"acc1": top1, "acc5": top5}
        return losses.sum(), shown

    def test(self) -> None:
        """Choose the best classifier and test it on val/. Sets `accuracy` and `chosen_by`.

        `accuracy` has the metrics of the best classifier, by name. If there are several
        classifiers, it also has the main metric of each. `chosen_by` is the main metric of the best
        one on the images it was chosen on.
        """
        on_val = self._test(self.val)
        on_chosen = self._test(self.held_out) if self.held_out else on_val
        best = max(
            self.settings,
            key=lambda one: tuple(on_chosen[one][name] for name in self._order(on_chosen[one])),
        )
        self.chosen_by = on_chosen[best][self.metric]
        self.accuracy = {name: on_val[best][name] for name in self._order(on_val[best])}
        if self.held_out:
            self.accuracy[f"held_out_{self.metric}"] = self.chosen_by
        if len(self.settings) > 1:
            self.accuracy |= {"best_lr": best.lr} | (
                {"best_wd": best.wd} if self._weight_decays > 1 else {}
            )
            self.accuracy |= {
                f"{self.metric}_{self.name(one)}": found[self.metric]
                for one, found in on_val.items()
            }

    def _order(self, found: dict[str, float]) -> list[str]:
        """Return the names of the metrics to report, starting with the main one."""
        return [
            self.metric,
            *(name for name in found if name not in (self.metric, "mean_per_class")),
        ]

    def _test(self, images: Images) -> dict[Setting, dict[str, float]]:
        """Return the metrics of each classifier on `images`."""
        found = evaluate(self.module, images, self.config, self.device, len(self.settings))
        return dict(zip(self.settings, found, strict=True))

    def name(self, setting: Setting, space: str = "") -> str:
        """Return the name of a classifier: lr30, or lr30_wd0.0001 if weight decays differ.

        With a `space`, return "lr 30" or "lr 30 wd 0.0001", for terminal output.
        """
        wd = f"{space or '_'}wd{space}{setting.wd:g}" if self._weight_decays > 1 else ""
        return f"lr{space}{setting.lr:g}{wd}"

    def end_epoch(self, trainer: Trainer, done: int) -> dict[str, float]:
        """Test the classifiers and save them after `done` epochs. Return metrics to log."""
        self.test()
        self.best = max(self.best, self.chosen_by)
        if self.best == self.chosen_by:
            trainer.save(self.best_name, done)
        trainer.save("checkpoint.pth.tar", done)
        return {f"val_{name}": value for name, value in self.accuracy.items()}

    def load_images(self) -> None:
        """Decode the images of every split into memory, if --cache-images allows it."""
        sets = self.images, self.val, self.held_out
        self.images, self.val, self.held_out = cache.load(self.config.input, *sets)

    def save_mid_epoch(self, trainer: Trainer, epoch: int, step: int) -> Path:
        """Save inside epoch `epoch`, after `step` steps of the run. Return the path of the file."""
        return trainer.save("checkpoint.pth.tar", epoch, step)

    def state(self) -> dict[str, Any]:
        """Return the best value of the main metric, the class names and the image size."""
        return {
            "best_acc1": self.best,
            "classes": list(self.images.classes),
            "image_size": self.config.views.image_size,
        }

    def restore(self, state: checkpoint.State) -> None:
        """Restore the best value of the main metric.

        Raises InputError if the checkpoint is not a classifier's, or has other classes.
        """
        path = self.config.log.resume
        if not isinstance(state.get("best_acc1"), int | float):
            raise InputError(
                f"{path}: is not a classifier's checkpoint; "
                "give --resume a checkpoint that this script has saved"
            )
        classes = state.get("classes")
        if classes is not None and classes != list(self.images.classes):
            raise InputError(f"{path}: {_difference(classes, self.images.classes)}")
        self.best = state["best_acc1"]


def run(task: ClassifierTask, protocol: str) -> None:
    """Train the classifiers, or only test them. Print the accuracies and write results.json.

    If no epochs are left to train, an existing results.json of the last epoch stays unchanged.

    Args:
        task: the classifiers and their data.
        protocol: the name of the evaluation in results.json, such as linear.

    Raises InputError like `Trainer`.
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
        # --epochs may be lower than the epochs that the classifier was trained for
        config = replaced(config, epochs=trainer.first_epoch)
        if _has_results(config):
            print_rank0("results.json already has the results of these epochs; it is not changed")
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
    """Return whether results.json exists and is of `config.optimizer.epochs` epochs."""
    try:
        results = read_json(Path(config.run.save_dir) / "results.json")
        written = results["settings"]["epochs"]
    except (InputError, KeyError, TypeError):
        written = None
    return written == config.optimizer.epochs


def _difference(saved: object, classes: tuple[str, ...]) -> str:
    """Return an error message that says how the classes of a checkpoint and of the data differ.

    `saved` is untrusted, of any type.
    """
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    if len(names) != len(classes):
        return (
            f"has {counted(len(names), 'class', 'classes')}, but the data has {len(classes)}; "
            "give the data that it was trained on"
        )
    index = next(
        (i for i, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1]), 0
    )
    return (
        f"its classes differ from the data's: number {index} is '{names[index]}', "
        f"but '{classes[index]}' in the data; give the data that it was trained on"
    )
