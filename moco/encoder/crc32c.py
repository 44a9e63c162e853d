"""Compute CRC-32C, the checksum of TensorFlow's files."""

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, with reversed bits
_LANES = 8192  # most parts of the data whose checksums are computed together
_SHORTEST = 256  # bytes of a part


def _table() -> np.ndarray:
    """Return the checksum of each byte [256], without the inversions at start and end."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * np.uint32(_POLYNOMIAL)
    return table


_TABLE = _table()
_LIST = _TABLE.tolist()


def masked_crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`, masked as in TensorFlow's files."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`.

    Long data is cut into parts of equal length, whose checksums NumPy computes together. The
    checksum is linear, so the checksum of the data follows from those of the parts.
    """
    crc, start = 0xFFFFFFFF, 0
    parts = min(_LANES, len(data) // _SHORTEST)
    if parts > 1:
        length = len(data) // parts
        start = length * parts
        columns = np.frombuffer(data, np.uint8, start).reshape(parts, length).T.copy()
        found = np.zeros(parts, np.uint32)
        for column in columns:
            found = _TABLE[(found ^ column) & 0xFF] ^ (found >> 8)
        shift = _shift(length)
        for part in found.tolist():
            crc = _apply(shift, crc) ^ part
    for byte in data[start:]:
        crc = _LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _shift(count: int) -> list[int]:
    """Return the linear map that appends `count` zero bytes: its value for each of the 32 bits."""
    result = [1 << bit for bit in range(32)]
    power = [_LIST[(1 << bit) & 0xFF] ^ ((1 << bit) >> 8) for bit in range(32)]  # one zero byte
    while count:
        if count & 1:
            result = [_apply(power, value) for value in result]
        power = [_apply(power, value) for value in power]
        count >>= 1
    return result


def _apply(map_: list[int], value: int) -> int:
    """Return the value of a linear map."""
    result = 0
    for bit in range(32):
        if value >> bit & 1:
            result ^= map_[bit]
    return result
