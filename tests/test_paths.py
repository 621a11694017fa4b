"""Placeholders in a peer's paths."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pllm.config.load import load_peer
from p2pllm.config.paths import PLACEHOLDERS, filled, folder_for, named_in, root_of
from p2pllm.config.run import DataConfig, ModelConfig, RunConfig
from p2pllm.errors import SettingsInvalid
from p2pllm.roles.entry import Seat
from p2pllm.roles.leases import open_rows
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from tests.byte_tokenizer import byte_tokenizer

VALUES = {"run_id": "demo-1", "run": "demo", "peer": "ann", "shard": 3, "shards": 16}


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("runs", "runs/demo-1/ann"),
        (".logs/{run_id}", ".logs/demo-1/ann"),
        ("{peer}/{run}", "ann/demo"),
        ("x/{peer}", "x/ann/demo-1"),
        ("a/{shard}of{shards}", "a/3of16/demo-1/ann"),
    ],
)
def test_a_peer_writes_where_its_output_says(output, folder):
    assert folder_for(Path(output), VALUES) == Path(folder)


def test_a_number_may_have_leading_zeros():
    assert filled(Path("shard-{shard:03}.jsonl"), VALUES) == Path("shard-003.jsonl")
    assert filled(Path("{shard:02}-{shards}"), VALUES) == Path("03-16")


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert filled(Path("~/{run}"), VALUES) == Path("/home/ann/demo")
    assert root_of(Path("~/runs/{run}/x")) == Path("/home/ann/runs")


def test_keys_lie_in_the_part_that_all_runs_share():
    assert root_of(Path("runs")) == Path("runs")
    assert root_of(Path("runs/{run_id}/{peer}")) == Path("runs")
    assert root_of(Path("{run_id}")) == Path()


@pytest.mark.parametrize(
    "path", ["x/{rank}", "x/{}", "x/{run", "x/{run.name}", "{shard:x}", "{shard:2}"]
)
@pytest.mark.parametrize("key", ["output", "data"])
def test_an_unknown_placeholder_is_a_letter_that_names_those_there_are(key, path):
    value = json.dumps([path] if key == "data" else path)
    with pytest.raises(SettingsInvalid) as letter:
        load_peer(None, [f"{key}={value}", "shard=1"])
    assert f"--set: {key}: " in letter.value.letter
    assert all(f"{{{name}}}" in letter.value.letter for name in PLACEHOLDERS)


def test_a_shard_in_a_path_needs_a_number():
    with pytest.raises(SettingsInvalid, match="--set shard=0"):
        load_peer(None, ["data=['{shard}.jsonl']"])
    assert load_peer(None, ["data=['{shard}.jsonl']", "shard=0"]).shard == 0


def test_plain_paths_have_none():
    assert named_in(Path("runs/x")) == set()


def test_a_trainer_reads_the_private_file_that_its_shard_names(tmp_path):
    for number in range(3):
        row = {"instruction": f"q{number}", "response": "a"}
        (tmp_path / f"shard-{number:03}.jsonl").write_text(json.dumps(row))
    config = load_peer(None, [f"data=['{tmp_path}/shard-{{shard:03}}.jsonl']", "shard=2"])
    data = DataConfig(source="none", template="{instruction}>")
    run = RunConfig(name="r", model=ModelConfig(name="none"), data=data)
    manifest = Manifest.found(run, Identity.ephemeral())
    seat = Seat(cast(Any, SimpleNamespace()), manifest, config, "ann", tmp_path, cast(Any, None))
    tokenizer = byte_tokenizer()
    _, rows = open_rows(seat, tokenizer)
    [read] = rows.source.next_batch(1)
    assert tokenizer.decode(list(read.input_ids)) == "q2>a<eos>"
