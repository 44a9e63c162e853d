"""torch.hub.load(FOLDER OF THIS REPOSITORY, "encoder", "RUN/checkpoint_0199.pth.tar", source="local"): any checkpoint's encoder."""

from torch import nn as _nn

dependencies = ["torch", "torchvision"]  # transformers want timm, too


def encoder(checkpoint: str, arch: str | None = None, image_size: int | None = None) -> _nn.Module:
    """The pre-trained network without its head, in eval mode: normalized images [B, 3, H, W] -> features [B, D].

    Args:
        checkpoint: a file of this project, by any method, or of any that main_lincls.py reads.
        arch: of a file that does not name it (default: resnet50).
        image_size: pixels of the images, which a ViT or Swin is made for (default: as in pre-training; where unknown, 224).

    Images must be RGB in [0, 1], normalized as in pre-training: with `mean` and `std` of the file,
    or with ImageNet's for files of other software. A ResNet gets the stem that the file has. Raises
    moco.errors.InputError for a file that cannot be read, or that does not fit.
    """
    from moco.encoder import pretrained

    return pretrained.read(checkpoint, arch, image_size).net
