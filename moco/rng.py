"""Counter-based randomness: every draw is a pure function of where in the run it is used.

No generator lives from one step to the next, so the draws do not depend on the number of workers and a resumed run
needs no saved state. The mixing function is SplitMix64's (Steele, Lea & Flood, OOPSLA 2014).
"""

from dataclasses import dataclass

import numpy as np
import torch

ORDER, CROP, COLOR, SHUFFLE, NEGATIVES, SPLIT, LAYERS, REPLACEMENT = range(
    8
)  # what a draw is for: the first counter of every key

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


Key = int | np.ndarray  # a 64-bit number, or a uint64 array of them


def _mix(z: Key) -> Key:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def key(*counters: Key) -> Key:
    """Fold integers such as (CROP, seed, epoch, index, view) into one 64-bit key.

    If a counter is an array, int64 or uint64 [n], the result is uint64 [n]: one key per element.
    """
    folded: Key = 0
    for counter in counters:
        # Reduce both to 64 bits before they are added: NumPy refuses larger numbers.
        counter = counter.astype(np.uint64) if isinstance(counter, np.ndarray) else counter & _MASK
        folded = _mix((((folded + _GAMMA) & _MASK) + counter) & _MASK)
    return folded


def uniform(key: Key, i: int) -> float | np.ndarray:
    """Return the i-th uniform number in [0, 1) of the stream that `key` names.

    For an array of keys [n], return the i-th number of each, float64 [n].
    """
    return (_mix((key + ((i + 1) * _GAMMA & _MASK)) & _MASK) >> 11) * 2.0**-53


def generator(device: torch.device | str, *counters: int) -> torch.Generator:
    """A torch generator on `device` seeded by `key(*counters)`."""
    return torch.Generator(device).manual_seed(key(*counters) >> 1)


@dataclass(frozen=True)
class Progress:
    """Where in the run a forward pass stands; what a method's schedules and draws may depend on.

    `step` counts optimizer steps from 0 over the whole run, `micro` the forward passes inside one step (gradient
    accumulation); `steps_per_epoch` and `epochs` give the run's length.
    """

    seed: int = 0
    epoch: int = 0
    step: int = 0
    micro: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1

    def generator(self, stream: int, device: torch.device | str, *counters: int) -> torch.Generator:
        """A fresh generator for this pass; `counters` such as rank and view tell apart draws that must differ."""
        return generator(device, stream, self.seed, self.step, self.micro, *counters)
