"""One held-out question, answered by the base model and by the tuned one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from p2pllm.config.run import RunConfig
from p2pllm.data.corpus import evaluated, load_held_out
from p2pllm.data.sources import examples_of, name_of, read_source
from p2pllm.data.template import Example
from p2pllm.data.tokens import IGNORED, Row, prompt_ids
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


def compare(run: RunConfig, final: Path) -> Comparison | None:
    """Ask a question of the held-out rows; `final` is the folder of the tuned adapter.

    None when the data has no questions, but only texts.
    """
    base = load_base(run.model, run.seed)
    held_out = load_held_out(run.data, base.tokenizer, run.seed)
    data = evaluated(run.data)
    said = examples_of(read_source(data), data, name_of(data))
    asked = _question([e for e in said if isinstance(e, Example)], held_out, base.tokenizer)
    if asked is None:
        return None
    adapter = attach_adapter(base, run.lora, run.seed)
    adapter.adopt(adapter_values(final))
    prompt = prompt_ids(run.data.template, asked.instruction, asked.context, base.tokenizer)
    return Comparison(
        asked.instruction,
        asked.response,
        base=answer(adapter, prompt, with_adapter=False),
        tuned=answer(adapter, prompt),
    )


def _question(
    examples: Sequence[Example], held_out: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Example | None:
    """The first held-out question with a short answer, or with any; as text, not as tokens."""
    found: Example | None = None
    for row in held_out:
        counted = [label != IGNORED for label in row.labels]
        prompt = str(tokenizer.decode(list(row.input_ids[: counted.index(True)])))
        # Of `ssl.SSL` and `ssl.SSLContext` the longer is meant.
        inside = [e for e in examples if e.instruction and e.instruction in prompt]
        asked = max(inside, key=lambda e: len(e.instruction), default=None)
        if asked is not None and len(asked.response) in _SHORT:
            return asked
        found = found or asked
    return found
