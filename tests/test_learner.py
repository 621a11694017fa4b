import math
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from p2pllm import errors
from p2pllm.config.run import (
    AveragingConfig,
    DataConfig,
    LocalEpoch,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from p2pllm.data.tokens import IGNORED, Row
from p2pllm.events import StepDone
from p2pllm.model.adapter import attach_adapter
from p2pllm.model.pretrained import load_base
from p2pllm.training import learner as learner_module
from p2pllm.training.learner import Learner
from p2pllm.training.loss import counted, summed_loss
from p2pllm.training.schedule import learning_rate
from p2pllm.training.source import ShardSource


@dataclass
class Cycle:
    """Gives the same rows in the same order for ever."""

    all: list[Row]
    position: int = 0

    @property
    def rows(self):
        return len(self.all)

    def next_batch(self, n):
        batch = [self.all[(self.position + i) % len(self.all)] for i in range(n)]
        self.position += n
        return batch


@dataclass
class Steps:
    """Collects the events of the steps."""

    seen: list[StepDone] = field(default_factory=list)

    def __call__(self, event):
        self.seen.append(event)


def never():
    return False


def settings(steps=3, **fields):
    return TrainingConfig(**{"local": LocalEpoch(steps=steps), "batch_size": 6, **fields})


def learner_of(adapter, rows, training, rounds=10, micro_batch=None):
    return Learner(adapter, Cycle(rows), run_of(training, rounds), micro_batch)


def run_of(training, rounds=10, **averaging):
    return RunConfig(
        name="test",
        rounds=rounds,
        model=ModelConfig(name="none"),
        data=DataConfig(source="none"),
        training=training,
        averaging=AveragingConfig(**averaging),
    )


def fresh_adapter(model, **lora):
    base = load_base(model, 1, "cpu")
    return attach_adapter(base, LoraConfig(**{"r": 4, "dropout": 0.0, **lora}), seed=1)


def test_loss_falls_on_a_memorisable_batch(tiny_model, rows):
    adapter = fresh_adapter(tiny_model, target="all-linear")
    steps = Steps()
    learner_of(adapter, rows, settings(30, learning_rate=0.02)).train(0, steps, never)
    assert steps.seen[-1].loss < 0.5 * steps.seen[0].loss


def test_an_epoch_reports_its_work_and_its_steps(tiny_adapter, rows):
    training = settings(3, batch_size=4, learning_rate=1e-3, schedule="constant")
    steps = Steps()
    work = learner_of(tiny_adapter, rows, training).train(5, steps, never)
    assert (work.samples, work.steps, work.skipped) == (12, 3, 0)
    assert work.tokens == 2 * counted(rows)
    assert [(s.round, s.step, s.steps) for s in steps.seen] == [(5, 1, 3), (5, 2, 3), (5, 3, 3)]
    assert {s.learning_rate for s in steps.seen} == {1e-3}
    assert all(s.tokens_per_second > 0 for s in steps.seen)


def test_the_epoch_loss_is_weighted_by_tokens(tiny_adapter, rows):
    steps = Steps()
    work = learner_of(tiny_adapter, rows, settings(6, batch_size=1)).train(0, steps, never)
    weights = [counted([row]) for row in rows]
    assert work.loss == pytest.approx(np.average([s.loss for s in steps.seen], weights=weights))


def gradient(model, rows, micro_batch, **lora):
    learner = learner_of(fresh_adapter(model, **lora), rows, settings(), micro_batch=micro_batch)
    # B is zero at first, and so is A's gradient then: start from elsewhere.
    draws = np.random.default_rng(3).standard_normal(learner.size).astype(np.float32)
    learner.adopt(draws * 0.1)
    learner._backward(rows, counted(rows))
    return torch.cat([p.grad.reshape(-1) for p in learner.adapter.parameters.values()])


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_model, rows, micro_batch):
    whole = gradient(tiny_model, rows, None)
    parts = gradient(tiny_model, rows, micro_batch)
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-7)
    assert whole.norm() > 1e-3


def loss_of(adapter, rows):
    with torch.inference_mode():
        return float(summed_loss(adapter, rows))


def test_the_loss_is_that_of_transformers(tiny_adapter, rows):
    row = max(rows, key=lambda r: len(r.input_ids))
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    with torch.inference_mode():
        expected = tiny_adapter.model(input_ids=ids, labels=labels).loss
    assert loss_of(tiny_adapter, [row]) / counted([row]) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_is_the_same_where_a_model_cannot_pick_columns(tiny_adapter, rows, monkeypatch):
    picked = loss_of(tiny_adapter, rows)
    monkeypatch.setattr("p2pllm.training.loss._picks_columns", lambda adapter: False)
    assert loss_of(tiny_adapter, rows) == pytest.approx(picked, rel=1e-5)


def test_optimizer_moments_live_across_rounds(tiny_model, rows):
    """Two rounds of two steps are one of four, if nothing is lost in between."""
    values = []
    for steps, rounds in ((4, 1), (2, 2)):
        adapter = fresh_adapter(tiny_model)
        training = settings(steps, schedule="constant", learning_rate=0.01)
        learner = learner_of(adapter, rows, training)
        for round in range(rounds):
            learner.adopt(learner.values())
            learner.train(round, Steps(), never)
        values.append(learner.values())
    assert np.array_equal(values[0], values[1])


def test_stop_leaves_before_the_next_step(tiny_adapter, rows):
    steps = Steps()
    work = learner_of(tiny_adapter, rows, settings(100)).train(
        0, steps, lambda: len(steps.seen) == 2
    )
    assert work.steps == 2
    nothing = learner_of(tiny_adapter, rows, settings(100)).train(0, steps, lambda: True)
    assert (nothing.steps, nothing.samples) == (0, 0)
    assert math.isnan(nothing.loss)


def test_an_epoch_may_be_a_fraction_of_a_pass(tiny_adapter, rows):
    training = settings(batch_size=2, local=LocalEpoch(epochs=0.5))
    assert learner_of(tiny_adapter, rows, training).train(0, Steps(), never).steps == 2
    training = settings(batch_size=4, local=LocalEpoch(epochs=0.01))
    assert learner_of(tiny_adapter, rows, training).train(0, Steps(), never).steps == 1


def test_an_epoch_may_be_a_time(tiny_adapter, rows, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    training = settings(local=LocalEpoch(seconds=20.0))
    steps = Steps()
    work = learner_of(tiny_adapter, rows, training).train(0, steps, never)
    assert 2 <= work.steps <= 10
    assert steps.seen[0].steps is None
    rates = [s.learning_rate for s in steps.seen]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def spoil(monkeypatch, bad):
    """Make the loss of the calls numbered in `bad` not finite."""
    calls = iter(range(10**6))

    def loss(adapter, rows):
        return summed_loss(adapter, rows) * (math.nan if next(calls) in bad else 1)

    monkeypatch.setattr(learner_module, "summed_loss", loss)


def test_a_step_whose_loss_is_not_finite_is_skipped(tiny_adapter, rows, monkeypatch):
    spoil(monkeypatch, bad={1})
    work = learner_of(tiny_adapter, rows, settings(3)).train(0, Steps(), never)
    assert (work.steps, work.skipped, work.samples) == (2, 1, 12)
    assert math.isfinite(work.loss)
    assert np.isfinite(tiny_adapter.values()).all()


def test_an_epoch_without_a_finite_loss_is_a_letter(tiny_adapter, rows, monkeypatch):
    spoil(monkeypatch, bad=range(3))
    before = tiny_adapter.values()
    with pytest.raises(errors.LossNotFinite, match="3 steps in the local epoch of round 7"):
        learner_of(tiny_adapter, rows, settings(3)).train(7, Steps(), never)
    assert np.array_equal(tiny_adapter.values(), before)


def test_too_little_memory_is_a_letter(tiny_adapter, rows, monkeypatch):
    def full(adapter, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See docs.")

    monkeypatch.setattr(learner_module, "summed_loss", full)
    for micro_batch in (None, "auto"):
        learner = learner_of(tiny_adapter, rows, settings(), micro_batch=micro_batch)
        with pytest.raises(errors.DeviceMemoryFull, match="micro_batch=auto"):
            learner.train(0, Steps(), never)


def test_the_micro_batch_is_found_where_asked(tiny_model, rows, monkeypatch):
    sizes = []

    def room_for_two(adapter, rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. See docs.")
        return summed_loss(adapter, rows)

    expected = learner_of(fresh_adapter(tiny_model), rows, settings(2), micro_batch=2)
    expected.train(0, Steps(), never)
    monkeypatch.setattr(learner_module, "summed_loss", room_for_two)
    learner = learner_of(fresh_adapter(tiny_model), rows, settings(2), micro_batch="auto")
    learner.train(0, Steps(), never)
    assert sizes == [6, 3, 2, 2, 2, 2, 2, 2]  # it is found once, and kept
    assert np.array_equal(learner.values(), expected.values())


def test_rows_that_count_no_token_do_not_harm(tiny_adapter, rows):
    silent = Row((1, 2, 3), (IGNORED,) * 3)
    training = settings(2, batch_size=1)
    work = learner_of(tiny_adapter, [silent, rows[0]], training).train(0, Steps(), never)
    assert (work.steps, work.skipped) == (1, 1)


def test_gradient_checkpointing_changes_memory_and_not_values(tiny_model, rows):
    values = []
    for checkpointing in (False, True):
        base = load_base(tiny_model, 1, "cpu")
        lora = LoraConfig(r=4, dropout=0.0)
        adapter = attach_adapter(base, lora, 1, gradient_checkpointing=checkpointing)
        assert checkpointing is any(
            getattr(module, "gradient_checkpointing", False) for module in adapter.model.modules()
        )
        learner = learner_of(adapter, rows, settings(2))
        learner.train(0, Steps(), never)
        values.append(learner.values())
    assert np.allclose(values[0], values[1], atol=1e-6)
    assert not np.array_equal(values[1], adapter.initial_values(1))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_8_bit_optimizers_train(tiny_model, rows, optimizer):
    adapter = fresh_adapter(tiny_model, r=64)  # 64 x 64: small tensors are kept in 32 bits
    training = settings(5, optimizer=optimizer, learning_rate=0.01)
    steps = Steps()
    learner = learner_of(adapter, rows, training)
    learner.train(0, steps, never)
    states = learner._optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    assert steps.seen[-1].loss < steps.seen[0].loss


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_base_trains_a_float32_adapter(tiny_model, rows, dtype):
    adapter = fresh_adapter(tiny_model.model_copy(update={"dtype": dtype}))
    learner = learner_of(adapter, rows, settings(10, learning_rate=0.02))
    steps = Steps()
    work = learner.train(0, steps, never)
    assert work.skipped == 0
    assert steps.seen[-1].loss < steps.seen[0].loss
    assert learner._scaler.is_enabled() == (dtype == "float16")


def test_a_source_gives_each_row_of_its_shard_once_per_pass(rows):
    source = ShardSource(rows, [1, 3, 5], seed=1)
    assert source.rows == 3
    passes = [source.next_batch(3) for _ in range(2)]
    for batch in passes:
        assert {r.input_ids for r in batch} == {rows[i].input_ids for i in (1, 3, 5)}
    source.switch([0, 2])
    assert source.rows == 2
    assert {r.input_ids for r in source.next_batch(2)} == {rows[i].input_ids for i in (0, 2)}


def test_the_rate_falls_over_the_whole_run():
    training = settings(learning_rate=1.0, schedule="linear")
    assert [learning_rate(training, 10, p) for p in (0, 2.5, 5, 10)] == [1, 0.75, 0.5, 0]
    training = settings(learning_rate=1.0, schedule="cosine")
    cosine = [learning_rate(training, 10, p) for p in (0, 5, 10)]
    assert cosine == pytest.approx([1, 0.5, 0])
    training = settings(learning_rate=1.0, schedule="constant")
    assert [learning_rate(training, 10, p) for p in (0, 5, 10)] == [1, 1, 1]


def test_the_rate_warms_up_first():
    training = settings(learning_rate=1.0, schedule="linear", warmup_rounds=2.0)
    rates = [learning_rate(training, 10, p) for p in (0, 0.5, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 3.0, 50.0])
def test_the_rate_is_never_negative_nor_above_the_peak(schedule, warmup):
    training = settings(learning_rate=1.0, schedule=schedule, warmup_rounds=warmup)
    for position in np.linspace(0, 12, 49):  # a little beyond the run's end
        assert 0 <= learning_rate(training, 10, float(position)) <= 1


@pytest.mark.parametrize(
    ("rule", "trained"), [("both", "AB AB AB"), ("freeze_a", "B B B"), ("alternate", "B A B")]
)
def test_a_round_trains_its_part_of_the_adapter_only(tiny_adapter, rows, rule, trained):
    run = run_of(settings(2, learning_rate=0.01, weight_decay=0.1), lora=rule)
    learner = Learner(tiny_adapter, Cycle(rows), run)
    for round, halves in enumerate(trained.split()):
        before = learner.values()
        learner.train(round, Steps(), never)
        changed = {
            name.split(".")[-2][-1]
            for (name, new), old in zip(
                tiny_adapter.tensors(learner.values()).items(),
                tiny_adapter.tensors(before).values(),
                strict=True,
            )
            if not np.array_equal(new, old)
        }
        assert changed == set(halves)
        part = learner.part(round)
        outside = np.ones(learner.size, bool)
        outside[part] = False
        assert np.array_equal(learner.values()[outside], before[outside])


def test_the_moments_of_a_half_wait_for_its_next_round(tiny_adapter, rows):
    run = run_of(settings(2, learning_rate=0.01), lora="alternate")
    learner = Learner(tiny_adapter, Cycle(rows), run)
    for round in range(4):
        learner.train(round, Steps(), never)
    counts = {int(state["step"]) for state in learner._optimizer.state.values()}
    assert counts == {4}
