"""The demo's screen and its report: what a person sees of a run."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from p2pllm.config.run import DataConfig, ModelConfig, RandomInit, RunConfig
from p2pllm.demo import trainer_names
from p2pllm.demo_report import comparison, report
from p2pllm.demo_screen import DemoScreen
from p2pllm.events import (
    CaughtUp,
    Evaluated,
    Finished,
    Joined,
    Opened,
    RoundCommitted,
    RoundMissed,
    StepDone,
    Trouble,
    Working,
)

ADDRESS = "/ip4/127.0.0.1/tcp/46431/p2p/12D3KooWF3cVB13Yu89ecqGhFs4VqGRqtbWK5NngwZdAfYRPUaqY"
RUN = RunConfig(
    name="demo", model=ModelConfig(random_init=RandomInit()), data=DataConfig(source="y")
)


def recorded(width=100, height=30, terminal=False):
    return Console(width=width, height=height, force_terminal=terminal, file=io.StringIO())


def committed(round, *peers):
    return RoundCommitted(
        round=round,
        digest=f"{round:08}ffff",
        peers=list(peers),
        samples=20,
        loss=3.3,
        tokens_per_second=66.0,
        seconds_training=9.1,
        seconds_waiting=0.4,
        seconds_averaging=0.2,
        bytes_sent=1_200_000,
        bytes_received=600_000,
        deadline=20.0,
        left_out={},
        cut_down={},
    )


def step(round, number):
    return StepDone(
        round=round, step=number, steps=4, loss=3.5, learning_rate=0.1, tokens_per_second=61.2
    )


def evaluated(round, loss):
    return Evaluated(round=round, digest="d", loss=loss, rows=8, seconds=1.0)


def screen_of(*told, width=100, height=30, trainers=("ann", "bob", "cat"), terminal=True):
    screen = DemoScreen(RUN, recorded(width, height, terminal))
    screen.expect("bootstrap", "bootstrap")
    screen.note("bootstrap", Opened(run="demo-0123456789", addresses=[ADDRESS]).as_row())
    for name in trainers:
        screen.expect(name, "trainer")
    screen.expect("aggregator", "aggregator")
    for name, event in told:
        screen.note(name, event.as_row())
    return screen


def picture(renderable, width=100, height=30):
    console = recorded(width, height)
    console.print(renderable)
    return console.file.getvalue()


def line_of(name, text):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_the_screen_shows_who_does_what_and_how_the_loss_falls():
    screen = screen_of(
        ("ann", step(0, 4)),
        ("ann", committed(0, "bob", "ann")),
        ("bob", committed(0, "bob", "ann")),
        ("ann", step(1, 2)),
        ("cat", Working(doing="loading the base model")),
        ("aggregator", evaluated(0, 3.63)),
        ("aggregator", evaluated(1, 3.41)),
    )
    text = picture(screen.render())
    assert "run demo-0123456789" in text
    assert "1 of 10 rounds" in text
    assert "training 2/4" in line_of("ann", text)
    assert line_of("ann", text).split()[-6:] == ["1", "3.500", "61", "1.2", "MB", "00000000"]
    assert "loading the base model" in line_of("cat", text)
    assert "held-out loss  3.630 → 3.410" in text
    assert text.count("round 0 averaged by ann, bob") == 1
    assert "".join(text.split("another terminal can join:")[1].split("\\\n")).split() == [
        "p2pllm",
        "join",
        "--initial-peers",
        ADDRESS,
    ]


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (200, 60)])
@pytest.mark.parametrize("trainers", [1, 3])
def test_the_screen_fits_a_terminal(size, trainers):
    names = trainer_names(trainers)
    news = [(name, Trouble(what="something happened " * 20)) for name in names * 4]
    news += [("aggregator", evaluated(round, 3.6 - round / 10)) for round in range(10)]
    screen = screen_of(*news, width=size[0], height=size[1], trainers=names)
    lines = picture(screen.render(), *size).splitlines()
    assert len(lines) <= size[1]
    assert all(len(line) <= size[0] for line in lines)


def test_a_screen_before_anything_has_happened():
    screen = DemoScreen(RUN, recorded())
    screen.expect("bootstrap", "bootstrap")
    text = picture(screen.render())
    assert "starting" in text
    assert "can join" not in text
    assert "no loss has been measured yet" in text


def test_a_log_has_a_line_for_each_notable_event():
    screen = screen_of(
        ("ann", Joined(role="trainer", run="r", peer="ann", peer_id="A", fingerprint="f")),
        ("ann", step(0, 1)),
        ("ann", committed(0, "ann", "bob")),
        ("bob", RoundMissed(round=1, reason="cat did not answer", culprits=["cat"])),
        ("bob", CaughtUp(round=2, digest="d", donors=["ann"], seconds=0.1)),
        ("aggregator", CaughtUp(round=2, digest="d", donors=["ann"], seconds=0.1)),
        ("aggregator", evaluated(2, 3.2)),
        terminal=False,
    )
    lines = screen.console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["ann", "round", "bob", "bob", "aggregator"]


def test_a_child_that_ends_too_early_is_news_once_with_its_last_words():
    screen = screen_of()
    for _ in range(2):
        screen.lose("bob", -9, lambda: "a\n  b [b]\nc\x1b[2J")
    text = picture(screen.render())
    assert "gone (status -9)" in line_of("bob", text)
    assert text.count("ended too early, with status -9") == 1
    assert "b [b]" in text
    assert "\x1b" not in text


def test_a_child_that_has_finished_may_end():
    screen = screen_of(("bob", Finished(round=10, digest="d", path=None)))
    screen.lose("bob", 0, lambda: "bye")
    assert "finished" in line_of("bob", picture(screen.render()))


# ---- the end


def finished(**digests):
    return [(name, Finished(round=1, digest=d, path=f"/x/{name}")) for name, d in digests.items()]


def test_the_report_tells_the_fall_of_the_loss_and_that_all_adapters_are_one(tmp_path):
    screen = screen_of(
        ("ann", committed(0, "ann")),
        ("ann", committed(1, "ann")),
        ("aggregator", evaluated(0, 3.63)),
        ("aggregator", evaluated(2, 3.12)),
        *finished(ann="ab", bob="ab", cat="ab", aggregator="ab"),
    )
    text = picture(report(screen, tmp_path, tmp_path / "loss.png"), width=200)
    assert screen.is_success
    assert "3.630 → 3.120 in 2 rounds" in text
    assert "the same on ann, bob, cat, aggregator" in text
    assert "sent 2.4 MB, received 1.2 MB" in text
    assert "/x/aggregator" in text
    assert "loss.png" in text


@pytest.mark.parametrize(
    "digests, said",
    [
        ({"ann": "ab", "bob": "cd", "aggregator": "ab"}, "different ones: ann ab, bob cd"),
        ({"ann": "ab"}, "the aggregator wrote none"),
        ({}, "nobody finished"),
    ],
)
def test_a_run_that_went_wrong_is_no_success(digests, said, tmp_path):
    screen = screen_of(*finished(**digests))
    assert not screen.is_success
    assert said in picture(report(screen, tmp_path, None), width=200)


def test_three_answers_stand_side_by_side():
    told: Any = SimpleNamespace(
        question="What does `a.b` do?", base="[red]x[/]", tuned="", reference="Does c."
    )
    text = picture(comparison(told))
    assert "What does `a.b` do?" in text
    assert "[red]x[/]" in text
    assert "(nothing)" in text
    assert "Does c." in text
