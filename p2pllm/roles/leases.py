"""What a trainer trains on: parts of the run's rows that it leases from the swarm, or its own.

A lease is an entry in the trainer's signed progress record, so it ends with the record: the rows of
a trainer that died go back into the pool, from the place where the last committed round left them.
"""

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from p2pllm.config.paths import filled
from p2pllm.coverage import Coverage, Span, covered, is_open
from p2pllm.data.corpus import load_corpus, load_private
from p2pllm.data.rows import LeasedRows, Parts, ShardedRows
from p2pllm.data.streaming import StreamedRows
from p2pllm.data.tokens import Row
from p2pllm.errors import MoreTrainersThanShards
from p2pllm.events import ShardClaimed, Trouble
from p2pllm.roles.entry import Seat, path_values
from p2pllm.swarm.group import Group
from p2pllm.swarm.rounds import Anchor, SwarmView, coverage_of, free_shard, lost_shards
from p2pllm.training.source import ShardSource

_TRIES = 3  # of claiming a shard that a rival claims in the same moment


class Rows(Protocol):
    """A trainer's rows, and whose they are."""

    @property
    def coverage(self) -> Coverage:
        """Of the adapter that we hold."""

    @property
    def leases(self) -> tuple[int, ...]: ...

    def begin(self, view: SwarmView) -> bool:
        """Before a local epoch: have rows. False when others work on all there are."""

    def take(self) -> tuple[Span, ...]:
        """The rows of the local epoch that has just ended."""

    def is_lost(self, view: SwarmView) -> bool:
        """Whether another trainer has leased the same rows, and keeps them."""

    def commit(self, group: Group) -> bool:
        """The work of this group is in the adapter that we hold now. Whether what we have trained
        ahead may come into a later one: False when others have trained on the same rows."""

    def follow(self, anchor: Anchor, view: SwarmView, open_work: tuple[Span, ...]) -> bool:
        """We take this adapter from others. Whether our open work is not in it, and may come into a
        later one."""

    def give_up(self) -> None:
        """Forget what has been trained on since the last commit."""


def open_rows(
    seat: Seat, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row] | None, "OwnRows | SharedRows"]:
    """The held-out rows where they come along, and the rows to train on: the peer's own files where
    it has some, else the run's data set.

    Raises: any letter in `p2pllm.errors.data`.
    """
    run, values = seat.manifest.run, path_values(seat.manifest, seat.config)
    if files := [filled(path, values) for path in seat.config.data]:
        return None, OwnRows(load_private(files, run.data, tokenizer), run.seed)
    if run.data.streaming:
        return None, SharedRows(seat, StreamedRows(run.data, tokenizer, run.seed))
    corpus = load_corpus(run.data, tokenizer, run.seed)
    parts = ShardedRows(corpus.train, run.data.shards, run.seed)
    return corpus.held_out, SharedRows(seat, parts)


class UnsharedRows:
    """Rows that nobody else has, so there is nothing to agree on."""

    coverage: Coverage = ()
    leases: tuple[int, ...] = ()

    def begin(self, view: SwarmView) -> bool:
        return True

    def take(self) -> tuple[Span, ...]:
        return ()

    def is_lost(self, view: SwarmView) -> bool:
        return False

    def commit(self, group: Group) -> bool:
        return True

    def follow(self, anchor: Anchor, view: SwarmView, open_work: tuple[Span, ...]) -> bool:
        return True

    def give_up(self) -> None: ...


class OwnRows(UnsharedRows):
    """A peer's private rows."""

    def __init__(self, rows: list[Row], seed: int) -> None:
        self.source = ShardSource(rows, range(len(rows)), seed)


class SharedRows:
    """The run's rows, of which every trainer leases a part of its own."""

    def __init__(self, seat: Seat, parts: Parts) -> None:
        self._swarm, self._events, self._parts = seat.swarm, seat.events, parts
        self.source = LeasedRows(parts, self._lease_next)
        self.coverage: Coverage = (0,) * parts.count
        self._is_spare = False

    @property
    def leases(self) -> tuple[int, ...]:
        return self.source.leases

    def begin(self, view: SwarmView) -> bool:
        for _ in range(_TRIES):
            if self.leases:
                return True
            shard = free_shard(view, self.source.reached)
            if shard is None:
                break
            self._claim(shard)
            view = self._swarm.view()  # whoever claims it in the same moment is seen by now
            if self.is_lost(view):
                self.give_up()
        self._stand_by()
        return False

    def take(self) -> tuple[Span, ...]:
        return self.source.take()

    def is_lost(self, view: SwarmView) -> bool:
        return bool(lost_shards(self.leases, view))

    def commit(self, group: Group) -> bool:
        spans = [span for member in group.members for span in member.spans]
        return self._settle(covered(self.coverage, spans), ())

    def follow(self, anchor: Anchor, view: SwarmView, open_work: tuple[Span, ...]) -> bool:
        coverage = coverage_of(anchor, view, self._parts.count)
        still_open = is_open(open_work, coverage)
        self._settle(coverage, open_work if still_open else ())
        return still_open

    def give_up(self) -> None:
        self.source.give_up()

    def _settle(self, coverage: Coverage, open_work: tuple[Span, ...]) -> bool:
        self.coverage = coverage
        return self.source.settle(coverage, open_work)

    def _lease_next(self) -> int:
        """At the end of a shard, in the midst of a local epoch. What we hold is never taken by
        others, so there always is one."""
        shard = free_shard(self._swarm.view(), self.source.reached)
        if shard is None:
            shard = self.leases[0]
        self._claim(shard)
        return shard

    def _claim(self, shard: int) -> None:
        is_new = shard not in self.leases
        self.source.go_to(shard)
        self._is_spare = False
        self._swarm.announce(shards=self.leases)
        if is_new:
            rows = self._parts.size(shard)
            self._events.emit(ShardClaimed(shard=shard, shards=self._parts.count, rows=rows))

    def _stand_by(self) -> None:
        if not self._is_spare:
            self._is_spare = True
            self._swarm.announce(state="following", shards=())
            letter = MoreTrainersThanShards(shards=self._parts.count).letter
            self._events.emit(Trouble(what=letter))
