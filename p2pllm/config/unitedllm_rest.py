"""UnitedLLM's keys about machines, networks, trackers and trust: what each one means there, and
what it becomes here."""

from typing import Any

from p2pllm.config.unitedllm_rules import (
    Given,
    Ignored,
    Mapped,
    Outcome,
    Refused,
    Rule,
    each,
    ignored,
    is_on,
    off_or_refused,
    to_peer,
)

# ---- common_args, environment_args, device_args, comm_args


def _random_seed(value: Any, given: Given) -> Outcome:
    return Ignored("`seed` decides; base models are compared by their hash, not by a seed")


def _launcher(value: Any, given: Given) -> Outcome:
    ours = {"auto": "auto", "python": "python", "torch": "torchrun", "deepspeed": "torchrun"}
    if str(value) not in ours:
        return Refused(f"{value} is not known; p2pllm chooses by itself")
    reason = "torchrun starts one process for each GPU" if value == "deepspeed" else ""
    return Mapped(peer={"launcher": ours[str(value)]}, reason=reason)


def _device(value: Any, given: Given) -> Outcome:
    return Mapped(peer={"device": "auto" if is_on(value) else "cpu"})


def _device_type(value: Any, given: Given) -> Outcome:
    ours = {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}
    if value in ours:
        return Mapped(peer={"device": ours[value]})
    return Refused(f"{value} is not known; the device is chosen by what is there (device: auto)")


_BROKER = "there is no broker and no bucket: peers talk to one another"
_ARGUMENT = "an argument of UnitedLLM's scripts, not a setting"
MACHINES: dict[str, Rule] = {
    "training_type": ignored("always peer to peer"),
    "scenario": ignored("each peer trains a whole adapter on its own rows"),
    "use_customized_hierarchical": ignored("of a machine with several GPUs, one process speaks"),
    "random_seed": _random_seed,
    "bootstrap": ignored("a script for FedML's agent; here that word is a peer: p2pllm bootstrap"),
    "launcher": _launcher,
    "using_gpu": _device,  # there, a GPU that the Trainer finds is used all the same
    "device_type": _device_type,
    **each("no_cuda use_cpu", lambda value, given: _device(not is_on(value), given)),
    "gpu_id": ignored("--device cuda:N, or CUDA_VISIBLE_DEVICES"),
    "gpu_mapping_file": ignored("--device cuda:N, or CUDA_VISIBLE_DEVICES"),
    "gpu_mapping_key": ignored("--device cuda:N, or CUDA_VISIBLE_DEVICES"),
    "backend": ignored(_BROKER),
    "is_mobile": ignored("nothing reads it"),
    "data_silo_config": lambda value, given: (
        Refused("one file per client: translate each with --peer-out, and join with --config FILE")
        if value
        else Ignored("it is empty")
    ),
    **each(
        "customized_training_mqtt_config customized_training_s3_config "
        "customized_training_web3_config customized_training_thetastore_config "
        "grpc_ipconfig_path trpc_master_config_path",
        ignored(_BROKER),
    ),
    **each(
        "run_id rank client_rank role worker_num client_id_list run_device_id using_mlops "
        "node_rank local_rank unitedllm_rank",
        ignored(_ARGUMENT),
    ),
    "tolerate_num": ignored("a round starts with those that are there; see averaging.min_peers"),
    "tolerate_time": ignored("a round's deadline is learned; see averaging.deadline"),
}

# ---- tracking_args


def _trackers(value: Any, given: Given) -> Outcome:
    asked = given.get("report_to") or []
    names = [asked] if isinstance(asked, str) else [str(name) for name in asked]
    names += ["wandb"] if is_on(given.get("enable_wandb")) else []
    known = [n for n in ("tensorboard", "wandb", "trackio") if n in names or "all" in names]
    left = sorted(set(names) - {*known, "all", "none"})
    reason = f"{', '.join(left)} not; metrics.jsonl is always there" if left else ""
    return Mapped(peer={"trackers": ["jsonl", *known]}, reason=reason)


_HOSTED = "FedML's platform is not used; metrics.jsonl and p2pllm status tell the same"
TRACKING: dict[str, Rule] = {
    "enable_wandb": _trackers,
    "report_to": _trackers,
    "wandb_only_server": to_peer(
        "tracking.roles", lambda value: "aggregator" if is_on(value) else "all"
    ),
    "wandb_project": to_peer("tracking.project", str),
    "wandb_entity": to_peer("tracking.entity", str),
    "wandb_group_id": to_peer("tracking.group", str),
    "run_name": ignored("a run is named after its file, a peer by --name"),
    "wandb_name": ignored("a peer is named by --name"),
    "wandb_key": ignored("secrets never enter a file of a run; log in: wandb login"),
    "wandb_api_key": ignored("secrets never enter a file of a run; log in: wandb login"),
    **each(
        "custom_logger enable_tracking mlops_project_name mlops_api_key "
        "sys_perf_profiling log_file_dir",
        ignored(_HOSTED),
    ),
}

# ---- trust


def _defense(value: Any, given: Given) -> Outcome:
    if not is_on(value):
        return Ignored("contributions are checked in any case (averaging.robust: clip)")
    kind = str(given.get("defense_type"))
    ours = {"norm_diff_clipping": "clip", "cclip": "clip", "trimmed_mean": "trimmed_mean"}
    if kind not in ours:
        return Refused(f"{kind} has no counterpart; averaging.robust: clip, or trimmed_mean")
    return Mapped(run={"averaging.robust": ours[kind]})


def _attack(value: Any, given: Given) -> Outcome:
    return Refused("attacks are in our tests only") if is_on(value) else Ignored("it is off")


_NO_DP = (
    "there is no differential privacy here: noise without an account of what it protects would "
    "only look like it. Rows never leave a peer, deltas do"
)
TRUST: dict[str, Rule] = {
    "enable_dp": off_or_refused(_NO_DP),
    **each(
        "dp_solution_type delta epsilon mechanism_type sensitivity",
        lambda value, given: (
            Refused(_NO_DP) if is_on(given.get("enable_dp")) else Ignored("enable_dp is off")
        ),
    ),
    "enable_defense": _defense,
    "defense_type": lambda value, given: (
        _defense(True, given)
        if is_on(given.get("enable_defense"))
        else Ignored("enable_defense is off")
    ),
    "enable_attack": _attack,
    "attack_type": lambda value, given: _attack(given.get("enable_attack"), given),
    "enable_fhe": off_or_refused("deltas are not encrypted against those who average them"),
    "enable_contribution": off_or_refused("samples are counted, not valued; see p2pllm rounds"),
    "contribution_alg": ignored("see enable_contribution"),
}

# ---- the fields of transformers.TrainingArguments that do not reach training itself

_TRAINER = "a matter of Hugging Face's Trainer, whose loop is not used"
_LARGE = "each GPU holds a whole base model; quantise a large one (model.quantization: nf4)"
HUGGING_FACE: dict[str, Rule] = {
    **each(
        "overwrite_output_dir do_train do_eval do_predict prediction_loss_only "
        "disable_tqdm log_level log_level_replica log_on_each_node logging_dir "
        "logging_first_step logging_nan_inf_filter save_safetensors past_index "
        "load_best_model_at_end metric_for_best_model greater_is_better label_names "
        "dataloader_num_workers dataloader_pin_memory dataloader_drop_last "
        "group_by_length length_column_name ignore_data_skip skip_memory_metrics "
        "ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers eval_delay "
        "include_inputs_for_metrics local_process_index debug data_seed "
        "full_determinism resume_from_checkpoint tf32",
        ignored(_TRAINER),
    ),
    **each(
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo",
        ignored("the final adapter is a plain PEFT folder; upload it with: hf upload"),
    ),
    **each("fsdp fsdp_config", off_or_refused(_LARGE)),
    **each(
        "torch_compile label_smoothing_factor neftune_noise_alpha",
        off_or_refused("it has no counterpart"),
    ),
}
