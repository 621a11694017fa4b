"""Any script around transformers.Trainer as a peer of a run: a callback.

The trainer role runs in a thread of its own, unchanged, with a learner that hands its local epochs
over to the script (`script_learner.py`).
"""

import atexit
import math
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import peft
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from p2pllm.config.peer import NetworkConfig, PeerConfig
from p2pllm.config.run import RunConfig
from p2pllm.errors import AdapterUnlike, NotAPeftModel, WeightsDiffer
from p2pllm.events import Events
from p2pllm.model.adapter import Adapter
from p2pllm.model.pretrained import Base, locate
from p2pllm.model.weights import weights_sha256
from p2pllm.roles.entry import Seat, agree_on_base, seat_in_run
from p2pllm.roles.leases import UnsharedRows
from p2pllm.roles.script_learner import ScriptLearner
from p2pllm.roles.trainer import Trainer

_FAREWELL = 15.0  # seconds in which the peer leaves


class GossipCallback(TrainerCallback):
    """Makes a transformers.Trainer with a PEFT model a peer: `Trainer(..., callbacks=[this])`.

    It catches up when training starts, averages after each local epoch of the run, and stops the
    training when the run is over; so give the script more epochs than it needs. Rows, batch and
    optimizer are the script's own. One process; a machine with several GPUs uses `p2pllm join`.
    """

    def __init__(
        self,
        *initial_peers: str,
        schedule: Literal["run", "script"] = "run",
        events: Events | None = None,
        **settings: Any,
    ) -> None:
        """initial_peers: multiaddrs. schedule: whose learning rate counts; the run's follows the
        global round, so that a late joiner has the others'. settings: of `PeerConfig`."""
        network = NetworkConfig(**{"initial_peers": initial_peers, **settings.pop("network", {})})
        self._config = PeerConfig(network=network, **settings)
        self._events, self._schedule = events or Events(), schedule
        self._stop = threading.Event()
        self._problem: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loss = math.nan

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Join, and catch up. Raises letters."""
        if not isinstance(model, peft.PeftModel):
            raise NotAPeftModel(kind=type(model).__name__)
        end = ExitStack()
        seat = end.enter_context(seat_in_run(self._config, "trainer", self._events, self._stop))
        try:
            adapter = _adapter_of(model, seat)
            self._learner = ScriptLearner(adapter, seat.manifest.run)
            self._learner.steps_planned = _steps_planned(seat.manifest.run, args, train_dataloader)
            role = Trainer(seat, self._learner, adapter, UnsharedRows())
        except BaseException:
            end.close()
            raise
        self._thread = threading.Thread(target=self._live, args=(role, end), daemon=True)
        self._thread.start()
        atexit.register(self._leave)  # a script that fails says good-bye all the same
        self._obey(self._learner.wait_for_turn(), control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """The learning rate of the run, whatever the script's scheduler has set."""
        if self._schedule == "run":
            for group in optimizer.param_groups:
                group["lr"] = self._learner.rate()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._loss = float((logs or {}).get("loss", self._loss))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Average, where a local epoch is over."""
        samples = args.train_batch_size * args.gradient_accumulation_steps
        rate = self._learner.rate()
        self._obey(self._learner.step_done(samples, self._loss, rate), control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave; or, after the run's last round, stay until nobody needs our adapter."""
        self._leave()

    def _obey(self, goes_on: bool, control: TrainerControl) -> None:
        if self._problem is not None:
            raise self._problem
        if not goes_on:
            control.should_training_stop = True

    def _live(self, role: Trainer, end: ExitStack) -> None:
        """In the peer's thread, all its life."""
        try:
            with end:
                role.run()
        except BaseException as problem:  # noqa: BLE001  # it is raised again in the script
            self._problem = problem
        finally:
            self._learner.end()

    def _leave(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._learner.end()
            self._thread.join(_FAREWELL)
            self._thread = None


def _adapter_of(model: peft.PeftModel, seat: Seat) -> Adapter:
    """The script's adapter, if it is of the run's shape and on the run's base.

    Raises: AdapterUnlike, WeightsDiffer, BaseDiffers, and the letters of `locate`.
    """
    run, config = seat.manifest.run, model.peft_config["default"]
    found = (getattr(config, "r", None), getattr(config, "lora_alpha", None))
    if found != (run.lora.r, run.lora.alpha):
        raise AdapterUnlike(r=found[0], alpha=found[1], run_r=run.lora.r, run_alpha=run.lora.alpha)
    name = str(cast(Any, model.get_base_model()).name_or_path)
    folder = Path(name) if Path(name).is_dir() else locate(run.model, run.seed)
    weights = weights_sha256(folder)
    if run.model.weights_sha256 not in (None, weights):
        raise WeightsDiffer(name=name, expected=run.model.weights_sha256, found=weights)
    bare, no_tokenizer = cast(Any, model.get_base_model()), cast(Any, None)
    base = Base(bare, no_tokenizer, weights, folder, name, run.model.revision)
    agree_on_base(seat, base)
    adapter = Adapter(model, base)
    for parameter in adapter.parameters.values():
        parameter.data = parameter.data.float()
    return adapter


def _steps_planned(run: RunConfig, args: TrainingArguments, loader: Any) -> int | None:
    """Optimizer steps in a local epoch; None where it is bounded by time."""
    local = run.training.local
    if local.epochs is not None:  # of the script's own rows
        batches = local.epochs * len(loader) / args.gradient_accumulation_steps
        return max(1, math.ceil(batches))
    return local.steps
