"""Check before training that the evaluations can read the encoder of a method."""

from moco.builder.base import Method
from moco.encoder import networks, pretrained
from moco.errors import InputError


def check(method: Method) -> None:
    """Raise InputError if the evaluations would not find the encoder in the method's checkpoints.

    The evaluations find an encoder by the names of its tensors. They must find `method.encoder`,
    not a copy such as its moving average.
    """
    state = {f"module.{name}": tensor for name, tensor in method.state_dict().items()}
    encoder = method.encoder
    tensors = pretrained.tensors_of(encoder, {"state_dict": state})
    start = pretrained.prefix(encoder, tensors)
    own = encoder.state_dict()
    for name in networks.backbone_keys(encoder):
        found = tensors.get(start + name)
        if found is None or found.data_ptr() != own[name].data_ptr():
            read = f"the one named {start}*" if start else "none"
            raise InputError(
                f"{type(method).__name__}: the evaluations would not read its encoder from a "
                f"checkpoint, but {read}; name it encoder, encoder_q or base_encoder"
            )
