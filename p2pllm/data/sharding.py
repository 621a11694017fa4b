"""Which rows a peer trains on, and in which order. Pure: knows row numbers, not rows.

Every peer computes the same shards from the run's seed, so claiming a shard is all that peers have
to agree on over the network.
"""

import random
from collections.abc import Iterator, Sequence

from p2pllm.errors import HeldOutTooLarge


def permutation(count: int, *key: object) -> list[int]:
    """A shuffle of range(count) that is the same for this key on every machine.

    Fisher and Yates with `Random.random` only: the one generator method whose sequence Python
    promises to keep across versions (`shuffle` and numpy's generators make no such promise).
    """
    uniform = random.Random(":".join(map(str, key))).random
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(uniform() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def shard_of(rows: int, shards: int, shard: int, seed: int) -> list[int]:
    """The row numbers of one of `shards` disjoint parts that together are range(rows).

    Sizes differ by at most one, so with fewer rows than shards some shards are empty.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} is not one of 0..{shards - 1}")
    return permutation(rows, "shards", seed)[shard::shards]


def hold_out(
    count: int, size: int | float, seed: int, groups: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out: `size` rows, or that fraction of all.

    With groups, whole groups are drawn until they have enough rows; of those exactly `size` are
    held out and the others are left out altogether, so that no group is on both sides.

    Raises: HeldOutTooLarge.
    """
    wanted = max(1, round(size * count)) if isinstance(size, float) else size
    drawn = _drawn_rows(wanted, seed, groups) if groups is not None else range(count)
    held = [drawn[i] for i in permutation(len(drawn), "held out", seed)][:wanted]
    apart = set(drawn) if groups is not None else set(held)
    training = [i for i in range(count) if i not in apart]
    if len(held) < wanted or not training:
        unit = "rows in whole groups" if groups is not None else "rows"
        raise HeldOutTooLarge(wanted=wanted, rows=count, unit=unit)
    return training, held


def _drawn_rows(wanted: int, seed: int, groups: Sequence[str]) -> list[int]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names = sorted(members)
    drawn: list[int] = []
    for i in permutation(len(names), "groups", seed):
        if len(drawn) >= wanted:
            break
        drawn += members[names[i]]
    return drawn


class Sampler(Iterator[list[int]]):
    """Endless batches of row numbers, each row once per pass, each pass in a fresh order.

    The position outlives local epochs, so a short local epoch still covers the whole shard in the
    end. A batch that reaches the end of a pass is filled from the next one.
    """

    def __init__(self, rows: Sequence[int], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError("a batch has at least one row")
        self._batch_size = batch_size
        self._seed = seed
        self._shuffles = 0  # counts on through switches: a shard claimed again has a new order
        self.switch(rows)

    def switch(self, rows: Sequence[int]) -> None:
        """Go on with another shard, from the start of its pass 0."""
        if not rows:
            raise ValueError("a sampler needs at least one row")
        self._rows = tuple(rows)
        self._pass = 0
        self._shuffle()

    def __len__(self) -> int:
        """Rows in one pass."""
        return len(self._rows)

    @property
    def pass_number(self) -> int:
        """How many passes over the present shard are complete."""
        return self._pass

    def __next__(self) -> list[int]:
        batch: list[int] = []
        while len(batch) < self._batch_size:
            taken = self._order[self._position :][: self._batch_size - len(batch)]
            batch += taken
            self._position += len(taken)
            if self._position == len(self._order):
                self._pass += 1
                self._shuffle()
        return batch

    def _shuffle(self) -> None:
        order = permutation(len(self._rows), "pass", self._seed, self._shuffles)
        self._order = [self._rows[i] for i in order]
        self._shuffles += 1
        self._position = 0
