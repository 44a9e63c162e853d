"""Hard-negative contrastive pre-training: engine over {builder, data} over {loss, augment, encoder, distributed}."""

import os

from moco import user

user.import_quietly()

# OpenMP's threads wait for each other in a busy loop, by default for milliseconds. If other
# programs run as well, a waiting thread occupies the core that the thread it waits for needs. A
# shorter loop costs little on an idle machine (benchmarks/threads.py). OpenMP reads the variable
# once, when torch is loaded, so scripts import this package first. Nothing changes if the user has
# set one of these variables.
_OPENMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in _OPENMP):
    os.environ["GOMP_SPINCOUNT"] = "1000"

import torch  # noqa: E402

# PyTorch's vector functions on a CPU are Intel MKL's. When several threads enter those for the first time at once, one of
# them may compute that first call to 1e-4 instead of 1e-7; a first call by one thread alone settles it for the process.
torch.ones(1).exp()
