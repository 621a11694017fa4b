"""From a GGUF file to an ordinary model folder: bfloat16 safetensors and a tokenizer.

Run as `python -m p2pllm.model.conversion FILE.gguf FOLDER`, in a process of its own: it needs
1.2 GB and 25 CPU-seconds once, and a peer should not carry that memory along.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig


def convert(gguf: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of a Llama-like `gguf` into `folder`.

    transformers can read such a file but refuses to save the model that it read ("quantized with
    gguf and is not serializable"); hence the configuration and the tensors are written here.
    """
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    described = model.config.to_dict()
    described.pop("quantization_config", None)
    config = LlamaConfig(**(described | {"dtype": torch.bfloat16}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    # A tied head appears once among the parameters, as safetensors wants it.
    tensors = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
