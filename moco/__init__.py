"""Hard-negative contrastive pre-training: engine over {builder, data} over {loss, augment, encoder, distributed}."""

import os
from pathlib import Path

from moco import user

user.import_quietly()


def _spin_count(load: Path = Path("/proc/loadavg")) -> str:
    """Return how many rounds OpenMP's threads wait for each other in a busy loop before they sleep.

    If other programs run as well, a waiting thread occupies the core that the thread it waits for
    needs, so a short wait is several times as fast. If none run, it costs a tenth or more, and a
    long wait a twentieth (benchmarks/threads.py). So the wait is short if other programs keep half
    of the cores busy when this one starts.
    """
    try:
        running = int(load.read_text().split()[3].split("/")[0]) - 1  # such as 3/257; this one is among the 3
    except (OSError, ValueError, IndexError):  # not Linux
        running = 0
    return "1000" if 2 * running >= (os.cpu_count() or 1) else "100000"


# OpenMP reads the variable once, when torch is loaded, so scripts import this package first.
# Nothing changes if the user has set one of these variables.
_OPENMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in _OPENMP):
    os.environ["GOMP_SPINCOUNT"] = _spin_count()

import torch  # noqa: E402

# PyTorch's vector functions on a CPU are Intel MKL's. When several threads enter those for the first time at once, one of
# them may compute that first call to 1e-4 instead of 1e-7; a first call by one thread alone settles it for the process.
torch.ones(1).exp()
