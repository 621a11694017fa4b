"""A user's mistakes, made at the real command line: each gets a letter that says what to do next,
ends with code 1 and never shows a traceback. These need no run."""

import threading
from pathlib import Path

import pytest

from tests.swarm.processes import LOOPBACK, TINY, free_port, run

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(120)]

SOMEBODY = "12D3KooWA7uw8Lstfwqt6pxg6QzuvRh6dVnLqVx6zg2pe7hTNd2z"


def letter(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command that must fail says."""
    code, printed, said = run(*command, cwd=cwd, env=env)
    assert code == 1, printed + said
    assert "Traceback" not in printed + said
    return said


def test_an_address_that_is_none(tmp_path):
    said = letter("join", "--initial-peers", "nonsense", cwd=tmp_path)
    assert "nonsense is not a usable multiaddr" in said
    assert "A full one looks like /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW" in said


def test_an_address_without_a_peer_id(tmp_path):
    env = {"P2PLLM_INITIAL_PEERS": "/ip4/127.0.0.1/tcp/31337"}
    said = letter("join", cwd=tmp_path, env=env)
    assert "it lacks the /p2p/<peer id>" in said
    assert "A full one looks like" in said


def test_no_address_at_all(tmp_path):
    said = letter("join", cwd=tmp_path)
    assert "No address of a peer was given" in said
    assert "--initial-peers ADDR" in said


def test_nobody_answers_at_the_address(tmp_path):
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{SOMEBODY}"
    said = letter("join", "--initial-peers", address, "--host-maddrs", LOOPBACK, cwd=tmp_path)
    assert f"None of the initial peers answered:\n{address}" in said
    assert "--initial-peers" in said.split("\n\n")[1]


@pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's own
def test_no_run_at_the_address(tmp_path, peer_without_a_run):
    said = letter("status", "--initial-peers", peer_without_a_run, cwd=tmp_path)
    assert f"The peers at these addresses know of no run:\n{peer_without_a_run}" in said
    assert "p2pllm bootstrap configs/RUN.yaml" in said


def test_an_unknown_key_of_the_configuration(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(TINY.read_text() + "\nronds: 3\n")
    said = letter("bootstrap", str(file), cwd=tmp_path)
    assert "unknown key ronds; did you mean rounds?" in said
    assert f"p2pllm config check {file}" in said


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}"
    said = letter("join", "--initial-peers", address, "--output", "file", cwd=tmp_path)
    assert "Cannot write below file/identities" in said
    assert "--output FOLDER" in said


@pytest.fixture
def peer_without_a_run():
    """The address of a peer that is there and knows of nothing."""
    from p2pllm.config.peer import NetworkConfig, PeerConfig
    from p2pllm.roles.entry import connect
    from p2pllm.swarm.identity import Identity

    config = PeerConfig(network=NetworkConfig(host_maddrs=(LOOPBACK,)))
    swarm = connect(config, Identity.ephemeral(), threading.Event())
    yield swarm.addresses()[0]
    swarm.close()
