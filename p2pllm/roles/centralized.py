"""Conventional training: one machine, all rows, no network. The baseline of what a swarm reaches.

The learner, the rows, the schedule and the evaluation are a run's own, so averaging is the only
difference between this and a swarm.
"""

import threading
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from p2pllm.config.load import show
from p2pllm.config.paths import folder_for
from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import LocalEpoch, RunConfig
from p2pllm.data.corpus import load_corpus, load_held_out
from p2pllm.data.rows import LeasedRows
from p2pllm.data.streaming import StreamedRows
from p2pllm.data.tokens import Row
from p2pllm.digest import digest_of
from p2pllm.errors import OutputUnwritable
from p2pllm.events import (
    CheckpointSaved,
    Evaluated,
    Events,
    Finished,
    RoundCommitted,
    Working,
)
from p2pllm.journal import Journal
from p2pllm.model.adapter import attach_adapter
from p2pllm.roles.entry import load_local_base
from p2pllm.training.checkpoint import Checkpoints
from p2pllm.training.evaluation import Evaluator
from p2pllm.training.learner import Learner, Work
from p2pllm.training.ranks import Alone
from p2pllm.training.source import ShardSource, Source

NAME = "train"  # of the folder in that of the run


def as_one(run: RunConfig, trainers: int) -> RunConfig:
    """The run with the work of so many trainers in each local epoch, from all rows."""
    local = run.training.local
    match local:
        case LocalEpoch(steps=int(steps)):
            local = LocalEpoch(steps=steps * trainers)
        case LocalEpoch(seconds=float(seconds)):
            local = LocalEpoch(seconds=seconds * trainers)
        case LocalEpoch(epochs=float(epochs)):  # of one shard each
            local = LocalEpoch(epochs=epochs * trainers / run.data.shards)
    training = run.training.model_copy(update={"local": local})
    return run.model_copy(update={"training": training})


@dataclass(frozen=True)
class _Parts:
    learner: Learner
    evaluator: Evaluator
    checkpoints: Checkpoints


class Centralized:
    """One conventional training. `run` is the whole life of it."""

    def __init__(self, run: RunConfig, name: str, events: Events, parts: _Parts) -> None:
        self._run, self._name, self._events = run, name, events
        self._learner, self._evaluator = parts.learner, parts.evaluator
        self._checkpoints = parts.checkpoints
        self._samples, self._losses = 0, dict[int, float]()

    def run(self, stop: threading.Event) -> None:
        """Returns when all rounds are done, or when asked to stop. It goes on from the last whole
        checkpoint, with fresh moments in the optimizer."""
        first = self._resume()
        self._evaluate(first)
        for round in range(first, self._run.rounds):
            work = self._learner.train(round, self._events.emit, stop.is_set)
            if stop.is_set():
                return
            self._commit(round, work)
        values = self._learner.values()
        path = self._checkpoints.save_final(
            self._run.rounds, self._learner.adapter, values, self._facts()
        )
        self._events.emit(
            Finished(round=self._run.rounds, digest=digest_of(values), path=str(path))
        )

    def _resume(self) -> int:
        saved = self._checkpoints.newest(self._run.fingerprint)
        if saved is None:
            return 0
        self._learner.adopt(saved.values)
        self._samples = saved.facts["samples"]
        self._losses = {int(r): loss for r, loss in saved.facts["losses"].items()}
        self._learner.source.next_batch(self._samples)  # they have had their turn
        self._events.emit(Working(doing=f"going on from round {saved.round}"))
        return saved.round

    def _commit(self, round: int, work: Work) -> None:
        values = self._learner.values()
        self._samples += work.samples
        self._events.emit(
            RoundCommitted(
                round=round,
                digest=digest_of(values),
                peers=[self._name],
                samples=work.samples,
                loss=work.loss,
                tokens_per_second=work.tokens / max(work.seconds, 1e-6),
                seconds_training=work.seconds,
                seconds_waiting=0.0,
                seconds_averaging=0.0,
                bytes_sent=0,
                bytes_received=0,
                deadline=0.0,
                left_out={},
                cut_down={},
            )
        )
        self._evaluate(round + 1)
        every = self._run.checkpoint.every
        if every and (round + 1) % every == 0:
            path = self._checkpoints.save(round + 1, self._learner.adapter, values, self._facts())
            self._events.emit(CheckpointSaved(round=round + 1, path=str(path)))

    def _evaluate(self, round: int) -> None:
        due = round % self._run.evaluation.every == 0 or round == self._run.rounds
        if not due or round in self._losses:
            return
        self._events.emit(Working(doing=f"evaluating round {round}"))
        values = self._learner.values()
        measured = self._evaluator.evaluate(values)
        self._losses[round] = measured.loss
        self._events.emit(
            Evaluated(
                round=round,
                digest=digest_of(values),
                loss=measured.loss,
                rows=measured.rows,
                seconds=measured.seconds,
            )
        )

    def _facts(self) -> dict[str, object]:
        return {
            "fingerprint": self._run.fingerprint,
            "samples": self._samples,
            "losses": self._losses,
        }


def train(
    run: RunConfig,
    config: PeerConfig,
    events: Events,
    stop: threading.Event,
    ranks: Alone | None = None,
) -> None:
    """Train `run` (see `as_one`) into <output>/<run>/<name>/.

    Raises: OutputUnwritable, ForeignFolder, DiskFull, and the letters of the model and the data.
    """
    ranks = ranks or Alone()
    name = config.name or NAME
    names = {"run_id": run.name, "run": run.name, "peer": name, "shards": run.data.shards}
    folder = folder_for(config.output, {**names, "shard": config.shard})
    checkpoints = Checkpoints(folder, run.checkpoint.keep)
    checkpoints.check_owner(run.fingerprint)
    _describe(run, folder)
    journal = Journal(folder)
    events.subscribe(journal)
    try:
        events.emit(Working(doing=f"loading the base model {run.model.name or '(untrained)'}"))
        base = load_local_base(run, config)
        ranks.tell(run.model_dump_json())
        events.emit(Working(doing="reading the rows"))
        source, held_out = _open_rows(run, base.tokenizer)
        adapter = attach_adapter(base, run.lora, run.seed, config.gradient_checkpointing)
        learner = Learner(adapter, source, run, config.micro_batch, ranks)
        measured = held_out[: run.evaluation.max_rows]
        evaluator = Evaluator(adapter, measured, run.evaluation.batch_size)
        parts = _Parts(learner, evaluator, checkpoints)
        Centralized(run, name, events, parts).run(stop)
    finally:
        journal.close()


def _open_rows(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Source, list[Row]]:
    """All rows to train on, and those held out; a stream comes part by part, as in a swarm of one.

    Raises: any letter in `p2pllm.errors.data`.
    """
    if run.data.streaming:
        parts = StreamedRows(run.data, tokenizer, run.seed)
        source = LeasedRows(parts, cycle(range(parts.count)).__next__)
        return source, load_held_out(run.data, tokenizer, run.seed)
    corpus = load_corpus(run.data, tokenizer, run.seed)
    return ShardSource(corpus.train, range(len(corpus.train)), run.seed), corpus.held_out


def _describe(run: RunConfig, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(show(run))
    except OSError as problem:
        raise OutputUnwritable(folder=folder, reason=problem.strerror) from problem
