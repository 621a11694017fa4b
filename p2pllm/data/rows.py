"""The rows that one trainer goes through: the parts of a run's rows, and its place in them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from p2pllm.coverage import Coverage, Span, covered, is_open, merged
from p2pllm.data.sharding import permutation, shard_of
from p2pllm.data.tokens import Row
from p2pllm.errors import ShardUnusable


class Parts(Protocol):
    """Disjoint parts (shards) of the rows of a run, each in a fixed order for each pass."""

    @property
    def count(self) -> int:
        """How many parts there are."""

    def size(self, shard: int) -> int:
        """Rows in one of them; 0 when that is not known."""

    def read(self, shard: int, position: int) -> Iterator[Row | None]:
        """Its rows from a position on, to the end of that pass. None: a row that is of no use."""


class ShardedRows:
    """Rows in memory, cut into shards by the run's seed."""

    def __init__(self, rows: Sequence[Row], shards: int, seed: int) -> None:
        self._rows, self.count, self._seed = rows, shards, seed
        self._numbers: dict[int, list[int]] = {}

    def size(self, shard: int) -> int:
        return len(self._of(shard))

    def read(self, shard: int, position: int) -> Iterator[Row]:
        """Every pass has an order of its own, the same for whoever reads it."""
        numbers = self._of(shard)
        done, start = divmod(position, len(numbers))
        order = permutation(len(numbers), "pass", self._seed, shard, done)
        return (self._rows[numbers[i]] for i in order[start:])

    def _of(self, shard: int) -> list[int]:
        if shard not in self._numbers:
            self._numbers[shard] = shard_of(len(self._rows), self.count, shard, self._seed)
        return self._numbers[shard]


class LeasedRows:
    """A source of rows for a learner, shard by shard, which keeps account of what it gave out.

    At the end of a shard's pass it asks `lease` for the next shard, which may be the same again.
    What it gave out is open until `settle` says what has become part of the adapter; rows that
    have not are given out again.
    """

    def __init__(self, parts: Parts, lease: Callable[[], int]) -> None:
        self._parts, self._lease = parts, lease
        self._coverage: Coverage = (0,) * parts.count
        self._ahead: dict[int, int] = {}  # positions that we have come to, beyond the coverage
        self._given: list[Span] = []  # since the last take()
        self._shard: int | None = None
        self._reader: Iterator[Row | None] = iter(())

    @property
    def rows(self) -> int:
        """Rows in the present shard."""
        return self._parts.size(self._shard or 0)

    @property
    def leases(self) -> tuple[int, ...]:
        """The present shard, and those of which we hold rows that are not in the adapter yet."""
        present = set() if self._shard is None else {self._shard}
        return tuple(sorted(present | self._ahead.keys()))

    @property
    def reached(self) -> Coverage:
        """How far each shard has been trained, our own open rows included."""
        return tuple(self._ahead.get(shard, at) for shard, at in enumerate(self._coverage))

    def next_batch(self, n: int) -> list[Row]:
        """The next n rows. Raises ShardUnusable when whole shards have no row of use."""
        batch: list[Row] = []
        barren = 0  # passes in a row that came to nothing
        while len(batch) < n:
            before = len(batch)
            if self._shard is not None:
                self._read_into(batch, n, self._shard)
            if len(batch) < n:
                barren = barren + 1 if len(batch) == before else 0
                if barren > 2 * self._parts.count:
                    raise ShardUnusable(shards=self._parts.count)
                self.go_to(self._lease())
        return batch

    def go_to(self, shard: int) -> None:
        """Read this shard on from where it has come to."""
        self._shard = shard
        self._reader = self._parts.read(shard, self.reached[shard])

    def take(self) -> tuple[Span, ...]:
        """What was given out since the last time this was asked."""
        given, self._given = merged(self._given), []
        return given

    def settle(self, coverage: Coverage, still_open: Iterable[Span] = ()) -> bool:
        """The adapter covers this now, and our work on the open spans may still come into it.

        Whether that is also true of what was given out since the last take(): when others have
        trained on those rows meanwhile, it is forgotten.
        """
        keeps = is_open(self._given, covered(coverage, still_open))
        if not keeps:
            self._given = []
        at = None if self._shard is None else self.reached[self._shard]
        self._coverage = coverage
        self._ahead = {s.shard: s.end for s in merged([*still_open, *self._given])}
        if self._shard is not None and self.reached[self._shard] != at:
            self.go_to(self._shard)
        return keeps

    def give_up(self) -> None:
        """Leave all shards to others, and forget what was given out."""
        self._ahead, self._given = {}, []
        self._shard, self._reader = None, iter(())

    def _read_into(self, batch: list[Row], n: int, shard: int) -> None:
        begin = end = self.reached[shard]
        for row in self._reader:
            end += 1
            if row is not None:
                batch.append(row)
            if len(batch) == n:
                break
        if end > begin:
            self._ahead[shard] = end
            self._given.append(Span(shard, begin, end))
