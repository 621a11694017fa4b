"""What averaging costs in quality: a swarm of four beside one machine, with the same samples.

Each row of the table is a configuration, played with the same seeds. The modules of the held-out
rows are nobody's to train on; they are the same for all.
"""

import argparse
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from p2pllm.config.load import load_run
from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import DataConfig, RunConfig
from p2pllm.data.corpus import load_held_out, load_private
from p2pllm.data.split import HELD_OUT, SplitPlan, write_split
from p2pllm.data.tokens import Row
from p2pllm.events import Evaluated, Event, Events, Finished
from p2pllm.model.adapter import Adapter, Values, adapter_values, attach_adapter
from p2pllm.model.pretrained import Base, load_base, locate
from p2pllm.roles.centralized import as_one, train
from p2pllm.training.evaluation import Evaluator, is_due
from p2pllm.training.source import ShardSource
from tests.benchmarks.learning_report import markdown, save_plot
from tests.benchmarks.one_process import OneProcessSwarm
from tests.benchmarks.report import about, save

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
PEERS, ROUNDS = 4, 8
SEEDS = (1, 2, 3)
HELD_OUT_ROWS, HELD_OUT_SEED = 160, 1234
# Shares of a module are drawn with this concentration: hardly any module has rows at two peers.
BY_MODULE = 0.01
# The demo's run, with a shorter prompt, so that a step costs less.
SETTINGS = (
    'data.template="Question: {instruction}\\nAnswer: "',
    "data.max_length=48",
    "data.eval_by=null",
    f"averaging.min_peers={PEERS}",
    f"averaging.max_group={PEERS}",
    "checkpoint.every=0",
    "training.schedule=linear",
    "training.warmup_rounds=0.5",
    "evaluation.every=2",
    "evaluation.max_rows=32",
)
QUICK = ("rounds=2", "training.local.steps=1", "evaluation.max_rows=8")


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    split: Literal["none", "iid", "modules"]  # none: one machine
    settings: tuple[str, ...] = ()
    peers: int = PEERS  # whose work one machine does
    once: bool = False  # with one seed only


DEFAULT = Case("4 peers, by module", "modules")
CASES = (
    Case("one machine", "none"),
    # As many updates as a swarm's peers make, each from four times the rows.
    Case("one machine, batch 16", "none", ("training.batch_size=16",), peers=1),
    Case("4 peers, IID", "iid"),
    DEFAULT,
    Case("lora: freeze_a", "modules", ("averaging.lora=freeze_a",)),
    Case("lora: alternate", "modules", ("averaging.lora=alternate",)),
    Case("outer: nesterov", "modules", ("averaging.outer=nesterov",)),
    Case("compression: int8", "modules", ("averaging.compression=int8",)),
)
FLOAT32 = ("model.dtype=float32", "rounds=2")
QUANTIZED = (
    Case("base: float32", "none", FLOAT32, once=True),
    Case("base: nf4", "none", (*FLOAT32, "model.quantization=nf4"), once=True),
)


@dataclass(frozen=True)
class Job:
    """One training. It is played in a process of a pool."""

    case: Case
    seed: int
    settings: tuple[str, ...]

    @property
    def run(self) -> RunConfig:
        settings = (*SETTINGS, *self.settings, *self.case.settings, f"seed={self.seed}")
        return load_run(ROOT / "configs/demo.yaml", settings)


def play(job: Job, held_out_rows: int) -> dict[str, Any]:
    """Train, and measure the end on all held-out rows, the way there on the first of them."""
    torch.set_num_threads(1)
    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        shards, held_out = cut(job, held_out_rows, Path(folder))
        if job.case.split == "none":
            found = play_alone(job, shards, held_out, Path(folder))
        else:
            found = play_swarm(job, shards, held_out)
    found |= {"case": job.case.name, "seed": job.seed}
    found |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    return found


def cut(job: Job, held_out_rows: int, folder: Path) -> tuple[list[Path], Path]:
    """Each peer's file, and that of the held-out rows, which no seed changes."""
    plan = SplitPlan(1, held_out=held_out_rows, held_out_by="category", seed=HELD_OUT_SEED, by=None)
    write_split(job.run.data, plan, folder / "all")
    rest = DataConfig(source=str(folder / "all/shard-000.jsonl"))
    by = "category" if job.case.split == "modules" else None
    write_split(rest, SplitPlan(PEERS, by, BY_MODULE, seed=job.seed), folder / "parts")
    return sorted((folder / "parts").glob("shard-*.jsonl")), folder / "all" / HELD_OUT


def play_alone(job: Job, shards: Sequence[Path], held_out: Path, folder: Path) -> dict[str, Any]:
    """`p2pllm train`."""
    sources = {"source": tuple(map(str, shards)), "eval_source": str(held_out)}
    run = job.run.model_copy(update={"data": job.run.data.model_copy(update=sources)})
    run, heard = as_one(run, job.case.peers), list[Event]()
    events = Events(heard.append)
    train(run, PeerConfig(output=folder / "runs", threads=1), events, threading.Event())
    [finished] = [event for event in heard if isinstance(event, Finished)]
    base = load_base(run.model, run.seed)
    rows = load_held_out(run.data, base.tokenizer, run.seed)
    adapter = attach_adapter(base, run.lora, run.seed)
    final = adapter_values(Path(str(finished.path)))
    local = run.training.local.steps or 0
    return {
        "losses": [(e.round, e.loss) for e in heard if isinstance(e, Evaluated)],
        "samples": run.rounds * local * run.training.batch_size,
        **last_loss(run, adapter, rows, final),
    }


def play_swarm(job: Job, shards: Sequence[Path], held_out: Path) -> dict[str, Any]:
    """Four trainers, each with its own file."""
    run = job.run
    base = load_base(run.model, run.seed)
    adapter = attach_adapter(base, run.lora, run.seed)
    parts = [rows_of(shard, run, base) for shard in shards]
    sources = [ShardSource(part, range(len(part)), run.seed) for part in parts]
    rows = rows_of(held_out, run, base)
    evaluator = Evaluator(adapter, rows[: run.evaluation.max_rows], run.evaluation.batch_size)
    swarm = OneProcessSwarm(run, adapter, sources)
    losses, rounds = [(0, evaluator.evaluate(swarm.values).loss)], []
    for round in range(1, run.rounds + 1):
        rounds.append(swarm.play_round())
        if is_due(round, run.evaluation, run.rounds):
            losses.append((round, evaluator.evaluate(swarm.values).loss))
    swarm.close()
    return {
        "losses": losses,
        "samples": sum(r.samples for r in rounds),
        "rows_of_peers": [len(part) for part in parts],
        "rounds": [asdict(r) for r in rounds],
        **last_loss(run, adapter, rows, swarm.values),
    }


def rows_of(path: Path, run: RunConfig, base: Base) -> list[Row]:
    return load_private([path], run.data, base.tokenizer)


def last_loss(
    run: RunConfig, adapter: Adapter, rows: Sequence[Row], values: Values
) -> dict[str, Any]:
    found = Evaluator(adapter, rows, run.evaluation.batch_size).evaluate(values)
    return {"loss": found.loss, "rows": found.rows, "tokens": found.tokens}


def play_all(jobs: Sequence[Job], held_out_rows: int, found: dict[str, Any], where: Path) -> None:
    """In two processes; what is known is written after each."""
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    pool = ProcessPoolExecutor(2, mp_context=context)
    try:
        for future in as_completed([pool.submit(play, job, held_out_rows) for job in jobs]):
            told = future.result()
            found["runs"].append(told)
            found["about"]["load_after"] = list(os.getloadavg())
            save(where, "learning", markdown(found), found)
            what = f"{told['case']}, seed {told['seed']}: loss {told['loss']:.4f}"
            known = f"{len(found['runs'])} of {len(jobs)}"
            print(f"{known}: {what}, {told['seconds']:.0f} s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def planned(seeds: Sequence[int], settings: Sequence[str]) -> list[Job]:
    """Seed by seed, so that whoever ends it early has whole comparisons."""
    return [
        Job(case, seed, (f"rounds={ROUNDS}", *settings))
        for seed, case in itertools.product(seeds, (*CASES, *QUANTIZED))
        if seed == seeds[0] or not case.once
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-learning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 2 short rounds")
    parser.add_argument("--results", type=Path, help="folder; --quick writes to a temporary one")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    names = [case.name for case in (*CASES, *QUANTIZED)]
    parser.add_argument("--cases", nargs="+", choices=names, help="only these rows of the table")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    chosen = parser.parse_args()
    short = QUICK if chosen.quick else ()
    seeds = chosen.seeds[:1] if chosen.quick else chosen.seeds
    jobs = planned(seeds, (*short, *chosen.settings))
    run = replace(jobs[0], case=DEFAULT).run
    jobs = [job for job in jobs if job.case.name in (chosen.cases or names)]
    where = chosen.results or (Path(tempfile.mkdtemp()) if chosen.quick else RESULTS)
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_learning", *sys.argv[1:]])
    locate(run.model, run.seed)  # once, before two processes want it
    found: dict[str, Any] = {"about": about(command), "plan": plan_of(run), "runs": []}
    began = time.monotonic()
    play_all(jobs, 16 if chosen.quick else HELD_OUT_ROWS, found, where)
    found["about"]["minutes"] = (time.monotonic() - began) / 60
    save(where, "learning", markdown(found), found)
    save_plot(where / "learning.png", found)
    print(f"{markdown(found)}\nwritten to {where}")


def plan_of(run: RunConfig) -> dict[str, Any]:
    """What the page says of all rows."""
    agreed = run.model_dump(
        mode="json", include={"rounds", "training", "lora", "averaging", "data"}
    )
    return agreed | {"peers": PEERS, "curve_rows": run.evaluation.max_rows}


if __name__ == "__main__":
    main()
