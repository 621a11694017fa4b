"""A small untrained Llama with a byte-level tokenizer, the same on every machine. For tests only.

It is written into the cache as an ordinary model folder, so that everything after it treats it
like any other local model. It has learned nothing: never draw a conclusion about learning from it.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from p2pllm.config.run import RandomInit
from p2pllm.errors import ModelNotSupported
from p2pllm.model.cache import made_once
from p2pllm.model.draws import uniform

EOS, PAD = 256, 257  # after the 256 bytes
# Of the tied embedding, five times the usual. The head is frozen, and with a smaller one the logits
# of a model so narrow stay so close together that no adapter could lower the loss visibly.
SPREAD = 0.1 * 3**0.5  # half the width of a uniform draw with standard deviation 0.1
EDITION = 1  # count up when the same settings shall give another model
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def random_model(shape: RandomInit, seed: int) -> Path:
    """The folder of the untrained model with this shape and seed; made at the first call."""
    if shape.hidden_size % (2 * shape.heads):
        reason = f"hidden_size {shape.hidden_size} is not an even multiple of heads {shape.heads}"
        raise ModelNotSupported(name="model.random_init", reason=reason)
    described = json.dumps([EDITION, seed, shape.model_dump()], sort_keys=True)
    name = "random-" + hashlib.sha256(described.encode()).hexdigest()[:16]
    return made_once(name, lambda folder: _write(folder, shape, seed))


def _write(folder: Path, shape: RandomInit, seed: int) -> None:
    config = LlamaConfig(
        vocab_size=PAD + 1,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype=torch.float32,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):  # names and shapes only
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    tensors = {
        name: _first_values(name, tuple(parameter.shape), seed)
        for name, parameter in parameters.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


def _first_values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape)
    bound = SPREAD if "embed" in name else (3 / shape[1]) ** 0.5  # keeps the variance
    return torch.from_numpy(uniform(seed, name, shape, bound))


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character for each byte
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT
    )
    # The tokens' numbers follow from the order in which they are added; the model relies on them.
    assert wrapped.convert_tokens_to_ids(["<eos>", "<pad>"]) == [EOS, PAD]
    return wrapped
