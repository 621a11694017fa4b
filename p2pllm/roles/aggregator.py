"""The aggregator rank: never trains; follows each committed round, evaluates, writes checkpoints.

Losing it costs the trainers nothing. It goes on from its last checkpoint, and when all trainers
are gone, new ones go on from it.
"""

import time

from p2pllm.coverage import Coverage
from p2pllm.data.corpus import load_held_out
from p2pllm.digest import digest_of
from p2pllm.errors import NotDesignated, P2PLLMError
from p2pllm.events import CaughtUp, CheckpointSaved, Evaluated, Finished, Trouble
from p2pllm.model.adapter import Adapter, Values, attach_adapter
from p2pllm.roles.entry import (
    Seat,
    linger,
    load_base_model,
    working,
)
from p2pllm.roles.sketches import Sketches
from p2pllm.swarm.node import Missed
from p2pllm.swarm.records import Result, Results
from p2pllm.swarm.rounds import Anchor, CatchUp, SwarmView, agreed_anchor, coverage_of, donors_of
from p2pllm.training.checkpoint import Checkpoints
from p2pllm.training.evaluation import Evaluator, is_due
from p2pllm.training.outer import OuterOptimizer

_PAUSE = 0.5  # seconds between two looks at the swarm
_PUBLISHED = 200  # results in the record, the newest; all of them are in the checkpoints


class Aggregator:
    """One aggregator in one run. `run` is the whole life of it."""

    def __init__(self, seat: Seat, adapter: Adapter, evaluator: Evaluator | None) -> None:
        """evaluator: none, where this peer was asked to keep checkpoints only."""
        self._seat, self._swarm, self._run = seat, seat.swarm, seat.manifest.run
        self._adapter, self._evaluator = adapter, evaluator
        kept = self._run.checkpoint
        self._checkpoints = Checkpoints(seat.folder, kept.keep, spared=kept.at)
        self._outer = OuterOptimizer(self._run.averaging, adapter.size)
        self._results: dict[int, Result] = {}
        self._is_published = True
        self._saved: Anchor | None = None
        self._sketches = Sketches(seat.events)
        self._resume()

    def run(self) -> None:
        """Returns when the run is over, or when the peer was asked to stop."""
        self._swarm.announce(state="following")
        while not self._seat.stop.is_set():
            view = self._swarm.view()
            self._check_designation(view)
            agreed = agreed_anchor(self._anchor, view)
            is_there = self._follow(agreed or self._anchor, view)
            if not is_there or not self._sketches.are_complete(self._anchor, view):
                self._seat.stop.wait(_PAUSE)
                continue
            self._evaluate_if_due()
            self._publish_if_designated(view)
            self._checkpoint_if_due(view)
            if self._anchor.round >= self._run.rounds:
                self._finish()
                return
            self._seat.stop.wait(_PAUSE)

    # ---- its parts

    def _resume(self) -> None:
        """Start from the last whole checkpoint, or from the base model."""
        saved = self._checkpoints.newest(self._seat.manifest.fingerprint)
        if saved is None:
            state, round = self._outer.start(self._adapter.initial_values(self._run.seed)), 0
            coverage: Coverage = (0,) * self._run.data.shards
        else:
            self._is_published = False
            state, round = saved.values, saved.round
            coverage = tuple(saved.facts.get("coverage", ()))
            self._saved = Anchor(round, digest_of(state))
            for fields in saved.facts.get("results", []):
                result = Result.model_validate(fields)
                self._results[result.round] = result
        self._hold(round, state, coverage)

    def _hold(self, round: int, state: Values, coverage: Coverage) -> None:
        self._anchor, self._state = Anchor(round, digest_of(state)), state
        self._coverage = coverage
        self._swarm.hold(self._anchor, state, self._adapter.size, coverage=coverage)

    def _check_designation(self, view: SwarmView) -> None:
        if view.aggregator not in (None, self._swarm.me):
            raise NotDesignated(aggregator=view.aggregator, me=self._swarm.me)

    def _follow(self, agreed: Anchor, view: SwarmView) -> bool:
        """Take over the agreed adapter. False when nobody could deliver it just now."""
        if agreed == self._anchor:
            return True
        began = time.monotonic()
        action = CatchUp(agreed, donors_of(agreed, view))
        outcome = self._swarm.catch_up(action, self._outer.state_size)
        match outcome:
            case Missed():
                what = f"following to round {action.anchor.round} failed: {outcome.reason}"
                self._seat.events.emit(Trouble(what=view.with_names(what)))
                return False
            case (state, donors):
                coverage = coverage_of(agreed, view, self._run.data.shards)
                self._hold(agreed.round, state, coverage)
                self._seat.events.emit(
                    CaughtUp(
                        round=action.anchor.round,
                        digest=action.anchor.digest,
                        donors=[view.name(donor) for donor in donors],
                        seconds=time.monotonic() - began,
                    )
                )
        return True

    def _evaluate_if_due(self) -> None:
        round = self._anchor.round
        known = self._results.get(round)
        if known is not None and known.digest == self._anchor.digest:
            return
        if self._evaluator is None or not is_due(round, self._run.evaluation, self._run.rounds):
            return
        working(self._seat, f"evaluating round {round}")
        measured = self._evaluator.evaluate(self._outer.values(self._state))
        result = Result(
            round=round, digest=self._anchor.digest, loss=measured.loss, rows=measured.rows
        )
        self._results[round] = result
        self._is_published = False
        self._seat.events.emit(
            Evaluated(
                round=round,
                digest=result.digest,
                loss=result.loss,
                rows=result.rows,
                seconds=measured.seconds,
            )
        )

    def _publish_if_designated(self, view: SwarmView) -> None:
        """Before the owner has named us, our word counts for nobody."""
        if self._is_published or view.aggregator != self._swarm.me:
            return
        newest = [self._results[round] for round in sorted(self._results)][-_PUBLISHED:]
        self._swarm.publish(Results(results=newest))
        self._is_published = True

    def _checkpoint_if_due(self, view: SwarmView) -> None:
        plan, round = self._run.checkpoint, self._anchor.round
        is_due = round in plan.at or (plan.every and round and round % plan.every == 0)
        if is_due and self._anchor != self._saved:
            self._saved = self._anchor
            self._save(view, final=False)

    def _save(self, view: SwarmView, final: bool) -> str | None:
        """A checkpoint that cannot be written is reported; the last good one stays."""
        facts = {
            "run": self._seat.manifest.run_id,
            "fingerprint": self._seat.manifest.fingerprint,
            "peers": sorted(p.name for p in view.trainers),
            "samples": sum(p.samples for p in view.trainers),
            "coverage": self._coverage,  # for each shard, up to which position it was trained
            "results": [r.model_dump() for _, r in sorted(self._results.items())],
        }
        save = self._checkpoints.save_final if final else self._checkpoints.save
        try:
            path = str(save(self._anchor.round, self._adapter, self._state, facts))
        except P2PLLMError as problem:
            self._seat.events.emit(Trouble(what=problem.letter))
            return None
        self._seat.events.emit(CheckpointSaved(round=self._anchor.round, path=path))
        return path

    def _finish(self) -> None:
        path = self._save(self._swarm.view(), final=True)
        self._swarm.announce(state="finished")
        linger(self._seat, lambda view: not view.trainers, self._swarm.timeouts.record_life)
        self._seat.events.emit(
            Finished(round=self._anchor.round, digest=self._anchor.digest, path=path)
        )


def prepare(seat: Seat) -> Aggregator:
    """Load everything that the aggregator needs."""
    run = seat.manifest.run
    base = load_base_model(seat)
    adapter = attach_adapter(base, run.lora, run.seed)
    if not seat.config.evaluate:
        return Aggregator(seat, adapter, None)
    working(seat, "reading the held-out rows")
    held_out = load_held_out(run.data, base.tokenizer, run.seed)[: run.evaluation.max_rows]
    return Aggregator(seat, adapter, Evaluator(adapter, held_out, run.evaluation.batch_size))
