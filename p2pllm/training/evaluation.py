"""How good an adapter is on rows that nobody trains on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from p2pllm.config.run import EvaluationConfig
from p2pllm.data.tokens import Row
from p2pllm.model.adapter import Adapter, Values
from p2pllm.training.loss import counted, memory_for, summed_loss


def is_due(round: int, plan: EvaluationConfig, rounds: int) -> bool:
    """Whether the adapter of this round, of a run of so many, is to be evaluated."""
    return round >= rounds or round % plan.every == 0


@dataclass(frozen=True)
class EvaluationResult:
    """The held-out loss: a mean over tokens, so it does not depend on the batches."""

    loss: float
    rows: int
    tokens: int
    seconds: float


class Evaluator:
    """Measures adapters on the same held-out rows, again and again."""

    def __init__(self, adapter: Adapter, rows: Sequence[Row], batch_size: int) -> None:
        self._adapter = adapter
        # Rows of like length together: little padding, and on short rows half the time.
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        self._batches = [
            ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)
        ]
        self._batch_size = batch_size
        self._rows = len(ordered)
        self._tokens = counted(ordered)

    def evaluate(self, values: Values) -> EvaluationResult:
        """The loss with `values` in the adapter, which has its own values back afterwards.

        Raises: AdapterDiffers, DeviceMemoryFull.
        """
        began = time.monotonic()
        before = self._adapter.values()
        self._adapter.adopt(values)
        self._adapter.model.eval()  # no dropout
        try:
            with torch.inference_mode(), memory_for(self._batch_size):
                total = sum(float(summed_loss(self._adapter, batch)) for batch in self._batches)
        finally:
            self._adapter.adopt(before)
        loss = total / self._tokens if self._tokens else float("nan")
        return EvaluationResult(loss, self._rows, self._tokens, time.monotonic() - began)
