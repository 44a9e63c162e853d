"""Load a pre-trained encoder in a Python program: `moco.load_encoder`. See docs/python.md."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from moco.augment.color import normalize
from moco.augment.crop import center_view
from moco.data.decoding import DEFAULT, from_pil
from moco.encoder import networks, pretrained
from moco.encoder.pretrained import Encoder as Found
from moco.files import replacing
from moco.sections_images import Decoding


class Transform(NamedTuple):
    """The transform from an image to an encoder's input, as in the evaluations.

    The shorter side is resized to 8/7 of `image_size`, which is 256 pixels for 224. The center is
    cropped and normalized. Images of exactly `image_size` pixels, up to 96, are not resized.
    """

    image_size: int  # pixels
    mean: tuple[float, ...]  # [3], mean of RGB values in [0, 1]
    std: tuple[float, ...]  # [3], their standard deviation
    decoding: Decoding = DEFAULT  # of the checkpoint: EXIF's orientation, and white

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return the normalized view of an image, float32 [3, image_size, image_size].

        Args:
            image: an image of Pillow in any mode, or uint8 RGB [3, H, W].

        Raises TypeError or ValueError for anything else.
        """
        pixels = center_view(self._pixels(image), self.image_size)
        return normalize(pixels[None], self.mean, self.std)[0]

    def _pixels(self, image: Image.Image | Tensor) -> Tensor:
        """Return an image as RGB, uint8 [3, H, W].

        Raises TypeError or ValueError if it is not one.
        """
        if isinstance(image, Image.Image):
            return from_pil(image, self.decoding, lambda: Image.open(image.filename))
        expected = "give a PIL image, or a tensor of RGB in uint8, [3, H, W]"
        if not isinstance(image, Tensor):
            path = "; open a file with PIL.Image.open" * isinstance(image, str | Path)
            raise TypeError(f"the transform got {type(image).__name__}; {expected}{path}")
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or not image.numel():
            raise ValueError(
                f"the transform got a tensor {list(image.shape)} of {image.dtype}; {expected}"
            )
        return image


class Encoder(nn.Module):
    """A pre-trained encoder without its projection head. A call returns features.

    Attributes:
        net: the network, one of torchvision or timm without its last layer.
        transform: the transform from an image to the encoder's input.
        arch: the architecture.
        num_features: the number D of features.
        image_size: width and height of the input, in pixels.
        mean: mean of RGB values in [0, 1] that normalizes images, [3].
        std: their standard deviation, [3].
        method: the pre-training method; "unknown" if the file does not say.
        epoch: number of pre-training epochs; None if the file does not say.
    """

    def __init__(self, found: Found):
        """Wrap an encoder that `pretrained.read` has found."""
        super().__init__()
        self.net = found.net
        self.arch, self.method, self.epoch = found.arch, found.method, found.epoch
        self.image_size = found.image_size
        self.mean, self.std = tuple(found.mean), tuple(found.std)
        self.num_features = networks.num_features(found.net)
        self.transform = Transform(self.image_size, self.mean, self.std, found.decoding)
        self._options = {"stem": found.stem, "norm_eps": found.norm_eps}
        self._options |= {"exif": found.decoding.exif, "white": found.decoding.white}

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [B, D] of images [B, 3, H, W] that `transform` has made."""
        return networks.features(self.net, images)

    def save(self, path: str | Path) -> None:
        """Save the encoder, for example after fine-tuning.

        `load_encoder` and `--pretrained` read the file without further options. An existing file is
        replaced.
        """
        args = {"mean": list(self.mean), "std": list(self.std), **self._options}
        state = {
            "arch": self.arch,
            "method": self.method,
            "epoch": self.epoch,
            "image_size": self.image_size,
            "args": args,
            "state_dict": self.net.state_dict(),
        }
        with replacing(Path(path)) as file:
            torch.save(state, file)


def load_encoder(
    checkpoint: str | Path,
    arch: str | None = None,
    image_size: int | None = None,
    norm_eps: str | None = None,
) -> Encoder:
    """Return the encoder of a checkpoint, in eval mode and on the CPU.

    Args:
        checkpoint: a checkpoint of this project, or any other file that `--pretrained` reads.
        arch: architecture, if the file does not name it (default: resnet50).
        image_size: image size in pixels (default: that of pre-training, or 224 if unknown).
        norm_eps: epsilons of a Swin's layer norms, timm or synco-v2, if the file does not say
            (default: timm).

    Raises moco.errors.InputError if the file cannot be read or does not fit the architecture.
    """
    return Encoder(pretrained.read(str(checkpoint), arch, image_size, norm_eps)).eval()
