"""How far the average of adapters is from the average of what they do to the model."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from p2pllm.model.adapter import Adapter, Values


def aggregation_error(adapter: Adapter, peers: Sequence[Values], weights: Sequence[float]) -> float:
    """||mean(BA) - mean(B)mean(A)|| / ||mean(BA)||, Frobenius norms over all modules together.

    peers: the local adapters of one round, each (size,). 0 where nothing was learned yet. No
    product BA is formed: ||BA||^2 = trace(B'B AA'), and these are small.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    wrong = whole = 0.0
    for b, a in _modules([adapter.tensors(values) for values in peers]):
        whole += _square_of_mean(b, a, shares)
        # The difference is the covariance of B and A; written so, nothing cancels.
        wrong += _square_of_mean(b - _mean(b, shares), a - _mean(a, shares), shares)
    return float(np.sqrt(wrong / whole)) if whole else 0.0


def _modules(
    peers: Sequence[Mapping[str, Values]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each module everybody's B, (peers, out, r), and A, (peers, r, in), float64."""
    for name in peers[0]:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            b, a = (np.stack([p[n] for p in peers]).astype(np.float64) for n in (other, name))
            yield b, a


def _mean(tensors: np.ndarray, shares: np.ndarray) -> np.ndarray:
    mean: np.ndarray = np.tensordot(shares, tensors, axes=1)
    return mean


def _square_of_mean(b: np.ndarray, a: np.ndarray, shares: np.ndarray) -> float:
    """||sum of share * BA||^2: the sum is one product of the peers' B's side by side with their A's
    one below the other."""
    left = np.concatenate(list(b * shares[:, None, None]), axis=1)
    right = np.concatenate(list(a), axis=0)
    return float(np.sum((left.T @ left) * (right @ right.T)))
