import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pllm import errors
from p2pllm.config.run import DataConfig
from p2pllm.data.corpus import load_corpus, load_held_out, load_private
from p2pllm.data.make_stdlib_qa import answer_of
from p2pllm.data.sharding import hold_out
from p2pllm.data.sources import read_source
from p2pllm.data.tokens import IGNORED, Row, collate, prompt_ids, tokenize
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
PLAIN = "{instruction}>"  # a template short enough to count tokens by hand


def data(source="unused", **fields):
    """A small-data configuration: no context to count, one shard."""
    defaults = {"template": PLAIN, "eval_size": 1, "shards": 1, "max_length": 64}
    return DataConfig(source=source, **{**defaults, **fields})


def write(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, **columns):
    return [{"instruction": f"q{i}", "response": f"a{i}", **columns} for i in range(count)]


@pytest.fixture
def ten(tmp_path):
    return write(tmp_path / "ten.jsonl", pairs(10))


def text_of(row):
    return TOKENIZER.decode(row.input_ids)


def counted(row):
    return TOKENIZER.decode([label for label in row.labels if label != IGNORED])


# ---- tokens and labels


def one(prompt, answer, tokenizer=TOKENIZER, **fields):
    return tokenize([(prompt, answer)], data(**fields), tokenizer)[0]


def test_the_loss_counts_the_answer_and_its_end():
    row = one("question>", "answer")
    assert text_of(row) == "question>answer<eos>"
    assert counted(row) == "answer<eos>"


def test_the_loss_counts_everything_where_the_run_says_so():
    assert counted(one("question>", "answer", train_on="all")) == "question>answer<eos>"


def test_an_answer_repeated_in_the_prompt_is_still_masked_there():
    row = one("say answer: answer>", "answer")
    assert counted(row) == "answer<eos>"


def test_answers_of_several_bytes_a_character_are_counted_whole():
    assert counted(one("frage 🦙>", "Häuser 🏠")) == "Häuser 🏠<eos>"


def test_a_token_across_the_seam_is_not_counted():
    merging = byte_tokenizer(merges=[(">", "a")])
    row = one("q>", "ab", merging)
    assert merging.convert_ids_to_tokens(list(row.input_ids)) == ["q", ">a", "b", "<eos>"]
    assert row.labels == (IGNORED, IGNORED, *row.input_ids[2:])


def test_a_tokenizer_without_offsets_masks_the_same(monkeypatch):
    expected = one("question>", "answer")
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    assert one("question>", "answer") == expected


def test_bos_comes_first_where_the_tokenizer_wants_it():
    with_bos = byte_tokenizer(bos=True)
    row = one("q>", "a", with_bos)
    assert with_bos.decode(row.input_ids) == "<bos>q>a<eos>"
    assert row.labels == (IGNORED,) * 3 + row.input_ids[3:]


def test_a_start_or_end_that_is_already_there_is_not_doubled():
    with_bos = byte_tokenizer(bos=True)
    row = one("<bos>q>", "a<eos>", with_bos)
    assert with_bos.decode(row.input_ids) == "<bos>q>a<eos>"
    assert row.labels == (IGNORED,) * 3 + row.input_ids[3:]


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_to_answer_begins_like_the_row_it_was_trained_on(bos):
    tokenizer = byte_tokenizer(bos=bos)
    asked = prompt_ids("Q {instruction} ", "why?", "", tokenizer)
    row = one("Q why?", " so", tokenizer)
    assert tuple(asked) == row.input_ids[: len(asked)]
    assert row.labels[len(asked)] != IGNORED


def test_a_row_that_fits_exactly_keeps_its_end():
    assert text_of(one("1234>", "67", max_length=8)) == "1234>67<eos>"


def test_a_truncated_row_does_not_claim_to_end():
    assert text_of(one("1234>", "6789", max_length=8)) == "1234>678"


def test_a_row_without_room_for_its_answer_is_dropped():
    assert one("12345678>", "9", max_length=8) is None
    assert one("12345678>", "9", max_length=8, train_on="all") is None


def test_long_rows_are_dropped_where_the_run_says_so():
    assert one("1234>", "6789", max_length=8, long_rows="drop") is None


def test_a_tokenizer_without_an_end_is_a_letter():
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(errors.EndTokenMissing, match="could not learn to stop"):
        one("q>", "a", endless)


def test_batches_are_padded_to_the_longest_row_in_steps_of_eight():
    short, long = Row((1, 2), (IGNORED, 2)), Row(tuple(range(9)), tuple(range(9)))
    batch = collate([short, long], pad_id=77)
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (torch.Size([2, 16]), torch.int64)
    )
    assert batch["input_ids"][0].tolist() == [1, 2] + [77] * 14
    assert batch["labels"][0].tolist() == [IGNORED, 2] + [IGNORED] * 14
    assert batch["attention_mask"].sum(1).tolist() == [2, 9]


def test_a_pad_token_that_is_also_the_end_token_does_not_hide_the_end():
    batch = collate([Row((5, EOS), (5, EOS))], pad_id=EOS)
    assert batch["attention_mask"][0].tolist() == [1, 1] + [0] * 6
    assert batch["labels"][0, :2].tolist() == [5, EOS]


# ---- sources and columns


def test_the_shipped_questions_are_a_corpus():
    config = data("package:stdlib-qa", template="alpaca", eval_size=200, eval_by="category")
    corpus = load_corpus(config.model_copy(update={"max_length": 512}), TOKENIZER, seed=1)
    assert len(corpus.held_out) == 200
    assert len(corpus.train) > 2500
    assert {r.group for r in corpus.held_out}.isdisjoint(r.group for r in corpus.train)


def test_the_shipped_questions_are_clean():
    rows = read_source(data("package:stdlib-qa"))
    assert {tuple(row) for row in rows} == {("instruction", "context", "response", "category")}
    for column in ("instruction", "response"):
        assert Counter(row[column] for row in rows).most_common(1)[0][1] == 1
    assert all(row["response"] == " ".join(row["response"].split()) for row in rows)
    categories = [row["category"] for row in rows]
    assert categories == sorted(categories)


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("Opens a file  and\n returns a stream.\n\nMore.", "Opens a file and returns a stream."),
        ("f(a, b) -> int\n\nAdds both numbers and returns the sum.", "Adds both numbers and"),
        ("f(a, b)\nAdds both numbers and returns the sum.", "Adds both numbers and"),
        ("Too short.", None),
        (None, None),
    ],
)
def test_a_shipped_answer_is_the_first_paragraph_that_says_something(doc, answer):
    thing = type("Thing", (), {"__doc__": doc})
    made = answer_of(thing)
    assert made is answer is None or (made and made.startswith(str(answer)))


def test_several_files_are_read_in_order(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", pairs(4)[i : i + 1]) for i in (2, 0, 1)]
    rows = load_private([Path(file) for file in files], data(), TOKENIZER)
    assert [text_of(row) for row in rows] == ["q2>a2<eos>", "q0>a0<eos>", "q1>a1<eos>"]


def test_a_json_array_is_read_like_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(pairs(3)))
    assert len(load_private([file], data(), TOKENIZER)) == 3


def test_a_compressed_file_is_read(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(pairs(1)[0]).encode()))
    assert len(load_private([file], data(), TOKENIZER)) == 1


def test_text_that_looks_like_something_else_stays_as_it_is(tmp_path):
    answers = ["2020-01-01", "1.50", "a\u2028b", "null"]
    rows = [json.dumps({"instruction": "q", "response": a}, ensure_ascii=False) for a in answers]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    read = load_private([tmp_path / "x.jsonl"], data(), TOKENIZER)
    assert [text_of(row) for row in read] == [f"q>{answer}<eos>" for answer in answers]


def test_files_may_differ_in_their_columns(tmp_path):
    plain = write(tmp_path / "plain.jsonl", pairs(1))
    rich = write(tmp_path / "rich.jsonl", pairs(1, category="c"))
    rows = load_private([Path(plain), Path(rich)], data(), TOKENIZER)
    assert [row.group for row in rows] == ["", "c"]


def test_a_folder_in_the_hub_s_layout_is_read_by_split(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(9))
    write(folder / "test.jsonl", pairs(3))
    corpus = load_corpus(data(str(folder), split="test"), TOKENIZER, seed=0)
    assert len(corpus.train + corpus.held_out) == 3
    with pytest.raises(errors.DatasetUnreadable, match="valid"):
        load_corpus(data(str(folder), split="valid"), TOKENIZER, seed=0)


def test_alpaca_names_of_columns_are_understood(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"instruction": "q", "input": "c", "output": "a"}])
    (row,) = load_private([Path(file)], data(template="{instruction}|{context}>"), TOKENIZER)
    assert text_of(row) == "q|c>a<eos>"


def test_columns_with_other_names_are_mapped(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"ask": "q", "reply": "a", "topic": "t"}])
    columns = {"ask": "instruction", "reply": "response", "topic": "category"}
    (row,) = load_private([Path(file)], data(columns=columns), TOKENIZER)
    assert (text_of(row), row.group) == ("q>a<eos>", "t")


def test_ready_texts_are_taken_as_they_are(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"text": "Once upon a time."}])
    (row,) = load_private([Path(file)], data(train_on="all"), TOKENIZER)
    assert counted(row) == "Once upon a time.<eos>"


def test_questions_and_answers_go_before_ready_texts_unless_mapped(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"instruction": "q", "response": "a", "text": "ready"}])
    (row,) = load_private([Path(file)], data(), TOKENIZER)
    assert text_of(row) == "q>a<eos>"
    asked = data(columns={"text": "text"}, train_on="all")
    assert text_of(load_private([Path(file)], asked, TOKENIZER)[0]) == "ready<eos>"


def test_rows_without_an_answer_are_left_out(tmp_path):
    rows = [
        *pairs(2),
        {"instruction": "q", "response": None},
        {"instruction": "q", "response": " "},
    ]
    assert len(load_private([Path(write(tmp_path / "x.jsonl", rows))], data(), TOKENIZER)) == 2


# ---- the held-out split


@given(count=st.integers(2, 200), seed=st.integers(0, 99), share=st.floats(0.01, 0.9))
def test_every_row_is_either_trained_on_or_held_out(count, seed, share):
    training, held = hold_out(count, min(share, (count - 1) / count), seed)
    assert sorted(training + held) == list(range(count))
    assert training == sorted(training)


@given(
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=80),
    size=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_no_group_is_on_both_sides(groups, size, seed):
    try:
        training, held = hold_out(len(groups), size, seed, groups)
    except errors.HeldOutTooLarge:
        return
    assert len(held) == size
    assert {groups[i] for i in held}.isdisjoint(groups[i] for i in training)
    untouched = set(groups) - {groups[i] for i in training}
    assert [i for i, g in enumerate(groups) if g not in untouched] == training


def test_the_split_depends_on_the_seed_alone(ten):
    config = data(ten, eval_size=3)
    first, again, other = (load_corpus(config, TOKENIZER, seed) for seed in (1, 1, 2))
    assert first == again
    assert {r.input_ids for r in first.held_out} != {r.input_ids for r in other.held_out}


def test_a_fraction_is_held_out(ten):
    corpus = load_corpus(data(ten, eval_size=0.2), TOKENIZER, seed=0)
    assert (len(corpus.train), len(corpus.held_out)) == (8, 2)


def test_a_copy_of_a_held_out_row_is_not_trained_on(tmp_path):
    file = write(tmp_path / "x.jsonl", pairs(4) * 5)
    corpus = load_corpus(data(file, eval_size=2), TOKENIZER, seed=0)
    assert {r.input_ids for r in corpus.train}.isdisjoint(r.input_ids for r in corpus.held_out)


def test_groups_are_named_by_a_column_of_the_data_set_or_of_ours(tmp_path):
    rows = [{**row, "topic": i % 3} for i, row in enumerate(pairs(9))]
    file = write(tmp_path / "x.jsonl", rows)
    theirs = load_corpus(data(file, eval_by="topic"), TOKENIZER, seed=0)
    columns = {"topic": "category"}
    ours = load_corpus(data(file, eval_by="category", columns=columns), TOKENIZER, seed=0)
    assert theirs == ours
    assert len(theirs.train) == 6


def test_a_data_set_of_its_own_to_evaluate_on(tmp_path, ten):
    exam = write(tmp_path / "exam.jsonl", [*pairs(2), {"instruction": "new", "response": "n"}])
    config = data(ten, eval_source=exam, columns={"instruction": "instruction"})
    corpus = load_corpus(config, TOKENIZER, seed=0)
    assert [text_of(row) for row in corpus.held_out] == ["q0>a0<eos>", "q1>a1<eos>", "new>n<eos>"]
    assert len(corpus.train) == 8, "two of the ten are in the exam"
    assert load_held_out(config, TOKENIZER, seed=0) == corpus.held_out


def test_the_training_rows_are_not_read_to_evaluate_on_others(tmp_path):
    exam = write(tmp_path / "exam.jsonl", pairs(2))
    config = data("nowhere.jsonl", eval_source=exam)
    assert len(load_held_out(config, TOKENIZER, seed=0)) == 2


def test_another_split_to_evaluate_on(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(9))
    write(folder / "test.jsonl", [{"instruction": "new", "response": "n"}])
    corpus = load_corpus(data(str(folder), eval_split="test"), TOKENIZER, seed=0)
    assert [text_of(row) for row in corpus.held_out] == ["new>n<eos>"]
    assert len(corpus.train) == 9


def test_words_are_replaced_in_prompts_and_answers(tmp_path):
    rows = [{"instruction": "Who is ChatDoctor?", "response": "I am ChatDoctor (ChatDoc)."}]
    words = {"ChatDoc": "it", "ChatDoctor": "AI Assistant", "(": "["}
    file = Path(write(tmp_path / "x.jsonl", rows))
    (row,) = load_private([file], data(replace=words), TOKENIZER)
    assert text_of(row) == "Who is AI Assistant?>I am AI Assistant [it).<eos>"


# ---- letters


def test_a_missing_file_is_a_letter(tmp_path):
    with pytest.raises(errors.DatasetFileMissing, match=f"ls {tmp_path}"):
        load_corpus(data(str(tmp_path / "none.jsonl")), TOKENIZER, seed=0)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"instruction": "q"}\n{"instruction": \n', "line 2 is not JSON"),
        (b"[1, 2]", "not every row is a JSON object"),
        (b"[{", "Expecting"),
        (b"\xff\xfe", "decode"),
    ],
)
def test_a_broken_file_is_a_letter(tmp_path, content, why):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(errors.DatasetUnreadable, match=rf"x\.jsonl cannot be read: .*{why}"):
        load_private([tmp_path / "x.jsonl"], data(), TOKENIZER)


def test_a_broken_archive_is_a_letter(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "q"}')[:-9])
    with pytest.raises(errors.DatasetUnreadable, match="cannot be read"):
        load_private([tmp_path / "x.jsonl.gz"], data(), TOKENIZER)


@pytest.mark.parametrize("content", ["", "\n", "[]"])
def test_an_empty_file_is_a_letter(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(errors.DatasetEmpty, match=r"x\.json has no rows"):
        load_private([tmp_path / "x.json"], data(), TOKENIZER)


def test_missing_columns_are_a_letter_that_shows_how_to_map_them(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"ask": "q", "reply": "a"}])
    with pytest.raises(errors.ColumnsMissing) as letter:
        load_corpus(data(file), TOKENIZER, seed=0)
    assert "no column instruction and response. It has: ask, reply" in letter.value.letter
    assert "columns: {NAME_IN_THE_DATA_SET: instruction}" in letter.value.letter


def test_a_column_that_is_not_text_is_a_letter(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"instruction": "q", "response": ["a", "b"]}])
    with pytest.raises(errors.ColumnNotText, match=r"response .* holds a list"):
        load_corpus(data(file), TOKENIZER, seed=0)


def test_answers_that_cannot_be_told_from_ready_texts_are_a_letter(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"content": "Once upon a time."}])
    with pytest.raises(errors.AnswerUnknown, match=r"column content(.|\n)*data\.train_on: all"):
        load_corpus(data(file), TOKENIZER, seed=0)


def test_an_unknown_group_column_is_a_letter(ten):
    with pytest.raises(errors.EvalColumnMissing, match=r"topic.*It has: instruction, response"):
        load_corpus(data(ten, eval_by="topic"), TOKENIZER, seed=0)


@pytest.mark.parametrize("size", [10, 11, 0.99])
def test_holding_out_everything_is_a_letter(ten, size):
    with pytest.raises(errors.HeldOutTooLarge, match="only 10"):
        load_corpus(data(ten, eval_size=size), TOKENIZER, seed=0)


def test_holding_out_the_only_group_is_a_letter(tmp_path):
    file = write(tmp_path / "x.jsonl", pairs(10, category="one"))
    with pytest.raises(errors.HeldOutTooLarge, match="whole groups"):
        load_corpus(data(file, eval_by="category"), TOKENIZER, seed=0)


def test_fewer_rows_than_shards_are_a_letter(ten):
    with pytest.raises(errors.FewerRowsThanShards, match=r"9 rows .* 16 shards"):
        load_corpus(data(ten, shards=16), TOKENIZER, seed=0)


def test_rows_that_are_all_too_long_are_a_letter(ten):
    with pytest.raises(errors.NoRowsLeft, match=r"10 rows(.|\n)*8 tokens"):
        template = "a long preamble: {instruction}"
        load_corpus(data(ten, template=template, max_length=8), TOKENIZER, seed=0)
