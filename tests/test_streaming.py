"""Data sets too large to hold: the same rows, never all at once."""

import json
from itertools import islice

import pytest

from p2pllm import errors
from p2pllm.config.run import DataConfig, LocalEpoch, ModelConfig, RunConfig, TrainingConfig
from p2pllm.coverage import Span
from p2pllm.data import sources
from p2pllm.data.corpus import load_held_out
from p2pllm.data.rows import LeasedRows
from p2pllm.data.streaming import StreamedRows
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def streamed(source, **fields):
    defaults = {"template": "{instruction}>", "eval_size": 2, "shards": 3, "max_length": 64}
    return DataConfig(source=str(source), streaming=True, **{**defaults, **fields})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count):
    return [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(count)]


def names(rows):
    """Of q7>a7<eos>: 7."""
    return [row and int(str(TOKENIZER.decode(row.input_ids)).split(">")[0][1:]) for row in rows]


@pytest.fixture
def twenty(tmp_path):
    return write(tmp_path / "twenty.jsonl", pairs(20))


def test_the_first_rows_are_held_out_and_the_others_dealt_out_by_their_number(twenty):
    config = streamed(twenty)
    assert names(load_held_out(config, TOKENIZER, 0)) == [0, 1]
    parts = StreamedRows(config, TOKENIZER, 0)
    shards = [names(parts.read(shard, 0)) for shard in range(3)]
    assert shards == [list(range(2 + shard, 20, 3)) for shard in range(3)]


def test_reading_goes_on_at_any_position_and_starts_over_at_the_end(twenty):
    config = streamed(twenty)  # six rows in each shard
    for parts in (StreamedRows(config, TOKENIZER, 0) for _ in range(2)):
        assert names(parts.read(1, 4)) == [15, 18]
        assert names(parts.read(1, 6)) == [3, 6, 9, 12, 15, 18]
    newcomer = StreamedRows(config, TOKENIZER, 0)  # does not know how long the shard is
    assert names(newcomer.read(1, 16)) == [15, 18]
    assert newcomer.size(1) == 6


def test_a_position_at_the_end_of_an_unknown_shard_is_its_beginning(twenty):
    rows = LeasedRows(StreamedRows(streamed(twenty), TOKENIZER, 0), lambda: 1)
    rows.settle((0, 6, 0))  # as taken over from one that went through it once
    assert names(rows.next_batch(2)) == [3, 6]


def test_a_trainer_that_streams_goes_from_shard_to_shard(twenty):
    order = iter([0, 2])
    rows = LeasedRows(StreamedRows(streamed(twenty), TOKENIZER, 0), lambda: next(order))
    assert names(rows.next_batch(4)) == [2, 5, 8, 11]
    assert names(rows.next_batch(4)) == [14, 17, 4, 7]
    assert rows.take() == (Span(0, 0, 6), Span(2, 0, 2))


def test_rows_of_no_use_count_in_positions_and_not_in_batches(tmp_path):
    rows = pairs(12)
    rows[4]["response"] = ""
    rows[6] = rows[0]  # says the same as a held-out row
    file = write(tmp_path / "x.jsonl", rows)
    parts = StreamedRows(streamed(file, shards=1), TOKENIZER, 0)
    assert names(parts.read(0, 0)) == [2, 3, None, 5, None, 7, 8, 9, 10, 11]
    leased = LeasedRows(parts, lambda: 0)
    assert names(leased.next_batch(4)) == [2, 3, 5, 7]
    assert leased.take() == (Span(0, 0, 6),)


def test_only_a_little_is_read_at_a_time(tmp_path, monkeypatch):
    file = write(tmp_path / "x.jsonl", pairs(1000))
    read = []
    parse = sources._parse

    def counting(line, number):
        read.append(number)
        return parse(line, number)

    monkeypatch.setattr(sources, "_parse", counting)
    parts = StreamedRows(streamed(file, shards=2), TOKENIZER, 0)
    read.clear()
    assert names(islice(parts.read(0, 0), 3)) == [2, 4, 6]
    assert len(read) < 200


def test_a_data_set_in_the_hub_s_layout_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(20))
    write(folder / "test.jsonl", pairs(3))
    config = streamed(folder, eval_split="test")
    assert names(load_held_out(config, TOKENIZER, 0)) == [0, 1]
    parts = StreamedRows(config, TOKENIZER, 0)
    assert names(parts.read(0, 0)) == [None, 3, 6, 9, 12, 15, 18]
    assert names(parts.read(1, 2)) == [7, 10, 13, 16, 19]


def test_several_files_are_streamed_one_after_the_other(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", pairs(20)[i * 10 : i * 10 + 10]) for i in (0, 1)]
    config = streamed("x", shards=1).model_copy(update={"source": tuple(map(str, files))})
    assert names(StreamedRows(config, TOKENIZER, 0).read(0, 0)) == list(range(2, 20))


# ---- letters


@pytest.mark.parametrize(("line", "why"), [("[1]", "not a JSON object"), ("{", "is not JSON")])
def test_a_broken_line_is_a_letter_that_names_it(tmp_path, line, why):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(4)) + line)
    parts = StreamedRows(streamed(file, shards=1), TOKENIZER, 0)
    with pytest.raises(errors.DatasetUnreadable, match=f"line 5 .*{why}"):
        list(parts.read(0, 0))


def test_shards_without_a_row_of_use_are_a_letter(tmp_path):
    rows = pairs(6)
    for row in rows[2:]:
        row["response"] = ""
    parts = StreamedRows(streamed(write(tmp_path / "x.jsonl", rows)), TOKENIZER, 0)
    shards = iter(range(100))
    with pytest.raises(errors.ShardUnusable, match=r"data\.max_length"):
        LeasedRows(parts, lambda: next(shards) % 3).next_batch(1)


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"eval_by": "category"}, "eval_by"), ({"eval_size": 0.1}, "number of rows")],
)
def test_what_cannot_go_with_streaming_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        streamed("x", **fields)


def test_streaming_needs_steps_or_seconds():
    def run(**local):
        training = TrainingConfig(local=LocalEpoch(**local))
        model = ModelConfig(name="none")
        return RunConfig(name="r", model=model, data=streamed("x"), training=training)

    assert run(seconds=5).data.streaming
    with pytest.raises(ValueError, match=r"training\.local\.steps or training\.local\.seconds"):
        run(epochs=1)
