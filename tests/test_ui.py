"""What a person sees."""

import io
import math
import shlex

import pytest
from rich.console import Console

from p2pllm.charts import loss_chart, save_loss_png
from p2pllm.cli import _addresses
from p2pllm.demo_screen import DemoScreen
from p2pllm.events import Evaluated, Finished, Opened, RoundCommitted, StepDone, Trouble
from p2pllm.swarm.records import Progress, Result
from p2pllm.swarm.rounds import SwarmView
from p2pllm.ui import LineScreen, join_line, rounds_table, size, status_json, status_table

COMMITTED = RoundCommitted(
    round=3,
    digest="abcdef0123456789",
    peers=["bob", "ann"],
    samples=40,
    loss=3.314,
    tokens_per_second=412.0,
    seconds_training=9.1,
    seconds_waiting=0.4,
    seconds_averaging=0.2,
    bytes_sent=1_200_000,
    bytes_received=1_200_000,
    deadline=30.0,
    left_out={"cat": "not ready after 3.2 s"},
    cut_down={},
)


def seen(show, width=100, terminal=False):
    console = Console(width=width, height=30, force_terminal=terminal, file=io.StringIO())
    with console.capture() as captured:
        show(console)
    return captured.get()


def test_a_committed_round_is_one_line_with_who_came_and_what_it_took():
    text = seen(lambda console: LineScreen(console)(COMMITTED), width=300)
    assert "round 3 committed with ann, bob  loss 3.314  412 tok/s" in text
    assert "train 9.1 s  wait 0.4 s  average 0.20 s  ↑ 1.2 MB ↓ 1.2 MB" in text
    assert "without cat: not ready after 3.2 s" in text


def test_what_a_remote_peer_calls_itself_is_shown_as_it_is():
    trouble = Trouble(what="[red]catching up failed[/] [link=http://x]")
    assert "[red]catching up failed[/]" in seen(lambda console: LineScreen(console)(trouble))


def test_the_door_prints_the_line_that_others_paste():
    opened = Opened(run="demo-1", addresses=["/ip4/1.2.3.4/tcp/1/p2p/A"])
    text = seen(lambda console: LineScreen(console)(opened), width=200)
    assert "p2pllm join --initial-peers /ip4/1.2.3.4/tcp/1/p2p/A" in text


def test_the_printed_line_and_the_parser_understand_each_other():
    addresses = ["/ip4/1.2.3.4/tcp/1/p2p/A", "/ip4/1.2.3.4/udp/1/quic/p2p/A"]
    words = shlex.split(join_line(addresses))
    assert words[:2] == ["p2pllm", "join"]
    given = [word for word in words[2:] if word != "--initial-peers"]
    assert _addresses(given) == addresses
    assert _addresses([", ".join(addresses)]) == addresses
    assert _addresses([" ".join(addresses)]) == addresses


def test_status_shows_who_is_there_and_the_last_evaluation():
    ann = Progress(
        peer="A", name="ann", role="trainer", state="ready", round=3, samples=1234, speed=2.5
    )
    judge = Progress(peer="J", name="judge", role="aggregator", state="following", round=3)
    view = SwarmView("me", (ann, judge), "J", (Result(round=2, digest="d", loss=3.1, rows=8),))
    text = seen(lambda console: console.print(status_table("demo-1", view, 10)), width=120)
    assert "round 3 of 10" in text
    assert "1,234" in text
    assert "aggregator (designated)" in text
    assert "3.1000 in round 2" in text
    assert status_json(view)["peers"][0]["name"] == "ann"


def test_an_empty_swarm_says_so():
    table = status_table("demo-1", SwarmView("me"), 10)
    assert "nobody is here" in seen(lambda console: console.print(table))


def test_the_rounds_are_a_table_with_reasons():
    table = rounds_table([COMMITTED.as_row()])
    text = seen(lambda console: console.print(table), width=160)
    assert "ann, bob" in text
    assert "cat: not ready after 3.2 s" in text


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e13, "30000.0 GB")],
)
def test_sizes_are_for_people(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    "points",
    [[(0, 3.6)], [(0, 3.6), (1, 3.2), (5, 3.0)], [(0, 2.0), (1, 2.0)], [(0, math.nan)], []],
)
def test_a_chart_fits_its_room(points):
    lines = loss_chart(points, 60, 10).splitlines()
    assert len(lines) <= 10
    assert all(len(line) <= 60 for line in lines)


def test_a_falling_loss_falls_in_the_chart():
    lines = loss_chart([(0, 4.0), (10, 3.0)], 60, 10).splitlines()
    marks = [(line.index("●"), at) for at, line in enumerate(lines) if "●" in line]
    assert min(marks)[1] < max(marks)[1]


def test_the_picture_is_a_png(tmp_path):
    save_loss_png(tmp_path / "loss.png", [(0, 3.6), (1, 3.2)], "demo")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def rows_of_a_run():
    yield "bootstrap", "bootstrap", Opened(run="demo-1", addresses=["/ip4/1.2.3.4/tcp/1/p2p/A"])
    yield (
        "ann",
        "trainer",
        StepDone(round=3, step=2, steps=5, loss=3.5, learning_rate=0.1, tokens_per_second=40.0),
    )
    yield "ann", "trainer", COMMITTED
    for round, loss in ((0, 3.63), (4, 3.12)):
        yield (
            "agg",
            "aggregator",
            Evaluated(round=round, digest="d", loss=loss, rows=8, seconds=1.0),
        )
    yield "ann", "trainer", Finished(round=4, digest="abcdef", path="/x/ann/final")
    yield "agg", "aggregator", Finished(round=4, digest="abcdef", path="/x/agg/final")


@pytest.fixture
def screen(demo_run):
    console = Console(width=80, height=24, force_terminal=True, file=io.StringIO())
    return DemoScreen(demo_run, console)


@pytest.fixture
def demo_run():
    from p2pllm.config.run import DataConfig, ModelConfig, RunConfig

    return RunConfig(name="demo", model=ModelConfig(name="x"), data=DataConfig(source="y"))


def test_the_demo_shows_peers_losses_and_how_to_join(screen):
    for name, role, event in rows_of_a_run():
        screen.note(name, role, event.as_row())
    text = seen(lambda console: console.print(screen.render()), width=80)
    assert "demo-1: round 4 of 10" in text
    assert "p2pllm join --initial-peers" in text
    assert "●" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_demos_end_tells_the_fall_of_the_loss_and_that_all_adapters_are_one(screen, tmp_path):
    for name, role, event in rows_of_a_run():
        screen.note(name, role, event.as_row())
    text = seen(lambda console: console.print(screen.report(tmp_path, tmp_path / "loss.png")))
    assert "3.630 → 3.120" in text
    assert "the same on every peer" in text
    assert "/x/agg/final" in text


def test_different_adapters_at_the_end_are_said_loudly(screen, tmp_path):
    for name, digest in (("ann", "a"), ("bob", "b")):
        screen.note(name, "trainer", Finished(round=4, digest=digest, path=None).as_row())
    text = seen(lambda console: console.print(screen.report(tmp_path, tmp_path / "loss.png")))
    assert "2 different adapters" in text


def test_a_child_that_ends_too_early_is_news_once(screen):
    assert screen.lose("ann", 1)
    assert not screen.lose("ann", 1)
