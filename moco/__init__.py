"""Hard-negative contrastive pre-training: engine over {builder, data} over {loss, augment, encoder, distributed}."""

import contextlib
import ctypes
import os
from pathlib import Path

from moco import user

user.import_quietly()


def _is_busy(load: Path = Path("/proc/loadavg")) -> bool:
    """Return whether other programs keep half of the cores busy."""
    try:
        # the fourth field, such as 3/257, counts what runs now; this program is among the 3
        running = int(load.read_text().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):  # not Linux
        return False
    return 2 * running >= (os.cpu_count() or 1)


# OpenMP's threads wait for each other in a busy loop, by default for a long time. If other programs
# run as well, a waiting thread occupies the core that the thread it waits for needs, and a short
# wait is several times as fast. If none run, a short wait costs a tenth or more, so that PyTorch's
# default stays (benchmarks/threads.py). OpenMP reads the variable once, when torch is loaded, so
# scripts import this package first. Nothing changes if the user has set one of these variables.
_OPENMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if _is_busy() and not any(name in os.environ for name in _OPENMP):
    os.environ["GOMP_SPINCOUNT"] = "1000"


def _keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors.

    By default it returns blocks of some megabytes to the system at once. The next tensor then takes
    a page fault for every 4 KiB, which is a tenth to a quarter of the time of colour operations.
    Nothing changes without glibc, or if the user has set glibc's own variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: glibc allows no more
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


_keep_freed_memory()

import torch  # noqa: E402

# PyTorch's vector functions on a CPU are Intel MKL's. When several threads enter those for the first time at once, one of
# them may compute that first call to 1e-4 instead of 1e-7; a first call by one thread alone settles it for the process.
torch.ones(1).exp()
