"""The local epoch: one peer's steps between two averages.

It knows an adapter and where rows come from, and nothing about rounds of others, peers or the
network. The optimizer's moments stay here and live across rounds.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

from p2pllm.config.run import RunConfig, TrainingConfig
from p2pllm.data.tokens import Row
from p2pllm.errors import DeviceMemoryFull, LossNotFinite
from p2pllm.events import StepDone
from p2pllm.model.adapter import Adapter, Values
from p2pllm.training.halves import trained_part
from p2pllm.training.loss import counted, memory_for, summed_loss
from p2pllm.training.ranks import Alone, Step
from p2pllm.training.schedule import learning_rate
from p2pllm.training.source import Source

log = logging.getLogger(__name__)

# float16 gradients vanish below 6e-8: scale the loss up by this much, to begin with. torch's own
# default, 65536, overflows in the first steps, and a step that overflows is lost.
FIRST_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Work:
    """What one local epoch did. Skipped steps are in `skipped` and in nothing else."""

    samples: int
    steps: int
    tokens: int  # counted in the loss
    loss: float  # mean of the steps' losses, each before its update, weighted by tokens; nan: none
    seconds: float
    skipped: int  # steps without an update, because their loss or gradient was not finite


@dataclass
class _Tally:
    """A Work while it grows."""

    began: float
    samples: int = 0
    steps: int = 0
    tokens: int = 0
    loss: float = 0.0  # sum over tokens
    skipped: int = 0

    @classmethod
    def going_on_from(cls, begun: Work | None) -> "_Tally":
        if begun is None:
            return cls(time.monotonic())
        loss = begun.loss * begun.tokens if begun.tokens else 0.0
        began = time.monotonic() - begun.seconds
        return cls(began, begun.samples, begun.steps, begun.tokens, loss, begun.skipped)

    def work(self) -> Work:
        mean = self.loss / self.tokens if self.tokens else math.nan
        seconds = time.monotonic() - self.began
        return Work(self.samples, self.steps, self.tokens, mean, seconds, self.skipped)


class Learner:
    """Trains an adapter on the rows of `source`, which may be replaced at any time."""

    def __init__(
        self,
        adapter: Adapter,
        source: Source,
        run: RunConfig,
        micro_batch: int | Literal["auto"] | None = None,
        ranks: Alone | None = None,
    ) -> None:
        """At most `micro_batch` rows in one forward pass of one rank; as many as fit for `auto`."""
        self.adapter = adapter
        self.source = source
        self._ranks = ranks or Alone()
        self._training = training = run.training
        self._rounds = run.rounds
        self._rule = run.averaging.lora
        self._backs_off = micro_batch == "auto"
        self._micro_batch = micro_batch if isinstance(micro_batch, int) else training.batch_size
        self._parameters = list(adapter.parameters.values())
        self._optimizer = _optimizer(training, self._parameters)
        self._scaler = torch.amp.GradScaler(
            adapter.device.type,
            init_scale=FIRST_LOSS_SCALE,
            enabled=adapter.base.model.dtype == torch.float16,
        )

    @property
    def size(self) -> int:
        """How many values the adapter has."""
        return self.adapter.size

    def part(self, round: int) -> slice:
        """Which of the values are trained in a round. The others keep the anchor's bits."""
        return trained_part(self._rule, round, self.adapter.size_of_a, self.adapter.size)

    def values(self) -> Values:
        return self.adapter.values()

    def adopt(self, values: Values) -> None:
        """Go on from other values; the optimizer's moments stay."""
        self.adapter.adopt(values)
        self._ranks.adopt(values)

    def train(
        self,
        round: int,
        on_step: Callable[[StepDone], None],
        stop: Callable[[], bool],
        begun: Work | None = None,
    ) -> Work:
        """One local epoch of round `round` (from 0). It ends within a step once `stop` says so;
        `begun`, what it had done until then, is where another call goes on.

        Raises:
            LossNotFinite: no step of the whole local epoch could be used.
            DeviceMemoryFull: the micro-batch is too large for the device.
        """
        tally = _Tally.going_on_from(begun)
        planned = self._planned_steps()
        for fraction in self._fractions(tally, planned):
            if stop():
                return tally.work()
            rate = learning_rate(self._training, self._rounds, round + fraction)
            began = time.monotonic()
            tokens, loss = self._step(round, rate, tally)
            if loss is not None:
                speed = tokens / max(time.monotonic() - began, 1e-9)
                done = tally.steps + tally.skipped
                on_step(
                    StepDone(
                        round=round,
                        step=done,
                        steps=planned,
                        loss=loss,
                        learning_rate=rate,
                        tokens_per_second=speed,
                    )
                )
        if tally.skipped and not tally.steps:
            raise LossNotFinite(round=round, steps=tally.skipped)
        return tally.work()

    def _planned_steps(self) -> int | None:
        local = self._training.local
        if local.epochs is not None:
            samples = local.epochs * self.source.rows
            return max(1, math.ceil(samples / self._training.batch_size))
        return local.steps

    def _fractions(self, tally: _Tally, planned: int | None) -> Iterator[float]:
        """For each step of the local epoch, which fraction of it lies before the step's middle."""
        if planned is not None:
            done = tally.steps + tally.skipped
            yield from ((step + 0.5) / planned for step in range(done, planned))
            return
        limit = self._training.local.seconds or 0.0
        if not tally.steps:
            yield 0.0  # a peer however slow does one step
        while (elapsed := time.monotonic() - tally.began) < limit:
            yield elapsed / limit

    def _step(self, round: int, rate: float, tally: _Tally) -> tuple[int, float | None]:
        """One optimizer step: its counted tokens and mean loss; None when it was skipped."""
        rows = self.source.next_batch(self._training.batch_size)
        step = Step(round, rate, counted(rows))
        loss = self.follow(step, self._ranks.share(step, rows))
        if loss is None:
            tally.skipped += 1
        else:
            tally.samples += len(rows)
            tally.steps += 1
            tally.tokens += step.tokens
            tally.loss += loss * step.tokens
        return step.tokens, loss

    def follow(self, step: Step, rows: list[Row]) -> float | None:
        """An optimizer step, `rows` being this rank's share of the batch. All ranks take it alike.

        Returns the batch's mean loss; None when the step was skipped.
        """
        self.adapter.model.train()
        self.adapter.train_only(self.part(step.round))
        total = self._gradient(rows, step.tokens)
        self._ranks.sum(self._parameters, total)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._training.max_grad_norm)
        loss = float(total) / step.tokens if step.tokens else math.nan
        usable = math.isfinite(loss) and bool(norm.isfinite())
        if usable:
            for group in self._optimizer.param_groups:
                group["lr"] = step.rate
            self._scaler.step(self._optimizer)
        else:
            log.warning("step skipped: loss %s, gradient norm %s", loss, float(norm))
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss if usable else None

    def _gradient(self, rows: list[Row], tokens: int) -> torch.Tensor:
        """`_backward` with as large micro-batches as the device has memory for.

        Raises: DeviceMemoryFull.
        """
        while True:
            try:
                with memory_for(self._micro_batch):
                    return self._backward(rows, tokens)
            except DeviceMemoryFull:
                if not self._backs_off or self._micro_batch == 1:
                    raise
            # Behind the handler: there the exception would still hold on to the activations.
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self._micro_batch = math.ceil(self._micro_batch / 2)
            log.warning("out of memory: going on with micro-batches of %d", self._micro_batch)

    def _backward(self, rows: list[Row], tokens: int) -> torch.Tensor:
        """Accumulate the gradient of the batch's mean token loss; return the summed loss.

        Every micro-batch is divided by the tokens of the whole batch, so the gradient is the same
        whatever the micro-batch is.
        """
        ordered = sorted(rows, key=lambda row: len(row.input_ids))  # less padding in each part
        total = torch.zeros((), device=self.adapter.device)
        self._scaler.scale(total)  # so that it is ready even where this rank has no rows
        for start in range(0, len(ordered), self._micro_batch):
            loss = summed_loss(self.adapter, ordered[start : start + self._micro_batch])
            if loss.requires_grad:
                self._scaler.scale(loss / tokens).backward()
            total += loss.detach()
        return total


def _optimizer(
    training: TrainingConfig, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "adamw_8bit":
            return AdamW8bit(parameters, lr=rate, weight_decay=decay)
        case "paged_adamw_8bit":  # paged on GPUs only; elsewhere it is the one above
            return PagedAdamW8bit(parameters, lr=rate, weight_decay=decay)
