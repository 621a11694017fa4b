"""A trainer's parts without a model: a learner that only counts, for tests of everything else."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from p2pllm.config.run import LoraAveraging
from p2pllm.data.rows import ShardedRows
from p2pllm.data.tokens import Row
from p2pllm.events import StepDone
from p2pllm.roles.aggregator import Aggregator
from p2pllm.roles.entry import Seat
from p2pllm.roles.leases import SharedRows
from p2pllm.roles.trainer import Trainer
from p2pllm.training.evaluation import EvaluationResult
from p2pllm.training.halves import trained_part
from p2pllm.training.learner import Work
from p2pllm.training.source import Source

_MODULE = 65_536  # values


class CountingLearner:
    """Adds a constant of its own in each local epoch, in steps of equal size."""

    def __init__(
        self,
        size: int,
        step: float,
        before_training: Callable[[int], None],
        steps: int = 1,
        pause: float = 0.0,
    ) -> None:
        """before_training: called with the round when its first step is due; it may wait, or end
        the peer. pause: seconds for each step."""
        self.size, self.rows = size, 32
        self.done = list[int]()  # rounds, one entry for each step
        self.rule: LoraAveraging = "both"
        self._values = np.zeros(size, np.float32)
        self._step, self._before_training = np.float32(step / steps), before_training
        self._steps, self._pause = steps, pause
        self.source: Source

    def part(self, round: int) -> slice:
        return trained_part(self.rule, round, self.size // 3, self.size)

    def values(self) -> Any:
        return self._values.copy()

    def adopt(self, values: Any) -> None:
        self._values[:] = values

    def train(self, round: int, on_step: Any, stop: Any, begun: Work | None = None) -> Work:
        began = time.monotonic() - (begun.seconds if begun else 0.0)
        if begun is None:
            self._before_training(round)
        paced_from = time.monotonic() - (begun.seconds if begun else 0.0)
        steps = begun.steps if begun else 0
        while steps < self._steps and not stop():
            time.sleep(max(paced_from + (steps + 1) * self._pause - time.monotonic(), 0.0))
            self._values[self.part(round)] += self._step
            self.done.append(round)
            steps += 1
            on_step(
                StepDone(
                    round=round,
                    step=steps,
                    steps=self._steps,
                    loss=1.0,
                    learning_rate=1.0,
                    tokens_per_second=1.0,
                )
            )
        seconds = time.monotonic() - began
        return Work(
            samples=4 * steps, steps=steps, tokens=8 * steps, loss=1.0, seconds=seconds, skipped=0
        )


class WitnessLearner(CountingLearner):
    """Its adapter has one value for each row of the run, and training on a row adds 1 to it: so the
    averages tell which rows have become part of them."""

    def __init__(self, rows: int, batch: int, before_training: Callable[[int], None]) -> None:
        super().__init__(rows, 1.0, before_training)
        self.rows, self._batch = rows, batch

    def train(self, round: int, on_step: Any, stop: Any, begun: Work | None = None) -> Work:
        if begun is None:
            self._before_training(round)
        samples = begun.samples if begun else 0
        while samples < self._batch and not stop():
            [row] = self.source.next_batch(1)
            self._values[row.input_ids[0]] += 1
            samples += 1
        return Work(samples=samples, steps=1, tokens=8, loss=1.0, seconds=0.01, skipped=0)


def counting_adapter(size: int) -> Any:
    """What roles use of an adapter, without a model."""
    return SimpleNamespace(
        base=SimpleNamespace(name="none", weights_sha256=""),
        size=size,
        initial_values=lambda seed: np.zeros(size, np.float32),
        tensors=_tensors,
        save=_save,
    )


def counting_trainer(seat: Seat, learner: CountingLearner, evaluator: Any = None) -> Trainer:
    """The real trainer role around it."""
    learner.rule = seat.manifest.run.averaging.lora
    shards = seat.manifest.run.data.shards
    numbered = [Row((number,), (number,)) for number in range(learner.rows)]
    rows = SharedRows(seat, ShardedRows(numbered, shards, seed=1))
    learner.source = rows.source
    return Trainer(seat, cast(Any, learner), counting_adapter(learner.size), rows, evaluator)


def counting_aggregator(seat: Seat, size: int) -> Aggregator:
    """The real aggregator role, which takes the mean of all values for their loss."""

    def evaluate(values: Any) -> EvaluationResult:
        return EvaluationResult(loss=float(values.mean()), rows=1, tokens=1, seconds=0.0)

    return Aggregator(seat, counting_adapter(size), cast(Any, SimpleNamespace(evaluate=evaluate)))


def _tensors(values: Any) -> dict[str, Any]:
    """Modules of rank 8 and usual width; of few values one, of rank 1."""
    a, b = np.split(values, [len(values) // 3])
    modules = len(values) // _MODULE
    if not modules:
        return {"m.lora_A.weight": a[None, :], "m.lora_B.weight": b[:, None]}
    found = {}
    for name, half, shape in (("lora_A", a, (8, -1)), ("lora_B", b, (-1, 8))):
        length = len(half) // modules // 8 * 8
        for at in range(modules):
            mine = half[at * length : (at + 1) * length]
            found[f"m{at}.{name}.weight"] = mine.reshape(shape)
    return found


def _save(folder: Path, values: Any) -> None:
    (folder / "values").write_bytes(values.tobytes())
