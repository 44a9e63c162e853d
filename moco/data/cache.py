"""Keep decoded images in memory (`--cache-images`). The loader's worker processes share them."""

import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moco import distributed, messages
from moco.data.decoding import decode_full, decoded_size
from moco.data.images import CachedImages, EncodedImages, Images
from moco.errors import InputError
from moco.sections import AUTO_MAX, Input
from moco.sections_images import Decoding

MODES = ("auto", "on", "off")
THREADS = 8  # more threads wait for Python's lock, which much of the work on small images holds
_SAMPLE = 256  # files whose headers are read to estimate the total size
_BLOCK = 16  # images that a thread decodes as one task
_AHEAD = 64  # tasks that may be submitted before their results are read


def load(input: Input, *sets: Images | None) -> list[Images | None]:
    """Return `sets`, with encoded images decoded into memory if `--cache-images` allows it.

    Call it on every rank, before worker processes start. Each rank holds its own copy, so the limit
    is divided among the ranks of a node. Rank 0 prints one line.

    Unreadable images stay on disk, so that the loader reports the same error as without the cache.
    With `input.shrink_on_decode`, large JPEGs also stay on disk, because the loader decodes them at
    a reduced size.

    Raises InputError if the images do not fit and `input.cache_images` is "on".
    """
    encoded = [one for one in sets if isinstance(one, EncodedImages)]
    if input.cache_images == "off" or not encoded:
        return list(sets)
    ranks = max(1, distributed.world_size() // input.nodes)  # of this node
    threads = max(1, min(THREADS, max(4, os.cpu_count() or 1) // ranks))
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in all threads, because they share the filters
        needed, free = _agreed(
            [_estimate(images, input, pool) for images in encoded], free_memory()
        )
        limit = _limit(input.cache_images, sum(needed), free, ranks)
        if not 0 < sum(needed) <= limit:
            return list(sets)
        held = {}
        for images, size in zip(encoded, needed, strict=True):
            max_bytes = min(limit, size * 5 // 4 + (64 << 20))  # the estimate may be too low
            held[id(images)] = cached = _decoded(images, input, max_bytes, pool)
            limit -= cached.pixels.numel()
    return [held.get(id(one), one) for one in sets]


def _limit(mode: str, needed: int, free: int, ranks: int) -> int:
    """Return how many bytes this process may hold. Print whether the `needed` bytes fit.

    `free` is the node's free memory in bytes, which `ranks` ranks share.

    Raises InputError if they do not fit and `mode` is "on".
    """
    limit = (min(free // 4, AUTO_MAX) if mode == "auto" else free) // ranks
    size = f"about {_gib(needed)} decoded"
    if needed > limit and mode == "on":
        raise InputError(
            f"--cache-images on: the images take {size}, and each process may use {_gib(limit)}; "
            "leave the option out, or free memory"
        )
    rule = f"free {_gib(free)}"
    rule = f"a quarter of the {rule}, at most {_gib(AUTO_MAX)}" if mode == "auto" else f"the {rule}"
    rule += f", divided among {ranks} processes" if ranks > 1 else ""
    line = f"{size}, and the limit is {_gib(limit)} ({rule})"
    if not needed:
        line = "these are large, and are decoded at a reduced size"
    stay = 0 < needed <= limit
    place = "stay in memory" if stay else "are read from their files in every epoch"
    line = f"images {place}: {line}"
    if messages.is_rank0():
        tqdm.write(f"{line} (--cache-images {mode})")
        sys.stdout.flush()
    return limit


def _gib(size: int) -> str:
    """Return a number of bytes as text, such as 1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"


def _agreed(needed: list[int], free: int) -> tuple[list[int], int]:
    """Return rank 0's `needed` and the smallest `free` of any rank, so that all ranks agree."""
    if distributed.world_size() == 1:
        return needed, free
    found: list[tuple[list[int], int]] = [([], 0)] * distributed.world_size()
    dist.all_gather_object(found, (needed, free))
    return found[0][0], min(free for _, free in found)


def _estimate(images: EncodedImages, settings: Decoding, pool: Executor) -> int:
    """Estimate the size of the decoded images in bytes, from the headers of `_SAMPLE` of them."""
    indices = np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int)
    return round(
        np.mean(list(pool.map(lambda i: _size(images, i, settings), indices))) * len(images)
    )


def _size(images: EncodedImages, i: int, settings: Decoding) -> int:
    """Return the size of decoded image `i` in bytes; 0 if it stays on disk."""
    try:
        return decoded_size(images.encoded(i), settings)
    except InputError:
        return 0


def _decoded(
    source: EncodedImages, settings: Decoding, max_bytes: int, pool: Executor
) -> CachedImages:
    """Decode the images of `source`. Blocks that do not fit into `max_bytes` stay on disk."""
    # the system only provides memory for the pages that are written
    pixels = torch.empty(max_bytes, dtype=torch.uint8)
    starts, sizes = np.full(len(source), -1), np.zeros((len(source), 2), dtype=np.int64)
    firsts = range(0, len(source), _BLOCK)
    end = 0
    for first, (block, images) in zip(
        firsts, _in_order(source, settings, firsts, pool), strict=True
    ):
        if end + len(images) > max_bytes:
            continue
        pixels[end : end + len(images)] = images
        lengths = 3 * block.prod(1)
        starts[first : first + _BLOCK] = np.where(lengths, end + lengths.cumsum() - lengths, -1)
        sizes[first : first + _BLOCK] = block
        end += len(images)
    facts = (source.root, source.labels, source.classes)
    return CachedImages(*facts, source, pixels[:end], starts, sizes)


Block = tuple[np.ndarray, Tensor]  # (height, width) of each image, and the pixels of all


def _in_order(
    source: EncodedImages, settings: Decoding, firsts: range, pool: Executor
) -> Iterator[Block]:
    """Yield the result of `_decode_block` for each of `firsts`; hold at most `_AHEAD` results."""
    waiting: deque[Future] = deque()
    for first in firsts:
        waiting.append(pool.submit(_decode_block, source, settings, first))
        if len(waiting) == _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _decode_block(source: EncodedImages, settings: Decoding, first: int) -> Block:
    """Decode `_BLOCK` images from index `first` on. Images that stay on disk get size (0, 0)."""
    last = min(first + _BLOCK, len(source))
    images = [_decode(source, settings, i) for i in range(first, last)]
    sizes = [(0, 0) if image is None else image.shape[1:] for image in images]
    flat = [image.permute(1, 2, 0).reshape(-1) for image in images if image is not None]
    return np.array(sizes, dtype=np.int64), torch.cat([torch.empty(0, dtype=torch.uint8), *flat])


def _decode(source: EncodedImages, settings: Decoding, i: int) -> Tensor | None:
    """Return image `i`, or None if it stays on disk; see `decode_full`."""
    try:
        return decode_full(source.encoded(i), source.path(i), settings)
    except InputError:
        return None


PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The two versions of Linux's control groups (cgroups). Each entry has the folder, the file with the
# limit, the file with the usage, and the field of memory.stat that counts cached file pages. The
# kernel frees those pages on demand.
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("", "memory.max", "memory.current", "inactive_file")


def free_memory() -> int:
    """Return how many bytes this process may still use, within the limits of its container or job.

    Without /proc/meminfo (not Linux), return half of the machine's memory.
    """
    try:
        fields = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left in each control group with a limit: this process's and their parents."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit_file, usage_file, cached_pages = _V1 if controllers else _V2
        for group in (Path(name), *Path(name).parents):
            folder = CGROUPS / top / str(group).lstrip("/")
            try:
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                limit, usage = (
                    int((folder / file).read_text()) for file in (limit_file, usage_file)
                )
                yield limit - usage + int(stat.get(cached_pages, 0))
            except (OSError, ValueError):  # no such group here, or no limit ("max")
                continue
