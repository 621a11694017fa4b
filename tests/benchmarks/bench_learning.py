"""What averaging costs in quality: a swarm of four beside one machine, with the same samples.

Each row of the table is a configuration, played with the same seeds. The modules of the held-out
rows are nobody's to train on; they are the same for all. A swarm makes fewer and steadier updates
than one machine, so each of the two gets the learning rate that suits it: the best of a few, by the
rows of the curves, which do not count afterwards.
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
from collections.abc import Iterator, Sequence
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
HELD_OUT_ROWS, HELD_OUT_SEED = 192, 1234
RATES = (0.002, 0.004, 0.008)  # peak learning rates to choose from
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
    like_alone: bool = False  # trained at one machine's learning rate, not at a swarm's
    once: bool = False  # with one seed only


ALONE = Case("one machine", "none", like_alone=True)
IID, DEFAULT = Case("4 peers, IID", "iid"), Case("4 peers, by module", "modules")
CASES = (
    ALONE,
    # As many updates as a swarm's peers make, each from four times the rows.
    Case("one machine, batch 16", "none", ("training.batch_size=16",), peers=1),
    IID,
    DEFAULT,
    Case("lora: freeze_a", "modules", ("averaging.lora=freeze_a",)),
    Case("lora: alternate", "modules", ("averaging.lora=alternate",)),
    Case("outer: nesterov", "modules", ("averaging.outer=nesterov",)),
    Case("compression: int8", "modules", ("averaging.compression=int8",)),
)
FLOAT32 = ("model.dtype=float32", "rounds=2")
QUANTIZED = (
    replace(ALONE, name="base: float32", settings=FLOAT32, once=True),
    replace(ALONE, name="base: nf4", settings=(*FLOAT32, "model.quantization=nf4"), once=True),
)


@dataclass(frozen=True)
class Job:
    """One training. It is played in a process of a pool."""

    case: Case
    seed: int
    rate: float
    settings: tuple[str, ...]

    @property
    def run(self) -> RunConfig:
        rate = f"training.learning_rate={self.rate}"
        settings = (*SETTINGS, rate, *self.settings, *self.case.settings, f"seed={self.seed}")
        return load_run(ROOT / "configs/demo.yaml", settings)


def play(job: Job, held_out_rows: int) -> dict[str, Any]:
    """Train, and measure the way there on the first of the held-out rows, the end on the others."""
    torch.set_num_threads(1)
    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        shards, held_out = cut(job, held_out_rows, Path(folder))
        if job.case.split == "none":
            found = play_alone(job, shards, held_out, Path(folder))
        else:
            found = play_swarm(job, shards, held_out)
    found |= {"case": job.case.name, "seed": job.seed, "rate": job.rate}
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
    unseen = rows[run.evaluation.max_rows :]
    found = Evaluator(adapter, unseen, run.evaluation.batch_size).evaluate(values)
    return {"loss": found.loss, "rows": found.rows, "tokens": found.tokens}


def play_all(jobs: Sequence[Job], held_out_rows: int) -> Iterator[dict[str, Any]]:
    """In two processes; what each came to, in the order in which they end."""
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    pool = ProcessPoolExecutor(2, mp_context=context)
    try:
        futures = [pool.submit(play, job, held_out_rows) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            told = future.result()
            what = f"{told['case']}, learning rate {told['rate']:g}, seed {told['seed']}"
            known = f"{number} of {len(jobs)}"
            print(f"{known}: {what}: loss {told['loss']:.4f}, {told['seconds']:.0f} s", flush=True)
            yield told
    finally:
        pool.shutdown(cancel_futures=True)


def planned(seeds: Sequence[int], settings: Sequence[str], alone: float, swarm: float) -> list[Job]:
    """All rows of the table. Seed by seed, so that whoever ends it early has whole comparisons.
    alone, swarm: the learning rates."""
    return [
        Job(case, seed, alone if case.like_alone else swarm, tuple(settings))
        for seed, case in itertools.product(seeds, (*CASES, *QUANTIZED))
        if seed == seeds[0] or not case.once
    ]


def best_rate(case: Case, runs: Sequence[dict[str, Any]]) -> float:
    """The one with the lowest last loss on the rows of the curves."""
    mine = [run for run in runs if run["case"] == case.name]
    return float(min(mine, key=lambda run: run["losses"][-1][1])["rate"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-learning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 2 short rounds")
    parser.add_argument("--results", type=Path, help="folder; --quick writes to a temporary one")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    names = [case.name for case in (*CASES, *QUANTIZED)]
    parser.add_argument("--cases", nargs="+", choices=names, help="only these rows of the table")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="RATE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    chosen = parser.parse_args()
    short = QUICK if chosen.quick else ()
    seeds = chosen.seeds[:1] if chosen.quick else chosen.seeds
    settings = (f"rounds={ROUNDS}", *short, *chosen.settings)
    rates = chosen.rates[:1] if chosen.quick else chosen.rates
    run = Job(DEFAULT, seeds[0], rates[0], settings).run
    where = chosen.results or (Path(tempfile.mkdtemp()) if chosen.quick else RESULTS)
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_learning", *sys.argv[1:]])
    locate(run.model, run.seed)  # once, before two processes want it
    found: dict[str, Any] = {"about": about(command), "plan": plan_of(run), "sweep": [], "runs": []}
    began = time.monotonic()

    def collect(jobs: Sequence[Job], into: list[dict[str, Any]]) -> None:
        for told in play_all(jobs, 16 if chosen.quick else HELD_OUT_ROWS):
            into.append(told)
            found["about"]["load_after"] = list(os.getloadavg())
            save(where, "learning", markdown(found), found)  # it takes long: what there is, is kept

    alone = swarm = rates[0]
    if len(rates) > 1:
        tried = [Job(case, seeds[0], rate, settings) for case in (ALONE, IID) for rate in rates]
        collect(tried, found["sweep"])
        alone, swarm = (best_rate(case, found["sweep"]) for case in (ALONE, IID))
    found["rates"] = {"alone": alone, "swarm": swarm}
    best = ((ALONE.name, alone), (IID.name, swarm))
    found["runs"] = [run for run in found["sweep"] if (run["case"], run["rate"]) in best]
    known = [(run["case"], run["seed"]) for run in found["runs"]]
    jobs = [
        job
        for job in planned(seeds, settings, alone, swarm)
        if job.case.name in (chosen.cases or names) and (job.case.name, job.seed) not in known
    ]
    collect(jobs, found["runs"])
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
