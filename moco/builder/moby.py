"""MoBY (Xie et al., arXiv 2105.04553) and SynCo-v2.

An online encoder, a projector and a predictor are trained. The target encoder and projector are
moving averages of the online ones, with a momentum that rises to 1. `create_method` also makes BYOL
(arXiv 2006.07733).
"""

import torch
from torch import Tensor, nn

from moco import distributed
from moco.builder.base import OnlineAndTarget, enqueue
from moco.builder.byol import BYOL
from moco.builder.moco import contrast
from moco.encoder import networks
from moco.errors import InputError
from moco.loss.contrastive import InfoNCE, normalize
from moco.rng import Progress
from moco.sections import Network
from moco.sections_methods import MobyContrast, MobyNegatives, MobyNetworks
from moco.sections_negatives import Schedule, synthetic_schedule


class MoBY(OnlineAndTarget):
    """MoBY: each view's predictions against the other view's target features and a queue.

    The InfoNCE losses of both directions are added. With `synthetic`, this is SynCo-v2: synthetic
    negatives join those of the queues.

    Args:
        online_and_target: the arguments of `OnlineAndTarget`.
        dim: feature size C.
        K: entries of each queue.
        T: softmax temperature.
        synthetic: the synthetic negatives.
    """

    def __init__(
        self,
        *online_and_target,
        dim: int = 256,
        K: int = 4096,
        T: float = 0.2,
        synthetic: Schedule = Schedule(),  # noqa: B008 (frozen)
    ):
        super().__init__(*online_and_target)
        self.T, self.synthetic = T, synthetic
        for view in (1, 2):
            # [K, C], the target features of this view
            self.register_buffer(f"queue{view}", normalize(torch.randn(K, dim)))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._new_keys: list[list[Tensor]] = []

    @property
    def query_and_key(self) -> tuple[nn.Module, nn.Module]:
        """Return the networks of the predictions and of the target features."""
        target = nn.Sequential(self.encoder_k, self.projector_k)
        return nn.Sequential(self.encoder, self.projector, self.predictor), target

    def schedules(self, progress: Progress) -> dict[str, float]:
        """Return the target's momentum, and the numbers of synthetic negatives per query."""
        return {**super().schedules(progress), **self.synthetic.values(progress)}

    def contrast(
        self, p: list[Tensor], k: list[Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both directions' InfoNCE losses, and their mean metrics.

        Args:
            p: normalized predictions of the two views, each [B, C].
            k: normalized target features of the two views, each [B, C].
            progress: position in the run; selects the epochs and seeds the synthetic negatives.
        """
        self._new_keys.append([distributed.all_gather(keys) for keys in k])
        settings = self.T, InfoNCE(), self.synthetic.at(progress), progress
        loss_1, metrics_1 = contrast(p[0], k[1], self.queue2, *settings, 0)
        loss_2, metrics_2 = contrast(p[1], k[0], self.queue1, *settings, 1)
        metrics = {name: (metrics_1[name] + metrics_2[name]) / 2 for name in metrics_1}
        return loss_1 + loss_2, metrics

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the target network, and add each view's target features to its queue."""
        super().after_step()
        for keys in self._new_keys:
            pointer = self.queue_ptr.clone()
            enqueue(self.queue1, pointer, keys[0])
            enqueue(self.queue2, self.queue_ptr, keys[1])
        self._new_keys.clear()


def create_encoder(
    network: Network, image_size: int, drop_path: float, out: int = 0, freeze_stem: bool = False
) -> nn.Module:
    """Return a randomly initialized encoder.

    Args:
        network: the architecture.
        image_size: side of the square input images, in pixels.
        drop_path: rate of stochastic depth, in [0, 1).
        out: number of output features of the last layer; 0 for an encoder without that layer.
        freeze_stem: whether the patch projection does not train (--stop-grad-conv1).

    Raises InputError if the network does not support these settings.
    """
    net = networks.create(network.arch, out, image_size, drop_path, network.stem, network.norm_eps)
    if freeze_stem:
        networks.freeze_patch_projection(net, network.arch)
    return net


def create_method(
    method: str,
    network: Network,
    image_size: int,
    settings: MobyNetworks,
    contrast: MobyContrast,
    synthetic: MobyNegatives,
) -> OnlineAndTarget:
    """Return a new model of `method`.

    Args:
        method: moby, synco or byol.
        network: the architecture of the encoders.
        image_size: side of the square input images, in pixels.
        settings: the online and the target network; no value is None.
        contrast: the queues. BYOL has none.
        synthetic: the synthetic negatives, for synco.

    Raises InputError if the settings do not fit together.
    """
    freeze, dim = settings.stop_grad_conv1, settings.moco_dim
    online = create_encoder(network, image_size, settings.online_drop_path, freeze_stem=freeze)
    target = create_encoder(network, image_size, settings.target_drop_path, freeze_stem=freeze)

    def head(width: int, layers: int) -> nn.Module:
        widths = [width, *[settings.mlp_dim] * (layers - 1), dim]
        return networks.projector(widths, bias=True)

    projector = head(networks.num_features(online), settings.proj_layers)
    predictor = head(dim, settings.pred_layers)
    parts = (online, target, projector, predictor, settings.moco_m)
    if method == "byol":
        return BYOL(*parts)
    more = {"dim": dim, "K": contrast.queue, "T": contrast.moco_t}
    if method == "synco":
        more["synthetic"] = synco_v2(synthetic, contrast)
    return MoBY(*parts, **more)


def synco_v2(synthetic: MobyNegatives, contrast: MobyContrast) -> Schedule:
    """Return the synthetic negatives of SynCo-v2. Raises InputError if there would be none."""
    first, last = synthetic.synthetic_first, synthetic.synthetic_last
    found = synthetic_schedule(synthetic, contrast.queue, "--queue", first, last)
    if not found.config.total:
        raise InputError("--method synco: --n1 to --n6 are all 0; give some, or --method moby")
    return found
