"""Which rows have been trained on, in rounds that were committed. Pure: knows numbers, not rows.

The rows of a shard have a fixed order in each pass, and their positions count on from pass to pass:
in a shard of 10 rows, position 23 is the fourth row of the third pass. So one number for each shard
says how far it has been trained. These numbers, the coverage, belong to an adapter: they say what
it was trained on, and whoever takes the adapter from others takes its coverage with it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Coverage = tuple[int, ...]  # for each shard, the position up to which it has been trained


class Span(NamedTuple):
    """Rows of one shard that a trainer has trained on: positions `begin` up to `end`, excluded."""

    shard: int
    begin: int
    end: int


def covered(coverage: Sequence[int], spans: Iterable[Span]) -> Coverage:
    """The coverage once the work on these spans is part of the adapter."""
    reached = list(coverage)
    for span in spans:
        if span.shard < len(reached):  # a stranger may say anything
            reached[span.shard] = max(reached[span.shard], span.end)
    return tuple(reached)


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """One span for each shard, over stretches of it that follow upon one another."""
    whole: dict[int, Span] = {}
    for span in spans:
        known = whole.get(span.shard, span)
        whole[span.shard] = Span(span.shard, min(known.begin, span.begin), max(known.end, span.end))
    return tuple(whole[shard] for shard in sorted(whole))


def is_open(spans: Iterable[Span], coverage: Sequence[int]) -> bool:
    """Whether none of these rows is part of the adapter yet, nor was trained by someone else."""
    return all(coverage[span.shard] == span.begin for span in merged(spans))


def shared_shards(ours: Iterable[Span], theirs: Iterable[Span]) -> set[int]:
    """The shards that both have trained on: one trainer at a time may do that."""
    return {span.shard for span in ours} & {span.shard for span in theirs}
