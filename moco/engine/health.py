"""Check a run while it trains for NaN or infinity, collapsed features and unreadable images."""

import math
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moco import devices, distributed
from moco.config import Training, flat
from moco.data.images import Images
from moco.engine import checkpoint
from moco.errors import DivergedError, InputError
from moco.messages import print_rank0

COLLAPSED = 0.1  # a warning is printed if feature_std is below this


class Health:
    """A record of the losses since the last check, and of the images that cannot be read.

    Args:
        config: the settings of the run.
        images: the training set.
        may_diverge: whether to accept NaN and infinity.
    """

    def __init__(self, config: Training, images: Images, may_diverge: bool):
        self.config, self.images, self.may_diverge = config, images, may_diverge
        # step, loss, and indices of the images of each pass
        self._recent: list[tuple[int, Tensor, Tensor]] = []
        self._unreadable: set[int] = set()
        # number of unreadable images in this epoch, and the largest number that is accepted
        self._skipped, self._most = 0, 1

    def start_epoch(self, images: int) -> None:
        """Reset the count of unreadable images. This rank reads `images` images in the epoch."""
        self._skipped, self._most = 0, max(1, images // 100)

    def note_unreadable(self, unreadable: list[tuple[int, str]]) -> None:
        """Print a line, once in the run, for each image that could not be read and was replaced.

        Args:
            unreadable: the index of each such image in the training set, and the reason.

        Raises InputError if more than 1 % of the images of an epoch cannot be read.
        """
        for i, reason in unreadable:
            if i not in self._unreadable:
                line = f"skipped, another image is used instead: {reason}"
                tqdm.write(line, file=sys.stderr)
            self._unreadable.add(i)
        self._skipped += len(unreadable)
        if self._skipped > self._most:
            raise InputError(
                f"{self.images.root}: more than 1 % of the images cannot be read "
                f"({self._skipped} in this epoch, so far); "
                "check the data, the disk or the network"
            )

    def note(self, step: int, loss: Tensor, indices: Tensor) -> None:
        """Remember the loss of a pass, without waiting for the device.

        Args:
            step: the step of the pass.
            loss: the loss, a scalar.
            indices: indices of the images of the pass in the training set, [B].
        """
        self._recent.append((step, loss.detach(), indices))

    @torch.no_grad()
    def check(self, module: nn.Module, lr: float, steps_per_epoch: int) -> None:
        """Raise DivergedError on every rank if any recent loss or any weight is NaN or infinite.

        Call it before every save.

        Args:
            module: the module that is saved.
            lr: the current learning rate, for the message.
            steps_per_epoch: for the message.
        """
        steps, losses, indices = zip(*self._recent, strict=True)
        self._recent.clear()
        if self.may_diverge:
            return
        # the last step may have made a weight infinite although its loss was finite
        norms = torch._foreach_norm([p for p in module.parameters() if p.requires_grad])
        losses = (*losses, torch.stack(norms).max())
        steps, indices = (*steps, steps[-1]), (*indices, indices[-1])
        wide = devices.widest_float(losses[0].device)
        values = torch.stack(losses).to(wide)
        bad = (~values.isfinite()).nonzero()
        first = int(bad[0]) if len(bad) else 0
        step = values.new_tensor([steps[first] if len(bad) else math.inf])
        images = indices[first][:2][[0, -1]].to(wide)  # twice the same, if there is only one
        facts = torch.cat([step, values[first : first + 1], images])
        of_ranks = distributed.all_gather(facts[None]).tolist()
        step, loss, *images = min(of_ranks, key=lambda rank: rank[0])
        if math.isfinite(step):
            self._refuse(step, loss, images, lr, steps_per_epoch)

    def _refuse(
        self, step: float, loss: float, images: list[float], lr: float, steps_per_epoch: int
    ) -> None:
        """Raise DivergedError: at `step`, the loss or a weight is NaN or infinite."""
        names = ", ".join(self.images.name(int(i)) for i in dict.fromkeys(images))
        epoch = step // steps_per_epoch
        where = f"step {step:.0f} (epoch {epoch:.0f}, lr {lr:g}, images {names}, ...)"
        kept = next(iter(checkpoint.list_checkpoints(self.config.run.save_dir)), None)
        if kept:
            option = "lr" if "lr" in flat(self.config) else "lr-backbone,lr-classifier"
            what = f"the last checkpoint from before it is {kept}; continue with --resume auto "
            what += f"--allow-change {option} and a lower learning rate"
        else:
            what = "there is no checkpoint from before it; lower --lr, or raise --lr-warmup-epochs"
        raise DivergedError(f"the loss, or a weight, is {loss:g} at {where}; {what}")


def warn_if_collapsed(means: dict[str, float], epoch: int) -> None:
    """Print a warning if the features at the end of an epoch have collapsed to nearly one point.

    Args:
        means: the last metrics of the epoch; `feature_std` is read if it is there.
        epoch: the epoch, counted from 0.
    """
    std = means.get("feature_std", 1.0)
    if std < COLLAPSED:
        print_rank0(
            f"warning: the features have collapsed, or nearly: feature_std is {std:.2g} at the end "
            f"of epoch {epoch} (1: evenly distributed, 0: all equal); try a lower --lr, more "
            "--lr-warmup-epochs or a larger --batch-size"
        )
