"""The images of one split: in files, inside larger files, or in memory.

`sources` and `registry` make these objects; `loader` turns them into batches of crops.
"""

import contextlib
import hashlib
import os
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco import distributed
from moco.data import depth
from moco.data.decoding import (
    DEFAULT,
    Decoding,
    Reduction,
    brightest,
    decode,
    full_size,
    read_bytes,
)
from moco.data.names import Names
from moco.errors import InputError
from moco.messages import print_rank0


@dataclass(frozen=True)
class Images:
    """The images of one split and their labels. Subclasses hold the images in files or in memory.

    Attributes:
        root: The folder of the images. Error messages name it.
        labels: int64 [N], indices into `classes`. If an image can show several classes:
            [N, classes], with 1 for a class that is shown, 0 for one that is not, and -1 for one
            that training and metrics ignore.
        classes: The names of the classes. If it is empty, the images have no labels, and `labels`
            is all 0.
    """

    root: Path
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(
        self, i: int, settings: Decoding = DEFAULT, reduction: Reduction = full_size
    ) -> Tensor:
        """Return image `i` as uint8 [3, H, W].

        `settings` and `reduction` are those of `decode`.

        Raises InputError, which names the image, if it cannot be read.
        """
        raise NotImplementedError

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one uint8 tensor [n, 3, H, W], or None.

        The result is None unless all are in memory with equal sizes, and `accepts(H, W)` is true.
        """
        del indices, accepts  # for subclasses
        return None

    def name(self, i: int) -> str:
        """Return the name of image `i` in lists of images. No other image has it."""
        raise NotImplementedError

    def listed_names(self, i: int) -> tuple[str, ...]:
        """Return the names by which a list may name image `i`. Other images may share some."""
        name = self.name(i).strip(string.whitespace)
        return (name, os.path.basename(name))

    def subset(self, indices: np.ndarray) -> "Images":
        """Return the images with these `indices`, or those for which a boolean mask is true."""
        raise NotImplementedError

    def content(self) -> bytes:
        """Return bytes that differ between sets of different images, as far as is cheap to tell."""
        return self.labels.tobytes() if self.classes else b"%d" % len(self)

    def digest(self) -> str:
        """Return a hash of the classes and of `content`, which costs .1 s for a million names."""
        names = repr((self.classes, self.labels.shape)).encode()
        return hashlib.sha256(names + self.content()).hexdigest()

    @property
    def labelled(self) -> bool:
        """Return whether the images have labels."""
        return bool(self.classes)

    @property
    def multi_label(self) -> bool:
        """Return whether an image can show several classes."""
        return self.labels.ndim == 2

    @property
    def single_labels(self) -> Tensor | None:
        """Return the class of each image, int64 [N].

        None if the images have no labels, if all are of one class, or if an image can show several.
        """
        known = len(self.classes) > 1 and not self.multi_label
        return torch.as_tensor(self.labels) if known else None


@dataclass(frozen=True)
class EncodedImages(Images):
    """Images in an encoded form, such as JPEG. Subclasses say where their bytes are."""

    def encoded(self, i: int) -> np.ndarray:
        """Return the bytes of image `i`, as in a file of its own: uint8 [bytes].

        Raises InputError, which names the image, if they cannot be read.
        """
        raise NotImplementedError

    def path(self, i: int) -> str:
        """Return the name of image `i` with its folder, for messages."""
        return os.path.join(self.root, self.name(i))

    def read(
        self, i: int, settings: Decoding = DEFAULT, reduction: Reduction = full_size
    ) -> Tensor:
        """Decode image `i`; see `decode`."""
        return decode(self.encoded(i), self.path(i), settings, reduction)


@dataclass(frozen=True)
class ImageFolder(EncodedImages):
    """Images in files below `root`. `paths` [N] holds their paths relative to `root`."""

    paths: Names

    def encoded(self, i: int) -> np.ndarray:
        """Return the content of the file of image `i`; see `EncodedImages.encoded`."""
        return read_bytes(self.path(i))

    def name(self, i: int) -> str:
        """Return the path of image `i` relative to `root`."""
        return os.fsdecode(self.paths[i])

    def content(self) -> bytes:
        """Return the labels and a hash of the paths; see `Images.content`."""
        return super().content() + self.paths.digest()

    def subset(self, indices: np.ndarray) -> "ImageFolder":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class CachedImages(Images):
    """Decoded images in memory (see `cache`), except those that are left where they were.

    `source` has the same images in encoded form. `pixels` is uint8 and holds one image [H, W, 3]
    after the other: crops are fastest in this layout. It is a tensor, because PyTorch shares
    tensors with loader processes by any start method. `starts` [N] has the offset of each image in
    `pixels`, or -1 if the image is read from `source`. `sizes` [N, 2] has heights and widths.
    """

    source: EncodedImages
    pixels: Tensor
    starts: np.ndarray
    sizes: np.ndarray

    def read(
        self, i: int, settings: Decoding = DEFAULT, reduction: Reduction = full_size
    ) -> Tensor:
        """Return image `i` from memory, or decode it if it was left where it was."""
        start, (height, width) = self.starts[i], self.sizes[i].tolist()
        if start < 0:
            return self.source.read(i, settings, reduction)
        pixels = self.pixels[start : start + 3 * height * width].view(height, width, 3)
        return pixels.permute(2, 0, 1)

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one tensor; see `Images.read_batch`."""
        starts, sizes = self.starts[indices], self.sizes[indices]
        height, width = sizes[0].tolist()
        if (starts < 0).any() or (sizes != sizes[0]).any() or not accepts(height, width):
            return None
        # NumPy gathers bytes eight times as fast as PyTorch
        windows = np.lib.stride_tricks.sliding_window_view(self.pixels.numpy(), 3 * height * width)
        pixels = torch.from_numpy(windows[starts]).view(len(indices), height, width, 3)
        return pixels.permute(0, 3, 1, 2)

    def name(self, i: int) -> str:
        """Return the name of image `i` in `source`."""
        return self.source.name(i)

    def listed_names(self, i: int) -> tuple[str, ...]:
        """Return those of `source`; see `Images.listed_names`."""
        return self.source.listed_names(i)

    def content(self) -> bytes:
        """Return that of `source`; see `Images.content`."""
        return self.source.content()

    def subset(self, indices: np.ndarray) -> "CachedImages":
        """Return the images with these `indices`, which share this object's `pixels`."""
        return replace(
            self,
            source=self.source.subset(indices),
            labels=self.labels[indices],
            starts=self.starts[indices],
            sizes=self.sizes[indices],
        )


@dataclass(frozen=True)
class ImageArray(Images):
    """Images in memory, all of one size. `pixels` is uint8 [N, 3, H, W]."""

    pixels: np.ndarray

    def read(
        self, i: int, _settings: Decoding = DEFAULT, _reduction: Reduction = full_size
    ) -> Tensor:
        """Return image `i` at its full size."""
        return torch.from_numpy(self.pixels[i])

    def read_batch(self, indices: np.ndarray, accepts: Callable[[int, int], bool]) -> Tensor | None:
        """Return the images with these `indices` as one tensor; see `Images.read_batch`."""
        return torch.from_numpy(self.pixels[indices]) if accepts(*self.pixels.shape[2:]) else None

    def name(self, i: int) -> str:
        """Return the index `i` as text."""
        return str(i)

    def subset(self, indices: np.ndarray) -> "ImageArray":
        """Return the images with these `indices`; see `Images.subset`."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])


_SAMPLE = 16  # images that `note_dark` reads


def note_dark(images: Images, settings: Decoding) -> None:
    """Print a line that suggests `--white` if the 16-bit images of a sample look dark."""
    if settings.white or not isinstance(images, EncodedImages) or distributed.rank():
        return
    found = []
    for i in np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int):
        with contextlib.suppress(InputError):  # the loader reports unreadable images
            found.append(brightest(images.encoded(i)))
    values = [value for value in found if value is not None]
    white = depth.white_for(max(values, default=0))
    if white:
        print_rank0(
            f"{images.root}: 16-bit images look dark. The largest value in {len(values)} of them "
            f"is {max(values)}, and 65535 is shown as white; --white {white} makes them brighter"
        )
