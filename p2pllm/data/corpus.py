"""The rows of a run: read, put into the template, tokenised, and some of them held out.

Every peer computes the same rows from the run's configuration and seed. Which of the training
rows a peer works on is decided in `sharding.py`; data sets too large to hold are in `streaming.py`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import DataConfig
from p2pllm.data.sharding import hold_out
from p2pllm.data.sources import (
    Record,
    examples_of,
    groups_of,
    name_of,
    read_files,
    read_source,
    stream_source,
)
from p2pllm.data.template import Example, check_template, render
from p2pllm.data.tokens import Row, tokenize
from p2pllm.errors import FewerRowsThanShards, NoRowsLeft

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows to train on, in the data set's order, and rows to evaluate on, in a shuffled order (so
    that the first n of them are a fair sample) unless they are a data set of their own."""

    train: list[Row]
    held_out: list[Row]


def load_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """The run's data set, in memory. The same for every peer: depends on the arguments alone.

    A row that says the same as a held-out row is not trained on.

    Raises: any letter in `p2pllm.errors.data`.
    """
    check_template(config.template, tokenizer)
    where = name_of(config)
    rows = _rows(read_source(config), config, tokenizer, where)
    if config.has_eval_set:
        candidates, held_out = rows, load_held_out(config, tokenizer, seed)
    else:
        groups = [row.group for row in rows] if config.eval_by else None
        training, holding = hold_out(len(rows), config.eval_size, seed, groups)
        candidates, held_out = [rows[i] for i in training], [rows[i] for i in holding]
    seen = {row.input_ids for row in held_out}
    train = [row for row in candidates if row.input_ids not in seen]
    if len(train) < config.shards:
        raise FewerRowsThanShards(where=where, rows=len(train), shards=config.shards)
    return Corpus(train, held_out)


def load_held_out(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Row]:
    """The rows to evaluate on; the others are read only where that cannot be avoided.

    Raises: any letter in `p2pllm.errors.data`.
    """
    if not config.has_eval_set and not config.streaming:
        return load_corpus(config, tokenizer, seed).held_out
    check_template(config.template, tokenizer)
    source = evaluated(config)
    if not config.streaming:
        return _rows(read_source(source), source, tokenizer, name_of(source))
    size = int(config.eval_size)  # `DataConfig` refuses a fraction
    return _rows(list(islice(stream_source(source), size)), source, tokenizer, name_of(source))


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


def evaluated(config: DataConfig) -> DataConfig:
    """The data set to evaluate on, as if it were one to train on."""
    changes: dict[str, object] = {"eval_by": None}
    if config.eval_split is not None:
        changes["split"] = config.eval_split
    if config.eval_source is not None:  # another data set has other versions and configurations
        changes |= {"source": config.eval_source, "revision": None, "config_name": None}
    return config.model_copy(update=changes) if config.has_eval_set else config


def render_rows(
    records: Sequence[Record], config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Row | None]:
    """A row for each record; None where it has no answer, or is too long."""
    texts: list[tuple[str, str] | None] = []
    for example in examples_of(records, config, where):
        if isinstance(example, Example):
            text = render(config.template, example, tokenizer) if example.response else None
        else:
            text = ("", example) if example else None
        texts.append(text and _replaced(text, config.replace))
    tokenized = iter(tokenize([text for text in texts if text is not None], config, tokenizer))
    rows = [next(tokenized) if text is not None else None for text in texts]
    groups = groups_of(records, config, where)
    return [row and replace(row, group=group) for row, group in zip(rows, groups, strict=True)]


def _rows(
    records: Sequence[Record], config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Row]:
    rows = [row for row in render_rows(records, config, tokenizer, where) if row is not None]
    if not rows:
        raise NoRowsLeft(where=where, read=len(records), length=config.max_length)
    if len(rows) < len(records):
        unusable = len(records) - len(rows)
        logger.info("%d of %d rows of %s cannot be used", unusable, len(records), where)
    return rows


def _replaced(text: tuple[str, str], words: Mapping[str, str]) -> tuple[str, str]:
    """In one pass, the longest words first, so that the order of the words does not matter."""
    if not words:
        return text
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    prompt, answer = (re.sub(pattern, lambda found: words[found[0]], part) for part in text)
    return prompt, answer
