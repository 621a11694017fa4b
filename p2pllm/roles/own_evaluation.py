"""A trainer's own evaluations, where the run plans any: of its local work before an average, and of
the adapter after it.

They are for its own screen and metrics. What the swarm believes is the aggregator's word alone.
"""

from collections.abc import Callable
from typing import Literal

from p2pllm.data.corpus import load_held_out
from p2pllm.data.tokens import Row
from p2pllm.errors import P2PLLMError
from p2pllm.events import TrainerEvaluated, Trouble
from p2pllm.model.adapter import Adapter, Values
from p2pllm.roles.entry import Seat, working
from p2pllm.swarm.rounds import Anchor
from p2pllm.training.evaluation import Evaluator, is_due


class OwnEvaluation:
    """Evaluates at the two moments of a round that the run may name. It never ends a trainer."""

    def __init__(self, seat: Seat, evaluator: Evaluator | None) -> None:
        """evaluator: none, where this trainer does not evaluate."""
        self._seat, self._evaluator = seat, evaluator
        self._plan, self._rounds = seat.manifest.run.evaluation, seat.manifest.run.rounds
        self._last: Anchor | None = None  # evaluated after an average

    def before_average(self, anchor: Anchor, values: Callable[[], Values]) -> None:
        """The trainer has done its local epoch on `anchor`; `values` makes a copy of its adapter's,
        which costs time that most runs need not spend."""
        if self._plan.on_trainers in ("before", "both"):
            self._evaluate(anchor.round + 1, "before", values())

    def after_average(self, anchor: Anchor, values: Values) -> None:
        """The trainer goes on from `anchor`; `values` are its adapter's. Each anchor counts once,
        and the one that the run starts with is no average."""
        if self._plan.on_trainers in ("after", "both") and anchor.round and anchor != self._last:
            self._last = anchor
            self._evaluate(anchor.round, "after", values)

    def _evaluate(self, round: int, when: Literal["before", "after"], values: Values) -> None:
        if self._evaluator is None or not is_due(round, self._plan, self._rounds):
            return
        working(self._seat, f"evaluating round {round}, {when} the average")
        try:
            found = self._evaluator.evaluate(values)
        except P2PLLMError as problem:  # such as too little memory: no reason not to train
            self._seat.events.emit(Trouble(what=problem.letter))
            return
        self._seat.events.emit(
            TrainerEvaluated(
                round=round, when=when, loss=found.loss, rows=found.rows, seconds=found.seconds
            )
        )


def own_evaluator(seat: Seat, adapter: Adapter, held_out: list[Row] | None) -> Evaluator | None:
    """None, where the run or this peer does not want it.

    `held_out`: the run's rows, when this trainer has them; one with private data reads them.
    Raises the letters of `load_held_out`.
    """
    run, config = seat.manifest.run, seat.config
    plan = run.evaluation
    if plan.on_trainers == "never" or not config.evaluate:
        return None
    if held_out is None:
        held_out = load_held_out(run.data, adapter.base.tokenizer, run.seed)
    # No more rows at once than the device is known to hold while it trains.
    known = config.micro_batch if isinstance(config.micro_batch, int) else plan.batch_size
    at_once = min(plan.batch_size, known)
    return Evaluator(adapter, held_out[: plan.max_rows], at_once)
