"""Several processes of one peer, the local ranks: one for each GPU, say. Together they are one
learner; only rank 0 knows rows, rounds and the network.

In each step rank 0 hands out the batch, every rank computes the gradient of its share, and one
all-reduce of all gradients as one flat array makes the batch's. As the loss is a sum over tokens
divided by the tokens of the whole batch, that sum is exact, whatever the shares are; DDP would
average the ranks' means. Adapters are small, so gloo over loopback does for GPUs, too.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from p2pllm.data.tokens import Row
from p2pllm.errors import RankLost
from p2pllm.model.adapter import Values

_END, _TEXT, _ADOPT, _STEP = range(4)  # what follows a header
_DTYPES = (torch.uint8, torch.uint8, torch.float32, torch.int64)  # of what follows
_HEADER = 5  # float64 numbers: kind, round, rate, tokens, length of what follows
_WATCH = 0.5  # seconds between two looks whether the launcher still lives


@dataclass(frozen=True)
class Step:
    """What all ranks must know of an optimizer step."""

    round: int
    rate: float
    tokens: int  # counted in the whole batch


@dataclass(frozen=True)
class Batch:
    """A step, and the rows of it that are for this rank."""

    step: Step
    rows: list[Row]


class Alone:
    """One process is the whole peer."""

    rank = 0

    def adopt(self, values: Values) -> None:
        """Tell the others the adapter's values."""

    def share(self, step: Step, rows: list[Row]) -> list[Row]:
        """Hand out a batch; the rows that are for this rank."""
        return rows

    def sum(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
        """Add up the ranks' gradients and losses, in place and alike on all ranks."""

    def tell(self, text: str) -> None:
        """Tell the others something once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Ranks(Alone):
    """This process among the local ranks."""

    def __init__(self, rank: int, size: int, meeting: Path) -> None:
        """Returns when all ranks have come."""
        self.rank, self.size = rank, size
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        # A file, and not a port that others on the network could reach. Between rounds a rank
        # waits as long as the swarm does; that another one died it learns at once.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(days=30),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.rank == 0:
                self._order(_END, torch.empty(0))
        except RankLost:
            pass  # then they have ended already
        finally:
            dist.destroy_process_group()

    # ---- rank 0

    def tell(self, text: str) -> None:
        self._order(_TEXT, torch.tensor(list(text.encode()), dtype=torch.uint8))

    def adopt(self, values: Values) -> None:
        if self.rank == 0:
            self._order(_ADOPT, torch.from_numpy(values))

    def share(self, step: Step, rows: list[Row]) -> list[Row]:
        if self.rank == 0:
            rows = sorted(rows, key=lambda row: len(row.input_ids))  # equal work for all
            self._order(_STEP, _packed(rows), step)
        return rows[self.rank :: self.size]

    def _order(self, kind: int, payload: torch.Tensor, step: Step | None = None) -> None:
        about = (step.round, step.rate, step.tokens) if step else (0, 0, 0)
        header = torch.tensor([kind, *about, payload.numel()], dtype=torch.float64)
        for tensor in (header, payload):
            if tensor.numel():
                self._broadcast(tensor)

    # ---- the others

    def listen(self) -> str | None:
        """What rank 0 tells; None when it ends instead."""
        kind, _, payload = self._receive()
        return bytes(payload.tolist()).decode() if kind == _TEXT else None

    def orders(self) -> Iterator[Batch | Values]:
        """What rank 0 hands out until it ends: batches to work on, and adapters to adopt."""
        while True:
            kind, step, payload = self._receive()
            if kind == _END:
                return
            if kind == _ADOPT:
                yield payload.numpy()
            else:
                yield Batch(step, self.share(step, _unpacked(payload)))

    def _receive(self) -> tuple[int, Step, torch.Tensor]:
        header = torch.empty(_HEADER, dtype=torch.float64)
        self._broadcast(header)
        kind, round, tokens, length = (int(header[at]) for at in (0, 1, 3, 4))
        payload = torch.empty(length, dtype=_DTYPES[kind])
        if length:
            self._broadcast(payload)
        return kind, Step(round, float(header[2]), tokens), payload

    # ---- all

    def sum(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
        trained = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), loss.reshape(1)]).cpu()
        try:
            dist.all_reduce(flat)
        except RuntimeError as problem:
            raise RankLost(reason=_first_line(problem)) from problem
        start = 0
        for parameter, gradient in zip(trained, gradients, strict=True):
            part = flat[start : start + gradient.numel()].reshape(gradient.shape)
            parameter.grad = gradient.copy_(part)
            start += gradient.numel()
        loss.copy_(flat[-1])

    def _broadcast(self, tensor: torch.Tensor) -> None:
        try:
            dist.broadcast(tensor, src=0)
        except RuntimeError as problem:
            raise RankLost(reason=_first_line(problem)) from problem


def _packed(rows: Sequence[Row]) -> torch.Tensor:
    """How many rows, their lengths, all ids, all labels."""
    lengths = [len(row.input_ids) for row in rows]
    ids = [i for row in rows for i in row.input_ids]
    labels = [label for row in rows for label in row.labels]
    return torch.tensor([len(rows), *lengths, *ids, *labels], dtype=torch.int64)


def _unpacked(packed: torch.Tensor) -> list[Row]:
    count, *numbers = packed.tolist()
    lengths, numbers = numbers[:count], numbers[count:]
    edges = np.cumsum([0, *lengths]).tolist()
    ids, labels = numbers[: edges[-1]], numbers[edges[-1] :]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return [Row(tuple(ids[span]), tuple(labels[span])) for span in spans]


def _end_with_parent(parent: int) -> None:
    """A launcher that was killed cannot end its ranks; they do it themselves."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    sys.stderr.write("The launcher of this process is gone.\n")
    os._exit(1)


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0]
