"""One held-out question, answered by the base model and by the tuned one."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import RunConfig
from p2pllm.data.corpus import load_corpus
from p2pllm.data.sources import read_source
from p2pllm.data.tokens import prompt_ids
from p2pllm.model.adapter import adapter_values, attach_adapter
from p2pllm.model.pretrained import load_base
from p2pllm.training.generation import answer

_SHORT = range(30, 90)  # characters of a reference answer that a screen shows well


@dataclass(frozen=True)
class Comparison:
    """The same question, three answers."""

    question: str
    reference: str
    base: str
    tuned: str


def compare(run: RunConfig, final: Path) -> Comparison:
    """Ask a question of the held-out rows; `final` is the folder of the tuned adapter."""
    base = load_base(run.model, run.seed)
    question, reference = _held_out_question(run, base.tokenizer)
    adapter = attach_adapter(base, run.lora, run.seed)
    adapter.adopt(adapter_values(final))
    prompt = prompt_ids(run.data.template, question, "", base.tokenizer)
    return Comparison(
        question,
        reference,
        base=answer(adapter, prompt, with_adapter=False),
        tuned=answer(adapter, prompt),
    )


def _held_out_question(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    groups = {row.group for row in load_corpus(run.data, tokenizer, run.seed).held_out}
    records = [r for r in read_source(run.data) if "instruction" in r and "response" in r]
    held_out = [r for r in records if str(r.get(run.data.eval_by or "")) in groups] or records
    short = [r for r in held_out if len(r["response"]) in _SHORT] or held_out
    chosen = short[len(short) // 2]
    return str(chosen["instruction"]), str(chosen["response"])
