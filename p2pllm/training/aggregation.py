"""How far the average of adapters is from the average of what they do to the model.

`aggregation_error` computes it where all adapters are at hand. In a swarm nobody has them all:
there each member makes a `sketch`, whose size does not depend on the model's, and whoever has the
members' sketches knows the `estimated_error`.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from p2pllm.model.adapter import Adapter, Values
from p2pllm.model.draws import signs

_SIDE = 16  # random projections on either side of a product
SKETCH_SIZE = 2 * _SIDE**2  # values
_OUT_OF_PROPORTION = 1000.0  # times the median norm: nobody can be that far from the others


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


@dataclass(frozen=True)
class Change:
    """What a round changes, as one of its members sees it; each (size,)."""

    before: Values  # the adapter that all had
    own: Values  # what this member added to it, as it counted
    average: Values  # what the round made of all that was added


def sketch(adapter: Adapter, change: Change, seed: int, round: int) -> Values:
    """One member's part in the aggregation error of a round, (SKETCH_SIZE,) float32.

    seed, round: members whose sketches will be added up must have the same.

    The first half is S BA T, summed over the modules, where S (16, out) and T (in, 16) are of
    random signs and variance 1/16, others for each module: a linear map, hence the mean
    of the members' sketches is the sketch of their mean, and E||sketch||^2 = ||BA||^2 (random
    projections: Achlioptas 2003, "Database-friendly random projections"; Woodruff 2014, arXiv
    1411.4357). The second half is the same of (B - mean B)(A - mean A), whose mean over the members
    is mean(BA) - mean(B)mean(A): so nothing cancels, and what rounding, clipping or trimming did to
    the average enters only by the product of its errors in B and in A. An outer optimizer comes
    later and has no part in it. Cost: two passes over the adapter for each of the 16 rows.
    """
    whole = wrong = np.zeros((_SIDE, _SIDE), np.float32)
    old, own = adapter.tensors(change.before), adapter.tensors(change.own)
    average = adapter.tensors(change.average)
    with np.errstate(over="ignore", invalid="ignore"):  # a reader leaves out what is not finite
        for of_a, of_b in _pairs(old):
            b, a = (_matrix(old[name] + own[name]) for name in (of_b, of_a))
            left = signs(seed, f"sketch {round} {of_b}", (_SIDE, b.shape[0]), _SIDE**-0.5)
            right = signs(seed, f"sketch {round} {of_a}", (_SIDE, a.shape[1]), _SIDE**-0.5).T
            whole = whole + (left @ b) @ (a @ right)
            b, a = (_matrix(own[name] - average[name]) for name in (of_b, of_a))
            wrong = wrong + (left @ b) @ (a @ right)
    return np.concatenate([whole.reshape(-1), wrong.reshape(-1)])


def estimated_error(sketches: Sequence[Values], weights: Sequence[float]) -> float:
    """What `aggregation_error` is, as estimated from the members' finite sketches.

    Each of the two norms has a relative standard error of about
    sqrt(1/512 + 1/(16 M)) for M modules of like norm, by random projections of products that are
    as bad as can be (of rank 1): 5 % for 60 modules, 25 % for one; their quotient sqrt(2) times
    that. An error that is 0, as where all share A, is estimated as 0. With the sketches of some
    members only it is their part: how far they are from the average of all.
    """
    mean = np.average(np.asarray(sketches, np.float64), axis=0, weights=weights)
    whole, wrong = (float(np.linalg.norm(half)) for half in np.split(mean, 2))
    return wrong / whole if whole else 0.0


def credible(sketches: Mapping[str, Values]) -> dict[str, Values]:
    """Those, by member, that are finite and not out of all proportion. Who lies within these bounds
    falsifies the number that people see, and nothing else."""
    finite = {
        member: values
        for member, values in sketches.items()
        if values.shape == (SKETCH_SIZE,) and np.isfinite(values).all()
    }
    for half in (slice(0, SKETCH_SIZE // 2), slice(SKETCH_SIZE // 2, SKETCH_SIZE)):
        norms = {m: float(np.linalg.norm(v[half].astype(np.float64))) for m, v in finite.items()}
        most = _OUT_OF_PROPORTION * statistics.median_low(norms.values()) if norms else 0.0
        finite = {member: v for member, v in finite.items() if norms[member] <= most}
    return finite


def _modules(
    peers: Sequence[Mapping[str, Values]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each module everybody's B, (peers, out, r), and A, (peers, r, in), float64."""
    for of_a, of_b in _pairs(peers[0]):
        b, a = (np.stack([p[n] for p in peers]).astype(np.float64) for n in (of_b, of_a))
        yield b, a


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of each module the names of A and B."""
    return [(n, n.replace(".lora_A.", ".lora_B.")) for n in names if ".lora_A." in n]


def _matrix(tensor: Values) -> Values:
    """A convolution's A is (r, in, height, width)."""
    return tensor.reshape(len(tensor), -1)


def _mean(tensors: np.ndarray, shares: np.ndarray) -> np.ndarray:
    mean: np.ndarray = np.tensordot(shares, tensors, axes=1)
    return mean


def _square_of_mean(b: np.ndarray, a: np.ndarray, shares: np.ndarray) -> float:
    """||sum of share * BA||^2: the sum is one product of the peers' B's side by side with their A's
    one below the other."""
    left = np.concatenate(list(b * shares[:, None, None]), axis=1)
    right = np.concatenate(list(a), axis=0)
    return float(np.sum((left.T @ left) * (right @ right.T)))
