"""Compute the features of images that keep their aspect ratio, for revisited Oxford and Paris.

Each image is a batch of its own. Its features are joined over scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from moco.augment import crop
from moco.augment.color import normalize
from moco.config import Evaluation
from moco.data import loader
from moco.data.images import Images
from moco.encoder import networks, timm_networks
from moco.engine.features import gather_in_order
from moco.engine.precision import autocast, prepare_images
from moco.errors import InputError
from moco.evaluate import inputs, revisited
from moco.messages import print_rank0
from moco.sections_eval import Extraction

GEM, EPS = 3.0, 1e-6  # exponent of the generalized mean, and lower bound of its inputs


@dataclass(frozen=True)
class Shrunk(loader.Transform):
    """A transform that shrinks images and keeps their aspect ratio.

    Attributes:
        imsize: maximum of the longer side, in pixels. Smaller images are not enlarged.
        boxes: the box to which each image is cropped first; None for full images. The cropped image
            is shrunk by the factor of the full image.
        center: whether the result is the test view of `imsize` pixels of the shrunk image.
    """

    imsize: int
    boxes: Sequence[tuple[float, float, float, float]] | None = None
    center: bool = False

    def __call__(
        self, image: Tensor, sample: loader.SampleId, _out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return the view of `image`, uint8 [3, H, W], as a list of one uint8 [3, h, w]."""
        longer = self.imsize
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if self.boxes is not None:
            full = max(picture.size)
            picture = picture.crop(self.boxes[sample[1]])
            longer = max(1, int(self.imsize * max(picture.size) / full))
        picture.thumbnail((longer, longer), Image.Resampling.LANCZOS)
        shrunk = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return [crop.center_view(shrunk, self.imsize) if self.center else shrunk]


def pooling(config: Extraction, net: nn.Module) -> str:
    """Return the pooling to use. Raises InputError if the network has no feature map for it."""
    has_map = networks.has_feature_map(net)
    if config.pooling == "gem" and not has_map:
        raise InputError(
            "--pooling gem: is for torchvision's ResNets; leave it out, or give --pooling network"
        )
    return config.pooling or ("gem" if has_map else "network")


def check(config: Evaluation, extraction: Extraction) -> str:
    """Return the pooling to use. Call it before any process starts.

    Raises InputError if the network has no feature map for `--pooling gem`, or does not take images
    of the shapes that it will get.
    """
    net = inputs.create_network(config, 1).to("meta").eval()
    how, arch = pooling(extraction, net), config.network.arch
    size = config.views.image_size
    shape = (160, 96) if config.any_size else (size, size)
    try:
        pooled(net, torch.empty(1, 3, *shape, device="meta"), how)
    except NotImplementedError:  # an operation without a meta version
        pass
    except Exception as error:  # each network raises errors of its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{arch}: {timm_networks.ONE_SIZE} ({why})") from None
    return how


def evaluate(
    config: Evaluation, extraction: Extraction, ks: Sequence[int], device: torch.device
) -> dict[str, float]:
    """Return the metrics of `revisited.evaluate` for the data set of `config`, and print them.

    Every rank must call this function. Raises InputError if an image or the checkpoint cannot be
    read, or if a feature is NaN or infinite.
    """
    name = config.input.dataset
    benchmark = revisited.read(name, config.run.data)
    net = inputs.load_network(config, 1, device)
    boxes = [query.box for query in benchmark.truth] if extraction.crop_queries else None
    database = extract(net, benchmark.database, config, extraction, device)
    queries = extract(net, benchmark.queries, config, extraction, device, boxes)
    if not (database.sum() + queries.sum()).isfinite():
        raise InputError(
            f"{config.encoder.pretrained}: its features contain NaN or infinity; the encoder "
            "diverged, or --amp fp16 overflows"
        )
    order = (queries @ database.T).argsort(dim=1, descending=True, stable=True)
    found = revisited.evaluate(order.cpu().numpy(), benchmark.truth, ks, extraction.ap)
    for setting in revisited.SETTINGS:
        if f"map_{setting}" in found:
            at = "  ".join(f"mP@{k} {100 * found[f'mp_{setting}_{k}']:.2f}" for k in ks)
            print_rank0(f"* {name} {setting}: mAP {100 * found[f'map_{setting}']:.2f}  {at}")
    return found


def pooled(net: nn.Module, x: Tensor, pooling: str) -> Tensor:
    """Return the features [B, D] of normalized images `x` [B, 3, H, W], not normalized.

    Pixels at the right and at the bottom that fill no patch of a transformer are left out.

    Args:
        net: the network, in eval mode.
        x: the images.
        pooling: gem for the generalized mean of the feature map (Radenović et al., TPAMI 2019,
            equation 2), network for the network's own features.
    """
    if pooling == "gem":
        maps = networks.feature_map(net, x).float().clamp_min(EPS)
        return maps.pow(GEM).mean((2, 3)).pow(1 / GEM)
    side = networks.patch_size(net)
    height, width = (max(length // side, 1) * side for length in x.shape[2:])
    padding = (0, max(0, width - x.shape[3]), 0, max(0, height - x.shape[2]))
    return networks.features(net, F.pad(x, padding)[..., :height, :width]).float()


def joined(net: nn.Module, x: Tensor, config: Extraction, pooling: str) -> Tensor:
    """Return the features [B, D] of `x`, of norm 1, joined over the scales of `config`.

    They are joined by their mean over scales; after `gem`, by the generalized mean with the
    exponent `GEM`.
    """
    power = GEM if pooling == "gem" else 1.0
    total = 0.0
    scales = config.scales if config.multiscale else (1.0,)
    for scale in scales:
        scaled = x
        if scale != 1:
            factor = max(scale, 1 / min(x.shape[2:]))  # at least one pixel
            scaled = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        found = pooled(net, prepare_images(scaled), pooling)
        if config.normalize_scales:
            found = F.normalize(found, dim=1)
        total = total + found.pow(power)
    return F.normalize((total / len(scales)).pow(1 / power), dim=1)


@torch.inference_mode()
def extract(
    net: nn.Module,
    images: Images,
    config: Evaluation,
    extraction: Extraction,
    device: torch.device,
    boxes: Sequence[tuple[float, float, float, float]] | None = None,
) -> Tensor:
    """Return the features of all `images`, [N, D] of norm 1, on every rank.

    Args:
        net: the network. It is set to eval mode.
        images: the images, of any shapes.
        config: the settings of the evaluation.
        extraction: how features are computed.
        device: the device of this process.
        boxes: the box to which each image is cropped first; None for full images.

    Raises InputError if an image cannot be read.
    """
    net.eval()
    how = pooling(extraction, net)
    transform = Shrunk(extraction.imsize, boxes, extraction.center_crop)
    order = loader.EvalBatchSampler(len(images), 1)
    rows = [torch.empty(0, networks.num_features(net), device=device)]
    for batch in loader.batches(images, transform, order, config.input, device):
        x = normalize(batch.views[0], config.views.mean, config.views.std)
        with autocast(config.compute.amp, device):
            rows.append(joined(net, x, extraction, how))
    return gather_in_order(torch.cat(rows))
