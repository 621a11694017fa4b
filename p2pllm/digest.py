"""The name of an adapter: a hash over its values, the same on every machine."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def digest_of(values: NDArray[np.float32]) -> str:
    """sha256 (hex) over the little-endian float32 bytes of a flat adapter."""
    return hashlib.sha256(values.astype("<f4", copy=False).data).hexdigest()
