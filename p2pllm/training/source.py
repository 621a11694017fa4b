"""Where a learner's rows come from."""

from collections.abc import Sequence
from typing import Protocol

from p2pllm.data.sharding import Sampler
from p2pllm.data.tokens import Row


class Source(Protocol):
    """Rows to train on, without end."""

    @property
    def rows(self) -> int:
        """How many different rows there are: the length of one pass."""

    def next_batch(self, n: int) -> list[Row]:
        """The next `n` rows, pass after pass."""


class ShardSource:
    """The rows of one shard at a time, each once per pass, each pass in another order."""

    def __init__(self, rows: Sequence[Row], shard: Sequence[int], seed: int) -> None:
        """`shard`: which of `rows`, by number."""
        self._rows = rows
        self._sampler = Sampler(shard, batch_size=1, seed=seed)

    @property
    def rows(self) -> int:
        return len(self._sampler)

    @property
    def passes(self) -> int:
        """How often all rows of the present shard have been used."""
        return self._sampler.pass_number

    def next_batch(self, n: int) -> list[Row]:
        return [self._rows[number] for _ in range(n) for number in next(self._sampler)]

    def switch(self, shard: Sequence[int]) -> None:
        """Go on with another shard of the same rows."""
        self._sampler.switch(shard)
