"""Counter-based random numbers: each draw is a pure function of counters, such as seed and step.

No generator is kept from one step to the next. Therefore the draws do not depend on the number of
workers, and a resumed run needs no saved generator state. The mixing function is SplitMix64's
(Steele, Lea & Flood, OOPSLA 2014).
"""

from dataclasses import dataclass

import numpy as np
import torch

# The purpose of a draw, the first counter of each key.
ORDER, CROP, COLOR, SHUFFLE, NEGATIVES, SPLIT, LAYERS, REPLACEMENT = range(8)

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15

Key = int | np.ndarray  # a 64-bit number, or a uint64 array of them


def _mix(z: Key) -> Key:
    """Apply SplitMix64's mixing function to each 64-bit number."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def key(*counters: Key, start: Key = 0) -> Key:
    """Fold counters, such as (CROP, seed, epoch, index, view), into one 64-bit key.

    `start` is the key of earlier counters, which come first. If a counter is an array, int64 or
    uint64 [n], return uint64 [n]: one key per element.
    """
    folded = start
    for counter in counters:
        # Reduce both to 64 bits before they are added: NumPy refuses larger numbers.
        counter = counter.astype(np.uint64) if isinstance(counter, np.ndarray) else counter & _MASK
        folded = _mix((((folded + _GAMMA) & _MASK) + counter) & _MASK)
    return folded


def uniform(key: Key, i: int) -> float | np.ndarray:
    """Return the i-th uniform number in [0, 1) of the random stream with this `key`.

    For an array of keys [n], return the i-th number of each stream, float64 [n].
    """
    return (_mix((key + ((i + 1) * _GAMMA & _MASK)) & _MASK) >> 11) * 2.0**-53


def generator(device: torch.device | str, *counters: int) -> torch.Generator:
    """Return a new torch generator on `device`, seeded with `key(*counters)`."""
    return torch.Generator(device).manual_seed(key(*counters) >> 1)


def permutation(n: int, *counters: int) -> torch.Tensor:
    """Return the numbers from 0 to `n` - 1 in random order, seeded with `key(*counters)`.

    They are int32 if possible. The order is the same as in int64, and takes half the memory.
    """
    dtype = torch.int32 if n < 1 << 31 else torch.int64
    return torch.randperm(n, dtype=dtype, generator=generator("cpu", *counters))


@dataclass(frozen=True)
class Progress:
    """The position of a forward pass in the run. A method's schedules and draws depend on it.

    Attributes:
        seed: The seed of the run.
        epoch: The epoch, counted from 0. It is negative while AdCo fills its bank.
        step: The number of optimizer steps before this one in the run.
        micro: The number of forward passes before this one within the step, with gradient
            accumulation.
        steps_per_epoch: The number of optimizer steps in an epoch.
        epochs: The number of epochs in the run.
    """

    seed: int = 0
    epoch: int = 0
    step: int = 0
    micro: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1

    def generator(self, stream: int, device: torch.device | str, *counters: int) -> torch.Generator:
        """Return a new generator for this forward pass.

        `stream` is the purpose of the draw, such as `NEGATIVES`. More `counters`, such as rank and
        view, make the draws of the same purpose differ.
        """
        return generator(device, stream, self.seed, self.step, self.micro, *counters)
