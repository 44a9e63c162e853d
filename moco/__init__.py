"""Contrastive pre-training of image encoders with hard negatives.

The methods are in `builder`, their formulas in `loss`. `engine` trains them, `evaluate` tests the
encoders, and `data` and `augment` prepare the images. `load_encoder` loads an encoder in Python.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moco import user

user.import_quietly()


# OpenMP's threads wait for each other in a busy loop, by default for so long that on a busy machine
# they occupy the cores which the others need: a step may take ten times as long. A shorter loop
# costs little on an idle machine (benchmarks/threads.py measures both), and none of the bits of a
# result depend on it. They do depend on the number of threads, which therefore does not follow the
# load. OpenMP reads the variable once, when torch is loaded, so import this package before torch.
# The user's own settings win.
_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in _OPENMP):
    os.environ["GOMP_SPINCOUNT"] = "10000"


def _keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors.

    By default, glibc returns blocks of some megabytes to the system at once. The next tensor then
    causes a page fault for each 4 KiB. These take a tenth to a quarter of the time of the color
    operations. Nothing changes without glibc, or if the user has set glibc's own variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: glibc allows no more
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


_keep_freed_memory()

# Tensors of more than 32 MiB go back to the system each time. With pages of 2 MiB, the next one
# causes 512 times fewer page faults. PyTorch reads the variable when it allocates its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _FirstExp:
    """A finder for `sys.meta_path` that calls `exp` once, in a single thread, after torch's import.

    On a CPU, PyTorch uses Intel MKL's vector functions. If several threads call them for the first
    time at once, the result in one thread may be accurate to 1e-4 only, instead of 1e-7. A first
    call in a single thread prevents this for the rest of the process. This package does not import
    torch itself, so that `--help` and refused options take a fraction of a second.
    """

    def __init__(self):
        self._searches = False

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Return torch's spec, with a loader that calls `exp`; None for all other modules."""
        if name != "torch" or self._searches:
            return None
        self._searches = True  # find_spec also asks this finder
        spec = importlib.util.find_spec(name)
        self._searches = False
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_call(module: ModuleType) -> None:
                del sys.meta_path[sys.meta_path.index(self)]
                load(module)
                module.ones(1).exp()

            spec.loader.exec_module = load_and_call
        return spec


if "torch" in sys.modules:
    sys.modules["torch"].ones(1).exp()
else:
    sys.meta_path.insert(0, _FirstExp())


if TYPE_CHECKING:
    from moco.api import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    """Import `load_encoder` on first use, because it needs torchvision and timm."""
    if name == "load_encoder":
        from moco.api import load_encoder

        return load_encoder
    raise AttributeError(f"module 'moco' has no attribute '{name}'")
