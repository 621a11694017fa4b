"""A learner whose local epochs are a script's: it and the trainer role take turns.

The role, in a thread of its own, hands the turn to the script's loop where it wants a local epoch,
and gets it back when that is over. Only one of the two has the turn, so nobody changes the adapter
while the other works on it.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from p2pllm.config.run import RunConfig
from p2pllm.data.tokens import IGNORED
from p2pllm.events import StepDone
from p2pllm.model.adapter import Adapter, Values
from p2pllm.training.halves import trained_part
from p2pllm.training.learner import Work
from p2pllm.training.schedule import learning_rate

_LOOK = 0.2  # seconds between two looks whether a wait is still worth while
_NOTHING = Work(0, 0, 0, math.nan, 0.0, 0)


class ScriptLearner:
    """The trainer role's learner; the training itself is the script's."""

    def __init__(self, adapter: Adapter, run: RunConfig) -> None:
        self.adapter, self.size = adapter, adapter.size
        self._run = run
        self._turn = threading.Condition()
        self._is_scripts = False  # whose turn it is
        self._is_over = False  # there are no further local epochs
        self._round, self._begun, self._began = 0, _NOTHING, 0.0
        self._steps = 0  # of the script in this turn
        self._samples = 0
        self._tokens: int | torch.Tensor = 0
        self._loss = math.nan
        self._on_step: Callable[[StepDone], None] = lambda step: None
        self._stop: Callable[[], bool] = lambda: False
        self.steps_planned: int | None = None
        self._hook = adapter.model.register_forward_pre_hook(self._count, with_kwargs=True)

    # ---- what the role sees

    def part(self, round: int) -> slice:
        rule = self._run.averaging.lora
        return trained_part(rule, round, self.adapter.size_of_a, self.size)

    def values(self) -> Values:
        return self.adapter.values()

    def adopt(self, values: Values) -> None:
        self.adapter.adopt(values)

    def train(
        self,
        round: int,
        on_step: Callable[[StepDone], None],
        stop: Callable[[], bool],
        begun: Work | None = None,
    ) -> Work:
        """Let the script train; returns what it did."""
        self.adapter.train_only(self.part(round))
        with self._turn:
            self._round, self._on_step, self._stop = round, on_step, stop
            self._begun, self._began = begun or _NOTHING, time.monotonic()
            self._steps = self._samples = self._tokens = 0
            self._is_scripts = True
            self._turn.notify_all()
            while self._is_scripts and not self._is_over:
                self._turn.wait(_LOOK)
            return self._work()

    def _work(self) -> Work:
        begun, seconds = self._begun, time.monotonic() - self._began
        return Work(
            begun.samples + self._samples,
            begun.steps + self._steps,
            begun.tokens + int(self._tokens),
            self._loss,
            begun.seconds + seconds,
            0,
        )

    # ---- what the script sees

    def wait_for_turn(self) -> bool:
        """Returns when the script may train: True. False when there is nothing left to train."""
        with self._turn:
            while not self._is_scripts and not self._is_over:
                self._turn.wait(_LOOK)
            return not self._is_over

    def rate(self) -> float:
        """The learning rate of the step that is due."""
        position = self._round + min(self._fraction(), 1.0)
        return learning_rate(self._run.training, self._run.rounds, position)

    def _fraction(self) -> float:
        """How much of the local epoch lies before the middle of the present step."""
        if self.steps_planned is not None:
            return (self._begun.steps + self._steps + 0.5) / self.steps_planned
        elapsed = self._begun.seconds + time.monotonic() - self._began
        return elapsed / (self._run.training.local.seconds or math.inf)

    def step_done(self, samples: int, loss: float, rate: float) -> bool:
        """The script took a step; whether it goes on, perhaps after waiting for its turn."""
        self._steps += 1
        self._samples += samples
        self._loss = loss
        done = self._begun.steps + self._steps
        seconds = max(time.monotonic() - self._began, 1e-6)
        self._on_step(
            StepDone(
                round=self._round,
                step=done,
                steps=self.steps_planned,
                loss=loss,
                learning_rate=rate,
                tokens_per_second=int(self._tokens) / seconds,
            )
        )
        planned = self.steps_planned
        is_done = done >= planned if planned is not None else self._fraction() >= 1
        if not is_done and not self._stop():
            return True
        with self._turn:
            self._is_scripts = False
            self._turn.notify_all()
        return self.wait_for_turn()

    def _count(self, model: torch.nn.Module, args: object, inputs: Mapping[str, Any]) -> None:
        """A forward pass begins. The tokens of the loss are those with a label; all, where the
        script keeps the labels to itself."""
        tokens = inputs.get("labels", inputs.get("input_ids"))
        if model.training and tokens is not None:
            self._tokens = self._tokens + (tokens[..., 1:] != IGNORED).sum()

    def end(self) -> None:
        """Nobody waits any longer."""
        with self._turn:
            self._is_over = True
            self._turn.notify_all()
        self._hook.remove()
