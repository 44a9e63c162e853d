"""Measure the encoder of a pre-training while it trains: k-NN, an online linear probe, RankMe.

The measurements change no weight and draw no random number of the training.
"""

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from moco import distributed
from moco.builder.base import Method
from moco.config import Pretraining
from moco.data import registry
from moco.data.images import Images
from moco.encoder import networks
from moco.engine import checkpoint, features
from moco.engine.log import Metrics
from moco.messages import print_rank0

RANKME_IMAGES = 8192  # training images whose features RankMe uses
PROBE_LR, PROBE_MOMENTUM = 0.1, 0.9  # of the online probe


class Monitor:
    """The measurements of a pre-training.

    Args:
        config: the settings of the run.
        module: the method, on `device`.
        device: the device of this process.
        classes: number of classes of the training images.
    """

    def __init__(self, config: Pretraining, module: Method, device: torch.device, classes: int):
        self.config, self.module, self.device = config, module, device
        # each measurement of the encoder before training, by name
        self.start: dict[str, float] = {}
        self.probe = OnlineProbe(module, classes) if config.monitor.probe_online else None
        self._left_out: frozenset[int] = frozenset()  # unreadable images that a line has named

    def due(self, done: int) -> set[str]:
        """Return the names of the measurements that are due after `done` epochs."""
        options, last = self.config.monitor, done == self.config.optimizer.epochs
        every = {"knn": options.knn_every, "rankme": options.rankme_every}
        # the probe is tested together with k-NN, or else after each epoch
        every["probe"] = (options.knn_every or 1) if self.probe else 0
        return {name for name, n in every.items() if n and (last or done % n == 0)}

    def measure_start(self, images: Images) -> dict[str, float]:
        """Measure the encoder before training, on the training set `images`. Return what to log."""
        # the probe has learned nothing yet
        self.start = self.measure(images, self.due(0) - {"probe"})
        if self.start:
            kind = "of --init" if self.config.start.init else "randomly initialized"
            values = ", ".join(f"{name} {value:.4g}" for name, value in self.start.items())
            print_rank0(f"before training: {values} (the encoder is {kind})")
        return dict(self.start)

    def measure(self, images: Images, names: set[str]) -> dict[str, float]:
        """Return the measurements with these `names`, on the training set `images`.

        A gain is the difference to the measurement before training.
        """
        found, data = {}, self.config.input
        if names & {"knn", "probe"}:
            val = registry.test_images(data.dataset, self.config.run.data, data.class_list)
        if "knn" in names:
            found["knn"] = self._knn(images, val)
            if "knn" in self.start:
                found["knn_gain"] = found["knn"] - self.start["knn"]
        if "probe" in names:
            found["probe"] = self.probe.accuracy(val, self.config, self.device)
        if "rankme" in names:
            found["rankme"] = self._rankme(images)
        return found

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        start = {"before_training": self.start} if self.start else {}
        return {**start, "probe": self.probe.state()} if self.probe else start

    def restore(self, state: checkpoint.State) -> None:
        """Restore the measurements before training, and the online probe, from a checkpoint."""
        start = state.get("before_training")
        if isinstance(start, dict):
            self.start = {name: x for name, x in start.items() if isinstance(x, float)}
        if self.probe and not self.probe.restore(state.get("probe")):
            print_rank0("--probe-online: the checkpoint has no probe, so a new one is trained")

    def _knn(self, images: Images, val: Images) -> float:
        """Return the k-NN top-1 accuracy of the encoder on `val`, in [0, 1]. The bank is `images`.

        With `--on-bad-image skip`, training images that cannot be read are left out.
        """
        config, module = self.config, self.module
        net, feature_fn = module.encoder, networks.features
        if config.monitor.knn_features == "head":
            net, feature_fn = module.embedding, nn.Module.__call__
        unreadable = [] if config.log.on_bad_image == "skip" else None
        bank = features.extract(
            net, images, config, self.device, feature_fn=feature_fn, unreadable=unreadable
        )
        self._note_left_out(images, {i for i, _ in unreadable or ()})
        queries = features.extract(net, val, config, self.device, feature_fn=feature_fn)
        k = config.monitor.knn_k
        return features.knn(*bank, *queries, len(val.classes), [k], config.monitor.knn_t)[k]

    def _rankme(self, images: Images) -> float:
        """Return RankMe of the backbone's features of at most `RANKME_IMAGES` training images.

        They are the same images in each measurement, evenly spaced in the training set.
        """
        count = min(len(images), RANKME_IMAGES)
        some = images.subset(np.linspace(0, len(images) - 1, count).astype(np.int64))
        skip = [] if self.config.log.on_bad_image == "skip" else None
        rows, _ = features.extract(
            self.module.encoder, some, self.config, self.device, False, unreadable=skip
        )
        return rankme(rows)

    def _note_left_out(self, images: Images, unreadable: set[int]) -> None:
        """Print a line that names the unreadable images, unless earlier lines named them all.

        Args:
            images: the training set.
            unreadable: indices of images in it.
        """
        new = sorted(unreadable - self._left_out)
        self._left_out |= unreadable
        if new:
            names = ", ".join(images.name(i) for i in new[:10]) + ", ..." * (len(new) > 10)
            what = "training image" if len(new) == 1 else "training images"
            tqdm.write(
                f"k-NN leaves out {len(new)} {what} that cannot be read: {names}", file=sys.stderr
            )


def rankme(rows: Tensor) -> float:
    """Return RankMe of the features of all ranks: a smooth count of the dimensions they use.

    It is the exponential of the entropy of the singular values, which are divided by their sum
    (Garrido et al., arXiv 2210.02885, equation 3). It is between 1 and the number of dimensions.

    Args:
        rows: this rank's features, [n, D].
    """
    # the squared singular values of all rows are the eigenvalues of the sum of the ranks' products
    rows = rows.to("cpu", torch.float64)
    product = distributed.all_reduce_sum((rows.T @ rows).to("cpu"))
    values = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())


class OnlineProbe:
    """A linear classifier that learns from the encoder's features while the encoder trains.

    It reads the features that the training computes anyway, without their gradient, so that it has
    no effect on the encoder. Batch norm without weights scales the features, as in the linear probe
    of MAE (He et al., arXiv 2111.06377, appendix A), so that one learning rate suits all encoders.

    Args:
        module: the method whose encoder is read.
        classes: number of classes.
    """

    def __init__(self, module: Method, classes: int):
        self.encoder = module.encoder
        width = networks.num_features(self.encoder)
        device = next(self.encoder.parameters()).device
        self.norm = nn.BatchNorm1d(width, affine=False).to(device)
        # the weights start at 0, because random ones would change the random state of the run
        self.weight = torch.zeros(classes, width, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, requires_grad=True)
        self.optimizer = torch.optim.SGD(
            [self.weight, self.bias], lr=PROBE_LR, momentum=PROBE_MOMENTUM
        )
        self._features: Tensor | None = None  # of the first pass of a batch through the encoder
        networks.head(self.encoder).register_forward_pre_hook(self._note)

    def _note(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Remember the head's input, which the encoder's features are."""
        if self._features is None and head.training:
            self._features = inputs[0].detach()

    def learn(self, label: Tensor) -> Metrics:
        """Take a step on the features of the last batch. Return the accuracy on it.

        Args:
            label: labels of the batch, [B]. The first B features are those of the first view.
        """
        x, self._features = self._features, None
        with torch.autocast(label.device.type, enabled=False):
            self.norm.train()
            x = self.norm(x[: len(label)].to(self.weight.dtype))
            logits = F.linear(x, self.weight, self.bias)
            F.cross_entropy(logits, label).backward()
        for parameter in (self.weight, self.bias):
            parameter.grad = distributed.all_reduce_sum(parameter.grad) / distributed.world_size()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"probe_train": (logits.argmax(1) == label).float().mean()}

    def accuracy(self, val: Images, config: Pretraining, device: torch.device) -> float:
        """Return the accuracy on the images `val`, in [0, 1]."""
        distributed.broadcast_buffers(self.norm)
        logits, labels = features.extract(
            self.encoder, val, config, device, unit_norm=False, feature_fn=self._logits
        )
        right = torch.stack([(logits.argmax(1) == labels).sum(), labels.new_tensor(len(labels))])
        right, total = distributed.all_reduce_sum(right).tolist()
        return right / total

    def _logits(self, net: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = self.norm.eval()(networks.features(net, images).float())
            return F.linear(x, self.weight, self.bias)

    def state(self) -> dict[str, Any]:
        """Return the tensors of a checkpoint."""
        return {
            "norm": self.norm.state_dict(),
            "weight": self.weight.detach(),
            "bias": self.bias.detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: object) -> bool:
        """Load the tensors of a checkpoint. Return whether they are there and fit."""
        try:
            self.norm.load_state_dict(state["norm"])
            with torch.no_grad():
                self.weight.copy_(state["weight"])
                self.bias.copy_(state["bias"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError):
            return False
        return True
