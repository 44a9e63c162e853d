"""Write TensorFlow checkpoints, and compute SimCLR's ResNet as its TensorFlow code does.

The writer follows TensorFlow's format, not the reader's code.
"""

import numpy as np
import torch
import torch.nn.functional as F

from moco.encoder.crc32c import masked_crc32c

MAGIC = 0xDB4775248B80FB57
DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def varint(value):
    """Return a number in groups of 7 bits, the lowest first."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def field(number, value):
    """Return a field of a protocol buffer: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def header(shards=1, big_endian=0):
    return field(1, shards) + field(2, big_endian) + field(3, field(1, 1))


def entry(dtype, shape, shard, offset, size, crc, more=b""):
    dims = b"".join(field(2, field(1, side)) for side in shape)
    place = (field(3, shard) if shard else b"") + (field(4, offset) if offset else b"")
    checksum = varint(6 << 3 | 5) + crc.to_bytes(4, "little")
    return field(1, dtype) + field(2, dims) + place + field(5, size) + checksum + more


def block(pairs, compression=0):
    """Return a block of a table with its trailer. Keys share the beginning of the one before."""
    content, before = b"", b""
    for key, value in pairs:
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        before = key
    return with_trailer(content, compression)


def with_trailer(content, compression=0):
    """Return the entries of a block with its one restart, compression and checksum."""
    content += (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes([compression])
    return content + masked_crc32c(content).to_bytes(4, "little")


def index(entries, per_block=50, compression=0):
    """Return the content of the index of `entries`, values by key."""
    pairs = sorted(entries.items())
    parts = [pairs[start : start + per_block] for start in range(0, len(pairs), per_block)]
    return table([(part[-1][0], block(part, compression)) for part in parts])


def table(blocks):
    """Return a table of data blocks, each with its last key."""
    file, handles, places = b"", [], []
    for last, part in blocks:
        handles.append((last, varint(len(file)) + varint(len(part) - 5)))
        file += part
    for part in (block([]), block(handles)):
        places.append(varint(len(file)) + varint(len(part) - 5))
        file += part
    return file + b"".join(places).ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def write_bundle(prefix, variables, shards=1, **more):
    """Write NumPy arrays by name; the i-th variable goes to the data file i modulo `shards`."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files, entries = [bytearray() for _ in range(shards)], {b"": header(shards)}
    for i, (name, array) in enumerate(variables.items()):
        data, shard = np.ascontiguousarray(array).tobytes(), i % shards
        place = (shard, len(files[shard]), len(data), masked_crc32c(data))
        entries[name.encode()] = entry(DTYPES[array.dtype.name], array.shape, *place)
        files[shard] += data
    for shard, content in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index(entries, **more))
    return prefix


# SimCLR's code


class SimCLR:
    """A ResNet as SimCLR's TensorFlow code computes it, on images [B, H, W, 3].

    The first call creates the variables, in that code's order and with its names.
    """

    def __init__(self, blocks=(3, 4, 6, 3), width=1, cifar=False, head=(2048, 2048, 128)):
        self.blocks, self.width, self.cifar, self.widths = blocks, width, cifar, head
        self.variables: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(0)

    def __call__(self, images):
        """Return the features [B, 2048 * width] and the output of the projection head."""
        self.counts = {"conv2d": 0, "batch_normalization": 0}
        x = self.norm(self.conv(images, 64 * self.width, 3 if self.cifar else 7, 2 - self.cifar))
        x = x if self.cifar else same_max_pool(x)
        for stage, blocks in enumerate(self.blocks):
            filters = 64 * self.width * 2**stage
            for i in range(blocks):
                x = self.bottleneck(x, filters, 2 if stage and not i else 1, project=not i)
        features = hidden = x.mean((1, 2))
        for j, width in enumerate(self.widths):
            middle = j < len(self.widths) - 1
            scope = f"head_contrastive/nl_{j}/"
            kernel = self.get(f"{scope}dense/kernel", (hidden.shape[-1], width), 0.02)
            hidden = self.norm(hidden @ kernel, middle, f"{scope}batch_normalization", bias=middle)
        return features, hidden

    def get(self, name, shape, scale, mean=0.0):
        if name not in self.variables:
            values = mean + scale * self.random.uniform(-1, 1, shape)
            self.variables[name] = values.astype(np.float32)
        return torch.from_numpy(self.variables[name])

    def named(self, kind):
        self.counts[kind] += 1
        number = self.counts[kind] - 1
        return f"base_model/{kind}_{number}" if number else f"base_model/{kind}"

    def conv(self, x, filters, side, stride):
        """Convolve with TensorFlow's kernel [H, W, in, out], padded alike on both ends."""
        shape = (side, side, x.shape[-1], filters)
        scale = (6 / (side * side * x.shape[-1])) ** 0.5
        kernel = self.get(f"{self.named('conv2d')}/kernel", shape, scale).permute(3, 2, 0, 1)
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, stride=stride, padding=(side - 1) // 2)
        return y.permute(0, 2, 3, 1)

    def norm(self, x, relu=True, name=None, bias=True):
        name = name or self.named("batch_normalization")
        width = x.shape[-1:]
        gamma = self.get(f"{name}/gamma", width, 0.3, 0.8)
        beta = self.get(f"{name}/beta", width, 0.1) if bias else 0.0
        mean = self.get(f"{name}/moving_mean", width, 0.1)
        variance = self.get(f"{name}/moving_variance", width, 0.5, 1.0)
        x = (x - mean) / (variance + 1e-5).sqrt() * gamma + beta
        return x.relu() if relu else x

    def bottleneck(self, x, filters, stride, project):
        shortcut = x
        if project:
            shortcut = self.norm(self.conv(x, 4 * filters, 1, stride), relu=False)
        x = self.norm(self.conv(x, filters, 1, 1))
        x = self.norm(self.conv(x, filters, 3, stride))
        return (self.norm(self.conv(x, 4 * filters, 1, 1), relu=False) + shortcut).relu()


def same_max_pool(x):
    """Pool images [B, H, W, C] as TensorFlow's "SAME": an odd row of padding goes to the end."""
    pads = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[1:3]]
    sides = [part for pad in reversed(pads) for part in (pad // 2, pad - pad // 2)]
    x = F.pad(x.permute(0, 3, 1, 2), sides, value=-torch.inf)
    return F.max_pool2d(x, 3, 2).permute(0, 2, 3, 1)


class SamePool(torch.nn.Module):
    """`same_max_pool` for images [B, C, H, W]."""

    def forward(self, x):
        return same_max_pool(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
