"""Convert an encoder to an ONNX model, and run the model with onnxruntime."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.errors import InputError, short

PACKAGES = ("onnx", "onnxruntime")
IMAGES, FEATURES = "images", "features"  # names of the model's input and output
CALL = f"net.run(['{FEATURES}'], {{'{IMAGES}': images}})"
_OPSET = 17  # the first with layer normalization; onnxruntime has it since 1.12


def check_packages() -> None:
    """Raise InputError if a package that --onnx needs is missing or cannot be imported."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--onnx needs the package {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"--onnx: the package {name} cannot be imported ({short(error)}); install it again"
            ) from None


def convert(net: nn.Module, image_size: int, facts: dict[str, str]) -> bytes:
    """Return an ONNX model that maps images [B, 3, H, W] to features [B, D], for any B.

    torch.onnx traces the network, because this exporter exists in every supported PyTorch and
    needs no further packages. `facts` become the model's metadata.

    Raises InputError if torch.onnx cannot convert the network.
    """
    import onnx

    images, buffer = torch.zeros(2, 3, image_size, image_size), BytesIO()
    try:
        with _traceable(net), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's age, and about traced constants
            torch.onnx.export(
                net,
                (images,),
                buffer,
                dynamo=False,
                opset_version=_OPSET,
                input_names=[IMAGES],
                output_names=[FEATURES],
                dynamic_axes={IMAGES: {0: "batch"}, FEATURES: {0: "batch"}},
            )
        model = onnx.load_model_from_string(buffer.getvalue())
        onnx.helper.set_model_props(model, facts)
        onnx.checker.check_model(model)
        return model.SerializeToString()
    except Exception as error:  # errors of torch.onnx and onnx have many types
        why = short(" ".join(str(error).split()))
        raise InputError(
            f"--onnx: torch.onnx cannot convert this network ({why}); leave --onnx out"
        ) from None


@contextlib.contextmanager
def _traceable(net: nn.Module) -> Iterator[None]:
    """Make timm's attention use plain matrix products, because tracing fails in fused ones."""
    fused = [module for module in net.modules() if vars(module).get("fused_attn")]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def run(model: bytes, images: Tensor) -> Tensor:
    """Return the features [B, D] that onnxruntime computes on the CPU.

    Raises InputError if it cannot run the model.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run([FEATURES], {IMAGES: images.numpy()})[0])
    except Exception as error:  # onnxruntime's errors have many types
        why = short(" ".join(str(error).split()))
        raise InputError(
            f"--onnx: onnxruntime {onnxruntime.__version__} cannot run the model ({why}), so "
            "nothing was written; leave --onnx out"
        ) from None


def python(path: Path) -> str:
    """Return the Python code with which onnxruntime loads the model in `path` as `net`."""
    return f"import onnxruntime; net = onnxruntime.InferenceSession({str(path)!r})"
