"""Files of detection/, which is not a package, and a checkpoint to convert."""

import importlib

from conftest import ROOT

from moco.encoder.resnets import resnet

HERE = ROOT / "detection"


# pyproject.toml puts detection/ on the path of the tests
converter = importlib.import_module("convert-pretrain-to-detectron2")


def published(arch, prefix="module.encoder_q.", **more):
    """A checkpoint of random weights, with the head that a pre-trained encoder has, and `more`."""
    net = resnet(arch, 128, mlp=True)
    for buffer in net.buffers():  # running statistics of their own
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return {
        "arch": arch,
        "state_dict": {prefix + name: x for name, x in net.state_dict().items()},
        **more,
    }
