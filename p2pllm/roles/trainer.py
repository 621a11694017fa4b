"""The trainer: trains on its own rows and averages with the others, until the run is over."""

import time

from p2pllm.digest import digest_of
from p2pllm.errors import P2PLLMError
from p2pllm.events import (
    CaughtUp,
    CheckpointSaved,
    EvaluationSeen,
    Finished,
    RoundCommitted,
    RoundMissed,
    StepDone,
    Trouble,
)
from p2pllm.model.adapter import Adapter, Values, attach_adapter
from p2pllm.roles.entry import Seat, check_base, load_base_model, working
from p2pllm.roles.leases import Rows, open_rows
from p2pllm.roles.local_work import LocalTraining, LocalWork, Offer
from p2pllm.roles.own_evaluation import OwnEvaluation, own_evaluator
from p2pllm.roles.pace import Pace
from p2pllm.roles.sketches import OwnSketch
from p2pllm.swarm.node import Averaged, Contribution, Missed
from p2pllm.swarm.rounds import (
    Anchor,
    Average,
    CatchUp,
    Finish,
    Standing,
    Start,
    SwarmView,
    Train,
    next_action,
)
from p2pllm.training.checkpoint import Checkpoints
from p2pllm.training.evaluation import Evaluator
from p2pllm.training.learner import Learner
from p2pllm.training.outer import OuterOptimizer
from p2pllm.training.ranks import Alone

_PAUSE = 1.0  # seconds before another attempt after one that failed
_RECENT = 10.0  # seconds: the age of records that will do when a local epoch has ended
_LOOK = 0.5  # seconds between two looks at the swarm while nothing is to be done
_LINGER = 120.0  # seconds for which a finished trainer stays for those that still need it


class Trainer:
    """One trainer in one run. `run` is the whole life of it."""

    def __init__(
        self,
        seat: Seat,
        learner: LocalTraining,
        adapter: Adapter,
        rows: Rows,
        evaluator: Evaluator | None = None,
    ) -> None:
        """evaluator: for this trainer's own evaluations, where the run plans any."""
        self._seat, self._swarm, self._run = seat, seat.swarm, seat.manifest.run
        self._own = OwnEvaluation(seat, evaluator)
        self._learner, self._adapter, self._rows = learner, adapter, rows
        self._events = seat.events
        self._anchor: Anchor | None = None
        self._outer = OuterOptimizer(self._run.averaging, learner.size)
        self._state: Values = self._outer.start(learner.values())
        self._work = LocalWork(learner, rows, self._run.averaging.carry)
        self._sketch = OwnSketch(self._swarm, adapter, self._run.seed)
        self._samples = 0
        self._waiting_since = 0.0
        self._last_result = -1
        self._kept: Finished | None = None  # the result, once it is on disk
        self._leaves_at = 0.0  # the latest time, by the monotonic clock, to leave after that

    def run(self) -> None:
        """Returns when the run is over, or when the peer was asked to stop."""
        committed = False  # in the turn before
        while not self._seat.stop.is_set():
            # The lobby refuses what is stale: between two local epochs every moment counts.
            hurries = committed or self._work.finished is not None
            view = self._swarm.view(max_age=_RECENT if hurries else 0.0)
            committed = False
            self._notice_results(view)
            self._give_way(view)
            if self._anchor is not None and self._anchor.round == 0:
                check_base(self._adapter.base, view)
            standing = Standing(self._anchor, self._work.finished is not None)
            match next_action(standing, view, self._run.rounds):
                case Start():
                    self._hold(0, self._outer.start(self._adapter.initial_values(self._run.seed)))
                case CatchUp() as action:
                    self._catch_up(action, view)
                case Train():
                    self._train(view)
                case Average():
                    committed = self._average(view)
                case Finish():
                    if self._finish(view):
                        break
                    self._seat.stop.wait(_LOOK)
        self._sketch.finish()
        if self._kept is not None:
            self._events.emit(self._kept)

    # ---- the actions

    def _train(self, view: SwarmView) -> None:
        assert self._anchor is not None
        if not self._rows.begin(view):
            self._seat.stop.wait(_LOOK)
            return
        self._swarm.announce(state="training")
        self._swarm.approach(self._anchor)
        self._own.after_average(self._anchor, self._outer.values(self._state))
        pace = Pace(self._swarm, self._run)

        def stepped(done: StepDone) -> None:
            self._events.emit(done)
            pace.step(done)

        if not self._work.train(stepped, self._seat.stop.is_set, lambda: pace.is_late):
            return
        self._own.before_average(self._anchor, self._learner.values)
        work = self._work.finished
        assert work is not None
        self._samples += work.samples
        self._waiting_since = time.monotonic()
        self._swarm.announce(
            state="ready", samples=self._samples, speed=work.samples / max(work.seconds, 1e-6)
        )

    def _average(self, view: SwarmView) -> bool:
        """Whether the round is done."""
        assert self._anchor is not None
        offer = self._work.offer()
        pending = self._swarm.average(
            Contribution(self._anchor, offer.delta, offer.samples, offer.part.start, offer.spans)
        )
        successor = self._state.copy()  # fresh memory takes its time: now there is some
        if self._run.averaging.overlap and self._anchor.round + 1 < self._run.rounds:
            # Go on with the next local epoch until the average is there.
            stop = self._seat.stop.is_set
            self._work.train_ahead(self._events.emit, lambda: pending.is_done() or stop())
        match outcome := pending.result():
            case Averaged():
                self._commit(outcome, offer, successor)
                return True
            case Missed():
                self._events.emit(
                    RoundMissed(
                        round=self._anchor.round,
                        reason=self._told(view, outcome.reason),
                        culprits=[self._name(view, peer) for peer in outcome.culprits],
                    )
                )
                self._seat.stop.wait(_PAUSE)
        return False

    def _commit(self, outcome: Averaged, offer: Offer, state: Values) -> None:
        """state: a copy of the anchor's, to go on from."""
        assert self._anchor is not None
        work, round, view = self._work.finished, self._anchor.round, self._swarm.view(_RECENT)
        assert work is not None
        progress = self._work.settle(outcome.group, offer.part)
        before = self._outer.values(self._state)
        self._outer.step(state, outcome.delta, offer.part)
        self._hold(round + 1, state)
        self._sketch.begin(round + 1, before, offer, outcome)
        if progress is not None:  # what we learnt meanwhile stays, on top of the average
            self._learner.adopt(self._learner.values() + progress)
        waited = time.monotonic() - self._waiting_since - outcome.seconds_reducing
        self._events.emit(
            RoundCommitted(
                round=round,
                digest=self._anchor.digest,
                peers=[self._name(view, peer) for peer in outcome.group.peers],
                samples=work.samples,
                loss=work.loss,
                tokens_per_second=work.tokens / max(work.seconds, 1e-6),
                seconds_training=work.seconds,
                seconds_waiting=max(waited, 0.0),
                seconds_averaging=outcome.seconds_reducing,
                bytes_sent=outcome.bytes_sent,
                bytes_received=outcome.bytes_received,
                deadline=outcome.group.deadline,
                left_out=self._named(view, outcome.group.left_out),
                cut_down=self._named(view, outcome.group.out_of_proportion()),
            )
        )

    def _catch_up(self, action: CatchUp, view: SwarmView) -> None:
        began = time.monotonic()
        outcome = self._swarm.catch_up(action, self._outer.state_size)
        match outcome:
            case Missed():
                what = f"catching up to round {action.anchor.round} failed: {outcome.reason}"
                self._events.emit(Trouble(what=self._told(view, what)))
                self._seat.stop.wait(_PAUSE)
            case (state, donors):
                self._work.carry(action.anchor, view)
                self._hold(action.anchor.round, state)
                self._events.emit(
                    CaughtUp(
                        round=action.anchor.round,
                        digest=action.anchor.digest,
                        donors=[view.name(donor) for donor in donors],
                        seconds=time.monotonic() - began,
                    )
                )

    def _finish(self, view: SwarmView) -> bool:
        """Keep the result, and stay as a donor until nobody needs it any more: True. When the
        others agree on another adapter meanwhile, the trainer comes here once more."""
        assert self._anchor is not None
        if self._kept is None or self._kept.digest != self._anchor.digest:
            self._keep(self._anchor)
            return False
        return not _still_needs(self._anchor, view) or time.monotonic() > self._leaves_at

    def _keep(self, final: Anchor) -> None:
        path = None
        try:
            facts = {"run": self._seat.manifest.run_id, "samples": self._samples}
            facts["fingerprint"] = self._seat.manifest.fingerprint
            checkpoints = Checkpoints(self._seat.folder, keep=1)
            path = str(checkpoints.save_final(final.round, self._adapter, self._state, facts))
            self._events.emit(CheckpointSaved(round=final.round, path=path))
        except P2PLLMError as problem:
            self._events.emit(Trouble(what=problem.letter))
        self._swarm.announce(state="finished")
        self._own.after_average(final, self._outer.values(self._state))
        self._leaves_at = time.monotonic() + _LINGER
        self._kept = Finished(round=final.round, digest=final.digest, path=path)

    # ---- their parts

    def _hold(self, round: int, state: Values) -> None:
        """Go on from this adapter, and let others have it."""
        self._sketch.finish()
        self._anchor, self._state = Anchor(round, digest_of(state)), state
        self._work.start_from(round, self._outer.values(state))
        part = self._learner.part(round)
        said = {"coverage": self._rows.coverage, "shards": self._rows.leases}
        self._swarm.hold(self._anchor, state, part.stop - part.start, sketch=None, **said)

    def _give_way(self, view: SwarmView) -> None:
        if self._work.give_way(view):
            what = "another trainer has trained on the same rows: begins again with others"
            self._events.emit(Trouble(what=what))

    def _notice_results(self, view: SwarmView) -> None:
        for result in view.results:
            if result.round > self._last_result:
                self._last_result = result.round
                self._events.emit(EvaluationSeen(round=result.round, loss=result.loss))

    def _named(self, view: SwarmView, reasons: dict[str, str]) -> dict[str, str]:
        return {self._name(view, peer): self._told(view, why) for peer, why in reasons.items()}

    def _told(self, view: SwarmView, reason: str) -> str:
        return view.with_names(reason.replace(self._swarm.me, self._seat.name))

    def _name(self, view: SwarmView, peer: str) -> str:
        return self._seat.name if peer == self._swarm.me else view.name(peer)


def prepare(seat: Seat, ranks: Alone | None = None) -> Trainer:
    """Load everything that this trainer needs; `ranks` are its processes, where it has several."""
    ranks = ranks or Alone()
    run, config = seat.manifest.run, seat.config
    base = load_base_model(seat)
    ranks.tell(run.model_dump_json())
    working(seat, "reading the rows")
    held_out, rows = open_rows(seat, base.tokenizer)
    adapter = attach_adapter(base, run.lora, run.seed, config.gradient_checkpointing)
    learner = Learner(adapter, rows.source, run, config.micro_batch, ranks)
    evaluator = own_evaluator(seat, adapter, held_out)
    return Trainer(seat, learner, adapter, rows, evaluator)


def _still_needs(final: Anchor, view: SwarmView) -> bool:
    """Whether a live peer does not yet hold the final adapter. An aggregator that has just been
    restarted needs it, too; a trainer that comes as late as that has nothing left to do.

    A trainer is believed when it says so itself: who was in the last group with us is presumed to
    hold what came out of it, while over a slow line it may still be getting that from us.
    """
    return any(
        Anchor(p.round, p.digest) != final or (p.role == "trainer" and p.state != "finished")
        for p in view.peers
        if p.role != "bootstrap"
        and p.state != "leaving"
        and (p.state != "joining" or p.role == "aggregator")
    )
