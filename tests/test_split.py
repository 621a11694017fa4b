"""`p2pllm data split`: parts for peers, the same every time, that say how they were made."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from p2pllm import errors
from p2pllm.cli import app
from p2pllm.cli_data import split_table
from p2pllm.config.run import DataConfig
from p2pllm.data.corpus import load_held_out, load_private
from p2pllm.data.split import SplitPlan, make_split, write_split
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
RUNNER = CliRunner()


def records(count, labels="abc"):
    return [
        {"instruction": f"q{i}", "response": f"a{i}", "category": labels[i % len(labels)]}
        for i in range(count)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


plans = st.builds(
    SplitPlan,
    peers=st.integers(1, 6),
    by=st.sampled_from([None, "category"]),
    alpha=st.sampled_from([0.01, 0.5, 100.0]),
    sizes_alpha=st.sampled_from([None, 0.01, 1.0]),
    seed=st.integers(0, 99),
    held_out=st.sampled_from([0, 5, 0.2]),
    held_out_by=st.sampled_from([None, "category"]),
)


@given(count=st.integers(24, 80), plan=plans)
def test_every_row_is_in_one_part_or_held_out_and_no_part_is_empty(count, plan):
    rows = records(count, "abcdef")
    split = make_split(rows, plan, "x")
    everywhere = [*chain(*split.parts), *split.held_out]
    assert len(everywhere) == len(set(everywhere))
    assert len(split.parts) == plan.peers
    assert all(split.parts)
    assert make_split(rows, plan, "x") == split
    if plan.held_out_by and plan.held_out:
        kept_out = {split.labels[i] for i in split.held_out}
        assert kept_out.isdisjoint(split.labels[i] for i in chain(*split.parts))
    else:
        assert sorted(everywhere) == list(range(count))


def test_without_a_skew_parts_are_alike():
    split = make_split(records(400, "ab"), SplitPlan(peers=4), "x")
    assert {len(part) for part in split.parts} == {100}
    assert all(30 < split.counts(part)["a"] < 70 for part in split.parts)


def test_a_small_alpha_makes_labels_unequal_and_a_large_one_does_not():
    def spread(alpha):
        split = make_split(records(900), SplitPlan(peers=3, by="category", alpha=alpha), "x")
        shares = [split.counts(part).get("a", 0) / 300 for part in split.parts]
        assert sum(shares) == pytest.approx(1)
        return max(shares) - min(shares)

    assert spread(0.05) > 0.5
    assert spread(1000.0) < 0.1


def test_sizes_may_be_unequal_and_labels_alike():
    split = make_split(records(900, "ab"), SplitPlan(peers=3, sizes_alpha=0.3, seed=1), "x")
    sizes = sorted(map(len, split.parts))
    assert sizes[-1] > 2 * sizes[0]
    biggest = max(split.parts, key=len)
    assert split.counts(biggest)["a"] / len(biggest) == pytest.approx(0.5, abs=0.1)


def test_a_split_is_the_same_on_every_machine():
    # Frozen: whoever makes the split again must get the same files.
    plan = SplitPlan(peers=3, by="category", alpha=0.5, seed=7)
    assert make_split(records(12), plan, "x").parts == [[0, 1, 3, 4, 6, 7, 9], [5, 10], [2, 8, 11]]


def test_a_copy_of_a_held_out_row_is_in_no_part():
    rows = records(20) * 2
    split = make_split(rows, SplitPlan(peers=2, held_out=6), "x")
    kept_out = {rows[i]["instruction"] for i in split.held_out}
    assert kept_out.isdisjoint(rows[i]["instruction"] for i in chain(*split.parts))


def test_a_written_split_says_how_it_was_made(tmp_path):
    source = written(tmp_path / "x.jsonl", records(30))
    plan = SplitPlan(peers=2, by="category", held_out=6)
    split = write_split(DataConfig(source=source), plan, tmp_path / "parts")
    facts = json.loads((tmp_path / "parts" / "split.json").read_text())
    assert (facts["source"], facts["rows"], facts["left_out"]) == (source, 30, 0)
    assert facts["plan"] == asdict(plan)
    assert [file["file"] for file in facts["files"]] == [
        "shard-000.jsonl",
        "shard-001.jsonl",
        "held-out.jsonl",
    ]
    for file, rows in zip(facts["files"], [*split.parts, split.held_out], strict=True):
        content = (tmp_path / "parts" / file["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert [json.loads(line) for line in content.splitlines()] == [records(30)[i] for i in rows]
        assert file["labels"] == Counter(records(30)[i]["category"] for i in rows)
    write_split(DataConfig(source=source), plan, tmp_path / "again")
    names = sorted(file.name for file in (tmp_path / "parts").iterdir())
    for name in names:
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "parts" / name).read_bytes()


def test_peers_train_on_their_parts_and_never_on_what_is_held_out(tmp_path):
    plan = SplitPlan(peers=3, by="category", held_out=60, held_out_by="category")
    write_split(DataConfig(source="package:stdlib-qa"), plan, tmp_path / "parts")
    config = DataConfig(
        source="package:stdlib-qa", eval_source=str(tmp_path / "parts" / "held-out.jsonl")
    )
    held_out = load_held_out(config, TOKENIZER, 0)
    assert len(held_out) == 60
    files = sorted((tmp_path / "parts").glob("shard-*.jsonl"))
    parts = [load_private([file], config, TOKENIZER) for file in files]
    exam = {row.input_ids for row in held_out}
    trained = [row.input_ids for part in parts for row in part]
    assert len(trained) == len(set(trained)) > 2000
    assert exam.isdisjoint(trained)
    groups = {row.group for row in held_out}
    assert groups.isdisjoint(row.group for part in parts for row in part)


# ---- the command


def run(*args):
    return RUNNER.invoke(app, ["data", "split", *map(str, args)])


def test_the_command_prints_a_picture(tmp_path):
    source = written(tmp_path / "x.jsonl", records(90))
    out = tmp_path / "parts"
    shown = run(source, "--peers", 3, "--by", "category", "--held-out", 0.1, "-o", out)
    assert shown.exit_code == 0, shown.output
    for word in ("000", "001", "002", "held out", "█ ", "split.json", "--data", "eval_source"):
        assert word in shown.output
    assert len(list(out.glob("shard-*.jsonl"))) == 3


def test_bars_are_as_long_as_parts_have_rows():
    split = make_split(records(90), SplitPlan(peers=3, sizes_alpha=1.0, seed=2), "x")
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(split_table(split))
    lines = [line for line in captured.get().splitlines() if line.strip()[:3] in ("000", "001")]
    for line, part in zip(lines, split.parts, strict=False):
        drawn = sum(line.count(sign) for sign in "█▓▒")
        assert drawn == pytest.approx(48 * len(part) / max(map(len, split.parts)), abs=1)


def test_many_labels_are_summed_up():
    rows = [{**row, "category": f"kind {i % 20}"} for i, row in enumerate(records(100))]
    console = Console(width=150, no_color=True)
    with console.capture() as captured:
        console.print(split_table(make_split(rows, SplitPlan(peers=2), "x")))
    assert "13 others" in captured.get()


# ---- letters


@pytest.mark.parametrize(
    "plan", [SplitPlan(2, by="topic"), SplitPlan(2, held_out=2, held_out_by="topic")]
)
def test_a_missing_column_is_a_letter_that_names_those_there_are(plan):
    with pytest.raises(errors.LabelColumnMissing, match=r"topic. It has: instruction, response"):
        make_split(records(9), plan, "x")


def test_a_label_with_one_value_is_a_letter():
    with pytest.raises(errors.LabelColumnUniform, match="same category: 'a'"):
        make_split(records(9, "a"), SplitPlan(peers=2, by="category"), "x")


def test_more_peers_than_rows_are_a_letter():
    with pytest.raises(errors.SplitTooFine, match="3 rows, too few for 4 peers"):
        make_split(records(3), SplitPlan(peers=4), "x")


def test_a_folder_with_files_in_it_is_left_alone(tmp_path):
    source = written(tmp_path / "x.jsonl", records(9))
    with pytest.raises(errors.SplitExists, match="rm -r"):
        write_split(DataConfig(source=source), SplitPlan(peers=2), tmp_path)
    assert Path(source).exists()


def test_a_source_that_is_not_there_is_a_letter(tmp_path):
    result = run(tmp_path / "none.jsonl", "--peers", 2, "-o", tmp_path / "out")
    assert isinstance(result.exception, errors.DatasetFileMissing)
    assert not (tmp_path / "out").exists()
