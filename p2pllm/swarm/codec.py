"""How a run of float32 values travels: as it is, as float16 with one scale for each chunk, or as
int8 with one scale for each block (the sender keeps the rounding error for its next round).

Sizes are exact functions of the number of values, so a receiver knows before it allocates anything
how many bytes may come. A decoder accepts any bytes of the right length; what it yields may be
infinite or NaN, and the reducer checks for that.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Compression = Literal["none", "fp16", "int8"]

CHUNK = 65_536  # values in one frame: 128 KiB as fp16
_BLOCK = 256  # values that share a scale in int8
_SCALE = 4  # bytes of a scale
# Times this, a float32 has float16's exponent: shifted by 13 bits, it is that float16.
_TO_HALF, _FROM_HALF = np.float32(2.0**-112), np.float32(2.0**112)
_HALF_BITS = np.int32(-0x7000_2000)  # 0x8fffe000: the sign, and a float16's other bits


def encoded_size(values: int, compression: Compression) -> int:
    """Bytes of an encoded chunk of this many values."""
    match compression:
        case "none":
            return values * 4
        case "fp16":
            return _SCALE + values * 2
        case "int8":
            return _SCALE * -(-values // _BLOCK) + values


def encode(values: Floats, compression: Compression) -> bytes:
    """values: (n,) float32, little-endian on the wire."""
    if compression == "none":
        return bytes(values.astype("<f4", copy=False).data)
    if compression == "int8":
        return _encode_int8(values)
    # Scaled to the largest magnitude: deltas of 1e-6 would otherwise fall among fp16's subnormals.
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.float32(np.max(np.abs(values), initial=0.0))
        scaled = values / scale if scale > 0 else np.zeros_like(values)
        return bytes(scale.astype("<f4").data) + bytes(_to_half(scaled).data)


def decode(frame: bytes | memoryview, compression: Compression) -> Floats:
    """(n,) float32. Raises ValueError when the frame is no whole number of values."""
    if compression == "none":
        return np.frombuffer(frame, "<f4").astype(np.float32, copy=False)
    if compression == "int8":
        return _decode_int8(frame)
    scale = np.frombuffer(frame, "<f4", count=1)[0]
    with np.errstate(invalid="ignore", over="ignore"):
        values = _from_half(np.frombuffer(frame, "<i2", offset=_SCALE))
        values *= scale
        return values


def chunks(size: int) -> list[slice]:
    """The chunks of a part of `size` values."""
    return [slice(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]


# numpy converts halves one by one, in software: 180 and 140 us for a chunk. These take 60 and 20.


def _to_half(values: Floats) -> NDArray[np.uint16]:
    """(n,) the float16 nearest to each value in -1..1, as bits, ties to even.

    Below 2^-14 it may be the other neighbour of a value that is all but in the middle. What is
    not a number comes out as some number: the scale tells it.
    """
    bits = (values * _TO_HALF).view(np.uint32)
    rounded = bits >> 13
    rounded &= 1
    rounded += 0xFFF
    rounded += bits
    rounded >>= 13
    halves = rounded.astype("<u2")
    halves &= 0x7FFF
    bits >>= 16
    bits &= 0x8000
    halves |= bits.astype("<u2")
    return halves


def _from_half(halves: NDArray[np.int16]) -> Floats:
    """(n,) float32 of finite float16s, given as bits. Others come out as large numbers."""
    bits = halves.astype(np.int32)
    bits <<= 13
    bits &= _HALF_BITS
    values: Floats = bits.view(np.float32)
    values *= _FROM_HALF
    return values


def _encode_int8(values: Floats) -> bytes:
    """All scales, then all values as multiples of their block's scale."""
    blocks = np.zeros((-(-values.size // _BLOCK), _BLOCK), np.float32)
    blocks.reshape(-1)[: values.size] = values
    scales = np.max(np.abs(blocks), axis=1, keepdims=True, initial=0.0) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        whole = np.rint(blocks / np.where(scales > 0, scales, 1)).clip(-127, 127)
        # What is not finite cannot be told in eight bits: its scale tells it.
        steps = np.nan_to_num(whole).astype(np.int8)
    return bytes(scales.astype("<f4").data) + bytes(steps.reshape(-1)[: values.size].data)


def _decode_int8(frame: bytes | memoryview) -> Floats:
    # n values take n + 4 * ceil(n / 256) bytes; invert that.
    full, rest = divmod(len(frame), _BLOCK + _SCALE)
    size = full * _BLOCK + max(rest - _SCALE, 0)
    count = -(-size // _BLOCK)
    scales = np.frombuffer(frame, "<f4", count=count)
    steps = np.frombuffer(frame, np.int8, offset=_SCALE * count).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        values: Floats = steps * np.repeat(scales, _BLOCK)[:size]
    return values
