"""Letters about runs: a swarm that has several, each with something wrong that a joiner meets."""

import json
from pathlib import Path

import pytest

from p2pllm.config.run import RandomInit
from p2pllm.model.random_init import random_model
from p2pllm.swarm.identity import Identity
from tests.swarm.peer import LOADED, wait_until
from tests.swarm.processes import LOOPBACK, TINY, Processes, run

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]


class Crossroads:
    """One swarm with four runs, and a way to take part in one of them that must fail."""

    def __init__(self, peers: Processes) -> None:
        self.peers = peers
        self.here, self.there = _two_bases(peers.folder)
        odd = peers.folder / "odd.jsonl"
        odd.write_text('{"question": "Why?", "answer": "Because."}\n')
        nobody = Identity.ephemeral().peer_id
        self.plain = peers.bootstrap(
            "name=plain", "model.name=base", "averaging.min_peers=2", f"--aggregator={nobody}"
        )
        self.door = self.plain.address
        others = {
            "lost-model": "model.name=./nowhere",
            "pinned": f"model.weights_sha256={'0' * 64}",
            "odd-rows": f"data.source={odd}",
        }
        self.doors = {"plain": self.plain} | {
            name: peers.bootstrap(
                f"name={name}", setting, f"--initial-peers={self.door}", name=f"{name}-door"
            )
            for name, setting in others.items()
        }

    def run_id(self, name: str) -> str:
        return str(self.doors[name].events("opened")[0]["run"])

    def letter(self, role: str, *options: str, cwd: Path | None = None) -> str:
        """What p2pllm says to a peer that cannot take part."""
        command = (role, "--initial-peers", self.door, "--host-maddrs", LOOPBACK, *options)
        code, printed, said = run(*command, cwd=cwd or self.here)
        assert code == 1, printed + said
        assert "Traceback" not in printed + said
        return said


@pytest.fixture(scope="module")
def crossroads(shared_processes: Processes) -> Crossroads:
    return Crossroads(shared_processes)


def test_several_runs_are_listed(crossroads):
    said = crossroads.letter("join")
    assert "The swarm has several runs:" in said
    assert all(crossroads.run_id(name) in said for name in crossroads.doors)
    assert "add --run ID" in said


def test_a_run_that_nobody_knows(crossroads):
    said = crossroads.letter("join", "--run", "tyni")
    assert "The swarm does not know a run called tyni. It has:" in said
    assert crossroads.run_id("pinned") in said
    assert "Add --run ID" in said


def test_one_of_several_runs_is_picked_by_its_id(crossroads):
    asked = ("--initial-peers", crossroads.door, "--run", crossroads.run_id("pinned"), "--json")
    code, printed, said = run("status", *asked, cwd=crossroads.here)
    assert code == 0, said
    assert [peer["name"] for peer in json.loads(printed)["peers"]] == ["pinned-door"]


def test_a_model_folder_that_is_missing(crossroads):
    said = crossroads.letter("join", "--run", "lost-model")
    assert "The base model ./nowhere could not be fetched" in said
    assert "give its path as model.name" in said


def test_base_weights_that_are_not_the_pinned_ones(crossroads):
    said = crossroads.letter("join", "--run", "pinned")
    assert "not the one that the run was founded with" in said
    assert "0" * 64 in said
    assert "Remove the local copy and start again" in said


def test_a_data_set_without_the_needed_columns(crossroads):
    said = crossroads.letter("aggregate", "--run", "odd-rows")
    assert "has no column instruction and response. It has: question, answer" in said
    assert "data.columns" in said


def test_an_empty_data_set(crossroads):
    (crossroads.here / "empty.jsonl").touch()
    said = crossroads.letter("join", "--run", "plain", "--data", "empty.jsonl")
    assert "The data set empty.jsonl has no rows." in said
    assert "data.source" in said


def test_an_aggregator_that_was_not_designated(crossroads):
    said = crossroads.letter("aggregate", "--run", "plain")
    assert "The designated aggregator of this run is 12D3KooW" in said
    assert "p2pllm join" in said


def test_an_identity_that_a_live_process_uses(crossroads):
    said = crossroads.letter("join", "--run", "plain", "--identity", str(crossroads.plain.key))
    assert f"The identity {crossroads.plain.key} is in use" in said
    assert crossroads.plain.events("joined")[0]["peer_id"] in said
    assert "add --name NAME" in said


def test_a_port_that_is_in_use(crossroads):
    host = crossroads.door.partition("/p2p/")[0]
    code, _, said = run("bootstrap", str(TINY), "--host-maddrs", host, cwd=crossroads.here)
    assert code == 1
    assert f"Another program already listens on {host}" in said
    assert "--host-maddrs" in said
    assert "Traceback" not in said


def test_the_output_folder_of_another_run(crossroads, tmp_path):
    home = tmp_path / crossroads.run_id("plain") / "ann"
    home.mkdir(parents=True)
    other = "# run tiny-0123456789, fingerprint 00, owner somebody\nrounds: 3\n"
    (home / "manifest.yaml").write_text(other)
    said = crossroads.letter("join", "--run", "plain", "--name", "ann", "--output", str(tmp_path))
    assert f"The folder {home} belongs to another run" in said
    assert "--output FOLDER" in said
    assert [path.name for path in home.iterdir()] == ["manifest.yaml"]
    assert (home / "manifest.yaml").read_text() == other


def test_of_two_trainers_with_different_bases_that_start_together_one_gives_way(crossroads):
    start = crossroads.peers.trainer
    pair = [
        start(name, crossroads.door, "--run", "plain", cwd=cwd)
        for name, cwd in (("ann", crossroads.here), ("bob", crossroads.there))
    ]
    [loser] = wait_until(lambda: [p for p in pair if p.process.poll() is not None], "one", LOADED)
    [winner] = [p for p in pair if p is not loser]
    assert loser.process.poll() == 1
    assert "is not the one that the others train on" in loser.printed
    assert "Traceback" not in loser.printed
    winner.wait_for("shard_claimed", LOADED)
    assert not winner.events("round_committed")
    said = crossroads.letter("join", "--run", "plain", cwd=loser.cwd)
    assert "is not the one that the others train on" in said
    assert "model.revision" in said
    assert winner.process.poll() is None


def _two_bases(folder: Path) -> tuple[Path, Path]:
    """Two folders, in each of which the relative path `base` is another model."""
    places = folder / "here", folder / "there"
    for seed, place in enumerate(places):
        place.mkdir()
        (place / "base").symlink_to(random_model(RandomInit(), seed))
    return places
