"""Store an encoder's tensors with stock names, and write the Python code that loads them."""

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from moco.encoder.stock import StockModel
from moco.errors import InputError
from moco.files import as_utf8

READ = {  # suffix: (the expression that loads the file {}, the module that it needs)
    ".pth": ("torch.load({}, weights_only=True)", "torch"),
    ".pt": ("torch.load({}, weights_only=True)", "torch"),
    ".safetensors": ("safetensors.torch.load_file({})", "safetensors.torch"),
}
HUBCONF = '''"""Entry point of torch.hub for the encoder in this folder.

Load it with torch.hub.load(FOLDER, "encoder", source="local"), or from the web with
torch.hub.load("USER/REPOSITORY", "encoder").
"""

from pathlib import Path as _Path

{imports}

dependencies = {packages!r}
about = {facts!r}


def encoder(pretrained=True):
    """Return the network in eval mode. It maps images [B, 3, H, W] to features [B, D].

    Images are RGB in [0, 1], normalized with the mean and std in `about`.
    """
    {lines}
    if pretrained:
        net.load_state_dict({read})
    return net.eval()
'''


def serialize(tensors: dict[str, Tensor], suffix: str, facts: dict[str, object]) -> bytes:
    """Return the content of the file. A safetensors file holds `facts` as metadata."""
    if suffix != ".safetensors":
        buffer = BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            "a .safetensors file needs the package safetensors: pip install safetensors, "
            "or let OUT end in .pth"
        ) from None
    return safetensors.torch.save(tensors, {"format": "pt", **as_texts(facts)})


def as_texts(facts: dict[str, object]) -> dict[str, str]:
    """Return the values of `facts` as texts in UTF-8. Spaces separate the numbers of a tuple."""
    words = {
        name: " ".join(map(str, fact)) if isinstance(fact, tuple) else str(fact)
        for name, fact in facts.items()
    }
    return {name: as_utf8(word) for name, word in words.items()}


def hubconf(home: StockModel, name: str, facts: dict[str, object]) -> str:
    """Return the content of hubconf.py.

    The checkpoint may be untrusted, so its texts appear there only as string literals.
    """
    modules = imports(home, Path(name).suffix)
    return HUBCONF.format(
        imports="\n".join(modules),
        packages=sorted({module.split()[1].split(".")[0] for module in modules}),
        facts=facts,
        lines="\n    ".join(home.lines),
        read=READ[Path(name).suffix][0].format(f"_Path(__file__).with_name({name!r})"),
    )


def imports(home: StockModel, suffix: str) -> list[str]:
    """Return the import lines needed to create the network and to load a file with `suffix`."""
    modules = {
        READ[suffix][1],
        home.library,
        *(["torch"] if any("torch." in line for line in home.lines) else []),
    }
    return [f"import {module}" for module in sorted(modules)]


def python(home: StockModel, path: Path) -> list[str]:
    """Return the Python lines that create the library's network as `net` and load `path`."""
    read = READ[path.suffix][0].format(repr(str(path)))
    return [*imports(home, path.suffix), *home.lines, f"net.load_state_dict({read})", "net.eval()"]
