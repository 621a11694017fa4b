"""Short answers of the model, to show base and tuned side by side."""

from collections.abc import Sequence

import torch

from p2pllm.model.adapter import Adapter


def answer(
    adapter: Adapter, prompt: Sequence[int], with_adapter: bool = True, longest: int = 48
) -> str:
    """The most likely continuation of the token ids `prompt`: at most `longest` tokens, greedy."""
    if not with_adapter:
        with adapter.disabled():
            return answer(adapter, prompt, with_adapter=True, longest=longest)
    adapter.model.eval()
    ids = torch.tensor([list(prompt)], device=adapter.device)
    with torch.inference_mode():
        said = adapter.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=adapter.tokenizer.eos_token_id,
            pad_token_id=adapter.tokenizer.pad_token_id,
        )
    fresh = said[0, len(prompt) :]
    return str(adapter.tokenizer.decode(fresh, skip_special_tokens=True)).strip()
