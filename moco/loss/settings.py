"""Define the types of synthetic negatives, and the constants of other losses that options need.

This file does not import torch, so that options are read quickly.

`TYPES` is the table of the types of synthetic negatives: SynCo's six (arXiv 2410.02401, section 3).
To add a type, add an entry. `moco/loss/synthetic.py` explains the coefficients, and computes the
negatives.
"""

from dataclasses import dataclass

LEAST_T = 0.02  # least temperature of SogCLR; at half of it, exp(1 / T) would overflow float32
ANNEAL_STEPS = 9  # values of HCL's beta with --anneal
MODES = ("attract", "eliminate", "off")  # what FNC does with false negatives
SOURCES = ("similarity", "labels")  # where FNC's false negatives come from


@dataclass(frozen=True)
class Coefficient:
    """The factor of a vector in v: constant + slope w, times the type's size if `sized`.

    w is the random weight of the negative.
    """

    constant: float = 0.0
    slope: float = 0.0
    sized: bool = False


ONE = Coefficient(1.0)
W = Coefficient(slope=1.0)
ONE_MINUS_W = Coefficient(1.0, slope=-1.0)
SIZE = Coefficient(1.0, sized=True)


@dataclass(frozen=True)
class Type:
    """A type of synthetic negative: its random draws, and the coefficients of the vectors in v."""

    name: str  # one word, for options and help texts
    source: str  # the paper
    weight: tuple[float, float] | None = None  # w ~ U(low, high); None: no random weight
    size: str | None = None  # the field of `Synthetic` that scales the noise and SIZE
    q: Coefficient | None = None  # A; None here and below: the vector is absent
    n: Coefficient = ONE  # B
    second: Coefficient | None = None  # D, of a second drawn entry n'
    sign: Coefficient | None = None  # E, of sign(q)
    noise: bool = False  # whether e ~ N(0, size^2 I) is added

    @property
    def in_plane(self) -> bool:
        """Return whether v is A q + B n, whose norm needs no vector."""
        return self.second is None and self.sign is None and not self.noise


_MOCHI, _SYNCO = "MoCHI, arXiv 2010.01028", "SynCo, arXiv 2410.02401, section 3"

# The order is that of --n1, --n2, ... and of the random draws. The papers call types 5 and 6 steps
# along the gradient of q.n with respect to n, which is q.
TYPES = (
    Type("interpolated", _MOCHI, weight=(0.0, 0.5), q=W, n=ONE_MINUS_W),  # w q + (1 - w) n
    Type("extrapolated", _SYNCO, weight=(1.0, 1.5), q=ONE_MINUS_W, n=W),  # q + w (n - q)
    Type("mixup", _MOCHI, weight=(0.0, 1.0), n=W, second=ONE_MINUS_W),  # w n + (1 - w) n'
    Type("noise", _SYNCO, size="sigma", noise=True),  # n + e
    Type("perturbed", _SYNCO, size="delta", q=SIZE),  # n + delta q
    Type("adversarial", _SYNCO, size="eta", sign=SIZE),  # n + eta sign(q)
)


@dataclass(frozen=True)
class Synthetic:
    """The settings of a run's synthetic negatives: the number of each type, and the sizes."""

    n_hard: int = 0  # hardest bank entries of each query, from which n and n' are drawn
    counts: tuple[int, ...] = (0,) * len(TYPES)  # negatives per query, of each of TYPES
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01
    weight: float = 1.0  # of the negatives' exponentials in the loss

    def __post_init__(self):
        """Raise ValueError unless each type has a count."""
        if len(self.counts) != len(TYPES):
            raise ValueError(f"{len(self.counts)} counts for {len(TYPES)} types of negatives")

    @property
    def total(self) -> int:
        """Return the number of synthetic negatives per query."""
        return sum(self.counts)

    def size(self, type_: Type) -> float:
        """Return the size that a type reads, or 1 if it reads none."""
        return getattr(self, type_.size) if type_.size else 1.0
