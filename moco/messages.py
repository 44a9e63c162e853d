"""Print the messages of a run. This file does not import torch, so that --help is quick."""

import os
import sys


def is_rank0() -> bool:
    """Return whether this process is rank 0, the one that prints and writes files.

    Before the process group exists, the launcher's environment variables decide.
    """
    dist = sys.modules.get("torch.distributed")  # there is no process group before its import
    if dist is not None and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def counted(n: int, one: str, many: str = "") -> str:
    """Return a number and what it counts, such as "1 image" or "2 images".

    Args:
        n: the number.
        one: the words after it if it is 1.
        many: the words after it otherwise; by default `one` with an s.
    """
    return f"{n} {one if n == 1 else many or f'{one}s'}"


def print_rank0(message: str) -> None:
    """Print a line on rank 0 only, above any progress bar."""
    if is_rank0():
        from tqdm import tqdm  # its import takes longer than all other work of --help

        tqdm.write(message)
        sys.stdout.flush()
