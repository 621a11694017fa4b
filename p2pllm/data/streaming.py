"""Rows of data sets too large to hold: read while training, each trainer its own shard only.

Shard s has every row whose number, modulo the number of shards, is s. Rows come in the order of the
data set, and that is how everybody finds the place where another trainer left off; a data set that
is sorted should be shuffled first.
"""

from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import DataConfig
from p2pllm.data.corpus import load_held_out, render_rows
from p2pllm.data.sources import Record, name_of, stream_source
from p2pllm.data.template import check_template
from p2pllm.data.tokens import Row

_CHUNK = 64  # records that are tokenised together


class StreamedRows:
    """The parts of a streamed data set; see `rows.Parts`. Positions count unusable rows, too."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Reads the held-out rows, in order not to train on them.

        Raises: any letter in `p2pllm.errors.data`.
        """
        check_template(config.template, tokenizer)
        self._config, self._tokenizer = config, tokenizer
        self._seen = {row.input_ids for row in load_held_out(config, tokenizer, seed)}
        self._first = 0 if config.has_eval_set else int(config.eval_size)
        self._lengths: dict[int, int] = {}  # of the shards that have come to an end

    @property
    def count(self) -> int:
        return self._config.shards

    def size(self, shard: int) -> int:
        return self._lengths.get(shard, 0)

    def read(self, shard: int, position: int) -> Iterator[Row | None]:
        """Raises: the letters of reading and of the columns, while it is iterated."""
        length = self.size(shard) or self._length_before(shard, position)
        start = position % length if length else position
        records = self._records(shard, start)
        at = start
        while chunk := list(islice(records, _CHUNK)):
            for row in render_rows(chunk, self._config, self._tokenizer, name_of(self._config)):
                at += 1
                yield None if row is None or row.input_ids in self._seen else row
        self._lengths[shard] = at

    def _length_before(self, shard: int, position: int) -> int:
        """How many rows the shard has if it ends before this position, as it does when somebody
        else has gone through it before us; else 0."""
        passed = sum(1 for _ in islice(self._records(shard, 0), position)) if position else 0
        return passed if passed < position else 0

    def _records(self, shard: int, start: int) -> Iterator[Record]:
        skipped = self._first + shard + start * self.count
        return islice(stream_source(self._config, skipped), 0, None, self.count)
