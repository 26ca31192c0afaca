"""LZ4's legacy frame, in which some distributions pack their kernels (LZ4 Frame Format, "Legacy").

A kernel takes some seconds, once: not worth a dependency.
"""

import struct

MAGIC = b"\x02\x21\x4c\x18"

_BLOCK_BYTES = 8 << 20
_MIN_MATCH = 4


def decompress(data: bytes) -> bytes:
    """Decompress a legacy frame; what follows its last whole block is left alone.

    Raises ValueError for damaged data, EOFError for data that ends too early.
    """
    out = bytearray()
    at = len(MAGIC)
    if at + 4 >= len(data):
        raise EOFError("it ends too early")
    # A block that is not full is the last one; the kernel's build appends the size of the whole.
    while at + 4 < len(data) and len(out) % _BLOCK_BYTES == 0:
        size = struct.unpack_from("<I", data, at)[0]
        at += 4
        if at + size > len(data):
            raise EOFError("it ends too early")
        out += _block(data[at : at + size])
        at += size
    return bytes(out)


def _block(data: bytes) -> bytes:
    """Decompress one block (LZ4 Block Format): literals and matches in turn, literals last."""
    out = bytearray()
    at = 0
    try:
        while True:
            token = data[at]
            literals, at = _length(data, at + 1, token >> 4)
            out += data[at : at + literals]
            at += literals
            if at >= len(data):
                break
            offset = data[at] | data[at + 1] << 8
            length, at = _length(data, at + 2, token & 15)
            _copy_match(out, offset, length + _MIN_MATCH)
    except IndexError as e:
        raise EOFError("a block ends too early") from e
    if at > len(data):
        raise EOFError("a block ends too early")
    return bytes(out)


def _length(data: bytes, at: int, nibble: int) -> tuple[int, int]:
    """Return a length and where the data goes on; a nibble of 15 is continued byte by byte."""
    total = nibble
    while nibble == 15:
        byte = data[at]
        at += 1
        total += byte
        if byte != 255:
            break
    return total, at


def _copy_match(out: bytearray, offset: int, length: int) -> None:
    start = len(out) - offset
    if offset == 0 or start < 0:
        raise ValueError("a match leads to before the block's begin")
    if offset >= length:
        out += out[start : start + length]
    else:  # the match overlaps what it makes: a repetition
        piece = bytes(out[start:])
        out += (piece * (length // offset + 1))[:length]
