"""Read untrusted pickles safely, as plain values and NumPy's arrays, and never as code."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from moco.errors import InputError, short
from moco.files import unreadable


def read_pickle(path: str | Path) -> Any:
    """Return the value in a pickle of plain values and NumPy's arrays and numbers.

    No other object is created or called, so an untrusted file does no harm.

    Raises InputError if the file is damaged or holds anything else, and UnreadableError if the
    system cannot read it. The messages do not contain the path.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except InputError:
        raise
    except (OSError, MemoryError) as error:
        raise unreadable(error) from None
    except Exception as error:  # a damaged pickle raises errors of many types
        reason = short(" ".join(str(error).split()), 600) or type(error).__name__
        raise InputError(f"damaged, or no pickle ({reason})") from None


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can only create plain values and NumPy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function that a pickle asks for.

        Raises InputError if arrays do not need it.
        """
        module = module.replace("numpy._core", "numpy.core")  # its name since NumPy 2
        if (module, name) not in _ARRAY_PARTS:
            raise InputError(
                f"holds {short(f'{module}.{name}')}, and only plain values and numpy's arrays are "
                "read; save these alone"
            )
        return _ARRAY_PARTS[module, name]


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    """Return a NumPy number. Raises InputError for a type that would unpickle `data`."""
    if dtype.hasobject:
        raise InputError(
            "holds an array of Python objects, and only numbers and words are read; "
            "save these alone"
        )
    return np.empty(0).dtype.type(0).__reduce__()[0](dtype, data)


# The names that pickles of arrays refer to, with NumPy 1 and 2, and the objects to use for them.
_ARRAY_PARTS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    # old pickle protocols have no type for bytes, and store them as encoded text
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    ("collections", "OrderedDict"): dict,
}
