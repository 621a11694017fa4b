"""The LoRA adapter, seen as one flat float32 array of values in one fixed order.

The order, names and shapes are equal on all peers of a run, whatever device and precision the base
has; so are the first values. It does not know rounds or other peers.
"""

import difflib
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import safetensors.numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from p2pllm.config.run import LoraConfig
from p2pllm.errors import AdapterDiffers, LoraRefused, LoraTargetMissing
from p2pllm.model.draws import uniform
from p2pllm.model.pretrained import Base

Values = npt.NDArray[np.float32]

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


class Adapter:
    """The trainable tensors of a PEFT model: first every A, then every B, each sorted by the names
    they have in a PEFT folder. So each half is one slice of the values."""

    def __init__(self, model: peft.PeftModel, base: Base) -> None:
        self.model = model
        self.base = base
        # PEFT puts the adapter's own name, "default", into parameter names but not into files.
        found = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = {name: found[name] for name in sorted(found, key=_place)}
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self.size_of_a = sum(p.numel() for n, p in self.parameters.items() if ".lora_A." in n)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def layout_sha256(self) -> str:
        """Equal on two peers exactly if their values mean the same tensors."""
        return hashlib.sha256(json.dumps(list(self.shapes.items())).encode()).hexdigest()

    def values(self) -> Values:
        """A copy of all values, shape (size,)."""
        parts = [parameter.detach().reshape(-1) for parameter in self.parameters.values()]
        flat: Values = torch.cat(parts).cpu().numpy()
        return flat

    def adopt(self, values: Values) -> None:
        """Replace all values.

        Raises:
            AdapterDiffers: the array has another length.
        """
        for name, part in self.tensors(values).items():
            parameter = self.parameters[name]
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(part))

    def tensors(self, values: Values) -> dict[str, Values]:
        """The parts of `values`, by tensor name, in their shapes; views, where it is float32.

        Raises:
            AdapterDiffers: the array has another length.
        """
        if values.shape != (self.size,):
            raise AdapterDiffers(expected=self.size, found=values.size)
        parts: dict[str, Values] = {}
        start = 0
        for name, shape in self.shapes.items():
            end = start + int(np.prod(shape))
            parts[name] = values[start:end].astype(np.float32, copy=False).reshape(shape)
            start = end
        return parts

    def train_only(self, part: slice) -> None:
        """Let gradients reach these values only, whole tensors of the flat adapter."""
        start = 0
        for parameter in self.parameters.values():
            parameter.requires_grad_(part.start <= start < part.stop)
            start += parameter.numel()

    def initial_values(self, seed: int) -> Values:
        """LoRA's first values: A Kaiming-uniform, B zero, so that the adapter changes nothing yet.

        The bound is PEFT's, sqrt(1 / fan_in); the draws are bit-identical on every machine.
        """
        parts = [
            uniform(seed, name, shape, shape[1] ** -0.5)
            if ".lora_A." in name
            else np.zeros(shape, np.float32)
            for name, shape in self.shapes.items()
        ]
        return np.concatenate([part.reshape(-1) for part in parts])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the model answers as its base does."""
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path, values: Values) -> None:
        """Write `values` into `folder` as PEFT does: its config file and one safetensors file."""
        described = self.model.peft_config["default"].to_dict() | {
            "base_model_name_or_path": self.base.name,
            "revision": self.base.revision,
            "inference_mode": True,
        }
        ordered = {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()}
        (folder / CONFIG_FILE).write_text(json.dumps(ordered, indent=2, sort_keys=True))
        # Through bytes: the library's own file writer hides the errno of a full disk.
        content = safetensors.numpy.save(self.tensors(values), metadata={"format": "pt"})
        (folder / TENSOR_FILE).write_bytes(content)


def attach_adapter(
    base: Base, lora: LoraConfig, seed: int, gradient_checkpointing: bool = False
) -> Adapter:
    """Put a LoRA adapter with its first values on `base`, whose layers PEFT replaces in place.

    Raises:
        LoraTargetMissing: `lora.target` names a module that is no linear layer of the model.
        LoraRefused: PEFT will not have these settings.
    """
    if isinstance(lora.target, tuple):
        _check_target(base.model, lora.target)
    named = list(lora.target) if isinstance(lora.target, tuple) else lora.target
    try:
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=None if named == "auto" else named,
            task_type="CAUSAL_LM",
        )
        with _old_words_allowed():
            model = peft.get_peft_model(base.model, config)
    except (ValueError, TypeError) as error:
        raise LoraRefused(reason=error, present=_listed(_linear_names(base.model))) from error
    adapter = Adapter(model, base)
    for parameter in adapter.parameters.values():
        parameter.data = parameter.data.float()
    adapter.adopt(adapter.initial_values(seed))
    if gradient_checkpointing:
        # Non-reentrant: the other kind gives no gradients where the input needs none.
        with _old_words_allowed():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapter


def adapter_values(folder: Path) -> Values:
    """The flat values in a PEFT folder, in the same order as `Adapter.values`."""
    tensors = safetensors.numpy.load_file(folder / TENSOR_FILE)
    parts = [
        np.asarray(tensors[name], np.float32).reshape(-1) for name in sorted(tensors, key=_place)
    ]
    return np.concatenate(parts)


def _place(name: str) -> tuple[bool, str]:
    """By what tensors are sorted."""
    return ".lora_A." not in name, name


@contextmanager
def _old_words_allowed() -> Iterator[None]:
    """transformers 5 renames its words for gradient checkpointing; PEFT still says the old ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*`", FutureWarning)
        yield


def _check_target(model: PreTrainedModel, target: tuple[str, ...]) -> None:
    present = _linear_names(model)
    missing = [
        wanted
        for wanted in target
        if not any(name == wanted or name.endswith("." + wanted) for name in present)
    ]
    if missing or not target:
        last = {name.rpartition(".")[2] for name in present}
        near = [n for wanted in missing for n in difflib.get_close_matches(wanted, last, n=2)]
        raise LoraTargetMissing(
            missing=", ".join(missing) or "nothing",
            nearest=f"Did you mean {' or '.join(near)}? " if near else "",
            present=_listed(present),
        )


def _linear_names(model: PreTrainedModel) -> list[str]:
    # bitsandbytes' quantised layers are subclasses of torch.nn.Linear; GPT-2 has Conv1D instead.
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]


def _listed(names: list[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
