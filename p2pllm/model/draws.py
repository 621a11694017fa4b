"""Random numbers that are bit-identical on every machine.

torch and NumPy promise no equal samples across versions and processors, only NumPy's raw bit
streams are promised. So numbers are made here from raw bits, with steps that are exact in float32.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> npt.NDArray[np.float32]:
    """An array of `shape`, uniform in [-bound, bound); another `name` gives other numbers."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(math.prod(shape))
    # The top 24 bits fit a float32 exactly; so does their double minus one. One rounding remains.
    fractions = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    draws: npt.NDArray[np.float32] = (fractions * np.float32(2) - np.float32(1)) * np.float32(bound)
    return draws.reshape(shape)
