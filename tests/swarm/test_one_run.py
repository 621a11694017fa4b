"""One whole run by real processes: bootstrap, three trainers and an aggregator, looked at from many
sides."""

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from p2pllm.config.load import load_run
from p2pllm.journal import Row
from tests.swarm.peer import LOADED, Peer, wait_until
from tests.swarm.processes import LOOPBACK, TINY, Processes, run

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

ROUNDS = 4
# Few shards, so that trainers which start together often claim the same one and have to sort that
# out; and rounds so short that nobody comes to the end of a shard.
SETTINGS = (f"rounds={ROUNDS}", "training.local.steps=50", "data.shards=4", "averaging.min_peers=3")
ON_THIS_MACHINE = ("--host-maddrs", LOOPBACK, "--threads", "1")


@dataclass(frozen=True)
class Played:
    """The run, after it has ended."""

    door: Peer
    trainers: list[Peer]
    judge: Peer
    status: dict[str, Any]  # what `p2pllm status --json` said during the run
    table: str  # what `p2pllm status` showed

    @property
    def members(self) -> list[Peer]:
        return [*self.trainers, self.judge]

    @property
    def commits(self) -> list[Row]:
        return [row for peer in self.trainers for row in peer.events("round_committed")]


@pytest.fixture(scope="module")
def played(shared_processes: Processes) -> Played:
    peers = shared_processes
    door = peers.bootstrap(*SETTINGS)
    pasted = {line.split()[1]: line.split()[1:] for line in invitations(door)}
    judge = peers.start("judge", [*pasted["aggregate"], *ON_THIS_MACHINE])
    trainers = [
        peers.start(name, [*pasted["join"], *ON_THIS_MACHINE]) for name in ("ann", "bob", "cat")
    ]
    judge.wait_for("evaluated", LOADED, round=0)
    env = {"P2PLLM_INITIAL_PEERS": door.address}
    code, printed, letter = run("status", "--json", cwd=peers.folder, env=env)
    assert code == 0, letter
    code, table, letter = run("status", cwd=peers.folder, env=env)
    assert code == 0, letter
    for peer in (*trainers, judge):
        peer.finish(LOADED)
    return Played(door, trainers, judge, json.loads(printed), table)


def test_the_adapter_is_the_same_everywhere_and_is_the_one_in_final(played):
    digests = {peer.name: peer.events("finished")[0]["digest"] for peer in played.members}
    digests |= {f"{p.name}'s final": digest_of_tensors(p.home / "final") for p in played.members}
    assert len(set(digests.values())) == 1, digests
    [first] = {row["digest"] for row in played.judge.events("evaluated", round=0)}
    assert first not in digests.values()


def test_every_round_ends_with_one_digest_on_all_trainers(played):
    for round in range(ROUNDS):
        commits = [row for row in played.commits if row["round"] == round]
        assert len(commits) == 3
        assert len({row["digest"] for row in commits}) == 1
        assert all(sorted(row["peers"]) == ["ann", "bob", "cat"] for row in commits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_the_final_adapter_loads_in_peft_and_has_the_loss_that_was_announced(played):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from p2pllm.data.corpus import load_corpus
    from p2pllm.data.tokens import IGNORED
    from p2pllm.model.pretrained import load_tokenizer, locate

    torch.set_num_threads(1)
    config = load_run(TINY, SETTINGS)
    folder = locate(config.model, config.seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, played.judge.home / "final").eval()
    corpus = load_corpus(config.data, load_tokenizer(folder), config.seed)
    total, counted = 0.0, 0
    for row in corpus.held_out[: config.evaluation.max_rows]:
        with torch.no_grad():
            logits = tuned(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        loss = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum"
        )
        total, counted = total + float(loss), counted + int((labels != IGNORED).sum())
    [announced] = played.judge.events("evaluated", round=ROUNDS)
    assert total / counted == pytest.approx(announced["loss"], rel=1e-4)


def test_the_base_model_and_the_last_round_were_evaluated(played):
    losses = {row["round"]: row["loss"] for row in played.judge.events("evaluated")}
    assert {0, ROUNDS} <= set(losses)
    assert losses[ROUNDS] < losses[0]


def test_the_aggregator_reports_the_aggregation_error(played):
    reports = {row["round"]: row for row in played.judge.events("aggregation_measured")}
    assert reports.keys() <= set(range(1, ROUNDS + 1))  # it may have been busy with an evaluation
    for row in reports.values():
        assert 0 < row["error"] < 1
        assert row["members"] == 3
    assert reports[ROUNDS]["peers"] == ["ann", "bob", "cat"]


def test_trainers_see_the_results_of_the_designated_aggregator(played):
    announced = {row["round"]: row["loss"] for row in played.judge.events("evaluated")}
    for trainer in played.trainers:
        seen = {row["round"]: row["loss"] for row in trainer.events("evaluation_seen")}
        assert seen.items() <= announced.items()
        assert 0 in seen


def test_trainers_work_on_disjoint_shards(played):
    last = {peer.name: peer.events("shard_claimed")[-1]["shard"] for peer in played.trainers}
    assert len(set(last.values())) == 3, last


def test_metrics_say_where_the_time_and_the_bytes_went(played):
    for row in played.commits:
        assert 0 < row["loss"] < 10
        assert row["samples"] == 100
        assert row["tokens_per_second"] > 0
        assert row["seconds_training"] > 0
        assert 0 <= row["seconds_waiting"] < 60
        assert 0 < row["seconds_averaging"] < 10
        assert row["bytes_sent"] > 2000
        assert row["bytes_received"] > 2000


def test_every_peer_of_a_round_is_in_its_ledger(played):
    for trainer in played.trainers:
        rows = [row for row in trainer.ledger if row["event"] == "round_committed"]
        assert [row["round"] for row in rows] == list(range(ROUNDS))
        assert all(row["left_out"] == {} for row in rows)


def test_identity_keys_are_readable_by_their_owner_only(played):
    for peer in (played.door, *played.members):
        assert stat.S_IMODE(peer.key.stat().st_mode) == 0o600


def test_the_aggregator_keeps_the_newest_checkpoints_and_points_to_the_final_one(played):
    home = played.judge.home
    kept = sorted(path.name for path in (home / "checkpoints").iterdir())
    assert kept[-1] == f"round-{ROUNDS}"
    assert len(kept) <= 3
    facts = json.loads((home / "latest" / "round.json").read_text())
    assert facts["digest"] == digest_of_tensors(home / "final")
    assert {result["round"] for result in facts["results"]} >= {0, ROUNDS}


def test_status_lists_everybody(played):
    names = {peer["name"]: peer["role"] for peer in played.status["peers"]}
    assert names == {
        "door": "bootstrap",
        "ann": "trainer",
        "bob": "trainer",
        "cat": "trainer",
        "judge": "aggregator",
    }


def test_status_shows_a_table_of_everybody(played):
    assert all(peer.name in played.table for peer in (played.door, *played.members))


def invitations(door: Peer) -> list[str]:
    """The lines that a bootstrap peer prints for others to paste."""
    lines = wait_until(lambda: re.findall(r"^ +(p2pllm .*)$", door.printed, re.M), "invitations")
    assert len(lines) == 2
    return lines


def digest_of_tensors(folder: Path) -> str:
    """The little-endian float32 values of each A, then each B, by name: sha256 over the sha256 of
    every 64 KiB."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    names = sorted(tensors, key=lambda name: (".lora_B." in name, name))
    values = b"".join(tensors[name].astype("<f4").tobytes() for name in names)
    leaves = [values[at : at + 65_536] for at in range(0, len(values), 65_536)]
    return hashlib.sha256(b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)).hexdigest()
