"""UnitedLLM's keys about training, evaluation and all the rest: what each one means there, and what
it becomes here.

The meanings are those of FedML's code (python/spotlight_prj/unitedllm and python/fedml/train/llm,
2024-05), where it differs from the comments in its configuration file.
"""

import math
from pathlib import PurePath
from typing import Any

from p2pllm.config.unitedllm_rules import (
    Given,
    Ignored,
    Mapped,
    Outcome,
    Refused,
    Rule,
    choice,
    each,
    ignored,
    is_on,
    is_positive,
    local_steps_of,
    positive,
    to_peer,
    to_run,
)

_STEPS_UNKNOWN = "without local_max_steps the steps of a round are not known; "

# ---- train_args


def _optimizer(value: Any, given: Given) -> Outcome:
    ours = {
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_8bit": "adamw_8bit",
        "paged_adamw_8bit": "paged_adamw_8bit",
    }
    name = str(value)
    if name not in ours and not name.startswith("adamw"):
        return Refused(f"{name} has no counterpart; AdamW is used (training.optimizer)")
    reason = "its moments stay local, as there"
    return Mapped(run={"training.optimizer": ours.get(name, "adamw")}, reason=reason)


def _client_optimizer(value: Any, given: Given) -> Outcome:
    return Ignored("optim overrides it") if given.get("optim") else _optimizer(value, given)


def _clients_per_round(value: Any, given: Given) -> Outcome:
    count = int(value)
    run: dict[str, int] = {"averaging.min_peers": count}
    if count > 16:
        run["averaging.max_group"] = count
    reason = "a round waits for so many; a smaller number lets a run go on with fewer"
    return Mapped(run=run, reason=reason)


def _batch(value: Any, given: Given) -> Outcome:
    size = int(given.get("per_device_train_batch_size", 8))
    samples = size * int(given.get("gradient_accumulation_steps", 1))
    reason = "one step's samples, agreed by all; each peer splits them as its memory allows"
    return Mapped({"training.batch_size": samples}, {"micro_batch": size}, reason)


def _schedule(value: Any, given: Given) -> Outcome:
    ours = {"linear": "linear", "cosine": "cosine"}
    constant = {"constant": "constant", "constant_with_warmup": "constant"}
    rule = choice("training.schedule", ours | constant, "linear is used (training.schedule)")
    return rule(value, given)


def _warmup_steps(value: Any, given: Given) -> Outcome:
    steps = local_steps_of(given)
    if steps is None:
        return Refused(_STEPS_UNKNOWN + "give training.warmup_rounds")
    rounds = round(float(value) / steps, 6)
    reason = f"{value} steps of {steps} a round, once in the whole run"
    return Mapped(run={"training.warmup_rounds": rounds}, reason=reason)


def _warmup_ratio(value: Any, given: Given) -> Outcome:
    if is_positive(given.get("warmup_steps")):
        return Ignored("warmup_steps overrides it")
    return Mapped(run={"training.warmup_rounds": float(value) * int(given["comm_round"])})


def _output(value: Any, given: Given) -> Outcome:
    kept = [part for part in PurePath(str(value)).parts if "{run_id}" not in part]
    reason = "below it, <run>/<peer>/ is made in any case"
    return Mapped(peer={"output": str(PurePath(*kept))}, reason=reason)


def _local_steps(value: Any, given: Given) -> Outcome:
    if not is_positive(value):
        return Ignored("not positive: the number of epochs decides")
    return Mapped(run={"training.local.steps": int(value)})


def _local_epochs(value: Any, given: Given) -> Outcome:
    if local_steps_of(given) is not None:
        return Ignored("local_max_steps overrides it")
    if not is_positive(value):
        return Ignored("not positive: the number of steps decides")
    reason = "passes over the peer's own part of the rows"
    return Mapped(run={"training.local.epochs": float(value)}, reason=reason)


def _alias(name: str, rule: Rule) -> Rule:
    return lambda value, given: (
        Ignored(f"{name} overrides it") if name in given else rule(value, given)
    )


def _only(expected: float) -> Rule:
    def rule(value: Any, given: Given) -> Outcome:
        if float(value) == expected:
            return Ignored("as here")
        return Refused(f"AdamW's {expected:g} is used")

    return rule


_ROUNDS = "evaluations and checkpoints follow rounds, not steps"
TRAINING: dict[str, Rule] = {
    "federated_optimizer": choice(
        "averaging.outer",
        {"FedAvg": "mean"},
        "the mean is used; averaging.outer: nesterov, averaging.robust and averaging.clip are ours",
    ),
    "client_optimizer": _client_optimizer,
    "optim": _optimizer,
    "server_optimizer": ignored("nothing reads it; averaging.outer does what it seems to mean"),
    "client_num_in_total": to_run(
        "data.shards", int, "so many parts of the rows; more trainers than parts need more"
    ),
    "client_num_per_round": _clients_per_round,
    "comm_round": to_run("rounds", int),
    "deepspeed": lambda value, given: (
        Refused("each GPU holds a whole base model; quantise a large one (model.quantization: nf4)")
        if value
        else Ignored("it is off")
    ),
    "ddp_find_unused_parameters": ignored("set as DDP needs it"),
    "seed": to_run("seed", int),
    "bf16": lambda value, given: _half("bfloat16", value),
    "fp16": lambda value, given: (
        Ignored("bf16 decides") if is_on(given.get("bf16")) else _half("float16", value)
    ),
    "gradient_checkpointing": to_peer("gradient_checkpointing", is_on),
    "per_device_train_batch_size": _batch,
    "gradient_accumulation_steps": _batch,
    "per_device_eval_batch_size": to_run("evaluation.batch_size", int),
    "auto_find_batch_size": lambda value, given: (
        Mapped(peer={"micro_batch": "auto"}) if is_on(value) else Ignored("it is off")
    ),
    "eval_accumulation_steps": ignored("only the loss is gathered"),
    "learning_rate": to_run("training.learning_rate", float),
    "lr_scheduler_type": _schedule,
    "warmup_steps": _warmup_steps,
    "warmup_ratio": _warmup_ratio,
    "weight_decay": to_run("training.weight_decay", float),
    "max_grad_norm": positive(to_run("training.max_grad_norm", float)),
    "adam_beta1": _only(0.9),
    "adam_beta2": _only(0.999),
    "adam_epsilon": _only(1e-8),
    "output_dir": _output,
    "save_total_limit": lambda value, given: Mapped(
        run={"checkpoint.keep": int(value) if is_positive(value) else None}
    ),
    "local_max_steps": _local_steps,
    "max_steps": _alias("local_max_steps", _local_steps),
    "local_num_train_epochs": _local_epochs,
    "num_train_epochs": _alias("local_num_train_epochs", _local_epochs),
    "save_on_each_node": ignored("each peer writes below its own folder"),
    **each("logging_strategy evaluation_strategy eval_strategy save_strategy", ignored(_ROUNDS)),
    **each("logging_steps eval_steps save_steps", ignored(_ROUNDS)),
}


def _half(dtype: str, value: Any) -> Outcome:
    if not is_on(value):
        return Ignored("it is off")
    reason = "the frozen base is held and computed in it; adapters stay float32"
    return Mapped(run={"model.dtype": dtype}, reason=reason)


# ---- validation_args


def _every(value: Any, given: Given) -> Outcome:
    if not is_positive(value):
        return Refused("it is no number of rounds; every round is evaluated (evaluation.every)")
    return Mapped(run={"evaluation.every": int(value)}, reason="and always the last round")


def _test_on_clients(value: Any, given: Given) -> Outcome:
    when = {"before_aggregation": "before", "after_aggregation": "after", "both": "both"}
    word = when.get(str(value), "never" if not is_on(value) else None)
    if word is None:
        return Refused(f"{value} is none of {', '.join(when)} and no; trainers do not evaluate")
    reason = "the final adapter, too, which was never tested there" if word != "never" else ""
    return Mapped(run={"evaluation.on_trainers": word}, reason=reason)


def _test_on_ranks(value: Any, given: Given) -> Outcome:
    reason = f"peers have no ranks: give this to peer {value}, and evaluate: false to the others"
    return Mapped(peer={"evaluate": bool(value)}, reason=reason)


def _save_frequency(value: Any, given: Given) -> Outcome:
    reason = "in rounds, in truth; 0 is off, where it divided by zero"
    if value is None or int(value) < 0:
        value, reason = given.get("frequency_of_the_test", 1), "the same as frequency_of_the_test"
    return Mapped(run={"checkpoint.every": max(int(value), 0)}, reason=reason)


def _extra_saves(value: Any, given: Given) -> Outcome:
    wanted, steps = [int(step) for step in value or []], local_steps_of(given)
    if not wanted or min(wanted) <= 0:
        return Ignored("it is off")
    if steps is None:
        return Refused(_STEPS_UNKNOWN + "name the rounds in checkpoint.at")
    rounds = {math.ceil(step / steps) for step in wanted}
    reason = "at the end of the round with that step"
    return Mapped(run={"checkpoint.at": sorted(rounds)}, reason=reason)


VALIDATION: dict[str, Rule] = {
    "frequency_of_the_test": _every,
    "test_on_clients": _test_on_clients,
    "test_on_client_ranks": _test_on_ranks,
    "is_aggregator_test": lambda value, given: Ignored(
        "an aggregator evaluates"
        if is_on(value)
        else "an aggregator evaluates, unless: p2pllm aggregate --set evaluate=false"
    ),
    "save_frequency": _save_frequency,
    "extra_save_steps": _extra_saves,
}
