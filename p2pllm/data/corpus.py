"""The rows of a run: read, put into the template, tokenised, and some of them held out.

Every peer computes the same rows from the run's configuration and seed. Which of the training
rows a peer works on is decided in `sharding.py`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import DataConfig
from p2pllm.data.sharding import permutation
from p2pllm.data.sources import Record, examples_of, groups_of, read_files, read_source
from p2pllm.data.template import Example, check_template, render
from p2pllm.data.tokens import Row, tokenize
from p2pllm.errors import FewerRowsThanShards, HeldOutTooLarge, NoRowsLeft

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows to train on, in the data set's order, and rows to evaluate on, in a shuffled order (so
    that the first n of them are a fair sample)."""

    train: list[Row]
    held_out: list[Row]


def load_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """The run's data set. The same for every peer: depends on nothing but the arguments.

    A row that says the same as a held-out row is not trained on.

    Raises: any letter of the data section in `p2pllm.errors`.
    """
    check_template(config.template, tokenizer)
    where = config.source if isinstance(config.source, str) else ", ".join(config.source)
    records = read_source(config)
    rows = _rows(records, config, tokenizer, where)
    kept = [row.group for row in rows] if config.eval_by else None
    training, holding = hold_out(len(rows), config.eval_size, seed, kept)
    held_out = [rows[i] for i in holding]
    seen = {row.input_ids for row in held_out}
    train = [row for i in training if (row := rows[i]).input_ids not in seen]
    if len(train) < config.shards:
        raise FewerRowsThanShards(where=where, rows=len(train), shards=config.shards)
    return Corpus(train, held_out)


def load_private(
    files: Sequence[Path], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Row]:
    """A peer's own files, made into rows as the run says. Nothing is held out of them.

    Raises: DatasetFileMissing, DatasetUnreadable, DatasetEmpty, ColumnsMissing, ColumnNotText,
    AnswerUnknown, NoRowsLeft, and those of the template and the tokenizer.
    """
    check_template(config.template, tokenizer)
    where = ", ".join(map(str, files))
    nothing_held_out = config.model_copy(update={"eval_by": None})
    return _rows(read_files(files), nothing_held_out, tokenizer, where)


def hold_out(
    count: int, size: int | float, seed: int, groups: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out: `size` rows, or that fraction of all.

    With groups, whole groups are drawn until they have enough rows; of those exactly `size` are
    held out and the others are left out altogether, so that no group is on both sides.

    Raises: HeldOutTooLarge.
    """
    wanted = max(1, round(size * count)) if isinstance(size, float) else size
    drawn = _drawn_rows(wanted, seed, groups) if groups is not None else range(count)
    held = [drawn[i] for i in permutation(len(drawn), "held out", seed)][:wanted]
    apart = set(drawn) if groups is not None else set(held)
    training = [i for i in range(count) if i not in apart]
    if len(held) < wanted or not training:
        unit = "rows in whole groups" if groups is not None else "rows"
        raise HeldOutTooLarge(wanted=wanted, rows=count, unit=unit)
    return training, held


def _drawn_rows(wanted: int, seed: int, groups: Sequence[str]) -> list[int]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names = sorted(members)
    drawn: list[int] = []
    for i in permutation(len(names), "groups", seed):
        if len(drawn) >= wanted:
            break
        drawn += members[names[i]]
    return drawn


def _rows(
    records: Sequence[Record], config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Row]:
    said = zip(examples_of(records, config, where), groups_of(records, config, where), strict=True)
    texts, groups = [], []
    for example, group in said:
        if isinstance(example, str) and example:
            texts.append(("", example))
            groups.append(group)
        elif isinstance(example, Example) and example.response:
            texts.append(render(config.template, example, tokenizer))
            groups.append(group)
    tokenized = zip(tokenize(texts, config, tokenizer), groups, strict=True)
    rows = [replace(row, group=group) for row, group in tokenized if row is not None]
    if not rows:
        raise NoRowsLeft(where=where, read=len(records), length=config.max_length)
    if len(rows) < len(records):
        unusable = len(records) - len(rows)
        logger.info("%d of %d rows of %s cannot be used", unusable, len(records), where)
    return rows
