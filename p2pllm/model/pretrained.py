"""The frozen base model: found, identified and loaded. Safetensors only; no code of a model runs.

It does not know adapters, and it asks no other peer anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from p2pllm.config.run import ModelConfig
from p2pllm.errors import (
    AttentionMissing,
    BaseNotLoaded,
    DeviceMissing,
    ModelGated,
    ModelNotFetched,
    QuantizationUnavailable,
    WeightsDiffer,
)
from p2pllm.model.packaged import PREFIX, packaged_model
from p2pllm.model.random_init import random_model
from p2pllm.model.weights import weights_sha256

# Weights, configuration and tokenizers; never .bin, .pt, .py or a second copy of the weights.
FETCHED = ("model*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt")
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


@dataclass(frozen=True)
class Base:
    """A base model in memory. `name` and `revision` are the run's words for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_sha256: str
    folder: Path
    name: str
    revision: str | None


def load_base(model: ModelConfig, seed: int, device: str = "auto", attention: str = "auto") -> Base:
    """Find the base model, check that it is the run's, and load it frozen onto `device`.

    `seed` matters to `model.random_init` only. `device` and `attention` as in PeerConfig.

    Raises:
        WeightsDiffer: the weights are not those that the run was founded with.
        P2PLLMError: any other letter of the sections "model"; see `locate`.
    """
    place = choose_device(device)
    folder = locate(model, seed)
    found = weights_sha256(folder)
    name = model.name or "random-init"
    if model.weights_sha256 not in (None, found):
        raise WeightsDiffer(name=name, expected=model.weights_sha256, found=found)
    tokenizer = load_tokenizer(folder)
    loaded = _load(model, folder, place, attention)
    loaded.requires_grad_(False)
    loaded.eval()
    _keep_trainable(loaded)
    return Base(loaded, tokenizer, found, folder, name, model.revision)


def locate(model: ModelConfig, seed: int) -> Path:
    """The local folder of the base model, fetched or made if need be.

    Raises:
        ModelNotFetched, ModelGated, PackageUnknown, PackageNotFetched, PackageDiffers,
        ConversionFailed, ModelNotSupported
    """
    if model.random_init is not None:
        return random_model(model.random_init, seed)
    name = model.name or ""
    if name.startswith(PREFIX):
        return packaged_model(name.removeprefix(PREFIX))
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=list(FETCHED)))
    except GatedRepoError as error:
        raise ModelGated(name=name) from error
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        named = f"{name} (revision {model.revision})" if model.revision else name
        raise ModelNotFetched(name=named, reason=_first_line(error)) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; where it has no pad token, it pads with the end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise BaseNotLoaded(folder=folder, reason=_first_line(error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_device(device: str) -> torch.device:
    """From `auto`, `cpu`, `mps`, `cuda` or `cuda:N` to a device that is there.

    Raises:
        DeviceMissing: this machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceMissing(device=device, count=f"{torch.cuda.device_count()} CUDA devices")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceMissing(device=device, count="no MPS device")
    return wanted


def _load(
    model: ModelConfig, folder: Path, device: torch.device, attention: str
) -> PreTrainedModel:
    transformers.utils.logging.disable_progress_bar()  # the screen shows what is going on
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "device_map": {"": device}}
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        reason = "the package flash-attn is not installed, or there is no NVIDIA GPU"
        raise AttentionMissing(reason=reason)
    if attention != "auto":
        options["attn_implementation"] = attention
    if model.quantization != "none":
        if device.type == "mps":
            reason = "bitsandbytes does not run on Apple GPUs"
            raise QuantizationUnavailable(quantization=model.quantization, reason=reason)
        options["quantization_config"] = _quantization(model, device)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if model.quantization != "none" and "bitsandbytes" in str(error):
            reason = _first_line(error)
            raise QuantizationUnavailable(quantization=model.quantization, reason=reason) from error
        raise BaseNotLoaded(folder=folder, reason=_first_line(error)) from error


def _quantization(model: ModelConfig, device: torch.device) -> BitsAndBytesConfig:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # CPUs compute slowly in float16, if at all.
    narrow = device.type == "cpu" and model.dtype == "float16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if narrow else DTYPES[model.dtype],
    )


def _keep_trainable(model: PreTrainedModel) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes (0.50) packs 4-bit weights at the first evaluation
    for a kernel that passes no gradient on, and never unpacks them: after it, training would go on
    with wrong gradients. So it is not to pack them."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
