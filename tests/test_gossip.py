"""The callback around transformers.Trainer, without a network: who has the turn, what counts."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from p2pllm import GossipCallback, errors
from p2pllm.config.run import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from p2pllm.events import StepDone
from p2pllm.roles.script_learner import ScriptLearner
from p2pllm.training.loss import counted

RUN = RunConfig(
    name="test",
    rounds=2,
    model=ModelConfig(name="none"),
    data=DataConfig(source="none"),
    training=TrainingConfig.model_validate({"local": {"steps": 2}, "learning_rate": 0.01}),
    averaging=AveragingConfig(lora="alternate"),
)


class Offline(GossipCallback):
    """Has its learner already; `rounds` plays the role."""

    def __init__(self, learner: ScriptLearner, rounds: Any, **options: Any) -> None:
        super().__init__(**options)
        self._learner = learner
        self._thread = threading.Thread(target=self._play, args=(rounds,), daemon=True)

    def _play(self, rounds: Any) -> None:
        try:
            rounds(self._learner)
        except errors.P2PLLMError as problem:
            self._problem = problem
        self._learner.end()

    def on_train_begin(self, args: Any, state: Any, control: Any, *_: Any, **__: Any) -> None:
        assert self._thread is not None
        self._thread.start()
        self._obey(self._learner.wait_for_turn(), control)


class Rates(TrainerCallback):
    """The learning rates that the optimizer really used."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def script(adapter, rows, callback, folder):
    rates = Rates()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=50,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in rows]
    Trainer(
        model=adapter.model, args=arguments, train_dataset=data, callbacks=[callback, rates]
    ).train()
    return rates.seen


def learner_of(adapter):
    learner = ScriptLearner(adapter, RUN)
    learner.steps_planned = 2
    return learner


def test_the_script_trains_what_the_role_asks_for_and_stops_with_the_run(
    tiny_adapter, rows, tmp_path
):
    works, states, told = [], [tiny_adapter.values()], list[StepDone]()

    def rounds(learner):
        for round in range(2):
            works.append(learner.train(round, told.append, lambda: False))
            states.append(learner.values())

    rates = script(tiny_adapter, rows, Offline(learner_of(tiny_adapter), rounds), tmp_path)
    assert rates == pytest.approx([0.01 * (1 - (step + 0.5) / 4) for step in range(4)])
    assert [(w.steps, w.samples) for w in works] == [(2, 2), (2, 2)]
    assert [(s.round, s.step) for s in told] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [s.learning_rate for s in told] == pytest.approx(rates)
    a, b = slice(0, tiny_adapter.size_of_a), slice(tiny_adapter.size_of_a, None)
    for before, after, trained, kept in ((0, 1, b, a), (1, 2, a, b)):
        assert np.array_equal(states[before][kept], states[after][kept])
        assert not np.array_equal(states[before][trained], states[after][trained])


def test_the_scripts_own_schedule_counts_where_asked(tiny_adapter, rows, tmp_path):
    def rounds(learner):
        learner.train(0, lambda step: None, lambda: False)

    callback = Offline(learner_of(tiny_adapter), rounds, schedule="script")
    assert script(tiny_adapter, rows, callback, tmp_path) == [0.5, 0.5]


def test_a_letter_of_the_peer_ends_the_script(tiny_adapter, rows, tmp_path):
    def rounds(learner):
        learner.train(0, lambda step: None, lambda: False)
        raise errors.NetworkDown(reason="pulled the plug")

    with pytest.raises(errors.NetworkDown, match="pulled the plug"):
        script(tiny_adapter, rows, Offline(learner_of(tiny_adapter), rounds), tmp_path)


def test_a_local_epoch_that_is_broken_off_goes_on_later(tiny_adapter, rows, tmp_path):
    works = []

    def rounds(learner):
        first = learner.train(0, lambda step: None, lambda: True)
        works.extend([first, learner.train(0, lambda step: None, lambda: False, first)])

    rates = script(tiny_adapter, rows, Offline(learner_of(tiny_adapter), rounds), tmp_path)
    assert [work.steps for work in works] == [1, 2]
    assert len(rates) == 2


def test_tokens_are_those_that_count_in_the_loss(tiny_adapter, rows, tmp_path):
    works, told = [], list[StepDone]()

    def rounds(learner):
        first = learner.train(0, told.append, lambda: True)  # broken off after a step
        works.extend([first, learner.train(0, told.append, lambda: False, first)])
        works.append(learner.train(1, told.append, lambda: False))

    callback = Offline(learner_of(tiny_adapter), rounds)
    script(tiny_adapter, [rows[3]] * 6, callback, tmp_path)
    tokens = counted([rows[3]])
    assert [work.tokens for work in works] == [tokens, 2 * tokens, 2 * tokens]
    assert all(step.tokens_per_second > 0 for step in told)


def test_a_model_without_an_adapter_is_a_letter(tiny_base):
    with pytest.raises(errors.NotAPeftModel, match="LlamaForCausalLM"):
        nothing = cast(Any, None)
        GossipCallback().on_train_begin(nothing, nothing, nothing, model=tiny_base.model)


def test_an_adapter_of_another_rank_is_a_letter(tiny_adapter):
    from p2pllm.roles.gossip import _adapter_of

    seat = cast(Any, SimpleNamespace(manifest=SimpleNamespace(run=RUN)))
    with pytest.raises(errors.AdapterUnlike, match="r=8, lora_alpha=16"):
        _adapter_of(tiny_adapter.model, seat)
