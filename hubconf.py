"""Entry point of torch.hub, which loads the encoder of a checkpoint.

Use torch.hub.load(FOLDER_OF_THIS_REPOSITORY, "encoder", "RUN/checkpoint_0199.pth.tar",
source="local").
"""

from torch import nn as _nn

dependencies = ["torch", "torchvision"]  # the networks of timm also need timm


def encoder(
    checkpoint: str,
    arch: str | None = None,
    image_size: int | None = None,
    norm_eps: str | None = None,
) -> _nn.Module:
    """Return the pre-trained network without its head, in eval mode.

    The network maps images [B, 3, H, W] to features [B, D]. Images must be RGB in [0, 1],
    normalized as in pre-training: with the `mean` and `std` of the file, or with ImageNet's if the
    file is from other software. A ResNet has the stem named in the file.

    Args:
        checkpoint: a checkpoint of any method of this project, or any other file that
            main_lincls.py reads.
        arch: architecture, such as timm:convnext_tiny, if the file does not name it (default:
            resnet50).
        image_size: image size in pixels of a ViT or Swin (default: that of pre-training, or 224 if
            unknown).
        norm_eps: epsilons of a Swin's layer norms, timm or synco-v2, if the file does not say
            (default: timm).

    Raises moco.errors.InputError if the file cannot be read or does not fit the architecture.
    """
    from moco.encoder import pretrained

    return pretrained.read(checkpoint, arch, image_size, norm_eps).net
