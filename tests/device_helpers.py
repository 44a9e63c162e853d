"""A simulated accelerator, which counts the waits of the host for the device."""

import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moco import rng

META = torch.device("meta")


class OnDevice(Tensor):
    """A tensor that reports META as its device. Its values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        return Tensor._make_wrapper_subclass(cls, held.shape, device=META, **layout)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the simulated accelerator")


class Accelerator(TorchDispatchMode):
    """A simulated accelerator. While `counts`, `waits` gets each operation at which the host waits.

    The host waits for numbers and truth values (`.item()`, `if x > 0`), for copies to the CPU, and
    for results whose shape depends on values, such as the entries that a mask selects. It also
    waits for copies from the CPU that are not queued (non_blocking). Operations on CPU tensors are
    not recorded. `wide` gets the operations that made a float64 tensor on the device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.counts, self.waits, self.wide = False, [], set()
        tensor = torch.tensor  # patched below: a dispatch mode does not see its copies to a device

        def copied(data: object, device: torch.device | None = None, **more: object) -> Tensor:
            return tensor(data, **more).to(device or "cpu")

        monkeypatch.setattr(torch, "tensor", copied)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        makes = wanted is not None and torch.device(wanted) == META
        if not (makes or _any_on_device((*args, *kwargs.values()))):
            return function(*args, **kwargs)
        if self.counts and self.waits_for(function.overloadpacket.__name__, args, kwargs):
            own = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            where = [line for line in own if "/torch/" not in line]
            self.waits.append(f"{function} at {where[-1]}")
        held = {name: _held(value) for name, value in kwargs.items()} | (
            {"device": "cpu"} if makes else {}
        )
        plain = [_held(arg) for arg in args]
        result = function(*plain, **held)
        if wanted is not None and not makes:
            return result  # a copy on the CPU
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.wide.add(str(function))
        changed = (*args, *kwargs.values()) if function._schema.is_mutable else ()
        given = {id(_held(x)): x for x in changed if isinstance(x, Tensor)}
        return _on_device(result, given)

    def waits_for(self, name: str, args: tuple, kwargs: dict) -> bool:
        first = args[0] if args else None
        if name == "_to_copy":
            to = torch.device(kwargs.get("device") or first.device)
            return first.device != to and (to != META or not kwargs.get("non_blocking"))
        if name == "copy_":
            from_to = (args[1].device, first.device)
            queued = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
            return from_to[0] != from_to[1] and (from_to[1] != META or not queued)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [i for i in args[1] if i is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device != META for i in indices)
        return name in DEPENDS_ON_VALUES


DEPENDS_ON_VALUES = set(
    "_local_scalar_dense nonzero equal is_nonzero masked_select bincount argwhere".split()
)
DEPENDS_ON_VALUES |= set(
    "_unique _unique2 unique_dim unique_consecutive repeat_interleave histc allclose".split()
)


def _any_on_device(values: tuple) -> bool:
    for value in values:
        if isinstance(value, OnDevice):
            return True
        if isinstance(value, list | tuple) and _any_on_device(value):
            return True
    return False


def _held(value: object) -> object:
    if isinstance(value, OnDevice):
        return value.held
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _on_device(result: object, given: dict[int, Tensor]) -> object:
    """Wrap a result's tensors as `OnDevice`; return one changed in place as the tensor `given`."""
    if isinstance(result, Tensor):
        return given[id(result)] if id(result) in given else OnDevice(result)
    return (
        type(result)(_on_device(x, given) for x in result)
        if type(result) in (list, tuple)
        else result
    )


class Generator(torch.Generator):
    """A random generator that reports META as its device; torch has none for META."""

    device = META


def generator(device: torch.device | str, *counters: int) -> torch.Generator:
    made = Generator() if torch.device(device) == META else torch.Generator(device)
    made.manual_seed(rng.key(*counters) >> 1)
    return made


class Log:
    """A stand-in for the log and the signal handler: counts from the end of the first step on."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def wait(self, seconds: float) -> None:
        pass

    def tick(self, images: int) -> None:
        self.accelerator.counts = True

    def agreed(self) -> str:
        return ""


STEPS = 50
