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
    bits = _raw(seed, name, math.prod(shape))
    # The top 24 bits fit a float32 exactly; so does their double minus one. One rounding remains.
    fractions = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    draws: npt.NDArray[np.float32] = (fractions * np.float32(2) - np.float32(1)) * np.float32(bound)
    return draws.reshape(shape)


def signs(seed: int, name: str, shape: tuple[int, ...], size: float) -> npt.NDArray[np.float32]:
    """An array of `shape` of `size` and -`size`, each as likely: a bit for each, hence much cheaper
    than `uniform`."""
    count = math.prod(shape)
    bits = np.unpackbits(_raw(seed, name, -(-count // 64)).astype("<u8").view(np.uint8))[:count]
    return np.array([-size, size], np.float32)[bits].reshape(shape)


def _raw(seed: int, name: str, count: int) -> npt.NDArray[np.uint64]:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    bits: npt.NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(
        count
    )
    return bits
