"""Compute the features of many images in parts on disk, so that a killed program can continue.

The parts are files in a work folder. Each has the features of consecutive images, and ends where a
batch of the loader ends. A continued program therefore computes the same batches as one that was
not stopped, and gets the same bits.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor, nn

from moco.config import Config
from moco.data.images import Images
from moco.encoder import networks
from moco.engine.features import indexed_batches
from moco.engine.precision import autocast
from moco.engine.run_folder import LOCK, LockedFolder
from moco.errors import InputError, ListError
from moco.files import half_written, read_json, replacing, write_json
from moco.messages import print_rank0

SECONDS = 20.0  # between two parts
_ABOUT, _PART = "about.json", "part_*.npz"


class Parts:
    """The parts in a work folder, which this program has locked.

    Args:
        folder: the work folder.
        about: what determines the features, by name. Parts with another description are refused.
        force: whether to delete parts with another description.

    Raises InputError if the folder has other parts, cannot be written, or is used by another
    program.
    """

    def __init__(self, folder: Path, about: dict[str, Any], force: bool = False):
        self.folder, self.about, self.done = folder, about, 0
        self.unreadable: dict[int, str] = {}  # the reason of each image that cannot be read
        try:
            self._held = LockedFolder(folder)
        except Timeout:
            raise InputError(
                f"{folder}: another program is writing there; wait until it ends, or give another "
                "--out"
            ) from None
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written: {error.strerror}; choose another place"
            ) from None
        try:
            self._open(force)
        except BaseException:
            self.close()
            raise

    def _open(self, force: bool) -> None:
        """Find the parts in the folder. Delete what no part needs."""
        about, file = self.about, self.folder / _ABOUT
        ours = {self.folder / LOCK, *half_written(self.folder, "*")}
        if set(self.folder.iterdir()) - ours:
            found = self._described(file)
            differ = [name for name in about if found.get(name) != about[name]]
            if not self._files():
                self._delete()
            elif differ and not force:
                raise InputError(
                    f"{self.folder}: holds unfinished features of another command (other "
                    f"{', '.join(differ)}); repeat that command to continue it, or give --force "
                    "to start anew"
                )
            elif differ:
                self._delete()
                print_rank0(f"{self.folder}: deleted the parts of another command (--force)")
        files = self._files()
        for i, path in enumerate(files):
            part = _read(path)
            if part is None or int(part["start"]) != self.done:
                print_rank0(f"{path}: is damaged or missing; it and later parts are computed again")
                for later in files[i:]:
                    later.unlink()
                break
            self.done = int(part["stop"])
            self.unreadable |= dict(
                zip(part["bad"].tolist(), part["reasons"].tolist(), strict=True)
            )

    def _described(self, file: Path) -> dict[str, Any]:
        """Return the description of the parts. Raises InputError if `file` is not one."""
        try:
            found = read_json(file)
            if isinstance(found, dict):
                return found
            reason = "not a JSON object"
        except InputError as error:
            reason = str(error)
        raise InputError(
            f"{self.folder}: exists, and {_ABOUT} there does not describe parts of features "
            f"({reason}); remove the folder with rm -r, or give another --out"
        )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(_PART))

    def write(self, stop: int, index: list[int], rows: np.ndarray, bad: dict[int, str]) -> None:
        """Write a part with the images from `done` to `stop` - 1.

        Args:
            stop: index of the first image after the part.
            index: indices of the images that were read, [n].
            rows: their features, [n, D].
            bad: the other images, with the reasons.

        Raises InputError if the part cannot be written.
        """
        content = {
            "start": self.done,
            "stop": stop,
            "index": np.array(index, dtype=np.int64),
            "rows": rows,
            "bad": np.array(list(bad), dtype=np.int64),
            "reasons": np.array(list(bad.values()), dtype=str),
        }
        try:
            if not self.done:
                write_json(self.folder / _ABOUT, self.about)
            with replacing(self.folder / f"part_{self.done:012d}.npz") as file:
                np.savez(file, **content)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from None
        self.done, self.unreadable = stop, self.unreadable | bad

    def read(self) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the indices [n] and the features [n, D] of each part, in order."""
        for path in self._files():
            with np.load(path) as part:
                yield part["index"].tolist(), part["rows"]

    def finish(self) -> None:
        """Delete the parts and the folder."""
        self._delete()
        self.close()
        with contextlib.suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def _delete(self) -> None:
        for path in (*self._files(), *half_written(self.folder, "*"), self.folder / _ABOUT):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder."""
        self._held.release()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Return the content of a part, or None if it is damaged."""
    try:
        with np.load(path) as found:
            part = {name: found[name] for name in ("start", "stop", "index", "bad", "reasons")}
            rows = found["rows"]
    except Exception:  # a damaged file can cause any error
        return None
    return part if rows.ndim == 2 and len(rows) == len(part["index"]) else None


def digest(net: nn.Module, images: Images) -> tuple[str, str]:
    """Return the hashes of the weights of `net`, and of the names of the images."""
    weights = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return weights.hexdigest(), hashlib.sha256(images.content()).hexdigest()


@torch.inference_mode()
def compute(
    net: nn.Module,
    images: Images,
    config: Config,
    device: torch.device,
    parts: Parts,
    skip: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Compute the features of the images that `parts` lacks, and write them to parts.

    Args:
        net: the network, in eval mode on `device`.
        images: the images.
        config: the settings of the loader, the views and the precision.
        device: the device that computes.
        parts: the parts so far.
        skip: whether images that cannot be read are left out.
        progress: called with the number of images done.

    Raises InputError if an image cannot be read and `skip` is false, if a feature is NaN or
    infinite, or if a part cannot be written.
    """
    if parts.unreadable and not skip:
        raise InputError(f"{next(iter(parts.unreadable.values()))}{_OR_SKIP}")
    found: list[tuple[int, str]] | None = [] if skip else None
    # per batch: the index after its last image, the images that were read, their features
    pending: list[tuple[int, list[int], np.ndarray | None]] = []
    stop, written = parts.done, time.monotonic()

    def flush() -> None:
        if not pending:
            return
        index = [i for _, own, _ in pending for i in own]
        rows = [x for _, _, x in pending if x is not None]
        features = np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)
        # an image may have several reasons, because it may also have replaced others
        reasons, absent = dict(found or []), set(range(parts.done, pending[-1][0])) - set(index)
        parts.write(pending[-1][0], index, features, {i: reasons[i] for i in sorted(absent)})
        pending.clear()

    try:
        for x, _, own in _batches(images, config, device, found, parts.done):
            stop = min(stop + config.input.batch_per_process, len(images))
            pending.append((stop, own.tolist(), _features(net, x, config.compute.amp, device)))
            progress(stop)
            if time.monotonic() - written >= SECONDS:
                flush()
                written = time.monotonic()
    finally:
        flush()  # an interrupted program continues here


_OR_SKIP = ", or leave it out with --on-bad-image skip"


def _batches(*args: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `indexed_batches(*args)`. An error about an image names the option that skips it."""
    try:
        yield from indexed_batches(*args)
    except ListError:  # it cannot be skipped
        raise
    except InputError as error:
        skips = args[3] is not None
        raise InputError(f"{error}{'' if skips else _OR_SKIP}") from None


def _features(net: nn.Module, x: Tensor, amp: str, device: torch.device) -> np.ndarray | None:
    """Return the features [n, D] of images, None for none. Raises InputError if one is NaN."""
    if not len(x):
        return None
    with autocast(amp, device):
        features = networks.features(net, x).float()
    if not features.isfinite().all():
        how = "give --amp off" if amp == "fp16" else "the encoder diverged; take another checkpoint"
        raise InputError(f"the features contain NaN or infinity; {how}")
    return features.cpu().numpy()
