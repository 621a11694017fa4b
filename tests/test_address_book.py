"""Where peers were seen, over restarts."""

import json

import pytest

from p2pllm.swarm.address_book import AddressBook


def test_what_was_noted_is_there_after_a_restart_the_newest_first(tmp_path):
    book = AddressBook(tmp_path / "peers.json")
    book.note(["/ip4/1.2.3.4/tcp/1/p2p/a"])
    book.note(["/ip4/1.2.3.4/tcp/2/p2p/b"])
    again = AddressBook(tmp_path / "peers.json")
    assert again.newest() == ["/ip4/1.2.3.4/tcp/2/p2p/b", "/ip4/1.2.3.4/tcp/1/p2p/a"]


def test_it_keeps_the_last_ones_only(tmp_path):
    book = AddressBook(tmp_path / "peers.json")
    for number in range(200):
        book.note([f"/ip4/1.2.3.4/tcp/{number}/p2p/a"])
    assert len(book.newest()) == 64
    assert book.newest()[0] == "/ip4/1.2.3.4/tcp/199/p2p/a"
    assert len(json.loads((tmp_path / "peers.json").read_text())) == 64


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": "b"}', "\0"])
def test_a_damaged_file_counts_as_empty(tmp_path, content):
    (tmp_path / "peers.json").write_text(content)
    assert AddressBook(tmp_path / "peers.json").newest() == []


def test_a_disk_that_is_gone_does_not_end_the_peer(tmp_path):
    AddressBook(tmp_path / "not there" / "peers.json").note(["/ip4/1.2.3.4/tcp/1/p2p/a"])


def test_without_a_file_it_only_remembers():
    book = AddressBook(None)
    book.note(["/ip4/1.2.3.4/tcp/1/p2p/a"])
    assert book.newest()
