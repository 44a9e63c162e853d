"""Read image files, and write those that Pillow cannot write."""

import struct
import zlib

from moco.data.decoding import decode, read_bytes


def decode_file(path):
    """Return the image in the file `path`, uint8 [3, H, W]."""
    return decode(read_bytes(path), path)


def png16(pixels, colour_type):
    """Return uint16 pixels [H, W, channels] as a PNG with 16 bits per channel.

    `colour_type` is that of PNG: 0 for grey, 2 for RGB, 4 for grey with alpha, 6 for RGB with it.
    """

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
