"""From text to rows of token ids and labels, and from rows to a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import DataConfig
from p2pllm.data.template import render_prompt
from p2pllm.errors import EndTokenMissing

IGNORED = -100  # the label that torch's cross_entropy leaves out by default
PAD_MULTIPLE = 8  # tokens; tensor cores want matrix sides that are multiples of 8
CHUNK = 1000  # texts in one call to the tokenizer: their offsets take 100 bytes a token


@dataclass(frozen=True, slots=True)
class Row:
    """One sample. `labels` are the ids themselves (the model shifts them), or IGNORED."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    group: str = ""  # category, or the `data.eval_by` column


def tokenize(
    texts: Sequence[tuple[str, str]], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Row | None]:
    """Rows of (prompt, answer) texts, in their order; None where nothing of an answer is left.

    A row ends with EOS unless it was truncated: a text that was cut does not end there, and EOS
    would teach the model to stop in mid-sentence.

    Raises: EndTokenMissing.
    """
    if tokenizer.eos_token_id is None:
        raise EndTokenMissing(tokenizer=tokenizer.name_or_path or "of this model")
    start = _start_ids(tokenizer)
    rows = []
    for ids, answer_at in _encode(texts, tokenizer):
        whole = _with_start(ids, start)
        shift = len(whole) - len(ids)
        if whole[-1:] != [tokenizer.eos_token_id]:  # a chat template may have written it
            whole = [*whole, tokenizer.eos_token_id]
        rows.append(_row(whole, answer_at + shift, config))
    return rows


def prompt_ids(
    template: str, instruction: str, context: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """A question's token ids as they were in training, for generating the answer."""
    text = render_prompt(template, instruction, context, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _with_start(ids, _start_ids(tokenizer))


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, int64 of shape [rows, length], padded on the right.

    The length is that of the longest row, rounded up to a multiple of 8.
    """
    longest = max(len(row.input_ids) for row in rows)
    length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE

    def padded(sequences: list[tuple[int, ...]], filler: int) -> torch.Tensor:
        return torch.tensor([[*s, *[filler] * (length - len(s))] for s in sequences])

    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        # From the lengths, not from the ids: the pad token often is EOS.
        "attention_mask": padded([(1,) * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def _encode(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Ids of prompt + answer, and where among them the answer begins.

    Both are cut into tokens together, as the model sees them in other texts, and told apart by
    the characters that each token came from. A tokenizer without offsets gets them separately.
    """
    if not getattr(tokenizer, "is_fast", False):
        for prompt, answer in texts:
            asked, answered = (
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                for text in (prompt, answer)
            )
            yield asked + answered, len(asked)
        return
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        encoded = tokenizer(
            [prompt + answer for prompt, answer in chunk],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,  # no warning about rows longer than the model: max_length cuts them
        )
        for ids, spans, (prompt, _) in zip(
            encoded["input_ids"], encoded["offset_mapping"], chunk, strict=True
        ):
            begins = (i for i, (begin, _) in enumerate(spans) if begin >= len(prompt))
            yield ids, next(begins, len(ids))


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if this tokenizer puts it in front of a text by itself, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def _with_start(ids: list[int], start: list[int]) -> list[int]:
    """A chat template may have written BOS; a second one would be new to the model."""
    return ids if ids[: len(start)] == start else start + ids


def _row(ids: list[int], answer_at: int, config: DataConfig) -> Row | None:
    if len(ids) > config.max_length:
        if config.long_rows == "drop":
            return None
        ids = ids[: config.max_length]
    if answer_at >= len(ids):
        return None
    ignored = answer_at if config.train_on == "answer" else 0
    return Row(tuple(ids), (IGNORED,) * ignored + tuple(ids[ignored:]))
