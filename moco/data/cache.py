"""Decoded images in memory (`--cache-images`): decoded once by threads, and shared by the loader's processes."""

import os
import sys
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moco import distributed
from moco.data.images import CachedFolder, ImageFolder, Images, decode_whole, decoded_size
from moco.errors import InputError

MODES = ("auto", "on", "off")
SHARE, MOST = 4, 8 << 30  # auto: at most 1 / SHARE of a node's free memory, and at most 8 GiB
_SAMPLE = 256  # files whose headers are read to estimate the size of all
_BLOCK, _AHEAD = 16, 64  # images that a thread decodes in one turn; turns that may wait for the ones before


def load(args: Namespace, *sets: Images | None) -> list[Images | None]:
    """Return `sets` with the images of folders in memory if `args.cache_images` says so, or else as they are.

    To be called on every rank, before loader processes start. Each rank has a copy of its own, so the
    ranks of a node share the limit. Rank 0 prints one line. Images that cannot be read are left out,
    so that the loader meets the same error as without the cache; so are large JPEGs, which it decodes
    at a reduced size. `args` has `cache_images` and `nodes`.

    Raises InputError if the images do not fit and the option is `on`.
    """
    folders = [one for one in sets if isinstance(one, ImageFolder) and not isinstance(one, CachedFolder)]
    if args.cache_images == "off" or not folders:
        return list(sets)
    ranks = max(1, distributed.world() // args.nodes)  # of this node
    threads = max(1, max(4, os.cpu_count() or 1) // ranks)
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # here, because threads cannot do so one by one
        needed, free = _agreed([_estimate(folder, pool) for folder in folders], free_memory())
        limit = _limit(args.cache_images, sum(needed), free, ranks)
        if not 0 < sum(needed) <= limit:
            return list(sets)
        held = {}
        for folder, size in zip(folders, needed, strict=True):
            held[id(folder)] = cached = _decoded(folder, min(limit, size * 5 // 4 + (64 << 20)), pool)
            limit -= cached.pixels.numel()
    return [held.get(id(one), one) for one in sets]


def _limit(mode: str, needed: int, free: int, ranks: int) -> int:
    """Return how many bytes a process may hold, and print what follows for `needed` bytes. Raises InputError for `on`."""
    limit = (min(free // SHARE, MOST) if mode == "auto" else free) // ranks
    size = f"about {_gib(needed)} decoded"
    if needed > limit and mode == "on":
        raise InputError(
            f"--cache-images on: the images take {size}, and each process may use {_gib(limit)}; leave it out, or free memory"
        )
    rule = f"a quarter of the free {_gib(free)}, at most {_gib(MOST)}" if mode == "auto" else f"the free {_gib(free)}"
    rule += f", divided among {ranks} processes" if ranks > 1 else ""
    if not needed:
        line = "images are read from their files in every epoch: these are large, and are decoded at a reduced size"
    elif needed > limit:
        line = f"images are read from their files in every epoch: {size}, and the limit is {_gib(limit)} ({rule})"
    else:
        line = f"images stay in memory: {size}, and the limit is {_gib(limit)} ({rule})"
    if distributed.is_first():
        tqdm.write(f"{line} (--cache-images {mode})")
        sys.stdout.flush()
    return limit


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _agreed(needed: list[int], free: int) -> tuple[list[int], int]:
    """Return rank 0's `needed` and the least `free` of all ranks, so that all of them decide the same."""
    if distributed.world() == 1:
        return needed, free
    found: list[tuple[list[int], int]] = [([], 0)] * distributed.world()
    dist.all_gather_object(found, (needed, free))
    return found[0][0], min(free for _, free in found)


def _estimate(folder: ImageFolder, pool: Executor) -> int:
    """Return about how many bytes the decoded images take, from the headers of some of the files."""
    rows = np.linspace(0, len(folder) - 1, min(len(folder), _SAMPLE)).astype(int)
    return round(np.mean(list(pool.map(decoded_size, map(folder.path, rows)))) * len(folder))


def _decoded(folder: ImageFolder, most: int, pool: Executor) -> CachedFolder:
    """Decode the images of `folder`. What does not fit into `most` bytes any more is left out."""
    pixels = torch.empty(most, dtype=torch.uint8)  # the system provides memory only as it is filled
    starts, sizes = np.full(len(folder), -1), np.zeros((len(folder), 2), dtype=np.int64)
    firsts = range(0, len(folder), _BLOCK)
    end = 0
    for first, (block, images) in zip(firsts, _in_order(folder, firsts, pool), strict=True):
        if end + len(images) > most:
            continue
        pixels[end : end + len(images)] = images
        lengths = 3 * block.prod(1)
        starts[first : first + _BLOCK] = np.where(lengths, end + lengths.cumsum() - lengths, -1)
        sizes[first : first + _BLOCK] = block
        end += len(images)
    fields = (folder.root, folder.labels, folder.classes, folder.paths)
    return CachedFolder(*fields, pixels[:end], starts, sizes)


def _in_order(folder: ImageFolder, firsts: range, pool: Executor) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the result of `_decode_block` for each of `firsts`; only a few wait in memory."""
    waiting: deque[Future] = deque()
    for first in firsts:
        waiting.append(pool.submit(_decode_block, folder, first))
        if len(waiting) == _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _decode_block(folder: ImageFolder, first: int) -> tuple[np.ndarray, Tensor]:
    """Decode `_BLOCK` images from number `first` on.

    Returns height and width of each, 0 for one that is left out, int64 [n, 2]; and their pixels, uint8.
    """
    images = [decode_whole(folder.path(i)) for i in range(first, min(first + _BLOCK, len(folder)))]
    sizes = [(0, 0) if image is None else image.shape[1:] for image in images]
    flat = [image.reshape(-1) for image in images if image is not None]
    return np.array(sizes, dtype=np.int64), torch.cat([torch.empty(0, dtype=torch.uint8), *flat])


# Free memory.

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# of the two versions of Linux's control groups: their folder, limit, use, and the part of it that is given back when needed
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("", "memory.max", "memory.current", "inactive_file")


def free_memory() -> int:
    """Return how many bytes this process may still use: of the machine, or of its container or job if that has less."""
    try:
        fields = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield how much each control group with a limit has left: this process's own, and those around it."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        kind, most, used, given_back = _V1 if controllers else _V2
        for group in (Path(name), *Path(name).parents):
            folder = CGROUPS / kind / str(group).lstrip("/")
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int((folder / most).read_text()) - int((folder / used).read_text()) + int(stat.get(given_back, 0))
            except (OSError, ValueError):  # no such group here, or no limit ("max")
                continue
