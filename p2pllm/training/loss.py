"""The loss of next-token prediction, summed over the tokens that count."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from p2pllm.data.tokens import IGNORED, Row, collate
from p2pllm.errors import DeviceMemoryFull
from p2pllm.model.adapter import Adapter


def counted(rows: Sequence[Row]) -> int:
    """How many tokens of `rows` count; the first of a row is given, never predicted."""
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


def summed_loss(adapter: Adapter, rows: Sequence[Row]) -> torch.Tensor:
    """One forward pass; the sum of the counted tokens' losses, float32, shape ().

    It is a sum and not a mean so that micro-batches and batches of any padding add up exactly.
    """
    pad = adapter.tokenizer.pad_token_id
    batch = {k: v.to(adapter.device) for k, v in collate(rows, pad).items()}
    targets = batch.pop("labels")[:, 1:]
    # The head is a fifth of a small model's work: apply it only where some row counts a token.
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    if len(columns) == 0:
        return torch.zeros((), device=adapter.device)
    if _picks_columns(adapter):
        logits = adapter.model(**batch, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = adapter.model(**batch, use_cache=False).logits[:, columns]
    targets = targets[:, columns]
    counts = targets != IGNORED
    return cross_entropy(logits[counts].float(), targets[counts], reduction="sum")


@contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """Within it, a device that runs out of memory with so many rows at once says so in a letter."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryFull(rows=rows, reason=str(error).partition(". ")[0]) from error


def _picks_columns(adapter: Adapter) -> bool:
    forward = adapter.model.get_base_model().forward
    return "logits_to_keep" in inspect.signature(forward).parameters
