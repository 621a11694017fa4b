"""UnitedLLM's keys about data and model: what each one means there, and what it becomes here.

The meanings are those of FedML's code (python/fedml/train/llm, 2024-05), where it differs from the
comments in its configuration file.
"""

import re
from typing import Any

from p2pllm.config.peer import PeerConfig
from p2pllm.config.unitedllm_rules import (
    Given,
    Ignored,
    Mapped,
    Outcome,
    Refused,
    Rule,
    choice,
    ignored,
    is_on,
    is_positive,
    off_or_refused,
    paths_in,
    positive,
    table_in,
    to_peer,
    to_run,
)

# ---- data_args


def _dataset_name(value: Any, given: Given) -> Outcome:
    if not value:
        return Ignored("it is empty")
    reason = "every client trained on all of it; here each trainer leases a part"
    return Mapped(run={"data.source": str(value)}, reason=reason)


def _dataset_path(value: Any, given: Given) -> Outcome:
    paths = paths_in(value)
    if not paths:
        return Ignored("it is empty")
    if given.get("dataset_name"):
        return Ignored("dataset_name overrides it")
    if any("{" in path for path in paths):
        if given.get("client_dataset_path"):
            return Ignored("client_dataset_path replaces it")
        reason = "it differs from client to client, so it is the peer's; data.source is still open"
        return Mapped(peer=_private(paths), reason=reason)
    names = {"data.source": paths[0]}
    if len(paths) == 1:
        return Mapped(run=names)
    return Mapped(run=names | {"data.eval_source": paths[1]}, reason="the second is held out")


def _client_dataset_path(value: Any, given: Given) -> Outcome:
    paths = paths_in(value)
    if not paths:
        return Ignored("it is empty; clients that had only dataset_path failed on it")
    reason = "private rows"
    if "{shard}" in paths[0]:
        reason += "; written for rank 1: each peer says its own `shard`"
    if len(paths) > 1:
        reason += "; all evaluate on the run's held-out rows, not on a client's second file"
    return Mapped(peer=_private(paths), reason=reason)


def _private(paths: list[str]) -> dict[str, Any]:
    """The first path. A {shard} in it needs a number: files were numbered by rank, from 1."""
    needs_number = "{shard}" in paths[0] and "shard" in PeerConfig.model_fields
    return {"data": paths[:1], **({"shard": 1} if needs_number else {})}


def _eval_size(value: Any, given: Given) -> Outcome:
    if is_positive(given.get("test_dataset_ratio")):
        return Ignored("test_dataset_ratio overrides it")
    return _held_out(int(value), given)


def _held_out(size: int | float, given: Given) -> Outcome:
    if given.get("dataset_name"):
        reason = "where the data set has a test split, say data.eval_split: test instead"
        return Mapped(run={"data.eval_size": size}, reason=reason)
    if len(paths_in(given.get("dataset_path"))) > 1:
        return Ignored("the second file of dataset_path is held out")
    return Mapped(run={"data.eval_size": size})


def _remove_long(value: Any, given: Given) -> Outcome:
    if not is_on(value):
        return Ignored("it is off")
    if is_on(given.get("dataset_streaming")):
        return Ignored("streaming switches it off")
    return Mapped(run={"data.long_rows": "drop"})


def _truncate_long(value: Any, given: Given) -> Outcome:
    if is_on(given.get("remove_long_seq")) and not is_on(given.get("dataset_streaming")):
        return Ignored("remove_long_seq drops them first")
    if is_on(value):
        return Mapped(run={"data.long_rows": "truncate"})
    return Refused("rows longer than data.max_length are cut or dropped (data.long_rows)")


def _response_template(value: Any, given: Given) -> Outcome:
    if value:
        reason = "the answer is found by its place in the row, not by a search for this text"
        return Mapped(run={"data.train_on": "answer"}, reason=reason)
    return Mapped(run={"data.train_on": "all"}, reason="empty: the loss counts the prompt, too")


def _max_length(value: Any, given: Given) -> Outcome:
    if value is not None:
        return Mapped(run={"data.max_length": int(value)})
    reason = "there: the model's whole context, and every row padded to it; here only the longest"
    return Mapped(run={"data.max_length": 1024}, reason=reason)


_COLUMNS = "to our columns instruction, context, response, category and text"
DATA: dict[str, Rule] = {
    "dataset": ignored("a label that nothing reads"),
    "dataset_name": _dataset_name,
    "dataset_path": _dataset_path,
    "client_dataset_path": _client_dataset_path,
    "dataset_config_name": lambda value, given: (
        Mapped(run={"data.config_name": str(value)}) if value else Ignored("it is empty")
    ),
    "test_dataset_size": positive(_eval_size),
    "test_dataset_ratio": positive(lambda value, given: _held_out(float(value), given)),
    "eval_dataset_size": positive(to_run("evaluation.max_rows", int)),
    "remove_long_seq": _remove_long,
    "truncate_long_seq": _truncate_long,
    "max_seq_length": _max_length,
    "dataset_streaming": to_run("data.streaming", is_on),
    "tokenize_on_the_fly": ignored("rows are tokenised once, or as they are streamed"),
    "remove_unused_columns": ignored("columns without a meaning are never carried along"),
    "response_template": _response_template,
    "prompt_style": choice(
        "data.template",
        {"default": "alpaca", "dolly": "dolly", "llama": "llama2"},
        "name one of ours under data.template, or write a template there",
    ),
    "column_name_mapping": lambda value, given: (
        Mapped(run={"data.columns": table_in(value)}, reason=_COLUMNS)
        if value
        else Ignored("the default (input, output, content) is known here, too")
    ),
    "data_keyword_replacements": lambda value, given: (
        Mapped(run={"data.replace": table_in(value)})
        if value
        else Refused("nothing is replaced by itself; list it under data.replace")
    ),
    "disable_data_keyword_replacement": ignored("nothing is replaced unless data.replace says so"),
    "dataset_num_proc": ignored("tokenising uses the threads of the tokenizer"),
    "cleanup_data_cache": ignored("no converted copies of the data are kept"),
}

# ---- model_args


def _target_modules(value: Any, given: Given) -> Outcome:
    names = [value] if isinstance(value, str) else list(value or [])
    if not names:
        return Ignored("PEFT's choice for the architecture, which is lora.target: auto")
    if is_on(given.get("lora_on_all_modules")):
        return Ignored("lora_on_all_modules includes them")
    if len(names) == 1 and re.search(r"[*|()\[\]\\]", str(names[0])):
        return Refused("a regular expression; name the modules in lora.target")
    return Mapped(run={"lora.target": [str(name) for name in names]})


def _all_modules(value: Any, given: Given) -> Outcome:
    if not is_on(value):
        return Ignored("it is off")
    reason = "every linear layer but the head; there the head and the embeddings, too"
    return Mapped(run={"lora.target": "all-linear"}, reason=reason)


def _tokenizer(value: Any, given: Given) -> Outcome:
    if not value or value == given.get("model_name_or_path"):
        return Ignored("the tokenizer comes with the model")
    return Refused("the tokenizer always comes with the model; put both into one folder")


def _load_pretrained(value: Any, given: Given) -> Outcome:
    if is_on(value):
        return Ignored("published weights are always loaded")
    return Refused(
        "it trains an adapter on a random, frozen network that differs between server and clients; "
        "the published weights are loaded instead"
    )


def _model_dtype(value: Any, given: Given) -> Outcome:
    if is_on(given.get("bf16")) or is_on(given.get("fp16")):
        return Ignored("bf16 or fp16 decides")
    ours = dict.fromkeys(("none", "fp32", "float", "float32"), "float32")
    ours |= {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
    if (name := str(value).lower()) not in ours:
        return Refused(f"{value} is no dtype there; bfloat16 is used (model.dtype)")
    reason = "of the frozen base; adapters are float32 here, and averaged so"
    return Mapped(run={"model.dtype": ours[name]}, reason=reason)


def _peft_type(value: Any, given: Given) -> Outcome:
    if value == "lora":
        reason = "always LoRA; its shape is in the keys below `lora`"
        return Mapped(reason=reason)
    return Refused("it crashes there; here, too, only LoRA adapters are trained and averaged")


MODEL: dict[str, Rule] = {
    "skip_log_model_net": ignored("no network is traced or uploaded"),
    "model_name_or_path": to_run("model.name", str, "peers compare the hashes of its weights"),
    "model_revision": lambda value, given: (
        Mapped(run={"model.revision": str(value)})
        if value
        else Ignored("the newest; better name a commit in model.revision")
    ),
    "tokenizer_name_or_path": _tokenizer,
    "tokenizer_revision": ignored("the tokenizer comes with the model"),
    "auth_token": ignored("secrets never enter a run; log in on each machine: hf auth login"),
    "trust_remote_code": off_or_refused("nobody's code is run by joining"),
    "use_fast_tokenizer": ignored("fast ones are used where the model has one"),
    "use_flash_attention": to_peer(
        "attention", lambda value: "flash_attention_2" if is_on(value) else "auto"
    ),
    "load_pretrained": _load_pretrained,
    "model_dtype": _model_dtype,
    "peft_type": _peft_type,
    "lora_r": to_run("lora.r", int),
    "lora_alpha": to_run("lora.alpha", int),
    "lora_dropout": to_run("lora.dropout", float),
    "lora_target_modules": _target_modules,
    "lora_on_all_modules": _all_modules,
}
