"""What a person sees."""

import io
import math
import shlex

import pytest
from rich.console import Console

from p2pllm.charts import loss_chart, save_loss_png
from p2pllm.cli_options import addresses as parsed
from p2pllm.events import (
    AggregationMeasured,
    CaughtUp,
    Evaluated,
    Opened,
    RoundCommitted,
    StepDone,
    Trouble,
)
from p2pllm.swarm.records import Progress, Result
from p2pllm.swarm.rounds import SwarmView
from p2pllm.ui import (
    LineScreen,
    describe,
    join_line,
    pasted,
    rounds_table,
    size,
    status_json,
    status_table,
)

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


def test_a_remote_peer_cannot_take_over_the_terminal():
    name = "bob\x1b[2J\x1b]0;mine\x07\n\u202eevil"
    for event in (CaughtUp(round=1, digest="d", donors=[name], seconds=1.0), Trouble(what=name)):
        text = seen(lambda console, event=event: LineScreen(console)(event), width=200)
        assert len(text.splitlines()) == 1
        assert all(sign.isprintable() for sign in text.rstrip("\n"))
    ann = Progress(
        peer="A", name=name, role="trainer", state="ready", round=3, digest="\x1b[2J[/x]"
    )
    table = status_table("demo-1", SwarmView("me", (ann,)), 10)
    assert "\x1b" not in seen(lambda console: console.print(table), width=200)


def test_a_loss_that_is_no_number_is_said_in_words():
    evaluated = Evaluated(round=1, digest="d", loss=math.nan, rows=8, seconds=1.0)
    assert "held-out loss not a number" in describe(evaluated.as_row())
    assert "held-out loss not a number" in describe({**evaluated.as_row(), "loss": None})


def test_the_aggregation_error_is_told_with_the_peers_that_it_is_of():
    row = AggregationMeasured(round=3, error=0.01239, peers=["ann", "bob"], members=3).as_row()
    assert describe(row) == "round 3: aggregation error 1.24 % (of 2 of 3 peers)"


def step(number):
    return StepDone(
        round=0, step=number, steps=5, loss=3.5, learning_rate=0.1, tokens_per_second=40.0
    )


def test_in_a_terminal_each_step_replaces_the_one_before():
    def show(console):
        screen = LineScreen(console)
        for number in (1, 2):
            screen(step(number))
        screen(COMMITTED)

    text = seen(show, width=300, terminal=True)
    before, after = text.split("step 2/5")
    assert before.count("\n") == 0
    assert before.count("\r\x1b[2K") == 2
    assert after.index("\r\x1b[2K") < after.index("committed")  # the line is taken away first
    assert after.count("\n") == 1


def test_a_step_line_never_wraps():
    text = seen(lambda console: LineScreen(console)(step(1)), width=20, terminal=True)
    assert "loss" not in text


def test_in_a_log_the_steps_are_told_now_and_then():
    def show(console):
        screen = LineScreen(console)
        for number in range(1, 6):
            screen(step(number))

    assert seen(show).count("step") == 1


@pytest.mark.parametrize("width", [20, 40, 80, 100, 400])
def test_a_command_on_several_lines_is_still_that_command(width):
    command = join_line(["/ip4/127.0.0.1/tcp/46431/p2p/12D3KooW" + "x" * 44] * 2)
    lines = pasted(command, width)
    assert all(len(line) <= width for line in lines)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)


def test_the_door_prints_the_line_that_others_paste():
    opened = Opened(run="demo-1", addresses=["/ip4/1.2.3.4/tcp/1/p2p/A"])
    text = seen(lambda console: LineScreen(console)(opened), width=200)
    assert "p2pllm join --initial-peers /ip4/1.2.3.4/tcp/1/p2p/A" in text


def test_the_printed_line_and_the_parser_understand_each_other():
    addresses = ["/ip4/1.2.3.4/tcp/1/p2p/A", "/ip4/1.2.3.4/udp/1/quic/p2p/A"]
    words = shlex.split(join_line(addresses))
    assert words[:2] == ["p2pllm", "join"]
    given = [word for word in words[2:] if word != "--initial-peers"]
    assert parsed(given) == addresses
    assert parsed([", ".join(addresses)]) == addresses
    assert parsed([" ".join(addresses)]) == addresses


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


def test_no_number_of_the_rounds_is_cut_in_a_narrow_terminal():
    table = rounds_table([COMMITTED.as_row()])
    text = seen(lambda console: console.print(table), width=80)
    for whole in ("samples", "average", "9.10 s", "1.2 MB", "ann, bob"):
        assert whole in text


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


def test_a_constant_loss_is_a_level_line():
    lines = loss_chart([(0, 2.0), (5, 2.0), (10, 2.0)], 60, 10).splitlines()
    assert len([line for line in lines if "●" in line]) == 1
    assert max(line.count("●") for line in lines) == 3


def test_a_loss_that_is_no_number_leaves_a_gap_and_no_trace():
    assert loss_chart([(0, 3.0), (1, math.nan), (2, 2.0)], 60, 10) == loss_chart(
        [(0, 3.0), (2, 2.0)], 60, 10
    )
    assert "no loss" in loss_chart([(0, math.nan)], 60, 10)


def test_a_chart_that_grows_keeps_its_right_edge():
    lines = loss_chart([(0, 3.6), (1, 3.4)], 60, 10, last=10).splitlines()
    assert lines[-1].startswith("round 0 ")
    assert lines[-1].endswith(" 10")
    assert all(line.rindex("●") < 20 for line in lines if "●" in line)


def test_the_picture_is_a_png(tmp_path):
    save_loss_png(tmp_path / "loss.png", [(0, 3.6), (1, 3.2)], "demo")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
