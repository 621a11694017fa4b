"""What a peer should do next, decided from what it knows: no clock, no network, no tensors.

The swarm has no counter and no leader of its own. Each peer says in a signed record which round it
is in and which adapter it holds; everything here is derived from these records.
"""

import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from p2pllm.config.run import Deadline
from p2pllm.coverage import Coverage
from p2pllm.swarm.network import PeerId
from p2pllm.swarm.records import Progress, Result

_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")  # of an Ed25519 key, as all of ours


@dataclass(frozen=True, order=True)
class Anchor:
    """The adapter that all peers hold when a round starts; `digest` is its sha256 (hex)."""

    round: int
    digest: str


@dataclass(frozen=True)
class SwarmView:
    """The live records of one run, this peer's own left out, and the aggregator's results."""

    me: PeerId
    peers: tuple[Progress, ...] = ()
    aggregator: PeerId | None = None  # as the owner designated it
    results: tuple[Result, ...] = ()
    names: dict[PeerId, str] = field(default_factory=dict)  # of those, too, that are gone

    @property
    def trainers(self) -> tuple[Progress, ...]:
        """Trainers that take part; those that are leaving do not."""
        return tuple(p for p in self.peers if p.role == "trainer" and p.state != "leaving")

    def name(self, peer: PeerId) -> str:
        """A peer's name for people; the end of its id when it is not known."""
        return next(
            (p.name for p in self.peers if p.peer == peer), self.names.get(peer, f"…{peer[-6:]}")
        )

    def with_names(self, text: str) -> str:
        """The same text for people, with names where it has peer ids."""
        return _PEER_ID.sub(lambda found: self.name(found[0]), text)


@dataclass(frozen=True)
class Standing:
    """Where this peer is."""

    anchor: Anchor | None  # none: it has not taken part yet
    has_trained: bool = False  # there is local work on this anchor to average


@dataclass(frozen=True)
class Train:
    """Do one local epoch on the anchor."""


@dataclass(frozen=True)
class Average:
    """Offer the local work to the all-reduce."""


@dataclass(frozen=True)
class CatchUp:
    """Take this anchor from one of the donors."""

    anchor: Anchor
    donors: tuple[PeerId, ...]


@dataclass(frozen=True)
class Start:
    """Nobody has an adapter yet: begin with the run's initial one."""


@dataclass(frozen=True)
class Finish:
    """All rounds are committed."""


Action = Train | Average | CatchUp | Start | Finish


def next_action(mine: Standing, view: SwarmView, rounds: int) -> Action:
    """The next action of a trainer in a run of this many rounds.

    Catching up comes before everything else, finishing included: otherwise a peer that missed the
    last round would leave with a stale adapter.
    """
    agreed = agreed_anchor(mine.anchor, view)
    if agreed is not None and agreed != mine.anchor:
        return CatchUp(agreed, donors_of(agreed, view))
    if mine.anchor is None:
        if view.results and view.results[-1].round > 0:
            # The run has come further than its start, whoever is there just now: wait for a donor
            # rather than begin it a second time.
            last = Anchor(view.results[-1].round, view.results[-1].digest)
            return CatchUp(last, donors_of(last, view))
        return Start()
    if mine.anchor.round >= rounds:
        return Finish()
    return Average() if mine.has_trained else Train()


def agreed_anchor(mine: Anchor | None, view: SwarmView) -> Anchor | None:
    """The adapter to go on from: the latest round, and in it the digest that most trainers hold.

    One trainer must not drag the others along, whether it lies, or was cut off and went on alone:
    a round more than one ahead of the median of the trainers does not count, and the one after the
    median only when two of them hold it, unless the designated aggregator holds it too. Who is too
    far ahead comes back: all decide alike from the same records.
    """
    held = [Anchor(p.round, p.digest) for p in view.trainers if p.digest]
    held += [mine] if mine is not None else []
    kept = _kept_by_aggregator(view)
    if not held:
        return kept
    votes, median = Counter(held), statistics.median_high(a.round for a in held)
    needed = 2 if len(held) > 2 else 1
    candidates = [a for a in held if a.round <= median + (votes[a] >= needed or a == mine)]
    candidates += [kept] if kept is not None else []
    latest = max(a.round for a in candidates)
    votes = Counter(a for a in candidates if a.round == latest)
    # A tie is broken by the digests, which everybody compares alike.
    return max(votes, key=lambda a: (votes[a], a.digest))


def donors_of(anchor: Anchor, view: SwarmView) -> tuple[PeerId, ...]:
    """Who can hand over this adapter, trainers first, in an order that differs from peer to peer
    so that not everybody asks the same one."""
    holders = [
        p
        for p in view.peers
        if p.dialable and p.role != "bootstrap" and Anchor(p.round, p.digest) == anchor
    ]
    return tuple(
        p.peer for p in sorted(holders, key=lambda p: (p.role != "trainer", _rank(p.peer, view.me)))
    )


def expected_in(anchor: Anchor, view: SwarmView) -> frozenset[PeerId]:
    """The trainers whose work on this anchor is worth waiting for.

    In round 0 those that are still loading count too, so that a run whose peers are started
    together begins together.
    """
    return frozenset(
        p.peer
        for p in view.trainers
        if (p.state in ("training", "ready") and Anchor(p.round, p.digest) == anchor)
        or (p.state == "joining" and anchor.round == 0)
    )


def leader_of(
    anchor: Anchor, view: SwarmView, suspects: Iterable[PeerId], dialable: bool
) -> PeerId:
    """Who gathers the group of this round: the same for everyone with the same view.

    Never one of the suspects (peers that did not answer us). This peer itself is a candidate when
    others can dial it, and the last resort in any case.
    """
    ready = {
        p.peer
        for p in view.trainers
        if p.dialable and Anchor(p.round, p.digest) == anchor and p.state in ("training", "ready")
    }
    if dialable:
        ready.add(view.me)
    return min(ready - set(suspects), key=_rank, default=view.me)


def precedes(one: PeerId, other: PeerId) -> bool:
    """Whether `one` leads when both could."""
    return _rank(one) < _rank(other)


def learned_deadline(history: Sequence[float], rules: Deadline) -> float:
    """How long to wait for missing peers after the first is ready, in seconds.

    history: waits of past rounds, oldest first. Median + mads * MAD, within floor and ceiling.
    """
    if not history:
        return rules.ceiling
    recent = list(history)[-20:]
    median = statistics.median(recent)
    spread = statistics.median(abs(wait - median) for wait in recent)
    return min(max(median + rules.mads * spread, rules.floor), rules.ceiling)


def taken_shards(view: SwarmView) -> frozenset[int]:
    """The shards that other trainers have leased; a lease ends with the record that holds it."""
    return frozenset(shard for p in view.trainers for shard in p.shards)


def free_shard(view: SwarmView, reached: Sequence[int]) -> int | None:
    """The shard to lease: of those that no other trainer works on the one that was trained least,
    and among equals the first in an order of this peer's own. None: the others have them all.

    reached: for each shard, the position up to which it has been trained.
    """
    taken = taken_shards(view)
    free = [shard for shard in range(len(reached)) if shard not in taken]
    return min(free, key=lambda shard: (reached[shard], _rank(str(shard), view.me)), default=None)


def lost_shards(leased: Iterable[int], view: SwarmView) -> set[int]:
    """Of our leases those that another trainer has, too, and keeps: records can cross."""
    rivals = [p for p in view.trainers if precedes(p.peer, view.me)]
    return set(leased) & {shard for p in rivals for shard in p.shards}


def coverage_of(anchor: Anchor, view: SwarmView, shards: int) -> Coverage:
    """How far each shard has been trained for this adapter, as most of its holders say."""
    said = Counter(
        p.coverage
        for p in view.peers
        if Anchor(p.round, p.digest) == anchor and len(p.coverage) == shards
    )
    return max(said, key=lambda c: (said[c], c)) if said else (0,) * shards


def _kept_by_aggregator(view: SwarmView) -> Anchor | None:
    for p in view.peers:
        if p.peer == view.aggregator and p.role == "aggregator" and p.digest:
            return Anchor(p.round, p.digest)
    return None


def _rank(peer: str, salt: str = "") -> bytes:
    return hashlib.sha256(f"{salt}\0{peer}".encode()).digest()
