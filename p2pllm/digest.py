"""The name of an adapter: a hash over its values, the same on every machine."""

import hashlib

import numpy as np
from numpy.typing import NDArray

LEAF = 16_384  # values, 64 KiB, that are hashed together and can be checked by themselves
LEAF_HASH = 32  # bytes


def leaf_of(values: NDArray[np.float32]) -> bytes:
    """sha256 over the little-endian bytes of at most LEAF values."""
    return hashlib.sha256(values.astype("<f4", copy=False).data).digest()


def leaves_of(values: NDArray[np.float32]) -> bytes:
    """The hashes of all leaves of a flat adapter, one behind the other."""
    return b"".join(leaf_of(values[at : at + LEAF]) for at in range(0, len(values), LEAF))


def root_of(leaves: bytes) -> str:
    """sha256 (hex) over the hashes of the leaves."""
    return hashlib.sha256(leaves).hexdigest()


def digest_of(values: NDArray[np.float32]) -> str:
    """The digest (hex) of a flat float32 adapter: a hash list, as in BitTorrent, so that one who
    knows it can take each leaf from whoever has it."""
    return root_of(leaves_of(values))
